"""Groups of tests and their order; and what many tests share: a Cascade of tiny networks, and model folders.

Imports of torch and of the engine stand in functions: the process that only hands out tests would wait for them, too.
"""

import gc
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.training.nursery import Nursery

MINI = Path(__file__).parent.parent / "weights" / "mini"

# Groups of tests that take more than 8 s of processor time, the longest first: of all tests, and then of those that are not
# slow. They are begun first, so that at the end no process waits for one of them.
LONGEST = (
    "tests/http",
    "tests/studio",
    "tests/training/test_ahead.py",
    "tests/bulk/test_cluster.py",
    "tests/test_benchmarks.py",
    "tests/miniature/test_stages.py",
    "tests/training/test_sharding.py",
    "tests/test_predict.py",
    "tests/test_readme.py",
    "tests/training/tasks/test_distil.py",
    "tests/weights/test_sources.py",
    "tests/test_scripts.py",
    "tests/miniature/test_scripts.py",
    "tests/hub/test_download.py",
    "tests/test_mini.py",
    "tests/images/test_reading.py",
    "tests/hub/test_save.py",
    "tests/kernels/test_compiled.py",
    "tests/kernels/test_interpreted.py",
    "tests/weights/test_folder.py",
    "tests/weights/lora/test_writing.py",
    "tests/test_pipeline.py",
    "tests/miniature/test_shipping.py",
    "tests/loras/test_loras.py",
    "tests/weights/lora/test_fixtures.py",
    "tests/loras/test_eight_bits.py",
    "tests/weights/test_fp8.py",
    "tests/weights/test_eight_bits.py",
)

# A busy machine is no fault of what is tested: no deadlines.
settings.register_profile("short", deadline=None, max_examples=100)
settings.register_profile("long", deadline=None, max_examples=1000)
# Started by nohup, cron or in the background of a shell, a process ignores SIGINT and hands that on to those that it
# starts; some tests interrupt one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="draw ten times as many random requests and examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and begin with the groups that take longest."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if group_of(item.nodeid) == "tests/gpu":
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    longest = {group: place for place, group in enumerate(LONGEST)}
    # By path, too, because all processes must have one order.
    items.sort(key=lambda item: (longest.get(group_of(item.nodeid), len(longest)), item.path))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Every second of several processes reads the test files from the last to the first.

    In a new clone, all of them rewrite the files' assertions, which takes 9 s of a processor. They keep what they have
    rewritten, so that those that begin at the other end find it.
    """
    report = yield
    if isinstance(collector, pytest.Directory) and int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2:
        report.result.reverse()
    return report


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collects no garbage among what tests import, neither now nor later: it is a million objects and next to no garbage.

    And looks for it less often while they run, because networks are made of many small objects.
    """
    gc.disable()
    gc.set_threshold(5_000, 10, 2)
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def group_of(nodeid: str) -> str:
    """What one of several processes runs: a file, for its fixtures; all that uses one server, one page, or the one GPU."""
    file = nodeid.partition("::")[0]
    return next((room for room in ("tests/gpu", "tests/http", "tests/studio") if file.startswith(f"{room}/")), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Groups in order, to whichever process is free. The marker xdist_group does nothing with this pytest."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Groups(config, log)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Generator["Nursery", None, None]:
    """Makes Python processes for trainings that do not wait for imports."""
    from tests.training.nursery import Nursery

    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def mini_with_controlnets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with ControlNets, an IP-Adapter and LoRAs that have learned nothing, but add something. Not to be changed."""
    from tests.components import save_mini_with_controlnets

    folder = tmp_path_factory.mktemp("weights") / "mini"
    save_mini_with_controlnets(folder)
    return folder


@pytest.fixture(scope="session")
def quick_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature with two steps of each stage, where pictures are made but not looked at, without an IP-Adapter, an adapter
    for few steps, and LoRAs. Not to be changed."""
    from tests.components import copy_mini

    folder = copy_mini(tmp_path_factory.mktemp("weights") / "mini", copy=os.symlink)
    content = json.loads((folder / "model.json").read_text())
    for stage in content["sampler"].values():
        stage["steps"] = 2
    (folder / "model.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def components() -> dict[str, Any]:
    """Every component by its name in a model folder: tiny, float32, on the CPU. Not to be changed."""
    from tests.components import make_components

    return make_components()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> Path:
    """The tiny networks as a model folder, stored in float32. Not to be changed: copy it first."""
    from tests.components import save_components

    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_components(folder, components)
    return folder
