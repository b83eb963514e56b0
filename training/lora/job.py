"""One training on a server: from a zip to a tar."""

import io
import json
import logging
import tarfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from cascade import Cascade, Lora, Request
from training.errors import TrainingError, writing
from training.interruption import Stopped
from training.lora.file import FILE
from training.lora.pictures import captioned_pictures, find_pictures
from training.lora.run import SETTINGS, train_lora
from training.lora.settings import Recipe

logger = logging.getLogger(__name__)

TAR = "lora.tar"


def run_job(
    weights: Path,
    pictures: Path,
    folder: Path,
    recipe: Recipe,
    *,
    seconds: float | None = None,
    prompt: str = "",
    name: str | None = None,
) -> Path:
    """Trains a LoRA, and makes a picture without it and one with it.

    Args:
        weights: the model folder.
        pictures: a zip, or a folder.
        folder: an empty folder for all files. The caller removes it.
        recipe: the settings of the training.
        seconds: time limit, after which training stops and the LoRA so far is returned; None: no limit.
        prompt: of the two pictures; "": the first caption.
        name: the zip's name in errors; None: its file's name.

    Returns:
        A tar of lora.safetensors, settings.json, before.webp and after.webp.

    Raises:
        TrainingError: see `training.lora.run.train_lora`.
    """
    began = time.time()
    deadline = float("inf") if seconds is None else began + seconds
    output = folder / "output"
    found = find_pictures(pictures, folder / "pictures", name)
    try:
        finished = train_lora(weights, found, output, recipe, deadline=deadline)
    except Stopped as stopped:
        raise TrainingError(f"The server is being stopped; the training ended after step {stopped.step}.") from None
    finally:
        # The next training may have another precision, which accelerate's global state would forbid.
        AcceleratorState._reset_state(reset_partial_state=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not finished:
        logger.info("The time is up; this is the LoRA so far.")
    settings = recipe.lora
    if not prompt:
        resolution = settings.resolution or 1024  # only captions are wanted
        how = {"caption": settings.caption, "prefix": settings.caption_prefix, "word": settings.word}
        prompt = captioned_pictures(found, resolution, **how)[0].caption
    before, after = _before_and_after(weights, output / FILE, prompt, recipe.options.seed)
    tables = {**json.loads((output / SETTINGS).read_text("utf-8")), "finished": finished, "prompt": prompt}
    target = folder / TAR
    with writing(target), tarfile.open(target, "w") as archive:
        archive.add(output / FILE, FILE)
        _add(archive, SETTINGS, json.dumps(tables, indent=2).encode())
        for name, picture in (("before.webp", before), ("after.webp", after)):
            content = io.BytesIO()
            picture.save(content, "webp", quality=90)
            _add(archive, name, content.getvalue())
    return target


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(content), int(time.time())
    archive.addfile(member, io.BytesIO(content))


def _before_and_after(weights: Path, file: Path, prompt: str, seed: int) -> tuple[Image.Image, Image.Image]:
    cascade = Cascade.load(weights)
    # Without the LoRA, its word is ordinary text.
    pictures = [cascade.generate(Request(prompt, seed=seed, loras=loras))[0] for loras in ((), (Lora(file),))]
    return pictures[0], pictures[1]
