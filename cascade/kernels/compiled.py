"""Triton kernels that were compiled before the program starts, and are read from `FOLDER`.

`scripts/compile-kernels` writes them; no GPU is needed for that. A kernel is read if it was compiled from the same source by
the same version of Triton, for the same architecture, with the same specialisation, and if its files have the sums that were
noted. Any other kernel is compiled by Triton as usual.

    compiled/triton-3.6.0/sm_90/             sums.json; for each kernel KEY.json, Triton's metadata, and KEY.cubin
    compiled/triton-3.6.0/cpython-312-.../   sums.json; for each launcher KEY.so

A launcher is a C function through which Python starts a kernel. Triton writes one for each signature, and calls gcc for each.
They depend on the version of Python, and kernels with one signature share one. Triton's own cache is not filled instead,
because its keys contain the sum of libtriton.so, which differs between versions of Python and takes a second to compute.
"""

import ctypes
import functools
import hashlib
import json
import logging
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import build
from triton.runtime.jit import JITFunction

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("compiled")
SUMS = "sums.json"
# How many kernels of this process were "read", and how many were not there ("made" by Triton, or found in its cache).
counts: Counter[str] = Counter()
_lock = threading.Lock()
_load = build._load_module_from_path
_loaded: dict[str, ModuleType] = {}
_loading = threading.Lock()
# An option whose value is a path.
PATHS = "extern_libs"
# A setting of Triton's that does not change the code.
LINES = "TRITON_DISABLE_LINE_INFO"


def _count(what: str) -> None:
    with _lock:
        counts[what] += 1


def version_folder() -> Path:
    """The folder of the installed version of Triton."""
    return FOLDER / f"triton-{triton.__version__}"


def architecture_folder(architecture: int) -> Path:
    """The folder of a GPU architecture: its compute capability without the point, such as 90."""
    return version_folder() / f"sm_{architecture}"


def launcher_folder(abi: str | None = None) -> Path:
    """The folder of a Python's launchers. `abi`: its SOABI; None: this Python's."""
    return version_folder() / (abi or sysconfig.get_config_var("SOABI"))


def launcher_key(source: str) -> str:
    """The key of a launcher with this C source."""
    return hashlib.sha256(source.encode()).hexdigest()


@functools.cache
def _source_sum(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def key_of(kernel: JITFunction, source: ASTSource, target: Any, options: Any) -> str:
    """The key of a kernel: sha256 of all that its code depends on. It is the same on each machine.

    Args:
        kernel: the function.
        source: its signature, constants and attributes (divisibility by 16).
        target: Triton's GPUTarget.
        options: of Triton's backend, such as the number of warps.
    """
    chosen = {name: value for name, value in vars(options).items() if name != PATHS}
    depends = (
        triton.__version__,
        _source_sum(kernel.fn.__code__.co_filename),
        kernel.fn.__qualname__,
        (target.backend, target.arch, target.warp_size),
        source.signature,
        sorted(source.constants.items()),
        sorted(source.attrs.items()),
        sorted((name, sorted(value) if isinstance(value, set) else value) for name, value in chosen.items()),
        sorted(setting for setting in get_cache_invalidating_env_vars().items() if setting[0] != LINES),
    )
    return hashlib.sha256(repr(depends).encode()).hexdigest()


@functools.cache
def _sums(folder: Path) -> Mapping[str, str]:
    """The sha256 of a folder's files by name; empty if there is no folder."""
    file = folder / SUMS
    return json.loads(file.read_bytes()) if file.is_file() else {}


def _checked(folder: Path, name: str) -> Path | None:
    """A file of a folder; None if it is not there or damaged."""
    expected, file = _sums(folder).get(name), folder / name
    if expected is None:
        return None
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
        logger.warning("%s is missing or damaged, so it is compiled again.", file)
        return None
    return file


class Kernel(JITFunction):
    """A Triton kernel that is read from `FOLDER`, or compiled if it is not there. Use `jit`.

    Attributes:
        on_compiled: called with the key of each kernel that Triton compiles, and the kernel; None: nothing is called.
    """

    on_compiled: ClassVar[Callable[[str, CompiledKernel], None] | None] = None

    def _do_compile(
        self, key: str, signature: dict, device: int, constexprs: dict, options: Any, attrs: dict, warmup: bool
    ) -> Any:
        kernel_cache, _, target, _, _ = self.device_caches[device]
        source = ASTSource(self, signature, constexprs, attrs)
        own_key = key_of(self, source, target, options)
        kernel = None if knobs.compilation.always_compile else self._read(own_key, source, target.arch)
        _count("made" if kernel is None else "read")
        if kernel is not None:
            kernel_cache[key] = kernel
            return kernel
        kernel = super()._do_compile(key, signature, device, constexprs, options, attrs, warmup)
        if Kernel.on_compiled is not None:
            Kernel.on_compiled(own_key, kernel)
        return kernel

    def _read(self, key: str, source: ASTSource, architecture: int) -> CompiledKernel | None:
        folder = architecture_folder(architecture)
        files = {ending: _checked(folder, f"{key}.{ending}") for ending in ("json", "cubin")}
        if None in files.values():
            return None
        return CompiledKernel(source, {f"{self.__name__}.{ending}": str(file) for ending, file in files.items()}, key)


def jit(**options: Any) -> Callable[[Callable], JITFunction]:
    """Like `triton.jit`, for kernels that Python starts."""

    def decorated(function: Callable) -> JITFunction:
        return triton.jit(**options)(function) if knobs.runtime.interpret else Kernel(function, **options)

    return decorated


def build_launcher(
    name: str, source: str, folder: str, library_dirs: list[str], include_dirs: list[str], libraries: list[str]
) -> str:
    """The path of a launcher for the C file `source`. Replaces `triton.runtime.build._build`, which calls gcc.

    The arguments are those of `triton.knobs.build.impl`.
    """
    ours = None
    if not knobs.compilation.always_compile:
        ours = _checked(launcher_folder(), f"{launcher_key(Path(source).read_text())}.so")
    if ours is not None:
        try:
            ctypes.CDLL(str(ours))
            _count("launchers read")
            return str(ours)
        except OSError as error:  # of another libc, for example
            logger.warning("%s cannot be loaded, so it is compiled again: %s", ours, error)
    _count("launchers made")
    with _lock:
        knobs.build.impl = None
        try:
            return build._build(name, source, folder, library_dirs, include_dirs, libraries, [])
        finally:
            knobs.build.impl = build_launcher


def load_once(name: str, path: str) -> ModuleType:
    """The module of this name in a file. Replaces Triton's function, and loads each file once in a process.

    All launchers are modules named ``__triton_launcher``. If a file is loaded again, Python writes its functions into the module
    of that name that was loaded last (as for all modules whose state has the size -1). So a thread that read a launcher, while
    another thread read one for the second time, could get the other's: "function takes exactly 19 arguments (28 given)". Some of
    the servers that were started together on a busy machine failed by it.
    """
    with _loading:
        if path not in _loaded:
            _loaded[path] = _load(name, path)
        return _loaded[path]


def use_launchers() -> None:
    """Let Triton load each launcher once, and take it from `FOLDER`, if there are some for this Python."""
    build._load_module_from_path = load_once
    if knobs.build.impl is None and _sums(launcher_folder()):
        knobs.build.impl = build_launcher


def described(architecture: int) -> str:
    """A clause for the log: where this process's kernels came from."""
    name = f"sm_{architecture} and Triton {triton.__version__}"
    if not _sums(architecture_folder(architecture)):
        return f"none had been compiled for {name} by scripts/compile-kernels"
    made = counts["made"]
    return f"{counts['read']} kernels had been compiled for {name}" + (f", {made} had not" if made else "")
