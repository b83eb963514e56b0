import io
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniature.captions import STYLE_PHRASES, Captioner, article
from miniature.compose import background, compose
from miniature.icons import (
    STYLES,
    IconObject,
    load_drawings,
    load_objects,
    pack_drawings,
    render_drawing,
    save_objects,
    select_objects,
)
from miniature.scenes import COLOUR_NAMES, COLOURS, PLACE_NAMES, RELATIONS, SIZE_NAMES, HeldOut, Plans, sample_plans
from tests.miniature.small import pack
from training.errors import TrainingError

ROOT = Path(__file__).parent.parent.parent

NAMES = [item.name for item in load_objects()]


def svg(colour: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><circle cx="20" cy="40" r="8" fill="{colour}"/></svg>'


def plan(**changes: object) -> Plans:
    """One object, in the centre of a white background, unless `changes` say otherwise."""
    values = {
        "objects": [[0, -1]],
        "styles": [[0, 0]],
        "colours": [[0, 0]],
        "gradient_ways": [0],
        "relations": [-1],
        "places": [0],
        "size_names": [-1],
        "says_style": [False],
        "says_background": [False],
    } | changes
    return Plans.of(**{name: np.array(value) for name, value in values.items()})


def squares() -> torch.Tensor:
    """Two objects in three styles: full squares, red and half-transparent green (premultiplied)."""
    drawings = torch.zeros(6, 4, 48, 48, dtype=torch.uint8)
    drawings[:3, 0], drawings[:3, 3] = 255, 255
    drawings[3:, 1], drawings[3:, 3] = 128, 128
    return drawings


def test_object_list_is_large_unique_and_drawn_by_every_set() -> None:
    objects = load_objects()
    names = [name for item in objects for name in (item.name, *item.also)]
    assert len(objects) >= 1000
    assert len(set(names)) == len(names)
    assert all(len(item.slugs) == len(STYLES) for item in objects)


def test_object_list_round_trip(tmp_path) -> None:
    objects = [IconObject("red apple", ("a", "b", "c"), ("apple",)), IconObject("cat", ("cat",) * 3)]
    save_objects(objects, tmp_path / "objects.json")
    assert load_objects(tmp_path / "objects.json") == objects


def test_selection_leaves_out_what_captions_cannot_tell_apart() -> None:
    slugs = [
        "cat",
        "t-shirt",
        "flag-france",
        "ten-oclock",
        "man-artist",
        "keycap-1",
        "waving-hand-dark-skin-tone",
        "bow-and-arrow",
    ]
    icons = [dict.fromkeys(slugs, "<svg/>") for _ in STYLES]
    icons[0]["dog"] = "<svg/>"
    assert [item.name for item in select_objects(icons)] == ["bow and arrow", "cat", "T-shirt"]


def test_rendered_drawing_fills_its_square() -> None:
    pytest.importorskip("resvg_py")
    image = np.asarray(render_drawing(svg("#ff0000"), 48))
    assert image.shape == (48, 48, 4)
    assert image[24, 24].tolist() == [255, 0, 0, 255]
    assert image[24, 1, 3] > 100  # the circle reaches the edges
    assert image[1, 1, 3] == 0  # and leaves the corners


def test_empty_drawing_is_an_error() -> None:
    pytest.importorskip("resvg_py")
    with pytest.raises(ValueError, match="empty"):
        render_drawing('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"></svg>')


@pytest.mark.slow
def test_packed_drawings_come_back_premultiplied_and_in_order(tmp_path) -> None:
    pytest.importorskip("resvg_py")
    sets = [{"dot": svg("#ff0000")}, {"dot": svg("#00ff00")}, {"dot": svg("#0000ff")}]
    pack_drawings([IconObject("dot", ("dot",) * 3)], sets, tmp_path / "drawings.zip")
    drawings, names, styles = load_drawings(tmp_path / "drawings.zip")
    assert (names, styles) == (["dot"], list(STYLES))
    assert drawings.shape == (3, 4, 192, 192)
    centre = drawings[:, :, 96, 96]
    assert torch.equal(centre[:, :3].argmax(1), torch.arange(3))
    assert (centre[:, 3] == 255).all()
    assert (drawings[:, :3] <= drawings[:, 3:]).all()


def test_catalogue_of_the_pack_is_readable_without_the_renderer(tmp_path) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (192, 192), (255, 0, 0, 128)).save(file, "WEBP", lossless=True)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("catalogue.json", '{"names": ["dot"], "styles": ["flat"], "size": 192}')
        archive.writestr("00000.webp", file.getvalue())
    drawings, _, _ = load_drawings(tmp_path / "d.zip")
    assert drawings[0, :, 0, 0].tolist() == [128, 0, 0, 128]


def test_plans_repeat_for_a_seed_and_differ_between_seeds() -> None:
    first, again, other = (sample_plans(500, NAMES, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.objects, again.objects)
    assert np.array_equal(first.centres, again.centres)
    assert not np.array_equal(first.objects, other.objects)


def test_training_never_shows_a_held_out_pair_and_the_other_split_nothing_else() -> None:
    held_out = HeldOut.of(NAMES)
    for split, expected in (("train", False), ("heldout", True)):
        plans = sample_plans(20_000, NAMES, 3, split)
        assert len(plans) == 20_000
        two = plans.objects[:, 1] >= 0
        assert 0.25 < two.mean() < 0.45
        single = plans[~two]
        on = held_out.colours[single.objects[:, :1], single.colours].any(1)
        together = held_out.pairs[plans.objects[two, 0], plans.objects[two, 1]]
        assert (on == expected).all()
        assert (together == expected).all()
        assert (plans.objects[:, 0] != plans.objects[:, 1]).all()


def test_held_out_share_and_that_it_depends_on_names_only() -> None:
    held_out, fewer = HeldOut.of(NAMES), HeldOut.of(NAMES[100:200])
    assert 0.12 < held_out.colours.mean() < 0.16
    assert 0.13 < held_out.pairs.mean() < 0.17
    assert np.array_equal(held_out.pairs, held_out.pairs.T)
    assert not held_out.colours[:, COLOUR_NAMES.index("white")].any()
    assert np.array_equal(held_out.colours[100:200], fewer.colours)
    assert np.array_equal(held_out.pairs[100:200, 100:200], fewer.pairs)


def test_objects_stay_inside_the_picture_and_apart() -> None:
    plans = sample_plans(20_000, NAMES, 4)
    for slot in range(2):
        there = plans.objects[:, slot] >= 0
        half = plans.sizes[there, slot, None] / 2
        assert (plans.centres[there, slot] - half > 0.03).all()
        assert (plans.centres[there, slot] + half < 0.97).all()
    two = plans[plans.objects[:, 1] >= 0]
    apart = np.abs(two.centres[:, 0] - two.centres[:, 1]).max(1)
    assert (apart >= two.sizes.mean(1)).all()


def test_what_a_caption_does_not_say_is_at_its_default() -> None:
    plans = sample_plans(20_000, NAMES, 5)
    unsaid = plans[~plans.says_background]
    assert (unsaid.colours == COLOUR_NAMES.index("white")).all()
    plain = plans[(plans.objects[:, 1] < 0) & (plans.places == 0) & (plans.size_names < 0)]
    assert (plain.centres[:, 0] == 0.5).all()
    assert len(np.unique(plain.sizes)) == 1
    quiet, loud = plans[~plans.says_style].styles[:, 0], plans[plans.says_style].styles[:, 0]
    assert 0.68 < (quiet == 0).mean() < 0.79
    assert 0.30 < (loud == 0).mean() < 0.37


@pytest.mark.parametrize(
    ("relation", "way"),
    [("next to", (-1, 0)), ("left of", (-1, 0)), ("right of", (1, 0)), ("above", (0, -1)), ("below", (0, 1))],
)
def test_relations_put_the_first_object_where_they_say(relation: str, way: tuple[int, int]) -> None:
    placed = plan(objects=[[0, 1]], relations=[RELATIONS.index(relation)])
    assert np.sign(np.round(placed.centres[0, 0] - placed.centres[0, 1], 3)).tolist() == list(way)


def test_composed_object_has_its_place_size_and_background() -> None:
    blue = COLOUR_NAMES.index("blue")
    placed = plan(
        colours=[[blue, blue]], places=[PLACE_NAMES.index("top right")], size_names=[SIZE_NAMES.index("small")]
    )
    picture = compose(squares(), placed)[0]
    red = (picture[0] > 0.9) & (picture[2] < 0.1)
    rows, columns = red.any(1).nonzero(), red.any(0).nonzero()
    assert abs(len(rows) - 0.34 * 256) <= 2
    assert abs(len(columns) - 0.34 * 256) <= 2
    assert rows[0].item() == 256 - 1 - columns[-1].item() == pytest.approx(0.04 * 256, abs=2)
    assert torch.allclose(picture[:, 255, 0], torch.tensor(COLOURS["blue"]) / 255)


def test_transparent_objects_show_the_background() -> None:
    picture = compose(squares(), plan(objects=[[1, -1]], colours=[[1, 1]]))[0]
    expected = torch.tensor([0, 128, 0]) / 255 + torch.tensor(COLOURS["red"]) / 255 * (127 / 255)
    assert torch.allclose(picture[:, 128, 128], expected, atol=2e-3)


def test_a_batch_changes_no_picture_and_size_scales_it() -> None:
    drawings = torch.randint(0, 256, (30, 4, 48, 48), generator=torch.Generator().manual_seed(0)).byte()
    drawings[:, :3] = torch.minimum(drawings[:, :3], drawings[:, 3:])
    plans = sample_plans(12, NAMES[:10], 6)
    batch = compose(drawings, plans, size=(64, 64))
    assert batch.shape == (12, 3, 64, 64)
    assert batch.min() >= 0
    assert batch.max() <= 1
    for i in range(12):
        assert torch.allclose(compose(drawings, plans[i : i + 1], size=(64, 64))[0], batch[i], atol=1e-6)


def test_gradients_run_from_the_first_colour_to_the_second() -> None:
    red, white = COLOUR_NAMES.index("red"), COLOUR_NAMES.index("white")
    down = background(plan(colours=[[red, white]], gradient_ways=[0]), (64, 64))[0]
    right = background(plan(colours=[[red, white]], gradient_ways=[1]), (64, 64))[0]
    assert torch.equal(down, right.transpose(1, 2))
    assert down[1, 0, 0] < 0.2 < 0.9 < down[1, -1, 0]
    assert (down[1].diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("X-ray", "an X-ray"),
        ("UFO", "a UFO"),
        ("one piece swimsuit", "a one piece swimsuit"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("bread", "bread"),
        ("smiling face with horns", "a smiling face with horns"),
        ("Santa Claus", "Santa Claus"),
        ("Christmas tree", "a Christmas tree"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert article(name) == expected


def test_articles_follow_adjectives() -> None:
    assert article("owl", "small ") == "a small owl"
    assert article("glasses", "small ") == "small glasses"


def test_captions_say_what_plans_show_and_vary() -> None:
    captioner = Captioner(NAMES, STYLES)
    plans = sample_plans(5000, NAMES, 7)
    captions = captioner.captions(plans, random.Random(0))
    assert captions == captioner.captions(plans, random.Random(0))
    assert captions != captioner.captions(plans, random.Random(1))
    phrases = {style: [phrase for group in STYLE_PHRASES[style] for phrase in group] for style in STYLES}
    for i, caption in enumerate(captions):
        for index in plans.objects[i]:
            assert index < 0 or NAMES[index] in caption
        if plans.says_background[i]:
            assert all(COLOUR_NAMES[colour] in caption for colour in plans.colours[i])
        if plans.says_style[i]:
            assert any(phrase in caption for phrase in phrases[STYLES[plans.styles[i, 0]]])
        if plans.places[i] > 0:
            assert PLACE_NAMES[plans.places[i]] in caption
    assert max(len(caption) for caption in captions) < 200


def test_other_names_of_an_object_occur_beside_its_own() -> None:
    captioner = Captioner(["red apple"], STYLES, {"red apple": ("pomme",)})
    rng = random.Random(0)
    captions = [captioner.captions(plan(), rng)[0] for _ in range(50)]
    assert 3 < sum("pomme" in caption for caption in captions) < 30
    assert all(("pomme" in caption) != ("red apple" in caption) for caption in captions)


@pytest.mark.slow
def test_drawings_are_whole_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packing, killed after some drawings."""
    names = [f"thing {index}" for index in range(60)]
    file = tmp_path / "drawings.zip"
    part = file.with_name(f".{file.name}.part")
    packing = f"from pathlib import Path; from tests.miniature.small import pack; pack({names!r}, Path({str(file)!r}))"
    with subprocess.Popen([sys.executable, "-c", packing], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not part.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    assert not file.exists()
    with pytest.raises(TrainingError, match=r"There is no file .*drawings.zip; scripts/build-mini-data makes it\.$"):
        load_drawings(file)
    pack(names[:2], file)
    assert load_drawings(file)[1] == names[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["drawings.zip"]
    assert "6/6" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:-100])
    incomplete = r"drawings.zip is not a complete file of drawings; scripts/build-mini-data"
    with pytest.raises(TrainingError, match=incomplete):
        load_drawings(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("catalogue.json", "[]")
    with pytest.raises(TrainingError, match=incomplete):
        load_drawings(file)
