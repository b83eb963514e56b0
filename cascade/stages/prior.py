"""Stage C, the prior: text embeddings -> semantic latents, from which Stage B makes decoder latents.

Latents, noise and times are float32 whatever the network's dtype. Conditions do not depend on the step, and are computed once.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cascade.networks.ip_adapter import split_heads
from cascade.networks.protocol import UNet
from cascade.networks.unet import Conditions, ImageTokens, resize
from cascade.prompts.text import TextEmbeddings, joined
from cascade.sampling import Noise, Sampling, Step, alpha_sigma, beside_zeros, diffuse, with_guidance


class Residuals(NamedTuple):
    """The residuals that one ControlNet adds to Stage C.

    Attributes:
        blocks: {k: (1, C, h, w)}, the residual of ResBlock k, see `networks.controlnet.ControlNet`.
        scale: factor for them.
        start, end: they are added in step i of n, from 0, if start <= i / n < end.
    """

    blocks: dict[int, Tensor]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


class AdapterImage(NamedTuple):
    """What one image of an IP-Adapter adds to Stage C.

    Attributes:
        blocks: {number of an attention block: its keys and values, (1 or B, N, C) each}, as `networks.ip_adapter.IPAdapter` makes
            them. The images of one picture have the same blocks.
        scale: what the values are multiplied with.
        start, end: in step i of n, from 0, they are used if start <= i / n < end.
        mask: how much the image counts where, float32 (1, 1, h, w) in 0..1; None: 1 everywhere.
    """

    blocks: dict[int, tuple[Tensor, Tensor]]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None


def prior_steps(
    prior: UNet,
    text: TextEmbeddings,
    negative: TextEmbeddings | None = None,
    *,
    size: tuple[int, int],
    noise: Noise,
    steps: int = 20,
    guidance: float = 4.0,
    shift: float = 2.0,
    rescale: float = 0.7,
    sampler: str = "ddpm",
    interval: tuple[float, float] = (0.0, 1.0),
    image: Tensor | None = None,
    start: Tensor | None = None,
    strength: float = 1.0,
    start_shift: float | None = None,
    free: Tensor | None = None,
    controls: Sequence[Residuals] = (),
    adapter: Sequence[AdapterImage] = (),
    sampling: type[Sampling] = Sampling,
) -> Iterator[Step]:
    """Sample semantic latents (B, 16, h, w), step by step; `sampling.finish` takes all steps. B is the number of seeds.

    Args:
        prior: Stage C.
        text: the embeddings of B prompts, or of one prompt for all.
        negative: what not to show, in the same form, of any length; normally those of the empty prompt. Needed, and used,
            for guidance above 1 only: otherwise the unconditional half is not computed.
        size: (h, w) of the latents, see `sizes.semantic_size`.
        noise: one seed per image. It draws the initial noise, then each step's.
        steps, shift, sampler: see `Sampling`.
        guidance, rescale: see `sampling.guide`.
        interval: step i of n, from 0, is guided if start <= i / n < end. The unconditional half of others is not computed.
        image: image embeddings (B or 1, N, D) of N image prompts. The unconditional half gets zeros.
        start: image-to-image: semantic latents (B or 1, 16, h, w) of the start image, instead of noise.
        strength: in (0, 1], the time to which `start` is noised. Takes `steps_taken(steps, strength)` steps from there.
        start_shift: shift of the schedule by which `start` is noised; None: `shift`. The authors noise at 1 and sample at 2.
        free: bool (1, 1, h, w), the latents to repaint. After every step, the others are set to those of `start`, noised to
            the step's time. None: all are repainted.
        controls: the residuals of ControlNets, added to both halves, as in the authors' code.
        adapter: what the images of an IP-Adapter add. The unconditional half gets nothing of them.
        sampling: takes the steps.

    Raises:
        ValueError: an argument is out of range, or does not fit the others.
    """
    batch = len(noise)
    shape = (prior.config.in_channels, *size)
    if start is None and strength != 1:
        raise ValueError(f"strength is {strength}, but there is no start; without one it must be 1.")
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be above 0 and at most 1.")
    if start is not None and start.shape[1:] != shape:
        raise ValueError(f"start has the shape {tuple(start.shape)}; it must be (1 or {batch}, {str(shape)[1:]}.")
    if free is not None and start is None:
        raise ValueError("free needs start, which has the latents that are kept.")
    if guidance > 1 and negative is None:
        raise ValueError(f"guidance is {guidance}; above 1 it needs negative embeddings.")

    x = first = noise(*shape)
    if start is not None:
        x = diffuse(
            start.expand(batch, *shape), x, torch.tensor(strength), shift if start_shift is None else start_shift
        )
    halves = [one.expand(batch) for one in ([text] if guidance <= 1 else [text, negative])]
    texts = joined(halves)
    with torch.no_grad():
        conditions = prior.condition(
            clip_text_pooled=texts.pooled,
            clip_text=texts.tokens,
            clip_text_bias=texts.bias,
            clip_text_lengths=texts.lengths,
            clip_img=None if image is None else beside_zeros(image.expand(batch, -1, -1), len(halves)),
        )
    taken = steps_taken(steps, strength)
    guided = [guidance > 1 and interval[0] <= step / taken < interval[1] for step in range(taken)]

    def by_step(halves: int) -> list[tuple[Conditions, dict[int, Tensor]]]:
        shown = images_by_step(_first(conditions, halves * batch), adapter, taken, halves)
        return list(zip(shown, residuals_by_step(controls, taken, size, halves * batch), strict=True))

    given = {halves: by_step(halves) for halves in {1 + one for one in guided}}
    turns = iter(enumerate(guided))

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, *, step: int, halves: int) -> Tensor:
        shown, added = given[halves][step]
        return prior(x, t, shown, controlnet_residuals=added)

    def model(x: Tensor, t: Tensor) -> Tensor:
        step, both = next(turns)
        halves = partial(predict, step=step, halves=1 + both)
        return with_guidance(halves, guidance, rescale)(x, t) if both else halves(x, t)

    def hold(x: Tensor, log_snr: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(log_snr)
        return torch.where(free, x, alpha * start + sigma * first)

    return sampling(
        x,
        steps=taken,
        shift=shift,
        sampler=sampler,
        t_start=strength,
        noise=lambda _: noise(*shape),
        hold=None if free is None else hold,
    ).steps(model)


def steps_taken(steps: int, strength: float) -> int:
    """`steps * strength`, rounded, at least 1 and at most `steps`. strength: in (0, 1]."""
    return min(steps, max(int(round(steps * strength, 6)), 1))  # rounded first: 100 * 0.29 is a little less than 29


def _first(conditions: Conditions, rows: int) -> Conditions:
    """The conditions of the first rows of a batch, without what an IP-Adapter adds."""
    if conditions.keys[0].shape[0] == rows:
        return conditions
    return Conditions(
        tuple(key[:rows] for key in conditions.keys),
        tuple(value[:rows] for value in conditions.values),
        None,
        None if conditions.bias is None else conditions.bias[:rows],
        None if conditions.hidden is None else conditions.hidden[:rows],
    )


@torch.no_grad()
def residuals_by_step(
    controls: Sequence[Residuals], steps: int, size: tuple[int, int], batch: int
) -> list[dict[int, Tensor]]:
    """The sum of all controls' residuals in each step, {k: (batch, C, *size)} in float32.

    Keys and shapes are equal in all steps, with zeros where nothing is added, so that CUDA graphs can replay the steps. Steps
    with equal sums share their tensors.
    """
    scaled = [{k: resize(one.float(), size) * each.scale for k, one in each.blocks.items()} for each in controls]
    empty = {k: torch.zeros_like(one) for blocks in scaled for k, one in blocks.items()}
    sums: dict[tuple[int, ...], dict[int, Tensor]] = {}
    by_step = []
    for step in range(steps):
        active = tuple(i for i, each in enumerate(controls) if each.start <= step / steps < each.end)
        if active not in sums:
            sums[active] = {
                k: sum((scaled[i][k] for i in active if k in scaled[i]), start=zeros).expand(batch, -1, -1, -1)
                for k, zeros in empty.items()
            }
        by_step.append(sums[active])
    return by_step


@torch.no_grad()
def images_by_step(
    conditions: Conditions, adapter: Sequence[AdapterImage], steps: int, halves: int
) -> list[Conditions]:
    """The conditions in each step, with what an IP-Adapter's images add: none without images.

    Shapes are the same in every step, with zeros as values where an image is not used, so that steps can be replayed. Steps
    that use the same images share their tensors.

    Args:
        conditions: of Stage C, for all halves of guidance.
        halves: 2 with guidance, whose second half gets zeros as values, else 1.
    """
    if not adapter:
        return [conditions] * steps

    def split(x: Tensor, block: int) -> Tensor:
        """Of one half, (batch / halves, heads, N, C / heads)."""
        batch, heads = conditions.keys[block].shape[:2]
        return split_heads(x.expand(batch // halves, -1, -1), heads)

    keys = [
        {block: torch.cat([split(key, block)] * halves) for block, (key, _) in image.blocks.items()}
        for image in adapter
    ]
    values = [
        {block: beside_zeros(split(value * image.scale, block), halves) for block, (_, value) in image.blocks.items()}
        for image in adapter
    ]
    masks = tuple(image.mask for image in adapter)
    uses: dict[tuple[bool, ...], Conditions] = {}
    by_step = []
    for step in range(steps):
        active = tuple(image.start <= step / steps < image.end for image in adapter)
        if active not in uses:
            tokens = {
                block: tuple(
                    ImageTokens(key[block], value[block] if used else torch.zeros_like(value[block]))
                    for key, value, used in zip(keys, values, active, strict=True)
                )
                for block in adapter[0].blocks
            }
            uses[active] = conditions._replace(images=tokens, masks=masks)
        by_step.append(uses[active])
    return by_step
