"""The published networks with random weights: what rounding does to them can be measured without the published weights.

As its authors initialise it, a network says nothing: it predicts zero whatever it is told. Here, weights are random but

- every branch takes part: timesteps scale and shift each block by a few per cent, response norms are open;
- all are exact in bfloat16, so that a bfloat16 and a float32 run have the same weights and differ by arithmetic alone;
- a UNet predicts, of pure noise, the noise, but for a part of some tenths that depends on timestep and conditions. Its
  last layer is fitted for that, by least squares in closed form. If a prediction had nothing to do with its input, the
  sampler's first step, which divides what the prediction leaves of the noise by alpha = 0.01, would decide everything,
  and the later ones would change nothing. With the fit, latents have a deviation of some units. To make a linear fit
  possible, the embedding's biases outweigh its inputs, so that the norms behind are nearly linear; branches are
  weaker than initialised; and the skip connections, Stage B's only way round its coarser levels, pass nearly linearly;
- Stage A's pixels are about 0.5, with a deviation of 0.2.

Random blocks are as sensitive to the highest frequencies of a timestep's embedding as to the lowest, trained ones less.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from cascade.networks.stage_a import StageA
from cascade.networks.unet import AttnBlock, ResBlock, StableCascadeUNet
from cascade.weights.variants import VARIANTS

TIMESTEP_DEVIATION = 0.03  # of the scale and of the shift of each block
RESPONSE_DEVIATION = 0.2  # of the response norms' parameters
EMBEDDING_BIAS = 2.0  # deviation, beside inputs of unit scale
BRANCH_GAIN = 0.3  # of the last layer of each branch, over its initialisation
SKIP_BIAS, SKIP_GAIN = 1.5, 0.5  # far to the right, GELU is linear
RIDGE = 0.001  # beside features of unit scale: keeps the fitted layer from magnifying what is next to nothing
LATENT_DEVIATION, PIXEL_DEVIATION = 10.0, 0.2  # of what goes into Stage A, about, and of what comes out


def published_config(name: str) -> dict[str, Any]:
    """The configuration of a published network, by its name in `variants.VARIANTS`."""
    return next(variant.config for variant in VARIANTS if variant.name == name)


def random_conditions(config: dict[str, Any], semantic_size: tuple[int, int], batch: int) -> dict[str, Tensor]:
    """Conditions of unit scale for a UNet's forward, exact in bfloat16, float32 on the CPU: text, pooled text and images
    for a prior, pooled text and semantic latents (batch, 16, *semantic_size) for a decoder. From the global generator.
    """
    shapes = {"clip_text_pooled": (1, config["clip_text_pooled_in_channels"])}
    if config.get("effnet_in_channels") is None:
        shapes["clip_text"] = (77, config["clip_text_in_channels"])
        shapes["clip_img"] = (1, config["clip_image_in_channels"])
    else:
        shapes["effnet"] = (config["effnet_in_channels"], *semantic_size)
    return {name: torch.randn(batch, *shape).bfloat16().float() for name, shape in shapes.items()}


@torch.no_grad()
def make_unet(
    config: dict[str, Any], *, latent_size: tuple[int, int], semantic_size: tuple[int, int], seed: int, device: str
) -> StableCascadeUNet:
    """Stage B or C in float32 and eval mode, made on `device`; the same for the same seed, device and sizes.

    Args:
        config: as published, or smaller.
        latent_size, semantic_size: (height, width) of this network's latents and of Stage C's at which it is fitted.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        network = StableCascadeUNet(**config).eval()
    projection = network.embedding[1]
    nn.init.normal_(projection.weight, std=projection.in_channels**-0.5)
    nn.init.normal_(projection.bias, std=EMBEDDING_BIAS)
    mappers = network.timestep_mappers
    for name in mappers.names:
        # The squares of an embedding's sines and cosines add up to half of its length.
        length = network.config.timestep_ratio_embedding_dim / 2 * len(mappers.names)
        nn.init.normal_(getattr(mappers, name).weight, std=TIMESTEP_DEVIATION / math.sqrt(length))
    for block in network.blocks():
        if isinstance(block, ResBlock):
            first, _, response, _, last = block.channelwise
            nn.init.normal_(response.gamma, std=RESPONSE_DEVIATION)
            nn.init.normal_(response.beta, std=RESPONSE_DEVIATION)
            if first.in_features > last.out_features:  # joins a skip connection
                nn.init.constant_(first.bias, SKIP_BIAS)
                nn.init.xavier_uniform_(last.weight, gain=SKIP_GAIN)
            else:
                last.weight.mul_(BRANCH_GAIN)
        elif isinstance(block, AttnBlock):
            block.attention.to_out[0].weight.mul_(BRANCH_GAIN)
    round_weights(network)
    fit_last_layer(network, latent_size, semantic_size)
    return network


def fit_last_layer(
    network: StableCascadeUNet, latent_size: tuple[int, int], semantic_size: tuple[int, int], batch: int = 4
) -> None:
    """Ridge regression of pure noise, at time 1 and for random conditions, on what reaches the last layer."""
    config, device, last = network.config, network.device, network.clf[1]
    seen: list[Tensor] = []
    watch = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    inputs = last.in_channels + 1  # with a one for the bias
    double = {"dtype": torch.float64, "device": device}
    gram, moments = torch.zeros(inputs, inputs, **double), torch.zeros(inputs, last.out_channels, **double)
    rows = 0
    while rows < 4 * inputs:
        noise = torch.randn(batch, config.in_channels, *latent_size).to(device)
        conditions = {name: x.to(device) for name, x in random_conditions(config, semantic_size, batch).items()}
        network(noise, torch.ones(batch, device=device), **conditions)
        # (pixels, channels)
        features = nn.functional.pad(seen.pop().flatten(0, 2), (0, 1), value=1.0).double()
        wanted = network.embedding[0](noise).permute(0, 2, 3, 1).flatten(0, 2).double()
        gram += features.T @ features
        moments += features.T @ wanted
        rows += len(features)
    watch.remove()
    fitted = torch.linalg.solve(gram / rows + RIDGE * torch.eye(inputs, **double), moments / rows).T
    last.weight.copy_(fitted[:, :-1, None, None])
    last.bias.copy_(fitted[:, -1])
    round_weights(last)


@torch.no_grad()
def make_stage_a(config: dict[str, Any], *, seed: int, device: str) -> StageA:
    """Stage A in float32 and eval mode, made on `device`; the same for the same seed and device."""
    torch.manual_seed(seed)
    with torch.device(device):
        network = StageA(**config).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("gammas"):
            nn.init.normal_(parameter, std=0.3)
    convolution = network.out_block[0]
    latents = LATENT_DEVIATION * torch.randn(1, network.config.latent_channels, 64, 64)
    pixels = network.decode(latents.to(device))
    convolution.weight.mul_(PIXEL_DEVIATION / pixels.std())
    convolution.bias.fill_(0.5)
    round_weights(network)
    return network


def round_weights(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())
