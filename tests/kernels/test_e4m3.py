"""Constants of products in e4m3 keep their addresses, which CUDA graphs capture."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from cascade.kernels import e4m3


def test_threads_that_need_a_constant_at_the_same_time_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e4m3, "_constants", {})
    both, full = threading.Barrier(2, timeout=60), torch.full

    def slow(*given: Any, **named: Any) -> torch.Tensor:
        both.wait()  # neither has made its own yet
        return full(*given, **named)

    monkeypatch.setattr(torch, "full", slow)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda rows: e4m3._constant(torch.device("cpu"), 0.5, rows), (5, 8)))
    assert [one.tolist() for one in made] == [[[0.5]] * 5, [[0.5]] * 8]
    assert made[0].data_ptr() == made[1].data_ptr()
