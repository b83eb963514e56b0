"""Builds the task of a stage from the configuration, the data and the model folder."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

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

from cascade.networks.base import Network
from cascade.networks.controlnet import ControlNet
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.stage_a import StageA
from cascade.weights import NETWORKS, StageSettings
from training.agreement import new_values
from training.dataset import Dataset, Split
from training.errors import FILE_ERRORS, TrainingError, summary
from training.options import Options
from training.picture_folder import Pictures
from training.shapes import Shapes
from training.sources import Source, check_path, make_source
from training.stages import STAGES, advice, check_needs, maker
from training.task import Task
from training.tasks.controlnet import CONTROL_KINDS, new_controlnet
from training.tasks.ip_adapter import new_ip_adapter
from training.values import fits

# Trained as transformers' classes, which begin with CLIP's initial weights.
TRAINED = {
    **NETWORKS,
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
}


def load_component(model: Path, name: str) -> Any:
    """Loads a network (float32, on the CPU) or the tokenizer from a model folder. Never asks the Hub.

    Raises:
        TrainingError: it is missing or damaged.
    """
    folder = model / name
    if not folder.is_dir():
        raise TrainingError(f"{model} has no {name}: {advice([name])}.")
    try:
        if name == "tokenizer":
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        kind = TRAINED[name]
        own = {} if issubclass(kind, Network) else {"local_files_only": True, "use_safetensors": True}
        network = kind.from_pretrained(folder, **own).float()
    except FILE_ERRORS as error:
        raise TrainingError(
            f"{folder} cannot be read ({summary(error)}); remove it and run the stage {maker(name)} again."
        ) from error
    if name == "vqgan":
        set_scale(network, model)
    return network


def set_scale(vqgan: StageA, model: Path) -> None:
    """Puts a model folder's own scale of Stage A's latents, if ``model.json`` has one, into Stage A's configuration.

    The published configuration has another scale than the one that Stage B was trained with.

    Raises:
        TrainingError: ``model.json`` cannot be read, or its scale is no number above 0.
    """
    file = model / "model.json"
    if not file.is_file():
        return
    try:
        scale = json.loads(file.read_text(encoding="utf-8")).get("stage_a_scale")
    except (*FILE_ERRORS, AttributeError) as error:
        raise TrainingError(f"{file} cannot be read: {summary(error)}.") from error
    if scale is not None:
        if not (fits(scale, float) and scale > 0):
            raise TrainingError(f"{file} cannot be read: stage_a_scale is {scale!r}; it must be a number above 0.")
        vqgan.register_to_config(scale_factor=float(scale))


class Workshop:
    """Builds the tasks of one training.

    Args:
        config: the configuration's tables, already checked.
        data: a folder of captioned pictures, or a path that the configuration's source reads.
        output: the training's folder; ``model`` in it is the model folder.
        device: the training device.
    """

    def __init__(self, config: Mapping[str, Any], data: Path, output: Path, device: torch.device) -> None:
        self.config, self.data, self.output, self.device = config, data, output, device
        self.model = output / "model"
        self._sources: dict[str | None, Source] = {}

    def check_data(self) -> None:
        """Has the source check the data.

        Raises:
            TrainingError: something is missing or damaged.
        """
        self.source().check(self.output / "pictures-read")

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.data)

    def source(self, stage: str | None = None) -> Source:
        """The source of the data, the same at every call. Options in ``[stage.data]`` override those in ``[data]``.

        Raises:
            TrainingError: the data are missing, or ``--data`` is not a folder and ``[data]`` names no source.
        """
        if stage not in self._sources:
            self._sources[stage] = self._make_source(stage)
        return self._sources[stage]

    def _make_source(self, stage: str | None) -> Source:
        options = self.config["data"]
        if self.data.is_dir():
            return self.pictures
        check_path(self.data)
        if "source" not in options:
            raise TrainingError(
                f"{self.data} is not a folder of pictures, and [data] names no source that could read it."
            )
        changes = self.config[stage].get("data", {}) if stage else {}
        return make_source(options["source"], self.data, options | changes)

    @property
    def shapes(self) -> Shapes:
        """The sizes of the training pictures."""
        options = self.config["data"]
        others = tuple(tuple(size) for size in options.get("other_sizes", ()))
        return Shapes((options["size"],) * 2, others, options.get("other_sizes_every", Shapes.every))

    def dataset(self, split: Split, stage: str) -> Dataset:
        """The pictures of one split for a stage."""
        return self.source(stage).dataset(split, self.tokenizer, size=self.shapes.native, device=self.device)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return load_component(self.model, "tokenizer")

    def build(self, name: str, options: Options, *, resumes: bool) -> Task:
        """Builds the task of the stage ``name``, with initial weights from the seed of ``options``.

        Args:
            resumes: whether a checkpoint will provide all trained weights; then the model folder's are not read.

        Raises:
            TrainingError: a component that the stage needs, or the data, are missing or damaged.
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
        elif name == "ip_adapter":
            trained = [self.ip_adapter(needs, resumes)]
        elif stage.adapts:
            trained = []
            arguments["settings"] = StageSettings(**self.config["model"][stage.adapts])
        else:
            trained = [self.network(component, anew=stage.anew, resumes=resumes) for component in stage.trains]
        if stage.of_all_sizes:
            arguments["shapes"] = self.shapes
        self._check_vocabulary(*trained, *needs.values())
        arguments |= {"dataset": self.dataset("train", name), "unseen": self.dataset("heldout", name)}
        return stage.task(*trained, **needs, **arguments)

    def network(self, component: str, *, anew: bool = False, resumes: bool = False) -> nn.Module:
        """A component to be trained: the model folder's, or a new one with random weights and the configuration's sizes."""
        kind, folder = TRAINED[component], self.model / component
        if folder.is_dir() and not anew:
            return (self._empty(component) if resumes else load_component(self.model, component)).train()
        sizes = new_values(component, self.config)
        if component == "text_encoder":
            return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **self.tokens())).train()
        if component == "image_encoder":
            return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).train()
        return kind(**sizes).train()

    def controlnet(self, name: str, channels: int, needs: Mapping[str, Any], resumes: bool) -> ControlNet:
        """The ControlNet of the model folder, or a new one whose backbone is a copy of the semantic encoder's."""
        if (self.model / name).is_dir():
            return self.network(name, resumes=resumes)
        return new_controlnet(needs["prior"], needs["effnet"], channels, **self.config["controlnet"])

    def ip_adapter(self, needs: Mapping[str, Any], resumes: bool) -> IPAdapter:
        """The IP-Adapter of the model folder, or a new one with Stage C's own keys."""
        if (self.model / "ip_adapter").is_dir():
            return self.network("ip_adapter", resumes=resumes)
        return new_ip_adapter(needs["prior"], needs["image_encoder"], **self.config["ip_adapter_network"])

    def _empty(self, component: str) -> nn.Module:
        """A component with the model folder's sizes and random weights."""
        kind, folder = TRAINED[component], self.model / component
        try:
            if component in ("text_encoder", "image_encoder"):
                return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            network = kind.from_config(kind.load_config(folder))
        except FILE_ERRORS as error:
            raise TrainingError(f"{folder} cannot be read ({summary(error)}).") from error
        if component == "vqgan":
            set_scale(network, self.model)
        return network

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
                    f"{self.model}: the tokenizer has {len(self.tokenizer)} tokens, but the text_encoder only "
                    f"{network.config.vocab_size}; run the stage clip again."
                )
