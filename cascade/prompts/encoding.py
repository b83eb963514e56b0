"""Chunks -> hidden states: the text encoder, the vectors of embeddings in place of words, and the weights.

A weight w changes a token's hidden state z to e + w (z - e), where e is the hidden state of the empty prompt at the same
place (ComfyUI, comfy/sd1_clip.py, `encode_token_weights`). It changes only states that the text encoder returns. So the
states of the following tokens, end of text and padding included, and the pooled embedding are computed from the word at its
full weight. See `weighted_pooled` for the latter.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cascade.networks.clip import TextTower
from cascade.prompts.chunks import Chunk, Special
from cascade.prompts.text import TextEmbeddings

Encoder = Callable[..., tuple[Tensor, Tensor]]


def encoder_of(network: TextTower) -> Encoder:
    """A function of tensors, which a graph can replay.

    It takes ids and mask, int64 (B, 77); and, for embeddings, vectors (B, 77, D) and their places, bool (B, 77, 1). It
    returns the last layer's hidden states before the final layer norm, (B, 77, D), and the projection of the first end-of-text
    token, (B, 1, P).
    """

    def encode(ids: Tensor, mask: Tensor, *embeddings: Tensor) -> tuple[Tensor, Tensor]:
        def placed(_: object, __: object, words: Tensor) -> Tensor:
            vectors, places = embeddings
            return torch.where(places, vectors, words)

        # The network takes only ids, like transformers', which training uses.
        hook = network.get_input_embeddings().register_forward_hook(placed) if embeddings else None
        try:
            output = network(ids, attention_mask=mask, output_hidden_states=True)
        finally:
            if hook is not None:
                hook.remove()
        return output.hidden_states[-1], output.text_embeds.unsqueeze(1)

    return encode


def encode(
    prompts: Sequence[Sequence[Chunk]],
    special: Special,
    run: Encoder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ends_early: bool,
    weight_pooled: bool = False,
) -> list[TextEmbeddings]:
    """Encode prompts, all of their chunks in one forward.

    Args:
        prompts: the chunks of each.
        run: the result of `encoder_of`, or a function that calls it.
        device, dtype: the text encoder's.
        ends_early: see `Chunk.mask`.
        weight_pooled: whether weights act on the pooled embeddings too, see `weighted_pooled`. ComfyUI's do not.

    Returns:
        One per prompt, each with batch 1 and the prompt's own length.
    """
    rows = list(itertools.chain.from_iterable(prompts))
    states, pooled = run(*_inputs(rows, special, device, dtype, ends_early))
    weights = torch.tensor([row.all_weights(special) for row in rows], dtype=torch.float32)
    firsts = [0, *itertools.accumulate(len(prompt) for prompt in prompts)]
    pooled = pooled[firsts[:-1]]
    if (weights != 1).any():
        # In separate forwards: more rows would change the rounding of products, and so the states of words of weight 1.
        empty, _ = run(*_inputs([Chunk((), ())], special, device, dtype, ends_early))
        states = weighted(states, empty, weights.to(device))
        without = [(i, *one) for i, prompt in enumerate(prompts) for one in prompt[0].without_each_weight()]
        if weight_pooled and without:
            _, others = run(*_inputs([chunk for _, _, chunk in without], special, device, dtype, ends_early))
            pooled = weighted_pooled(pooled, others, [i for i, _, _ in without], [weight for _, weight, _ in without])
    return [
        TextEmbeddings(states[first:last].flatten(0, 1)[None], pooled[i : i + 1])
        for i, (first, last) in enumerate(itertools.pairwise(firsts))
    ]


def weighted(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """e + w (z - e), in float32; where the weight is 1, z as it is.

    Args:
        states: z, (B, 77, D).
        empty: e, (1, 77, D), of the empty prompt.
        weights: w, float32 (B, 77).
    """
    w = weights[..., None]
    z, e = states.float(), empty.float()
    return torch.where(w == 1, z, e + w * (z - e)).to(states.dtype)


def weighted_pooled(pooled: Tensor, others: Tensor, places: Sequence[int], weights: Sequence[float]) -> Tensor:
    """p plus the sum of (w - 1) (p - p_w), in float32: p_w is the pooled embedding of the prompt without its words of weight w.

    To first order in the words, each counts w times. If all weighted words have weight 0, it is the pooled embedding of the
    prompt without them. This formula is our own: ComfyUI's weights do not change the pooled embedding, which is all that
    Stage B gets of a text.

    Args:
        pooled: p, (B, 1, P).
        others: p_w, (N, 1, P).
        places: for each of `others`, the index of its prompt among the B.
        weights: for each of `others`, w.
    """
    original = pooled.float()
    result = original.clone()
    for other, place, weight in zip(others.float(), places, weights, strict=True):
        result[place] = result[place] + (weight - 1) * (original[place] - other)
    return result.to(pooled.dtype)


def _inputs(
    rows: Sequence[Chunk], special: Special, device: torch.device, dtype: torch.dtype, ends_early: bool
) -> list[Tensor]:
    ids = torch.tensor([row.ids(special) for row in rows], device=device)
    mask = torch.tensor([row.mask(special, ends_early=ends_early) for row in rows], device=device)
    placed = {
        (row, place): token.vector
        for row, chunk in enumerate(rows)
        for place, token in enumerate(chunk.tokens, 1)
        if token.vector is not None
    }
    if not placed:
        return [ids, mask]
    at = tuple(torch.tensor(list(placed)).T)
    stacked = torch.stack(list(placed.values()))
    vectors = torch.zeros(*ids.shape, stacked.shape[1], dtype=dtype)
    vectors[at] = stacked.to(dtype)
    places = torch.zeros(*ids.shape, 1, dtype=torch.bool)
    places[at] = True
    return [ids, mask, vectors.to(device), places.to(device)]
