"""A request becomes a `Plan`: all that it leaves open is decided, and nothing has been computed yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cascade import sizes
from cascade.guides.controls import Control
from cascade.guides.inpainting import read_mask
from cascade.guides.ip_adapter import Reference
from cascade.limits import MODELS_OWN, InputError, counted, shown
from cascade.loras.lora import Lora
from cascade.networks.controlnet import PUBLISHED_WIDTH
from cascade.request import Request
from cascade.speeds import ALL_STEPS, SPEEDS
from cascade.stages.prior import steps_taken
from cascade.stages.tiles import Tiles
from cascade.weights import DISTILLED, StageSettings

# Attributes in which the requests of one batch may differ.
OWN = ("prompt", "negative_prompt", "seed", "num_images")
ALIKE = tuple(name for one in fields(Request) if (name := one.name) not in OWN)

# The widths of the published Stage C, full and lite, which the published encoders and the previewer fit.
PUBLISHED_WIDTHS = (PUBLISHED_WIDTH, 1536)


class Sampling(NamedTuple):
    """How the stages of a request are sampled.

    Attributes:
        prior, decoder: the settings of Stages C and B.
        interval: the part of Stage C's steps that is guided, see `Request.guidance_interval`.
    """

    prior: StageSettings
    decoder: StageSettings
    interval: tuple[float, float] = ALL_STEPS

    def __str__(self) -> str:
        """For the log, as in "Stage C 10 steps of ddim with guidance 4; Stage B 5 steps of ddpm without guidance"."""
        said = (_said("C", self.prior, self.interval), _said("B", self.decoder, ALL_STEPS))
        return "; ".join(said)


def _said(stage: str, settings: StageSettings, interval: tuple[float, float]) -> str:
    steps = f"Stage {stage} {counted(settings.steps, 'step')} of {settings.sampler}"
    if settings.guidance <= 1:
        return f"{steps} without guidance"
    of_all = "" if interval == ALL_STEPS else f" from {interval[0]:g} to {interval[1]:g} of the steps"
    return f"{steps} with guidance {settings.guidance:g}{of_all}"


@dataclass(frozen=True, eq=False)
class Plan:
    """Requests, checked against the model, with all decided that they leave open.

    Attributes:
        requests: one, or several that differ in `OWN` alone.
        size: (height, width) of the pictures.
        semantic_size, decoder_size: (h, w) of the latents of Stages C and B.
        tiles: in which Stage B makes the pictures, one at a time; None: it makes them as a whole.
        canvas: (height, width) that is cut out of what Stage A makes.
        prior, decoder, interval: how the stages are sampled, see `Sampling`.
        loras: those of the request, and the distilled weights that its speed needs.
        strength: how much of the start image is changed, 0 to 1; 1 without one.
        mask: bool (height, width), the part of the start image that is repainted; None: all.
        controls: those of the request, and the one that a mask adds.
        references: those of the request that have a scale above 0.
    """

    requests: tuple[Request, ...]
    size: sizes.Size
    semantic_size: sizes.Size
    decoder_size: sizes.Size
    tiles: Tiles | None
    canvas: sizes.Size
    prior: StageSettings
    decoder: StageSettings
    interval: tuple[float, float]
    loras: tuple[Lora, ...]
    strength: float
    mask: np.ndarray | None
    controls: tuple[Control, ...]
    references: tuple[Reference, ...]

    @property
    def request(self) -> Request:
        """The first of the requests, which are equal in all but prompts, seeds and numbers of pictures."""
        return self.requests[0]

    @cached_property
    def pictures(self) -> list[tuple[int, int]]:
        """For each picture: the place of its request in `requests`, and its seed."""
        return [
            (place, request.seed + i) for place, request in enumerate(self.requests) for i in range(request.num_images)
        ]

    @property
    def steps(self) -> int:
        """Of both stages, for each batch."""
        return self.decoder.steps + (steps_taken(self.prior.steps, self.strength) if self.strength else 0)

    @property
    def decoder_halves(self) -> int:
        """How many samples Stage B gets for each picture: 2 with guidance."""
        return 2 if self.decoder.guidance > 1 else 1

    @property
    def guided(self) -> bool:
        """Whether any stage uses the negative prompt."""
        return max(self.prior.guidance, self.decoder.guidance) > 1


@dataclass(frozen=True)
class Planner:
    """Plans requests for one model.

    Attributes:
        defaults: the settings of the stages "prior" and "decoder" where a request leaves them open.
        native_size: pixels, the edge of the square that is made when a request names no size.
        width: channels of Stage C's finest level, by which published networks are told from others.
        image_encoder, effnet, previewer: whether the model has them.
        controlnets: by kind, the width of the Stage C that the ControlNet was trained with.
        distilled: the file of the adapter for the speed "turbo"; None: there is none.
    """

    defaults: Mapping[str, StageSettings]
    native_size: int
    width: int
    image_encoder: bool
    effnet: bool
    previewer: bool
    controlnets: Mapping[str, int]
    distilled: Path | None = None

    def plan(self, requests: tuple[Request, ...]) -> Plan:
        """Decide what requests leave open.

        Args:
            requests: at least one; several differ in `OWN` alone.

        Raises:
            ValueError: this model lacks a network that the request needs.
        """
        request = requests[0]
        height, width = size = self.picture_size(request)
        controls = self._controls(request)
        self.check_networks(request, controls, size)
        semantic_size, decoder_size, canvas = self.latent_sizes(size, request.compression)
        return Plan(
            requests=requests,
            size=size,
            semantic_size=semantic_size,
            decoder_size=decoder_size,
            tiles=None if sizes.is_whole(*size) else Tiles(*decoder_size),
            canvas=canvas,
            **self.sampling(request)._asdict(),
            loras=self.loras(request),
            strength=1.0 if request.image is None else request.prompt_strength,
            mask=None if request.mask is None else read_mask(request.mask, width, height),
            controls=controls,
            references=tuple(one for one in request.references if one.scale > 0),
        )

    def picture_size(self, request: Request) -> sizes.Size:
        """(height, width) of the pictures of a request."""
        image = request.image
        if image is None:
            return request.height or self.native_size, request.width or self.native_size
        if request.mask is not None:
            return image.height, image.width
        return sizes.fitted_size(image.height, image.width, self.native_size, request.height, request.width)

    def latent_sizes(
        self, size: sizes.Size, compression: float = sizes.SEMANTIC_PIXELS
    ) -> tuple[sizes.Size, sizes.Size, sizes.Size]:
        """The sizes of Stage C's latents, of Stage B's, and of the part that is cut out of Stage A's pixels."""
        native = sizes.native_size(*size)
        return sizes.semantic_size(*native, compression), sizes.decoder_size(*native), size

    def sampling(self, request: Request) -> Sampling:
        """How the stages are sampled: as the request says, else as its speed says, else as the model folder says.

        A speed never adds steps.
        """
        speed = SPEEDS[request.speed]
        return Sampling(
            self._settings("prior", speed.prior, request.steps_prior, request.guidance_scale_prior, request.sampler),
            self._settings(
                "decoder", speed.decoder, request.steps_decoder, request.guidance_scale_decoder, request.sampler
            ),
            request.guidance_interval or speed.interval,
        )

    def _settings(
        self, stage: str, speed: Mapping[str, Any], steps: int | None, guidance: float | None, sampler: str
    ) -> StageSettings:
        own = self.defaults[stage]
        if "steps" in speed:
            speed = {**speed, "steps": min(speed["steps"], own.steps)}
        asked = {"steps": steps, "guidance": guidance, "sampler": None if sampler == MODELS_OWN else sampler}
        return replace(own, **speed | {name: value for name, value in asked.items() if value is not None})

    def resolved(self, request: Request) -> Request:
        """The request with the steps and guidance that it leaves open.

        Raises:
            InputError: this model lacks the weights that its speed needs.
        """
        self.loras(request)
        prior, decoder, _ = self.sampling(request)
        return replace(
            request,
            steps_prior=prior.steps,
            steps_decoder=decoder.steps,
            guidance_scale_prior=prior.guidance,
            guidance_scale_decoder=decoder.guidance,
        )

    def loras(self, request: Request) -> tuple[Lora, ...]:
        """Those of the request, and the distilled weights that its speed needs.

        Raises:
            InputError: there are none.
        """
        if not SPEEDS[request.speed].distilled:
            return tuple(request.loras)
        if self.distilled is None:
            raise InputError(
                f"speed is {request.speed!r}, which needs distilled weights in the model folder ({DISTILLED}); this model "
                "has none."
            )
        return (*request.loras, Lora(self.distilled))

    def check_networks(self, request: Request, controls: Sequence[Control], size: sizes.Size) -> None:
        """Make sure that this model has the networks that a request needs.

        Raises:
            ValueError: it lacks one.
        """
        if request.image_prompts and not self.image_encoder:
            raise self._missing("image encoder, which image prompts need", "image-encoder")
        if request.image is not None:
            self.check_encoder()
        for control in controls:
            self._check_control(control.kind, *size)

    def check_encoder(self) -> None:
        """Make sure that this model can read images.

        Raises:
            ValueError: it has no semantic encoder.
        """
        if not self.effnet:
            raise self._missing("semantic encoder, which reads images", "effnet")

    def check_previewer(self) -> None:
        """Make sure that this model can make previews.

        Raises:
            ValueError: it has no previewer.
        """
        if not self.previewer:
            raise self._missing("previewer, which previews need", "previewer")

    def _controls(self, request: Request) -> tuple[Control, ...]:
        """Those of the request; with a mask, the inpainting ControlNet too, if there is one."""
        controls = request.controls
        if request.mask is None or any(one.kind == "inpainting" for one in controls) or not self._fits("inpainting"):
            return tuple(controls)
        return (*controls, Control("inpainting", request.image))

    def _check_control(self, kind: str, height: int, width: int) -> None:
        if kind not in self.controlnets:
            what = "upscale and controls" if kind == "super_resolution" else "controls"
            raise self._missing(
                f"controlnet_{kind}, which {what} of the kind {kind!r} need",
                "controlnet",
                trainable=kind != "super_resolution",
            )
        if not self._fits(kind):
            raise ValueError(
                f"controlnet_{kind} was trained with a Stage C of width {self.controlnets[kind]}; "
                f"this model's has {self.width}."
            )
        if kind == "super_resolution":
            self.check_encoder()
            smallest = 2 * sizes.SMALLEST
            if min(height, width) <= smallest - 2:
                raise ValueError(
                    f"The picture has {width}x{height} pixels; with a control of the kind {kind!r}, it must have at "
                    f"least {smallest}x{smallest}."
                )

    def _fits(self, kind: str) -> bool:
        """Whether there is a ControlNet for this Stage C: the published ones don't fit the lite one."""
        return self.controlnets.get(kind) == self.width

    def _missing(self, what: str, download: str, *, trainable: bool = True) -> ValueError:
        """This model lacks something, and where it comes from. Published networks fit the published Stage C only.

        Args:
            what: what it lacks, and for what that is needed.
            download: its name for scripts/download-weights.
            trainable: whether this repository trains it.
        """
        if self.width in ((PUBLISHED_WIDTH,) if download == "controlnet" else PUBLISHED_WIDTHS):
            advice = f"scripts/download-weights --only --with {download}, then scripts/save-weights, add it"
        else:
            training = "but docs/training.md says how to train one" if trainable else "and none can be trained here"
            advice = f"none was published for a Stage C of width {self.width}, {training}"
        return ValueError(f"This model has no {what}; {advice}.")


def check_request(name: str, request: object) -> None:
    """Make sure that something is a `Request`.

    Raises:
        InputError: it is not.
    """
    if not isinstance(request, Request):
        raise InputError(f"{name} is {shown(request)}; it must be a Request, such as Request('a cat').")


def check_alike(requests: Sequence[Request]) -> None:
    """Make sure that requests can be made together.

    Raises:
        InputError: names the request that cannot, and the first attribute by which.
    """
    for place, request in enumerate(requests):
        check_request(f"requests[{place}]", request)
        for name in ALIKE:
            value, first = getattr(request, name), getattr(requests[0], name)
            if value is not first and value != first:
                other = "another" if shown(value) == shown(first) else shown(first)
                raise InputError(
                    f"requests[{place}].{name} is {shown(value)}, but requests[0].{name} is {other}; "
                    f"requests of a batch may differ in {', '.join(OWN[:-1])} and {OWN[-1]} only."
                )
