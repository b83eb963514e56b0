"""The published networks with random weights, in memory or in a folder that loads like the published repositories; LoRAs of them.

A network's time and memory do not depend on the values of its weights, so measurements hold for the published ones.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.networks.controlnet import ControlNet
from cascade.weights import ModelFolder, save_component
from cascade.weights.making import make
from cascade.weights.reading import read_header
from cascade.weights.variants import VARIANTS
from scripts.environment import ROOT

PLACES = {
    "prior": "stable-cascade-prior/prior",
    "prior_lite": "stable-cascade-prior/prior_lite",
    "decoder": "stable-cascade/decoder",
    "decoder_lite": "stable-cascade/decoder_lite",
    "vqgan": "stable-cascade/vqgan",
    "text_encoder": "stable-cascade-prior/text_encoder",
    "effnet": "stable-cascade/effnet_encoder.safetensors",
    "controlnet_canny": "stable-cascade/controlnet/canny.safetensors",
}
# The components that every picture needs, except the tokenizer.
NEEDED = ("text_encoder", "prior", "decoder", "vqgan")
DEVIATION = 0.02


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Draw all weights at random: products with zeros run faster."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=DEVIATION)
    return network.to(torch.bfloat16)


def make_network(name: str, device: str | torch.device, **changes: Any) -> nn.Module:
    """A network of the published size, in bfloat16 and eval mode.

    Args:
        name: of `PLACES`, or "image_encoder".
        device: where it is made.
        changes: of its configuration.
    """
    classes = {variant.name: (variant.network, variant.config) for variant in VARIANTS}
    classes["controlnet_canny"] = (ControlNet, {})
    network, config = classes[name]
    return randomize(make(network, {**config, **changes}, device)).eval()


def write_stand_ins(folder: Path, device: str, names: Collection[str] = tuple(PLACES)) -> None:
    """Write networks in bfloat16, and the miniature's tokenizer. All of `PLACES` have 18 GB, those `NEEDED` 12 GB."""
    tokenizer = ModelFolder.open(ROOT / "weights" / "mini").load_component("tokenizer")
    save_component(folder / "stable-cascade-prior/tokenizer", tokenizer, torch.bfloat16)
    for name in names:
        # The text encoder looks for the token with which this tokenizer ends texts.
        changes = {"eos_token_id": tokenizer.eos_token_id} if name == "text_encoder" else {}
        network, place = make_network(name, device, **changes), folder / PLACES[name]
        if place.suffix:  # a single file
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.cpu().contiguous() for key, tensor in network.state_dict().items()}, place)
        else:
            save_component(place, network, torch.bfloat16)
        del network


def shapes_of(folder: Path, networks: Sequence[str] = ("prior",)) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of the tensors of a model folder's networks, by network and name."""
    files = ModelFolder.open(folder).standard_files(networks)
    return {
        network: {name: shape for name, (shape, _) in read_header(paths).items()} for network, paths in files.items()
    }


def write_lora(
    path: Path,
    shapes: Mapping[str, Mapping[str, Sequence[int]]],
    rank: int,
    seed: int = 0,
    size: float = 0.02,
) -> Path:
    """Write a LoRA of all matrices and 1x1 convolutions of some networks, in bfloat16 and diffusers' names.

    Args:
        path: of the file, which is returned.
        shapes: see `shapes_of`.
        rank, seed: of the LoRA.
        size: deviation of what it adds to an output, over that of the layer's input and the square root of the rank.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for network, named in shapes.items():
        for name, shape in named.items():
            if not name.endswith(".weight") or len(shape) < 2 or "depthwise" in name or "_embedding" in name:
                continue
            stem, (rows, columns, *kernel) = f"{network}.{name.removesuffix('.weight')}", shape
            if any(side != 1 for side in kernel):
                continue
            down = torch.randn(rank, columns, *kernel, generator=generator) / columns**0.5
            up = size * torch.randn(rows, rank, *kernel, generator=generator)
            tensors |= {f"{stem}.lora_A.weight": down.bfloat16(), f"{stem}.lora_B.weight": up.bfloat16()}
    save_file(tensors, path)
    return path
