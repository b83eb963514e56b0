"""Trains one stage from a configuration file: ``python -m training.run CONFIG STAGE --data DATA --output FOLDER``.

FOLDER gets one sub-folder a stage (checkpoints, samples, TensorBoard logs) and ``model``, the model folder that grows with
every finished stage. Stages need what earlier ones made: tokenizer, then stage_a and clip in any order, stage_b, stage_c and
previewer. Every figure comes from the configuration; under ``accelerate launch -m training.run ...`` the same call runs
on several processes.
"""

import argparse
import logging
import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from training.clip import ClipTask
from training.previewer import PreviewerTask
from training.scenes import Scenes, training_captions
from training.stage_a import StageATask
from training.stage_b import StageBTask
from training.stage_c import StageCTask
from training.tokenizer import train_tokenizer
from training.trainer import Options, Task, fit

logger = logging.getLogger(__name__)
CAPTIONS_FOR_TOKENIZER = 100_000


class Workshop:
    """The configuration, the data and the model folder of one training; builds new components and loads finished ones."""

    def __init__(self, config: dict[str, Any], data: Path, output: Path, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.model = output / "model"

    def scenes(self, split: str) -> Scenes:
        """The training scenes (``train``) or those of combinations that training never shows (``heldout``)."""
        options = self.config["data"]
        count = options["scenes"] if split == "train" else options["unseen"]
        tokenizer = AutoTokenizer.from_pretrained(self.model / "tokenizer")
        return Scenes(
            self.data, count, tokenizer, size=options["size"], seed=options["seed"], split=split, device=self.device
        )

    def new(self, network: type, name: str) -> Any:
        """A diffusers-style network with the arguments of the configuration's table ``name``."""
        component = self.model / name.removesuffix("_network")
        if component.exists():
            return network.from_pretrained(component).train()
        return network(**self.config[name])

    def finished(self, network: type, name: str) -> Any:
        """A component that an earlier stage has written, on the training device, in float32."""
        return network.from_pretrained(self.model / name).to(self.device)

    def tokens(self) -> dict[str, int]:
        """The special tokens' ids and the vocabulary size, as CLIP's configurations name them."""
        tokenizer = AutoTokenizer.from_pretrained(self.model / "tokenizer")
        return {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }


def stage_a(shop: Workshop) -> Task:
    """Stage A, from pixels alone."""
    return StageATask(
        shop.new(StageA, "vqgan"), shop.scenes("train"), shop.scenes("heldout"), **shop.config["stage_a"]["task"]
    )


def clip(shop: Workshop) -> Task:
    """Both towers of CLIP."""
    text = CLIPTextModelWithProjection(CLIPTextConfig(**shop.config["text_encoder"], **shop.tokens()))
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(**shop.config["image_encoder"]))
    return ClipTask(text, image, shop.scenes("train"), shop.scenes("heldout"))


def stage_b(shop: Workshop) -> Task:
    """The semantic encoder and Stage B; needs Stage A and the text tower."""
    return StageBTask(
        shop.new(StableCascadeUNet, "decoder"),
        shop.new(SemanticEncoder, "effnet"),
        shop.new(Previewer, "previewer_network"),
        vqgan=shop.finished(StageA, "vqgan"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
        scenes=shop.scenes("train"),
        unseen=shop.scenes("heldout"),
        **shop.config["stage_b"]["task"],
    )


def stage_c(shop: Workshop) -> Task:
    """Stage C; needs the semantic encoder, the previewer and both towers."""
    return StageCTask(
        shop.new(StableCascadeUNet, "prior"),
        effnet=shop.finished(SemanticEncoder, "effnet"),
        previewer=shop.finished(Previewer, "previewer"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
        image_encoder=shop.finished(CLIPVisionModelWithProjection, "image_encoder"),
        scenes=shop.scenes("train"),
        unseen=shop.scenes("heldout"),
        **shop.config["stage_c"]["task"],
    )


def previewer(shop: Workshop) -> Task:
    """The previewer for good; starts from the one that helped to train the semantic encoder."""
    return PreviewerTask(
        shop.finished(Previewer, "previewer"),
        effnet=shop.finished(SemanticEncoder, "effnet"),
        scenes=shop.scenes("train"),
        unseen=shop.scenes("heldout"),
        **shop.config["previewer"]["task"],
    )


STAGES: dict[str, Callable[[Workshop], Task]] = {
    "stage_a": stage_a,
    "clip": clip,
    "stage_b": stage_b,
    "stage_c": stage_c,
    "previewer": previewer,
}


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("stage", choices=["tokenizer", *STAGES])
    parser.add_argument(
        "--data", type=Path, required=True, help="the packed drawings that scripts/build-mini-data writes"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="save and stop after this long; call again to go on"
    )
    parser.add_argument("--steps", type=int, help="instead of the configuration's steps")
    options = parser.parse_args(arguments)
    deadline = time.time() + 60 * options.minutes
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    config = tomllib.loads(options.config.read_text())
    shop = Workshop(config, options.data, options.output, PartialState().device)
    if options.stage == "tokenizer":
        captions = training_captions(options.data, CAPTIONS_FOR_TOKENIZER, seed=config["data"]["seed"])
        tokenizer = train_tokenizer(captions, config["tokenizer"]["vocabulary"], shop.model / "tokenizer")
        logger.info("tokenizer: %d tokens", len(tokenizer))
        return
    settings = Options(**config[options.stage]["options"])
    if options.steps:
        settings = replace(settings, steps=options.steps)
    task = STAGES[options.stage](shop)
    trained = sum(parameter.numel() for parameter in task.parameters())
    logger.info(
        "%s: %.2f M parameters, %d steps of %d", options.stage, trained / 1e6, settings.steps, settings.batch_size
    )
    finished = fit(task, settings, options.output / options.stage, shop.model, deadline=deadline)
    if not finished:
        logger.info("%s: stopped at the time limit; call again to go on", options.stage)


if __name__ == "__main__":
    main()
