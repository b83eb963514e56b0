"""ControlNets: they make a frozen Stage C follow a picture's edges, or fill in a mask.

Only the ControlNet is trained; its gradient comes through the frozen prior. The data that a control needs from a picture is
computed once, at the semantic encoder's input size (three quarters of the picture's), and kept as bytes with the latents.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from cascade.guides import controls
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import IMAGENET_STD, SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import diffuse
from cascade.stages.encoder import for_encoder
from training.dataset import Dataset
from training.errors import TrainingError
from training.latents import Encoded, stage_c_encoder
from training.masks import random_masks
from training.objective import diffusion_losses, loss_weight
from training.pictures import grid
from training.sampling import text_to_semantic
from training.shapes import Shapes
from training.task import DiffusionTask, frozen
from training.tasks.stage_c import prior_batch
from training.values import Amount, Share


class ControlKind(ABC):
    """A kind of control.

    Attributes:
        channels: number of channels of the ControlNet's input.
    """

    channels: int

    @abstractmethod
    def keep(self, pixels: Tensor) -> Tensor:
        """Computed once from pictures (B, 3, H, W) in 0..1, and kept: bytes (B, C, H, W)."""

    @abstractmethod
    def make(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        """The controls of one step, float32 (B, channels, H, W) in 0..1, from what was kept, in 0..255."""


class Canny(ControlKind):
    """Edges, found at 224 x 224 pixels as the authors do."""

    channels = 1

    def keep(self, pixels: Tensor) -> Tensor:
        # A core finds the edges of some 1,000 pictures a second. OpenCV releases the GIL, so threads help.
        with ThreadPoolExecutor() as pool:
            edges = torch.cat(list(pool.map(controls.canny, pixels.split(8))))
        return edges.mul(255).round().byte()

    def make(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        return kept / 255


class Inpainting(ControlKind):
    """The picture outside of a mask, and the mask, which is new at every step; ``inverted`` is the share of outpainting."""

    channels = 4

    def __init__(self, inverted: Share) -> None:
        self.inverted = inverted

    def keep(self, pixels: Tensor) -> Tensor:
        return pixels.mul(255).round().byte()

    def make(self, kept: Tensor, generator: torch.Generator) -> Tensor:
        height, width = kept.shape[-2:]
        masks = random_masks(len(kept), (height, width), generator, inverted=self.inverted)
        return controls.inpainting(kept / 255, masks)


CONTROL_KINDS: dict[str, Callable[..., ControlKind]] = {"canny": Canny, "inpainting": Inpainting}


def res_blocks(config: Mapping[str, Any]) -> int:
    """How many ResBlocks a UNet of this configuration runs, down and up; repeated ones count every time."""
    each = [list(kinds).count("SDCascadeResBlock") for kinds in config["block_types_per_layer"]]
    down = zip(each, config["down_num_layers_per_block"], config["down_blocks_repeat_mappers"], strict=True)
    up = zip(reversed(each), config["up_num_layers_per_block"], config["up_blocks_repeat_mappers"], strict=True)
    return sum(blocks * layers * times for blocks, layers, times in (*down, *up))


def new_controlnet(
    prior: StableCascadeUNet, encoder: SemanticEncoder, channels: int, proj_blocks: Sequence[int]
) -> ControlNet:
    """A new ControlNet, whose backbone is a copy of the trained ``encoder``'s and whose residuals are zero.

    The encoder's input is normalised, a ControlNet's is not. So the first convolution's weights are divided by the deviation; the
    mean is left to the normalisation after it. A single channel is treated as a gray picture. Channels after the third start
    with zero weights.

    Raises:
        TrainingError: Stage C has no such ResBlock.
    """
    there = res_blocks(prior.config)
    for block in proj_blocks:
        if not 0 <= block < there:
            raise TrainingError(f"proj_blocks holds {block}; Stage C has {there} ResBlocks, from 0 to {there - 1}.")
    arguments = ("stem_channels", "channels", "repeats", "expansions", "strides", "fused_stages", "head_channels")
    network = ControlNet(
        in_channels=channels,
        out_channels=prior.config.block_out_channels[0],
        proj_blocks=tuple(proj_blocks),
        effnet={name: encoder.config[name] for name in arguments},
    )
    weights = encoder.backbone.state_dict()
    stem = weights["0.0.weight"]
    colours = stem / stem.new_tensor(IMAGENET_STD).view(3, 1, 1)
    if channels == 1:
        colours = colours.sum(dim=1, keepdim=True)
    unseen = colours.new_zeros(len(colours), channels - colours.shape[1], *colours.shape[2:])
    network.backbone.load_state_dict({**weights, "0.0.weight": torch.cat([colours, unseen], dim=1)})
    return network


class ControlNetTask(DiffusionTask):
    """Weighted epsilon error of Stage C with the ControlNet's residuals.

    Args:
        control: the kind of control.
        name: the component's name in a model folder.
        weight, drop_text, keep_image: as `stage_c.StageCTask` has them.
        offset_noise: factor on a random number that is added to each channel's noise.
    """

    def __init__(
        self,
        controlnet: ControlNet,
        *,
        control: ControlKind,
        name: str,
        prior: StableCascadeUNet,
        effnet: SemanticEncoder,
        previewer: Previewer,
        text_encoder: CLIPTextModelWithProjection,
        image_encoder: CLIPVisionModelWithProjection,
        dataset: Dataset,
        unseen: Dataset,
        shapes: Shapes,
        weight: Mapping[str, Any],
        drop_text: Share,
        keep_image: Share,
        offset_noise: Amount,
    ) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.control, self.name = control, name
        self.weight = loss_weight(**weight)
        self.drop_text, self.keep_image, self.offset_noise = drop_text, keep_image, offset_noise
        encode = stage_c_encoder(effnet, image_encoder)
        self.data = Encoded(
            dataset,
            shapes,
            text_encoder,
            lambda pixels: (*encode(pixels), control.keep(for_encoder(pixels))),
            with_tokens=True,
        )
        self.frozen = frozen(prior=prior, effnet=effnet, previewer=previewer, text=text_encoder)
        self.dataset, self.unseen = dataset, unseen

    def batch(self, index: int, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch, (kept,) = prior_batch(
            self.data, index, size, generator, drop_text=self.drop_text, keep_image=self.keep_image
        )
        noise = batch["noise"]
        offset = torch.randn((*noise.shape[:2], 1, 1), generator=generator, device=noise.device)
        return {
            **batch,
            "noise": noise + self.offset_noise * offset,
            "control": self.control.make(kept, generator),
        }

    def forward(
        self,
        latents: Tensor,
        image: Tensor,
        text: Tensor,
        pooled: Tensor,
        timesteps: Tensor,
        noise: Tensor,
        control: Tensor,
    ) -> dict[str, Tensor]:
        """``control`` (B, C, 32h, 32w) in 0..1; for the others, see `stage_c.prior_batch`."""
        epsilon = self.frozen["prior"](
            diffuse(latents, noise, timesteps),
            timesteps,
            clip_text_pooled=pooled,
            clip_text=text,
            clip_img=image,
            controlnet_residuals=self.controlnet(control),
        )
        return diffusion_losses(epsilon, noise, self.weight(timesteps))

    def evaluate(self) -> tuple[dict[str, float], Image.Image]:
        """Mean squared errors of sampled latents with the ControlNet and without; rows: pictures, controls, with, without."""
        indices = torch.arange(min(64, len(self.unseen)))
        pixels = self.unseen.images(indices)
        small = for_encoder(pixels)
        true = self.frozen["effnet"](small).float()
        control = self.control.make(self.control.keep(small), torch.Generator(pixels.device).manual_seed(0))
        figures, previews = {}, []
        for key, residuals in (("error", self.controlnet(control)), ("error_without", None)):
            latents = text_to_semantic(self.frozen["prior"], self.frozen["text"], self.unseen, indices, residuals)
            figures[key] = (latents - true).square().mean().item()
            previews.append(self.frozen["previewer"](latents[:8]).float())
        seen = control[:8, :3].expand(-1, 3, -1, -1)
        return figures, grid([pixels[:8], seen, *previews])

    def save(self, folder: Path) -> None:
        self.controlnet.save_pretrained(folder / self.name)
