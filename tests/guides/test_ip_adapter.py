"""The IP-Adapter in the chain: what its inputs do to pictures, and when they are refused."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from cascade import sizes
from cascade.guides.controls import Control
from cascade.guides.ip_adapter import mask_of_latents, read_mask
from cascade.limits import InputError
from cascade.loras.lora import Lora
from cascade.pipeline import Cascade
from cascade.request import Request
from cascade.running.graphs import GraphCache, GraphedUNet
from cascade.running.placement import MemoryMode
from cascade.weights import ModelFolder, WeightsError
from scripts.save_weights import main as save_weights
from tests.components import make_ip_adapter
from tests.loras.files import lora
from tests.running.test_graphs import Replay
from tests.running.test_memory import make_cached
from tests.test_pipeline import photo
from tests.tiny import count_calls, make_cascade

SETTINGS = {"width": 128, "height": 128, "steps_prior": 4, "steps_decoder": 1}
PLAIN = Request("a cat", **SETTINGS)
LEFT = Image.new("L", (64, 64))
LEFT.paste(255, (0, 0, 32, 64))


@pytest.fixture(scope="module")
def cascade(components: dict[str, Any]) -> Cascade:
    return make_cascade(components)


def asked(**options: Any) -> Request:
    return replace(PLAIN, **{"ip_adapter_images": (photo(90, 70),), **options})


def made(cascade: Cascade, request: Request) -> bytes:
    (image,) = cascade.generate(request)
    return image.tobytes()


def near(one: bytes, other: bytes) -> bool:
    """Whether pictures are equal, except for rounding: weights at other addresses may be multiplied in another order."""
    values = (np.frombuffer(pixels, np.uint8).astype(int) for pixels in (one, other))
    return len(one) == len(other) and np.abs(np.subtract(*values)).max() <= 1


def test_every_input_changes_the_picture(cascade: Cascade) -> None:
    different = [
        PLAIN,
        asked(),
        asked(ip_adapter_images=(photo(70, 90),)),
        asked(ip_adapter_images=(photo(90, 70), photo(70, 90))),
        asked(ip_adapter_scales=[0.5]),
        asked(ip_adapter_scales=[2]),
        asked(ip_adapter_masks=[LEFT]),
        asked(ip_adapter_masks=[Image.new("L", (8, 8), 128)]),
        asked(ip_adapter_mode="style"),
        asked(ip_adapter_starts=[0.5]),
        asked(ip_adapter_ends=[0.5]),
        asked(image_prompts=(photo(90, 70),)),
        asked(controls=(Control("canny", photo(90, 70)),)),
    ]
    pictures = [made(cascade, one) for one in different]
    assert [(i, pictures.index(one)) for i, one in enumerate(pictures) if pictures.index(one) < i] == []


def test_without_it_pictures_are_what_they_were(
    components: dict[str, Any], cascade: Cascade, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither loaded, nor at scale 0, nor asked for: and then neither it nor the image encoder runs."""
    without = make_cascade({name: part for name, part in components.items() if name != "ip_adapter"})
    plain = made(without, PLAIN)
    cascade = make_cascade(components)
    calls = count_calls(cascade.ip_adapter, monkeypatch)
    assert made(cascade, PLAIN) == plain
    assert made(cascade, asked(ip_adapter_scales=[0])) == plain
    assert calls == []
    two = asked(ip_adapter_images=(photo(90, 70), photo(70, 90)), ip_adapter_scales=(1, 0))
    assert made(cascade, two) == made(cascade, asked())
    assert calls == [1, 1]
    untrained = make_cascade({**components, "ip_adapter": make_ip_adapter()})
    assert made(untrained, asked()) == plain


def test_one_forward_serves_all_pictures_of_a_batch(
    components: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = make_cascade(components, max_batch=1), make_cascade(components, max_batch=3)
    calls = count_calls(many.ip_adapter, monkeypatch)
    requests = [asked(prompt="a cat", seed=1), asked(prompt="two dogs", seed=2, num_images=2)]
    images = many.batch(requests)
    assert calls == [1]
    for one, request in zip(images, requests, strict=True):
        for image, alone in zip(one, few.generate(request), strict=True):
            difference = torch.tensor(list(image.tobytes())).int() - torch.tensor(list(alone.tobytes())).int()
            assert difference.abs().max() <= 1


def test_without_guidance(cascade: Cascade) -> None:
    off = {"guidance_scale_prior": 1.0, "guidance_scale_decoder": 1.0}
    assert made(cascade, asked(**off)) != made(cascade, replace(PLAIN, **off))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ip_adapter_images": ()}, "ip_adapter_scales needs ip_adapter_images, which is left out."),
        (
            {"ip_adapter_scales": (1, 1)},
            "ip_adapter_scales has 2 values; it must have 1, one for each of ip_adapter_images.",
        ),
        ({"ip_adapter_scales": (2.5,)}, "ip_adapter_scales[0] is 2.5; it must be a number from 0 to 2."),
        (
            {"ip_adapter_masks": (LEFT, LEFT)},
            "ip_adapter_masks has 2 images; it must have 1, one for each of ip_adapter_images.",
        ),
        (
            {"ip_adapter_masks": (Image.new("L", (5, 5)),)},
            "ip_adapter_masks[0] is black all over, so that its image would be used nowhere.",
        ),
        ({"ip_adapter_mode": "face"}, "ip_adapter_mode is 'face'; it must be one of all, style, composition."),
        (
            {"ip_adapter_starts": (0.5,), "ip_adapter_ends": (0.5,)},
            "ip_adapter_starts[0] is 0.5; it must be less than ip_adapter_ends[0], which is 0.5.",
        ),
        (
            {"ip_adapter_images": [photo(9, 9)] * 5, "ip_adapter_scales": ()},
            "ip_adapter_images has 5 images; it may have at most 4.",
        ),
    ],
)
def test_refused_in_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        asked(**{"ip_adapter_scales": (1,), **options})
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        (
            {"ip_adapter": None},
            {},
            "This model has no IP-Adapter, which ip_adapter_images need; docs/ip-adapter.md says",
        ),
        (
            {"ip_adapter": make_ip_adapter(block_channels=32)},
            {},
            "The IP-Adapter was trained for a Stage C of width 32 in attention block 0; this one has 16.",
        ),
        (
            {},
            {"ip_adapter_mode": "composition"},
            "ip_adapter_mode is 'composition', but the IP-Adapter's configuration",
        ),
    ],
)
def test_a_model_that_cannot(
    components: dict[str, Any], changes: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    """And makes other pictures all the same."""
    cascade = make_cascade({**components, **changes})
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        cascade.generate(asked(**options))
    assert len(cascade.generate(PLAIN)) == 1


@settings(max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(64, 500), st.integers(64, 500), st.booleans())
def test_masks_of_every_size_become_shares_of_latents(
    width: int, height: int, across: int, down: int, transparent: bool
) -> None:
    mask = Image.new("RGBA", (width, height), (255, 255, 255, 128) if transparent else "white")
    shares = mask_of_latents(read_mask("mask", mask), (down, across))
    assert tuple(shares.shape[2:]) == sizes.semantic_size(*sizes.native_size(down, across))
    assert torch.allclose(shares, torch.full_like(shares, 128 / 255 if transparent else 1.0))


def test_a_mask_lies_where_it_was_painted() -> None:
    shares = mask_of_latents(read_mask("mask", LEFT), (256, 256))[0, 0]
    assert torch.equal(shares, torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(6, 6))
    wide = mask_of_latents(read_mask("mask", LEFT), (128, 256))[0, 0]  # of the square, the middle half is used
    assert torch.equal(wide, torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(3, 6))


# ---- in every way to run ----


@pytest.mark.parametrize("choice", [MemoryMode("offload"), MemoryMode("stream", 0)])
def test_memory_modes_change_no_picture(components: dict[str, Any], cascade: Cascade, choice: MemoryMode) -> None:
    """Copies are late, and what is overwritten or missing when a network reads it is noticed."""
    cached = make_cached(components, choice)
    assert cached.runner.weights.streams("prior") == (choice.name == "stream")
    two = asked(
        ip_adapter_images=(photo(90, 70), photo(70, 90)),
        ip_adapter_masks=(LEFT, Image.new("L", (1, 1), 200)),
        ip_adapter_ends=(0.5, 1),
    )
    for request in (PLAIN, asked(), two, replace(two, controls=(Control("canny", photo(90, 70)),)), PLAIN):
        assert near(made(cached, request), made(cascade, request))


@pytest.mark.slow
def test_graphs_are_replayed(components: dict[str, Any], cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image, scale, mask or span needs no new graph of Stage C; another number of images does."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    graphed = make_cascade(components)
    graphs = graphed.runner.graphs = GraphCache(capture=Replay, devices=("cpu",))
    graphed._prior = GraphedUNet(graphed.prior, "prior", graphs)
    alike = [
        asked(),
        asked(ip_adapter_images=(photo(70, 90),), ip_adapter_scales=(0.5,)),
        asked(ip_adapter_starts=(0.25,), ip_adapter_ends=(0.75,)),
        asked(),
    ]
    masked = [asked(ip_adapter_masks=(one,)) for one in (LEFT, Image.new("L", (9, 9), 99))]
    expected = {id(request): made(cascade, request) for request in (*alike, *masked, PLAIN)}
    for group in (alike, masked, [PLAIN], alike, masked):
        assert made(graphed, group[0]) == expected[id(group[0])]
        before = len(graphs)
        assert before > 0
        for request in group:
            assert made(graphed, request) == expected[id(request)]
        assert len(graphs) == before


def test_with_a_lora(components: dict[str, Any], cascade: Cascade, tmp_path: Path) -> None:
    change = Lora(lora(components, tmp_path / "a.safetensors", 1))
    requests = [PLAIN, asked(), replace(PLAIN, loras=(change,)), asked(loras=(change,))]
    pictures = [made(cascade, request) for request in requests]
    assert len(set(pictures)) == len(pictures)
    assert made(cascade, asked()) == pictures[1]


# ---- files ----


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "ip_adapter" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_from_a_folder_and_back(components: dict[str, Any], cascade: Cascade, folder: Path) -> None:
    loaded = Cascade.load(folder, device="cpu")
    assert near(made(loaded, asked()), made(cascade, asked()))
    shutil.rmtree(folder / "ip_adapter")
    description = (folder / "model.json").read_text()
    (folder / "model.json").write_text("\n".join(x for x in description.splitlines() if '"ip_adapter/' not in x))
    with pytest.raises(ValueError, match="no IP-Adapter"):
        Cascade.load(folder, device="cpu").generate(asked())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("image_proj.latents"), " has no tensor image_proj.latents, by "),
        (
            lambda tensors: tensors.update({"ip_adapter.1.to_v_ip.weight": torch.zeros(16, 3)}),
            ": ip_adapter.1.to_v_ip.weight has the shape (16, 3) instead of (16, 16), by ",
        ),
        (
            lambda tensors: tensors.update({"ip_adapter.2.to_k_ip.weight": torch.zeros(16, 16)}),
            " has a tensor ip_adapter.2.to_k_ip.weight, which its network does not have, by ",
        ),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(folder: Path, change: Any, said: str) -> None:
    rewrite(folder, change)
    with pytest.raises(WeightsError) as error:
        ModelFolder.open(folder, check=False).load_component("ip_adapter")
    assert said in str(error.value)
    assert str(error.value).count(". ") == 0


def test_a_changed_weight_is_found(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["image_proj.latents"].add_(1e-3))
    with pytest.raises(WeightsError, match=r"ip_adapter/diffusion_pytorch_model\.safetensors is damaged"):
        ModelFolder.open(folder).load_component("ip_adapter")


def test_save_weights_takes_and_keeps_it(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    """Taken from a folder of its own; kept when another network is replaced."""
    mine = shutil.copytree(folder / "ip_adapter", tmp_path / "mine")
    rewrite(folder, lambda tensors: tensors["image_proj.latents"].add_(1.0))
    expected = load_file(mine / "diffusion_pytorch_model.safetensors")
    output = tmp_path / "made"
    for arguments in (["--ip-adapter", mine], ["--prior", model_folder / "prior"]):
        more = ["--base", model_folder, "--output", output, "--download", tmp_path / "none"]
        assert save_weights([str(one) for one in (*arguments, *more)]) == 0
        opened = ModelFolder.open(output)
        opened.verify()
        state = opened.load_component("ip_adapter").state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_an_adapter_of_another_image_encoder_is_not_saved(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_ip_adapter(feature_dim=24)
    copy.deepcopy(other).save_pretrained(tmp_path / "other")
    more = ["--base", model_folder, "--output", tmp_path / "made", "--download", tmp_path / "none"]
    assert save_weights(["--ip-adapter", str(tmp_path / "other"), *map(str, more)]) == 1
    assert "feature_dim of ip_adapter is 24, but hidden_size of image_encoder is 16" in capsys.readouterr().err
