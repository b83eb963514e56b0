"""A process that starts with compiled kernels compiles nothing, and makes the same pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MINI = ROOT / "weights" / "mini"

# Compiles for this GPU as if it were not there.
COMPILE = """
import sys
from pathlib import Path
import torch
from cascade.kernels import compiled
from cascade.kernels.compiling import compile_kernels, compile_launchers
from scripts.compile_kernels import jobs
compiled.FOLDER = Path(sys.argv[1])
_, sources = compile_kernels(int(sys.argv[2]), jobs([Path(sys.argv[3])], torch.bfloat16, published=False))
compile_launchers(sources, sys.executable)
"""
# Makes pictures, one of them in a batch of two, and prints what was read and made.
USE = """
import hashlib, json, logging, sys
from pathlib import Path
from cascade.kernels import compiled
compiled.FOLDER = Path(sys.argv[1])
from cascade import Cascade, Request
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.basicConfig(level=logging.INFO, handlers=[handler])
cascade = Cascade.load(sys.argv[2], memory=sys.argv[3])
pictures = cascade.generate(Request("a red circle on a blue background", seed=1, num_images=2, width=256, height=256))
pictures += cascade.generate(Request("a green square", seed=5, width=384, height=256, guidance_scale_decoder=1.1))
digests = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
print(json.dumps([dict(compiled.counts), digests, [line for line in said if "kernels of" in line]]))
"""


def run(code: str, *arguments: object, cache: Path) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_is_compiled_and_pictures_are_the_same(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    folder = tmp_path / "compiled"
    run(COMPILE, folder, 10 * major + minor, MINI, cache=tmp_path / "first")
    counts, pictures, said = json.loads(run(USE, folder, MINI, "resident", cache=tmp_path / "empty"))
    assert counts["read"] > 20
    assert counts.keys() == {"read", "launchers read"}  # none was made
    assert not list((tmp_path / "empty").rglob("*.cubin"))
    assert f"{counts['read']} kernels had been compiled for sm_{10 * major + minor}" in said[0]

    others, same, said = json.loads(run(USE, tmp_path / "nothing", MINI, "resident", cache=tmp_path / "other"))
    assert "read" not in others
    assert "none had been compiled for" in said[0]
    assert same == pictures


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["offload", "stream"])
def test_other_memory_modes_compile_nothing(tmp_path: Path, memory: str) -> None:
    major, minor = torch.cuda.get_device_capability()
    folder = tmp_path / "compiled"
    run(COMPILE, folder, 10 * major + minor, MINI, cache=tmp_path / "first")
    counts, _, _ = json.loads(run(USE, folder, MINI, memory, cache=tmp_path / "empty"))
    assert "made" not in counts
