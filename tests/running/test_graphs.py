"""Which graphs are cached, and fallbacks. On a CPU, a replay calls the function again."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cascade.networks.unet import StableCascadeUNet
from cascade.running.graphs import OF_A_SIZE, SIZES, CaptureError, Function, GraphCache, GraphedUNet
from tests.components import make_decoder, make_prior, shuffle
from tests.gpu.full_size import random_conditions


class Replay:
    """Like a CUDA graph, reads inputs from fixed tensors, and writes results to fixed tensors."""

    def __init__(self, function: Function, inputs: Sequence[Tensor], pool: Any) -> None:
        self.function, self.inputs = function, [tensor.clone() for tensor in inputs]
        self.outputs = function(*self.inputs)

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        for own, new in zip(tree_leaves(self.outputs), tree_leaves(self.function(*self.inputs)), strict=True):
            if own is not None:
                own.copy_(new)
        return self.outputs


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> GraphCache:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return GraphCache(capture=Replay, devices=("cpu",))


def double(x: Tensor) -> Tensor:
    return 2 * x


def recordings_made(graphs: GraphCache, size: Any, kinds: Sequence[str]) -> int:
    """Run these kinds of request at a size, and return the number of newly captured graphs."""
    before = len(graphs)
    with graphs.of(size):
        for kind in kinds:
            for batch in (1, 2):
                assert torch.equal(graphs.run(kind, double, torch.ones(batch)), torch.full((batch,), 2.0))
    return len(graphs) - before


def test_graphs_of_eight_sizes_are_kept_whatever_kinds_of_request_there_are(graphs: GraphCache) -> None:
    kinds = ["prior", "decoder", "effnet", "controlnet", "condition"]
    for size in range(SIZES):
        assert recordings_made(graphs, size, kinds) == 2 * len(kinds)
    for size in [*range(SIZES), *range(SIZES)]:  # aspect ratios in rotation
        assert recordings_made(graphs, size, kinds) == 0
    assert graphs.sizes == list(range(SIZES))


def test_the_size_used_longest_ago_makes_room_for_the_ninth(graphs: GraphCache) -> None:
    for size in range(SIZES):
        recordings_made(graphs, size, ["prior", "decoder"])
    recordings_made(graphs, 0, ["prior"])
    with graphs.of(None):
        graphs.run("text", double, torch.ones(1))
    recordings_made(graphs, "ninth", ["prior"])
    assert graphs.sizes == [*range(2, SIZES), 0, "ninth"]
    before = len(graphs)
    with graphs.of(3), graphs.of_no_size():
        graphs.run("text", double, torch.ones(1))
    assert len(graphs) == before, "what has no size is kept beside the sizes"


def test_graphs_of_one_size_are_bounded_too(graphs: GraphCache) -> None:
    for number in range(3 * OF_A_SIZE):
        recordings_made(graphs, "size", [f"kind {number}"])
    assert len(graphs) == OF_A_SIZE


def test_shapes_and_constants_tell_graphs_apart(graphs: GraphCache) -> None:
    def add(x: Tensor, more: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        return (x, *(one for one in more.values() if one is not None))

    one = torch.ones(1)
    for more in ({}, {"a": one}, {"a": None}, {"b": one}, {"a": one, "b": one}, {"a": one.double()}, {"a": one[None]}):
        made = graphs.run_copied("add", add, one, more)
        assert len(made) == 1 + sum(value is not None for value in more.values())
    assert len(graphs) == 7


def test_run_copied_returns_what_stays(graphs: GraphCache) -> None:
    first = graphs.run_copied("double", double, torch.ones(2))
    passing = graphs.run("double", double, torch.ones(2))
    graphs.run("double", double, torch.zeros(2))
    assert first.tolist() == [2, 2]
    assert passing.tolist() == [0, 0]


def test_nothing_is_recorded_where_that_is_said(graphs: GraphCache) -> None:
    with graphs.of("size", captures=False):
        assert not graphs.captures
        graphs.run("double", double, torch.ones(1))
        with graphs.of_no_size():
            graphs.run("text", double, torch.ones(1))
    assert graphs.captures
    assert len(graphs) == 0
    assert len(GraphCache()) == 0
    GraphCache().run("double", double, torch.ones(1))  # on a CPU


def test_contexts_of_two_requests_that_take_turns(graphs: GraphCache) -> None:
    for _ in range(2):
        recordings_made(graphs, "first", ["prior"])
        recordings_made(graphs, "second", ["prior"])
    assert graphs.sizes == ["first", "second"]
    graphs.clear()
    assert (graphs.sizes, len(graphs)) == ([], 0)


def test_what_cannot_be_captured_runs_plainly_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    tried: list[Function] = []

    def record(function: Function, inputs: Sequence[Tensor], pool: Any) -> Replay:
        tried.append(function)
        if len(inputs) == 1:
            raise CaptureError("AcceleratorError: CUDA error: operation not permitted when stream is capturing")
        return Replay(function, inputs, pool)

    graphs = GraphCache(record, devices=("cpu",))
    for batch in (1, 1, 2):
        with graphs.of(batch):
            assert graphs.run(("prior", "step"), double, torch.ones(batch)).tolist() == [2.0] * batch
    assert len(tried) == 1
    assert graphs.run("add", torch.add, torch.ones(1), torch.ones(1)).tolist() == [2.0]
    assert len(graphs) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "('prior', 'step') cannot be captured as a CUDA graph, and runs slower without one. "
        "AcceleratorError: CUDA error: operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), KeyboardInterrupt()])
def test_a_lack_of_memory_is_the_callers_business(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))

    errors = [error]

    def record(*given: Any) -> Replay:
        if errors:
            raise errors.pop()
        return Replay(*given)

    graphs = GraphCache(record, devices=("cpu",))
    with pytest.raises(type(error)):
        graphs.run("double", double, torch.ones(1))
    graphs.run("double", double, torch.ones(1))
    assert len(graphs) == 1


@pytest.mark.parametrize("make", [make_prior, make_decoder])
def test_a_graphed_network_is_the_network(graphs: GraphCache, make: Any) -> None:
    """With all optional inputs in turns: no call changes the result of another."""
    network: StableCascadeUNet = shuffle(make(), 1)
    run = GraphedUNet(network, "unet", graphs)
    width, channels = network.config.block_out_channels[0], network.config.in_channels
    torch.manual_seed(0)
    for side in (8, 12, 8):
        for batch in (1, 2):
            given = random_conditions(dict(network.config), (6, 6), batch)
            sample, ratio = torch.randn(batch, channels, side, side), torch.rand(batch)
            with torch.no_grad(), graphs.of((side, side)):
                expected = network.condition(**given, latent_size=(side, side))
                conditions = run.condition(**given, latent_size=(side, side))
                for residuals in (None, {0: torch.randn(batch, width, side, side)}):
                    out = run(sample, ratio, conditions, controlnet_residuals=residuals).clone()
                    assert torch.equal(out, network(sample, ratio, expected, controlnet_residuals=residuals))
    assert graphs.sizes == [(12, 12), (8, 8)]
