"""CLIP's tokenizer, against transformers' on the same files."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from cascade.prompts.tokenizer import ClipTokenizer
from tests.conftest import MINI

PARTS = (
    "a red apple",
    "<|endoftext|>",
    "<|startoftext|>",
    " ",
    "\n",
    "  ",
    "\t",
    "\u00a0",
    "é",
    "e\u0301",
    "你好",
    "🙂",
    "'s",
)
PARTS += ("Don't", "I'LL", "12345", "!!", "İ", "ß", "(cat:1.3)", "embedding:x", "\u200d", "ﬁ")
WHOLE = MINI / "tokenizer" / "tokenizer.json"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


@cache
def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return ["", " ", *("".join(draw.choices(PARTS, k=draw.randint(1, 30))) for _ in range(count))]


def in_two_files(folder: Path, **settings: object) -> Path:
    """The miniature's vocabulary, as folders without tokenizer.json have it."""
    content = json.loads(WHOLE.read_text())
    vocabulary = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **settings}))
    return folder


def with_1000_tokens(folder: Path) -> Path:
    """The miniature's vocabulary in two files, without its last merges, so that the numbers of added tokens get longer at the
    second of three.
    """
    in_two_files(folder)
    count = 999 - len(SPECIAL_TOKENS)
    content = json.loads(WHOLE.read_text())["model"]
    kept = sorted(content["vocab"], key=content["vocab"].__getitem__)
    kept = [token for token in kept if token not in SPECIAL_TOKENS][:count]
    vocabulary = {token: place for place, token in enumerate([*kept, *SPECIAL_TOKENS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text(
        "\n".join([lines[0], *(line for line in lines[1:] if line.replace(" ", "") in vocabulary), ""])
    )
    return folder


def equal(folder: Path, count: int = 100) -> None:
    """Our tokenizer makes of so many texts, whole and without their ends, what transformers' does."""
    ours, theirs = ClipTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    for special in (False, True):
        options = {"add_special_tokens": special, "return_offsets_mapping": True, "verbose": False}
        made, expected = ours(texts(count), **options), theirs(texts(count), **options)
        assert made["input_ids"] == expected["input_ids"]
        assert made["offset_mapping"] == expected["offset_mapping"]


def test_tokens_equal_transformers() -> None:
    equal(MINI / "tokenizer", 500)


def test_tokens_of_two_files_equal_transformers(tmp_path: Path) -> None:
    new = {
        "content": "<new>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    begin = {"__type": "AddedToken", **new, "content": "<|startoftext|>"}
    count = len(ClipTokenizer.from_pretrained(MINI / "tokenizer").get_vocab())
    settings = {"bos_token": begin, "pad_token": "!", "added_tokens_decoder": {str(count): new}}
    folder = in_two_files(tmp_path, model_max_length=33, **settings)
    equal(folder)
    ours = ClipTokenizer.from_pretrained(folder)
    assert ours(["<new>"], add_special_tokens=False)["input_ids"] == [[count]]


@pytest.mark.parametrize(
    "options",
    [
        {"unk_token": "[UNK]"},
        {"unk_token": None},
        {"dropout": 0.5},
        {"end_of_word_suffix": None},
        {"fuse_unk": True},
        {"byte_fallback": True},
        {"ignore_merges": True},
    ],
)
def test_options_of_the_model_are_clips_as_in_transformers(tmp_path: Path, options: dict[str, object]) -> None:
    """Also in a vocabulary that lacks the two bytes of é: each becomes the unknown token, and not tokens of its own bytes."""
    content = json.loads(WHOLE.read_text())
    content["model"]["merges"] = [one for one in content["model"]["merges"] if not set("Ã©") & set("".join(one))]
    vocabulary = content["model"]["vocab"]
    for letter in "Ã©":  # as the vocabulary writes these bytes
        first, second = letter.encode()
        vocabulary[f"<0x{first:02X}>"] = vocabulary.pop(letter)
        vocabulary[f"<0x{second:02X}>"] = vocabulary.pop(f"{letter}</w>")
    content["model"] |= options
    (tmp_path / WHOLE.name).write_text(json.dumps(content))
    shutil.copy(WHOLE.with_name("tokenizer_config.json"), tmp_path)
    equal(tmp_path)
    (tokens,) = ClipTokenizer.from_pretrained(tmp_path)(["é"], add_special_tokens=False)["input_ids"]
    assert len(tokens) == 2


def test_another_kind_of_tokenizer(tmp_path: Path) -> None:
    content = json.loads(WHOLE.read_text())
    content["model"] = {"type": "WordLevel", "vocab": content["model"]["vocab"], "unk_token": "<|endoftext|>"}
    (tmp_path / WHOLE.name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its model is WordLevel; CLIP's is BPE"):
        ClipTokenizer.from_pretrained(tmp_path)


def test_files_of_older_versions_equal_transformers(tmp_path: Path) -> None:
    folder = in_two_files(tmp_path, model_max_length=77, pad_token="<|endoftext|>")
    count = len(ClipTokenizer.from_pretrained(folder).get_vocab())
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": count}))
    pad = {"content": "!", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad, "eos_token": "<|endoftext|>"}))
    equal(folder)
    ours = ClipTokenizer.from_pretrained(folder)
    assert ours(["<new>"], add_special_tokens=False)["input_ids"] == [[count]]


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_have_the_places_that_the_files_say(tmp_path: Path, listed: bool) -> None:
    """In whatever order they stand there, and where 999 stands before 1000."""
    folder, places = with_1000_tokens(tmp_path), {"<b>": 1000, "<a>": 999, "<c>": 1001}
    settings: dict[str, object] = {"model_max_length": 77}
    if listed:
        plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
        settings["added_tokens_decoder"] = {str(place): {**plain, "content": one} for one, place in places.items()}
    else:
        (folder / "added_tokens.json").write_text(json.dumps(places))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    equal(folder)
    tokens = ClipTokenizer.from_pretrained(folder)(list(places), add_special_tokens=False)["input_ids"]
    assert tokens == [[place] for place in places.values()]


def test_one_text_is_refused() -> None:
    with pytest.raises(TypeError, match="texts must be a list of texts, but is the text 'a'"):
        ClipTokenizer.from_pretrained(MINI / "tokenizer")("a")


def test_limit_is_clips_where_the_file_has_none(tmp_path: Path) -> None:
    for settings in ({}, {"model_max_length": 10**30}):
        assert ClipTokenizer.from_pretrained(in_two_files(tmp_path, **settings)).model_max_length == 77


def test_a_special_token_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the vocabulary lacks the pad_token <nothing>"):
        ClipTokenizer.from_pretrained(in_two_files(tmp_path, pad_token="<nothing>"))


@pytest.mark.parametrize("added", [False, True])
def test_either_reads_what_was_saved(tmp_path: Path, added: bool) -> None:
    folder = in_two_files(tmp_path, model_max_length=33, pad_token="!")
    if added:
        count = len(ClipTokenizer.from_pretrained(folder).get_vocab())
        (folder / "added_tokens.json").write_text(json.dumps({"<new>": count}))
    before = ClipTokenizer.from_pretrained(folder)
    before.save_pretrained(tmp_path / "saved")
    equal(tmp_path / "saved")
    after = ClipTokenizer.from_pretrained(tmp_path / "saved")
    assert after(texts(100)) == before(texts(100))
    assert (after.pad_token_id, after.model_max_length) == (before.pad_token_id, 33)
    assert after.get_vocab() == before.get_vocab()


@pytest.mark.parametrize("length", [2, 1, -5, "77", 77.5, True])
def test_a_limit_that_leaves_no_room(tmp_path: Path, length: object) -> None:
    folder = in_two_files(tmp_path, model_max_length=length)
    with pytest.raises(ValueError, match=f"model_max_length is {length!r}; it must be a whole number, at least 3"):
        ClipTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token"])
def test_a_special_token_of_another_kind(tmp_path: Path, name: str) -> None:
    for token in (5, ["!"], {"lstrip": False}):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be a text, or an object with the text content"):
            ClipTokenizer.from_pretrained(in_two_files(tmp_path, **{name: token}))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_settings_of_another_kind(tmp_path: Path, name: str) -> None:
    folder = in_two_files(tmp_path)
    for content in ("[]", "null", "5"):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} is not a JSON object"):
            ClipTokenizer.from_pretrained(folder)
