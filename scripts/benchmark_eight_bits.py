"""What 8 bits would cost and gain, on this machine: ``python -m scripts.benchmark_eight_bits``.

- The error of one prediction of Stages C and B, of the published size (random weights; on a GPU only) and of the miniature, with
  both operands of all products of the blocks in e4m3, and with only the weights in 8 bits; beside bfloat16's.
- The layers in order of their errors, and the error with more and more of them in e4m3.
- The miniature's pictures at points of that curve: how they differ from bfloat16's, and what the judge says. The judge needs
  the drawings of scripts/build-mini-data; without them, it is left out.
- On a GPU, the time of the products at the shapes that a picture of 1024x1024 has, and of a whole layer.

With ``--storage``, instead: what the precisions int8 and fp8 cost and save, on a GPU, by memory mode: seconds to load, seconds a
picture of the published size, and the peak of memory. Needs 27 GB of disk while it runs.

A GPU from compute capability 8.9 multiplies e4m3 itself. Elsewhere the operands are rounded to it, and multiplied in float32.
Weights are scaled once, activations as they come, so that the largest value is e4m3's: per tensor, or per row (of a weight: per
output channel). Weights in groups, but the last ResBlock's, are what `cascade.networks.eight_bits` stores.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from cascade import Cascade, Request, kernels, sizes
from cascade.images.tensors import to_image
from cascade.kernels.e4m3 import E4M3, LARGEST
from cascade.kernels.stream import Stream
from cascade.networks.eight_bits import quantise
from cascade.networks.layout import published_names
from cascade.networks.precisions import FORMS, IN_8_BITS, wanted_forms
from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.sampling import Noise, diffuse, finish
from cascade.stages.decoder import decoder_steps
from cascade.stages.prior import prior_steps
from cascade.weights import PUBLISHED_SAMPLER, save_model_folder
from miniature.compose import compose
from miniature.evaluate import score_pictures, text_to_pictures
from miniature.icons import STYLES, load_drawings, load_objects
from miniature.judge import Judge
from miniature.prompts import Prompt, make_prompts, plans_of
from miniature.scores import Values, paired
from scripts.contenders import PROMPT
from scripts.environment import ROOT
from scripts.stand_ins import NEEDED, make_network, write_stand_ins
from scripts.timing import in_turn

MINI = ROOT / "weights" / "mini"
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
TIMES = (0.9, 0.5, 0.1)  # of the predictions
SIDE = 1024
STEPS = {"prior": 20, "decoder": 10}
ROTATED = 2**28  # bytes of weights that timed products take turns with: several times a GPU's L2 cache
MEMORY = ("resident", "offload", "stream")
SCORES = ("object first", "object in 5", "both objects first", "background")
COMPARED = 64  # pictures whose pixels are compared


def to_e4m3(x: Tensor, by_row: bool) -> tuple[Tensor, Tensor]:
    """x (N, K) in e4m3, and its scale in float32: (N, 1), or a single value. Their product is x, rounded."""
    largest = x.abs().amax(dim=1, keepdim=True) if by_row else x.abs().amax()
    scale = (largest.float() / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def multiplies(device: torch.device) -> bool:
    """Whether the device multiplies e4m3."""
    return kernels.lacks_e4m3(device, torch.bfloat16) is None


class Product(nn.Module):
    """A Linear layer that multiplies in e4m3. Returns the dtype of its input.

    by_row: whether each row of activations, and each output channel of the weight, has a scale of its own.
    """

    def __init__(self, layer: nn.Linear, by_row: bool) -> None:
        super().__init__()
        self.by_row = by_row
        self.weight, self.scale = to_e4m3(layer.weight.detach(), by_row)
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        rounded, scale = to_e4m3(x.flatten(0, -2), self.by_row)
        return self.product(rounded, scale, x.dtype).unflatten(0, x.shape[:-1])

    def product(self, x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """x (M, K) in e4m3, times its scale, through the layer: (M, N)."""
        if multiplies(x.device):
            scales = {"scale_a": scale, "scale_b": self.scale.t() if self.by_row else self.scale}
            return torch._scaled_mm(x, self.weight.t(), **scales, bias=self.bias, out_dtype=dtype, use_fast_accum=True)
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float() * scale, self.weight.float() * self.scale, bias).to(dtype)


def with_weight(layer: nn.Linear, change: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A copy of a Linear layer with another weight."""
    changed = copy.copy(layer)
    changed._parameters = dict(layer._parameters)
    changed.weight = nn.Parameter(change(layer.weight.detach().float()).to(layer.weight.dtype), requires_grad=False)
    return changed


def through_e4m3(weight: Tensor) -> Tensor:
    """What storage in e4m3 with a scale per output channel leaves of a weight."""
    rounded, scale = to_e4m3(weight, by_row=True)
    return rounded.float() * scale


def through_int8(weight: Tensor) -> Tensor:
    """What storage in int8 with a scale per output channel leaves of a weight."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round() * scale


# What a layer is replaced by.
Make = Callable[[nn.Linear], nn.Module]
PRODUCTS: dict[str, Make] = {
    "e4m3 per tensor": partial(Product, by_row=False),
    "e4m3 per row": partial(Product, by_row=True),
}
STORAGE: dict[str, Make] = {
    "e4m3 weights per row": partial(with_weight, change=through_e4m3),
    "int8 weights per row": partial(with_weight, change=through_int8),
    "int8 weights in groups": partial(with_weight, change=lambda weight: quantise(weight).restored(torch.float32)),
}

# Those that are also tried on all layers but the last ResBlock's, which are the most sensitive.
LEAVING = PRODUCTS | {"int8 weights in groups": STORAGE["int8 weights in groups"]}


class Input(NamedTuple):
    """What a prediction is made of: float32 latents (B, C, h, w), times (B,), and the arguments of a network's `condition`."""

    sample: Tensor
    times: Tensor
    given: dict[str, Tensor]


class Shape(NamedTuple):
    """Of a product: (rows, inner) times (inner, columns)."""

    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns


@dataclass
class Network:
    """A UNet in bfloat16, with inputs, and what has been found about it.

    Attributes:
        name: "prior" or "decoder".
        exact: the predictions in float32.
        shapes: of the products of each Linear layer in a forward.
        ranked: these layers, in the order of the error that e4m3 costs for each of their operations.
    """

    name: str
    network: StableCascadeUNet
    inputs: Sequence[Input]
    exact: Tensor
    shapes: dict[str, list[Shape]]
    ranked: list[str]

    @classmethod
    def of(cls, name: str, network: StableCascadeUNet, inputs: Sequence[Input]) -> "Network":
        """network: in bfloat16, on its device. Its float32 copy exists only here."""
        network.use_kernels(kernels.choose(network.device, torch.bfloat16).name)
        exact = copy.deepcopy(network).float()
        exact.use_kernels("plain")
        found = cls(name, network, inputs, predict(exact, inputs), shapes_of(network, inputs[0]), [])
        del exact
        found.ranked = found.rank()
        return found

    def error(self, layers: Mapping[str, nn.Module]) -> float:
        """Relative error of the predictions, in the Euclidean norm, with some layers replaced."""
        with replaced(self.network, layers):
            return difference(predict(self.network, self.inputs), self.exact)

    def made(self, make: Make, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
        """Replacements of some layers, or of all."""
        names = list(self.shapes) if names is None else names
        return {name: make(self.network.get_submodule(name)) for name in names}

    def in_fp8(self) -> dict[str, nn.Module]:
        """Replacements as the precision fp8 has them."""
        state = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
        forms, names, made = wanted_forms(state, self.name, "fp8"), published_names(self.network), {}
        for name, layer in layers_of(self.network).items():
            published = names[f"{name}.weight"]  # q, k and v are rounded each
            form = forms.get(published[0])
            if form is not None:
                parts = [FORMS[form].quantise(one) for one in layer.weight.detach().chunk(len(published))]
                made[name] = FORMS[form].layer(layer).eval()
                made[name].weight.data, made[name].weight_scale.data = map(torch.cat, zip(*parts, strict=True))
                made[name].implementation = self.network.implementation
        return made

    def all_but_last(self, make: Make) -> dict[str, nn.Module]:
        """Replacements of all layers but the last ResBlock's."""
        last = [block for block in self.network.blocks() if isinstance(block, ResBlock)][-1]
        kept = set(last.modules())
        return self.made(make, [name for name in self.shapes if self.network.get_submodule(name) not in kept])

    def rank(self) -> list[str]:
        """Each layer is rounded alone, and compared with bfloat16 at the second of the inputs."""
        one = self.inputs[1:2] or self.inputs
        before, costs = predict(self.network, one), {}
        for name, shapes in self.shapes.items():
            with replaced(self.network, self.made(PRODUCTS["e4m3 per row"], [name])):
                error = difference(predict(self.network, one), before)
            costs[name] = error**2 / sum(shape.operations for shape in shapes)
        return sorted(costs, key=costs.__getitem__)

    def least_sensitive(self, share: float) -> list[str]:
        """The layers that cost least, with this share of all operations."""
        operations = {name: sum(shape.operations for shape in self.shapes[name]) for name in self.ranked}
        sums = itertools.accumulate(operations.values())
        most = share * sum(operations.values()) + 0.5
        return [name for name, total in zip(self.ranked, sums, strict=True) if total <= most]


def layers_of(network: StableCascadeUNet) -> dict[str, nn.Linear]:
    """The Linear layers of all blocks. Other layers have less than one in a hundred of the operations."""
    blocks = {module for module in network.blocks() if isinstance(module, ResBlock | AttnBlock)}
    inside = {layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear}
    return {name: layer for name, layer in network.named_modules() if layer in inside}


@torch.no_grad()
def shapes_of(network: StableCascadeUNet, one: Input) -> dict[str, list[Shape]]:
    """The products that one forward computes, by layer. A layer of a repeated level has several."""
    shapes: dict[str, list[Shape]] = {}
    conditions = network.condition(**in_dtype(one.given, network.dtype), **latent_size(network, one))

    def note(layer: nn.Module, inputs: tuple[Tensor], name: str) -> None:
        rows = inputs[0].numel() // layer.in_features
        shapes.setdefault(name, []).append(Shape(rows, layer.in_features, layer.out_features))

    hooks = [layer.register_forward_pre_hook(partial(note, name=name)) for name, layer in layers_of(network).items()]
    network(one.sample, one.times, conditions)
    for hook in hooks:
        hook.remove()
    return shapes


def latent_size(network: StableCascadeUNet, one: Input) -> dict[str, tuple[int, int]]:
    return {} if network.effnet_mapper is None else {"latent_size": tuple(one.sample.shape[-2:])}


def in_dtype(given: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in given.items()}


@torch.no_grad()
def predict(network: StableCascadeUNet, inputs: Sequence[Input]) -> Tensor:
    """All predictions, one after the other: float32."""
    return torch.cat([network(one.sample, one.times, **in_dtype(one.given, network.dtype)) for one in inputs])


def difference(one: Tensor, other: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@contextlib.contextmanager
def replaced(network: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """A context in which some layers of a network are replaced."""
    before = {name: network.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            network.set_submodule(name, layer)
        yield
    finally:
        for name, layer in before.items():
            network.set_submodule(name, layer)


def stand_in(name: str, device: torch.device, batch: int) -> Network:
    """Stage B or C of the published size, with random weights and inputs for a picture of 1024x1024."""
    network = make_network(name, device)
    generator = torch.Generator(device).manual_seed(0)
    config = network.config
    semantic = sizes.semantic_size(SIDE, SIDE)
    shapes: dict[str, tuple[int, ...]] = {"clip_text_pooled": (1, config.clip_text_pooled_in_channels)}
    if config.effnet_in_channels is None:
        shapes["clip_text"] = (77, config.clip_text_in_channels)
        size = semantic
    else:
        shapes["effnet"] = (config.effnet_in_channels, *semantic)
        size = sizes.decoder_size(SIDE, SIDE)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device)

    inputs = [
        Input(
            draw(config.in_channels, *size),
            torch.full((batch,), ratio, device=device),
            {key: draw(*shape) for key, shape in shapes.items()},
        )
        for ratio in TIMES
    ]
    return Network.of(name, network, inputs)


def miniature(cascade: Cascade, prompts: Sequence[str]) -> list[Network]:
    """Stages C and B of the miniature, with noised latents of its own. The model is in bfloat16, and stays as it is."""
    device, side = cascade.device, cascade.native_size
    text, empty = cascade.text.encode(prompts), cascade.text.encode([""])
    count = len(prompts)
    semantic = finish(
        prior_steps(cascade.prior, text, empty, size=sizes.semantic_size(side, side), noise=Noise(range(count), device))
    )
    latents = finish(
        decoder_steps(
            cascade.decoder,
            semantic,
            text.pooled,
            size=sizes.decoder_size(side, side),
            noise=Noise(range(count), device),
            guidance=1.0,
        )
    )
    found = []
    for name, clean, given in (
        ("prior", semantic, {"clip_text": text.tokens, "clip_text_pooled": text.pooled}),
        ("decoder", latents, {"clip_text_pooled": text.pooled, "effnet": semantic}),
    ):
        noise = Noise(range(100, 100 + count), device)
        shift = cascade.defaults[name].shift
        inputs = []
        for ratio in TIMES:
            times = torch.full((count,), ratio, device=device)
            inputs.append(Input(diffuse(clean, noise(*clean.shape[1:]), times, shift), times, given))
        found.append(Network.of(name, getattr(cascade, name), inputs))
    return found


def errors(title: str, one: Network) -> str:
    """A table of the errors of predictions, and the curve of the errors."""
    titles = {"prior": "Stage C", "decoder": "Stage B"}
    rows = {"bfloat16": one.error({})}
    rows |= {name: one.error(one.made(make)) for name, make in {**PRODUCTS, **STORAGE}.items()}
    rows |= {f"{name}, but the last ResBlock": one.error(one.all_but_last(make)) for name, make in LEAVING.items()}
    rows["the precision fp8"] = one.error(one.in_fp8())
    lines = [f"{titles[one.name]}, {title}: {len(one.shapes)} layers, {operations(one) / 1e12:.3g} TFLOP.", ""]
    lines += ["| one prediction | error, % | times bfloat16's |", "|---|---:|---:|"]
    lines += [f"| {name} | {100 * each:.3f} | {each / rows['bfloat16']:.1f} |" for name, each in rows.items()]
    lines += ["", "| share in e4m3 | layers | per tensor, % | per row, % |", "|---:|---:|---:|---:|"]
    for share in SHARES:
        names = one.least_sensitive(share)
        each = [f"{100 * one.error(one.made(make, names)):.3f}" for make in PRODUCTS.values()]
        lines.append(f"| {share:.0%} | {len(names)} | {' | '.join(each)} |")
    last = ", ".join(reversed(one.ranked[-8:]))
    return "\n".join([*lines, "", f"The most sensitive layers for their work: {last}."])


def operations(one: Network) -> int:
    return sum(shape.operations for shapes in one.shapes.values() for shape in shapes)


def points(prior: Network, decoder: Network) -> Iterator[tuple[str, list[dict[str, nn.Module]]]]:
    """What is replaced in Stages C and B, by name."""
    both = (prior, decoder)
    row = PRODUCTS["e4m3 per row"]
    for share in (0.5, 0.75, 0.9):
        yield f"e4m3 per row, {share:.0%}", [one.made(row, one.least_sensitive(share)) for one in both]
    yield "e4m3 per row, Stage C", [prior.made(row), {}]
    yield "e4m3 per row, Stage B", [{}, decoder.made(row)]
    for name, make in {**PRODUCTS, **STORAGE}.items():
        yield name, [one.made(make) for one in both]
    for name, make in LEAVING.items():
        yield f"{name}, but the last ResBlock", [one.all_but_last(make) for one in both]
    yield "the precision fp8", [one.in_fp8() for one in both]


class Drawn(NamedTuple):
    """Pictures of one setting, and their scores: none without a judge."""

    pictures: list[Image.Image]
    values: Values


def draw_all(
    cascade: Cascade,
    found: Sequence[Network],
    prompts: Sequence[Prompt],
    drawings: tuple[Tensor, Sequence[str], Sequence[str]] | None,
    settings: Mapping[str, Any],
) -> dict[str, Drawn]:
    """Pictures of all prompts in bfloat16 and at all points.

    Args:
        cascade: the miniature in bfloat16.
        found: its Stages C and B.
        drawings: as `load_drawings` returns them; None: there is no judge.
        settings: attributes of `Request`.
    """
    scenes: list[Image.Image] = []
    if drawings is not None:
        judge = Judge(drawings[0].to(cascade.device), *drawings[1:])
        plans = plans_of(prompts, judge.names, judge.styles)
        size = (cascade.native_size, cascade.native_size)
        scenes = [to_image(scene) for scene in compose(drawings[0], plans, len(judge.styles), size)]

    def draw() -> Drawn:
        cascade.runner.drop_graphs()  # these read the layers that were there when they were captured
        pictures = text_to_pictures(cascade, prompts, **settings)
        values = score_pictures(judge, pictures, scenes, prompts)[0] if scenes else {}
        return Drawn(pictures, {score: values[score] for score in SCORES if score in values})

    drawn = {"bfloat16": draw()}
    for name, (prior, decoder) in points(*found):
        with replaced(cascade.prior, prior), replaced(cascade.decoder, decoder):
            drawn[name] = draw()
    return drawn


def apart(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """Mean difference of two lists of pictures, in 1/255."""
    pairs = zip(one, other, strict=True)
    return float(np.mean([np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs]))


def picture_table(drawn: Mapping[str, Drawn]) -> str:
    """How pictures differ from bfloat16's: pixels, and the scores, in points with a 95 % interval."""
    pictures, exact = drawn["bfloat16"]
    head = ["pictures of the miniature", f"mean difference of {len(pictures[:COMPARED])}, 1/255", *exact]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, one in drawn.items():
        cells = [name, f"{apart(one.pictures[:COMPARED], pictures[:COMPARED]):.2f}"]
        for score, values in one.values.items():
            mean, change = 100 * statistics.fmean(values), paired(exact[score], values)
            cells.append(f"{mean:.1f}: {100 * change.mean:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replayed(work: Callable[[], Any]) -> Callable[[], None]:
    """Work as a CUDA graph, which waits for the GPU. What the work reads must be kept until the last run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


@torch.no_grad()
def product_seconds(shape: Shape, device: torch.device, runs: int) -> dict[str, float]:
    """Median seconds of one product in bfloat16 and in e4m3, with weights that no cache holds."""
    copies = max(-(-ROTATED // (2 * shape.inner * shape.columns)), 4)
    x = torch.randn(shape.rows, shape.inner, device=device, dtype=torch.bfloat16)
    layers = [
        nn.Linear(shape.inner, shape.columns, device=device, dtype=torch.bfloat16) for _ in range(min(copies, 64))
    ]
    made = {name: [make(layer) for layer in layers] for name, make in PRODUCTS.items()}
    given = {name: to_e4m3(x, each[0].by_row) for name, each in made.items()}

    def multiply(name: str) -> list[Tensor]:
        return [layer.product(*given[name], torch.bfloat16) for layer in made[name]]

    work = {"bfloat16": replayed(lambda: [F.linear(x, layer.weight, layer.bias) for layer in layers])}
    work |= {name: replayed(partial(multiply, name)) for name in made}
    seconds = in_turn(work, runs)
    return {name: statistics.median(each) / len(layers) for name, each in seconds.items()}


def product_table(one: Network, runs: int) -> tuple[str, dict[str, float]]:
    """A table of the products of one forward, and the seconds of all of them together, by way."""
    counts = Counter(shape for shapes in one.shapes.values() for shape in shapes)
    lines = [f"| {one.name}: rows, inner, columns | times | bfloat16, us | e4m3 per tensor, us | per row, us |"]
    lines += ["|---|---:|---:|---:|---:|"]
    total: Counter[str] = Counter()
    for shape, count in counts.most_common():
        seconds = product_seconds(shape, one.network.device, runs)
        lines.append(
            f"| {', '.join(map(str, shape))} | {count} | {' | '.join(f'{1e6 * t:.1f}' for t in seconds.values())} |"
        )
        total.update({name: count * each for name, each in seconds.items()})
    lines.append(f"| all, ms | | {' | '.join(f'{1e3 * each:.2f}' for each in total.values())} |")
    steps = STEPS[one.name]
    gains = [f"{name} {1e3 * steps * (total['bfloat16'] - total[name]):.0f} ms" for name in PRODUCTS]
    lines += ["", f"A picture of {steps} steps would gain, in its products alone: {', '.join(gains)}."]
    return "\n".join(lines), dict(total)


@torch.no_grad()
def layer_table(one: Network, runs: int) -> str:
    """The time of whole layers of Stage C: as they are, and with products in e4m3 whose activations torch rounds."""
    network, sample = one.network, one.inputs[0].sample
    given = in_dtype(one.inputs[0].given, network.dtype)
    blocks = [block for block in network.down_blocks[-1] if isinstance(block, ResBlock | AttnBlock)]
    numbers = {block: i for i, block in enumerate(b for b in network.blocks() if isinstance(b, AttnBlock))}
    conditions = network.condition(**given)
    x = torch.randn(len(sample), *sample.shape[-2:], network.config.block_out_channels[-1], device=sample.device)

    def run() -> Tensor:
        stream = Stream(x.clone())
        for block in blocks:
            pair = () if block not in numbers else (conditions.keys[numbers[block]], conditions.values[numbers[block]])
            stream = block(stream, *pair)
        return stream.settle()

    work = {"bfloat16": replayed(run)}
    prefix = f"down_blocks.{len(network.down_blocks) - 1}."
    names = [name for name in one.shapes if name.startswith(prefix)]
    made = {name: one.made(make, names) for name, make in PRODUCTS.items()}
    for name, layers in made.items():
        with replaced(network, layers):
            work[name] = replayed(run)
    seconds = in_turn(work, runs)
    count = sum(block in numbers for block in blocks)
    cells = ", ".join(f"{name} {1e6 * statistics.median(each) / count:.0f} us" for name, each in seconds.items())
    return f"A layer of Stage C, ResBlock and AttnBlock, with e4m3 rounded by torch's own operations: {cells}."


class Run(NamedTuple):
    """A way to keep the weights, and where they are read from: "bfloat16" or a precision."""

    precision: str
    files: str
    memory: str


RUNS = (
    *(Run("full", "bfloat16", memory) for memory in MEMORY),
    *(Run(precision, "bfloat16", "resident") for precision in IN_8_BITS),
    *(Run(precision, precision, memory) for precision in IN_8_BITS for memory in MEMORY),
)


def measure_storage(folder: Path, run: Run, runs: int) -> list[str]:
    """A row of the table: load the networks of the published size, and make pictures of 1024x1024."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    cascade = Cascade.load(folder, "cuda", torch.bfloat16, memory=run.memory, precision=run.precision)
    torch.cuda.synchronize()
    loaded, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    request = Request(PROMPT, width=SIDE, height=SIDE, guidance_scale_decoder=1.0)
    cascade.generate(request)
    torch.cuda.reset_peak_memory_stats()
    seconds = in_turn({"": partial(cascade.generate, request)}, runs, warm_up=1)[""]
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), peak)
    return [
        *run,
        f"{loaded:.1f}",
        f"{statistics.median(seconds):.3f}",
        *(f"{each / 2**30:.2f}" for each in peaks),
    ]


def storage_table(folder: Path, runs: int) -> str:
    """What weights in 8 bits cost and save, by memory mode. Writes the networks into a folder first."""
    folders = {name: folder / name for name in ("bfloat16", *IN_8_BITS)}
    write_stand_ins(folders["bfloat16"], "cuda", NEEDED)
    about = {"name": "stand-ins", "license": "none", "native_size": SIDE, "sampler": PUBLISHED_SAMPLER}
    for precision in IN_8_BITS:
        torch.cuda.empty_cache()
        cascade = Cascade.load(folders["bfloat16"], "cuda", torch.bfloat16, memory="resident", precision=precision)
        components = {
            "tokenizer": cascade.text.tokenizer,
            "text_encoder": cascade.text.encoder,
            **{name: getattr(cascade, name) for name in ("prior", "decoder", "vqgan")},
        }
        save_model_folder(folders[precision], components, **about)
        del cascade, components
    titles = [
        "weights",
        "files",
        "memory mode",
        "seconds to load",
        "seconds a picture",
        "peak, GiB",
        "reserved, GiB",
        "peak of loading, GiB",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---" + "|---:" * 5 + "|"]
    for run in RUNS:
        lines.append(f"| {' | '.join(measure_storage(folders[run.files], run, runs))} |")
        gc.collect()
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, end="\n\n", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=400, help="of the miniature's pictures (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=20, help="timed runs of each product (default: %(default)s)")
    parser.add_argument(
        "--drawings",
        type=Path,
        default=ROOT / "build" / "mini" / "drawings.zip",
        help="those of the judge (default: %(default)s)",
    )
    parser.add_argument("--storage", action="store_true", help="measure weights in 8 bits instead")
    parser.add_argument(
        "--folder", type=Path, help="with --storage, where networks are kept (default: a temporary folder)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False
    if options.storage and device.type != "cuda":
        parser.error("--storage needs a CUDA device")
    drawings = load_drawings(options.drawings) if options.drawings.exists() else None
    names = [one.name for one in load_objects()] if drawings is None else drawings[1]
    prompts = make_prompts(names, STYLES, options.seed, options.prompts, options.prompts // 2)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say(f"{name}, torch {torch.__version__}; e4m3 is {'multiplied' if multiplies(device) else 'simulated'}.")
    if options.storage:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            say(storage_table(Path(folder), options.runs))
        return

    cascade = Cascade.load(MINI, device, torch.bfloat16, memory="resident", max_batch=50)
    found = miniature(cascade, [prompt.text for prompt in prompts[:4]])
    for one in found:
        say(errors("the miniature", one))
    say(picture_table(draw_all(cascade, found, prompts, drawings, {})))
    if drawings is None:
        say(f"The judge is left out: there is no {options.drawings}.")
    del cascade, found
    if device.type != "cuda":
        return
    for name, batch in (("prior", 2), ("decoder", 1)):
        one = stand_in(name, device, batch)
        say(errors(f"of the published size, {SIDE}x{SIDE}, random weights", one))
        if multiplies(device):
            say(product_table(one, options.runs)[0])
            if name == "prior":
                say(layer_table(one, options.runs))
        del one
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
