"""The Predictor that Cog serves: the inputs' signature, setup, healthcheck, run. ``serving.service`` does the work.

Cog's schema generator reads this file without running it: what stands in an ``Input()`` is a literal or a constant of
this file, a description is one literal, and an input that may be left out is ``| None`` with the default None.
"""

import logging
import time
import types

from cog import BaseRunner, Input, Path

from serving.cog_files import takes_urls
from serving.service import Service
from serving.settings import Settings

RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
IP_ADAPTER_MODES = ["all", "style", "composition"]
FORMATS = ["webp", "jpg", "png"]
# Seconds. What is logged just before setup ends, Cog may lose: on a busy machine, the last line in one start of six.
LAST_LINES = 0.2


class Predictor(BaseRunner):
    """Text and images to images."""

    service: Service | None = None

    def setup(self) -> None:
        """Load the safety checker and the model, onto the GPU if there is one. Fetches nothing.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: an environment variable has a value that is not allowed, see `serving.settings`.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        service = Service.load(Settings.from_environment())
        self.run = takes_urls(types.MethodType(Predictor.run, self))
        time.sleep(LAST_LINES)
        self.service = service

    def healthcheck(self) -> bool:
        """Whether predictions can work: the model is loaded, the GPU answers, the disk has room. Takes microseconds."""
        return self.service is not None and self.service.is_healthy()

    def run(
        self,
        prompt: str = Input(
            description="What the picture shows. Any text, or none; only its first 75 tokens are used.",
            default="a red apple on a green background",
        ),
        negative_prompt: str = Input(
            description="What the picture should not show. Only its first 75 tokens are used; ignored without guidance above 1.",
            default="",
        ),
        width: int | None = Input(
            description="Width in pixels, 64 to 2048. Default: from aspect_ratio, or from image.",
            default=None,
            ge=64,
            le=2048,
        ),
        height: int | None = Input(
            description="Height in pixels, 64 to 2048. Default: from aspect_ratio, or from image.",
            default=None,
            ge=64,
            le=2048,
        ),
        num_images: int = Input(
            description="Number of pictures, 1 to 4. The seed is increased by one for each.",
            default=1,
            ge=1,
            le=4,
        ),
        steps_prior: int | None = Input(
            description="Steps of Stage C, which composes the picture, 1 to 50. Default: the model's own, usually 20.",
            default=None,
            ge=1,
            le=50,
        ),
        steps_decoder: int | None = Input(
            description="Steps of Stage B, which adds detail, 1 to 50. Default: the model's own, usually 10.",
            default=None,
            ge=1,
            le=50,
        ),
        guidance_scale_prior: float | None = Input(
            description="Guidance scale of Stage C, 0 to 20. 1 or less turns guidance off, which is twice as fast; default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        guidance_scale_decoder: float | None = Input(
            description="Guidance scale of Stage B, 0 to 20. 1 or less turns guidance off, which is twice as fast; default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        seed: int | None = Input(
            description="Any whole number, taken modulo 4294967296. Default: a random one, reported in metrics.seeds.",
            default=None,
        ),
        aspect_ratio: str = Input(
            description="Ratio of width to height. Ignored with image; width and height override it.",
            default="1:1",
            choices=RATIOS,
        ),
        output_format: str = Input(
            description="File format: webp, jpg or png. png is lossless.", default="webp", choices=FORMATS
        ),
        output_quality: int = Input(
            description="Quality of webp and jpg files, 0 (smallest) to 100 (best). Ignored for png.",
            default=80,
            ge=0,
            le=100,
        ),
        disable_safety_checker: bool = Input(
            description="true: return pictures that the safety checker flags, too. false: drop them.", default=False
        ),
        image_prompts: list[Path] | None = Input(
            description="1 to 4 images that show what the picture shows, used beside the prompt. Default: the prompt alone.",
            default=None,
        ),
        image_prompt_strength: float = Input(
            description="Strength of image_prompts, 0 (none) to 2. The model was trained with 1.",
            default=1.0,
            ge=0,
            le=2,
        ),
        image_prompt_strengths: list[float] | None = Input(
            description="Strength of each of image_prompts, 0 to 2. Default: image_prompt_strength for all.",
            default=None,
        ),
        ip_adapter_images: list[Path] | None = Input(
            description="1 to 4 images for the IP-Adapter, which shows more of them than image_prompts. The model must have one.",
            default=None,
        ),
        ip_adapter_scales: list[float] | None = Input(
            description="Strength of each of ip_adapter_images, 0 (none) to 2. Default: 1 for all.",
            default=None,
        ),
        ip_adapter_masks: list[Path] | None = Input(
            description="Where in the picture each of ip_adapter_images counts: white. One each. Default: everywhere.",
            default=None,
        ),
        ip_adapter_mode: str = Input(
            description="What the picture takes from ip_adapter_images: all, style or composition, as far as the adapter can.",
            default="all",
            choices=IP_ADAPTER_MODES,
        ),
        image: Path | None = Input(
            description="Image to start from, instead of noise: for image-to-image, inpainting, outpainting and upscaling.",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much of image is changed, 0 (only redrawn) to 1 (all of it). Ignored without image.",
            default=0.8,
            ge=0,
            le=1,
        ),
        mask: Path | None = Input(
            description="White where image is repainted, of image's shape; or alpha: repaint image where it is transparent.",
            default=None,
        ),
        outpaint: list[int] | None = Input(
            description="Pixels to add to image and paint, 0 to 2048: four numbers, for left, top, right and bottom.",
            default=None,
        ),
        upscale: bool = Input(
            description="true: redraw image at twice its size, at most 2048. Needs the super_resolution ControlNet.",
            default=False,
        ),
        control_images: list[Path] | None = Input(
            description="1 to 4 images for ControlNets. Each is scaled and cropped to the picture's size.", default=None
        ),
        control_types: list[str] | None = Input(
            description="canny, inpainting or super_resolution. One for all control_images, or one each. Default: canny.",
            default=None,
        ),
        control_scales: list[float] | None = Input(
            description="Strength of the ControlNet, 0 (none) to 2. One for all control_images, or one each. Default: 1.",
            default=None,
        ),
        control_starts: list[float] | None = Input(
            description="Fraction of Stage C's steps at which a ControlNet starts, 0 to 1: one for all, or one each. Default: 0.",
            default=None,
        ),
        control_ends: list[float] | None = Input(
            description="Fraction of Stage C's steps at which a ControlNet ends, 0 to 1: one for all, or one each. Default: 1.",
            default=None,
        ),
        previews: bool = Input(
            description="true: metrics.previews shows small pictures after each step of Stage C. Needs the previewer.",
            default=False,
        ),
    ) -> list[Path]:
        """Make the pictures. They are deleted when the next run starts: Cog has sent them by then.

        Raises:
            ValueError: an input is out of range or no picture, the model lacks what reads pictures, the GPU's memory
                does not suffice, or every picture was flagged.
        """
        given = dict(locals())
        return [Path(file) for file in self.service.predict(given, self.record_metric)]
