"""What the server's process imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

IMPORTED = """
import sys
import predict
print(*sys.modules)
"""
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


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_setup_imports_only_what_it_uses() -> None:
    imported = run(IMPORTED).split()
    assert "transformers.models.clip.modeling_clip" in imported
    assert not set(UNUSED) & set(imported)
    assert not [name for name in imported if name.startswith("diffusers.pipelines")]


@pytest.mark.slow
def test_what_was_left_out_can_be_used_later() -> None:
    import torch

    run(USED.replace("AVAILABLE", str(torch.distributed.is_available())))
