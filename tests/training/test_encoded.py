"""Encoded pictures: sources, encoding, files, recipes, and training on them."""

import io
import json
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cascade.guides.image_prompts import ImagePromptEncoder
from cascade.networks.unet import StableCascadeUNet
from cascade.stages.encoder import encode_pixels
from cascade.stages.text import TextEncoder
from cascade.weights import ModelFolder
from cascade.weights.variants import VARIANTS
from scripts import encode_pictures, train_stage_c
from tests.training.sharded_training import SIZES, WIDTH, write_pictures
from training.encoded.recipe import read_recipe
from training.encoded.shards import EncodedPictures, shard_file
from training.encoded.sources import Picture, units_of
from training.errors import TrainingError

ROOT = Path(__file__).parents[2]
MINI = ROOT / "weights" / "mini"
CPU = torch.device("cpu")


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(content := io.BytesIO(), "png")
    return content.getvalue()


def write_tar(file: Path, members: Mapping[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))


# Sources


def test_samples_of_a_shard(tmp_path: Path) -> None:
    members = {
        "a/1.txt": b" a cat ",
        "a/1.JPG": b"first",
        "a/1.json": b'{"caption": "not this one"}',
        "b/1.webp": b"second",
        "b/1.json": b'{"caption": "a dog"}',
        "2.txt": b"without a picture",
        "3.png": b"without a caption",
        "4.png": b"not UTF-8",
        "4.txt": b"\xff\xfe\xff",
        "5.png": b"a list",
        "5.json": b"[]",
        "6.seg.png": b"another picture",
        "6.png": b"third",
        "6.txt": "größer".encode(),
        "6.cls": b"7",
    }
    file = tmp_path / "00012.tar"
    write_tar(file, members)
    (unit,) = units_of(file)
    assert unit.name == "00012"
    assert list(unit.pictures()) == [
        Picture(f"a/1.jpg of {file}", b"first", "a cat"),
        Picture(f"b/1.webp of {file}", b"second", "a dog"),
        Picture(f"6.png of {file}", b"third", "größer"),
    ]


def test_shards_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for name in ("x/00000.tar", "y/00000.tar"):
        write_tar(tmp_path / name, {"1.png": name.encode(), "1.txt": b""})
    units = units_of(tmp_path)
    assert [unit.name for unit in units] == ["x-00000", "y-00000"]
    assert [next(unit.pictures()).content for unit in units] == [b"x/00000.tar", b"y/00000.tar"]


def test_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.encoded.sources.UNIT", 2)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    units = units_of(tmp_path)
    assert [unit.name for unit in units] == ["pictures-00000", "pictures-00001"]
    assert [one.content for unit in units for one in unit.pictures()] == [b"\x00", b"\x01", b"\x02"]
    (tmp_path / "1.txt").unlink()
    with pytest.raises(TrainingError, match=r"1\.png has no caption"):
        units_of(tmp_path)


def test_a_damaged_shard(tmp_path: Path) -> None:
    file = tmp_path / "00000.tar"
    write_tar(file, {"1.png": png(64, 64), "1.txt": b"noise"})
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(TrainingError, match=r"00000.tar is damaged, or not a tar file: unexpected end of data\.$"):
        list(units_of(file)[0].pictures())
    with pytest.raises(TrainingError, match=r"There is no .+nowhere; name a folder of pictures or of tar files"):
        units_of(tmp_path / "nowhere")


# Encoding


@pytest.mark.slow
def test_what_is_encoded_is_what_requests_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The latents, the image prompt and the text; two sizes; a damaged picture is left out."""
    damaged = png(256, 256)[:-500]
    members = {"1.png": png(256, 256), "1.txt": b"a red apple", "2.png": damaged, "2.txt": b"damaged"}
    write_tar(tmp_path / "tars" / "0.tar", {**members, "3.png": png(512, 256), "3.txt": b"a wide picture"})
    arguments = [str(tmp_path / "tars"), str(tmp_path / "made"), "--weights", str(MINI)]
    assert encode_pictures.main(arguments) == 0
    made = load_file(shard_file(tmp_path / "made", "0"))
    assert {name: tuple(value.shape) for name, value in made.items() if name.endswith("latents")} == {
        "256x256.latents": (1, 16, 6, 6),
        "176x368.latents": (1, 16, 5, 9),
    }
    folder = ModelFolder.open(MINI)
    image = Image.open(io.BytesIO(png(256, 256)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    reader = TextEncoder(folder.load_component("tokenizer"), folder.load_component("text_encoder"))
    expected = {
        "latents": encode_pixels(folder.load_component("effnet"), pixels),
        "image": ImagePromptEncoder(
            folder.load_component("feature_extractor"), folder.load_component("image_encoder")
        ).encode([image]),
    }
    for text, tensors in (("a red apple", made), ("", load_file(tmp_path / "made" / "empty.safetensors"))):
        found = reader.encode([text])
        prefix = "256x256." if text else ""
        for name, value in {"text": found.tokens, "pooled": found.pooled}.items():
            torch.testing.assert_close(tensors[f"{prefix}{name}"].view(value.shape), value.half(), rtol=0, atol=2e-3)
    for name, value in expected.items():
        torch.testing.assert_close(made[f"256x256.{name}"], value.half(), rtol=0, atol=2e-3)


@pytest.mark.slow
def test_encoding_goes_on_after_a_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_tar(tmp_path / "tars" / f"{number}.tar", {"1.png": png(256, 256, number), "1.txt": b"noise"})
    whole = (tmp_path / "tars" / "1.tar").read_bytes()
    (tmp_path / "tars" / "1.tar").write_bytes(whole[:2000])
    arguments = [str(tmp_path / "tars"), str(tmp_path / "made"), "--weights", str(MINI), "--resolution", "128"]
    assert encode_pictures.main(arguments) == 1
    assert capsys.readouterr().err.endswith("1.tar is damaged, or not a tar file: unexpected end of data.\n")
    first, second = (shard_file(tmp_path / "made", name) for name in "01")
    time = first.stat().st_mtime_ns
    assert not second.exists()
    (tmp_path / "tars" / "1.tar").write_bytes(whole)
    assert encode_pictures.main(arguments) == 0
    assert first.stat().st_mtime_ns == time
    assert second.exists()


def test_a_resolution_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode_pictures.main([str(tmp_path), str(tmp_path / "made"), "--resolution", "64"]) == 1
    assert capsys.readouterr().err == "--resolution is 64; it must be from 128 to 2048.\n"


# Files


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    """18 pictures of two sizes, of which 5 are held out."""
    write_pictures(tmp_path / "encoded")
    return tmp_path / "encoded"


def test_drawing(encoded: Path) -> None:
    pictures = EncodedPictures(encoded, CPU)
    assert (len(pictures), pictures.held_out) == (13, 5)
    assert pictures.widths() == {"image": WIDTH, "text": WIDTH, "pooled": WIDTH}
    sizes = set()
    for index in range(12):
        one, other, again = (
            pictures.draw(index, 3, torch.Generator().manual_seed(seed)) for seed in (index, 99, index)
        )
        assert all(torch.equal(one[name], again[name]) for name in one)
        # Processes draw other pictures, of the same size.
        assert one["latents"].shape == other["latents"].shape
        assert not torch.equal(one["latents"], other["latents"])
        sizes.add(one["latents"].shape[-2:])
    assert sizes == {(3, 3), (5, 3)}


def test_a_picture_keeps_its_caption_and_held_out_ones_are_not_drawn(encoded: Path) -> None:
    pictures = EncodedPictures(encoded, CPU)
    texts = {}
    for file in pictures.files:
        tensors = load_file(file)
        for size in ("128x128", "192x128"):
            for latents, text in zip(tensors[f"{size}.latents"], tensors[f"{size}.text"], strict=True):
                texts[latents.numpy().tobytes()] = text.float()
    drawn = set()
    for index in range(60):
        batch = pictures.draw(index, 4, torch.Generator().manual_seed(index))
        for latents, text in zip(batch["latents"], batch["text"], strict=True):
            key = latents.half().numpy().tobytes()
            assert torch.equal(texts[key], text)
            drawn.add(key)
    held_out = {one.half().numpy().tobytes() for batch in pictures.unseen(16) for one in batch["latents"]}
    assert (len(drawn), len(held_out)) == (13, 5)
    assert not drawn & held_out
    assert sum(len(batch["latents"]) for batch in pictures.unseen(4)) == 4


def test_folders_that_are_no_encoded_pictures(encoded: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no encoded pictures; make them with scripts/encode-pictures"):
        EncodedPictures(tmp_path, CPU)
    save_file({"weight": torch.zeros(1)}, shard_file(encoded, "2"))
    with pytest.raises(
        TrainingError, match=r"2.safetensors is damaged \(it has 'weight', which is of no encoded picture"
    ):
        EncodedPictures(encoded, CPU)
    shard_file(encoded, "2").write_bytes(shard_file(encoded, "1").read_bytes()[:-50])
    with pytest.raises(TrainingError, match=r"2.safetensors is damaged \(.+\); remove it and encode it again"):
        EncodedPictures(encoded, CPU)


# Recipes and training

RECIPE = f"""
[prior]
{"".join(f"{name} = {json.dumps(value)}{chr(10)}" for name, value in SIZES.items())}
[options]
steps = 3
batch_size = 2
learning_rate = 1e-3
evaluate_every = 2
[task]
weight = {{ kind = "adaptive" }}
drop_text = 0.1
keep_image = 0.5
"""


def test_the_published_configuration() -> None:
    """Its network is the published Stage C, and a step has the authors' 512 pictures on 4 GPUs."""
    recipe = read_recipe(ROOT / "training" / "published.toml")
    (published,) = [variant for variant in VARIANTS if variant.name == "prior"]
    with torch.device("meta"):
        made, expected = StableCascadeUNet(**recipe.prior), StableCascadeUNet(**published.config)
    assert json.dumps(made.config) == json.dumps(expected.config)
    assert 4 * recipe.options.batch_size * recipe.options.accumulate == 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[task]", "[tasks]"), r"The configuration has an unknown name tasks; it may hold prior, options, task\."),
        (("keep_image = 0.5", ""), r"\[task\] lacks keep_image\."),
        (("keep_image = 0.5", "keep_image = 5"), r"\[task\] keep_image is 5; it must be from 0 to 1\."),
        (('"adaptive"', '"none"'), r"\[task\]: weight.kind is 'none'; it must be one of p2, adaptive\."),
        (("steps = 3", "steps = 0"), r"steps is 0; it must be at least 1\."),
        (("[2, 2]", "[3, 3]"), r"No Stage C can be built from \[prior\]: num_attention_heads, 3, does not divide .+\."),
    ],
)
def test_wrong_recipes(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.replace(*change, 1))
    with pytest.raises(TrainingError, match=f"^{said}$"):
        read_recipe(file)


@pytest.mark.slow
def test_training_from_the_command_line(encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text(RECIPE)
    output = tmp_path / "run"
    arguments = [str(encoded), "--config", str(config), "--output", str(output)]
    assert train_stage_c.main([*arguments, "--minutes", "0"]) == 0  # writes the network it begins with
    first = StableCascadeUNet.from_pretrained(output / "prior").state_dict()
    assert train_stage_c.main(arguments) == 0
    trained = StableCascadeUNet.from_pretrained(output / "prior").state_dict()
    assert not torch.equal(trained["clf.1.weight"], first["clf.1.weight"])
    stored = load_file(output / "prior" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert json.loads((output / "training" / "record.json").read_text())["sessions"][-1]["last"] == 3


@pytest.mark.slow
def test_a_published_network_is_trained_further(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "recipe.toml"
    config.write_text(RECIPE)
    arguments = [str(encoded), "--config", str(config), "--output", str(tmp_path / "run"), "--weights", str(MINI)]
    assert train_stage_c.main(arguments) == 1
    widths = tomllib.loads((ROOT / "miniature" / "mini.toml").read_text())["prior"]
    assert capsys.readouterr().err == (
        f"{encoded}: image embeddings have 16 numbers, and Stage C's clip_image_in_channels is "
        f"{widths['clip_image_in_channels']}; they must be equal.\n"
    )
