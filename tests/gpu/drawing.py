"""Random tensors on the GPU, and how far results are from what they should be."""

import torch
from torch import Tensor


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, over the expected one's."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
