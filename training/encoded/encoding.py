"""Encodes pictures and captions once, with a model folder's networks, for training Stage C."""

import io
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.images.colours import PictureError
from cascade.images.decoding import PictureFile
from cascade.images.tensors import to_pixels
from cascade.sizes import Size
from cascade.stages.encoder import for_encoder
from cascade.weights import ModelFolder, WeightsError
from training.encoded.shards import EMPTY, shard_file, write_empty, write_shard
from training.encoded.sources import Picture, units_of
from training.errors import TrainingError, writing
from training.lora.words import Captions
from training.processes import start_processes
from training.shapes import bucket_size

logger = logging.getLogger(__name__)

NEEDED = ("effnet", "image_encoder", "feature_extractor", "text_encoder", "tokenizer")
# Pictures that are encoded at a time.
AT_ONCE = 16
# Pictures that are decoded at a time, by several threads.
DECODED = 64


@dataclass(frozen=True)
class Decoded:
    """A picture at the size at which it is trained on.

    Attributes:
        image: RGB.
        caption: its text.
        size: (height, width) in pixels.
    """

    image: Image.Image
    caption: str
    size: Size


def decode(picture: Picture, resolution: int) -> Decoded | str:
    """Decodes a picture, scaled and cropped to the size of its shape (`training.shapes.bucket_size`); or says what is
    wrong with it."""
    try:
        file = PictureFile(io.BytesIO(picture.content), picture.name)
        height, width = bucket_size(*file.size(), resolution)
        image = file.decode(needed=(width, height))
    except PictureError as error:
        return str(error)
    return Decoded(image, picture.caption, (height, width))


class Encoder:
    """The networks that encode.

    Args:
        weights: a model folder.
        device: where they run; on a GPU the CLIP towers are bfloat16.

    Attributes:
        native_size: the model's own size in pixels.

    Raises:
        TrainingError: the model folder lacks a network, or one is damaged.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.device = device
        lower = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            folder = ModelFolder.open(weights)
            folder.require(NEEDED)
            self.effnet = folder.load_component("effnet", device=device)
            self.images = ImagePromptEncoder(
                folder.load_component("feature_extractor"),
                folder.load_component("image_encoder", device=device, dtype=lower),
            )
            self.text_encoder = folder.load_component("text_encoder", device=device, dtype=lower)
            self.tokenizer = folder.load_component("tokenizer")
        except WeightsError as error:
            raise TrainingError(str(error)) from error
        self.native_size = folder.native_size

    @torch.no_grad()
    def texts(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """The hidden states (B, 77, D) and the pooled embeddings (B, 1, D) of captions, as prompts are encoded."""
        read = Captions(captions, self.tokenizer, self.text_encoder)
        made = read.encode(torch.arange(len(captions), device=self.device))
        return made.tokens, made.pooled

    @torch.no_grad()
    def encode(self, pictures: list[Decoded]) -> list[dict[str, Tensor]]:
        """What `shards.write_shard` writes of each picture; all have one size."""
        pixels = torch.cat([to_pixels(one.image, self.device) for one in pictures])
        tokens, pooled = self.texts([one.caption for one in pictures])
        parts = {
            "latents": self.effnet(for_encoder(pixels)),
            "image": self.images.encode([one.image for one in pictures]),
            "text": tokens,
            "pooled": pooled,
        }
        parts = {name: value.half().cpu() for name, value in parts.items()}
        return [{name: value[row] for name, value in parts.items()} for row in range(len(pictures))]

    def encode_all(
        self, pictures: Iterator[Picture], resolution: int
    ) -> tuple[dict[Size, list[dict[str, Tensor]]], list[str]]:
        """Encodes all pictures by size; and says what is wrong with those that cannot be decoded."""
        made: dict[Size, list[dict[str, Tensor]]] = {}
        waiting: dict[Size, list[Decoded]] = {}
        faults = []
        with ThreadPoolExecutor() as pool:
            while some := list(itertools.islice(pictures, DECODED)):
                for found in pool.map(decode, some, itertools.repeat(resolution)):
                    if isinstance(found, str):
                        faults.append(found)
                        continue
                    same = waiting.setdefault(found.size, [])
                    same.append(found)
                    if len(same) == AT_ONCE:
                        made.setdefault(found.size, []).extend(self.encode(waiting.pop(found.size)))
        for size, rest in waiting.items():
            made.setdefault(size, []).extend(self.encode(rest))
        return made, faults


def encode_pictures(source: Path, output: Path, weights: Path, resolution: int | None = None) -> None:
    """Encodes all pictures of a source. Units whose file is there are skipped.

    Several processes divide the units, and do not wait for each other.

    Args:
        source: see `sources.units_of`.
        output: gets a file for each unit, see `shards`.
        weights: the model folder whose networks encode.
        resolution: pictures get the area of a square with this side, in pixels; None: the model's own.

    Raises:
        TrainingError: the source or the model folder is wrong, or a file cannot be written.
    """
    state = start_processes()
    units = units_of(source)
    encoder = Encoder(weights, state.device)
    resolution = resolution or encoder.native_size
    own = units[state.process_index :: state.num_processes]
    if state.is_main_process and not (output / EMPTY).is_file():
        (text,), (pooled,) = encoder.texts([""])
        with writing(output):
            write_empty(output, text, pooled)
    for unit in tqdm(own, desc="encoding", unit="unit", disable=not state.is_main_process):
        file = shard_file(output, unit.name)
        if file.is_file():
            continue
        made, faults = encoder.encode_all(unit.pictures(), resolution)
        with writing(file):
            write_shard(file, made)
        if faults:
            logger.warning("%s: pictures left out: %d; the first: %s", unit.name, len(faults), faults[0])
