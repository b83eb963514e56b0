"""The Predictor that Cog serves: the inputs' signature, setup, healthcheck, run. ``serving.service`` does the work.

Cog's schema generator reads this file without running it. So arguments of ``Input()`` are literals or constants of this
file, a description is one literal, and an optional input is ``| None`` with the default None.
"""

import logging
import time
import types

from serving import early

early.begin()  # before the imports below, which take seconds

from cog import BaseRunner, Input, Path  # noqa: E402

from serving.cog_files import takes_urls  # noqa: E402
from serving.service import Service  # noqa: E402
from serving.settings import Settings  # noqa: E402

early.end()

RATIOS = ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]
SAMPLERS = ["default", "ddpm", "ddim", "ddim_cosine", "lcm"]
SPEEDS = ["exact", "fast", "turbo"]
IP_ADAPTER_MODES = ["all", "style", "composition"]
FORMATS = ["webp", "jpg", "png"]
# Seconds to wait before `setup` returns. Cog can lose the last log line otherwise (one start in six on a busy machine).
LAST_LINES = 0.2


class Predictor(BaseRunner):
    """Text and images to images."""

    service: Service | None = None

    def setup(self) -> None:
        """Load the safety checker and the model, onto the GPU if there is one. Downloads nothing, unless CASCADE_DOWNLOAD is set.

        Raises:
            WeightsError: the weights are missing or damaged.
            ValueError: an environment variable has a value that is not allowed, see `serving.settings`.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        service = Service.load(Settings.from_environment())
        service.warm_up()
        self.run = takes_urls(types.MethodType(Predictor.run, self))
        time.sleep(LAST_LINES)
        self.service = service

    def healthcheck(self) -> bool:
        """Whether predictions can work: the model is loaded, the GPU answers, and the disk has room. Takes microseconds."""
        return self.service is not None and self.service.is_healthy()

    def run(
        self,
        prompt: str = Input(
            description="Text that describes the picture; may be empty. Only its first 300 tokens are used.",
            default="a red apple on a green background",
        ),
        negative_prompt: str = Input(
            description="Text that describes what to avoid. Only its first 300 tokens are used; ignored without guidance above 1.",
            default="",
        ),
        width: int | None = Input(
            description="Width in pixels, 64 to 4096. Default: from aspect_ratio, or from image if given.",
            default=None,
            ge=64,
            le=4096,
        ),
        height: int | None = Input(
            description="Height in pixels, 64 to 4096. Default: from aspect_ratio, or from image if given.",
            default=None,
            ge=64,
            le=4096,
        ),
        num_images: int = Input(
            description="Number of pictures, 1 to 4. Each picture's seed is one more than the previous one's.",
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
            description="Guidance scale of Stage C, 0 to 20. 1 or less turns guidance off, which is twice as fast. Default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        guidance_scale_decoder: float | None = Input(
            description="Guidance scale of Stage B, 0 to 20. 1 or less turns guidance off, which is twice as fast. Default: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        sampler: str = Input(
            description="ddpm adds noise at every step; ddim adds none; ddim_cosine and lcm are for few. default: the model's own.",
            default="default",
            choices=SAMPLERS,
        ),
        speed: str = Input(
            description="exact; fast: fewer steps; turbo: the fewest, needs distilled weights. Steps, guidance and sampler override it.",
            default="exact",
            choices=SPEEDS,
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
        compression: float = Input(
            description="Pixels to a side of Stage C's latents, 32 to 64. Use 64 from 2048 pixels on, where objects repeat otherwise.",
            default=42.67,
            ge=32,
            le=64,
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
            description="true: pictures are not checked. false: pictures that the safety checker flags are dropped.",
            default=False,
        ),
        image_prompts: list[Path] | None = Input(
            description="1 to 4 images that describe the picture, in addition to the prompt. Default: none.",
            default=None,
        ),
        image_prompt_strengths: list[float] | None = Input(
            description="Strength of an image prompt, 0 (none) to 2. One for all image_prompts, or one each. Default: 1, as in training.",
            default=None,
        ),
        ip_adapter_images: list[Path] | None = Input(
            description="1 to 4 reference images for the IP-Adapter, which takes more from them than image_prompts. Needs an IP-Adapter.",
            default=None,
        ),
        ip_adapter_scales: list[float] | None = Input(
            description="One strength for each of ip_adapter_images, 0 (none) to 2. Default: 1 for all.",
            default=None,
        ),
        ip_adapter_masks: list[Path] | None = Input(
            description="One mask for each of ip_adapter_images; the image acts on the picture where its mask is white. Default: everywhere.",
            default=None,
        ),
        ip_adapter_mode: str = Input(
            description="What the picture takes from ip_adapter_images: all, style or composition. Ignored without ip_adapter_images.",
            default="all",
            choices=IP_ADAPTER_MODES,
        ),
        image: Path | None = Input(
            description="Image to start from instead of noise, for image-to-image, inpainting, outpainting and upscaling.",
            default=None,
        ),
        prompt_strength: float = Input(
            description="How much image is changed: 0 redraws it, 1 replaces it. Ignored without image.",
            default=0.8,
            ge=0,
            le=1,
        ),
        mask: Path | None = Input(
            description="Mask of image's shape; white is repainted. Or the text alpha, to repaint image where it is transparent.",
            default=None,
        ),
        outpaint: list[int] | None = Input(
            description="Pixels to add to image and paint: four numbers from 0 to 4096, for left, top, right and bottom.",
            default=None,
        ),
        upscale: bool = Input(
            description="true: redraw image at twice its size, at most 4096 pixels a side. Needs the super_resolution ControlNet.",
            default=False,
        ),
        control_images: list[Path] | None = Input(
            description="1 to 4 images for ControlNets. Each is scaled and cropped to the picture's size.", default=None
        ),
        control_types: list[str] | None = Input(
            description="canny, inpainting or super_resolution: one type for all control_images, or one each. Default: canny.",
            default=None,
        ),
        control_scales: list[float] | None = Input(
            description="Strength of a ControlNet, 0 (none) to 2. One for all control_images, or one each. Default: 1.",
            default=None,
        ),
        control_ranges: list[float] | None = Input(
            description="Start and end of a ControlNet, 0 to 1 of Stage C's steps: one pair for all, or one each. Default: 0, 1.",
            default=None,
        ),
        previews: bool = Input(
            description="true: metrics.previews has small pictures, replaced after each step of Stage C. Needs the previewer.",
            default=False,
        ),
        prompt_weighting: bool = Input(
            description="true: (word:1.3) in the prompts is a weight, -4 to 4, as in ComfyUI. false: brackets are text.",
            default=False,
        ),
        lora_weights: list[str] | None = Input(
            description="1 to 8 LoRAs: URLs, owner/name[/file] on the Hub, Civitai links, or names in the model folder's loras.",
            default=None,
        ),
        lora_scales: list[float] | None = Input(
            description="Strength of a LoRA, -2 to 3. One for all lora_weights, or one each. Default: 1.", default=None
        ),
    ) -> list[Path]:
        """Make the pictures. Their files are deleted when the next run starts, because Cog has sent them by then.

        Raises:
            ValueError: an input is not allowed, a file is not a picture, the model lacks a network that the inputs need,
                the GPU's memory does not suffice, or the safety checker flagged every picture.
        """
        given = dict(locals())
        return [Path(file) for file in self.service.predict(given, self.record_metric)]
