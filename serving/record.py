"""Records of how pictures were made, with everything needed to make them again. Independent of file formats.

A record is a JSON object; docs/metadata.md explains its fields. Its ``inputs`` can be sent again unchanged.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL
import tokenizers
import torch
from PIL import features

import cascade
from cascade.images.metadata import read_description
from cascade.pipeline import Cascade
from cascade.plan import Sampling
from cascade.request import Request
from cascade.speeds import ALL_STEPS
from cascade.weights import COMPONENTS, ModelFolder
from cascade.weights.hashing import sha256

TEXTS = ("prompt", "negative_prompt")
# aspect_ratio is resolved into width and height; previews do not change the picture.
NOT_RECORDED = ("self", "aspect_ratio", "previews")
# Inputs that may be left out. The record has the values that the request used for them.
RESOLVED = (
    "num_images",
    "seed",
    "steps_prior",
    "steps_decoder",
    "guidance_scale_prior",
    "guidance_scale_decoder",
)
SIZE = ("width", "height")
# Inputs that are ignored without another input.
NEEDS = {
    "prompt_strength": "image",
    "ip_adapter_mode": "ip_adapter_images",
}


@dataclass(frozen=True)
class Lora:
    """An adapter that was added to the weights: name, sha256 of its file, scale."""

    name: str
    sha256: str
    scale: float


@dataclass(frozen=True)
class Embedding:
    """A textual-inversion embedding that a prompt names: the name in the prompt, and the sha256 of its file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """The model, device and software that made the pictures; the same for all pictures of a process.

    Attributes:
        model: name, and sha256 of the weights (`weights_digest`) if model.json lists the model's files.
        sampling: shift and rescale of the stages "prior" and "decoder", which no input sets.
        device: type ("cuda", "cpu" ...), name of a GPU, dtype of the networks, precision of their weights unless it is full,
            memory mode.
        versions: of this package, torch, tokenizers, Pillow and the libraries with which Pillow writes pictures.
    """

    model: Mapping[str, str]
    sampling: Mapping[str, Mapping[str, float]]
    device: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, loaded: Cascade, folder: ModelFolder) -> "Origin":
        """Describe a model and the folder that it was loaded from."""
        digest = weights_digest(folder)
        device = {"type": loaded.device.type}
        if loaded.device.type == "cuda":
            device["name"] = torch.cuda.get_device_name(loaded.device)
        device["dtype"] = str(loaded.prior.dtype).removeprefix("torch.")
        if loaded.precision != "full":
            device["precision"] = loaded.precision
        device["memory"] = loaded.runner.mode
        return cls(
            model={"name": folder.name} | ({"sha256": digest} if digest else {}),
            sampling={
                name: {"shift": stage.shift, "rescale": stage.rescale} for name, stage in loaded.defaults.items()
            },
            device=device,
            versions=versions(),
        )


@dataclass(frozen=True)
class Record:
    """How one picture was made.

    Attributes:
        inputs: the predictor's inputs by name, without files. An input that was left out has the value that was used.
        files: the files among the inputs, in order: {"input": name, "index": place in a list, "sha256": of its bytes}.
        sampler: of Stage C, such as "ddpm".
        origin: the model, device and software.
        edited: whether the picture is an altered input image, not a new picture.
        more_sampling: settings of the stages "prior" and "decoder" that are neither inputs nor in `Origin.sampling`.
        loras: adapters, in the order in which they were added.
        embeddings: those that the prompts name, in the order of their names.
        picture: {"index": place among the request's pictures, "seed": this picture's, "width", "height": pixels}.
        prompts_cut: characters to which longer prompts are cut in this record; None: all are whole.
    """

    inputs: Mapping[str, Any]
    files: Sequence[Mapping[str, Any]]
    sampler: str
    origin: Origin
    edited: bool
    more_sampling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    loras: Sequence[Lora] = ()
    embeddings: Sequence[Embedding] = ()
    picture: Mapping[str, int] = field(default_factory=dict)
    prompts_cut: int | None = None

    @classmethod
    def of(
        cls,
        request: Request,
        given: Mapping[str, Any],
        origin: Origin,
        sampling: Sampling,
        *,
        hashed: bool,
        loras: Sequence[Lora] = (),
        embeddings: Sequence[Embedding] = (),
    ) -> "Record":
        """The record of a request, for all its pictures.

        Args:
            request: with all values resolved.
            given: the predictor's inputs by name, files as paths.
            origin: the model, device and software.
            sampling: how its stages are sampled.
            hashed: whether to read the files and record their sha256.
            loras, embeddings: the request's.
        """
        return cls(
            inputs=resolved_inputs(request, given),
            files=tuple(described_files(given, hashed=hashed)),
            sampler=sampling.prior.sampler,
            origin=origin,
            edited=is_edited(request),
            more_sampling=more_sampling(sampling),
            loras=tuple(loras),
            embeddings=tuple(embeddings),
        )

    def of_picture(self, index: int, seed: int, width: int, height: int) -> "Record":
        """The record of one of the request's pictures. `width` and `height` are in pixels."""
        return replace(self, picture={"index": index, "seed": seed, "width": width, "height": height})

    def without_texts(self) -> "Record":
        """A copy without prompts and what they name, and without digests: anyone who has an image could recognise it by its
        digest."""
        files = [{name: value for name, value in file.items() if name != "sha256"} for file in self.files]
        inputs = {name: value for name, value in self.inputs.items() if name not in TEXTS}
        return replace(self, inputs=inputs, files=files, embeddings=())

    def with_prompts_cut(self, length: int) -> "Record":
        """A copy with at most `length` characters of each prompt."""
        cut = {name: self.inputs[name][:length] for name in TEXTS if name in self.inputs}
        return replace(self, inputs={**self.inputs, **cut}, prompts_cut=length)

    def to_json(self) -> str:
        """The record as JSON in ASCII."""
        return json.dumps(
            {
                "inputs": self.inputs,
                **({"files": self.files} if self.files else {}),
                **({"prompts_cut": self.prompts_cut} if self.prompts_cut else {}),
                "picture": self.picture,
                "model": self.origin.model,
                **({"loras": [asdict(lora) for lora in self.loras]} if self.loras else {}),
                **({"embeddings": [asdict(one) for one in self.embeddings]} if self.embeddings else {}),
                "sampling": {
                    "sampler": self.sampler,
                    **{
                        stage: {**values, **self.more_sampling.get(stage, {})}
                        for stage, values in self.origin.sampling.items()
                    },
                },
                "device": self.origin.device,
                "versions": self.origin.versions,
            }
        )


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a picture file, as `Record.to_json` wrote it; None if the file has none.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        found = json.loads(read_description(path))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("inputs"), dict) else None


def resolved_inputs(request: Request, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that make the request again, in their given order.

    Inputs that were left out have the value that was used. Files and ignored inputs are not included.
    """
    resolved = {name: getattr(request, name) for name in RESOLVED}
    # With upscale, width and height are not allowed.
    resolved |= dict.fromkeys(SIZE) if given.get("upscale") else {name: getattr(request, name) for name in SIZE}
    return {
        name: value
        for name, value in {**given, **resolved}.items()
        if name not in NOT_RECORDED
        and value is not None
        and value is not False
        and value not in ([], ())
        and not paths_of(value)
        and (name not in NEEDS or given.get(NEEDS[name]))
    }


def more_sampling(sampling: Sampling) -> dict[str, dict[str, Any]]:
    """The part of the steps that is guided, if not all are, and Stage B's sampler, if it is not Stage C's."""
    said: dict[str, dict[str, Any]] = {}
    if tuple(sampling.interval) != ALL_STEPS:
        said["prior"] = {"guidance_interval": list(sampling.interval)}
    if sampling.decoder.sampler != sampling.prior.sampler:
        said["decoder"] = {"sampler": sampling.decoder.sampler}
    return said


def paths_of(value: Any) -> list[Path]:
    """The files in an input's value; empty if it is neither a file nor a list of files."""
    values = value if isinstance(value, list | tuple) else [value]
    return [path for path in values if isinstance(path, Path)]


def described_files(given: Mapping[str, Any], *, hashed: bool) -> Iterator[dict[str, Any]]:
    """Describe the files among the inputs. With `hashed`, each has the sha256 of its received bytes."""
    for name, value in given.items():
        for index, path in enumerate(paths_of(value)):
            described = {"input": name, "index": index} if isinstance(value, list | tuple) else {"input": name}
            yield described | ({"sha256": sha256(path)} if hashed else {})


def is_edited(request: Request) -> bool:
    """Whether part of an input image stays: its pixels, its latents, or all of it if it is enlarged.

    Image prompts and edges only guide a new picture. At strength 1 without a mask, nothing of the image stays.
    """
    enlarged = any(control.kind == "super_resolution" for control in request.controls)
    kept = request.image is not None and (request.mask is not None or request.prompt_strength < 1)
    return enlarged or kept


def weights_digest(folder: ModelFolder) -> str | None:
    """One sha256 for all files of the model's components; None without a model.json.

    It is the sha256 of the lines "sha256  path" that sha256sum prints for these files, sorted by path. The checksums are
    those in model.json, so no weights are read.
    """
    lines = [
        f"{checksum}  {path}\n"
        for path, checksum in sorted(folder.checksums.items())
        if path.partition("/")[0] in COMPONENTS
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else None


def versions() -> dict[str, str]:
    """Versions of the software that computes and writes pictures."""
    found = {
        "cascade": cascade.__version__,
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "pillow": PIL.__version__,
    }
    for library in ("libjpeg_turbo", "webp", "zlib_ng", "zlib"):
        if version := features.version(library):
            found[library] = version
    return found
