"""The command line of ``scripts/studio``: loads the model, makes the page, and serves it until Ctrl+C."""

import argparse
import contextlib
import logging
import os
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before Gradio is imported: it would ask its makers for its newest version, and tell them of the start.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"

import gradio as gr
import uvicorn
from fastapi import FastAPI

from cascade.weights import WeightsError
from serving.service import Service
from serving.settings import Settings
from studio.page import Page
from studio.session import Session

HERE = Path(__file__).parent
LOCAL_ONLY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/studio", description="Open a page in the browser to make pictures with."
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, help="a folder that keeps the pictures (default: they are deleted when the page ends)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the page's address")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve the page; returns the exit code."""
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="cascade-studio-") as folder:
        try:
            listening = socket.create_server((options.host, options.port))
        except (OSError, OverflowError) as error:
            sys.stderr.write(f"The page cannot be served at {options.host}:{options.port}: {error}.\n")
            return 1
        try:
            session = load(Path(folder), options.output or Path(folder, "pictures"))
        except (WeightsError, ValueError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
        session.warm_up()
        address = f"http://{options.host}:{listening.getsockname()[1]}"
        logging.info("Open %s. Ctrl+C ends it.", address)
        if not options.no_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server_of(session).run(sockets=[listening])
    return 0


def load(folder: Path, pictures: Path) -> Session:
    """A session with the model that the environment names.

    Args:
        folder: for Gradio's copies of files.
        pictures: gets the pictures.

    Raises:
        WeightsError, ValueError: as `Service.load`.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    return Session(Service.load(Settings.from_environment()), pictures)


def server_of(session: Session) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app(Page(session)), log_level="warning", timeout_graceful_shutdown=1))


@contextlib.contextmanager
def served(session: Session) -> Iterator[str]:
    """The page of a session at a free port of this machine, for programs; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(session)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def app(page: Page) -> Callable[..., Any]:
    """The page as an ASGI application. Browsers load nothing for it from another host: they are told not to."""
    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=("ui-monospace", "monospace")).set(
        # Gradio's own have contrasts of 2 to 4; 4.5 can be read.
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    mounted = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.blocks,
        path="/",
        allowed_paths=[str(page.session.folder)],
        theme=theme,
        css_paths=HERE / "style.css",
        js=(HERE / "page.js").read_text("utf-8"),
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
    )

    async def local_only(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", LOCAL_ONLY)]
            await send(message)

        await mounted(scope, receive, with_policy)

    return local_only
