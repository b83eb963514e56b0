"""Compiles Triton kernels for GPUs that this machine does not have, into the folder that `compiled` reads.

Triton's runtime asks a driver for the GPU. Here it gets a driver for a GPU that is not there: the kernels' own functions run
with tensors on the meta device, Triton compiles each kernel with the specialisation that it would have on the GPU, and
nothing is started.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver

from cascade.kernels.compiled import PATHS, SUMS, Kernel, architecture_folder, launcher_folder, launcher_key
from cascade.kernels.parallel import in_threads

# Compute capabilities without the point. One missing here is compiled when a process starts.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Threads and bytes of shared memory that no kernel exceeds: whether it fits is seen on the GPU.
ENOUGH = 2**30


class PretendedDriver:
    """Triton's driver for a GPU of this architecture, which starts nothing. Collects the C sources of launchers.

    Args:
        architecture: the compute capability without the point. It is also the device's number, because Triton keeps compiled
            kernels by device.
        sources: where the launchers' sources are added.
    """

    def __init__(self, architecture: int, sources: set[str]) -> None:
        self.architecture = architecture
        self.sources = sources
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": ENOUGH},
            load_binary=lambda name, kernel, shared, device: (0, 0, 0, 0, ENOUGH),
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        constants = {
            place if isinstance(place, tuple) else (place,): value for place, value in source.constants.items()
        }
        made = nvidia.make_launcher(constants, dict(source.signature), getattr(metadata, "tensordesc_meta", None))
        self.sources.add(made)
        return lambda *arguments: None


@contextlib.contextmanager
def pretended(architecture: int, sources: set[str]) -> Iterator[None]:
    """A context in which Triton's GPU has this architecture, and kernels are not started."""
    before = driver._active  # None if no GPU was asked for yet; to read `active` would ask for one
    driver.set_active(PretendedDriver(architecture, sources))
    try:
        yield
    finally:
        driver.set_active(before)


def compile_kernels(architecture: int, jobs: Collection[Callable[[], object]]) -> tuple[int, set[str]]:
    """Compile all kernels that the jobs start, and write them.

    Args:
        architecture: the compute capability without the point.
        jobs: functions that call kernels with tensors on the meta device.

    Returns:
        How many kernels were written, and the C sources of their launchers.
    """
    made: dict[str, CompiledKernel] = {}
    sources: set[str] = set()
    # Lines of the source are of use to profilers only, and hold paths of this machine.
    with knobs.compilation.scope(), pretended(architecture, sources):
        knobs.compilation.disable_line_info = True
        knobs.compilation.always_compile = True
        Kernel.on_compiled = made.__setitem__
        try:
            with tempfile.TemporaryDirectory() as cache, knobs.cache.scope():
                knobs.cache.dir = cache
                in_threads(jobs)
        finally:
            Kernel.on_compiled = None
    files = {f"{key}.cubin": kernel.asm["cubin"] for key, kernel in made.items()}
    files |= {f"{key}.json": _metadata(kernel) for key, kernel in made.items()}
    _write(architecture_folder(architecture), files)
    return len(made), sources


def _metadata(kernel: CompiledKernel) -> bytes:
    """Triton's metadata of a kernel, without paths of this machine."""
    return json.dumps({**kernel.metadata._asdict(), PATHS: []}, default=vars, sort_keys=True).encode()


def compile_launchers(sources: Iterable[str], python: str) -> int:
    """Compile launchers for a version of Python, and write them. Needs gcc and Python's headers.

    Args:
        sources: C sources.
        python: the path of the Python.

    Returns:
        How many were written.

    Raises:
        OSError, subprocess.CalledProcessError: there is no such Python, gcc or header.
    """
    asked = "import sysconfig as s; print(s.get_config_var('SOABI'), s.get_path('include'), sep='\\n')"
    abi, headers = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.split("\n")[
        :2
    ]
    if not (Path(headers) / "Python.h").is_file():
        raise FileNotFoundError(f"{headers} has no Python.h: install the development files of {python}.")
    utilities = Path(nvidia.dirname, "driver.c").read_text()
    with tempfile.TemporaryDirectory() as folder:
        # The driver's library is not needed to link with it, only its name.
        _gcc("-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1")

        def compiled(source: str) -> tuple[str, bytes]:
            key = launcher_key(source)
            Path(folder, f"{key}.c").write_text(source)
            _gcc(
                f"{folder}/{key}.c", "-s", "-Wno-psabi", f"-L{folder}", "-Wl,--no-as-needed", "-l:libcuda.so.1",
                *(f"-I{place}" for place in (*nvidia.include_dirs, headers)), "-o", f"{folder}/{key}.so",
            )  # fmt: skip
            return f"{key}.so", Path(folder, f"{key}.so").read_bytes()

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            files = dict(threads.map(compiled, {utilities, *sources}))
    _write(launcher_folder(abi), files)
    return len(files)


def _gcc(*arguments: str) -> None:
    subprocess.run([os.environ.get("CC", "gcc"), "-O3", "-shared", "-fPIC", *arguments], check=True)


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace what is in a folder. The sums are written last: without them, nothing is read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    (folder / SUMS).write_text(json.dumps(sums, indent=0))
