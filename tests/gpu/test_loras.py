"""Adapters on a GPU: in every memory mode, and after any others, the pictures of a fresh model with them, to the bit."""

import copy
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade import Cascade, Lora, Request, kernels, sizes
from cascade.loras.merging import Loras
from cascade.networks.unet import StableCascadeUNet
from cascade.running.placement import GIB
from cascade.running.runner import Runner
from cascade.weights.folder import ModelFolder
from cascade.weights.lora import merged
from cascade.weights.reading import read_tensors
from scripts.benchmark_loras import own_memory
from scripts.stand_ins import shapes_of, write_lora
from tests.components import make_decoder, make_text_encoder, make_tokenizer
from tests.conftest import MINI
from tests.gpu.full_size import make_unet, published_config, random_conditions
from tests.gpu.test_memory import load
from tests.gpu.test_precision import error
from tests.hub.repositories import write_download

MODES = ("resident", "offload", "stream", "tight")
SMALL = {"width": 256, "height": 256, "steps_prior": 4, "steps_decoder": 2}
REQUEST = Request("a red apple on a green background", num_images=2, **SMALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, networks = tmp_path_factory.mktemp("loras"), ("prior", "text_encoder")
    return {
        "a": write_lora(folder / "a.safetensors", shapes_of(MINI, networks), 4, seed=1),
        "b": write_lora(folder / "b.safetensors", shapes_of(MINI, (*networks, "decoder")), 8, seed=2),
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


def test_merging_does_not_wait_for_the_gpu(files: dict[str, Path]) -> None:
    """Otherwise the GPU would be idle while the next tensors are read and launched."""
    loaded = Cascade.load(MINI, "cuda", torch.bfloat16, memory="resident")
    loaded.generate(REQUEST)
    selection = loaded._loras.select(asked(files, "ab").loras)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loaded._loras.apply(selection)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    """Rank 64 on all Linears of Stage C: pictures of the same weights are the same, and memory is bounded."""
    shapes = shapes_of(full_size)
    paths = [write_lora(tmp_path / f"{seed}.safetensors", shapes, 64, seed, size=0.002) for seed in (1, 2)]
    request = {"width": 1024, "height": 1024, "steps_prior": 4, "steps_decoder": 2}
    gc.collect()
    torch.cuda.empty_cache()
    loaded = Cascade.load(full_size, memory=mode)
    base = loaded.generate(Request("a cat", **request))
    torch.cuda.reset_peak_memory_stats()
    loaded.generate(Request("a cat", **request))
    peak, host = torch.cuda.max_memory_allocated(), own_memory()
    seen: dict[str, list[Image.Image]] = {}
    for which in ("0", "1", "01", "1", "0", ""):
        made = loaded.generate(Request("a cat", loras=[Lora(paths[int(one)]) for one in which], **request))
        assert same(made, seen.setdefault(which, made))
    assert same(made, base)
    assert torch.cuda.max_memory_allocated() - peak <= 0.5 * GIB
    assert own_memory() - host <= GIB


@pytest.mark.usefixtures("exact_float32")
def test_a_merged_prediction_is_as_exact_as_the_base(tmp_path: Path) -> None:
    """In bfloat16, each against its float32: of a file in float32, and of one that has been rounded already.

    The latter's base has no error of rounded weights, and with a LoRA it has: as much as a file in float32 has anyway.
    """
    errors = merging_errors(
        tmp_path, published_config("prior"), sizes.semantic_size(1024, 1024), rank=64, device="cuda", draws=8
    )
    print(", ".join(f"{name} {value:.3%}" for name, value in errors.items()))
    assert errors["change"] > 0.05
    assert errors["merged"] <= 1.1 * errors["base"]
    assert errors["rounded merged"] <= 1.1 * errors["base"]


class Stored(NamedTuple):
    """Base weights that a network of another dtype has."""

    network: StableCascadeUNet

    def read(
        self, network: str, names: Sequence[str], device: torch.device, current: object
    ) -> Iterator[tuple[str, Tensor]]:
        state = self.network.state_dict()
        return ((name, state[name].to(device)) for name in names)


def merging_errors(
    folder: Path, config: dict[str, Any], size: tuple[int, int], *, rank: int, device: str, draws: int
) -> dict[str, float]:
    """Relative errors of bfloat16 predictions: "base" and "merged" of float32 weights, rounded once; "rounded base" and
    "rounded merged" of weights that bfloat16 has exactly, where only what is merged is rounded. "change": what the LoRA does.

    What rounded weights do is much the same at every pixel, so it has few degrees of freedom, and differs by a sixth between
    draws of weights. These are root mean squares over `draws` of them.
    """
    rounded = make_unet(config, latent_size=size, semantic_size=size, seed=1, device=device)
    shapes = {name: tuple(tensor.shape) for name, tensor in rounded.state_dict().items()}
    found: dict[str, list[float]] = {}
    for draw in range(draws):
        lora = write_lora(folder / f"{draw}.safetensors", {"prior": shapes}, rank, seed=draw, size=0.005)
        for kind, stored in (("", unrounded(rounded, seed=draw)), ("rounded ", rounded)):
            base = predictions(stored, size)
            merged = [predictions(with_lora(stored, half, lora), size) for half in (False, True)]
            errors = {
                f"{kind}base": error(predictions(halved(stored), size), base),
                f"{kind}merged": error(merged[1], merged[0]),
                "change": error(merged[0], base),
            }
            for name, value in errors.items():
                found.setdefault(name, []).append(value)
    return {name: float(np.sqrt(np.mean(np.square(values)))) for name, values in found.items()}


@torch.no_grad()
def unrounded(network: StableCascadeUNet, seed: int) -> StableCascadeUNet:
    """The network with weights that bfloat16 does not have: changed by up to 1.6 %, which is 2 to 4 of its last places, so that
    rounding errs as it does for any number, evenly up to half of the last place.
    """
    changed = copy.deepcopy(network)
    generator = torch.Generator(network.device).manual_seed(seed)
    for tensor in changed.parameters():
        tensor.mul_(1 + 2**-6 * (2 * torch.rand(tensor.shape, generator=generator, device=tensor.device) - 1))
    return changed


def halved(network: StableCascadeUNet) -> StableCascadeUNet:
    half = copy.deepcopy(network).bfloat16()
    half.use_kernels(kernels.choose(half.device, half.dtype).name)
    return half


def with_lora(stored: StableCascadeUNet, half: bool, lora: Path) -> StableCascadeUNet:
    """The network with a LoRA in its weights, as a loaded model has it, in bfloat16 or in float32."""
    network = halved(stored) if half else copy.deepcopy(stored)
    tokenizer = make_tokenizer()
    others = {"decoder": make_decoder(), "text_encoder": make_text_encoder(tokenizer)}
    loras = Loras({"prior": network, **others}, tokenizer.get_vocab, Runner(network.device), Stored(stored))
    loras.apply(loras.select([Lora(lora)]))
    return network


@torch.no_grad()
def predictions(network: StableCascadeUNet, size: tuple[int, int]) -> Tensor:
    """Float32, of the same four noises and conditions, which bfloat16 has exactly, at three times each."""
    torch.manual_seed(5)
    sample = torch.randn(4, network.config.in_channels, *size).bfloat16().float().to(network.device)
    given = random_conditions(network.config, size, len(sample))
    conditions = {name: x.to(network.device, network.dtype) for name, x in given.items()}
    times = [torch.full((len(sample),), time, device=network.device) for time in (0.99, 0.5, 0.1)]
    return torch.cat([network(sample, time, **conditions) for time in times])
