"""Networks in one memory: nothing of them changes, wherever the bytes are taken."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cascade.networks.unet import AttnBlock, StableCascadeUNet
from cascade.packing import ALIGNMENT, Packed
from cascade.weights import NETWORKS


def forward(prior: StableCascadeUNet) -> Tensor:
    torch.manual_seed(0)
    given = {"clip_text_pooled": torch.randn(1, 1, 24), "clip_text": torch.randn(1, 77, 32)}
    with torch.no_grad():
        return prior(torch.randn(1, 16, 4, 6), torch.tensor([0.5]), **given)


def elsewhere(packed: Packed) -> list[Tensor]:
    """Moves all groups into memory of their own, and clears what they were in."""
    copies = [packed.bytes_of(group).clone() for group in range(len(packed.bounds) - 1)]
    for group, bytes_ in enumerate(copies):
        packed.move(group, bytes_)
    packed.host.zero_()
    return copies


@pytest.mark.parametrize("name", list(NETWORKS))
def test_nothing_of_a_network_changes(components: dict[str, Any], name: str) -> None:
    network = copy.deepcopy(components[name]).to(torch.bfloat16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    packed = Packed(network, pin=False)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in network.state_dict().values())
    elsewhere(packed)
    after = network.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)


def test_what_was_joined_stays_joined(components: dict[str, Any]) -> None:
    prior = copy.deepcopy(components["prior"])
    expected = forward(prior)
    prior.join_weights()
    strides = [parameter.stride() for parameter in prior.parameters()]
    attention = next(block for block in prior.blocks() if isinstance(block, AttnBlock)).attention
    packed = Packed(prior, pin=False)
    unjoined = sum(parameter.nbytes for parameter in prior.parameters())
    assert unjoined <= packed.size < unjoined + ALIGNMENT * sum(1 for _ in prior.parameters())
    elsewhere(packed)
    assert [parameter.stride() for parameter in prior.parameters()] == strides
    for first, joined in [(attention.to_q, attention.joined), *((b[0].mapper, joined) for b, joined in prior.joined)]:
        assert joined.holds(first)
    with torch.no_grad():
        attention.to_v.weight.fill_(7)
    assert (attention.joined.weight[-16:] == 7).all()
    assert not torch.equal(forward(prior), expected)
    with torch.no_grad():
        attention.to_v.weight.copy_(
            next(b for b in components["prior"].blocks() if isinstance(b, AttnBlock)).attention.to_v.weight
        )
    torch.testing.assert_close(forward(prior), expected)


def test_only_matrices_of_blocks_are_apart(components: dict[str, Any]) -> None:
    """A bias is read by the block that comes next: it must not go when its own block is done."""
    packed = Packed(copy.deepcopy(components["prior"]), pin=False)
    assert len(packed.bounds) == len(packed.blocks) + 2
    for block, (first, last) in zip(packed.blocks, pairwise(packed.bounds[1:]), strict=True):
        start = packed.host.data_ptr()
        inside = {key for key, one in block.named_parameters() if first <= one.data_ptr() - start < last}
        assert inside == {key for key, one in block.named_parameters() if one.ndim == 2} != set()


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    )
)
def test_any_tensors(shapes: list[tuple[int, int, torch.dtype]]) -> None:
    """With empty ones, of several dtypes, and each with a part of itself, transposed."""
    network = nn.Module()
    for i, (rows, columns, dtype) in enumerate(shapes):
        whole = (torch.arange(rows * columns) + i).view(rows, columns).to(dtype)
        network.register_buffer(f"whole{i}", whole)
        network.register_buffer(f"part{i}", whole[rows // 2 :].t())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    strides = {name: buffer.stride() for name, buffer in network.named_buffers()}
    packed = Packed(network, pin=False)
    assert packed.size <= sum(-(-before[f"whole{i}"].nbytes // ALIGNMENT) * ALIGNMENT for i in range(len(shapes)))
    elsewhere(packed)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.stride() == strides[name]
