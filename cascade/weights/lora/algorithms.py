"""The change that each kind of adapter makes to a weight, in float32.

Each function takes the base weight W, (out, in[, kh, kw]), the adapter's tensors by the names of `parts.SUFFIXES`, and the
factor of a low-rank product, alpha / rank. It returns trained W - W, in the shape of W. Formulas: lycoris-lora 4.1.3
(`lycoris/modules`), peft 0.21.2 (`peft/tuners`), Stability-AI/StableCascade `modules/lora.py` for broadcasting.

The strength of an adapter is a factor on the result, so it interpolates linearly between W and the trained W. For DoRA and
OFT, each training program interpolates in its own, different way.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


def _flat(weight: Tensor) -> Tensor:
    """(out, in * kh * kw)."""
    return weight.flatten(1)


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """A factor that is stored as a matrix, or as a 1x1 convolution."""
    if tensor.ndim < 2 or math.prod(tensor.shape[2:]) != 1:
        raise ValueError(f"{name} is not a matrix")
    return tensor.flatten(1)


def _like(delta: Tensor, weight: Tensor) -> Tensor:
    """A product as a change of the weight. It must have the weight's rows: an equal number of elements is not enough."""
    if delta.numel() != weight.numel() or len(delta) != len(weight):
        raise ValueError("another shape")
    return delta.reshape(weight.shape)


def lora(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """up @ down. With `mid` (r, r, kh, kw), a Tucker decomposition of a convolution."""
    up, down = _matrix("up", t["up"]), t["down"]
    if "mid" in t:
        return _like(torch.einsum("ijkl,pi,jr->prkl", t["mid"], up, _matrix("down", down)) * scale, weight)
    product = up @ down.flatten(1)
    if weight.ndim == 4 and product.shape == weight.shape[:2]:
        # The authors' adapters of convolutions have one number for all taps of a kernel.
        return (product * scale)[:, :, None, None].expand_as(weight)
    return _like(product * scale, weight)


def lora_fits(weight: Sequence[int], up: Sequence[int], down: Sequence[int]) -> bool:
    """Whether `lora`, without `mid`, takes factors of these shapes. The meta device gives the same answer, but takes 100
    times as long; an adapter of all layers of Stage C has 650 pairs.
    """
    if len(up) < 2 or len(down) < 2 or math.prod(up[2:]) != 1 or up[1] != down[0] or up[0] != weight[0]:
        return False
    columns = math.prod(down[1:])
    return columns == math.prod(weight[1:]) or (len(weight) == 4 and columns == weight[1])


def loha(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """The elementwise product of two low-rank matrices; with `t1` and `t2` (r, r, kh, kw), of two Tucker decompositions."""
    factors = []
    for i in ("1", "2"):
        a, b = t[f"w{i}_a"], t[f"w{i}_b"]
        factors.append(torch.einsum("ijkl,jr,ip->prkl", t[f"t{i}"], b, a) if f"t{i}" in t else a @ b)
    return _like(factors[0] * factors[1] * scale, weight)


def lokr(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """The Kronecker product of two matrices, each stored in full or at low rank; the second may be a convolution's."""
    first = t["k1"] if "k1" in t else t["k1_a"] @ t["k1_b"]
    if "k2" in t:
        second = t["k2"]
    elif "k2_t" in t:
        second = torch.einsum("ijkl,jr,ip->prkl", t["k2_t"], t["k2_b"], t["k2_a"])
    else:
        second = t["k2_a"] @ t["k2_b"].flatten(1)
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return _like(torch.kron(first, second.contiguous()) * scale, weight)


def glora(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """W a1 a2 + b1 b2, where a1 a2 mixes the inputs."""
    a1, a2, b1 = (_matrix(name, t[name]) for name in ("a1", "a2", "b1"))
    if weight.shape[1:2] != a1.shape[:1]:
        raise ValueError("another number of inputs")
    mixed = torch.einsum("oj...,jr,ri->oi...", weight, a1, a2)
    return (mixed + _like(b1 @ t["b2"].flatten(1), weight)) * scale


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """Rotations (I + Q)(I - Q)^-1 of Q = B - B^T, for blocks B (..., b, b). A norm of Q above `limit`, if positive, becomes
    `limit`."""
    q = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        q = q * (limit / (q.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(q.shape[-1], device=q.device)
    return torch.linalg.solve(eye - q, eye + q, left=False)


def _rescaled(rotated: Tensor, t: Tensors) -> Tensor:
    return rotated * t["rescale"].reshape(-1, *[1] * (rotated.ndim - 1)) if "rescale" in t else rotated


def oft(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """OFT of the outputs: `oft_blocks` (n, b, b) rotate the rows of W, b by b. `scale` is the constraint, a part of the number
    of outputs."""
    rotations = _cayley(t["oft_blocks"], scale * len(weight))
    rows = weight.reshape(*rotations.shape[:2], *weight.shape[1:])
    rotated = torch.einsum("knm,kn...->km...", rotations, rows).reshape(weight.shape)
    return _rescaled(rotated, t) - weight


def boft(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """BOFT: `oft_blocks` (m, n, b, b) are m such rotations, one after the other, each of rows in another order (a butterfly).
    `scale` as in `oft`."""
    rotations = _cayley(t["oft_blocks"], scale * len(weight))
    half = rotations.shape[-1] // 2
    rotated = weight
    for i, rotation in enumerate(rotations):
        stride = 2**i * half
        rows = rotated.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
        rows = torch.einsum("bij,bj...->bi...", rotation, rows.unflatten(0, rotation.shape[:2])).flatten(0, 1)
        rotated = rows.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return _rescaled(rotated, t) - weight


def oft_inputs(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """OFT of the inputs (OneTrainer, PEFT): `oft_R` (n, b (b - 1) / 2), the upper triangles of Q row by row. One block may
    serve all inputs.

    scale: how many terms of the series of the Cayley transform R = (I + Q)(I - Q)^-1 are summed (5 in both programs); 0: R is
        (I - Q)(I + Q)^-1, exactly, as PEFT has it then.
    """
    triangles = t["oft_R"]
    if triangles.ndim != 2:
        raise ValueError("oft_R is not a matrix")
    size = (1 + math.isqrt(1 + 8 * triangles.shape[1])) // 2
    if size * (size - 1) // 2 != triangles.shape[1]:
        raise ValueError("oft_R has no triangles")
    rows, columns = torch.triu_indices(size, size, 1, device=triangles.device)
    q = triangles.new_zeros(len(triangles), size, size)
    q[:, rows, columns] = triangles
    q = q - q.transpose(1, 2)
    eye = torch.eye(size, device=q.device)
    if scale == 0:
        rotations = torch.linalg.solve(eye + q, eye - q, left=False)
    else:
        rotations, power = eye.expand_as(q), eye
        for term in range(1, int(scale)):
            power = power @ q
            # The last term is added once, as in PEFT. With two terms, the last one is the linear one, which PEFT adds twice.
            rotations = rotations + (1 if term == scale - 1 and term > 1 else 2) * power
    columns_of = _flat(weight).unflatten(1, (-1, size))
    if len(rotations) not in (1, columns_of.shape[1]):
        raise ValueError("another number of blocks")
    rotated = torch.einsum("okj,kij->oki", columns_of, rotations.expand(columns_of.shape[1], -1, -1))
    return rotated.reshape(weight.shape) - weight


def ia3(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """W times one factor per output (LyCORIS stores the factor - 1)."""
    return weight * t["weight"].reshape(-1, *[1] * (weight.ndim - 1))


def ia3_inputs(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """The same, with one factor per input."""
    return weight * t["weight"].reshape(-1, *[1] * (weight.ndim - 2))


def ia3_factors(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """W, or a bias, times `ia3_l` (PEFT): one factor per output if `scale` is 1, one per input if it is 0."""
    return weight * (t["ia3_l"].reshape(-1, *[1] * (weight.ndim - (1 if scale else 2))) - 1)


def difference(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """The stored difference itself, for weights, biases and norms."""
    return _like(t["diff"] * scale, weight)


def replacement(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """The trained weight is stored in full."""
    return _like(t["set"], weight) - weight


def rows(weight: Tensor, t: Tensors, scale: float) -> Tensor:
    """Adds to some rows: `indices` (n), `vectors` (n, in)."""
    return torch.zeros_like(weight).index_add_(0, t["indices"], t["vectors"])


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (arXiv:2402.09353): trained W is m V / |V| with V = W + delta, and |V| one norm per output or per input.

    magnitude: m, (out), (out, 1, ..) or (1, in, ..).
    """
    changed = weight + delta
    axis = 1 if magnitude.ndim > 1 and magnitude.shape[:2] == (1, weight.shape[1]) and len(weight) != 1 else 0
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError("another number of magnitudes")
    others = [dim for dim in range(weight.ndim) if dim != axis]
    shape = [1] * weight.ndim
    shape[axis] = -1
    norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    return changed * (magnitude.reshape(shape) / norm) - weight
