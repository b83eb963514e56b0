"""Pictures up to 4096x4096: memory at full size, tiles that share graphs, and what tiles change.

Prints the seconds and the peaks of the published sizes; `pytest -s` shows them.
"""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade import Cascade, Request, sizes
from cascade.request import upscaling
from cascade.running.placement import GIB
from cascade.sampling import Noise, finish
from cascade.stages.decoder import SAMPLES, decoder_steps
from cascade.stages.pixels import decode_pixels
from cascade.stages.tiles import Tiles
from miniature.evaluate_large import seam
from tests.conftest import MINI
from tests.gpu.test_memory import CHOICES, difference, limited, load
from tests.hub.repositories import write_download
from training.pictures import psnr

SHORT = {"steps_prior": 3, "steps_decoder": 3}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 GB of disk."""
    folder = tmp_path_factory.mktemp("full")
    parts = ["tokenizer", "feature_extractor", "text_encoder", "image_encoder", "prior", "decoder", "vqgan", "effnet"]
    write_download(folder, [*parts, "previewer", "controlnet_super_resolution"], device="cuda")
    torch.cuda.empty_cache()
    return folder


def seconds(loaded: Cascade, runs: int = 2, **options: object) -> float:
    """Of a picture in 20 + 10 steps with the model's guidance, 4 and 1.1: the last of some runs, after one that captures."""
    request = Request("An astronaut on a horse", **options)
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        (image,) = loaded.generate(request)
        torch.cuda.synchronize()
        taken = time.perf_counter() - start
        assert image.size == (request.width, request.height)
        assert np.asarray(image).std() > 1
    return taken


@pytest.mark.parametrize(("mode", "bound"), [("resident", 16.0), ("offload", 12.0), ("stream", 6.0)])
def test_peaks_at_4096(full_size: Path, mode: str, bound: float) -> None:
    largest = {"width": sizes.LARGEST, "height": sizes.LARGEST}
    with limited(70):
        loaded = Cascade.load(full_size, memory=mode)
        for compression in (64.0, 42.67):
            torch.cuda.reset_peak_memory_stats()
            taken = seconds(loaded, compression=compression, **largest)
            peak = torch.cuda.max_memory_allocated() / GIB
            print(f"{loaded.runner.description}, 4096x4096 at {compression}: {taken:.2f} s, {peak:.2f} GiB")
            assert peak <= bound
        del loaded


def test_compression_64_saves_time_at_2048(full_size: Path) -> None:
    """Prints how much; what can be counted are the latents of Stage C."""
    with limited(70):
        loaded = Cascade.load(full_size, memory="resident")
        for compression, side in ((42.67, 48), (64.0, 32)):
            taken = seconds(loaded, runs=3, width=2048, height=2048, compression=compression)
            print(f"2048x2048 at {compression}: {taken:.3f} s")
            steps = loaded.steps(Request("a cat", width=2048, height=2048, compression=compression, **SHORT))
            latents = next(one.latents for one in steps if one.stage == "prior")
            assert latents.shape == (1, 16, side, side)
        del loaded


def test_a_chain_at_full_size(full_size: Path) -> None:
    """1024, twice enlarged, in `stream`, in 6 GiB."""
    with limited(6.5):
        loaded = Cascade.load(full_size, memory="stream")
        (image,) = loaded.generate(Request("a cat", width=1024, height=1024, **SHORT))
        for side in (2048, 4096):
            (image,) = loaded.generate(upscaling(image, "a cat", compression=64, **SHORT))
            assert image.size == (side, side)
        print(f"1024 -> 2048 -> 4096: {torch.cuda.max_memory_allocated() / GIB:.2f} GiB")
        del loaded


@pytest.mark.parametrize("mode", list(CHOICES))
def test_every_mode_makes_the_large_pictures_of_the_resident_one(
    mini_with_controlnets: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    resident = load(mini_with_controlnets, "resident", torch.float32, monkeypatch)
    other = load(mini_with_controlnets, mode, torch.float32, monkeypatch)
    (image,) = resident.generate(Request("a green ball", width=256, height=256, **SHORT))
    large = {"width": 2500, "height": 1304, "compression": 64, **SHORT}
    wide = image.resize((2500, 1304))
    mask = Image.new("L", wide.size)
    mask.paste(255, (300, 300, 2000, 900))
    requests = [
        Request("a red apple on a green background", **large),
        Request("a blue cup", "fog", guidance_scale_decoder=1.5, **large),
        Request("a blue cup", image=image, prompt_strength=0.6, **large),
        Request("a blue cup", image=wide, mask=mask, compression=64, **SHORT),
    ]
    for request in requests * 2:
        (one,), (two,) = resident.generate(request), other.generate(request)
        assert one.size == (2500, 1304)
        assert difference(one, two).max() <= 1
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(one)[outside], np.asarray(wide)[outside])


def test_pictures_whose_tiles_have_one_size_share_graphs() -> None:
    loaded = Cascade.load(MINI, "cuda", torch.bfloat16, memory="resident")
    tile = ("tile", *Tiles(1024, 1024).edges)
    request = {"compression": 64, **SHORT}
    loaded.generate(Request("a red apple", width=4096, height=4096, **request))
    assert tile in loaded.runner.graphs.sizes
    captured: list[torch.Size] = []
    hook = loaded.decoder.register_forward_pre_hook(lambda _, given: captured.append(given[0].shape))
    with hook:  # a network runs only while it is captured
        for width, height in ((4096, 4000), (4000, 4096)):
            assert Tiles(*sizes.decoder_size(height, width)).edges == tile[1:]
            loaded.generate(Request("a red apple", width=width, height=height, **request))
    assert captured == []


def test_short_memory_at_4096(caplog: pytest.LogCaptureFixture) -> None:
    """On the miniature: with ever less memory, the picture is still made, with fewer tiles at a time in the end."""
    loaded = Cascade.load(MINI, "cuda", torch.bfloat16, memory="resident")
    request = Request("a red apple", width=4096, height=4096, compression=64, **SHORT)
    (expected,) = loaded.generate(request)
    used = torch.cuda.memory_allocated() / GIB
    made = 0
    for spare in (4.0, 3.0, 2.5, 2.0, 1.6, 1.3, 1.1, 0.9):
        loaded.runner.drop_graphs()
        with limited(used + spare):
            try:
                (image,) = loaded.generate(request)
            except torch.OutOfMemoryError:
                break
        made += 1
        assert difference(image, expected).mean() <= 0.5
    print(f"4096x4096 was made with {made} of 8 limits: {[one.getMessage() for one in caplog.records]}")
    assert made
    assert "Out of memory with 3 tiles of a picture at a time of 4096x4096" in caplog.text


def test_tiles_are_the_whole_within_bounds() -> None:
    """On the miniature, at the largest size that is made as a whole. Of a picture of its own, enlarged."""
    loaded = Cascade.load(MINI, "cuda", torch.float32, memory="resident")
    size = sizes.decoder_size(sizes.WHOLE, sizes.WHOLE)
    decibels, whole, tiled = [], [], []
    for seed, prompt in enumerate(("a red apple on a green background", "a blue cup", "a scooter", "two cats")):
        (image,) = loaded.generate(Request(prompt, seed=seed))
        semantic = loaded.encode(image.resize((sizes.WHOLE, sizes.WHOLE), Image.Resampling.LANCZOS))
        pooled = loaded.text.encode([prompt]).pooled
        for made, at_once in ((whole, None), (tiled, SAMPLES)):
            noise = Noise([seed], "cuda")
            options = {"size": size, "noise": noise, "guidance": 1.0, "at_once": at_once}
            latents = finish(decoder_steps(loaded.decoder, semantic, pooled, **options))
            made += decode_pixels(loaded.vqgan, latents, loaded.stage_a_scale, tile=256)
        assert whole[-1].std() > 0.01
        decibels.append(psnr(tiled[-1][None], whole[-1][None]))
    seams = [seam(made, Tiles(*size)) for made in (tiled, whole)]
    print(f"PSNR of tiles beside the whole: {decibels}; seams in tiles and as a whole: {seams}")
    assert min(decibels) >= 35
    assert seams[0] <= 1.05 * max(1, seams[1])
