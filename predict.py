"""The Predictor that Cog serves. Knows Cog; leaves everything about pictures to ``cascade``."""

import logging
import os
import secrets
import tempfile
from pathlib import Path as FilePath

from cog import BaseRunner, Input, Path
from tqdm import tqdm

from cascade.cascade import Cascade, Request

logger = logging.getLogger(__name__)

WEIGHTS = FilePath(__file__).parent / "weights"


def find_weights() -> FilePath:
    """The folder named by CASCADE_WEIGHTS, else the published model if it was downloaded, else the miniature."""
    if os.environ.get("CASCADE_WEIGHTS"):
        return FilePath(os.environ["CASCADE_WEIGHTS"])
    published = WEIGHTS / "stable-cascade"
    return published if published.is_dir() else WEIGHTS / "mini"


def whole(value: float | None) -> float | None:
    """20 for 20.0, which passes Cog's schema of an integer and arrives as it is; what is not whole is left for Request."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Predictor(BaseRunner):
    """Text to images."""

    def setup(self) -> None:
        """Load the model: onto the GPU if there is one, else for the CPU."""
        folder = find_weights()
        self.cascade = Cascade.load(folder)
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        logger.info("Loaded %s onto %s.", folder.name, self.cascade.device)

    def run(
        self,
        prompt: str = Input(
            description="What the picture shows; may be empty.", default="a red apple on a green background"
        ),
        negative_prompt: str = Input(description="What it should not show.", default=""),
        width: int | None = Input(
            description="Width in pixels; left out: the size that the model draws best.", default=None, ge=64, le=2048
        ),
        height: int | None = Input(
            description="Height in pixels; left out: the size that the model draws best.", default=None, ge=64, le=2048
        ),
        num_images: int = Input(description="How many pictures.", default=1, ge=1, le=4),
        steps_prior: int | None = Input(
            description="Steps of Stage C, which composes; left out: the model's own.", default=None, ge=1, le=50
        ),
        steps_decoder: int | None = Input(
            description="Steps of Stage B, which adds detail; left out: the model's own.", default=None, ge=1, le=50
        ),
        guidance_scale_prior: float | None = Input(
            description="How closely Stage C keeps to the prompt; 1 or less: no guidance; left out: the model's own.",
            default=None,
            ge=0,
            le=20,
        ),
        guidance_scale_decoder: float | None = Input(description="The same for Stage B.", default=None, ge=0, le=20),
        seed: int | None = Input(
            description="Same seed, same pictures; left out: a random one.", default=None, ge=0, le=4294967295
        ),
    ) -> list[Path]:
        """Make the pictures. They are deleted when the next run starts: Cog has sent them by then."""
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=whole(width),
            height=whole(height),
            num_images=whole(num_images),
            seed=secrets.randbits(32) if seed is None else whole(seed),
            steps_prior=whole(steps_prior),
            steps_decoder=whole(steps_decoder),
            guidance_scale_prior=guidance_scale_prior,
            guidance_scale_decoder=guidance_scale_decoder,
        )
        logger.info("Seed: %d", request.seed)
        self.record_metric("seed", request.seed)
        self.outputs.cleanup()
        self.outputs = tempfile.TemporaryDirectory(prefix="cascade-")
        files = []
        with tqdm(unit="step", dynamic_ncols=True) as bar:
            for progress in self.cascade.steps(request):
                bar.total = progress.total
                bar.set_description(progress.stage, refresh=False)
                bar.update()
                if progress.image is not None:
                    file = Path(self.outputs.name) / f"output-{len(files)}.png"
                    progress.image.save(file)
                    files.append(file)
        return files
