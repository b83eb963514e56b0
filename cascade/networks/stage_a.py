"""Stage A: a convolutional autoencoder, pixels <-> 4 channels at a quarter of each side, without quantisation.

Config fields and state-dict keys are those of the published diffusers checkpoint (`PaellaVQModel`). The arithmetic
follows Stability-AI/StableCascade `modules/stage_a.py`, but `encode` and `decode` also apply the scale.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from cascade.kernels import UsesKernels
from cascade.networks.base import Network, register_to_config


class MixingBlock(UsesKernels, nn.Module):
    """A depthwise convolution and a channel MLP, both residual. Six learned scalars are their scales, shifts and gates."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Sequential(
            nn.ReplicationPad2d(1), nn.Conv2d(channels, channels, kernel_size=3, groups=channels)
        )
        self.channelwise = nn.Sequential(
            nn.Linear(channels, channels * 4), nn.GELU(), nn.Linear(channels * 4, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.kernels.mixing_block(x, self.gammas, self.depthwise, self.channelwise)


class Codebook(nn.Module):
    """The codebook of the vector quantisation that Stage A was trained with.

    Cascade does not quantise latents, so nothing reads it. It exists so that published weights load and save completely.
    """

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.embedding = nn.Embedding(size, channels)


class StageA(UsesKernels, Network):
    """Stage A.

    Parameters:
        in_channels, out_channels (`int`, 3): channels of the pixels.
        up_down_scale_factor (`int`, 2): side of the blocks of pixels that are folded into channels first.
        levels (`int`, 2): number of levels. Each one after the first halves the size.
        bottleneck_blocks (`int`, 12): decoder blocks at the coarsest level.
        embed_dim (`int`, 384): width of the coarsest level. Each finer level has half of it.
        latent_channels (`int`, 4): channels of the latents.
        num_vq_embeddings (`int`, 8192): rows of the codebook.
        scale_factor (`float`, 0.3764): default scale. `encode` divides its latents by it, and `decode` multiplies them.

    Raises ValueError if the scale is not above 0.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ):
        super().__init__()
        if not 0 < scale_factor < math.inf:
            raise ValueError(f"scale_factor is {scale_factor}; it must be above 0")
        fold = up_down_scale_factor
        widths = [embed_dim // 2 ** (levels - 1 - i) for i in range(levels)]  # finest first
        self.factor = fold * 2 ** (levels - 1)
        # Receptive field of `decode`, in latents on each side of a pixel's own latent: one per 3x3 convolution at the coarsest
        # level, and less than two per finer level.
        self.reach = bottleneck_blocks + 2 * (levels - 1)

        self.in_block = nn.Sequential(nn.PixelUnshuffle(fold), nn.Conv2d(in_channels * fold**2, widths[0], 1))
        down: list[nn.Module] = [MixingBlock(widths[0])]
        for fine, coarse in pairwise(widths):
            down += [nn.Conv2d(fine, coarse, kernel_size=4, stride=2, padding=1), MixingBlock(coarse)]
        # BatchNorm gives the latents mean 0 and standard deviation 1 over the training set.
        down.append(
            nn.Sequential(nn.Conv2d(widths[-1], latent_channels, 1, bias=False), nn.BatchNorm2d(latent_channels))
        )
        self.down_blocks = nn.Sequential(*down)

        self.vquantizer = Codebook(num_vq_embeddings, latent_channels)

        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent_channels, widths[-1], 1))]
        up += [MixingBlock(widths[-1]) for _ in range(bottleneck_blocks)]
        for fine, coarse in reversed(list(pairwise(widths))):
            up += [nn.ConvTranspose2d(coarse, fine, kernel_size=4, stride=2, padding=1), MixingBlock(fine)]
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(nn.Conv2d(widths[0], out_channels * fold**2, 1), nn.PixelShuffle(fold))
        self.init_weights()

    def init_weights(self) -> None:
        """The authors' initialisation. `gammas` are zero, so residual branches add nothing at first."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        bound = 1 / self.config.num_vq_embeddings
        nn.init.uniform_(self.vquantizer.embedding.weight, -bound, bound)

    def encode(self, pixels: Tensor, scale: float | None = None) -> Tensor:
        """(B, 3, H, W) in 0..1 -> latents (B, 4, H/4, W/4) divided by `scale` (None: the config's scale_factor).

        Raises ValueError if H or W is not a multiple of 4 (in general: of up_down_scale_factor * 2 ** (levels - 1)).
        """
        height, width = pixels.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"pixels are {height}x{width}; sides must be multiples of {self.factor}.")
        return self.down_blocks(self.in_block(pixels)) / self._scale(scale)

    def decode(self, latents: Tensor, scale: float | None = None) -> Tensor:
        """Latents (B, 4, h, w), multiplied by `scale` (None: the config's scale_factor) -> pixels (B, 3, 4h, 4w).

        The pixels are about 0..1 and not clamped.
        """
        scaled = (latents * self._scale(scale)).contiguous(memory_format=torch.channels_last)
        return self.out_block(self.up_blocks(scaled))

    def forward(self, pixels: Tensor) -> Tensor:
        """Reconstruction: `decode(encode(pixels))`."""
        return self.decode(self.encode(pixels))

    def _scale(self, scale: float | None) -> float:
        return self.config.scale_factor if scale is None else scale
