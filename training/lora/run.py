"""One training of a LoRA, from the model and the pictures to the file."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn

from cascade.networks.previewer import Previewer
from cascade.networks.unet import StableCascadeUNet
from cascade.prompts.text import TextEmbeddings
from cascade.weights import ModelFolder, WeightsError
from training.errors import TrainingError, writing
from training.files import whole_file
from training.lora.adapters import adapted_layers, add_lora, linear_layers
from training.lora.data import Latents, Texts, sample_latents
from training.lora.file import FILE, metadata_of, tensors_of, write_lora
from training.lora.pictures import Captioned, captioned_pictures
from training.lora.settings import Recipe
from training.lora.words import Captions, first_vectors
from training.processes import start_processes
from training.tasks.lora import LoraTask
from training.trainer import fit
from training.weights.checkpoint import has_checkpoint

logger = logging.getLogger(__name__)

STATE = "training"
SETTINGS = "settings.json"


def train_lora(
    weights: Path, pictures: Path, output: Path, recipe: Recipe, *, lite: bool = False, deadline: float = math.inf
) -> bool:
    """Trains a LoRA, or continues a training that was stopped.

    Args:
        weights: the model folder.
        pictures: a folder of pictures.
        output: gets `FILE`, the recipe as `SETTINGS`, and in `STATE` checkpoints, samples and logs.
        recipe: the settings of the training.
        lite: of the published repositories, whether the smaller Stage C is taken.
        deadline: wall-clock time (`time.time`) at which to save and stop.

    Returns:
        Whether the last step was reached. The file is there in both cases.

    Raises:
        TrainingError: the pictures, a setting or the model folder is wrong, or a file cannot be written.
        training.interruption.Stopped: Ctrl-C or SIGTERM came; a checkpoint has been saved.
    """
    began = time.time()
    state = start_processes()
    resolution = recipe.lora.resolution
    try:
        folder = ModelFolder.open(weights, lite=("prior",) if lite else ())
        folder.require(("prior", "text_encoder", "tokenizer", "effnet"))
        recipe = dataclasses.replace(
            recipe, lora=dataclasses.replace(recipe.lora, resolution=resolution or folder.native_size)
        )
        task = _Preparation(folder, recipe, output, state).task(pictures)
    except WeightsError as error:
        raise TrainingError(str(error)) from error
    if state.device.type == "cuda":
        torch.cuda.empty_cache()  # frees networks that are no longer needed
    if state.is_main_process:
        with writing(output), whole_file(output / SETTINGS) as part:
            part.write_text(json.dumps(recipe.as_tables(), indent=2) + "\n", encoding="utf-8")
    options = dataclasses.replace(recipe.options, compile=False)
    return fit(task, options, output / STATE, output, deadline=deadline, began=began)


class _Preparation:
    """The work before the first step."""

    def __init__(self, folder: ModelFolder, recipe: Recipe, output: Path, state: PartialState) -> None:
        self.folder, self.recipe, self.settings, self.output = folder, recipe, recipe.lora, output
        self.device, self.processes = state.device, state.num_processes
        on_gpu = self.device.type == "cuda"
        precision = recipe.options.precision
        if precision == "fp16":
            raise TrainingError("[options] precision is 'fp16'; LoRAs are trained in 'bf16' or 'no'.")
        self.dtype = torch.bfloat16 if on_gpu and precision == "bf16" else torch.float32

    def _load(self, component: str, dtype: torch.dtype | None = None) -> Any:
        return self.folder.load_component(component, device=self.device, dtype=dtype or self.dtype)

    def task(self, pictures: Path) -> LoraTask:
        settings = self.settings
        found = captioned_pictures(
            pictures,
            settings.resolution,
            caption=settings.caption,
            prefix=settings.caption_prefix,
            word=settings.word,
        )
        latents = self._encode(found)
        set_seed(self.recipe.options.seed)
        prior, encoder, tokenizer = (self._load(name) for name in ("prior", "text_encoder", "tokenizer"))
        prior.use_kernels("plain")
        texts = [*(one.caption for one in found), *settings.preserve, *settings.samples, ""]
        new = settings.word if settings.learns_a_word else ""
        captions = Captions(texts, tokenizer, encoder, new, settings.vectors)
        if captions.cut:
            logger.warning("%d captions have over 75 tokens; what comes after is left out.", captions.cut)
        sampled = len(found) + len(settings.preserve)
        preserved = self._preserved(prior, captions, range(len(found), sampled)) if settings.preserve else None
        networks = {"prior": prior, "text_encoder": encoder} if settings.text_encoder_rank else {"prior": prior}
        trained = self._adapted(networks)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
        word = None
        if new:
            vectors = first_vectors(settings.begins_from, settings.vectors, tokenizer, encoder)
            word = trained["word"] = nn.Parameter(vectors)
        compiled_by = self._set_up_layers(prior)
        text = Texts(
            len(captions),
            lambda rows: captions.encode(rows, word),
            self.device,
            changing=settings.trains_text,
        )
        self._log(found, latents, preserved, trained)
        return LoraTask(
            prior,
            trained,
            text=text,
            latents=latents,
            preserved=preserved,
            preserve_share=settings.preserve_share,
            caption_dropout=settings.caption_dropout,
            samples=range(sampled, len(texts) - 1),
            resolution=settings.resolution,
            settings=self.folder.sampler["prior"],
            previewer=self._previewer(),
            write=lambda folder: self._write(folder, networks, {} if word is None else {new: word}),
            modes=[encoder] if settings.text_encoder_rank else [],
            compiled_by=compiled_by,
        )

    def _encode(self, found: list[Captioned]) -> Latents:
        """Encodes with the semantic encoder, whose memory is freed afterwards."""
        effnet = self._load("effnet", torch.float32)
        return Latents.of_pictures(found, effnet, self.device)

    def _preserved(self, prior: nn.Module, captions: Captions, prompts: Sequence[int]) -> Latents:
        """The base model's own pictures of these rows of the captions, for prior preservation."""
        settings, count = self.settings, self.settings.preserve_pictures
        rows = torch.tensor([*prompts, len(captions) - 1], device=self.device)
        with torch.no_grad():
            tokens, pooled, *_ = captions.encode(rows)  # each prompt once
        turn = torch.arange(count, device=self.device) % len(prompts)
        made = sample_latents(
            prior,
            TextEmbeddings(tokens[turn], pooled[turn]),
            TextEmbeddings(tokens[-1:], pooled[-1:]),
            resolution=settings.resolution,
            settings=self.folder.sampler["prior"],
            seeds=range(self.recipe.options.seed, self.recipe.options.seed + count),
        )
        return Latents([(made, rows[turn])])

    def _adapted(self, networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
        """Gives the networks LoRAs; their parameters by name."""
        settings, trained = self.settings, {}
        for network, targets, rank in (
            ("prior", settings.targets, settings.rank),
            ("text_encoder", ("text_encoder",), settings.text_encoder_rank),
        ):
            if network in networks:
                layers = linear_layers(networks[network], targets)
                alpha = rank if settings.alpha is None else settings.alpha
                made = add_lora(networks[network], layers, rank=rank, alpha=alpha, dropout=settings.dropout)
                trained |= {f"{network}.{name}": value for name, value in made.items()}
        return trained

    def _set_up_layers(self, prior: StableCascadeUNet) -> str | None:
        """Turns on gradient checkpointing and compiling, if the settings say so; returns the setting that compiled blocks."""
        if self.settings.gradient_checkpointing:
            prior.enable_gradient_checkpointing()
        if not self.settings.compile_blocks or self.device.type != "cuda":
            return None
        for block in prior.blocks():
            block.compile()
        return "compile_blocks"

    def _previewer(self) -> Previewer | None:
        """Turns samples into pictures; None if there are no samples, or the model has no previewer."""
        if not self.settings.samples:
            return None
        if "previewer" not in self.folder:
            logger.warning("%s has no previewer, so there are no samples.", self.folder.root)
            return None
        return self._load("previewer", torch.float32)

    def _log(
        self,
        found: Sequence[Captioned],
        latents: Latents,
        preserved: Latents | None,
        trained: Mapping[str, nn.Parameter],
    ) -> None:
        settings, options = self.settings, self.recipe.options
        logger.info(
            "LoRA of rank %d: %.2f M parameters, %d steps of %d, on %d pictures of %d sizes%s.",
            settings.rank,
            sum(value.numel() for value in trained.values()) / 1e6,
            options.steps,
            options.samples(self.processes),
            len(found),
            len(latents.groups),
            f", and {len(preserved)} of the model's own, of {len(settings.preserve)} prompts" if preserved else "",
        )
        if has_checkpoint(self.output / STATE):
            logger.info("%s has a checkpoint, which is continued.", self.output)

    def _write(self, folder: Path, networks: dict[str, nn.Module], words: dict[str, Tensor]) -> None:
        settings = self.settings
        adapted = {name: adapted_layers(network) for name, network in networks.items()}
        tensors = tensors_of(adapted, words, getattr(torch, settings.number))
        metadata = metadata_of(
            tensors,
            title=settings.title or self.output.absolute().name,
            resolution=settings.resolution,
            rank=settings.rank,
            alpha=settings.rank if settings.alpha is None else settings.alpha,
            word=settings.word,
            model=self.folder.name,
        )
        try:
            write_lora(folder / FILE, tensors, metadata)
        except ValueError as error:
            raise TrainingError(f"{self.output / FILE} cannot be written: {error}.") from error
