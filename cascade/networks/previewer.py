"""The previewer: semantic latents -> a small picture, without Stages B and A.

State-dict keys and arithmetic are those of Stability-AI/StableCascade `modules/previewer.py`.
"""

from torch import Tensor, nn

from cascade.networks.base import Network, register_to_config


class Previewer(Network):
    """A picture with 8 pixels per latent along each side.

    Parameters:
        latent_channels (`int`, 16): channels of the latents.
        hidden (`int`, 512): width at the latents' size. It is a half of this at twice that size, and a quarter above.
        out_channels (`int`, 3): channels of the picture.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 16, hidden: int = 512, out_channels: int = 3):
        super().__init__()
        half, quarter = hidden // 2, hidden // 4
        convolutions = [
            nn.Conv2d(latent_channels, hidden, kernel_size=1),
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1),
            nn.ConvTranspose2d(hidden, half, kernel_size=2, stride=2),
            nn.Conv2d(half, half, kernel_size=3, padding=1),
            nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
            nn.Conv2d(quarter, quarter, kernel_size=3, padding=1),
            nn.ConvTranspose2d(quarter, quarter, kernel_size=2, stride=2),
            nn.Conv2d(quarter, quarter, kernel_size=3, padding=1),
        ]
        layers: list[nn.Module] = []
        for convolution in convolutions:
            layers += [convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels)]
        self.blocks = nn.Sequential(*layers, nn.Conv2d(quarter, out_channels, kernel_size=1))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 16, h, w) -> (B, 3, 8h, 8w), about 0..1 and not clamped."""
        return self.blocks(latents)
