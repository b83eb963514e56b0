"""Kernels that are compiled before the program starts. Triton compiles for GPUs that are not there; nothing runs on one."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import build

from cascade.kernels import compiled
from cascade.kernels import triton as kernels
from cascade.kernels.compiled import Kernel
from cascade.kernels.compiling import compile_kernels, compile_launchers, pretended
from cascade.kernels.e4m3 import E4M3
from cascade.kernels.parallel import in_threads
from cascade.kernels.stream import Product, Stream
from cascade.networks.stage_a import StageA
from cascade.running.precompile import jobs_of

Jobs = list[Callable[[], object]]
gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def forget() -> None:
    """Let this process start over, as a new one."""
    for kernel in vars(kernels).values():
        if isinstance(kernel, Kernel):
            kernel.device_caches.clear()
    compiled._sums.cache_clear()
    compiled.counts.clear()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))  # empty
    forget()
    yield tmp_path / "compiled"
    forget()


@pytest.fixture(scope="module")
def jobs() -> Jobs:
    """Functions that run the two kernels of a small Stage A, in one width."""
    with torch.device("meta"):
        network = StageA(levels=2, bottleneck_blocks=1, embed_dim=32)
    network.to(torch.bfloat16).use_kernels("triton")
    return jobs_of([], network)


@pytest.fixture(scope="module")
def compiled_once(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, set[str]]:
    """The kernels for sm_90: a folder, their number, and the sources of their launchers."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "FOLDER", folder / "compiled")
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        forget()
        return folder / "compiled", *compile_kernels(90, jobs)


@pytest.fixture
def made(compiled_once: tuple[Path, int, set[str]], folder: Path) -> tuple[int, set[str]]:
    """The kernels for sm_90, in this test's folder: their number, and the sources of their launchers."""
    shutil.copytree(compiled_once[0], folder)
    return compiled_once[1:]


def run(jobs: Jobs, architecture: int) -> dict[str, int]:
    """How many kernels were read and made when the jobs run on such a GPU, in a new process."""
    forget()
    with pretended(architecture, set()):
        for job in jobs:
            job()
    return dict(compiled.counts)


@pytest.mark.slow
def test_compiled_kernels_are_read_for_their_architecture_alone(
    jobs: Jobs, made: tuple[int, set[str]], folder: Path
) -> None:
    count, sources = made
    assert count == len(list(folder.rglob("*.cubin"))) > 0
    assert 0 < len(sources) <= count
    assert run(jobs, 90) == {"read": count}
    assert "had not" not in compiled.described(90)
    assert run(jobs, 89) == {"made": count}
    assert compiled.described(89).startswith("none had been compiled for sm_89 and Triton ")
    assert not any(str(Path.cwd()).encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_damaged_files_are_compiled_anew(
    jobs: Jobs, made: tuple[int, set[str]], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count, _ = made
    damaged = sorted(folder.rglob("*.cubin"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert run(jobs, 90) == {"read": count - 1, "made": 1}
    assert f"{damaged} is missing or damaged, so it is compiled again." in caplog.messages


def key(architecture: int = 90, signature: str = "*bf16", channels: int = 32, path: str = "/a/libdevice.bc") -> str:
    target = GPUTarget("cuda", architecture, 32)
    options = make_backend(target).parse_options({"num_warps": 4})
    object.__setattr__(options, compiled.PATHS, (("libdevice", path),))
    source = ASTSource(kernels._row_statistics, {"x_ptr": signature}, {(5,): channels})
    return compiled.key_of(kernels._row_statistics, source, target, options)


def test_keys_depend_on_what_the_code_depends_on() -> None:
    assert len({key(), key(89), key(signature="*fp16"), key(channels=64)}) == 4


def test_keys_do_not_depend_on_where_triton_is_installed() -> None:
    assert key(path="/a/libdevice.bc") == key(path="/b/libdevice.bc")


# Loads a launcher without gcc, beside a library that has the functions of CUDA's driver, but does nothing.
LOADING = """
import ctypes, importlib.util, os, sys
stub, source, folder = sys.argv[1:]
ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
os.environ["PATH"] = ""
from pathlib import Path
from cascade.kernels import compiled
compiled.FOLDER = Path(folder)
compiled.use_launchers()
from triton.runtime.build import compile_module_from_src
print(compile_module_from_src(Path(source).read_text(), "__triton_launcher").launch, dict(compiled.counts))
"""


@gcc
@pytest.mark.slow
def test_launchers_need_no_gcc(made: tuple[int, set[str]], folder: Path, tmp_path: Path) -> None:
    _, sources = made
    assert compile_launchers(sources, sys.executable) == len(sources) + 1  # and the driver's functions
    source = tmp_path / "launcher.c"
    source.write_text(sorted(sources)[0])

    own = compiled.launcher_folder() / f"{compiled.launcher_key(source.read_text())}.so"
    names = subprocess.run(["nm", "-D", "--undefined-only", own], check=True, capture_output=True, text=True).stdout
    needed = [line.split()[-1] for line in names.splitlines() if line.split()[-1].startswith("cu")]
    stub = tmp_path / "stub.c"
    stub.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in needed))
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", stub, "-o", tmp_path / "libcuda.so.1"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "libcuda.so.1", source, folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "built-in function launch" in done.stdout
    assert "{'launchers read': 1}" in done.stdout


LAUNCHER = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *args) { return PyLong_FromLong(%d); }
static PyMethodDef methods[] = {{"launch", launch, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "__triton_launcher", NULL, -1, methods};
PyMODINIT_FUNC PyInit___triton_launcher(void) { return PyModule_Create(&module); }
"""


@gcc
def test_a_launcher_read_again_leaves_the_others_as_they_are() -> None:
    """As several threads do: kernels with one signature share a launcher. All launchers are modules of one name."""
    one, other, again = (build.compile_module_from_src(LAUNCHER % n, "__triton_launcher") for n in (1, 2, 1))
    assert [module.launch() for module in (one, other, again)] == [1, 2, 1]


@gcc
def test_threads_get_the_launchers_that_they_read() -> None:
    def read(number: int) -> None:
        found.append((number, build.compile_module_from_src(LAUNCHER % number, "__triton_launcher").launch()))

    found: list[tuple[int, int]] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as possible
    try:
        in_threads([partial(read, number % 8) for number in range(1000)])
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 1000
    assert [(number, got) for number, got in found if number != got] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [89, 90])
def test_numbers_in_e4m3_are_rounded_by_one_instruction(
    architecture: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To nearest, and with 448 for values beyond. On sm_89 from float16, which has 7 bits more."""
    made: dict[str, str] = {}
    monkeypatch.setattr(Kernel, "on_compiled", lambda key, kernel: made.update({kernel.name: kernel.asm["ptx"]}))
    with torch.device("meta"), torch.no_grad():
        convolution = torch.nn.Conv2d(64, 64, 3, groups=64, dtype=torch.bfloat16)
        x, value = torch.empty(1, 2, 4, 64), torch.empty(1, 2, 4, 64, dtype=torch.bfloat16)
        weight = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
        stream = Stream(x, product=Product(value, torch.empty(1)))
        with pretended(architecture, set()):
            kernels.norm(stream, torch.bfloat16, e4m3=True)
            kernels.depthwise_norm(Stream(x), convolution, torch.bfloat16, e4m3=True)
            kernels.gelu_response_e4m3(value, weight, weight)
            kernels.dequantise(torch.empty(4, 64, dtype=E4M3), torch.empty(4, 1), torch.bfloat16)
    rounding = {name for name, code in made.items() if "cvt.rn.satfinite.e4m3x2.f" in code}
    assert rounding >= {"_norm", "_depthwise_norm", "_respond"}
    assert made.keys() == {*rounding, "_response_sizes", "_dequantise"}
