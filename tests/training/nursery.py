"""Python processes that do not wait for imports: forks of one process that has imported what a training imports.

Those imports take 6 s of a processor; a few steps of the smallest networks take less. All else is as in a process that Python
starts: arguments, environment, folder, files, signals and exit code. But variables that libraries read as they are imported,
such as OMP_NUM_THREADS, are the nursery's.

Imports that take long stand in functions: `stand_in` runs in processes that do without them.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
# Linux takes no longer address of a socket than 107 bytes.
STAND_IN = """#!{python} -IS
import sys
sys.path.insert(0, {here!r})
import nursery
nursery.stand_in({address!r})
"""


class Child:
    """A process that the nursery has forked.

    Attributes:
        pid: its number; nobody else's before `wait` returns.
    """

    def __init__(self, address: str, arguments: list[str], environment: Mapping[str, str], files: list[int]) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        socket.send_fds(self.connection, [b"\0"], files)
        request = [arguments, dict(environment), os.getcwd()]
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.answers = self.connection.makefile()
        self.pid = int(self.answers.readline())

    def wait(self) -> int:
        """Its exit code, minus the signal that ended it."""
        with self.connection, self.answers:
            return int(self.answers.readline())


class Nursery:
    """The process that forks; a context.

    Attributes:
        python: a program that stands for Python: it has the nursery fork a process, and passes signals and the exit code on.
            If it is killed, so is the process.
    """

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "socket")
        self.python = folder / "python"
        self.python.write_text(
            STAND_IN.format(python=sys.executable, here=str(Path(__file__).parent), address=self.address)
        )
        self.python.chmod(0o755)

    def __enter__(self) -> "Nursery":
        # Otherwise diffusers would initialise CUDA as it is imported, and no fork could use it.
        variables = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.nursery", self.address, str(self.python)],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()

    def start(self, *arguments: str | Path, errors: Path) -> Child:
        """Starts a process with this one's environment and folder, whose stderr is a new file."""
        with errors.open("w") as file:
            return Child(self.address, [*map(str, arguments)], os.environ, [0, 1, file.fileno()])


def stand_in(address: str) -> NoReturn:
    """What `Nursery.python` does."""
    child: Child | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            os.kill(child.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    child = Child(address, sys.argv[1:], os.environ, [0, 1, 2])
    for one in early:
        os.kill(child.pid, one)
    code = child.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Imports, and forks until stdin ends. Nothing runs before the forks, threads least of all."""
    import gc

    address, sys.executable = sys.argv[1:]
    gc.disable()
    import torch.distributed.run
    import torch.utils.tensorboard  # noqa: F401

    import scripts.benchmark_training  # noqa: F401
    import training.run  # noqa: F401

    gc.freeze()  # so that no fork looks for garbage among what was imported
    gc.enable()
    attending = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
            connection, _ = listening.accept()
            attending.append(os.fork())
            if not attending[-1]:
                listening.close()
                attend(connection)
            connection.close()
            attending = [one for one in attending if not os.waitpid(one, os.WNOHANG)[0]]
    for one in attending:
        os.waitpid(one, 0)


def attend(connection: socket.socket) -> NoReturn:
    """Forks the process that was asked for, and waits for it."""
    _, files, *_ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        arguments, environment, folder = json.loads(lines.readline())
    child = os.fork()
    if not child:
        connection.close()
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without taking all imported modules apart, for 0.6 s
    for file in files:
        os.close(file)
    connection.sendall(b"%d\n" % child)
    ended = os.pidfd_open(child)
    if ended not in select.select([ended, connection.fileno()], [], [])[0]:  # who asked for it is no more
        os.kill(child, signal.SIGKILL)
    about = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert about is not None
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % (about.si_status if about.si_code == os.CLD_EXITED else -about.si_status))
        connection.recv(1)  # ends with the connection
    os.waitpid(child, 0)
    os._exit(0)


def run(arguments: list[Any]) -> int:
    """What ``python ARGUMENTS`` does, for a module or a file; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("sitecustomize")  # Python itself imports it, if it is on the path
    while arguments[0] == "-u":
        arguments = arguments[1:]
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], os.getcwd()
            sys.modules.pop(sys.argv[0], None)  # it is run as another one, whose name is __main__
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
