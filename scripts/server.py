"""The command line of ``scripts/serve``: becomes Cog's own HTTP server, set up as cog.yaml sets it up in a container.

That server finds by environment variables what to run (COG_PREDICT_TYPE_STUB) and where to listen (PORT), starts its
worker as the ``python`` that PATH finds first, and takes the schema that it validates inputs by from
``.cog/openapi_schema.json`` in its working folder; without that file it lets everything through.

It listens at 127.0.0.1, at a port of its own. Before it stands serving/front.py, which checks ids, unless that is left
out.
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
from scripts.openapi import SchemaError, add_training, make_schema

SCHEMA = ROOT / ".cog" / "openapi_schema.json"
COG_FOLDERS = Path("/tmp/coglet/predictions")
"""Where Cog makes a folder for each prediction, whoever serves and whatever TMPDIR is."""


def read_config() -> tuple[str, str, dict[str, str]]:
    """What cog.yaml runs and trains, as ``file:class`` and ``file:function``, and the environment variables that it sets."""
    config = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return config["run"], config["train"], dict(variable.split("=", 1) for variable in config["environment"])


def write_schema(runner: str, trainer: str) -> Path:
    """Bring the schema up to date with ``file:class`` and ``file:function``.

    Whoever reads meanwhile finds the old one or the new one.

    Returns:
        The working folder for Cog's server: the repository, or a temporary one if that cannot be written.

    Raises:
        SchemaError: Cog could not make one.
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
    """Sockets bound to every address of a host: localhost may have one of IPv4 and one of IPv6.

    Raises:
        OSError: one is in use or not allowed, or none is of this machine.
        OverflowError: a port cannot have this number.
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
    """Bind a socket. The front of a server that has just ended holds its address for a moment more."""
    for _ in range(10):
        try:
            return one.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(0.05)
    return one.bind(address)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upload_problem(url: str) -> str | None:
    """What is wrong with a place to put pictures. Cog notices that when the first picture is made, and loses it."""
    try:
        parsed = urlsplit(url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname or parsed.port == 0:
            return "it must be an http or https URL"
    except ValueError:
        return "it must be an http or https URL"
    # Cog puts the file's name behind the query.
    return "it must have no query and no fragment" if parsed.query or parsed.fragment else None


def share_cog_folders() -> None:
    """Make the folder for Cog's predictions, in which every user of the machine may then make more.

    Cog makes it for its own user alone. To a server of another user, every slot would be lost at its first prediction.

    Raises:
        OSError: it cannot be made, or another user has made it for himself.
    """
    COG_FOLDERS.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        COG_FOLDERS.chmod(0o1777)
    if not os.access(COG_FOLDERS, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"it belongs to {COG_FOLDERS.owner()}")


def start_front(sockets: list[socket.socket], port: int, folder: Path) -> None:
    """Start the front of the server that this process becomes; it ends when this process does."""
    numbers = [one.fileno() for one in sockets]
    command = [sys.executable, "-m", "serving.front", "--to", str(port), "--parent", str(os.getpid())]
    command += ["--sockets", *map(str, numbers)]
    if folder != ROOT:
        command += ["--remove", str(folder)]
    subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=numbers)


def main(arguments: list[str] | None = None) -> int:
    """Replace this process by the server; ``arguments`` default to the process's. Returns only what went wrong: 1."""
    parser = argparse.ArgumentParser(prog="scripts/serve", description="Serve predictions over HTTP.")
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT", 5000), help="where to listen (default: PORT, else 5000)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen at (default: %(default)s, this machine only; 0.0.0.0: all)",
    )
    parser.add_argument("--upload-url", metavar="URL", help="put pictures there, instead of into the answer")
    parser.add_argument(
        "--await-explicit-shutdown", action="store_true", help="ignore SIGTERM; end at POST /shutdown or Ctrl+C"
    )
    parser.add_argument(
        "--without-front",
        action="store_true",
        help="let Cog's server be reached itself, which ids can end: for behind a proxy that checks them",
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
            f"Cog keeps predictions in {COG_FOLDERS}, which this user cannot write: {error.strerror}. Remove it, as its owner.\n"
        )
        return 1
    try:
        sockets = bind(options.host, options.port)
    except (OSError, OverflowError) as error:
        sys.stderr.write(f"Cannot listen at {options.host}, port {options.port}: {error}.\n")
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
