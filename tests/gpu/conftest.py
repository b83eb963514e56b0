"""What the tests on a GPU share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def exact_float32() -> Iterator[None]:
    """float32 is float32: without TensorFloat-32, which torch allows convolutions by default."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_float32_matmul_precision(products)
