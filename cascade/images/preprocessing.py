"""Pictures as CLIP's vision tower reads them, by transformers' ``preprocessor_config.json``.

The arithmetic is that of transformers' `CLIPImageProcessorPil`, which takes seconds to import.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SETTINGS = "preprocessor_config.json"
STEPS = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
# Pixels, the longest side that settings may ask for. CLIP's towers read at most 448, and a picture may be 64 times as wide as
# high: it is scaled before it is cropped.
MOST_SIDE = 1024
# What a setting must be, for errors.
NUMBER = "a number from -1e6 to 1e6"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipPreprocessor:
    """Scales, crops and normalises pictures.

    Attributes:
        size: pixels, the shorter side after scaling; or (height, width).
        crop: (height, width) of what is kept, from the middle. What a smaller picture lacks is black.
        resample: Pillow's filter.
        scale: factor on pixels of 0 to 255.
        mean, deviation: of a channel, which are subtracted and divided by afterwards.
    """

    size: int | tuple[int, int] = 224
    crop: tuple[int, int] = (224, 224)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    scale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    deviation: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> Self:
        """Read `SETTINGS` from a folder. What the file leaves out is as in CLIP.

        Raises:
            OSError, ValueError: the file is missing, damaged, or describes another kind of processor.
        """
        said = json.loads(Path(folder, SETTINGS).read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"{SETTINGS} is not a JSON object")
        for step in STEPS[1:]:  # all pictures are converted
            if said.get(step) is False:
                raise ValueError(f"{step} is false, but CLIP reads scaled, cropped and normalised pictures")
        size, crop = said.get("size", cls.size), said.get("crop_size", cls.crop[0])
        scale, resample = said.get("rescale_factor", cls.scale), said.get("resample", cls.resample)
        if not _is_number(scale, zero=False):
            raise ValueError(f"rescale_factor is {scale!r}; it must be {NUMBER} other than 0")
        if resample not in list(Image.Resampling):
            raise ValueError(f"resample is {resample!r}; it must be one of Pillow's numbers, 0 to 5")
        shorter = size.get("shortest_edge", size) if isinstance(size, dict) else size
        return cls(
            size=shorter if _is_side(shorter) else _height_and_width("size", size, " or shortest_edge"),
            crop=(crop, crop) if _is_side(crop) else _height_and_width("crop_size", crop),
            resample=Image.Resampling(resample),
            scale=float(scale),
            mean=_of_channels("image_mean", said.get("image_mean", cls.mean)),
            deviation=_of_channels("image_std", said.get("image_std", cls.deviation), zero=False),
        )

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures of any mode and size -> float32 (B, 3, height, width)."""
        return torch.from_numpy(np.stack([self._read(image) for image in images]))

    def _read(self, image: Image.Image) -> np.ndarray:
        image = image.convert("RGB")
        height, width = self._scaled(image.height, image.width)
        image = image.resize((width, height), self.resample)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        pixels = (np.asarray(image).astype(np.float64) * self.scale).astype(np.float32)
        normal = (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return normal.transpose(2, 0, 1)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if width <= height else (self.size, longer)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `SETTINGS` into a folder, which is made."""
        size = self.size if isinstance(self.size, tuple) else None
        said = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": self.size} if size is None else {"height": size[0], "width": size[1]},
            "crop_size": {"height": self.crop[0], "width": self.crop[1]},
            "resample": int(self.resample),
            "rescale_factor": self.scale,
            "image_mean": self.mean,
            "image_std": self.deviation,
            **dict.fromkeys(STEPS, True),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, SETTINGS).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_number(value: Any, *, zero: bool = True) -> bool:
    """Whether float32 pixels stay finite with it: it is `NUMBER`. `zero`: whether it may be within 1e-6 of 0."""
    return type(value) in (int, float) and abs(value) < 1e6 and (zero or abs(value) > 1e-6)


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_SIDE


def _height_and_width(name: str, value: Any, more: str = "") -> tuple[int, int]:
    sides = (value.get("height"), value.get("width")) if isinstance(value, dict) else ()
    if not sides or not all(map(_is_side, sides)):
        raise ValueError(
            f"{name} is {value!r}; it must be a number of pixels, 1 to {MOST_SIDE}, or an object with height and width{more}"
        )
    return sides


def _of_channels(name: str, values: Any, *, zero: bool = True) -> tuple[float, ...]:
    """Numbers for red, green and blue, or one for all; `zero`: see `_is_number`."""
    given = (values,) * 3 if _is_number(values) else values if isinstance(values, list | tuple) else ()
    if len(given) != 3 or not all(_is_number(value, zero=zero) for value in given):
        raise ValueError(f"{name} is {values!r}; it must be {NUMBER}{'' if zero else ' other than 0'}, or three")
    return tuple(map(float, given))
