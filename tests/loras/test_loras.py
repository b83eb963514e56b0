"""Adapters in a loaded model: in every memory mode the weights of a fresh model with them, and the base to the bit without."""

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cascade import Lora, Request
from cascade.limits import InputError
from cascade.loras.merging import Loras
from cascade.loras.words import Words
from cascade.pipeline import Cascade
from cascade.running.placement import MemoryMode
from cascade.weights.base import FileWeights
from cascade.weights.errors import WeightsError
from cascade.weights.lora import Adapter, merged, place
from tests.components import copied
from tests.loras.files import full, lora
from tests.running.test_memory import make_cached, pack
from tests.tiny import make_cascade

SMALL = {"width": 64, "height": 64, "steps_prior": 2, "steps_decoder": 1}
REQUEST = Request("a b c", negative_prompt="d", **SMALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, components: dict[str, Any]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        "a": lora(components, folder / "a.safetensors", 1),
        "b": lora(components, folder / "b.safetensors", 2),
        "decoder": lora(components, folder / "decoder.safetensors", 3, "decoder"),
        "full": full(components, folder / "full.safetensors", 4),
    }


def modes(components: dict[str, Any]) -> dict[str, Callable[[], Cascade]]:
    small = min(size for size in (pack(components)["prior"].size,))
    return {
        "resident": lambda: make_cascade(components),
        "offload": lambda: make_cached(components, MemoryMode("offload")),
        "stream": lambda: make_cached(components, MemoryMode("stream", small // 2)),
    }


def trained(components: dict[str, Any], *adapters: tuple[Path, float]) -> dict[str, Any]:
    """Components whose weights have adapters from the beginning."""
    names = ("prior", "decoder", "text_encoder")
    shapes = {
        name: {key: tuple(tensor.shape) for key, tensor in components[name].state_dict().items()} for name in names
    }
    placed = [(place(Adapter.read(path), shapes), scale) for path, scale in adapters]
    changed = dict(components)
    for name in names:
        state = components[name].state_dict()
        for key, weight in state.items():
            changes = [(change, scale) for one, scale in placed for change in one.changes.get(name, {}).get(key, [])]
            state[key] = merged(weight, changes) if changes else weight
        changed[name] = copied(components[name])
        changed[name].load_state_dict(state)
    return changed


def pixels(images: list[Image.Image]) -> list[np.ndarray]:
    return [np.array(image) for image in images]


def same(first: list[Image.Image], second: list[Image.Image]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(pixels(first), pixels(second), strict=True))


def request(*loras: Lora, **options: Any) -> Request:
    return Request("a b c", negative_prompt="d", loras=loras, **SMALL, **options)


@pytest.fixture(scope="module")
def fresh(components: dict[str, Any]) -> Callable[..., list[Image.Image]]:
    """The pictures of weights that have LoRAs from the beginning; made once for all memory modes."""

    @functools.cache
    def pictures_of(*loras: Lora) -> list[Image.Image]:
        return make_cascade(trained(components, *((one.path, one.scale) for one in loras))).generate(REQUEST)

    return pictures_of


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_pictures_with_loras_are_those_of_weights_that_have_them(
    mode: str, components: dict[str, Any], files: dict[str, Path], fresh: Callable[..., list[Image.Image]]
) -> None:
    cascade = modes(components)[mode]()
    a, b = Lora(files["a"]), Lora(files["b"], 0.5)
    both, full_one = (Lora(files["a"], -1), Lora(files["decoder"], 2)), Lora(files["full"])
    for loras in [(), (a,), (b,), (a, b), (), both, (full_one,), (a, full_one), ()]:
        made = cascade.generate(request(*loras))
        assert same(made, fresh(*loras)), loras
        assert same(made, fresh()) == (not loras)


@pytest.mark.parametrize("mode", ["resident", "offload", "stream"])
def test_a_change_that_ends_in_the_middle_is_put_right(
    mode: str,
    components: dict[str, Any],
    files: dict[str, Path],
    fresh: Callable[..., list[Image.Image]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cascade = modes(components)[mode]()
    read = cascade._loras.base.read

    def interrupted(after: int) -> Callable[..., Any]:
        def some(*given: Any) -> Any:
            for number, item in enumerate(read(*given)):
                if number == after:
                    raise KeyboardInterrupt
                yield item

        return some

    wanted = {"base": (), "a": (Lora(files["a"]),), "b": (Lora(files["b"]),)}
    for after, (broken, then) in enumerate([("a", "base"), ("a", "a"), ("b", "a"), ("base", "b"), ("a", "base")]):
        monkeypatch.setattr(cascade._loras.base, "read", interrupted(3 * after + 1))
        with pytest.raises(KeyboardInterrupt):
            cascade.generate(request(*wanted[broken]))
        monkeypatch.setattr(cascade._loras.base, "read", read)
        assert same(cascade.generate(request(*wanted[then])), fresh(*wanted[then]))


def test_requests_that_take_turns_keep_their_loras(components: dict[str, Any], files: dict[str, Path]) -> None:
    cascade = make_cascade(components)
    expected = [cascade.generate(request(Lora(files[name]))) for name in ("a", "b")]
    both = [cascade.steps(request(Lora(files[name]))) for name in ("a", "b")]
    images: list[list[Image.Image]] = [[], []]
    for progress in zip(*both, strict=True):
        for made, one in zip(images, progress, strict=True):
            made += [one.image] if one.image is not None else []
    assert all(same(*pair) for pair in zip(images, expected, strict=True))


def test_the_same_loras_again_read_nothing(
    components: dict[str, Any], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cascade = make_cascade(components)
    first = cascade.generate(request(Lora(files["a"])))

    def read(*_: Any) -> None:
        raise AssertionError("nothing is to be read")

    monkeypatch.setattr(Adapter, "read", read)
    monkeypatch.setattr(cascade._loras.base, "read", read)
    assert same(cascade.generate(request(Lora(files["a"]))), first)


def test_a_file_that_was_replaced_is_read_again(
    components: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    cascade = make_cascade(components)
    path = tmp_path / "one.safetensors"
    shutil.copy(files["a"], path)
    first = cascade.generate(request(Lora(path)))
    shutil.copy(files["b"], path)
    assert same(cascade.generate(request(Lora(path))), cascade.generate(request(Lora(files["b"]))))
    assert same(cascade.generate(request(Lora(files["a"]))), first)


def test_reconstruction_has_no_loras(components: dict[str, Any], files: dict[str, Path]) -> None:
    cascade, image = make_cascade(components), Image.radial_gradient("L").convert("RGB").resize((128, 128))
    plain = cascade.reconstruct(image)
    cascade.generate(request(Lora(files["decoder"])))
    assert same([cascade.reconstruct(image)], [plain])


# Of a model folder


def test_the_base_is_read_again_from_the_folder(model_folder: Path, files: dict[str, Path]) -> None:
    cascade = Cascade.load(model_folder, "cpu", "bfloat16")
    states = {name: copy.deepcopy(network.state_dict()) for name, network in cascade._loras.networks.items()}
    base = cascade.generate(REQUEST)
    with_it = cascade.generate(request(Lora(files["a"])))
    assert isinstance(cascade._loras.base, FileWeights)
    assert not same(with_it, base)
    assert same(cascade.generate(REQUEST), base)
    for name, network in cascade._loras.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, states[name][key]), key


def test_weights_are_rounded_once(model_folder: Path, files: dict[str, Path], components: dict[str, Any]) -> None:
    """Of float32 weights on the disk, in bfloat16: as if their sum with the LoRAs had been saved and loaded."""
    cascade = Cascade.load(model_folder, "cpu", "bfloat16")
    cascade.generate(request(Lora(files["a"], 0.7), Lora(files["b"])))
    expected = trained(components, (files["a"], 0.7), (files["b"], 1.0))
    for name, network in cascade._loras.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, expected[name].state_dict()[key].bfloat16()), key


def test_a_model_that_was_replaced_on_the_disk_is_not_mixed(
    model_folder: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    cascade = Cascade.load(folder, "cpu")
    (weights,) = (folder / "prior").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes())
    with pytest.raises(WeightsError, match="has changed since it was loaded; load the model again"):
        cascade.generate(request(Lora(files["a"])))


def test_loras_of_the_folder_are_called_by_name(model_folder: Path, files: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "loras").mkdir()
    shutil.copy(files["a"], folder / "loras" / "style.safetensors")
    cascade = Cascade.load(folder, "cpu")
    expected = cascade.generate(request(Lora(files["a"])))
    for name in ("style", "style.safetensors"):
        assert same(cascade.generate(request(Lora(name))), expected)
    with pytest.raises(InputError, match=r"loras\[1\]: There is no file or folder other; .*loras has style\."):
        cascade.generate(request(Lora("style"), Lora("other")))
    with pytest.raises(InputError, match="There is no file or folder"):
        cascade.generate(request(Lora("../loras/style")))


def test_wrong_files_are_inputs_errors_and_change_nothing(
    components: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    cascade = make_cascade(components)
    base = cascade.generate(REQUEST)
    (tmp_path / "one.safetensors").write_bytes(b"nothing")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "two.safetensors")
    for name, said in {"one": "truncated or no safetensors file", "two": "0 of 1 tensors have a place"}.items():
        for scale in (1.0, 0.0):
            with pytest.raises(InputError, match=rf"^loras\[1\]: .*{said}"):
                cascade.generate(request(Lora(files["a"]), Lora(tmp_path / f"{name}.safetensors", scale)))
    assert same(cascade.generate(REQUEST), base)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": ""}, "path of a Lora is ''; it must be the path of a file"),
        ({"path": 3}, "path of a Lora is 3"),
        ({"path": "a", "scale": 3.5}, "scale of a Lora is 3.5; it must be a number from -2 to 3"),
        ({"path": "a", "scale": True}, "scale of a Lora is True"),
    ],
)
def test_what_a_lora_may_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Lora(**given)


def test_what_loras_may_be() -> None:
    with pytest.raises(InputError, match=r"loras\[0\] is 'a'; it must be a Lora"):
        Request("a", loras=["a"])
    with pytest.raises(InputError, match="loras has 9 values; it may have at most 8"):
        Request("a", loras=[Lora("a")] * 9)
    assert Request("a", loras=[Lora("a")]).loras == (Lora("a", 1.0),)


# Words


def word_file(folder: Path, name: str, seed: int, count: int = 1, key: str = "clip_g") -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))}, path)
    return path


def test_words_are_used_by_name(components: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cascade = make_cascade(components)
    one, two = word_file(tmp_path, "xyz", 1, 2), word_file(tmp_path, "two", 2, key="bundle_emb.<q r>.clip_g")
    prompts = {
        "xyz": "a xyz b",
        "embedding:xyz": "a embedding:xyz b",
        "XYZ": "a XYZ b",
        "<q r>": "a<q r>b",
        "none": "a b",
    }
    with caplog.at_level("INFO"):
        made = {
            name: cascade.generate(Request(prompt, **SMALL, loras=[Lora(one), Lora(two)]))
            for name, prompt in prompts.items()
        }
    assert "Words that the prompt may use: xyz, <q r>." in caplog.text
    assert f"{one.name}: " in caplog.text
    assert str(one.parent) not in caplog.text  # users read the log of their prediction
    assert same(made["xyz"], made["embedding:xyz"])
    assert same(made["xyz"], made["XYZ"])
    assert len({image.tobytes() for (image,) in made.values()}) == 3
    # Words count whole at every scale but 0, at which they are letters.
    assert same(cascade.generate(Request("a xyz b", **SMALL, loras=[Lora(one, 0.1)])), made["xyz"])
    plain = cascade.generate(Request("a xyz b", **SMALL))
    assert same(cascade.generate(Request("a xyz b", **SMALL, loras=[Lora(one, 0)])), plain)
    assert not same(made["xyz"], plain)


def test_words_inside_of_other_words_are_letters(components: dict[str, Any], tmp_path: Path) -> None:
    cascade, path = make_cascade(components), word_file(tmp_path, "bc", 1)
    assert same(
        cascade.generate(Request("abc bcd", **SMALL, loras=[Lora(path)])), cascade.generate(Request("abc bcd", **SMALL))
    )


def test_names_of_words_take_one_line_of_the_log(
    components: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cascade = make_cascade(components)
    name = f"a\nSeeds: 7 {'x' * 5000}"
    paths = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        paths.append(word_file(tmp_path / str(number), "a", number, key=f"bundle_emb.{name}.clip_g"))
    with caplog.at_level("INFO"):
        cascade.generate(Request("a", **SMALL, loras=[Lora(path) for path in paths]))
    said = [record.getMessage() for record in caplog.records if "Seeds: 7" in record.getMessage()]
    assert len(said) == 4
    assert all("\n" not in line and len(line) < 700 for line in said)


def test_words_that_share_a_name_get_numbers(components: dict[str, Any], tmp_path: Path) -> None:
    cascade = make_cascade(components)
    paths = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        paths.append(word_file(tmp_path / str(number), "xyz", number))
    both = [Lora(path) for path in paths]
    for path, name in zip(paths, ("xyz", "xyz2"), strict=True):
        made = cascade.generate(Request(f"a {name}", **SMALL, loras=both))
        assert same(made, cascade.generate(Request("a xyz", **SMALL, loras=[Lora(path)])))


@pytest.mark.parametrize("mode", ["resident", "offload"])
def test_the_authors_words(mode: str, components: dict[str, Any], tmp_path: Path) -> None:
    """A new word that begins from the mean of others, and one that exists, whose row changes."""
    cascade = modes(components)[mode]()
    vocabulary = components["tokenizer"].get_vocab()
    deltas = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    path = tmp_path / "words.safetensors"
    indices = torch.tensor([len(vocabulary), vocabulary["b</w>"]])
    save_file({"embeddings.embeddings": deltas, "embeddings.indices": indices}, path)
    (tmp_path / "words.json").write_text(json.dumps({"train_tokens": [["[new]", "^[xy]</w>"], ["^b</w>$", None]]}))
    table = components["text_encoder"].get_input_embeddings().weight.detach()
    word = table[[vocabulary["x</w>"], vocabulary["y</w>"]]].mean(0) + deltas[0]

    changed = dict(components)
    changed["text_encoder"] = copied(components["text_encoder"])
    with torch.no_grad():
        changed["text_encoder"].get_input_embeddings().weight[vocabulary["b</w>"]] += deltas[1]
    save_file({"clip_g": word[None]}, tmp_path / "word.safetensors")
    expected = make_cascade(changed).generate(Request("a word b", **SMALL, loras=[Lora(tmp_path / "word.safetensors")]))
    assert same(cascade.generate(Request("a [new] b", **SMALL, loras=[Lora(path, 0.5)])), expected)
    assert same(cascade.generate(Request("a b", **SMALL)), make_cascade(components).generate(Request("a b", **SMALL)))


def test_words_of_a_request_are_known_to_its_errors(components: dict[str, Any], tmp_path: Path) -> None:
    cascade = make_cascade(components)
    request = Request("xyz embedding:abc", prompt_weighting=True, loras=[Lora(word_file(tmp_path, "xyz", 1))])
    with pytest.raises(InputError, match="prompt names the embedding 'abc'"):
        cascade.generate(request)


def test_loras_name_the_engines_networks(components: dict[str, Any]) -> None:
    cascade = make_cascade(components)
    assert isinstance(cascade._loras, Loras)
    assert list(cascade._loras.networks) == ["prior", "decoder", "text_encoder"]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("[style]", "a [\u017ftyle]"), ("K", "a \u212a"), ("\u0130", "a i\u0307 \u0130"), ("[style]", "a [STYLE]")],
)
def test_words_are_found_in_every_spelling_of_a_letter(name: str, prompt: str) -> None:
    words = Words({"x": torch.zeros(1, 2), name: torch.zeros(1, 2)})
    assert f"embedding:{name}" in words.spelled(prompt)


def test_a_folder_without_a_name_and_a_long_name_give_one_sentence(
    components: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cascade = make_cascade(components)
    for path in (".", "/", "a" * 5000):
        with pytest.raises(InputError) as error:
            cascade.generate(request(Lora(path)))
        assert str(error.value).startswith("loras[0]: ")
        assert len(str(error.value)) < 400
