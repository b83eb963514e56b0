"""A whole Cascade of tiny networks with random weights, and model folders with networks that have learned nothing."""

import copy
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.images.preprocessing import ClipPreprocessor
from cascade.kernels.e4m3 import E4M3
from cascade.networks.base import Network
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.eight_bits import NETWORKS
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.precisions import converted, rounded, use_forms, wanted_forms
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.weights import CONTROLNETS, TURBO, ModelFolder, StageSettings, save_model_folder
from scripts.stand_ins import shapes_of, write_lora
from tests.conftest import MINI

SAMPLER = {
    "prior": StageSettings(steps=3, guidance=4.0, shift=2.0, rescale=0.7),
    "decoder": StageSettings(steps=2, guidance=1.1, shift=1.0, rescale=0.7),
}
SMALL_EFFNET = {
    "stem_channels": 4,
    "channels": (4, 8, 8),
    "repeats": (1, 1, 1),
    "expansions": (1, 2, 2),
    "strides": (2, 2, 4),
    "head_channels": 16,
}


UNCHANGING = {bool, int, float, str, type(None), torch.dtype, torch.device}


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of single letters: a token a letter, 77 at most."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def make_image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def make_image_processor() -> ClipPreprocessor:
    return ClipPreprocessor(size=32, crop=(32, 32))


def make_their_processor() -> CLIPImageProcessorPil:
    """transformers' processor with the settings of `make_image_processor`."""
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_prior() -> StableCascadeUNet:
    return StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=24,
        clip_image_in_channels=12,
        switch_level=(False,),
    )


def make_decoder() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(0, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=24,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
    )


def make_semantic_encoder() -> SemanticEncoder:
    """As initialised, but for the last normalisation, which would leave next to nothing of the image."""
    torch.manual_seed(4)
    encoder = SemanticEncoder(
        stem_channels=4, channels=(4, 4, 8, 8, 8, 8), repeats=(1, 1, 1, 1, 1, 1), head_channels=16
    )
    encoder.mapper[1].running_var.fill_(1e-4)
    return encoder.eval()


def make_controlnet(channels: int, **options: Any) -> ControlNet:
    """For the first and the last ResBlock of `make_prior`, and one between."""
    return ControlNet(channels, out_channels=16, proj_blocks=(0, 2, 3), effnet=SMALL_EFFNET, **options)


def make_ip_adapter(**options: Any) -> IPAdapter:
    """For `make_prior` and `make_image_encoder`; style in one block, composition in none."""
    sizes = {"feature_dim": 16, "num_tokens": 3, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    blocks = {"blocks": (0, 1, 3), "block_channels": 16, "style_blocks": (3,)}
    return IPAdapter(**{**sizes, "attention_head_dim": 4, "conditioning_dim": 16, **blocks, **options})


def shuffle(network: Network, seed: int) -> Network:
    """Give every parameter a random value: as initialised, many branches are closed and conditions say nothing."""
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(network.named_buffers())
    for name, tensor in network.state_dict().items():  # views: in the order and the shapes of the published tensors
        if name not in buffers:
            tensor.copy_(torch.empty_like(tensor, device="cpu").normal_(0, 0.2, generator=generator))
    return network.eval()


def make_components() -> dict[str, Any]:
    """Every component by its name in a model folder: tiny, float32, on the CPU."""
    tokenizer = make_tokenizer()
    vqgan = shuffle(StageA(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8), 3)
    with torch.no_grad():
        for parameter in vqgan.out_block.parameters():
            parameter.mul_(0.01)  # what comes of random latents is large, and would be black or white all over
    return {
        "tokenizer": tokenizer,
        "text_encoder": make_text_encoder(tokenizer),
        "image_encoder": make_image_encoder(),
        "feature_extractor": make_image_processor(),
        "prior": shuffle(make_prior(), 1),
        "decoder": shuffle(make_decoder(), 2),
        "vqgan": vqgan,
        "effnet": make_semantic_encoder(),
        "previewer": shuffle(Previewer(hidden=16), 5),
        "controlnet_canny": shuffle(make_controlnet(1), 6),
        "controlnet_inpainting": shuffle(make_controlnet(4), 7),
        "controlnet_super_resolution": shuffle(make_controlnet(16, bottleneck_mode="simple"), 8),
        "ip_adapter": shuffle(make_ip_adapter(), 9),
    }


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and values. torch.equal does not know e4m3."""
    if one.dtype != other.dtype:
        return False
    if one.dtype == E4M3:
        one, other = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return torch.equal(one, other)


def copied(part: nn.Module) -> Any:
    """What copy.deepcopy makes of a network, in a third of the time.

    Most of a module's attributes are empty dictionaries, of hooks, and values that cannot change. copy.deepcopy calls itself for
    each of them, and for each key.
    """
    modules = list(part.modules())
    memo: dict[int, Any] = {id(one): type(one).__new__(type(one)) for one in modules}
    for one in modules:
        made = vars(memo[id(one)])
        for name, value in vars(one).items():
            kind = type(value)
            if kind in UNCHANGING:
                made[name] = value
            elif kind is dict or kind is OrderedDict:
                made[name] = (
                    kind((key, copy.deepcopy(inner, memo)) for key, inner in value.items()) if value else kind()
                )
            else:
                made[name] = copy.deepcopy(value, memo)
    return memo[id(part)]


def in_eight_bits_of(network: nn.Module, name: str, precision: str = "int8") -> nn.Module:
    """A copy of a network with weights in 8 bits. `name`: of the component."""
    made = copied(network)
    state = network.state_dict()
    forms = wanted_forms({key: tensor.shape for key, tensor in state.items()}, name, precision)
    use_forms(made, forms)
    if all(tensor.is_meta for tensor in state.values()):
        return made  # there is nothing to be rounded
    made.load_state_dict(rounded(state, forms), assign=True)
    return made


def restored_from(eight: nn.Module, like: nn.Module) -> nn.Module:
    """A copy of an ordinary network with the matrices that another's weights in 8 bits stand for."""
    made = copied(like)
    dtype = next(parameter.dtype for parameter in like.parameters())
    made.load_state_dict(converted(eight.state_dict(), {}, dtype))
    return made


def components_in_eight_bits(components: dict[str, Any], precision: str = "int8") -> dict[str, Any]:
    """Copies of those that can have weights in 8 bits, and the other components."""
    return components | {name: in_eight_bits_of(components[name], name, precision) for name in NETWORKS}


def save_components(folder: Path, components: dict[str, Any]) -> None:
    """The model folder of `make_components`, stored in float32."""
    about = {"name": "Tiny", "license": "Apache-2.0", "native_size": 128}
    save_model_folder(folder, components, sampler=SAMPLER, dtype=torch.float32, **about)


def copy_mini(folder: Path, *without: str, copy: Callable[[str, str], object] = shutil.copy2) -> Path:
    """Copies the miniature without what it may have or not: IP-Adapter, adapter for few steps, LoRAs.

    Args:
        folder: the new folder, which is returned.
        without: further components to leave out.
        copy: copies a file.
    """
    left = ("ip_adapter", TURBO, "loras", "model.json", *without)
    shutil.copytree(
        MINI,
        folder,
        ignore=lambda where, names: set(names).intersection(left) if Path(where) == MINI else (),
        copy_function=copy,
    )
    content = json.loads((MINI / "model.json").read_text())
    for listed, name in ((content, "files"), (content["pieces"], "sums")):
        listed[name] = {path: digest for path, digest in listed[name].items() if path.split("/")[0] not in left}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


def save_mini_with_controlnets(folder: Path) -> None:
    """The miniature with ControlNets, an IP-Adapter and LoRAs that have learned nothing, but add something."""
    opened = ModelFolder.open(copy_mini(folder))
    prior = json.loads((MINI / "prior" / "config.json").read_text())
    width = prior["block_out_channels"][0]
    controlnets = {}
    for seed, (name, channels) in enumerate(CONTROLNETS.items()):
        torch.manual_seed(seed)
        mode = "simple" if name == "controlnet_super_resolution" else "effnet"
        network = ControlNet(channels, width, (0, 3, 7), mode, SMALL_EFFNET)
        for projection in network.projections:
            torch.nn.init.normal_(projection[-1].weight, std=3.0)
        controlnets[name] = network.eval()
    hidden_size = json.loads((MINI / "image_encoder" / "config.json").read_text())["hidden_size"]
    sizes = {"feature_dim": hidden_size, "conditioning_dim": prior["conditioning_dim"], "block_channels": width}
    adapter = shuffle(make_ip_adapter(**sizes, blocks=tuple(range(8)), style_blocks=(6, 7)), 9)
    about = {"name": opened.name, "license": opened.license, "native_size": opened.native_size}
    save_model_folder(folder, {**controlnets, "ip_adapter": adapter}, sampler=opened.sampler, **about)
    add_loras(folder)


def add_loras(folder: Path) -> None:
    """Give the miniature's folder a LoRA "style", which changes every layer of Stage C, and a learned word "sks"."""
    (folder / "loras").mkdir()
    write_lora(folder / "loras" / "style.safetensors", shapes_of(folder), 4, size=0.01)
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["hidden_size"]
    vector = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    save_file({"clip_g": vector}, folder / "loras" / "sks.safetensors")
