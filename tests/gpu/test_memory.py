"""Every memory mode makes the pictures of the resident one, within its bounds."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.guides.controls import Control
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.running.graphs import GraphCache
from cascade.running.packing import HostWeights
from cascade.running.placement import GIB, MemoryMode, available
from cascade.running.precompile import precompile
from cascade.stages.pixels import decode_pixels
from tests.conftest import MINI
from tests.gpu.full_size import make_stage_a, published_config
from tests.hub.repositories import write_download

CHOICES = {"offload": MemoryMode("offload"), "stream": MemoryMode("stream"), "tight": MemoryMode("stream", 0)}
DTYPES = [torch.bfloat16, torch.float32]


def difference(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Absolute, of 255. Both pictures show something."""
    one, other = (np.asarray(image).astype(int) for image in (first, second))
    assert min(one.std(), other.std()) > 1
    return np.abs(one - other)


def load(folder: Path, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Cascade:
    """mode: one of Cascade's, or "tight": as little as it can do with."""
    if mode == "tight":
        monkeypatch.setattr("cascade.loading.choose_memory", lambda *_: CHOICES["tight"])
        mode = "auto"
    loaded = Cascade.load(folder, "cuda", dtype, max_batch=2, memory=mode)
    monkeypatch.undo()
    return loaded


def make_requests(image: Image.Image) -> list[Request]:
    small = {"width": 256, "height": 256, "steps_prior": 4, "steps_decoder": 3}
    return [
        Request("a red apple on a green background", num_images=3, **small),
        Request("a blue cup", "fog", seed=5, **{**small, "width": 200, "height": 320}),
        Request("a blue cup", image=image, prompt_strength=0.6, image_prompts=(image,), seed=1, **small),
        Request("a blue cup", image=image, prompt_strength=0.0, **small),
        Request("a blue cup", image=image, mask=Image.new("L", image.size, "white"), **small),
        Request("a cup", controls=(Control("canny", image), Control("super_resolution", image)), **small),
        Request("a cup", ip_adapter_images=(image,), **small),
        Request(
            "a cup",
            num_images=2,
            ip_adapter_images=(image, image.rotate(90)),
            ip_adapter_scales=(0.5, 1),
            ip_adapter_masks=(Image.new("L", (8, 8), 99), Image.new("L", (8, 8), 255)),
            ip_adapter_ends=(0.5, 1),
            controls=(Control("canny", image),),
            **small,
        ),
        Request("a red apple on a green background", num_images=3, **small),
        *(Request("a red apple", seed=seed, **small) for seed in range(5)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", list(CHOICES))
def test_every_mode_makes_the_pictures_of_the_resident_one(
    mini_with_controlnets: Path, monkeypatch: pytest.MonkeyPatch, mode: str, dtype: torch.dtype
) -> None:
    """Twice: the second time from graphs that were recorded when other networks had been in the cache."""
    resident = load(mini_with_controlnets, "resident", dtype, monkeypatch)
    other = load(mini_with_controlnets, mode, dtype, monkeypatch)
    assert resident.runner.description == "all networks resident"
    assert other.runner.weights.streams("prior") == (mode != "offload")
    assert other.runner.weights.streams("decoder") == (mode == "tight")
    (image,) = resident.generate(Request("a green ball", width=256, height=256, steps_prior=4, steps_decoder=3))
    for request in [*make_requests(image)] * 2:
        for one, two in zip(resident.generate(request), other.generate(request), strict=True):
            assert difference(one, two).max() <= 1
    assert difference(resident.reconstruct(image), other.reconstruct(image)).max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_change_no_picture(
    mini_with_controlnets: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Those of encoders and ControlNets, too; and what is done where memory does not suffice for graphs."""
    graphed = load(mini_with_controlnets, "resident", dtype, monkeypatch)
    plain = load(mini_with_controlnets, "resident", dtype, monkeypatch)
    (image,) = graphed.generate(Request("a green ball", width=256, height=256, steps_prior=4, steps_decoder=3))
    for request in [*make_requests(image)] * 2:
        with monkeypatch.context() as patch:
            patch.setattr(GraphCache, "run", torch.no_grad()(lambda _, key, function, *given: function(*given)))
            expected = plain.generate(request)
        for one, two in zip(graphed.generate(request), expected, strict=True):
            assert difference(one, two).max() <= 1
    assert len(graphed.runner.graphs) > 8
    assert len(plain.runner.graphs) == 0


@pytest.mark.parametrize("mode", list(CHOICES))
def test_what_runs_between_the_steps_disturbs_nothing(
    mini_with_controlnets: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    resident = load(mini_with_controlnets, "resident", torch.bfloat16, monkeypatch)
    other = load(mini_with_controlnets, mode, torch.bfloat16, monkeypatch)
    request = Request("a red apple", num_images=3, width=256, height=256, steps_prior=4, steps_decoder=3)
    (image,) = resident.generate(Request("a blue cup", width=256, height=256, steps_prior=4, steps_decoder=3))
    for one, two in zip(resident.steps(request), other.steps(request), strict=True):
        if one.stage == "prior":
            assert difference(resident.preview(one.latents)[0], other.preview(two.latents)[0]).max() <= 1
        elif one.stage == "decoder":
            torch.testing.assert_close(other.encode(image), resident.encode(image), rtol=1e-2, atol=1e-2)
        elif one.stage == "image":
            assert difference(one.image, two.image).max() <= 1
    next(other.steps(request))  # stopped halfway
    for one, two in zip(resident.generate(request), other.generate(request), strict=True):
        assert difference(one, two).max() <= 1


def test_what_was_learned_is_forgotten_when_more_memory_is_free(caplog: pytest.LogCaptureFixture) -> None:
    """On the miniature: four pictures at a time, fewer where another takes the memory, and four again."""
    loaded = Cascade.load(MINI, "cuda:0", memory="resident")
    request = Request("a red apple", num_images=4, width=1024, height=1024, steps_prior=1, steps_decoder=1)

    def batches() -> int:
        progress = list(loaded.steps(request))
        assert sum(one.image is not None for one in progress) == 4
        return sum(one.stage == "decoder" for one in progress)

    assert batches() == 1
    total = torch.cuda.get_device_properties(0).total_memory
    for spare in range(2000, 0, -100):  # MiB
        loaded.runner.graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare * 2**20) / total)
        if (made := batches()) > 1:
            break
    assert made > 1
    caplog.clear()
    assert batches() == made
    assert "Out of memory" not in caplog.text
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert batches() == 1
    assert "Out of memory" not in caplog.text


def copies_beside_the_work(source: torch.Tensor) -> bool:
    """Whether a copy can be asked for while the GPU is busy, without waiting for it. What `Tensor.is_pinned` says of memory
    that was registered depends on the driver."""
    target = torch.empty_like(source, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)  # cycles: half a second
    target.copy_(source, non_blocking=True)
    busy = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    return busy


def test_what_is_packed_is_pinned_and_given_back() -> None:
    packed = HostWeights(torch.nn.Linear(1000, 1000), pin=True)
    assert copies_beside_the_work(packed.host)
    assert packed.host.numel() < packed.size + 2**14
    pages = packed.host
    del packed
    gc.collect()
    assert not copies_beside_the_work(pages)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_have_no_seams(exact_float32: None, dtype: torch.dtype) -> None:
    vqgan = make_stage_a(published_config("vqgan"), seed=3, device="cuda").to(dtype)
    latents = 10 * torch.randn(1, 4, 200, 256, generator=torch.Generator().manual_seed(0)).to("cuda")
    (whole,) = decode_pixels(vqgan, latents)
    assert whole.std() > 0.05
    for tile in (24, 64, 100, 128):
        (tiled,) = decode_pixels(vqgan, latents, tile=tile)
        assert (whole - tiled).abs().mean() <= (0.5 / 255 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_preparing_kernels_keeps_little_memory(precision: str) -> None:
    """Of many threads, one calls cuBLAS, for each of which torch keeps a workspace: 32 MiB on an H100, and 1 for cuBLASLt."""
    loaded = Cascade.load(MINI, "cuda", torch.bfloat16, memory="resident", precision=precision)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    kept = torch.cuda.memory_allocated()
    print(f"{precision}: cuBLAS's workspaces have {(before - kept) / 2**20:.0f} MiB.")
    precompile([loaded.prior, loaded.decoder], loaded.vqgan)
    assert torch.cuda.memory_allocated() - kept <= 40 * 2**20


# ---- full size ----


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 GB of disk."""
    folder = tmp_path_factory.mktemp("full")
    parts = ["tokenizer", "feature_extractor", "text_encoder", "image_encoder", "prior", "decoder", "vqgan", "effnet"]
    write_download(folder, [*parts, "previewer"], device="cuda")
    torch.cuda.empty_cache()
    return folder


@pytest.fixture(scope="module")
def pictures() -> dict[int, Image.Image]:
    """By their size: what the first mode made."""
    return {}


@contextlib.contextmanager
def limited(gib: float) -> Iterator[None]:
    """This process to so much of the GPU's memory, of which nothing is taken."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def make(loaded: Cascade, size: int, pictures: dict[int, Image.Image], **options: int) -> None:
    """A picture like that of the other modes."""
    request = Request("An astronaut on a horse", width=size, height=size, steps_prior=2, steps_decoder=1, **options)
    images = loaded.generate(request)
    assert len(images) == request.num_images
    assert images[0].size == (size, size)
    if request.num_images == 1:
        assert difference(pictures.setdefault(size, images[0]), images[0]).mean() <= 0.5


@pytest.mark.parametrize(("mode", "bound"), [("resident", 13.0), ("offload", 8.5), ("stream", 4.0)])
def test_peaks_at_full_size(full_size: Path, pictures: dict[int, Image.Image], mode: str, bound: float) -> None:
    with limited(40):
        loaded = Cascade.load(full_size, memory=mode)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            make(loaded, 1024, pictures)
        peak = torch.cuda.max_memory_allocated() / GIB
        print(f"{loaded.runner.description}: {peak:.2f} GiB")
        assert peak <= bound
        del loaded


def test_weights_in_8_bits_leave_room_on_a_card_of_8_gib(full_size: Path) -> None:
    """What a second picture takes, whose graphs are captured: at most 7 GiB, but for the image encoder and the networks that
    only image inputs need."""
    request = Request("An astronaut on a horse", width=1024, height=1024, guidance_scale_decoder=1.0)
    with limited(40):
        loaded = Cascade.load(full_size, memory="resident", precision="int8")
        loaded.generate(request)
        torch.cuda.reset_peak_memory_stats()
        loaded.generate(request)
        others = (loaded.image_prompts.encoder, loaded.effnet, loaded.previewer)
        without = sum(tensor.nbytes for network in others for tensor in network.state_dict().values())
        peak, weights = torch.cuda.max_memory_allocated() - without, loaded_bytes(loaded)
        stats = torch.cuda.memory_stats()
        slack = stats["allocated_bytes.all.current"] - stats["requested_bytes.all.current"]
        print(
            f"{peak / GIB:.2f} GiB, of which weights {weights / GIB:.2f}; blocks are {slack / 2**20:.0f} MiB too large."
        )
        assert peak <= 7 * GIB
        del loaded, others


def loaded_bytes(loaded: Cascade) -> int:
    """Of the weights that every picture needs."""
    networks = (loaded.text.encoder, loaded.prior, loaded.decoder, loaded.vqgan)
    return sum(tensor.nbytes for network in networks for tensor in network.state_dict().values())


@pytest.mark.parametrize(("gib", "modes"), [(16, "resident"), (12, "offload"), (8, "offload stream"), (6, "stream")])
def test_limits_at_full_size(full_size: Path, pictures: dict[int, Image.Image], gib: int, modes: str) -> None:
    """24 GiB, too, are for `resident`, of which a peak below 13 GiB has been seen above."""
    with limited(gib):
        loaded = Cascade.load(full_size)
        print(f"{gib} GiB: {loaded.runner.description}")
        assert any(mode in loaded.runner.description for mode in modes.split())
        make(loaded, 1024, pictures)
        if gib >= 12:
            make(loaded, 2048, pictures)
            make(loaded, 2048, pictures, num_images=2)
        else:
            with contextlib.suppress(torch.OutOfMemoryError):
                make(loaded, 2048, {})
            make(loaded, 1024, pictures, num_images=4)
        make(loaded, 1024, pictures)
        del loaded


def test_more_than_there_is_is_not_chosen() -> None:
    with limited(10):
        assert available(torch.device("cuda", 0)) <= 10 * GIB
        held = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        assert available(torch.device("cuda", 0)) <= 9 * GIB
        del held
