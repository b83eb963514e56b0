"""Trains one stage from a configuration file: ``python -m training.run CONFIG STAGE --data DATA --output FOLDER``.

DATA is a folder of pictures, each with its caption in a text file of the same name, or the miniature's drawings. FOLDER gets
one sub-folder a stage (checkpoints, samples, TensorBoard logs, and at the end a file ``finished``) and ``model``, the model
folder that grows with every stage. Stages need what earlier ones made: tokenizer, then stage_a and clip in any order, vision,
semantic, stage_b, stage_c, previewer and the ControlNets. A component that ``model`` already has is trained further. Every
figure comes from the configuration; under ``accelerate launch -m training.run ...`` the same call runs on several processes.
"""

import argparse
import logging
import math
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from training.clip import ClipTask
from training.controlnet import CONTROL_KINDS, ControlNetTask, new_controlnet
from training.dataset import Dataset
from training.picture_folder import PictureFolder, captioned_pictures
from training.previewer import PreviewerTask
from training.scenes import Scenes, scene_captions
from training.semantic import SemanticTask
from training.shapes import Shapes
from training.stage_a import StageATask
from training.stage_b import StageBTask
from training.stage_c import StageCTask
from training.tokenizer import train_tokenizer
from training.trainer import Options, Task, fit
from training.vision import VisionTask

logger = logging.getLogger(__name__)

FINISHED = "finished"
CAPTIONS_FOR_TOKENIZER = 100_000


class Workshop:
    """The configuration, the data and the model folder of one training; builds new components and loads finished ones."""

    def __init__(self, config: dict[str, Any], data: Path, output: Path, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.model = output / "model"

    @property
    def shapes(self) -> Shapes:
        """The sizes of training pictures."""
        options = self.config["data"]
        return Shapes((options["size"],) * 2, tuple(tuple(size) for size in options.get("other_sizes", ())))

    def captions(self) -> list[str]:
        """Captions for the tokenizer to learn from."""
        if self.data.is_dir():
            return [caption for _, caption in captioned_pictures(self.data)]
        return scene_captions(self.data, CAPTIONS_FOR_TOKENIZER, seed=self.config["data"]["seed"])

    def dataset(self, split: Literal["train", "heldout"], stage: str) -> Dataset:
        """What is trained on (``train``), and what is only looked at (``heldout``: of scenes, unseen combinations).

        The configuration's table ``[stage.data]`` says in what a stage's data differ from ``[data]``.
        """
        options = self.config["data"] | self.config[stage].get("data", {})
        tokenizer = AutoTokenizer.from_pretrained(self.model / "tokenizer")
        if self.data.is_dir():
            return PictureFolder(self.data, tokenizer, size=self.shapes.native, split=split, device=self.device)
        count = options["scenes"] if split == "train" else options["unseen"]
        return Scenes(
            self.data,
            count,
            tokenizer,
            size=self.shapes.native,
            seed=options["seed"],
            split=split,
            device=self.device,
            unsaid=options.get("unsaid", 0.0),
        )

    def task(self, task: type[Task], stage: str, *networks: Any, **frozen: Any) -> Task:
        """``task`` with the datasets, and the arguments of the configuration's table ``[stage.task]``."""
        arguments = self.config[stage].get("task", {})
        data = {"dataset": self.dataset("train", stage), "unseen": self.dataset("heldout", stage)}
        return task(*networks, **frozen, **data, **arguments)

    def new(self, network: type, name: str) -> Any:
        """A diffusers-style network with the arguments of the configuration's table ``name``."""
        component = self.model / name.removesuffix("_network")
        if component.exists():
            return network.from_pretrained(component).float().train()
        return network(**self.config[name])

    def finished(self, network: type, name: str) -> Any:
        """A component that an earlier stage has written, on the training device, in float32."""
        return network.from_pretrained(self.model / name).to(self.device, torch.float32)

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
    return shop.task(StageATask, "stage_a", shop.new(StageA, "vqgan"))


def clip(shop: Workshop) -> Task:
    """Both towers of CLIP."""
    text = CLIPTextModelWithProjection(CLIPTextConfig(**shop.config["text_encoder"], **shop.tokens()))
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(**shop.config["image_encoder"]))
    return shop.task(ClipTask, "clip", text, image)


def vision(shop: Workshop) -> Task:
    """The vision tower alone; needs both towers."""
    return shop.task(
        VisionTask,
        "vision",
        shop.finished(CLIPVisionModelWithProjection, "image_encoder").train(),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
    )


def semantic(shop: Workshop) -> Task:
    """The semantic encoder with Stage B; needs Stage A and the text tower."""
    return shop.task(
        SemanticTask,
        "semantic",
        shop.new(StableCascadeUNet, "decoder"),
        shop.new(SemanticEncoder, "effnet"),
        shop.new(Previewer, "previewer_network"),
        vqgan=shop.finished(StageA, "vqgan"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
    )


def stage_b(shop: Workshop) -> Task:
    """Stage B by itself; needs Stage A, the semantic encoder and the text tower."""
    return shop.task(
        StageBTask,
        "stage_b",
        shop.new(StableCascadeUNet, "decoder"),
        effnet=shop.finished(SemanticEncoder, "effnet"),
        vqgan=shop.finished(StageA, "vqgan"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
        shapes=shop.shapes,
    )


def stage_c(shop: Workshop) -> Task:
    """Stage C; needs the semantic encoder, the previewer and both towers."""
    return shop.task(
        StageCTask,
        "stage_c",
        shop.new(StableCascadeUNet, "prior"),
        effnet=shop.finished(SemanticEncoder, "effnet"),
        previewer=shop.finished(Previewer, "previewer"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
        image_encoder=shop.finished(CLIPVisionModelWithProjection, "image_encoder"),
        shapes=shop.shapes,
    )


def previewer(shop: Workshop) -> Task:
    """The previewer for good; starts from the one that helped to train the semantic encoder."""
    return shop.task(
        PreviewerTask,
        "previewer",
        shop.finished(Previewer, "previewer"),
        effnet=shop.finished(SemanticEncoder, "effnet"),
    )


def controlnet(kind: str, shop: Workshop) -> Task:
    """A ControlNet of Stage C; starts from the semantic encoder's backbone."""
    name = f"controlnet_{kind}"
    prior = shop.finished(StableCascadeUNet, "prior")
    effnet = shop.finished(SemanticEncoder, "effnet")
    control = CONTROL_KINDS[kind](**shop.config[name].get("control", {}))
    if (shop.model / name).exists():
        network = ControlNet.from_pretrained(shop.model / name).float().train()
    else:
        network = new_controlnet(prior, effnet, control.channels, **shop.config["controlnet"])
    return shop.task(
        ControlNetTask,
        name,
        network,
        control=control,
        name=name,
        prior=prior,
        effnet=effnet,
        previewer=shop.finished(Previewer, "previewer"),
        text_encoder=shop.finished(CLIPTextModelWithProjection, "text_encoder"),
        image_encoder=shop.finished(CLIPVisionModelWithProjection, "image_encoder"),
        shapes=shop.shapes,
    )


STAGES: dict[str, Callable[[Workshop], Task]] = {
    "stage_a": stage_a,
    "clip": clip,
    "vision": vision,
    "semantic": semantic,
    "stage_b": stage_b,
    "stage_c": stage_c,
    "previewer": previewer,
    **{f"controlnet_{kind}": partial(controlnet, kind) for kind in CONTROL_KINDS},
}

ORDER = ("tokenizer", *STAGES)


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("stage", choices=ORDER)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder of pictures with captions, or the drawings that scripts/build-mini-data makes",
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
    # Without a GPU, accelerate puts several processes together only where it is told that this is meant.
    device = PartialState(cpu=not torch.cuda.is_available()).device
    shop = Workshop(config, options.data, options.output, device)
    folder = options.output / options.stage
    if options.stage == "tokenizer":
        tokenizer = train_tokenizer(shop.captions(), config["tokenizer"]["vocabulary"], shop.model / "tokenizer")
        logger.info("tokenizer: %d tokens", len(tokenizer))
        finished = True
    else:
        settings = Options(**config[options.stage]["options"])
        if options.steps:
            settings = replace(settings, steps=options.steps)
        task = STAGES[options.stage](shop)
        trained = sum(parameter.numel() for parameter in task.parameters())
        logger.info(
            "%s: %.2f M parameters, %d steps of %d", options.stage, trained / 1e6, settings.steps, settings.batch_size
        )
        finished = fit(task, settings, folder, shop.model, deadline=deadline)
    if finished:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FINISHED).touch()
    else:
        logger.info("%s: stopped at the time limit; call again to go on", options.stage)


if __name__ == "__main__":
    main()
