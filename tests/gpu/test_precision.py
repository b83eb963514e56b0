"""What bfloat16 costs at full size: our default numerics beside diffusers' pipelines, each against its own float32 run.

Weights, conditions, initial noise and step noise are the same in all four runs. They are random, see `full_size`, so
the figures compare the two programs' arithmetic; they do not say how much of an error one would see in a picture.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.pipelines.stable_cascade import pipeline_stable_cascade, pipeline_stable_cascade_prior
from diffusers.schedulers import scheduling_ddpm_wuerstchen
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cascade import kernels, sizes
from cascade.networks.stage_a import StageA
from cascade.networks.unet import StableCascadeUNet
from cascade.sampling import Noise, finish
from cascade.stages.decoder import decoder_steps
from cascade.stages.pixels import decode_pixels
from cascade.stages.prior import prior_steps
from cascade.stages.text import TextEmbeddings
from tests.components import make_text_encoder, make_tokenizer
from tests.diffusers_pipelines import make_pipelines, twin
from tests.gpu.drawing import error
from tests.gpu.full_size import make_stage_a, make_unet, published_config, random_conditions

HEIGHT = WIDTH = 1024
STEPS_PRIOR, STEPS_DECODER = 20, 10
GUIDANCE = 4.0
SEED_PRIOR, SEED_DECODER = 11, 12


class Networks(NamedTuple):
    prior: StableCascadeUNet
    decoder: StableCascadeUNet
    vqgan: StageA


class Run(NamedTuple):
    """What a run makes, in float32: semantic latents, Stage B's latents, pixels in 0..1; and Stage B's latents from the
    semantic latents of the float32 run."""

    semantic: Tensor
    latents: Tensor
    pixels: Tensor
    latents_of_reference: Tensor


class Forward(NamedTuple):
    """Relative differences of predictions: of the two programs in float32, and of bfloat16 to float32 in each."""

    programs: float
    ours: float
    theirs: float


class Text(NamedTuple):
    """What two prompts would say, float32: tokens (1, 77, D) and pooled (1, 1, D) each."""

    positive: TextEmbeddings
    negative: TextEmbeddings

    def to(self, network: StableCascadeUNet) -> "Text":
        return Text(*(TextEmbeddings(*(x.to(network.device, network.dtype) for x in one[:2])) for one in self))


def make_networks(prior: dict[str, Any], decoder: dict[str, Any], vqgan: dict[str, Any], device: str) -> Networks:
    semantic = sizes.semantic_size(HEIGHT, WIDTH)
    latent = sizes.decoder_size(HEIGHT, WIDTH)
    return Networks(
        make_unet(prior, latent_size=semantic, semantic_size=semantic, seed=1, device=device),
        make_unet(decoder, latent_size=latent, semantic_size=semantic, seed=2, device=device),
        make_stage_a(vqgan, seed=3, device=device),
    )


def make_text(prior: StableCascadeUNet) -> Text:
    torch.manual_seed(4)
    size = sizes.semantic_size(HEIGHT, WIDTH)
    given = (random_conditions(prior.config, size, 1) for _ in range(2))
    return Text(*(TextEmbeddings(one["clip_text"], one["clip_text_pooled"]) for one in given))


def run_ours(networks: Networks, text: Text, reference: Run | None = None) -> Run:
    positive, negative = text.to(networks.prior)
    device = networks.prior.device
    semantic = finish(
        prior_steps(
            networks.prior,
            positive,
            negative,
            size=sizes.semantic_size(HEIGHT, WIDTH),
            noise=Noise([SEED_PRIOR], device),
            steps=STEPS_PRIOR,
            guidance=GUIDANCE,
        )
    )

    def decode(semantic: Tensor) -> Tensor:
        return finish(
            decoder_steps(
                networks.decoder,
                semantic,
                positive.pooled,
                size=sizes.decoder_size(HEIGHT, WIDTH),
                noise=Noise([SEED_DECODER], device),
                steps=STEPS_DECODER,
                guidance=1.0,
            )
        )

    latents = decode(semantic)
    (pixels,) = decode_pixels(networks.vqgan, latents)
    return Run(semantic, latents, pixels, latents if reference is None else decode(reference.semantic))


def run_theirs(networks: Networks, text: Text, reference: Run | None = None) -> Run:
    positive, negative = text.to(networks.prior)
    tokenizer = make_tokenizer()
    # The pipelines ask the text encoder for its dtype, and nothing else, as they are given embeddings.
    text_encoder = make_text_encoder(tokenizer).to(networks.prior.device, networks.prior.dtype)
    prior, decoder = make_pipelines(*networks, tokenizer, text_encoder)
    semantic = prior(
        prompt_embeds=positive.tokens,
        prompt_embeds_pooled=positive.pooled,
        negative_prompt_embeds=negative.tokens,
        negative_prompt_embeds_pooled=negative.pooled,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS_PRIOR,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED_PRIOR),
    ).image_embeddings

    def decode(semantic: Tensor, **options: Any) -> Tensor:
        return decoder(
            semantic.to(networks.decoder.dtype),
            prompt_embeds=positive.tokens,
            prompt_embeds_pooled=positive.pooled,
            num_inference_steps=STEPS_DECODER,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(SEED_DECODER),
            **options,
        ).images

    steps = []

    def watch(pipeline: Any, index: int, time: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(state["latents"])
        return state

    (pixels,) = decode(semantic, output_type="pt", callback_on_step_end=watch)
    latents = steps[-1]
    given = latents if reference is None else decode(reference.semantic, output_type="latent")
    return Run(*(x.float() for x in (semantic, latents, pixels, given)))


def draw_in_float32(shape: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """diffusers' `randn_tensor`, rounded after the draw: left alone, it draws other numbers in bfloat16 than in float32,
    and diffusers' error would be that of another picture.
    """
    return randn_tensor(shape, dtype=torch.float32, **options).to(dtype)


@pytest.fixture(scope="module")
def exact(exact_float32: None) -> Networks:
    return make_networks(*(published_config(name) for name in ("prior", "decoder", "vqgan")), "cuda")


@pytest.fixture(scope="module")
def rounded(exact: Networks) -> Networks:
    """The same weights in bfloat16, which has them exactly: 10 GB beside the 21 of float32."""
    return to_bfloat16(exact)


def to_bfloat16(networks: Networks) -> Networks:
    halves = Networks(*(copy.deepcopy(network).to(torch.bfloat16) for network in networks))
    for network in halves:
        network.use_kernels(kernels.choose(network.device, network.dtype).name)
    return halves


def measure_runs(exact: Networks, rounded: Networks) -> tuple[Run, Run, dict[str, tuple[float, float]]]:
    """The float32 runs, ours and diffusers', and the errors of the two bfloat16 runs by what they are of."""
    text = make_text(exact.prior)
    references, errors = [], []
    for run in (run_ours, run_theirs):
        reference = run(exact, text)
        actual = run(rounded, text, reference)
        references.append(reference)
        errors.append([error(*both) for both in zip(actual, reference, strict=True)])
    return *references, dict(zip(Run._fields, zip(*errors, strict=True), strict=True))


def measure_forward(exact: StableCascadeUNet, rounded: StableCascadeUNet, size: tuple[int, int]) -> Forward:
    """One prediction from inputs that bfloat16 has exactly, at time 0: the only one of which diffusers' embedding comes
    out right in bfloat16, where it multiplies the others by 10,000.
    """
    torch.manual_seed(5)
    sample = torch.randn(1, exact.config.in_channels, *size).bfloat16().float().to(exact.device)
    given = random_conditions(exact.config, sizes.semantic_size(HEIGHT, WIDTH), 1)
    time = torch.zeros(1, device=exact.device)
    ours, theirs = [], []
    with torch.no_grad():
        for network in (exact, rounded):
            kind = {"device": network.device, "dtype": network.dtype}
            conditions = {name: x.to(**kind) for name, x in given.items()}
            ours.append(network(sample, time, **conditions))
            theirs.append(twin(network)(sample.to(**kind), time.to(**kind), **conditions).sample)
    return Forward(error(ours[0], theirs[0]), error(ours[1], ours[0]), error(theirs[1], theirs[0]))


def show(record_property: Callable[[str, object], None], name: str, ours: float, theirs: float) -> None:
    record_property(f"{name}_ours", ours)
    record_property(f"{name}_diffusers", theirs)
    print(f"{name}: bfloat16 against float32, ours {ours:.2%}, diffusers {theirs:.2%}, {theirs / ours:.1f} times")


def test_bfloat16_costs_a_third_of_what_it_costs_diffusers(
    exact: Networks,
    rounded: Networks,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    for module in (pipeline_stable_cascade_prior, pipeline_stable_cascade, scheduling_ddpm_wuerstchen):
        monkeypatch.setattr(module, "randn_tensor", draw_in_float32)
    ours, theirs, errors = measure_runs(exact, rounded)
    for name, both in errors.items():
        show(record_property, name, *both)

    for reference in (ours, theirs):
        for latents in (reference.semantic, reference.latents):
            assert 0.3 < latents.std() < 100
        assert ((reference.pixels > 0) & (reference.pixels < 1)).float().mean() > 0.5
    for own, others in errors.values():
        assert 3 * own <= others


@pytest.mark.parametrize(
    ("stage", "size"),
    [("prior", sizes.semantic_size(HEIGHT, WIDTH)), ("decoder", sizes.decoder_size(HEIGHT, WIDTH))],
)
def test_networks_lose_less_even_where_times_are_exact(
    exact: Networks,
    rounded: Networks,
    record_property: Callable[[str, object], None],
    stage: str,
    size: tuple[int, int],
) -> None:
    """The rest is the residual stream: float32 in ours, as under the authors' autocast, bfloat16 in diffusers'."""
    found = measure_forward(getattr(exact, stage), getattr(rounded, stage), size)
    show(record_property, f"{stage}_forward", found.ours, found.theirs)
    assert found.programs <= 1e-3
    assert 1.5 * found.ours <= found.theirs
