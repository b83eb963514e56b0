"""The training that Cog serves: a zip of pictures becomes a LoRA. ``training.lora.job`` does the work.

Cog's schema generator reads this file without running it, see predict.py.
"""

import logging
import random
import tempfile

from cog import BaseModel, Input, Path

from serving.cog_files import sweep
from serving.download import Limits
from serving.early import find_weights
from serving.image_urls import UrlSettings, downloaded
from training.errors import TrainingError
from training.lora.job import run_job
from training.lora.settings import Recipe

# Of the zip: 2 hours, a minute without progress, and as much as its pictures may have.
DOWNLOAD = Limits(seconds=7200, idle_seconds=60, size=8_000_000_000)
LAYERS = ["attention", "mlp", "conditions", "timesteps", "all"]


class TrainingOutput(BaseModel):
    """A tar of lora.safetensors, settings.json, and a picture before and after."""

    weights: Path


class _Outputs:
    """The folder of the last training's tar, which is removed when the next one starts: Cog has sent it by then."""

    folder: tempfile.TemporaryDirectory | None = None

    @classmethod
    def clear(cls) -> None:
        if cls.folder is not None:
            cls.folder.cleanup()
        cls.folder = None


def train(
    input_images: Path = Input(
        description="A zip of pictures (jpg, png, webp); the caption of cat.jpg is the text file cat.txt beside it."
    ),
    trigger_word: str = Input(
        description="A word that calls what is learned. It is put before captions that do not have it. May be empty.",
        default="TOK",
    ),
    begins_from: str = Input(
        description="Known words that trigger_word begins from, such as dog: it is learned as a new word. Default: it is not.",
        default="",
    ),
    caption: str = Input(description="Caption of the pictures that have no text file.", default=""),
    caption_prefix: str = Input(description="Text put before every caption.", default=""),
    steps: int = Input(description="Number of training steps, 1 to 20000.", default=1000, ge=1, le=20000),
    minutes: float | None = Input(
        description="Time limit, 0.1 to 1440 minutes, after which training returns the LoRA so far. Default: none.",
        default=None,
        ge=0.1,
        le=1440,
    ),
    lora_rank: int = Input(description="Rank of the LoRA, 1 to 128.", default=16, ge=1, le=128),
    learning_rate: float = Input(
        description="Largest learning rate, 0.0000001 to 0.01.", default=0.0001, ge=0.0000001, le=0.01
    ),
    batch_size: int = Input(description="Number of pictures in a step, 1 to 64.", default=1, ge=1, le=64),
    resolution: int | None = Input(
        description="Pictures get the area of a square with this side, 128 to 2048 pixels. Default: the model's own.",
        default=None,
        ge=128,
        le=2048,
    ),
    seed: int | None = Input(
        description="Any whole number, taken modulo 4294967296. Default: a random one.", default=None
    ),
    caption_dropout_rate: float = Input(
        description="Fraction of the samples that are trained without their caption, 0 to 1.", default=0.05, ge=0, le=1
    ),
    layers: str = Input(description="Layers of Stage C that get a LoRA.", default="attention", choices=LAYERS),
    train_text_encoder: bool = Input(description="true: the text encoder gets a LoRA, too.", default=False),
    preserve: str = Input(
        description="A prompt of what must not change, such as a photo of a dog: the model's own pictures of it are trained on.",
        default="",
    ),
    sample_prompt: str = Input(
        description="Prompt of the pictures before and after. Default: the first picture's caption.", default=""
    ),
) -> TrainingOutput:
    """Train a LoRA.

    Raises:
        ValueError: the zip holds no pictures, or is damaged or too large; or an input is not allowed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    sweep()
    _Outputs.clear()
    seed = random.randrange(2**32) if seed is None else int(seed) % 2**32
    folder = tempfile.TemporaryDirectory(prefix="cascade-training-")
    try:
        recipe = Recipe().changed(
            {
                "rank": int(lora_rank),
                "targets": (layers,),
                "text_encoder_rank": int(lora_rank) if train_text_encoder else 0,
                "caption": caption,
                "caption_prefix": caption_prefix,
                "word": trigger_word.strip(),
                "begins_from": begins_from.strip(),
                "caption_dropout": float(caption_dropout_rate),
                "resolution": None if resolution is None else int(resolution),
                "preserve": [preserve] if preserve else [],
                "title": trigger_word.strip() or None,
            },
            {
                "steps": int(steps),
                "batch_size": int(batch_size),
                "learning_rate": float(learning_rate),
                "seed": seed,
                # One at the end: nobody sees those before.
                "evaluate_every": max(1, int(steps)),
                "checkpoint_seconds": 1e9,
            },
        )
        urls = UrlSettings(DOWNLOAD, UrlSettings.from_environment().public_only)
        with downloaded({"input_images": input_images}, ["input_images"], urls) as inputs:
            if isinstance(inputs["input_images"], str):  # also the path of a file of the server's
                raise ValueError("input_images must be an http, https or data URL.")
            made = run_job(
                find_weights(),
                inputs["input_images"],
                Path(folder.name),
                recipe,
                seconds=None if minutes is None else 60 * minutes,
                prompt=sample_prompt,
                name="input_images",
            )
    except BaseException as error:  # Cog cancels by a BaseException
        folder.cleanup()
        if isinstance(error, TrainingError):
            raise ValueError(str(error)) from None
        raise
    _Outputs.folder = folder
    return TrainingOutput(weights=Path(made))


# Cog then passes the URL on as text, and `downloaded` fetches it within limits. The schema is made of the source above.
train.__annotations__["input_images"] = str
