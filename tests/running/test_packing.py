"""Packed networks: moving their bytes changes neither values nor layout."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cascade.kernels.layers import put_channels_side_by_side
from cascade.networks.unet import ResBlock, StableCascadeUNet
from cascade.running.packing import ALIGNMENT, HostWeights
from cascade.weights import NETWORKS
from tests.components import copied


def forward(prior: StableCascadeUNet) -> Tensor:
    torch.manual_seed(0)
    given = {"clip_text_pooled": torch.randn(1, 1, 24), "clip_text": torch.randn(1, 77, 32)}
    with torch.no_grad():
        return prior(torch.randn(1, 16, 4, 6), torch.tensor([0.5]), **given)


def elsewhere(packed: HostWeights) -> list[Tensor]:
    """Move all groups into new memory, and clear the old memory."""
    copies = [packed.bytes_of(group).clone() for group in range(len(packed.bounds) - 1)]
    for group, bytes_ in enumerate(copies):
        packed.move(group, bytes_)
    packed.host.zero_()
    return copies


@pytest.mark.parametrize("name", list(NETWORKS))
def test_nothing_of_a_network_changes(components: dict[str, Any], name: str) -> None:
    network = copied(components[name]).to(torch.bfloat16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    packed = HostWeights(network, pin=False)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in (*network.parameters(), *network.buffers()))
    elsewhere(packed)
    after = network.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)


def test_a_network_computes_the_same_wherever_its_tensors_are(components: dict[str, Any]) -> None:
    prior = copied(components["prior"])
    expected = forward(prior)
    for block in prior.blocks():
        if isinstance(block, ResBlock):
            put_channels_side_by_side(block.depthwise)  # as the kernels need them
    strides = [parameter.stride() for parameter in prior.parameters()]
    packed = HostWeights(prior, pin=False)
    whole = sum(parameter.nbytes for parameter in prior.parameters())
    assert whole <= packed.size < whole + ALIGNMENT * sum(1 for _ in prior.parameters())
    elsewhere(packed)
    assert [parameter.stride() for parameter in prior.parameters()] == strides
    assert torch.equal(forward(prior), expected)
    name = next(name for name in prior.state_dict() if name.endswith("to_v.weight"))
    prior.state_dict()[name].fill_(7)
    assert not torch.equal(forward(prior), expected)
    prior.state_dict()[name].copy_(components["prior"].state_dict()[name])
    assert torch.equal(forward(prior), expected)


def test_only_matrices_of_blocks_are_apart(components: dict[str, Any]) -> None:
    """A bias is read by the following block, so it must stay when its own block is done."""
    packed = HostWeights(copied(components["prior"]), pin=False)
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
    """Including empty and transposed tensors, of several dtypes."""
    network = nn.Module()
    for i, (rows, columns, dtype) in enumerate(shapes):
        whole = (torch.arange(rows * columns) + i).view(rows, columns).to(dtype)
        network.register_buffer(f"whole{i}", whole)
        network.register_buffer(f"transposed{i}", whole.t().clone())
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    strides = {name: buffer.stride() for name, buffer in network.named_buffers()}
    packed = HostWeights(network, pin=False)
    assert packed.size == sum(-(-buffer.nbytes // ALIGNMENT) * ALIGNMENT for buffer in before.values())
    elsewhere(packed)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.stride() == strides[name]
