"""ControlNets of Stage C: a control image -> residuals for some of Stage C's ResBlocks.

Architecture and state-dict keys are those of Stability-AI/StableCascade `modules/controlnet.py`. The defaults are the
published canny network. Unlike ControlNets of other models, these read neither the latents nor the timestep, so one forward
serves all steps of a picture. Their BatchNorms use running statistics: keep them in evaluation mode.
"""

from typing import Any

from torch import Tensor, nn

from cascade.networks.base import Network, register_to_config
from cascade.networks.effnet import SemanticEncoder

# The ResBlocks to which the published networks add residuals, in Stage C's execution order: 0-31 down and 32-63 up.
PUBLISHED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
# The width of the Stage C that they were trained with.
PUBLISHED_WIDTH = 2048
# The kinds of the published networks, and the channels of their controls.
KINDS = {"canny": 1, "inpainting": 4, "super_resolution": 16}
# Widths of the published "large" backbone.
EXPANDED, WIDTH, DEPTH, EMBEDDING = 16384, 1024, 8, 1280
SLOPE = 0.2


class ChannelsNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W), with learned scale and shift."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlResBlock(nn.Module):
    """Two 3x3 convolutions, each after a norm and a GELU, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [ChannelsNorm(channels), nn.GELU(), nn.Conv2d(channels, channels, kernel_size=3, padding=1)]
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def effnet_backbone(in_channels: int, settings: dict[str, Any]) -> tuple[nn.Sequential, int]:
    """The semantic encoder's backbone, and its width. It shrinks each side by 32.

    If `in_channels` is not 3, the first convolution is replaced by one without padding, as in the authors' code.
    """
    encoder = SemanticEncoder(**settings)
    backbone, old = encoder.backbone, encoder.backbone[0][0]
    if in_channels != old.in_channels:
        backbone[0][0] = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, bias=False)
    return backbone, encoder.config.head_channels


def simple_backbone(in_channels: int) -> tuple[nn.Sequential, int]:
    """Two convolutions at the control's size, and the number of their output channels."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, in_channels * 4, kernel_size=3, padding=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(in_channels * 4, in_channels, kernel_size=3, padding=1),
    )
    return backbone, in_channels


def large_backbone(in_channels: int) -> tuple[nn.Sequential, int]:
    """Eight residual blocks at the control's size, and the number of output channels."""
    backbone = nn.Sequential(
        nn.Conv2d(in_channels, EXPANDED, kernel_size=1),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(EXPANDED, WIDTH, kernel_size=1),
        *(ControlResBlock(WIDTH) for _ in range(DEPTH)),
        nn.Conv2d(WIDTH, EMBEDDING, kernel_size=1),
    )
    return backbone, EMBEDDING


class ControlNet(Network):
    """A backbone, and one projection per ResBlock that gets a residual. The projections are initialised to return zeros.

    Parameters:
        in_channels (`int`, 1): channels of the control: canny 1, inpainting 4, super-resolution 16.
        out_channels (`int`, 2048): width of Stage C.
        proj_blocks (`tuple[int]`): the ResBlocks of Stage C that get a residual, in the order of the projections.
        bottleneck_mode (`str`, "effnet"): the backbone: "effnet" for images, "simple" or "large" for maps of the latents'
            size.
        effnet (`dict`, None): parameters of `SemanticEncoder` that the "effnet" backbone changes; None: no changes.

    Raises ValueError for another bottleneck_mode and for a ResBlock named twice.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = PUBLISHED_WIDTH,
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
        """Control (B, in_channels, H, W) -> residuals. Images are in 0..1, without ImageNet's normalisation.

        Returns {k: (B, out_channels, h, w)} in the weights' dtype, for `StableCascadeUNet.forward`. h and w are H and W, or
        with the "effnet" backbone about a 32nd of them.
        """
        features = self.backbone(control.to(self.dtype))
        return {k: project(features) for k, project in zip(self.config.proj_blocks, self.projections, strict=True)}
