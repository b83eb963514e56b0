"""What `predict.py` does around its imports."""

import gc
from pathlib import Path

import pytest

from serving import early


def test_no_garbage_is_looked_for_in_what_was_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_WEIGHTS", str(tmp_path))
    early.begin()
    assert not gc.isenabled()
    kept = [[] for _ in range(1000)]
    early.end()
    assert gc.isenabled()
    assert not any(one is kept for one in gc.get_objects())
    assert gc.get_freeze_count() > 1000
