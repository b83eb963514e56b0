"""Embedding files: their formats, and those that are refused."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.prompts.conversion import convert
from cascade.prompts.embeddings import EmbeddingError, Embeddings
from scripts.convert_embedding import main

WIDTH = 6


def rows(count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


A, B, NARROW = rows(2), rows(3, 1), rows(2, 2, width=4)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"clip_g": A, "clip_l": NARROW}, A),
        ({"clip_g": A, "clip_g_out": B}, A),
        ({"string_to_param.*": A, "a": B}, A),
        ({"bundle_emb.x.clip_g": A, "bundle_emb.x.clip_l": NARROW, "lora.weight": rows(3, 4)}, A),
        ({"bundle_emb.x.clip_g": A, "bundle_emb.y.clip_g": B}, torch.cat([A, B])),
        ({"bundle_emb.x.string_to_param.*": A, "bundle_emb.x.clip_g": B}, A),
        ({"emb_params": A}, A),
        ({"<cat>": A[0]}, A[:1]),
        ({"<cat>": A[0].half()}, A[:1].half().float()),
        ({"clip_g": A.bfloat16()}, A.bfloat16().float()),
    ],
)
def test_formats(content: dict[str, Tensor], expected: Tensor, tmp_path: Path) -> None:
    save_file(content, tmp_path / "cat.safetensors")
    found = Embeddings(WIDTH, tmp_path).find("cat")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"clip_g": NARROW},
            "vectors of 4 numbers, and this model's text encoder takes 6: it was made for another model",
        ),
        ({"clip_g": rows(6)[None]}, r"a tensor of shape \(1, 6, 6\), not \(n, 6\)"),
        ({"clip_g": torch.zeros(0, WIDTH)}, r"a tensor of shape \(0, 6\), not \(n, 6\)"),
        ({"clip_g": torch.full((1, WIDTH), torch.inf)}, "numbers that are not finite"),
        ({"bundle_emb.x.clip_g": A, "bundle_emb.y.clip_g": NARROW}, "vectors of 4 numbers"),
        ({"clip_g": torch.tensor(1.0)}, r"a tensor of shape \(\), not \(n, 6\)"),
        ({}, "no tensors"),
    ],
)
def test_what_is_refused(content: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(content, tmp_path / "cat.safetensors")
    with pytest.raises(EmbeddingError, match=rf"^cat\.safetensors has {message}"):
        Embeddings(WIDTH, tmp_path).find("cat")


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "cat.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(EmbeddingError, match=r"^cat\.safetensors is damaged or no safetensors file"):
        Embeddings(WIDTH, tmp_path).find("cat")


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"cat{suffix}").write_bytes(b"not even a pickle")
    embeddings = Embeddings(WIDTH, tmp_path)
    for name in ("cat", f"cat{suffix}"):
        with pytest.raises(EmbeddingError, match=r"is a pickle, .* convert it with scripts/convert-embedding"):
            embeddings.find(name)
    assert embeddings.names() == []
    save_file({"clip_g": A}, tmp_path / "cat.safetensors")
    assert torch.equal(embeddings.find("cat"), A)


def test_names(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"clip_g": A}, outside)
    folder = tmp_path / "embeddings"
    for path, content in (("cat", A), ("sub/cat", B), ("sub/deep/Dog", B)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        save_file({"clip_g": content}, folder / f"{path}.safetensors")
    embeddings = Embeddings(WIDTH, folder, {"word": A[0]})
    assert embeddings.names() == ["cat", "sub/cat", "sub/deep/Dog", "word"]
    expected = {"cat": A, "cat.safetensors": A, "sub/cat": B, "Dog": B, "deep/Dog": B, "sub/deep/Dog": B, "word": A[:1]}
    for name, vectors in expected.items():
        assert torch.equal(embeddings.find(name), vectors)
    for name in ("dog", "../outside", str(outside), "sub", "", "cat/", "./cat", "sub/../cat", "c\0t"):
        assert embeddings.find(name) is None
    # A LoRA's word comes before a file.
    assert torch.equal(embeddings.with_words({"cat": B}).find("cat"), B)
    assert torch.equal(embeddings.find("cat"), A)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": A}, "name": "cat", "step": 1}, A),
        ({"string_to_param": {"*": A.clone().requires_grad_()}}, A),
        ([{"<l>": NARROW}, {"<g>": A[0]}, {"<g2>": B}], torch.cat([A[:1], B])),
        ({"<cat>": A[0]}, A[:1]),
        ({"clip_l": NARROW, "clip_g": A.half()}, A.half().float()),
    ],
)
def test_conversion(content: object, expected: Tensor, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "cat.pt")
    assert convert(tmp_path / "cat.pt", tmp_path / "cat.safetensors", WIDTH) == tuple(expected.shape)
    assert torch.equal(load_file(tmp_path / "cat.safetensors")["clip_g"], expected)
    assert torch.equal(Embeddings(WIDTH, tmp_path).find("cat"), expected)


class Runs:
    """A pickle of one runs code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", [Runs(), {"a": Runs()}, [], {}, 3, {"name": "cat"}, [{"<l>": NARROW}]])
def test_what_is_not_converted(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "cat.pt")
    with pytest.raises(ValueError, match=r"^cat\.pt (is not a file of tensors|has no vectors)"):
        convert(Path("cat.pt"), Path("cat.safetensors"), WIDTH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.pt"]


@pytest.mark.parametrize("content", [b"", b"root:x:0:0", b"r\x01\0\0\0", b"h\x07.", b"\x80\x02}q\0(K\x01"])
def test_bytes_that_are_no_pickle_are_not_converted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cat.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a file of tensors"):
        convert(tmp_path / "cat.pt", tmp_path / "cat.safetensors", WIDTH)


def test_others_can_read_what_is_converted(tmp_path: Path) -> None:
    torch.save({"clip_g": A}, tmp_path / "cat.pt")
    convert(tmp_path / "cat.pt", tmp_path / "cat.safetensors", WIDTH)
    assert (tmp_path / "cat.safetensors").stat().st_mode == (tmp_path / "cat.pt").stat().st_mode


def test_the_script_converts_what_it_can(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"string_to_param": {"*": A}}, tmp_path / "cat.pt")
    torch.save([{"<l>": NARROW}, {"<g>": B}], tmp_path / "dog.bin")
    torch.save({"name": "no vectors"}, tmp_path / "fox.pt")
    files = [str(tmp_path / name) for name in ("cat.pt", "fox.pt", "dog.bin", "absent.pt")]
    with caplog.at_level(logging.INFO):
        assert main([*files, "--width", str(WIDTH)]) == 1
    embeddings = Embeddings(WIDTH, tmp_path)
    assert embeddings.names() == ["cat", "dog"]
    assert torch.equal(embeddings.find("cat"), A)
    assert torch.equal(embeddings.find("dog"), B)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == f"{tmp_path}/cat.safetensors has 2 vectors of 6 numbers."
    assert messages[1] == f"{tmp_path}/fox.pt has no vectors of an embedding."
    assert "absent.pt" in messages[3]
    assert main(files[:1]) == 1  # it is there, and is kept
    assert caplog.records[-1].getMessage() == f"{tmp_path}/cat.safetensors exists already."
