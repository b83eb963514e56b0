"""The semantic encoder: an image -> the 16-channel latents that Stage C makes and Stage B is conditioned on.

EfficientNetV2 features (Tan and Le, arXiv 2104.00298), a pointwise projection and a normalisation without learned
parameters. State-dict keys are the authors' (`backbone.*` with torchvision's names, `mapper.*`). The defaults are the
published network, EfficientNetV2-S. Its BatchNorms use running statistics: keep it in evaluation mode, except to train it
from scratch.
"""

import torch
from torch import Tensor, nn

from cascade.networks.base import Network, register_to_config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Module:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if act else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from all channels' means over the image."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, kernel_size=1)
        self.fc2 = nn.Conv2d(squeezed, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * self.fc2(nn.functional.silu(self.fc1(pooled))).sigmoid()


class MBConv(nn.Module):
    """Expand, convolve, project; with a residual connection if the shape stays. Fused: one 3x3 convolution does the first two."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, fused: bool):
        super().__init__()
        hidden = inputs * expansion
        if fused and expansion == 1:
            layers = [conv_norm(inputs, outputs, 3, stride)]
        elif fused:
            layers = [conv_norm(inputs, hidden, 3, stride), conv_norm(hidden, outputs, 1, act=False)]
        else:
            layers = [
                conv_norm(inputs, hidden, 1),
                conv_norm(hidden, hidden, 3, stride, groups=hidden),
                SqueezeExcitation(hidden, max(1, inputs // 4)),
                conv_norm(hidden, outputs, 1, act=False),
            ]
        self.block = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class SemanticEncoder(Network):
    """EfficientNetV2 to semantic latents.

    Parameters (tuples have one value per stage; the defaults are the published EfficientNetV2-S):
        stem_channels (`int`, 24): width of the first convolution.
        channels (`tuple[int]`), repeats (`tuple[int]`): width and number of blocks of each stage.
        expansions (`tuple[int]`): expansion in each stage's blocks.
        strides (`tuple[int]`): stride of each stage's first block.
        fused_stages (`int`, 3): number of stages with fused blocks, from the first.
        head_channels (`int`, 1280): width of the last convolution.
        latent_channels (`int`, 16): channels of the result.

    Raises ValueError for tuples of unequal length.
    """

    @register_to_config
    def __init__(
        self,
        stem_channels: int = 24,
        channels: tuple[int, ...] = (24, 48, 64, 128, 160, 256),
        repeats: tuple[int, ...] = (2, 4, 4, 6, 9, 15),
        expansions: tuple[int, ...] = (1, 4, 4, 4, 6, 6),
        strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2),
        fused_stages: int = 3,
        head_channels: int = 1280,
        latent_channels: int = 16,
    ):
        super().__init__()
        lengths = {len(channels), len(repeats), len(expansions), len(strides)}
        if len(lengths) != 1:
            raise ValueError(
                f"channels, repeats, expansions and strides have lengths {sorted(lengths)}; they must be equal."
            )
        layers: list[nn.Module] = [conv_norm(3, stem_channels, 3, stride=2)]
        inputs = stem_channels
        for i, (width, blocks, expansion, stride) in enumerate(
            zip(channels, repeats, expansions, strides, strict=True)
        ):
            stage = []
            for j in range(blocks):
                stage.append(MBConv(inputs, width, expansion, stride if j == 0 else 1, fused=i < fused_stages))
                inputs = width
            layers.append(nn.Sequential(*stage))
        layers.append(conv_norm(inputs, head_channels, 1))
        self.backbone = nn.Sequential(*layers)
        self.mapper = nn.Sequential(
            nn.Conv2d(head_channels, latent_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(latent_channels, affine=False),
        )
        self.init_weights()

    def init_weights(self) -> None:
        """torchvision's initialisation of EfficientNets: He normal, fan out."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1, any float dtype -> (B, 16, ceil(H/32), ceil(W/32)) in the weights' dtype.

        Normalises with ImageNet's mean and standard deviation.
        """
        # Numbers instead of tensors: a CUDA graph cannot capture copies from pageable host memory.
        channels = zip(pixels.unbind(dim=1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
        images = torch.stack([(x - mean) / std for x, mean, std in channels], dim=1)
        return self.mapper(self.backbone(images.to(self.dtype)))
