"""The whole of Stable Cascade: a `Request` becomes a plan, and then, by Stages C, B and A, pictures.

Knows which stage follows which. How a stage works is in `stages`, what steers Stage C in `guides`, what a request leaves open
in `plan`, what prompts and images become in `encoding`, and where weights are and what happens when memory is short in `running`.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

from cascade import sizes
from cascade.encoding import Given, InputEncoder, Texts
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.guides.inpainting import set_into
from cascade.images.colours import to_rgb
from cascade.images.tensors import to_image
from cascade.limits import LIMITS, InputError
from cascade.loading import load_parts
from cascade.loras.merging import Loras
from cascade.loras.selection import Selection
from cascade.loras.words import Words
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.precisions import network_precision
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.plan import Plan, Planner, check_alike, check_request
from cascade.progress import Count, Progress
from cascade.prompts.embeddings import Embeddings
from cascade.request import Request
from cascade.running.cache import ResidentWeights
from cascade.running.device import choose_device, current
from cascade.running.runner import Job, Runner
from cascade.sampling import Noise, Sampling, Step, finish
from cascade.stages.decoder import SAMPLES, decoder_steps, tiles_together
from cascade.stages.pixels import decode_pixels, most_bytes, tile_within
from cascade.stages.prior import prior_steps
from cascade.stages.text import TextEncoder
from cascade.stages.tiles import Part
from cascade.weights import CONTROLNETS, StageSettings
from cascade.weights.base import BaseWeights

logger = logging.getLogger(__name__)


class Cascade:
    """Stable Cascade, loaded. Use `load`.

    Args:
        text: encodes prompts.
        prior, decoder, vqgan: Stages C, B and A.
        image_prompts: encodes image prompts; None: requests with image prompts fail.
        effnet: the semantic encoder; None: `encode`, and requests with an image, fail.
        previewer: makes small pictures of semantic latents; None: `preview` fails.
        controlnets: by the kind of controls that they read; requests with another kind fail.
        ip_adapter: None: requests with images for it fail.
        defaults: the settings of the stages "prior" and "decoder" where a request leaves them open.
        native_size: pixels, the edge of the square that is made when a request names no size.
        stage_a_scale: factor on Stage A's latents; None: the one in its configuration.
        start_shift: of the schedule by which a start image is noised; None: Stage C's. The authors' notebook for
            image-to-image has 1, and samples at 2.
        max_batch: how many pictures are made at a time; fewer if memory does not suffice. It does not change the pictures.
        weights: where the networks' weights are; None: all stay on the device.
        base: reads the weights again that adapters change; None: copies are kept of those.
        loras: the folder of the adapters that requests may name; None: there is none.
        distilled: the file of the adapter for the speed "turbo"; None: requests with that speed fail.
    """

    # A subclass may plan and sample in another way: see `compat`.
    planner_class: type[Planner] = Planner
    sampling_class: type[Sampling] = Sampling

    def __init__(
        self,
        text: TextEncoder,
        prior: StableCascadeUNet,
        decoder: StableCascadeUNet,
        vqgan: StageA,
        image_prompts: ImagePromptEncoder | None = None,
        effnet: SemanticEncoder | None = None,
        previewer: Previewer | None = None,
        controlnets: Mapping[str, ControlNet] = MappingProxyType({}),
        ip_adapter: IPAdapter | None = None,
        *,
        defaults: Mapping[str, StageSettings],
        native_size: int,
        stage_a_scale: float | None = None,
        start_shift: float | None = None,
        max_batch: int = 4,
        weights: ResidentWeights | None = None,
        base: BaseWeights | None = None,
        loras: Path | None = None,
        distilled: Path | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch is {max_batch}; it must be at least 1.")
        self.text = text
        self.prior = prior
        self.decoder = decoder
        self.vqgan = vqgan
        self.image_prompts = image_prompts
        self.effnet = effnet
        self.previewer = previewer
        self.controlnets = controlnets
        self.ip_adapter = ip_adapter
        self.defaults = defaults
        self.native_size = native_size
        self.stage_a_scale = stage_a_scale
        self.start_shift = start_shift
        self.max_batch = max_batch
        self.device = prior.device
        self.planner = self.planner_class(
            defaults=defaults,
            native_size=native_size,
            width=prior.config.block_out_channels[0],
            image_encoder=image_prompts is not None,
            effnet=effnet is not None,
            previewer=previewer is not None,
            controlnets={kind: network.config.out_channels for kind, network in controlnets.items()},
            distilled=distilled,
        )
        self.runner = Runner(self.device, weights, max_batch)
        self._prior = self.runner.unet("prior", prior)
        self._decoder = self.runner.unet("decoder", decoder)
        self._encoder = InputEncoder(text, image_prompts, effnet, controlnets, ip_adapter, prior, self.runner)
        adapted = {"prior": prior, "decoder": decoder, "text_encoder": text.encoder}
        self._loras = Loras(adapted, text.tokenizer.get_vocab, self.runner, base, loras)

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        lite: Collection[str] = (),
        start_shift: float | None = None,
        max_batch: int = 4,
        memory: str = "auto",
        precision: str = "auto",
        log_prompts: bool = True,
    ) -> "Cascade":
        """Read a model folder, or the folder that holds the two published repositories.

        Args:
            folder: the directory.
            device, dtype: where the networks run and in which dtype; None: what suits the machine, see
                `running.device.choose_device`.
            lite: the stages, of "prior" and "decoder", whose lite network is taken from the published repositories.
            start_shift, max_batch: see the class.
            memory: "resident", "offload" or "stream", see `running.placement`; "auto" chooses by the networks' sizes and
                the GPU's free memory. On a CPU all are resident.
            precision: how weights are kept: "full", in `dtype`; "int8", in 8 bits, in about half the memory, and less exact,
                see `networks.eight_bits`; "fp8", in 8 bits, with products in 8 bits, which are fast, see `networks.fp8`,
                or "full" where the GPU has no such products; "auto", as they are stored.
            log_prompts: whether log lines may quote prompts.

        Raises:
            WeightsError: something is missing from the folder, or damaged.
            SettingError: there is no such device, dtype, memory mode or precision.
        """
        device, dtype, reason = choose_device(device, dtype)
        logger.info("Device: %s in %s; %s.", device, str(dtype).removeprefix("torch."), reason)
        with current(device):
            loaded = load_parts(folder, device, dtype, memory, lite, precision)
            parts = loaded.parts
            images = parts.get("feature_extractor"), parts.get("image_encoder")
            text_encoder = parts["text_encoder"]
            embeddings = Embeddings(text_encoder.config.hidden_size, loaded.folder.root / "embeddings")
            return cls(
                TextEncoder(parts["tokenizer"], text_encoder, embeddings=embeddings, log_prompts=log_prompts),
                parts["prior"],
                parts["decoder"],
                parts["vqgan"],
                None if None in images else ImagePromptEncoder(*images),
                parts.get("effnet"),
                parts.get("previewer"),
                {name.removeprefix("controlnet_"): parts[name] for name in CONTROLNETS if name in parts},
                parts.get("ip_adapter"),
                defaults=loaded.folder.sampler,
                native_size=loaded.folder.native_size,
                stage_a_scale=loaded.folder.stage_a_scale,
                start_shift=start_shift,
                max_batch=max_batch,
                weights=loaded.weights,
                base=loaded.base,
                loras=loaded.folder.root / "loras",
                distilled=loaded.folder.distilled(),
            )

    @property
    def precision(self) -> str:
        """How weights are kept: "full", "int8" or "fp8", see `load`."""
        return network_precision(self.prior)

    # ---- what callers use ----

    def generate(self, request: Request, on_progress: Callable[[Progress], None] | None = None) -> list[Image.Image]:
        """Make all pictures of a request.

        Args:
            request: what to make.
            on_progress: called after every piece of work; an exception from it ends the generation.

        Returns:
            `num_images` RGB pictures.

        Raises:
            ValueError, RuntimeError: as `steps`.
        """
        return list(_images(self.steps(request), on_progress))

    def batch(
        self, requests: Iterable[Request], on_progress: Callable[[Progress], None] | None = None
    ) -> list[list[Image.Image]]:
        """Make the pictures of several prompts together, `max_batch` at a time; `generate` makes the same of each alone.

        Args:
            requests: equal in all but prompt, negative_prompt, seed and num_images.
            on_progress: as in `generate`; it counts the work of all requests.

        Returns:
            For each request, in order, `num_images` RGB pictures.

        Raises:
            InputError: a request differs from the first in something else, or something is no `Request`.
            ValueError, RuntimeError: as `steps`.
        """
        if isinstance(requests, Request):
            raise InputError("requests is one Request; it must be a list of them.")
        requests = tuple(requests)
        check_alike(requests)
        images = iter(list(_images(self._steps(requests), on_progress)) if requests else ())
        return [list(itertools.islice(images, request.num_images)) for request in requests]

    def steps(self, request: Request) -> Generator[Progress, None, None]:
        """`generate`, step by step. The caller may stop at any step.

        Raises:
            InputError: the request is no `Request`.
            ValueError: the model lacks a network that the request needs.
            RuntimeError: memory does not suffice for one picture (`running.errors.is_out_of_memory`); or what a stage
                made is not finite.
        """
        check_request("request", request)
        yield from self._steps((request,))

    def encode(self, image: Image.Image, compression: float = sizes.SEMANTIC_PIXELS) -> Tensor:
        """The semantic latents, float32 (1, 16, h, w), of a picture with sides from 64 to 4096 pixels.

        compression: pixels, 32 to 64: the side of a latent.

        Raises:
            ValueError: the picture is too small or too large, the compression is not allowed, or this model has no semantic
                encoder.
        """
        self.planner.check_encoder()
        compression = LIMITS["compression"].check("compression", compression)
        with self.runner.at((image.height, image.width)):
            return self.runner.with_room(lambda: self._encoder.image(image, compression))

    def reconstruct(
        self, image: Image.Image, seed: int = 0, prompt: str = "", compression: float = sizes.SEMANTIC_PIXELS
    ) -> Image.Image:
        """A picture, squeezed into semantic latents and made again of these by Stages B and A.

        Args:
            image: sides from 64 to 4096 pixels.
            seed: of Stage B's noise.
            prompt: tells Stage B what the picture shows.
            compression: as in `encode`.

        Raises:
            ValueError: as `encode`.
        """
        semantic = self.encode(image, compression)
        size = {"width": image.width, "height": image.height}
        plan = self.planner.plan((Request(prompt, seed=seed, compression=compression, **size),))
        self._loras.apply(self._loras.select(()))

        def pixels() -> Tensor:
            texts = self._encoder.text(plan.request, Words(), guided=plan.decoder.guidance > 1)
            latents = finish(self._decoder_steps(plan, semantic, texts, Noise([seed], self.device), at_once=SAMPLES))
            (made,) = self._pixels(semantic, latents)
            return made

        with self.runner.at(plan.size):
            return to_image(sizes.crop(self.runner.with_room(pixels), *plan.canvas))

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Small pictures, 8 pixels a semantic latent, of semantic latents (B, 16, h, w).

        Raises:
            ValueError: this model has no previewer.
        """
        self.planner.check_previewer()

        @torch.no_grad()
        def pixels() -> Tensor:
            return self.previewer(latents.to(self.previewer.dtype)).float().clamp(0, 1)

        with current(self.device):
            return [to_image(one) for one in self.runner.with_room(pixels)]

    # ---- the story ----

    def _steps(self, requests: tuple[Request, ...]) -> Iterator[Progress]:
        plan = self.planner.plan(requests)
        selection = self._loras.select(plan.loras)
        self._encoder.check(plan, selection.words)
        job = self.runner.job(plan.size)
        yield from job.iterate(self._with_loras(selection, self._work(plan, selection.words, job)))

    def _with_loras(
        self, selection: Selection, work: Generator[Progress, None, None]
    ) -> Generator[Progress, None, None]:
        """Work; before every step, the request's adapters are put into the weights, as another request may have set its own."""
        with contextlib.closing(work):
            while True:
                self._loras.apply(selection)
                progress = next(work, None)
                if progress is None:
                    return
                yield progress

    def _work(self, plan: Plan, words: Words, job: Job) -> Generator[Progress, None, None]:
        """All of a plan: its inputs, once; then its pictures, in as many batches as memory demands."""
        pictures, given, count = len(plan.pictures), Given(), Count()
        inputs = self._encoder.steps(plan, words, given)

        def left(pictures: int) -> int:
            """How often the progress of so many pictures will be reported."""
            if plan.tiles is None:
                return pictures + plan.steps * -(-pictures // job.at_once(pictures))
            groups = len(plan.tiles.groups(tiles_together(job.at_once(SAMPLES), plan.decoder_halves)))
            return pictures * (1 + plan.steps + plan.decoder.steps * (groups - 1))

        def encode(first: int, last: int) -> Iterator[Progress]:
            count.expect(len(inputs) - first + left(pictures))
            for stage, compute in inputs[first:last]:
                compute()
                yield count.did(stage)

        def make(first: int, last: int) -> Iterator[Progress]:
            count.expect(left(pictures - first))
            return self._batch(plan, given, first, last, count, job.at_once(SAMPLES))

        yield from job.in_parts(
            len(inputs), encode, most=1, finished=lambda _: True, name=lambda _: "the inputs of a picture"
        )
        self.runner.prefetch("prior")
        one, rest = ("picture", "") if plan.tiles is None else ("tile", " of a picture")
        yield from job.in_parts(
            pictures,
            make,
            most=self.max_batch if plan.tiles is None else 1,
            finished=lambda progress: progress.image is not None,
            name=lambda number: f"{number} {one}{'s' * (number > 1)}{rest} at a time",
            pieces=1 if plan.tiles is None else SAMPLES,
        )

    def _batch(self, plan: Plan, given: Given, first: int, last: int, count: Count, at_once: int) -> Iterator[Progress]:
        """Make the pictures from `first` to before `last` together: noise, Stage C, Stage B, Stage A.

        at_once: how many samples Stage B gets together of pictures in tiles, see `decoder_steps`.
        """
        places, seeds = zip(*plan.pictures[first:last], strict=True)
        texts, noise = given.texts_of(places), Noise(seeds, self.device)

        if plan.strength == 0:
            semantic = given.start.expand(len(noise), -1, -1, -1)
        else:
            steps = self._prior_steps(plan, given, texts, noise)
            semantic = yield from _taken("prior", steps, count, given.with_known)

        steps = self._decoder_steps(plan, semantic, texts, noise, at_once)
        # After the last batch, the next request's text is likely to come first.
        upcoming = ("prior",) if last < len(plan.pictures) else ("text_encoder", "prior")
        self.runner.prefetch(*upcoming)
        latents = yield from _taken("decoder", steps, count)
        self.runner.release()
        self.runner.prefetch(*upcoming)

        for pixels in self._pixels(semantic, latents):
            image = to_image(sizes.crop(pixels, *plan.canvas))
            if plan.mask is not None:
                image = set_into(to_rgb(plan.request.image), image, plan.mask)
            yield count.did("image", image=image)

    # ---- its parts ----

    def _prior_steps(self, plan: Plan, given: Given, texts: Texts, noise: Noise) -> Iterator[Step]:
        return prior_steps(
            self._prior,
            texts.prompt,
            texts.negative,
            size=plan.semantic_size,
            noise=noise,
            interval=plan.interval,
            image=given.image_prompts,
            start=given.start,
            strength=plan.strength,
            start_shift=self.start_shift,
            free=given.free,
            controls=given.residuals,
            adapter=given.adapter,
            sampling=self.sampling_class,
            **vars(plan.prior),
        )

    def _decoder_steps(
        self, plan: Plan, semantic: Tensor, texts: Texts, noise: Noise, at_once: int
    ) -> Iterator[Step | Part]:
        decoder = self._decoder
        if plan.tiles is not None:
            decoder = self.runner.of_one_size(decoder, ("tile", *plan.tiles.edges))
        return decoder_steps(
            decoder,
            semantic,
            texts.prompt.pooled,
            texts.negative_pooled,
            size=plan.decoder_size,
            noise=noise,
            sampling=self.sampling_class,
            at_once=None if plan.tiles is None else at_once,
            **vars(plan.decoder),
        )

    def _pixels(self, semantic: Tensor, latents: Tensor) -> Iterator[Tensor]:
        """Stage A: pictures (3, H, W) in 0..1 of Stage B's latents, in tiles where memory is short.

        Raises:
            RuntimeError: what a stage made is not finite.
        """
        finite = [semantic.isfinite().all(), latents.isfinite().all()]
        size = latents.shape[-2:]
        tile = tile_within(self.vqgan, *size, self.runner.workspace(most_bytes(self.vqgan, *size)))
        for pixels in decode_pixels(self.vqgan, latents, self.stage_a_scale, tile):
            # All three at once, because `tolist` waits for the GPU, as the caller does next. Pixels are in 0..1 or NaN, and the
            # largest is NaN if any is.
            self._check_finite(torch.stack([*finite, pixels.max().isfinite()]).tolist())
            yield pixels

    def _check_finite(self, finite: Sequence[bool]) -> None:
        dtypes = (self.prior.dtype, self.decoder.dtype, self.vqgan.dtype)
        for stage, kind, fine in zip("CBA", dtypes, finite, strict=True):
            if not fine:
                dtype = str(kind).removeprefix("torch.")
                what = "pixels" if stage == "A" else "latents"
                raise RuntimeError(
                    f"Stage {stage} made {what} that are not finite, in {dtype}: its weights are damaged, or need "
                    "another dtype (CASCADE_DTYPE), such as float32; or a LoRA's scale or values are too large."
                )


def _taken(
    stage: str,
    steps: Iterator[Step | Part],
    count: Count,
    predicted: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Generator[Progress, None, Tensor]:
    """Take all steps of a stage, with a `Progress` for each, and for each part of one; returns the last step's latents.

    predicted: makes what is reported of the step's prediction of the finished latents.
    """
    for step in steps:
        if isinstance(step, Part):
            yield count.did("tiles")
        else:
            latents = step.x
            yield count.did(stage, latents=predicted(step.x0))
    return latents


def _images(work: Iterable[Progress], on_progress: Callable[[Progress], None] | None) -> Iterator[Image.Image]:
    """The pictures that work finishes; each piece of work is reported."""
    for progress in work:
        if on_progress is not None:
            on_progress(progress)
        if progress.image is not None:
            yield progress.image
