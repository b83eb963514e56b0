"""The command line of ``scripts/serve``: becomes Cog's own HTTP server, set up as cog.yaml sets it up in a container.

That server finds by environment variables what to run (COG_PREDICT_TYPE_STUB) and where to listen (PORT), starts its
worker as the ``python`` that PATH finds first, and takes the schema that it validates inputs by from
``.cog/openapi_schema.json`` in its working folder; without that file it lets everything through.
"""

import argparse
import json
import os
import socket
import sys
from pathlib import Path

import yaml

from scripts.environment import ROOT
from scripts.openapi import SchemaError, make_schema

SCHEMA = ROOT / ".cog" / "openapi_schema.json"


def read_config() -> tuple[str, dict[str, str]]:
    """What cog.yaml runs, as ``file:class``, and the environment variables that it sets."""
    config = yaml.safe_load((ROOT / "cog.yaml").read_text(encoding="utf-8"))
    return config["run"], dict(variable.split("=", 1) for variable in config["environment"])


def write_schema(runner: str) -> None:
    """Bring the schema up to date with ``file:class``; whoever reads meanwhile finds the old one or the new one.

    Raises:
        SchemaError: Cog could not make one.
    """
    file, _, name = runner.partition(":")
    schema = make_schema((ROOT / file).read_text(encoding="utf-8"), name)
    SCHEMA.parent.mkdir(exist_ok=True)
    partial = SCHEMA.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(schema), encoding="utf-8")
    partial.replace(SCHEMA)


def check_address(host: str, port: int) -> None:
    """Raises OSError, or OverflowError for a port that cannot be, unless a server can listen there."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address[0], port, *address[2:]))


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
    options = parser.parse_args(arguments)
    try:
        check_address(options.host, options.port)
    except (OSError, OverflowError) as error:
        sys.stderr.write(f"Cannot listen at {options.host}, port {options.port}: {error}.\n")
        return 1
    runner, variables = read_config()
    try:
        write_schema(runner)
    except SchemaError as error:
        sys.stderr.write(f"{runner} has inputs that Cog cannot describe. {error}\n")
        return 1
    command = [sys.executable, "-m", "cog.server.http", "--host", options.host]
    if options.upload_url:
        command += ["--upload-url", options.upload_url]
    if options.await_explicit_shutdown:
        command += ["--await-explicit-shutdown", "true"]
    environment = {
        "LOG_FORMAT": "console",
        **variables,
        **os.environ,
        "COG_PREDICT_TYPE_STUB": runner,
        "PORT": str(options.port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if environment.get("CASCADE_WEIGHTS"):
        environment["CASCADE_WEIGHTS"] = str(Path(environment["CASCADE_WEIGHTS"]).absolute())
    os.chdir(ROOT)
    return os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    sys.exit(main())
