"""The whole of Stable Cascade: a `Request` in, pictures out.

Knows which stage follows which, with which settings; not how a stage works, where files lie or who asks.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from os import PathLike
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cascade import kernels, sizes
from cascade.conditioning import Conditioner
from cascade.controls import Control, canny, inpainting
from cascade.decoder import decode_pixels, decoder_steps, decoding_bytes, encode_pixels, for_encoder, tile_within
from cascade.graphs import GraphedUNet, Recorder
from cascade.images.colours import to_rgb
from cascade.inpainting import latents_of, read_mask, set_into
from cascade.limits import MOST_CHUNKS, InputError, shown
from cascade.memory import ALWAYS, GIB, Arena, Choice, Resident, UNet, available, choose, usable
from cascade.networks.controlnet import PUBLISHED_WIDTH, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.packing import Packed
from cascade.prior import Residuals, prior_steps, steps_taken
from cascade.prompts.embeddings import Embeddings
from cascade.prompts.text import TextEmbeddings, joined, repeated
from cascade.request import Request
from cascade.running.device import choose_device, current, within
from cascade.running.errors import is_out_of_memory
from cascade.running.retry import Allowance, Allowances, in_parts
from cascade.sampling import DIFFUSERS_SAMPLER, Noise, Step, finish
from cascade.warm_up import warm_up
from cascade.weights import CONTROLNETS, NEEDED, NETWORKS, ModelFolder, StageSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In what requests of one batch may differ, and in what not.
OWN = ("prompt", "negative_prompt", "seed", "num_images")
ALIKE = tuple(name for one in fields(Request) if (name := one.name) not in OWN)

# The widths of the published Stage C, full and lite, which the published encoders and the previewer belong to.
PUBLISHED_WIDTHS = (PUBLISHED_WIDTH, 1536)


@dataclass(frozen=True)
class Numerics:
    """In what the authors' pipeline and the one frozen in diffusers differ. The presets are in `NUMERICS`.

    Attributes:
        shift, rescale: of both stages; None: as the model folder says (published: 2 in Stage C, 1 in Stage B; 0.7).
        decoder_guidance: of Stage B unless the request says otherwise; None: as the model folder says (1.1).
        sampler: None: the request's; "diffusers" tells the networks the raw time and adds no noise in the last step.
        stage_a_scale: whether Stage A's scale is the model folder's; otherwise it is that of its configuration, which in
            the published one is wrong.
        size_from_semantic: Stage B's latents are 10.67 times the semantic ones, and pictures as large as that makes
            them. Otherwise they are a quarter of the picture, and pictures as large as asked.
        start_shift: at which an image to begin with is noised; None: the shift of Stage C.
    """

    shift: float | None = None
    rescale: float | None = None
    decoder_guidance: float | None = None
    sampler: str | None = None
    stage_a_scale: bool = True
    size_from_semantic: bool = False
    start_shift: float | None = None


NUMERICS = {
    "official": Numerics(),
    # The authors' notebook for image-to-image noises at shift 1 what it samples at 2.
    "notebook": Numerics(start_shift=1.0),
    "diffusers": Numerics(
        shift=1.0,
        rescale=0.0,
        decoder_guidance=0.0,
        sampler=DIFFUSERS_SAMPLER,
        stage_a_scale=False,
        size_from_semantic=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Progress:
    """A piece of work that has just been done; on a GPU, that has just been launched.

    Attributes:
        stage: "text", after the prompts have been encoded; "input_images", after the image prompts, the image to begin
            with, or a control has been; "prior" or "decoder", after one of its steps; "image", after a picture has been
            finished.
        done, total: pieces of work of the whole request. The total grows when a lack of memory has work done again.
        latents: of the two stages: what they take the finished latents to be, float32 (B, C, h, w). Those of the prior
            are what `Cascade.preview` takes.
        image: the picture that has been finished.
    """

    stage: str
    done: int
    total: int
    latents: Tensor | None = None
    image: Image.Image | None = None


class Count:
    """Numbers the pieces of a request's work."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def expect(self, left: int) -> None:
        """So many pieces are left to be done."""
        self.total = self.done + left

    def did(self, stage: str, **made: Any) -> Progress:
        """One more has been done."""
        self.done += 1
        return Progress(stage, self.done, self.total, **made)


@dataclass(frozen=True, eq=False)
class Plan:
    """Requests, checked against the model, with all decided that they leave open. Nothing has been computed for them.

    Attributes:
        requests: one, or several that differ in `OWN` alone.
        size: (height, width) of the pictures.
        semantic_size, decoder_size: (h, w) of the latents of Stages C and B.
        canvas: (height, width) that is cut out of what Stage A makes.
        prior, decoder: how the stages are sampled.
        strength: how much of the image to begin with is painted anew; 1 without one.
        mask: bool (height, width), what of it is; None: all.
        controls: those of the request, and the one that the mask brings.
    """

    requests: tuple[Request, ...]
    size: sizes.Size
    semantic_size: sizes.Size
    decoder_size: sizes.Size
    canvas: sizes.Size
    prior: StageSettings
    decoder: StageSettings
    sampler: str
    strength: float
    mask: np.ndarray | None
    controls: tuple[Control, ...]

    @property
    def request(self) -> Request:
        """What all requests have in common is as in this one."""
        return self.requests[0]

    @cached_property
    def pictures(self) -> list[tuple[int, int]]:
        """The request, by its place in `requests`, and the seed of each picture."""
        return [
            (place, request.seed + i) for place, request in enumerate(self.requests) for i in range(request.num_images)
        ]

    @property
    def steps(self) -> int:
        """Of both stages, for each batch."""
        return self.decoder.steps + (steps_taken(self.prior.steps, self.strength) if self.strength else 0)

    @property
    def guided(self) -> bool:
        """Whether any stage sees the negative prompt."""
        return max(self.prior.guidance, self.decoder.guidance) > 1


@dataclass(eq=False)
class Given:
    """What the steps of a plan are given, computed once.

    Attributes:
        texts, negatives: of batch 1, one a request, each at its own length; no negatives without guidance.
        image_prompts: (1, N, D), times their strengths.
        start: semantic latents (1, 16, h, w) of the image to begin with.
        free: bool (1, 1, h, w), which of them are made anew; None: all.
        residuals: what the ControlNets add.
    """

    texts: list[TextEmbeddings] = field(default_factory=list)
    negatives: list[TextEmbeddings] = field(default_factory=list)
    image_prompts: Tensor | None = None
    start: Tensor | None = None
    free: Tensor | None = None
    residuals: list[Residuals] = field(default_factory=list)


class Cascade:
    """Stable Cascade, loaded.

    Args:
        conditioner: text, and images if it has an image encoder, to embeddings.
        prior, decoder, vqgan: Stages C, B and A.
        effnet, previewer: the semantic encoder and the previewer; without them `encode` and `preview` fail.
        controlnets: by the kind of the controls that they read; a request with another fails.
        defaults: the settings of the stages "prior" and "decoder" where the request leaves them open.
        native_size: pixels, the edge of the square that is made when the request names no size.
        stage_a_scale: what Stage A's latents are multiplied with; None: as its configuration says.
        numerics: "official", "notebook" or "diffusers".
        max_batch: how many pictures are made at a time; fewer if the GPU's memory does not suffice. It does not change the
            pictures.
        home: where the networks live while they are not running; None: all stay where they are.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        prior: StableCascadeUNet,
        decoder: StableCascadeUNet,
        vqgan: StageA,
        effnet: SemanticEncoder | None = None,
        previewer: Previewer | None = None,
        controlnets: Mapping[str, ControlNet] = MappingProxyType({}),
        *,
        defaults: Mapping[str, StageSettings],
        native_size: int,
        stage_a_scale: float | None = None,
        numerics: str = "official",
        max_batch: int = 4,
        home: Resident | None = None,
    ) -> None:
        if numerics not in NUMERICS:
            raise ValueError(f"numerics is {numerics!r}; it must be one of {', '.join(NUMERICS)}.")
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1.")
        self.conditioner = conditioner
        self.prior = prior
        self.decoder = decoder
        self.vqgan = vqgan
        self.effnet = effnet
        self.previewer = previewer
        self.controlnets = controlnets
        self.defaults = defaults
        self.native_size = native_size
        self.numerics = NUMERICS[numerics]
        self.stage_a_scale = stage_a_scale if self.numerics.stage_a_scale else None
        self.max_batch = max_batch
        # Where Stage C computes, and latents lie. Asking the network takes 6 ms: diffusers looks through all its layers.
        self.device = prior.device
        self.home = Resident(self.device) if home is None else home
        self._allowances = Allowances(max_batch)
        self.recorder = conditioner.recorder = Recorder()
        self._run_prior, self._run_decoder = self._runner("prior", prior), self._runner("decoder", decoder)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        lite: Collection[str] = (),
        numerics: str = "official",
        max_batch: int = 4,
        memory: str = "auto",
        log_prompts: bool = True,
    ) -> "Cascade":
        """Read a model folder, or the folder that holds the two published repositories.

        Args:
            folder: the directory.
            device, dtype: where the networks run and in which dtype; None: what suits the machine, see
                `running.device.choose_device`.
            lite: the stages, of "prior" and "decoder", whose lite network is taken from the published repositories.
            numerics, max_batch: see the class.
            memory: "resident", "offload" or "stream", see `memory`; "auto" chooses by the size of the networks and the
                GPU's free memory. On a CPU all are resident.
            log_prompts: whether log lines may quote prompts.

        Raises:
            WeightsError: something is missing from the folder, or damaged.
            SettingError: there is no such device, dtype or memory.
            ValueError: there is no such numerics.
        """
        device, dtype, reason = choose_device(device, dtype)
        logger.info("Device: %s in %s; %s.", device, str(dtype).removeprefix("torch."), reason)
        with current(device):
            return cls._load(folder, device, dtype, lite, memory, log_prompts, numerics=numerics, max_batch=max_batch)

    @classmethod
    def _load(
        cls,
        folder: str | PathLike[str],
        device: torch.device,
        dtype: torch.dtype,
        lite: Collection[str],
        memory: str,
        log_prompts: bool,
        **options: Any,
    ) -> "Cascade":
        opened = ModelFolder.open(folder, lite=lite)
        opened.require()
        optional = ("feature_extractor", "image_encoder", "effnet", "previewer", *CONTROLNETS)
        names = (*NEEDED, *(name for name in optional if name in opened))
        choice = _choose(memory, opened, names, device, dtype)
        parts, packed, seconds = {}, {}, {}
        for name in names:
            start = time.perf_counter()
            waits = choice.mode != "resident" and name in NETWORKS and name not in ALWAYS
            parts[name] = opened.load_component(name, device="cpu" if waits else device, dtype=dtype)
            if name in ("prior", "decoder", "vqgan"):
                parts[name].use_kernels(kernels.choose(device, dtype).name)
            if waits:
                packed[name] = Packed(parts[name], pin=True)
            seconds[name] = time.perf_counter() - start
        home = Arena(packed, device, choice) if packed else None
        if device.type == "cuda":
            warm_up([parts["prior"], parts["decoder"]], parts["vqgan"])
        logger.info("Seconds to load: %s.", ", ".join(f"{name} {taken:.2f}" for name, taken in seconds.items()))
        return cls(
            Conditioner(
                parts["tokenizer"],
                parts["text_encoder"],
                parts.get("feature_extractor"),
                parts.get("image_encoder"),
                embeddings=Embeddings(parts["text_encoder"].config.hidden_size, opened.root / "embeddings"),
                log_prompts=log_prompts,
            ),
            parts["prior"],
            parts["decoder"],
            parts["vqgan"],
            parts.get("effnet"),
            parts.get("previewer"),
            {name.removeprefix("controlnet_"): parts[name] for name in CONTROLNETS if name in parts},
            defaults=opened.sampler,
            native_size=opened.native_size,
            stage_a_scale=opened.stage_a_scale,
            home=home,
            **options,
        )

    def generate(self, request: Request, on_progress: Callable[[Progress], None] | None = None) -> list[Image.Image]:
        """Make all pictures of a request.

        Args:
            request: what to make.
            on_progress: called after every step and every picture; what it raises ends the generation.

        Returns:
            `num_images` RGB pictures.
        """
        return _images(self.steps(request), on_progress)

    def batch(
        self, requests: Iterable[Request], on_progress: Callable[[Progress], None] | None = None
    ) -> list[list[Image.Image]]:
        """Make the pictures of several prompts together, `max_batch` at a time, as `generate` makes them of each alone.

        Args:
            requests: equal in all but prompt, negative_prompt, seed and num_images.
            on_progress: as in `generate`; it counts the work of all requests.

        Returns:
            One list a request, in their order, of `num_images` RGB pictures.

        Raises:
            InputError: a request differs from the first in something else, or something is no `Request`.
            ValueError, RuntimeError: as `steps`.
        """
        if isinstance(requests, Request):
            raise InputError("requests is one Request; it must be a list of them.")
        requests = tuple(requests)
        _check_alike(requests)
        images = iter(_images(self._steps(requests), on_progress) if requests else ())
        return [list(itertools.islice(images, request.num_images)) for request in requests]

    def steps(self, request: Request) -> Generator[Progress, None, None]:
        """`generate`, step by step. Whoever iterates may stop whenever he wants.

        Raises:
            ValueError: the model has no component that reads the request's images; diffusers' numerics do not have
                this size or sampler, image-to-image or controls.
            RuntimeError: memory does not suffice for one picture (`running.errors.is_out_of_memory`); or the stages'
                latents are not finite.
        """
        _check_request("request", request)
        yield from self._steps((request,))

    def _steps(self, requests: tuple[Request, ...]) -> Iterator[Progress]:
        plan = self._plan(requests)
        with current(self.device):
            allowance = self._allowances.of(plan.size, usable(self.device))
        yield from within(lambda: self._at_work(plan, allowance), self._work(plan, allowance))

    @contextlib.contextmanager
    def _at_work(self, plan: Plan, allowance: Allowance) -> Iterator[None]:
        """The context of each step."""
        with current(self.device), self.recorder.of(plan.size, allowance.graphs):
            yield

    def _plan(self, requests: tuple[Request, ...]) -> Plan:
        """Decide what requests leave open, and make sure that this model can do what they ask for."""
        request = requests[0]
        settings = self._settings(request)
        height, width = self.picture_size(request)
        # diffusers takes the size as it is asked for, and then makes a picture of another.
        base = (height, width) if self.numerics.size_from_semantic else sizes.native_size(height, width)
        semantic_size = sizes.semantic_size(*base)
        decoder_size, canvas = self._decoder_size(semantic_size, height, width)
        controls = list(request.controls)
        masked = request.mask is not None
        if masked and self._fits("inpainting") and all(one.kind != "inpainting" for one in controls):
            controls.append(Control("inpainting", request.image))
        if request.image_prompts and self.conditioner.image_encoder is None:
            raise self._missing("image encoder, which image prompts need", "image-encoder")
        if request.image is not None:
            if self.numerics.size_from_semantic:
                raise ValueError("There is an image to begin with; diffusers' numerics have no image-to-image.")
            self._check_encoder()
        if controls and self.numerics.size_from_semantic:
            raise ValueError("There are controls; diffusers' numerics have no ControlNet.")
        for one in controls:
            self._check_control(one.kind, height, width)
        self._check_prompts(requests)
        return Plan(
            requests=requests,
            size=(height, width),
            semantic_size=semantic_size,
            decoder_size=decoder_size,
            canvas=canvas,
            sampler=self._sampler(request.sampler),
            strength=1.0 if request.image is None else request.prompt_strength,
            mask=read_mask(request.mask, width, height) if masked else None,
            controls=tuple(controls),
            **settings,
        )

    def _work(self, plan: Plan, allowance: Allowance) -> Iterator[Progress]:
        """All of a plan: what is computed once, then the pictures, in as many batches as memory demands."""
        number = len(plan.pictures)
        allocated = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        given, count = Given(), Count()
        pieces = self._pieces(plan, given)
        holds_graphs = len(self.recorder) > 0

        def left(pictures: int) -> int:
            batches = -(-pictures // min(allowance.most, pictures))
            return batches * plan.steps + pictures

        def prepare(first: int, last: int) -> Iterator[Progress]:
            count.expect(len(pieces) - first + left(number))
            for stage, compute in pieces[first:last]:
                compute()
                yield count.did(stage)

        def make(first: int, last: int) -> Iterator[Progress]:
            count.expect(left(number - first))
            return self._make(plan, given, first, last, count)

        def short_of_memory(what: str, remedy: str) -> None:
            self._forget_graphs()
            logger.warning("Out of memory with %s of %dx%d: %s.", what, plan.size[1], plan.size[0], remedy)
            if not allowance.graphs or allowance.most < self.max_batch:
                # What this request has allocated will be free again.
                own = torch.cuda.memory_allocated(self.device) - allocated if self.device.type == "cuda" else 0
                self._allowances.reduce(plan.size, allowance, usable(self.device) + own)

        yield from in_parts(
            len(pieces),
            1,
            allowance,
            prepare,
            finished=lambda _: True,
            holds_graphs=holds_graphs,
            make_room=lambda _, remedy: short_of_memory("the inputs of a picture", remedy),
        )
        self.home.prefetch("prior")
        yield from in_parts(
            number,
            self.max_batch,
            allowance,
            make,
            finished=lambda progress: progress.image is not None,
            holds_graphs=holds_graphs,
            make_room=lambda most, remedy: short_of_memory(f"{most} picture{'s' * (most > 1)} at a time", remedy),
        )

    def _pieces(self, plan: Plan, given: Given) -> list[tuple[str, Callable[[], None]]]:
        """What is computed once a plan: its stage, see `Progress`, and how it gets into `given`."""
        request = plan.request

        def text(one: Request) -> None:
            text, negative = self._encode(one, plan.guided)
            given.texts.append(text)
            if negative is not None:
                given.negatives.append(negative)

        def image_prompts() -> None:
            given.image_prompts = self._encode_image_prompts(request)

        def start() -> None:
            given.start = self._encode_start(fitted(request.image, *plan.size))
            if plan.mask is not None:
                given.free = latents_of(plan.mask, plan.semantic_size).to(self.device)

        def control(one: Control) -> None:
            given.residuals.append(self._residuals(one, plan))

        pieces = [("text", partial(text, one)) for one in plan.requests]
        if request.image_prompts:
            pieces.append(("input_images", image_prompts))
        if request.image is not None:
            pieces.append(("input_images", start))
        return [*pieces, *(("input_images", partial(control, one)) for one in plan.controls)]

    def _make(self, plan: Plan, given: Given, first: int, last: int, count: Count) -> Iterator[Progress]:
        """The pictures from `first` to before `last`, in one batch: noise, Stage C, Stage B, Stage A."""
        request = plan.request
        places, seeds = zip(*plan.pictures[first:last], strict=True)
        text, negative = _rows(given.texts, places), _rows(given.negatives, places)
        noise = Noise(seeds, self.device)
        if plan.strength == 0:
            semantic, work = given.start.expand(len(noise), -1, -1, -1), iter(())
        else:
            work = prior_steps(
                self._run_prior,
                text,
                negative,
                size=plan.semantic_size,
                noise=noise,
                sampler=plan.sampler,
                image=given.image_prompts,
                start=given.start,
                strength=plan.strength,
                start_shift=self.numerics.start_shift,
                free=given.free,
                controls=given.residuals,
                **vars(plan.prior),
            )
        for step in work:
            semantic = step.x
            expected = step.x0 if given.free is None else torch.where(given.free, step.x0, given.start)
            yield count.did("prior", latents=expected)
        work = self._decoder_steps(semantic, text, negative, plan.decoder_size, noise, plan)
        # The next request's text, most likely.
        upcoming = ("prior",) if last < len(plan.pictures) else ("text_encoder", "prior")
        self.home.prefetch(*upcoming)
        for step in work:
            latents = step.x
            yield count.did("decoder", latents=step.x0)
        self.home.idle()
        self.home.prefetch(*upcoming)
        finite = self._finite(semantic, latents)
        for pixels in self._decode(latents):
            finite()
            image = to_image(sizes.crop(pixels, *plan.canvas))
            if plan.mask is not None:
                image = set_into(to_rgb(request.image), image, plan.mask)
            yield count.did("image", image=image)

    def picture_size(self, request: Request) -> sizes.Size:
        """(height, width) of the pictures of a request."""
        if request.image is None:
            return request.height or self.native_size, request.width or self.native_size
        image = request.image
        if request.mask is not None:
            return image.height, image.width
        return sizes.fitted_size(image.height, image.width, self.native_size, request.height, request.width)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Small pictures, 8 pixels a semantic latent, of semantic latents (B, 16, h, w).

        Raises:
            ValueError: this model has no previewer.
        """
        self.check_previewer()

        @torch.no_grad()
        def pixels() -> Tensor:
            return self.previewer(latents.to(self.previewer.dtype)).float().clamp(0, 1)

        with current(self.device):
            return [to_image(one) for one in self.with_room(pixels)]

    def check_previewer(self) -> None:
        """Make sure that this model can `preview`.

        Raises:
            ValueError: this model has no previewer.
        """
        if self.previewer is None:
            raise self._missing("previewer, which previews need", "previewer")

    def encode(self, image: Image.Image) -> Tensor:
        """The semantic latents, float32 (1, 16, h, w), of a picture with sides from 64 to 2048 pixels.

        Raises:
            ValueError: the picture is too small or too large, or this model has no semantic encoder.
        """
        self._check_encoder()
        with current(self.device), self.recorder.of((image.height, image.width)):
            return self.with_room(lambda: self._encode_start(image))

    def reconstruct(self, image: Image.Image, seed: int = 0, prompt: str = "") -> Image.Image:
        """What is left of a picture that is squeezed into semantic latents and painted anew by Stages B and A.

        Args:
            image: sides from 64 to 2048 pixels.
            seed: of Stage B's noise.
            prompt: tells Stage B what is to be seen.

        Raises:
            ValueError: as `encode`; diffusers' numerics do not have this size.
        """
        semantic = self.encode(image)
        plan = self._plan((Request(prompt, seed=seed),))
        decoder_size, canvas = self._decoder_size(semantic.shape[-2:], image.height, image.width)

        def paint() -> Tensor:
            text, negative = self._encode(prompt, "" if plan.decoder.guidance > 1 else None)
            noise = Noise([seed], self.device)
            latents = finish(self._decoder_steps(semantic, text, negative, decoder_size, noise, plan))
            finite = self._finite(semantic, latents)
            (pixels,) = self._decode(latents)
            finite()
            return pixels

        with current(self.device), self.recorder.of((image.height, image.width)):
            return to_image(sizes.crop(self.with_room(paint), *canvas))

    def with_room(self, work: Callable[[], T]) -> T:
        """What `work` returns. If memory does not suffice, it is called again when all CUDA graphs have been given up.

        Between the steps of a request, too: graphs are recorded again when they are needed.
        """
        try:
            return work()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not len(self.recorder):
                raise
        self._forget_graphs()
        return work()

    def _decoder_steps(
        self,
        semantic: Tensor,
        text: TextEmbeddings,
        negative: TextEmbeddings | None,
        size: sizes.Size,
        noise: Noise,
        plan: Plan,
    ) -> Iterator[Step]:
        return decoder_steps(
            self._run_decoder,
            semantic,
            text.pooled,
            None if negative is None else negative.pooled,
            size=size,
            noise=noise,
            sampler=plan.sampler,
            **vars(plan.decoder),
        )

    def _finite(self, semantic: Tensor, latents: Tensor) -> Callable[[], None]:
        """Looks for NaN and infinities in the results of Stages C and B. What is returned raises if there are any.

        To be called once the GPU has more to do: it waits for the answer.
        """
        found = torch.stack([semantic.isfinite().all(), latents.isfinite().all()])

        def check() -> None:
            for stage, network, finite in zip("CB", (self.prior, self.decoder), found.tolist(), strict=True):
                if not finite:
                    dtype = str(network.dtype).removeprefix("torch.")
                    raise RuntimeError(
                        f"Stage {stage} made latents that are not finite, in {dtype}: its weights are damaged, or need "
                        "another dtype (CASCADE_DTYPE), such as float32."
                    )

        return check

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Pictures (3, H, W) in 0..1 of Stage B's latents, in tiles if memory is scarce."""
        size = latents.shape[-2:]
        room = self.home.room(decoding_bytes(self.vqgan, *size))
        return decode_pixels(self.vqgan, latents, self.stage_a_scale, tile_within(self.vqgan, *size, room))

    def _forget_graphs(self) -> None:
        """Give up the memory that they hold."""
        self.recorder.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _runner(self, name: str, network: StableCascadeUNet) -> UNet:
        """Stage B or C as it is run: by graphs on a GPU, if its weights stay there meanwhile, and in its turn."""
        graphs = self.device.type == "cuda" and not self.home.streams(name)
        return self.home.on_turn(name, GraphedUNet(network, name, self.recorder) if graphs else network)

    def _check_prompts(self, requests: Sequence[Request]) -> None:
        """Make sure that the embeddings exist that prompts name. Encodes nothing."""
        for place, request in enumerate(requests):
            for name in ("prompt", "negative_prompt"):
                of = name if len(requests) == 1 else f"requests[{place}].{name}"
                self.conditioner.read(getattr(request, name), weighting=request.prompt_weighting, name=of)

    def _encode(self, request: Request, guided: bool) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """The prompt, and for guidance the negative one, in one forward; of batch 1, each at its own length."""
        prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        self.home.use("text_encoder")
        with self.recorder.of_no_size():
            texts = self.conditioner.encode_prompts(
                prompts, weighting=request.prompt_weighting, most_chunks=MOST_CHUNKS
            )
        if not guided:
            return texts[0], None
        return repeated(*texts) if request.repeat_prompts else tuple(texts)

    def _encode_image_prompts(self, request: Request) -> Tensor:
        """(1, N, D), times their strengths."""
        self.home.use("image_encoder")
        with self.recorder.of_no_size():
            embeddings = self.conditioner.encode_images([to_rgb(image) for image in request.image_prompts])
        strengths = request.image_prompt_strengths or (1.0,) * len(request.image_prompts)
        return embeddings.transpose(0, 1) * embeddings.new_tensor(strengths).view(1, -1, 1)

    def _encode_start(self, image: Image.Image) -> Tensor:
        """The semantic latents, float32 (1, 16, h, w), of a picture."""
        self.home.use("effnet")
        return encode_pixels(self._run_effnet, to_pixels(image, self.device))

    def _run_effnet(self, pixels: Tensor) -> Tensor:
        return self.recorder.run_once("effnet", self.effnet, pixels)

    @torch.no_grad()
    def _residuals(self, control: Control, plan: Plan) -> Residuals:
        """What a ControlNet adds for pictures of this size: one forward."""
        network = self.controlnets[control.kind]
        read = self._read_control(control, plan.mask, *plan.size)
        self.home.use(f"controlnet_{control.kind}")
        blocks = self.recorder.run_once(f"controlnet_{control.kind}", network, read)
        return Residuals(blocks, control.scale, control.start, control.end)

    def _check_encoder(self) -> None:
        if self.effnet is None:
            raise self._missing("semantic encoder, which reads images", "effnet")

    def _check_control(self, kind: str, height: int, width: int) -> None:
        """Make sure that this model has a ControlNet for pictures of this size."""
        if kind not in self.controlnets:
            what = "upscale and controls" if kind == "super_resolution" else "controls"
            raise self._missing(f"controlnet_{kind}, which {what} of the kind {kind!r} need", "controlnet")
        if not self._fits(kind):
            raise ValueError(
                f"controlnet_{kind} was trained with a Stage C of width {self.controlnets[kind].config.out_channels}; "
                f"this model's has {self._width}."
            )
        if kind == "super_resolution":
            self._check_encoder()
            smallest = 2 * sizes.SMALLEST
            if min(height, width) <= smallest - 2:
                raise ValueError(
                    f"The picture has {width}x{height} pixels; with a control of the kind {kind!r}, it must have at "
                    f"least {smallest}x{smallest}."
                )

    def _fits(self, kind: str) -> bool:
        """Whether there is such a ControlNet, for this Stage C: the published ones are not for the lite one."""
        network = self.controlnets.get(kind)
        return network is not None and network.config.out_channels == self._width

    @property
    def _width(self) -> int:
        """Channels of Stage C's finest level, by which one tells published networks from others."""
        return self.prior.config.block_out_channels[0]

    def _missing(self, what: str, download: str) -> ValueError:
        """This model lacks something; says where it comes from: what was published serves the published model only."""
        widths = (PUBLISHED_WIDTH,) if download == "controlnet" else PUBLISHED_WIDTHS
        advice = f"none was published for a Stage C of width {self._width}, but docs/training.md says how to train one"
        if self._width in widths:
            advice = f"scripts/download-weights --only --with {download}, then scripts/save-weights, add it"
        return ValueError(f"This model has no {what}; {advice}.")

    def _read_control(self, control: Control, mask: np.ndarray | None, height: int, width: int) -> Tensor:
        """What a ControlNet is given for pictures of this size."""
        if control.kind == "super_resolution":
            half = -(-height // 2), -(-width // 2)
            # controls.super_resolution halves a picture of full size, to train with; this one is of half the size.
            return F.interpolate(self._encode_start(fitted(control.image, *half)), scale_factor=2, mode="nearest")
        native = sizes.native_size(height, width)
        pixels = sizes.pad(to_pixels(fitted(control.image, height, width), self.device), *native)
        if control.kind == "canny":
            return canny(for_encoder(pixels), control.canny_side)
        masked = sizes.pad(torch.from_numpy(mask).to(pixels)[None, None], *native)
        return inpainting(for_encoder(pixels), for_encoder(masked) > 0)

    def _settings(self, request: Request) -> dict[str, StageSettings]:
        """How the stages are sampled: what the request says, else the numerics, else the model folder."""
        chosen = {}
        for stage, settings in self.defaults.items():
            numerics = {"shift": self.numerics.shift, "rescale": self.numerics.rescale}
            if stage == "decoder":
                numerics["guidance"] = self.numerics.decoder_guidance
            wanted = {
                "steps": getattr(request, f"steps_{stage}"),
                "guidance": getattr(request, f"guidance_scale_{stage}"),
            }
            for source in (numerics, wanted):
                settings = replace(settings, **{key: value for key, value in source.items() if value is not None})
            chosen[stage] = settings
        return chosen

    def _sampler(self, wanted: str) -> str:
        if self.numerics.sampler is None:
            return wanted
        if wanted != "ddpm":
            raise ValueError(f"sampler is {wanted!r}; diffusers' numerics have 'ddpm' only.")
        return self.numerics.sampler

    def _decoder_size(self, semantic: sizes.Size, height: int, width: int) -> tuple[sizes.Size, sizes.Size]:
        """Of Stage B's latents, and of the picture that is cut out of what they make."""
        if self.numerics.size_from_semantic:
            rows, columns = sizes.diffusers_decoder_size(semantic)
            return (rows, columns), (rows * sizes.STAGE_A_FACTOR, columns * sizes.STAGE_A_FACTOR)
        return sizes.decoder_size(*sizes.native_size(height, width)), (height, width)


def _choose(mode: str, opened: ModelFolder, names: Collection[str], device: torch.device, dtype: torch.dtype) -> Choice:
    """Where the networks of a model folder will live; says why."""
    sizes = {name: opened.size(name, dtype) for name in names if name in NETWORKS}
    if device.type != "cuda":
        choose(mode, sizes, 0, dtype.itemsize)  # no other than the modes there are
        return Choice("resident")
    free = available(device)
    choice = choose(mode, sizes, free, dtype.itemsize)
    total, largest = (number(sizes.values()) / GIB for number in (sum, max))
    logger.info(
        "Memory: %s, for %s: the networks have %.2f GiB, the largest %.2f GiB; of the GPU %.2f GiB are free.",
        choice.mode,
        mode,
        total,
        largest,
        free / GIB,
    )
    return choice


def _images(work: Iterable[Progress], on_progress: Callable[[Progress], None] | None) -> list[Image.Image]:
    """The pictures that are finished by work, each piece of which is reported."""
    images = []
    for progress in work:
        if on_progress is not None:
            on_progress(progress)
        if progress.image is not None:
            images.append(progress.image)
    return images


def _check_request(name: str, request: object) -> None:
    if not isinstance(request, Request):
        raise InputError(f"{name} is {shown(request)}; it must be a Request, such as Request('a cat').")


def _check_alike(requests: Sequence[Request]) -> None:
    """Make sure that requests can be made together.

    Raises:
        InputError: names the request that cannot, and the first attribute by which.
    """
    for place, request in enumerate(requests):
        _check_request(f"requests[{place}]", request)
        for name in ALIKE:
            value, first = getattr(request, name), getattr(requests[0], name)
            if value is not first and value != first:
                other = "another" if shown(value) == shown(first) else shown(first)
                raise InputError(
                    f"requests[{place}].{name} is {shown(value)}, but requests[0].{name} is {other}; "
                    f"requests of a batch may differ in {', '.join(OWN[:-1])} and {OWN[-1]} only."
                )


def _rows(texts: Sequence[TextEmbeddings], places: Sequence[int]) -> TextEmbeddings | None:
    """The embeddings at these places, one row each, or a single row if it is the same for all; None if there are none."""
    if not texts:
        return None
    if len(set(places)) == 1:
        return texts[places[0]]
    return joined([texts[place] for place in places])


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """A picture of any mode in RGB and in this size; what exceeds the shape is cut off evenly."""
    return ImageOps.fit(to_rgb(image), (width, height), Image.Resampling.LANCZOS)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in 0..1 -> an RGB picture."""
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def to_pixels(image: Image.Image, device: str | torch.device = "cpu") -> Tensor:
    """A picture of any mode -> float32 (1, 3, H, W) in 0..1. What is transparent is laid on white."""
    pixels = torch.from_numpy(np.array(to_rgb(image))).to(device)  # as bytes: a quarter of the way
    return pixels.permute(2, 0, 1)[None].float() / 255
