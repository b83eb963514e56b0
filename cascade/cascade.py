"""The whole of Stable Cascade: a `Request` in, pictures out.

Knows which stage follows which, with which settings; not how a stage works, where files lie or who asks.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cascade import sizes
from cascade.conditioning import Conditioner, TextEmbeddings
from cascade.controls import Control, canny, inpainting
from cascade.decoder import decode_pixels, decoder_steps, decoding_bytes, encode_pixels, for_encoder, tile_within
from cascade.graphs import GraphedUNet, Recorder, graphed
from cascade.inpainting import latents_of, read_mask, set_into
from cascade.memory import ALWAYS, GIB, Arena, Choice, Resident, available, choose
from cascade.networks.controlnet import PUBLISHED_WIDTH, ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.packing import Packed
from cascade.pictures import to_rgb
from cascade.prior import Residuals, prior_steps, steps_taken
from cascade.request import Request
from cascade.sampling import DIFFUSERS_SAMPLER, Noise, finish
from cascade.warm_up import warm_up
from cascade.weights import CONTROLNETS, NETWORKS, ModelFolder, StageSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Numerics:
    """In what the authors' pipeline and the one frozen in diffusers differ. The presets are in `NUMERICS`.

    Attributes:
        shift, rescale: of both stages; None: as the model folder says (published: 2 in Stage C, 1 in Stage B; 0.7).
        decoder_guidance: of Stage B unless the request says otherwise; None: as the model folder says (1.1).
        sampler: None: the request's; "diffusers" tells the networks the raw time and adds no noise in the last step.
        stage_a_scales: what Stage A's scale becomes, by what its configuration says.
        size_from_semantic: Stage B's latents are 10.67 times the semantic ones, and pictures as large as that makes
            them. Otherwise they are a quarter of the picture, and pictures as large as asked.
        start_shift: at which an image to begin with is noised; None: the shift of Stage C.
    """

    shift: float | None = None
    rescale: float | None = None
    decoder_guidance: float | None = None
    sampler: str | None = None
    stage_a_scales: tuple[tuple[float, float], ...] = ()
    size_from_semantic: bool = False
    start_shift: float | None = None


# The diffusers configuration of the published Stage A says 0.3764, where the authors train and decode with 0.43.
_OFFICIAL = Numerics(stage_a_scales=((0.3764, 0.43),))
NUMERICS = {
    "official": _OFFICIAL,
    # The authors' notebook for image-to-image noises at shift 1 what it samples at 2.
    "notebook": replace(_OFFICIAL, start_shift=1.0),
    "diffusers": Numerics(
        shift=1.0, rescale=0.0, decoder_guidance=0.0, sampler=DIFFUSERS_SAMPLER, size_from_semantic=True
    ),
}


@dataclass(frozen=True, eq=False)
class Progress:
    """A piece of work that has just been done.

    Attributes:
        stage: "prior" or "decoder", after one of its steps; "image", after a picture has been finished.
        done, total: pieces of work of the whole request.
        latents: of the two stages: what they take the finished latents to be, float32 (B, C, h, w). Those of the prior
            are what `Cascade.preview` takes.
        image: the picture that has been finished.
    """

    stage: str
    done: int
    total: int
    latents: Tensor | None = None
    image: Image.Image | None = None


class Cascade:
    """Stable Cascade, loaded.

    Args:
        conditioner: text, and images if it has an image encoder, to embeddings.
        prior, decoder, vqgan: Stages C, B and A.
        effnet, previewer: the semantic encoder and the previewer; without them `encode` and `preview` fail.
        controlnets: by the kind of the controls that they read; a request with another fails.
        defaults: the settings of the stages "prior" and "decoder" where the request leaves them open.
        native_size: pixels, the edge of the square that is made when the request names no size.
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
        self.max_batch = max_batch
        # By (height, width): how many at once, where it is less than max_batch; and where not even graphs have room.
        self._most_at_once: dict[sizes.Size, int] = {}
        self._without_graphs: set[sizes.Size] = set()
        # Where Stage C computes, and latents lie. Asking the network takes 6 ms: diffusers looks through all its layers.
        self.device = prior.device
        self.home = Resident(self.device) if home is None else home
        unets = {"prior": prior, "decoder": decoder}
        runs = {name: unet if self.home.streams(name) else graphed(unet) for name, unet in unets.items()}
        self._recorder = Recorder()
        self._recorders = [
            self._recorder,
            conditioner.recorder,
            *(run.recorder for run in runs.values() if isinstance(run, GraphedUNet)),
        ]
        self._run_prior, self._run_decoder = (self.home.on_turn(name, run) for name, run in runs.items())

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
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
            device: None: CUDA if there is a device, else the CPU.
            dtype: of the networks; None: bfloat16 on CUDA, else float32.
            lite: the stages, of "prior" and "decoder", whose lite network is taken from the published repositories.
            numerics, max_batch: see the class.
            memory: "resident", "offload" or "stream", see `memory`; "auto" chooses by the size of the networks and the
                GPU's free memory. On a CPU all are resident.
            log_prompts: whether log lines may quote prompts.

        Raises:
            WeightsError: something is missing from the folder, or damaged.
            ValueError: there is no such numerics or memory.
        """
        device = find_device() if device is None else torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        opened = ModelFolder.open(folder, lite=lite)
        needed = ("tokenizer", "text_encoder", "prior", "decoder", "vqgan")
        optional = ("feature_extractor", "image_encoder", "effnet", "previewer", *CONTROLNETS)
        names = (*needed, *(name for name in optional if name in opened))
        choice = _choose(memory, opened, names, device, dtype)
        parts, packed, seconds = {}, {}, {}
        for name in names:
            start = time.perf_counter()
            waits = choice.mode != "resident" and name in NETWORKS and name not in ALWAYS
            parts[name] = opened.load_component(name, device="cpu" if waits else device, dtype=dtype)
            if device.type == "cuda" and name in ("prior", "decoder"):
                parts[name].join_weights()
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
            numerics=numerics,
            max_batch=max_batch,
            home=home,
        )

    def generate(self, request: Request, on_progress: Callable[[Progress], None] | None = None) -> list[Image.Image]:
        """Make all pictures of a request.

        Args:
            request: what to make.
            on_progress: called after every step and every picture; what it raises ends the generation.

        Returns:
            `num_images` RGB pictures.
        """
        images = []
        for progress in self.steps(request):
            if on_progress is not None:
                on_progress(progress)
            if progress.image is not None:
                images.append(progress.image)
        return images

    def steps(self, request: Request) -> Iterator[Progress]:
        """`generate`, step by step. Whoever iterates may stop whenever he wants.

        Raises:
            ValueError: the model has no component that reads the request's images; diffusers' numerics do not have
                this size or sampler, image-to-image or controls.
        """
        settings = self._settings(request)
        sampler = self._sampler(request.sampler)
        height, width = self.picture_size(request)
        # diffusers takes the size as it is asked for, and then makes a picture of another.
        base = (height, width) if self.numerics.size_from_semantic else sizes.native_size(height, width)
        semantic_size = sizes.semantic_size(*base)
        decoder_size, picture_size = self._decoder_size(semantic_size, height, width)
        image_prompts = self._encode_image_prompts(request)
        start = None if request.image is None else self._encode_start(request.image, height, width)
        strength = 1.0 if start is None else request.prompt_strength
        mask = None if request.mask is None else read_mask(request.mask, width, height)
        free = None if mask is None else latents_of(mask, semantic_size).to(self.device)
        controls = self._residuals(request, mask, height, width)
        guided = any(stage.guidance > 1 for stage in settings.values())
        text, negative = self._encode(request.prompt, request.negative_prompt if guided else None)
        self.home.prefetch("prior")
        prior_work = 0 if strength == 0 else steps_taken(settings["prior"].steps, strength)

        def make(first: int, last: int) -> Iterator[Progress]:
            """The pictures from `first` to before `last`, in one batch; without the numbers of what is done."""
            noise = Noise(range(request.seed + first, request.seed + last), self.device)
            if strength == 0:
                semantic, work = start.expand(len(noise), -1, -1, -1), iter(())
            else:
                work = prior_steps(
                    self._run_prior,
                    text,
                    negative,
                    size=semantic_size,
                    noise=noise,
                    sampler=sampler,
                    image=image_prompts,
                    start=start,
                    strength=strength,
                    start_shift=self.numerics.start_shift,
                    free=free,
                    controls=controls,
                    **vars(settings["prior"]),
                )
            for step in work:
                semantic = step.x
                expected = step.x0 if free is None else torch.where(free, step.x0, start)
                yield Progress("prior", 0, 0, latents=expected)
            work = decoder_steps(
                self._run_decoder,
                semantic,
                text.pooled,
                None if negative is None else negative.pooled,
                size=decoder_size,
                noise=noise,
                sampler=sampler,
                **vars(settings["decoder"]),
            )
            # The next request's text, most likely.
            upcoming = ("prior",) if last < request.num_images else ("text_encoder", "prior")
            self.home.prefetch(*upcoming)
            for step in work:
                latents = step.x
                yield Progress("decoder", 0, 0, latents=step.x0)
            self.home.idle()
            self.home.prefetch(*upcoming)
            for pixels in self._decode(latents):
                image = to_image(sizes.crop(pixels, *picture_size))
                if mask is not None:
                    image = set_into(to_rgb(request.image), image, mask)
                yield Progress("image", 0, 0, image=image)

        most = min(self._most_at_once.get((height, width), self.max_batch), request.num_images)
        made = done = 0
        emptied = False
        while made < request.num_images:
            batches = -(-(request.num_images - made) // most)
            total = done + batches * (prior_work + settings["decoder"].steps) + request.num_images - made
            batch = range(made, min(made + most, request.num_images))
            for recorder in self._recorders:
                recorder.records = (height, width) not in self._without_graphs
            try:
                for progress in make(batch.start, batch.stop):
                    done += 1
                    made += progress.image is not None
                    yield replace(progress, done=done, total=total)
            except torch.OutOfMemoryError:
                if len(batch) > 1:
                    most = self._most_at_once[height, width] = len(batch) // 2
                elif not emptied:  # once more, without the graphs of other sizes
                    emptied = True
                elif (height, width) not in self._without_graphs:
                    self._without_graphs.add((height, width))
                else:
                    raise
            if made < batch.stop:  # here, what the error's traceback kept is gone
                logger.warning(
                    "Memory does not suffice for %d at a time of %dx%d: going on with %d, and without %s.",
                    len(batch),
                    width,
                    height,
                    most,
                    "graphs, more slowly" if (height, width) in self._without_graphs else "the graphs so far",
                )
                self._forget_graphs()

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
        if self.previewer is None:
            raise ValueError(
                "This model has no previewer, which previews need; "
                "scripts/download-weights --only --with previewer, then scripts/save-weights, add it."
            )
        with torch.no_grad():
            pixels = self.previewer(latents.to(self.previewer.dtype)).float().clamp(0, 1)
        return [to_image(one) for one in pixels]

    def encode(self, image: Image.Image) -> Tensor:
        """The semantic latents, float32 (1, 16, h, w), of a picture with sides from 64 to 2048 pixels.

        Raises:
            ValueError: the picture is too small or too large, or this model has no semantic encoder.
        """
        if self.effnet is None:
            raise ValueError(
                "This model has no semantic encoder, which reads images; "
                "scripts/download-weights --only --with effnet, then scripts/save-weights, add it."
            )
        self.home.use("effnet")
        return encode_pixels(self._run_effnet, to_pixels(image, self.device))

    def _run_effnet(self, pixels: Tensor) -> Tensor:
        (latents,) = self._recorder.run_once("effnet", lambda x: (self.effnet(x),), pixels)
        return latents

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
        settings = self._settings(Request(prompt, seed=seed))["decoder"]
        decoder_size, picture_size = self._decoder_size(semantic.shape[-2:], image.height, image.width)
        text, negative = self._encode(prompt, "" if settings.guidance > 1 else None)
        latents = finish(
            decoder_steps(
                self._run_decoder,
                semantic,
                text.pooled,
                None if negative is None else negative.pooled,
                size=decoder_size,
                noise=Noise([seed], self.device),
                sampler=self._sampler("ddpm"),
                **vars(settings),
            )
        )
        (pixels,) = self._decode(latents)
        return to_image(sizes.crop(pixels, *picture_size))

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Pictures (3, H, W) in 0..1 of Stage B's latents, in tiles if memory is scarce."""
        size = latents.shape[-2:]
        room = self.home.room(decoding_bytes(self.vqgan, *size))
        return decode_pixels(self.vqgan, latents, self._stage_a_scale(), tile_within(self.vqgan, *size, room))

    def _forget_graphs(self) -> None:
        """Give up the memory that they hold."""
        for recorder in self._recorders:
            recorder.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _encode(self, prompt: str, negative: str | None) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Both texts in one forward: (1, 77, D) and (1, 1, D) each."""
        self.home.use("text_encoder")
        both = self.conditioner.encode_text([prompt] if negative is None else [prompt, negative])
        first, *rest = (TextEmbeddings(*one) for one in zip(both.tokens.split(1), both.pooled.split(1), strict=True))
        return first, rest[0] if rest else None

    def _encode_image_prompts(self, request: Request) -> Tensor | None:
        """(1, N, D), times their strengths."""
        if not request.image_prompts:
            return None
        self.home.use("image_encoder")
        embeddings = self.conditioner.encode_images([to_rgb(image) for image in request.image_prompts])
        strengths = request.image_prompt_strengths or (1.0,) * len(request.image_prompts)
        return embeddings.transpose(0, 1) * embeddings.new_tensor(strengths).view(1, -1, 1)

    def _encode_start(self, image: Image.Image, height: int, width: int) -> Tensor:
        """The semantic latents (1, 16, h, w) of an image in the size of the pictures."""
        if self.numerics.size_from_semantic:
            raise ValueError("There is an image to begin with; diffusers' numerics have no image-to-image.")
        return self.encode(fitted(image, height, width))

    @torch.no_grad()
    def _residuals(self, request: Request, mask: np.ndarray | None, height: int, width: int) -> list[Residuals]:
        """What the ControlNets add for pictures of this size: one forward a control."""
        controls = list(request.controls)
        if mask is not None and self._fits("inpainting") and all(one.kind != "inpainting" for one in controls):
            controls.append(Control("inpainting", request.image))
        if controls and self.numerics.size_from_semantic:
            raise ValueError("There are controls; diffusers' numerics have no ControlNet.")
        residuals = []
        for one in controls:
            network = self._controlnet(one.kind)
            read = self._read_control(one, mask, height, width)
            self.home.use(f"controlnet_{one.kind}")
            made = self._recorder.run_once(one.kind, lambda x, network=network: tuple(network(x).values()), read)
            blocks = dict(zip(network.config.proj_blocks, made, strict=True))
            residuals.append(Residuals(blocks, one.scale, one.start, one.end))
        return residuals

    def _controlnet(self, kind: str) -> ControlNet:
        if kind not in self.controlnets:
            lacking = f"This model has no controlnet_{kind}, which a control of this kind needs; "
            width = self.prior.config.block_out_channels[0]
            if width == PUBLISHED_WIDTH:
                add = "scripts/download-weights --only --with controlnet, then scripts/save-weights, add it."
                raise ValueError(lacking + add)
            there = ", ".join(self.controlnets) or "none"
            raise ValueError(
                f"{lacking}the published one is for a Stage C of width {PUBLISHED_WIDTH}, and this model's has {width}. "
                f"Kinds that it has: {there}."
            )
        if not self._fits(kind):
            raise ValueError(
                f"controlnet_{kind} was trained with a Stage C of width {self.controlnets[kind].config.out_channels}; "
                f"this model's has {self.prior.config.block_out_channels[0]}."
            )
        return self.controlnets[kind]

    def _fits(self, kind: str) -> bool:
        """Whether there is such a ControlNet, for this Stage C: the published ones are not for the lite one."""
        network = self.controlnets.get(kind)
        return network is not None and network.config.out_channels == self.prior.config.block_out_channels[0]

    def _read_control(self, control: Control, mask: np.ndarray | None, height: int, width: int) -> Tensor:
        """What a ControlNet is given for pictures of this size."""
        if control.kind == "super_resolution":
            half = -(-height // 2), -(-width // 2)
            if min(half) < sizes.SMALLEST:
                smallest = 2 * sizes.SMALLEST
                raise ValueError(
                    f"The picture has {width}x{height} pixels; with a control of the kind {control.kind!r}, it must "
                    f"have at least {smallest}x{smallest}."
                )
            # controls.super_resolution halves a picture of full size, to train with; this one is of half the size.
            return F.interpolate(self.encode(fitted(control.image, *half)), scale_factor=2, mode="nearest")
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

    def _stage_a_scale(self) -> float:
        said = self.vqgan.config.scale_factor
        return dict(self.numerics.stage_a_scales).get(said, said)


def find_device() -> torch.device:
    """CUDA if there is such a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
