"""Adapters on a GPU: in every memory mode, and after any others, the pictures of a fresh model with them, to the bit."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from cascade import Cascade, Lora, Request
from cascade.running.placement import GIB
from cascade.weights.folder import ModelFolder
from cascade.weights.lora import merged
from cascade.weights.reading import read_header, read_tensors
from tests.conftest import MINI
from tests.gpu.test_memory import load
from tests.hub.repositories import write_download

MODES = ("resident", "offload", "stream", "tight")
SMALL = {"width": 256, "height": 256, "steps_prior": 4, "steps_decoder": 2}
REQUEST = Request("a red apple on a green background", num_images=2, **SMALL)


def write_lora(
    folder: Path, path: Path, rank: int, seed: int, networks: Sequence[str] = ("prior",), size: float = 0.02
) -> Path:
    """A LoRA of all matrices and 1x1 convolutions of a model folder's networks, in bfloat16."""
    files = ModelFolder.open(folder).standard_files(networks)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for network, paths in files.items():
        for name, (shape, _) in read_header(paths).items():
            if not name.endswith(".weight") or len(shape) < 2 or "depthwise" in name or "_embedding" in name:
                continue
            stem, (rows, columns, *kernel) = f"{network}.{name.removesuffix('.weight')}", shape
            if any(side != 1 for side in kernel):
                continue
            down = torch.randn(rank, columns, *kernel, generator=generator) / columns**0.5
            up = size * torch.randn(rows, rank, *kernel, generator=generator)
            tensors |= {f"{stem}.lora_A.weight": down.bfloat16(), f"{stem}.lora_B.weight": up.bfloat16()}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, networks = tmp_path_factory.mktemp("loras"), ("prior", "text_encoder")
    return {
        "a": write_lora(MINI, folder / "a.safetensors", 4, 1, networks),
        "b": write_lora(MINI, folder / "b.safetensors", 8, 2, (*networks, "decoder")),
    }


def asked(files: dict[str, Path], which: str, request: Request = REQUEST) -> Request:
    loras = [Lora(files[name], scale) for name, scale in (("a", 1.0), ("b", 0.7)) if name in which]
    return Request(**{**vars(request), "loras": loras})


def same(first: Sequence[Image.Image], second: Sequence[Image.Image]) -> bool:
    return all(np.array_equal(np.array(one), np.array(other)) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_loras_leaves_no_trace(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype
) -> None:
    """Twice the round: graphs that were captured with other weights read the new ones."""
    fresh = {
        which: load(MINI, mode, dtype, monkeypatch).generate(asked(files, which)) for which in ("", "a", "b", "ab")
    }
    assert not any(same(fresh[which], fresh[""]) for which in ("a", "b", "ab"))
    loaded = load(MINI, mode, dtype, monkeypatch)
    for which in ["", "a", "b", "ab", "", "ab", "a", ""] * 2:
        assert same(loaded.generate(asked(files, which)), fresh[which]), which


@pytest.mark.parametrize("mode", MODES)
def test_a_change_that_ends_in_the_middle_is_put_right(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    fresh = {which: load(MINI, mode, torch.bfloat16, monkeypatch).generate(asked(files, which)) for which in ("", "a")}
    loaded = load(MINI, mode, torch.bfloat16, monkeypatch)
    read = loaded._loras.base.read
    for after, then in ((1, ""), (30, "a"), (60, "")):

        def some(*given: object, after: int = after) -> object:
            for number, item in enumerate(read(*given)):
                if number == after:
                    raise KeyboardInterrupt
                yield item

        broken = asked(files, "b" if then == "a" else "ab")
        monkeypatch.setattr(loaded._loras.base, "read", some)
        with pytest.raises(KeyboardInterrupt):
            loaded.generate(broken)
        monkeypatch.setattr(loaded._loras.base, "read", read)
        assert same(loaded.generate(asked(files, then)), fresh[then])


def test_merged_weights_are_rounded_once(files: dict[str, Path]) -> None:
    """Computed on the GPU, they are those that a CPU computes in float32 and rounds, but for sums in another order."""
    loaded = Cascade.load(MINI, "cuda", torch.bfloat16, memory="resident")
    loaded.generate(asked(files, "ab"))
    selection = Cascade.load(MINI, "cpu")._loras.select(asked(files, "ab").loras)
    stored = read_tensors(ModelFolder.open(MINI).standard_files(["prior"])["prior"])
    state = loaded.prior.state_dict()
    for name in selection.placed[0].changes["prior"]:
        changes = [
            (change, one.scale)
            for one, placed in zip(selection.chosen, selection.placed, strict=True)
            for change in placed.changes["prior"].get(name, [])
        ]
        exact = merged(stored[name], changes)
        made, rounded = state[name].cpu(), exact.bfloat16()
        assert (made != rounded).float().mean() < 1e-3, name
        assert (made.float() - exact).abs().max() <= exact.abs().max() * 2**-8


# ---- full size ----


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 GB of disk."""
    folder = tmp_path_factory.mktemp("full")
    write_download(folder, ["tokenizer", "text_encoder", "prior", "decoder", "vqgan"], device="cuda")
    torch.cuda.empty_cache()
    return folder


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_changes_at_full_size(full_size: Path, tmp_path: Path, mode: str) -> None:
    """Rank 64 on all Linears of Stage C. Prints seconds; bounds the memory beside the weights."""
    paths = [write_lora(full_size, tmp_path / f"{seed}.safetensors", 64, seed, size=0.002) for seed in (1, 2)]
    request = {"width": 1024, "height": 1024, "steps_prior": 4, "steps_decoder": 2}
    gc.collect()
    torch.cuda.empty_cache()
    loaded = Cascade.load(full_size, memory=mode)
    base = loaded.generate(Request("a cat", **request))
    torch.cuda.reset_peak_memory_stats()
    loaded.generate(Request("a cat", **request))
    peak, host = torch.cuda.max_memory_allocated(), _resident()
    seen: dict[str, list[Image.Image]] = {}
    for which in ("0", "1", "01", "1", "0", ""):
        loras = [Lora(paths[int(one)]) for one in which]
        torch.cuda.synchronize()
        start = time.perf_counter()
        selection = loaded._loras.select(loras)
        read = time.perf_counter() - start
        loaded._loras.apply(selection)
        torch.cuda.synchronize()
        print(f"{mode} {which or 'base'}: read {read:.2f} s, changed in all {time.perf_counter() - start:.2f} s")
        made = loaded.generate(Request("a cat", loras=loras, **request))
        assert same(made, seen.setdefault(which, made))
    assert same(made, base)
    more = torch.cuda.max_memory_allocated() - peak, _resident() - host
    print(f"{mode}: GPU peak + {more[0] / GIB:.2f} GiB, host + {more[1] / GIB:.2f} GiB")
    assert more[0] <= 0.5 * GIB
    assert more[1] <= GIB


def _resident() -> int:
    """Bytes of this process that are in memory and its own: not pages of files."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
