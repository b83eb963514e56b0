"""The Predictor, as Cog calls it, on a model folder of tiny networks."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from cog import BaseRunner
from cog.input import FieldInfo
from cog.predictor import load_predictor_from_ref
from PIL import Image

from cascade.cascade import Request
from predict import Predictor, find_weights

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def predictor(model_folder: Path) -> Predictor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_WEIGHTS", str(model_folder))
        predictor = Predictor()
        predictor.setup()
    return predictor


def run(predictor: Predictor, **given: object) -> list[Path]:
    """Call ``run`` as Cog does: with the default of every input that is not given."""
    fields = inspect.signature(Predictor.run).parameters
    return predictor.run(**{name: given.get(name, p.default.default) for name, p in fields.items() if name != "self"})


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_defaults_give_one_picture_of_the_native_size(predictor: Predictor) -> None:
    (file,) = run(predictor)
    picture = Image.open(file)
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (128, 128))


def test_every_input_reaches_the_picture(predictor: Predictor) -> None:
    base = {"prompt": "a", "width": 64, "height": 64, "seed": 3, "guidance_scale_prior": 4, "guidance_scale_decoder": 2}
    before = read(run(predictor, **base)[0])
    for change in (
        {"prompt": "b"},
        {"negative_prompt": "b"},
        {"seed": 4},
        {"steps_prior": 1},
        {"steps_decoder": 1},
        {"guidance_scale_prior": 9},
        {"guidance_scale_decoder": 9},
    ):
        (file,) = run(predictor, **{**base, **change})
        assert (read(file) != before).any(), change
    assert read(run(predictor, **{**base, "width": 100, "height": 72})[0]).shape == (72, 100, 3)
    assert (read(run(predictor, **base)[0]) == before).all()


def test_several_pictures_have_names_and_seeds_of_their_own(predictor: Predictor) -> None:
    small = {"prompt": "", "width": 64, "height": 64}
    files = run(predictor, **small, num_images=3, seed=7)
    assert [file.name for file in files] == ["output-0.png", "output-1.png", "output-2.png"]
    pictures = [read(file).astype(int) for file in files]
    (alone,) = run(predictor, **small, seed=9)
    assert abs(pictures[2] - read(alone)).max() <= 1
    assert (pictures[0] != pictures[1]).any()


def test_no_seed_is_a_new_seed(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "predict"):
        for _ in range(2):
            run(predictor, width=64, height=64)
    seeds = [int(seed) for seed in re.findall(r"Seed: (\d+)", caplog.text)]
    assert len(set(seeds)) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seed_zero_is_a_seed(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "predict"):
        run(predictor, width=64, height=64, seed=0)
    assert "Seed: 0\n" in caplog.text


def test_whole_numbers_may_arrive_as_floats(predictor: Predictor) -> None:
    names = ("width", "height", "num_images", "steps_prior", "steps_decoder", "seed")
    values = (64, 72, 2, 2, 1, 5)
    ints = run(predictor, **dict(zip(names, values, strict=True)))
    expected = [read(file) for file in ints]
    floats = run(predictor, **dict(zip(names, map(float, values), strict=True)))
    assert all((read(file) == picture).all() for file, picture in zip(floats, expected, strict=True))


@pytest.mark.parametrize(("name", "value"), [("width", 63), ("steps_prior", 2.5), ("num_images", 0), ("seed", 1e23)])
def test_values_that_no_schema_stopped_are_named(predictor: Predictor, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        run(predictor, **{name: value})


def test_old_pictures_are_deleted(predictor: Predictor) -> None:
    (first,) = run(predictor, width=64, height=64)
    (second,) = run(predictor, width=64, height=64)
    assert not first.parent.exists()
    assert second.is_file()


def test_progress_is_shown(predictor: Predictor, capfd: pytest.CaptureFixture[str]) -> None:
    run(predictor, width=64, height=64, steps_prior=3, steps_decoder=2)
    assert "6/6" in capfd.readouterr().err


def test_signature_fits_cog_s_schema_generator() -> None:
    """It reads the source: every input needs a type, a literal default and a literal description, and stands for itself."""
    parameters = inspect.signature(Predictor.run).parameters
    names = [name for name in parameters if name != "self"]
    fields = set(Request.__dataclass_fields__) - {"sampler"}
    assert set(names) == fields
    source = inspect.getsource(Predictor.run)
    for name in names:
        field = parameters[name].default
        assert isinstance(field, FieldInfo)
        assert field.description
        assert re.search(rf'{name}: .*= Input\(\s*description="[^"]+"[,)]', source), name
        optional = "None" in str(parameters[name].annotation)
        assert optional == (field.default is None)


def test_cog_finds_the_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "predict", sys.modules["predict"])  # which Cog replaces by a module of its own
    assert isinstance(load_predictor_from_ref(f"{ROOT / 'predict.py'}:Predictor"), BaseRunner)


def test_which_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("predict.WEIGHTS", tmp_path)
    monkeypatch.delenv("CASCADE_WEIGHTS", raising=False)
    assert find_weights() == tmp_path / "mini"
    (tmp_path / "stable-cascade").mkdir()
    assert find_weights() == tmp_path / "stable-cascade"
    monkeypatch.setenv("CASCADE_WEIGHTS", "/elsewhere")
    assert find_weights() == Path("/elsewhere")
