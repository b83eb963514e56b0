"""The published networks with random weights, in a folder that loads like the published repositories.

A network's time and memory do not depend on the values of its weights, so measurements hold for the published ones.
"""

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.weights import ModelFolder, save_component
from cascade.weights.single_file import VARIANTS
from scripts.environment import ROOT

# laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
TEXT_ENCODER = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    vocab_size=49408,
    hidden_act="gelu",
    bos_token_id=49406,
    eos_token_id=49407,
)
PLACES = {
    "prior": "stable-cascade-prior/prior",
    "prior_lite": "stable-cascade-prior/prior_lite",
    "decoder": "stable-cascade/decoder",
    "decoder_lite": "stable-cascade/decoder_lite",
    "vqgan": "stable-cascade/vqgan",
}
DEVIATION = 0.02


@torch.no_grad()
def randomize(network: nn.Module) -> nn.Module:
    """Draw all weights at random: products with zeros run faster."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=DEVIATION)
    return network.to(torch.bfloat16)


def write_stand_ins(folder: Path, device: str, names: Collection[str] = tuple(PLACES)) -> None:
    """Write 18 GB in bfloat16: Stages C and B, full and lite, Stage A, the text encoder, the semantic encoder and the
    ControlNet for edges; and the miniature's tokenizer. `names`: the keys of `PLACES` to write."""
    variants = {variant.name: variant for variant in VARIANTS}
    for name in names:
        place = PLACES[name]
        with torch.device(device):
            network = randomize(variants[name].network(**variants[name].config))
        save_component(folder / place, network, torch.bfloat16)
        del network
    with torch.device(device):
        text_encoder = randomize(CLIPTextModelWithProjection(TEXT_ENCODER))
    save_component(folder / "stable-cascade-prior/text_encoder", text_encoder, torch.bfloat16)
    for path, network in (("effnet_encoder", SemanticEncoder), ("controlnet/canny", ControlNet)):
        with torch.device(device):
            tensors = randomize(network()).state_dict()
        file = folder / "stable-cascade" / f"{path}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
    tokenizer = ModelFolder.open(ROOT / "weights" / "mini").load_component("tokenizer")
    save_component(folder / "stable-cascade-prior/tokenizer", tokenizer, torch.bfloat16)
