"""ControlNets of Stage C: a control image -> residuals for some of its ResBlocks.

Architecture and state-dict keys are those of Stability-AI/StableCascade `modules/controlnet.py`; the defaults are the
published network of canny edges. Unlike ControlNets of other models, these see neither the latents nor the timestep:
one forward serves every step of a picture. Backbones with normalisations use running statistics: keep them in eval mode.
"""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from cascade.networks.effnet import SemanticEncoder

# Where the published networks add their residuals: Stage C's ResBlocks in execution order, 0-31 down and 32-63 up.
PUBLISHED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
# The width of the Stage C that they are for.
PUBLISHED_WIDTH = 2048
# What the published networks read, and how many channels that has.
KINDS = {"canny": 1, "inpainting": 4, "super_resolution": 16}
# Widths of the published "large" backbone.
EXPANDED, WIDTH, DEPTH, EMBEDDING = 16384, 1024, 8, 1280
SLOPE = 0.2


class ChannelsNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), with learned scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlResBlock(nn.Module):
    """Two 3x3 convolutions with norms before them; residual."""

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [ChannelsNorm(channels), nn.GELU(), nn.Conv2d(channels, channels, kernel_size=3, padding=1)]
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def effnet_backbone(in_channels: int, settings: dict[str, Any]) -> tuple[nn.Sequential, int]:
    """The semantic encoder's backbone, and its width. Shrinks 32 times.

    For other than three channels the first convolution is another one, and, as the authors have it, without padding.
    """
    encoder = SemanticEncoder(**settings)
    backbone, old = encoder.backbone, encoder.backbone[0][0]
    if in_channels != old.in_channels:
        backbone[0][0] = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, bias=False)
    return backbone, encoder.config.head_channels


def simple_backbone(in_channels: int) -> tuple[nn.Sequential, int]:
    """Two convolutions at the control's size, and their width."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, in_channels * 4, kernel_size=3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(in_channels * 4, in_channels, kernel_size=3, padding=1),
    )
    return backbone, in_channels


def large_backbone(in_channels: int) -> tuple[nn.Sequential, int]:
    """Eight residual blocks at the control's size, and the width of what follows them."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, EXPANDED, kernel_size=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(EXPANDED, WIDTH, kernel_size=1),
        *(ControlResBlock(WIDTH) for _ in range(DEPTH)),
        nn.Conv2d(WIDTH, EMBEDDING, kernel_size=1),
    )
    return backbone, EMBEDDING


class ControlNet(ModelMixin, ConfigMixin):
    """A backbone, and a projection for each of the ResBlocks that get a residual.

    Parameters:
        in_channels (`int`, 1): channels of the control: canny 1, inpainting 4, super-resolution 16.
        out_channels (`int`, 2048): width of Stage C.
        proj_blocks (`tuple[int]`): which ResBlocks of Stage C get a residual, in the order of the projections.
        bottleneck_mode (`str`, "effnet"): the backbone: "effnet" for images, "simple" or "large" for maps of the
            latents' size.
        effnet (`dict`, None): how the "effnet" backbone differs from `SemanticEncoder`'s defaults; None: not at all.

    Untrained, it changes nothing: the projections give zeros.
    Raises ValueError for another bottleneck_mode and for a ResBlock named twice.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2048,
        proj_blocks: tuple[int, ...] = PUBLISHED_BLOCKS,
        bottleneck_mode: str = "effnet",
        effnet: dict[str, Any] | None = None,
    ):
        super().__init__()
        if len(set(proj_blocks)) != len(proj_blocks):
            raise ValueError(f"proj_blocks is {tuple(proj_blocks)}; a ResBlock can be named only once.")
        if bottleneck_mode == "effnet":
            self.backbone, width = effnet_backbone(in_channels, effnet or {})
        elif bottleneck_mode == "simple":
            self.backbone, width = simple_backbone(in_channels)
        elif bottleneck_mode == "large":
            self.backbone, width = large_backbone(in_channels)
        else:
            raise ValueError(f"bottleneck_mode is {bottleneck_mode!r}; allowed: 'effnet', 'simple', 'large'.")
        self.projections = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel_size=1, bias=False),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
            )
            for _ in proj_blocks
        )
        for projection in self.projections:
            nn.init.zeros_(projection[-1].weight)

    def forward(self, control: Tensor) -> dict[int, Tensor]:
        """Control (B, in_channels, H, W), images in 0..1 without further normalisation -> the residuals.

        Returns {k: (B, out_channels, h, w)} in the weights' dtype, as `StableCascadeUNet.forward` takes them; h and w
        are H and W, or with the "effnet" backbone about a 32nd of them.
        """
        # Not self.dtype, for which diffusers looks through all layers.
        features = self.backbone(control.to(next(self.parameters()).dtype))
        return {k: project(features) for k, project in zip(self.config.proj_blocks, self.projections, strict=True)}
