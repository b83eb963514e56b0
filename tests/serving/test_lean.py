"""What the server's process imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

IMPORTED = """
import sys
from serving import lean
lean.import_lean()
from scripts.command_line import main
assert main(sys.argv[1:]) == 0
print(*sys.modules)
"""
SMALL = [f"-i{given}" for given in ("steps_prior=1", "steps_decoder=1", "width=64", "height=64", "seed=1")]
USED = """
import predict
import torch
from diffusers.utils.torch_utils import maybe_allow_in_graph
from transformers import CLIPConfig, CLIPModel
from transformers.masking_utils import TransformGetItemToIndex
assert torch.distributed.is_available() is AVAILABLE
assert torch.compile(lambda x: x + 1, backend="eager", fullgraph=True)(torch.ones(2)).tolist() == [2, 2]
assert torch.compiler.disable(len)([1]) == 1
assert maybe_allow_in_graph(torch.nn.Identity) is torch.nn.Identity
assert type(TransformGetItemToIndex()).__module__ == "torch._dynamo._trace_wrapped_higher_order_op"
"""
# Each took 0.1 to 2 s.
UNUSED = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "sympy",
    "peft",
    "pandas",
)


def run(code: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "CASCADE_WEIGHTS": str(ROOT / "weights" / "mini")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_picture_imports_only_what_it_uses(tmp_path: Path) -> None:
    imported = run(IMPORTED, *SMALL, "-o", tmp_path / "out.png").split()
    assert "transformers.models.clip.modeling_clip" in imported
    assert not set(UNUSED) & set(imported)
    assert not [name for name in imported if name.startswith("diffusers.pipelines")]


@pytest.mark.slow
def test_what_was_left_out_can_be_used_later() -> None:
    import torch

    run(USED.replace("AVAILABLE", str(torch.distributed.is_available())))
