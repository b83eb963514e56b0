"""What each operation of a layer takes in bfloat16 and in fp8, on a GPU: ``python -m scripts.benchmark_fp8``.

A layer is a ResBlock, a TimestepBlock and an AttnBlock of the published sizes, at 1024x1024. The operations are those that the
blocks call, in their order. Each is timed alone, as a CUDA graph of several calls whose weights no cache holds. "other form" is
the product that was not chosen: with a scale for each row and column inside of it, or with one scale for all; of the attention's
last layer, a product in e4m3. The sums show what limits a picture, and which choice should change.

What whole pictures take: `scripts/benchmark --contenders ours "ours, fp8"`, and with memory
``python -m scripts.benchmark_eight_bits --storage``.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade import kernels
from cascade.kernels.e4m3 import in_e4m3, multiply, multiply_columns, norm_factor
from cascade.kernels.layers import put_channels_side_by_side
from cascade.kernels.stream import Product, Stream
from cascade.networks import fp8
from scripts.benchmark_eight_bits import ROTATED, replayed
from scripts.timing import in_turn

# A function of the number of a call, which chooses its weights.
Call = Callable[[int], Any]


class Level(NamedTuple):
    """A level of the published networks with attention.

    Attributes:
        name: of the stage, and the level's size.
        width, heads: channels, and attention heads.
        side: height and width at 1024x1024.
        tokens: of the condition.
        layers: of a picture, in all steps together.
    """

    name: str
    width: int
    heads: int
    side: int
    tokens: int
    layers: int


LEVELS = (
    Level("Stage C", 2048, 32, 24, 85, 20 * 64),
    Level("Stage B, 32x32", 1280, 20, 32, 4, 10 * (28 + 3 * 28)),
    Level("Stage B, 16x16", 1280, 20, 16, 4, 10 * (6 + 3 * 6)),
)


class Operation(NamedTuple):
    """An operation in bfloat16 and in fp8; and in fp8 in the form that was not chosen, if there is one."""

    name: str
    bfloat16: Call
    fp8: Call
    other: Call | None = None


class Weights(NamedTuple):
    """A layer's weights in bfloat16 and in e4m3."""

    layer: nn.Linear
    e4m3: Tensor
    scale: Tensor


def weights(inner: int, columns: int, copies: int, device: torch.device) -> list[Weights]:
    made = []
    for _ in range(copies):
        layer = nn.Linear(inner, columns, device=device, dtype=torch.bfloat16).requires_grad_(False)
        made.append(Weights(layer, *fp8.quantise(layer.weight)))
    return made


def copies_of(level: Level) -> int:
    """As many copies of a layer's weights as no cache holds."""
    return min(max(-(-ROTATED // (8 * level.width**2)), 4), 64)


class Layer:
    """A layer with random inputs and weights.

    Args:
        level: see `Level`.
        samples: pictures of a batch, doubled where a stage is guided.
        device: where it runs.
        implementation: "triton" or "plain".
        copies: of the weights.
    """

    @torch.no_grad()
    def __init__(self, level: Level, samples: int, device: torch.device, implementation: str, copies: int) -> None:
        self.run, self.dtype, width = kernels.load(implementation), torch.bfloat16, level.width
        self.rows = samples * level.side**2

        def draw(*shape: int, size: float = 1.0) -> Tensor:
            return size * torch.randn(*shape, device=device).to(self.dtype)

        shape = (samples, level.side, level.side)
        self.factor = norm_factor(width)
        self.normed, self.hidden = draw(*shape, width), draw(*shape, 4 * width)
        self.normed_e4m3, self.hidden_e4m3 = (in_e4m3(one.float() * self.factor) for one in (self.normed, self.hidden))
        self.convolution = nn.Conv2d(
            width, width, 3, padding=1, groups=width, device=device, dtype=self.dtype
        ).requires_grad_(False)
        if implementation == "triton":
            put_channels_side_by_side(self.convolution)
        self.first, self.last, self.to_qkv, self.to_out = (
            weights(inner, columns, copies, device)
            for inner, columns in ((width, 4 * width), (4 * width, width), (width, 3 * width), (width, width))
        )
        # The response norm in bfloat16 works in place, again and again: with other values, its results would become infinite.
        self.gamma, self.beta = (draw(1, 1, 1, 4 * width, size=size) for size in (0.0, 0.01))
        self.qkv = draw(samples, level.side**2, 3 * width).chunk(3, dim=-1)
        self.key, self.value = (
            one.unflatten(-1, (level.heads, -1)).transpose(1, 2)
            for one in draw(samples, level.tokens, 2 * width).chunk(2, dim=-1)
        )
        x, scale, shift = (
            torch.randn(*one, device=device) for one in ((*shape, width), (samples, width), (samples, width))
        )
        self.stream, self.pending = Stream(x), Stream(x, self.last[0].layer.bias, scale, shift)
        self.product = Product(self.normed, torch.rand(samples, device=device))

    def _linear(self, given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: F.linear(given, all_weights[i].layer.weight, all_weights[i].layer.bias)

    def _added(self, given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: self.run.add_linear(self.stream, given, all_weights[i].layer)

    def _by_columns(self, given: Tensor, all_weights: Sequence[Weights]) -> Call:
        bias = [one.layer.bias for one in all_weights]
        return lambda i: multiply_columns(given, *all_weights[i][1:], bias[i], self.dtype, 1 / self.factor)

    def _by_one(self, given: Tensor, all_weights: Sequence[Weights]) -> Call:
        bias = [one.layer.bias for one in all_weights]
        return lambda i: multiply(given, *all_weights[i][1:], bias[i], self.dtype, 1 / self.factor)

    def _product(self, given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: multiply(given, *all_weights[i][1:], None, self.dtype)

    def operations(self) -> list[Operation]:
        """What the blocks call, in their order."""
        run, dtype, normed, in_8_bits = self.run, self.dtype, self.normed, self.normed_e4m3
        first = self._by_one(in_8_bits, self.first), self._by_columns(in_8_bits, self.first)
        attention = partial(run.attention, *self.qkv, self.key, self.value)
        with_product = self.pending._replace(product=self.product)
        return [
            Operation(
                "convolution and norm",
                lambda i: run.depthwise_norm(self.stream, self.convolution, dtype),
                lambda i: run.depthwise_norm(self.stream, self.convolution, dtype, e4m3=True),
            ),
            Operation(
                "MLP, first layer",
                self._linear(normed, self.first),
                *(first if self.rows <= fp8.FEW else reversed(first)),
            ),
            Operation(
                "GELU and response",
                lambda i: run.gelu_response(self.hidden, self.gamma, self.beta),
                lambda i: run.gelu_response_e4m3(self.hidden, self.gamma, self.beta),
            ),
            Operation(
                "MLP, last layer",
                self._added(self.hidden, self.last),
                self._product(self.hidden_e4m3, self.last),
                self._by_columns(self.hidden_e4m3, self.last),
            ),
            Operation(
                "norm",
                lambda i: run.norm(self.pending, dtype, next_linear=self.to_out[i].layer),
                lambda i: run.norm(with_product, dtype, next_linear=self.to_out[i].layer, e4m3=True),
            ),
            Operation(
                "q, k, v",
                self._linear(normed, self.to_qkv),
                self._by_columns(in_8_bits, self.to_qkv),
                self._by_one(in_8_bits, self.to_qkv),
            ),
            Operation("attention", lambda i: attention(), lambda i: attention()),
            Operation(
                "attention, last layer",
                self._added(normed, self.to_out),
                self._added(normed, self.to_out),
                self._product(in_8_bits, self.to_out),
            ),
        ]


@torch.no_grad()
def seconds_of(operation: Operation, copies: int, runs: int) -> list[float | None]:
    """Median seconds of a call in bfloat16, in fp8, and in the other form."""
    calls = {name: call for name, call in zip(Operation._fields[1:], operation[1:], strict=True) if call is not None}
    work = {name: replayed(lambda call=call: [call(i) for i in range(copies)]) for name, call in calls.items()}
    taken = {name: statistics.median(each) / copies for name, each in in_turn(work, runs).items()}
    return [taken.get(name) for name in Operation._fields[1:]]


def table(title: str, layers: int, found: dict[str, list[float | None]]) -> str:
    """The microseconds of each operation, of a layer, and the milliseconds of a picture's layers."""
    lines = [f"| {title} | bfloat16, us | fp8, us | fp8, other form, us |", "|---|---:|---:|---:|"]
    for name, seconds in found.items():
        cells = ["" if one is None else f"{1e6 * one:.1f}" for one in seconds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [sum(seconds[place] for seconds in found.values()) for place in (0, 1)]
    lines.append(f"| a layer | {' | '.join(f'{1e6 * one:.1f}' for one in totals)} | |")
    lines.append(f"| {layers} layers, ms | {' | '.join(f'{1e3 * layers * one:.1f}' for one in totals)} | |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each operation (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    why_not = kernels.lacks_e4m3(device, torch.bfloat16)
    if why_not:
        parser.error(f"fp8 cannot be measured, because {why_not}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {options.runs} runs.\n")
    for level in LEVELS:
        for pictures in options.batches:
            # Stage C is guided; Stage B also with the authors' settings.
            for halves in (2,) if level.name == "Stage C" else (1, 2):
                copies = copies_of(level)
                layer = Layer(level, halves * pictures, device, "triton", copies)
                found = {one.name: seconds_of(one, copies, options.runs) for one in layer.operations()}
                guided = ", guided" if halves == 2 else ""
                print(table(f"{level.name}{guided}, batch {pictures}", level.layers, found), end="\n\n", flush=True)
                del layer
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
