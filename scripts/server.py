"""The command line of ``scripts/serve``: becomes Cog's own HTTP server, configured by cog.yaml as in a container.

Environment variables tell that server what to run (COG_PREDICT_TYPE_STUB) and where to listen (PORT). It starts its
worker with the first ``python`` in PATH. It validates inputs by the schema ``.cog/openapi_schema.json`` in its working
folder; without that file it accepts everything.

It listens at 127.0.0.1 at a free port. serving/front.py listens at the given address, checks ids, and passes requests
on, unless --without-front is given.
"""

import argparse
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from scripts.environment import ROOT
from scripts.openapi import add_training, make_schema
from scripts.signatures import SchemaError

SCHEMA = ROOT / ".cog" / "openapi_schema.json"
COG_FOLDERS = Path("/tmp/coglet/predictions")
"""Where Cog makes a folder for each prediction. It is the same for all users and every TMPDIR."""


def read_config() -> tuple[str, str, dict[str, str]]:
    """The ``file:class`` that cog.yaml runs, the ``file:function`` that trains, and the environment variables that it sets."""
    config = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return config["run"], config["train"], dict(variable.split("=", 1) for variable in config["environment"])


def write_schema(runner: str, trainer: str) -> Path:
    """Update the schema of ``file:class`` and ``file:function``, atomically.

    Returns:
        The working folder for Cog's server: the repository, or a temporary folder if the repository is read-only.

    Raises:
        SchemaError: Cog could not make a schema.
    """
    file, _, name = runner.partition(":")
    document = make_schema((ROOT / file).read_text(encoding="utf-8"), name)
    file, _, name = trainer.partition(":")
    add_training(document, (ROOT / file).read_text(encoding="utf-8"), name)
    schema = json.dumps(document)
    with contextlib.suppress(OSError):
        if SCHEMA.read_text(encoding="utf-8") == schema:
            return ROOT
    try:
        save_schema(SCHEMA, schema)
        return ROOT
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="cascade-serve-"))
        save_schema(folder / ".cog" / SCHEMA.name, schema)
        return folder


def save_schema(file: Path, schema: str) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(schema, encoding="utf-8")
    partial.replace(file)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of a host: localhost may have an IPv4 and an IPv6 address.

    Raises:
        OSError: an address is in use or not allowed, or none belongs to this machine.
        OverflowError: the port's number is not possible.
    """
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            one = socket.socket(family, kind, protocol)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind_soon(one, (address[0], port, *address[2:]))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            missing = error
        else:
            sockets.append(one)
    if not sockets:
        raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return sockets


def bind_soon(one: socket.socket, address: tuple[Any, ...]) -> None:
    """Bind a socket. Retries, because the front of a server that has just ended keeps its address for a moment."""
    for _ in range(10):
        try:
            return one.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(0.05)
    return one.bind(address)


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upload_problem(url: str) -> str | None:
    """What is wrong with an upload URL. Cog would notice it only after the first picture is made, and lose the picture."""
    try:
        parsed = urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.port == 0:
            return "it must be an http or https URL"
    except ValueError:
        return "it must be an http or https URL"
    # Cog appends the file's name to the URL, behind a query.
    return "it must have no query and no fragment" if parsed.query or parsed.fragment else None


def share_cog_folders() -> None:
    """Make the folder for Cog's predictions, writable for all users of the machine.

    Cog itself makes it writable for its own user only. The server of another user would then fail at every prediction.

    Raises:
        OSError: the folder cannot be made, or belongs to another user who does not share it.
    """
    COG_FOLDERS.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        COG_FOLDERS.chmod(0o1777)
    if not os.access(COG_FOLDERS, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"it belongs to {COG_FOLDERS.owner()}")


def start_front(sockets: list[socket.socket], port: int, folder: Path) -> None:
    """Start the front of the server that this process becomes. It ends with this process."""
    numbers = [one.fileno() for one in sockets]
    command = [sys.executable, "-m", "serving.front", "--to", str(port), "--parent", str(os.getpid())]
    command += ["--sockets", *map(str, numbers)]
    if folder != ROOT:
        command += ["--remove", str(folder)]
    subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=numbers)


def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the server; ``arguments`` default to the process's. Returns 1 if that fails."""
    parser = argparse.ArgumentParser(prog="scripts/serve", description="Serve predictions over HTTP.")
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT", 5000), help="where to listen (default: PORT, else 5000)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at (default: %(default)s, this machine only; 0.0.0.0: all)",
    )
    parser.add_argument(
        "--upload-url", metavar="URL", help="upload pictures there by PUT, not return them as data URLs"
    )
    parser.add_argument(
        "--await-explicit-shutdown", action="store_true", help="ignore SIGTERM; end at POST /shutdown or Ctrl+C"
    )
    parser.add_argument(
        "--without-front",
        action="store_true",
        help="expose Cog's server directly; use it only behind a proxy that checks ids, because some ids end the server",
    )
    parser.add_argument("--train", action="store_true", help="serve trainings of LoRAs instead of predictions")
    options = parser.parse_args(arguments)
    if options.upload_url and (problem := upload_problem(options.upload_url)):
        sys.stderr.write(f"--upload-url is {options.upload_url!r}; {problem}.\n")
        return 1
    try:
        share_cog_folders()
    except OSError as error:
        sys.stderr.write(
            f"Cog keeps predictions in {COG_FOLDERS}, which this user cannot write: {error.strerror}. Its owner must remove it.\n"
        )
        return 1
    try:
        sockets = bind(options.host, options.port)
    except (OSError, OverflowError) as error:
        sys.stderr.write(f"Cannot listen at {options.host}, port {options.port}: {str(error).rstrip('.')}.\n")
        return 1
    runner, trainer, variables = read_config()
    try:
        folder = write_schema(runner, trainer)
    except SchemaError as error:
        sys.stderr.write(f"{runner} or {trainer} has inputs that Cog cannot describe. {error}\n")
        return 1
    host, port = "127.0.0.1", free_port()
    if options.without_front:
        address, port = sockets[0].getsockname()[:2]
        host = f"[{address}]" if ":" in address else address
    command = [sys.executable, "-m", "cog.server.http", "--host", host]
    if options.train:
        command += ["--x-mode", "train"]
    if options.upload_url:
        command += ["--upload-url", options.upload_url]
    if options.await_explicit_shutdown:
        command += ["--await-explicit-shutdown", "true"]
    environment = {
        "LOG_FORMAT": "console",
        **variables,
        **os.environ,
        "COG_PREDICT_TYPE_STUB": str(ROOT / runner),
        "COG_TRAIN_TYPE_STUB": str(ROOT / trainer),
        "PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if environment.get("CASCADE_WEIGHTS"):
        environment["CASCADE_WEIGHTS"] = str(Path(environment["CASCADE_WEIGHTS"]).absolute())
    if folder != ROOT:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    if not options.without_front:
        start_front(sockets, port, folder)
    for one in sockets:
        one.close()
    os.chdir(folder)
    return os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    sys.exit(main())
