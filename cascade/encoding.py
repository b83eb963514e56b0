"""The prompts and images of a plan become what its stages take. This is done once a plan."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from cascade.guides.controlnets import ControlNets
from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.guides.inpainting import latents_of
from cascade.guides.ip_adapter import IPAdapterGuide
from cascade.images.colours import to_rgb
from cascade.images.tensors import fitted, to_pixels
from cascade.limits import MOST_CHUNKS
from cascade.loras.words import Words
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import SemanticEncoder
from cascade.networks.ip_adapter import IPAdapter
from cascade.networks.unet import StableCascadeUNet
from cascade.plan import Plan
from cascade.prompts.text import TextEmbeddings, joined, repeated
from cascade.request import Request
from cascade.running.runner import Runner
from cascade.stages.encoder import encode_pixels
from cascade.stages.prior import AdapterImage, Residuals
from cascade.stages.text import TextEncoder


@dataclass(frozen=True)
class Texts:
    """Embeddings of prompts and negative prompts; of one row if they are the same for all pictures. No negatives without
    guidance."""

    prompt: TextEmbeddings
    negative: TextEmbeddings | None

    @property
    def negative_pooled(self) -> Tensor | None:
        return None if self.negative is None else self.negative.pooled


@dataclass(eq=False)
class Given:
    """What the steps of a plan are given, computed once.

    Attributes:
        texts: one a request, each of one row and at its own length.
        image_prompts: (1, N, D), times their strengths.
        start: semantic latents, float32 (1, 16, h, w), of the start image.
        free: bool (1, 1, h, w), the latents that are repainted; None: all.
        residuals: what the ControlNets add.
        adapter: what the images of the IP-Adapter add.
    """

    texts: list[Texts] = field(default_factory=list)
    image_prompts: Tensor | None = None
    start: Tensor | None = None
    free: Tensor | None = None
    residuals: list[Residuals] = field(default_factory=list)
    adapter: list[AdapterImage] = field(default_factory=list)

    def texts_of(self, places: Sequence[int]) -> Texts:
        """Those of the requests at these places, one row each."""
        if len(set(places)) == 1:
            return self.texts[places[0]]
        negatives = [self.texts[place].negative for place in places]
        return Texts(
            joined([self.texts[place].prompt for place in places]),
            None if negatives[0] is None else joined(negatives),
        )

    def with_known(self, latents: Tensor) -> Tensor:
        """Semantic latents, those of the start image where nothing is repainted."""
        return latents if self.free is None else torch.where(self.free, latents, self.start)


class InputEncoder:
    """Encodes the prompts and images of a plan.

    Args:
        text: encodes prompts.
        image_prompts: encodes image prompts and the images of an IP-Adapter; None: no plan has any.
        effnet: the semantic encoder; None: no plan has a start image.
        controlnets: by the kind of controls that they read.
        ip_adapter: of Stage C `prior`; None: no plan has images for it.
        prior: Stage C.
        runner: runs all of these.
    """

    def __init__(
        self,
        text: TextEncoder,
        image_prompts: ImagePromptEncoder | None,
        effnet: SemanticEncoder | None,
        controlnets: Mapping[str, ControlNet],
        ip_adapter: IPAdapter | None,
        prior: StableCascadeUNet,
        runner: Runner,
    ) -> None:
        self._text = text
        self._prompts = image_prompts
        self._effnet = effnet
        self._runner = runner
        self._controlnets = ControlNets(controlnets, self.image, runner)
        self._ip_adapter = IPAdapterGuide(ip_adapter, image_prompts, prior, runner)

    def check(self, plan: Plan, words: Words) -> None:
        """Make sure that there are the embeddings that prompts name, and that the IP-Adapter has the mode. Encodes nothing.

        Raises:
            InputError: one is missing.
        """
        for place, request in enumerate(plan.requests):
            prefix = f"requests[{place}]." if len(plan.requests) > 1 else ""
            for name in ("prompt", "negative_prompt"):
                prompt = words.spelled(getattr(request, name))
                options = {"weighting": request.prompt_weighting, "words": words.vectors}
                self._text.read(prompt, name=prefix + name, **options)
        if plan.references:
            self._ip_adapter.check(plan.request.ip_adapter_mode)

    def steps(self, plan: Plan, words: Words, given: Given) -> list[tuple[str, Callable[[], None]]]:
        """What is encoded once a plan: its stage, see `Progress`, and a function that puts it into `given`."""
        request = plan.request

        def text(one: Request) -> None:
            given.texts.append(self.text(one, words, guided=plan.guided))

        def image_prompts() -> None:
            given.image_prompts = self._image_prompts(request)

        def references() -> None:
            given.adapter = self._ip_adapter.encode(
                plan.references, request.ip_adapter_mode, plan.size, request.compression
            )

        def start() -> None:
            given.start = self.image(fitted(request.image, *plan.size), request.compression)
            if plan.mask is not None:
                given.free = latents_of(plan.mask, plan.semantic_size).to(self._runner.device)

        def control(index: int) -> None:
            residuals = self._controlnets.residuals(plan.controls[index], plan.size, plan.mask, request.compression)
            given.residuals.append(residuals)

        inputs = [("text", partial(text, one)) for one in plan.requests]
        if request.image_prompts:
            inputs.append(("input_images", image_prompts))
        if plan.references:
            inputs.append(("input_images", references))
        if request.image is not None:
            inputs.append(("input_images", start))
        return [*inputs, *(("input_images", partial(control, index)) for index in range(len(plan.controls)))]

    def text(self, request: Request, words: Words, *, guided: bool) -> Texts:
        """Both prompts in one forward, each at its own length."""
        prompts = [request.prompt, request.negative_prompt] if guided else [request.prompt]
        prompts = [words.spelled(prompt) for prompt in prompts]
        run = partial(self._runner.run_for_any_size, "text_encoder")
        texts = self._text.encode_each(
            prompts,
            run,
            weighting=request.prompt_weighting,
            weight_pooled=request.weight_pooled,
            most_chunks=MOST_CHUNKS,
            words=words.vectors,
        )
        if not guided:
            return Texts(texts[0], None)
        return Texts(*(repeated(*texts) if request.repeat_prompts else texts))

    def _image_prompts(self, request: Request) -> Tensor:
        """The embeddings of the image prompts, (1, N, D), times their strengths."""
        images = [to_rgb(image) for image in request.image_prompts]
        embeddings = self._prompts.encode(images, partial(self._runner.run_for_any_size, "image_encoder"))
        strengths = request.image_prompt_strengths or (1.0,) * len(images)
        return embeddings.transpose(0, 1) * embeddings.new_tensor(strengths).view(1, -1, 1)

    def image(self, image: Image.Image, compression: float) -> Tensor:
        """The semantic latents, float32 (1, 16, h, w), of a picture."""
        run = partial(self._runner.run, "effnet", self._effnet)
        return encode_pixels(run, to_pixels(image, self._runner.device), compression)
