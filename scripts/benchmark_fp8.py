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


@torch.no_grad()
def operations(
    level: Level, samples: int, device: torch.device, implementation: str, copies: int | None = None
) -> list[Operation]:
    """The operations of a layer.

    Args:
        level: see `Level`.
        samples: pictures of a batch, doubled where a stage is guided.
        device: where they run.
        implementation: "triton" or "plain".
        copies: of the weights; None: as many as no cache holds.
    """
    run, dtype, width = kernels.load(implementation), torch.bfloat16, level.width
    shape = (samples, level.side, level.side)
    x, scale, shift = (
        torch.randn(*one, device=device) for one in ((*shape, width), (samples, width), (samples, width))
    )
    normed, hidden = (torch.randn(*shape, size, device=device).to(dtype) for size in (width, 4 * width))
    factor = norm_factor(width)
    normed_e4m3, hidden_e4m3, attended_e4m3 = (in_e4m3(one.float() * factor) for one in (normed, hidden, normed))
    convolution = nn.Conv2d(width, width, 3, padding=1, groups=width, device=device, dtype=dtype).requires_grad_(False)
    if implementation == "triton":
        put_channels_side_by_side(convolution)
    copies = copies or min(max(-(-ROTATED // (8 * width**2)), 4), 64)
    first, last = weights(width, 4 * width, copies, device), weights(4 * width, width, copies, device)
    to_qkv, to_out = weights(width, 3 * width, copies, device), weights(width, width, copies, device)
    # The response norm in bfloat16 works in place, again and again: with other values, its results would become infinite.
    gamma, beta = (size * torch.randn(1, 1, 1, 4 * width, device=device).to(dtype) for size in (0.0, 0.01))
    qkv = torch.randn(samples, level.side**2, 3 * width, device=device).to(dtype).chunk(3, dim=-1)
    key, value = (
        one.unflatten(-1, (level.heads, -1)).transpose(1, 2)
        for one in torch.randn(samples, level.tokens, 2 * width, device=device).to(dtype).chunk(2, dim=-1)
    )
    of_samples, stream = torch.rand(samples, device=device), Stream(x)
    pending = Stream(x, last[0].layer.bias, scale, shift)
    product = Product(normed, of_samples)

    def by_columns(given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: multiply_columns(given, *all_weights[i][1:], all_weights[i].layer.bias, dtype, 1 / factor)

    def by_one(given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: multiply(given, *all_weights[i][1:], all_weights[i].layer.bias, dtype, 1 / factor)

    def product_of(given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: multiply(given, *all_weights[i][1:], None, dtype)

    def chosen(few: Call, many: Call) -> tuple[Call, Call]:
        return (few, many) if samples * level.side**2 <= fp8.FEW else (many, few)

    def linear(given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: F.linear(given, all_weights[i].layer.weight, all_weights[i].layer.bias)

    def add(given: Tensor, all_weights: Sequence[Weights]) -> Call:
        return lambda i: run.add_linear(stream, given, all_weights[i].layer)

    return [
        Operation(
            "convolution and norm",
            lambda i: run.depthwise_norm(stream, convolution, dtype),
            lambda i: run.depthwise_norm(stream, convolution, dtype, e4m3=True),
        ),
        Operation(
            "MLP, first layer",
            linear(normed, first),
            *chosen(by_one(normed_e4m3, first), by_columns(normed_e4m3, first)),
        ),
        Operation(
            "GELU and response",
            lambda i: run.gelu_response(hidden, gamma, beta),
            lambda i: run.gelu_response_e4m3(hidden, gamma, beta),
        ),
        Operation("MLP, last layer", add(hidden, last), product_of(hidden_e4m3, last), by_columns(hidden_e4m3, last)),
        Operation(
            "norm",
            lambda i: run.norm(pending, dtype, next_linear=to_out[i].layer),
            lambda i: run.norm(pending._replace(product=product), dtype, next_linear=to_out[i].layer, e4m3=True),
        ),
        Operation("q, k, v", linear(normed, to_qkv), by_columns(normed_e4m3, to_qkv), by_one(normed_e4m3, to_qkv)),
        Operation("attention", lambda i: run.attention(*qkv, key, value), lambda i: run.attention(*qkv, key, value)),
        Operation("attention, last layer", add(normed, to_out), add(normed, to_out), product_of(attended_e4m3, to_out)),
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
                copies = min(max(-(-ROTATED // (8 * level.width**2)), 4), 64)
                made = operations(level, halves * pictures, device, "triton", copies)
                found = {one.name: seconds_of(one, copies, options.runs) for one in made}
                guided = ", guided" if halves == 2 else ""
                print(table(f"{level.name}{guided}, batch {pictures}", level.layers, found), end="\n\n", flush=True)
                del made
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
