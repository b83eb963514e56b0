"""The configuration, the data and the model folder of one training; builds what a stage trains."""

import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.networks.controlnet import ControlNet
from cascade.weights import NETWORKS
from miniature.dataset import Scenes, scene_captions
from training.agreement import table_of
from training.dataset import Dataset
from training.errors import FILE_ERRORS, TrainingError, summary
from training.options import Options
from training.picture_folder import Captioned, PictureFolder, captioned_pictures, check_pictures, split_pictures
from training.shapes import Shapes
from training.stages import STAGES, advice, check_needs, maker
from training.tasks.controlnet import CONTROL_KINDS, new_controlnet
from training.trainer import Task

CAPTIONS_FOR_TOKENIZER = 100_000


def load_component(model: Path, name: str) -> Any:
    """A network or the tokenizer of a model folder, float32 on the CPU; asks no hub.

    Raises:
        TrainingError: it is missing or damaged.
    """
    folder = model / name
    if not folder.is_dir():
        raise TrainingError(f"{model} has no {name}: {advice([name])}.")
    try:
        if name == "tokenizer":
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        return NETWORKS[name].from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
    except FILE_ERRORS as error:
        raise TrainingError(
            f"{folder} cannot be read ({summary(error)}); remove it, and run the stage {maker(name)} again."
        ) from error


class Workshop:
    """Builds the tasks of one training.

    Args:
        config: the configuration's tables, checked.
        data: a folder of pictures with captions, or the packed drawings.
        output: the training's folder; ``model`` in it is the model folder.
        device: where it trains.
    """

    def __init__(self, config: Mapping[str, Any], data: Path, output: Path, device: torch.device) -> None:
        self.config, self.data, self.output, self.device = config, data, output, device
        self.model = output / "model"

    def check_data(self) -> None:
        """Looks at all of a user's own pictures and captions, or whether the drawings are whole.

        Raises:
            TrainingError: something is missing or damaged.
        """
        if not self.data.exists():
            raise TrainingError(
                f"There is no {self.data}: --data is a folder of pictures with captions, or the file that "
                "scripts/build-mini-data makes."
            )
        if self.data.is_dir():
            check_pictures([file for file, _ in self.pictures], self.output / "pictures-read")
            return
        if not zipfile.is_zipfile(self.data):
            raise TrainingError(f"{self.data} is no whole zip file of drawings: scripts/build-mini-data makes one.")
        for name in ("scenes", "unseen", "seed"):
            if name not in self.config["data"]:
                raise TrainingError(f"[data] lacks {name}, which drawings need.")

    @cached_property
    def pictures(self) -> list[Captioned]:
        return captioned_pictures(self.data)

    @property
    def shapes(self) -> Shapes:
        """The sizes of training pictures."""
        options = self.config["data"]
        return Shapes((options["size"],) * 2, tuple(tuple(size) for size in options.get("other_sizes", ())))

    def captions(self) -> list[str]:
        """Captions for the tokenizer to learn from."""
        if self.data.is_dir():
            return [caption for _, caption in self.pictures]
        return scene_captions(self.data, CAPTIONS_FOR_TOKENIZER, seed=self.config["data"]["seed"])

    def dataset(self, split: Literal["train", "heldout"], stage: str) -> Dataset:
        """What is trained on (``train``), and what is only looked at (``heldout``: of scenes, unseen combinations).

        The configuration's table ``[stage.data]`` says in what a stage's data differ from ``[data]``.
        """
        options = self.config["data"] | self.config[stage].get("data", {})
        common = {"size": self.shapes.native, "device": self.device}
        if self.data.is_dir():
            return PictureFolder(split_pictures(self.pictures, split), self.tokenizer, **common)
        count = options["scenes"] if split == "train" else options["unseen"]
        return Scenes(
            self.data,
            count,
            self.tokenizer,
            seed=options["seed"],
            split=split,
            unsaid=options.get("unsaid", 0.0),
            **common,
        )

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return load_component(self.model, "tokenizer")

    def build(self, name: str, options: Options, *, resumes: bool) -> Task:
        """What the stage ``name`` trains, from the seed of ``options``.

        Args:
            resumes: a checkpoint will give all weights that are trained; those of the model folder are not read.

        Raises:
            TrainingError: an earlier stage's component is missing or damaged, or the data are.
        """
        stage = STAGES[name]
        check_needs(name, self.model)
        set_seed(options.seed)
        needs = {component: load_component(self.model, component).to(self.device) for component in stage.needs}
        arguments = dict(self.config[name].get("task", {}))
        if stage.control:
            control = CONTROL_KINDS[stage.control](**self.config[name].get("control", {}))
            arguments |= {"control": control, "name": name}
            trained = [self.controlnet(name, control.channels, needs, resumes)]
        else:
            trained = [self.network(component, anew=stage.anew, resumes=resumes) for component in stage.trains]
        if stage.of_all_sizes:
            arguments["shapes"] = self.shapes
        self._check_vocabulary(*trained, *needs.values())
        arguments |= {"dataset": self.dataset("train", name), "unseen": self.dataset("heldout", name)}
        return stage.task(*trained, **needs, **arguments)

    def network(self, component: str, *, anew: bool = False, resumes: bool = False) -> nn.Module:
        """A component to be trained: that of the model folder, or one of the configuration's sizes that knows nothing."""
        kind, folder = NETWORKS[component], self.model / component
        if folder.is_dir() and not anew:
            return (self._empty(component) if resumes else load_component(self.model, component)).train()
        sizes = self.config[table_of(component)]
        if component == "text_encoder":
            return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **self.tokens())).train()
        if component == "image_encoder":
            return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).train()
        return kind(**sizes).train()

    def controlnet(self, name: str, channels: int, needs: Mapping[str, Any], resumes: bool) -> ControlNet:
        """The ControlNet of the model folder, or one whose backbone is the semantic encoder's."""
        if (self.model / name).is_dir():
            return self.network(name, resumes=resumes)
        return new_controlnet(needs["prior"], needs["effnet"], channels, **self.config["controlnet"])

    def _empty(self, component: str) -> nn.Module:
        """A component of the model folder's sizes, with whatever weights."""
        kind, folder = NETWORKS[component], self.model / component
        try:
            if component in ("text_encoder", "image_encoder"):
                return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            return kind.from_config(kind.load_config(folder, local_files_only=True))
        except FILE_ERRORS as error:
            raise TrainingError(f"{folder} cannot be read ({summary(error)}).") from error

    def tokens(self) -> dict[str, int]:
        """The special tokens' ids and the vocabulary size, as CLIP's configurations name them."""
        return {
            "vocab_size": len(self.tokenizer),
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _check_vocabulary(self, *networks: nn.Module) -> None:
        for network in networks:
            if isinstance(network, CLIPTextModelWithProjection) and network.config.vocab_size < len(self.tokenizer):
                raise TrainingError(
                    f"{self.model}: the tokenizer has {len(self.tokenizer)} tokens, and the text_encoder knows "
                    f"{network.config.vocab_size}; run the stage clip again."
                )
