"""One server for most tests of its HTTP interface: starting one takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http.serving import MINI, Receiver, Server
from tests.serving.web import Web


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slow)
            if not (MINI / "model.json").is_file():
                item.add_marker(pytest.mark.skip(reason="weights/mini is not there"))


@contextmanager
def ready(folder: Path, **options: Any) -> Iterator[Server]:
    """A server that is ready. Stopped when the block ends."""
    server = Server(folder, **options)
    try:
        assert server.wait_until("READY", "SETUP_FAILED") == "READY", server.log.read_text()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def shared_server(quick_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a miniature whose own settings are two steps of each stage."""
    with ready(tmp_path_factory.mktemp("server"), weights=quick_mini) as server:
        yield server


@pytest.fixture(scope="session")
def controlled(mini_with_controlnets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a miniature with every ControlNet, an IP-Adapter and LoRAs."""
    cache = str(tmp_path_factory.mktemp("loras"))
    with ready(tmp_path_factory.mktemp("server"), weights=mini_with_controlnets, CASCADE_LORA_CACHE=cache) as server:
        yield server


@pytest.fixture(scope="session")
def cautious(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that fetches from public addresses only, whose files tell settings only, of a model without ControlNets,
    IP-Adapter, LoRAs and distilled weights."""
    from cascade.weights import CONTROLNETS
    from tests.components import copy_mini

    folder = tmp_path_factory.mktemp("server")
    weights = copy_mini(folder / "mini", *CONTROLNETS)
    with ready(folder, weights=weights, CASCADE_PUBLIC_URLS_ONLY="1", CASCADE_METADATA="settings") as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The shared server, idle, whatever the test before did to it."""
    shared_server.wait_until("READY")
    return shared_server


@pytest.fixture
def web() -> Iterator[Web]:
    """Hosts of pictures, good and bad."""
    web = Web()
    yield web
    web.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()
