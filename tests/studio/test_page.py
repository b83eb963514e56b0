"""The page of ``scripts/studio`` in a real browser, with the miniature."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, Route, expect

from serving.record import read_record
from studio.fields import FOLDS, fold_for, read_fields
from studio.session import Made, Session
from tests.studio.conftest import SIDE

pytestmark = pytest.mark.slow

FEW = {"steps_prior": "2", "steps_decoder": "1"}
# Four pictures of these take half a minute of a core: time to cancel, on a busy machine too.
LONG = {"steps_prior": "50", "steps_decoder": "50", "width": "512", "height": "512"}


def field(page: Page, name: str) -> Locator:
    """Where an input is written, in an open fold."""
    found = page.locator(f"#{name}").locator("textarea, input").first
    if not found.is_visible():
        # A fold's content is made when it is opened.
        page.locator(".fold button.label-wrap").filter(has=page.get_by_text(fold_for(name), exact=True)).click()
        found.wait_for()
    return found


def fill(page: Page, **values: str) -> None:
    for name, value in values.items():
        field(page, name).fill(value)


def make(page: Page, session: Session, count: int = 1) -> list[Made]:
    """Click Make, and wait for the pictures."""
    before = len(session.made)
    page.locator("#make").click()
    made = made_since(page, session, before, count)
    # The event has ended. Until then, Gradio sends its last updates once more, which undoes what was clicked meanwhile.
    expect(page.locator("#make")).to_be_focused()
    return made


def made_since(page: Page, session: Session, before: int, count: int = 1) -> list[Made]:
    expect(page.locator("#gallery button.thumbnail-lg")).to_have_count(before + count)
    expect(page.locator("#make")).to_be_visible()
    assert len(session.made) == before + count
    return session.made[before:]


def paint(page: Page) -> None:
    """A stroke through the middle of the image, which can be painted on once the editor could undo laying it there."""
    expect(page.locator("#brush").get_by_role("button", name="Undo")).to_be_enabled()
    canvas = page.locator("#brush canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=2)
    page.mouse.up()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), np.int16)


def check_colours(page: Page, *, dark: bool) -> None:
    """Texts stand out from what is behind them, by the 4.5 that the guidelines ask for."""
    for text in TEXTS:
        ink, paper = page.locator(text).evaluate(LUMINANCES)
        assert (paper < 0.1) if dark else (paper > 0.8), text
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, text


# In the browser, which sees each preview; asked from here, it may be gone.
FRAME = """() => {
    const box = document.querySelector("#view .previews img")?.getBoundingClientRect();
    return box?.width ? {x: box.x, y: box.y, width: box.width, height: box.height} : null;
}"""


# Where Gradio sends an event that does not wait in its queue.
EVENT = "**/run/predict*"
# Whether the slider's handle stands at a share of the picture's width.
WHERE = """share => {
    const box = document.querySelector("#slider .slider-wrap, #slider").getBoundingClientRect();
    const handle = document.querySelector("#slider [data-testid=slider]").getBoundingClientRect();
    return Math.abs(handle.x + handle.width / 2 - box.x - share * box.width) < 24;
}"""
# The luminances of a text and of what is behind it, as the Web Content Accessibility Guidelines count them.
LUMINANCES = """text => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = colour => numbers(colour).slice(0, 3).map(one => one / 255)
        .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4)
        .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
    let paper = text;
    while ((numbers(getComputedStyle(paper).backgroundColor)[3] ?? 1) < 1) paper = paper.parentElement;
    return [luminance(getComputedStyle(text).color), luminance(getComputedStyle(paper).backgroundColor)];
}"""
TEXTS = ("#prompt textarea", "#prompt [data-testid=block-info]", "#height .info-text", "#height-note .error")


def test_a_prompt_is_typed_and_its_picture_grows(opened: Page, session: Session) -> None:
    before = len(session.made)
    field(opened, "prompt").fill("a lemon on a blue background")
    field(opened, "prompt").press("Enter")
    frame = opened.wait_for_function(FRAME).json_value()
    (made,) = made_since(opened, session, before)
    picture = opened.locator("#view .frame > img")
    assert picture.get_attribute("alt") == made.given["prompt"] == "a lemon on a blue background"
    assert picture.bounding_box() == pytest.approx(frame, abs=12)  # the preview has the picture's size
    # What the browser shows is the file, decoded.
    assert picture.evaluate("one => [one.naturalWidth, one.naturalHeight]") == [SIDE, SIDE]
    with opened.expect_download() as download:
        opened.locator("#download").click()
    assert download.value.path().read_bytes() == made.path.read_bytes()


def test_a_request_is_cancelled(opened: Page, session: Session) -> None:
    before = len(session.made)
    fill(opened, **LONG)
    opened.locator("#num_images").get_by_text("4").click()
    opened.locator("#make").click()
    opened.locator("#view .previews img").first.wait_for()
    opened.locator("#cancel").click()
    expect(opened.locator("#status")).to_contain_text("Cancelled.")
    expect(opened.locator("#make")).to_be_visible()
    assert len(session.made) == before


def test_a_mask_is_painted_and_all_else_stays(opened: Page, session: Session) -> None:
    fill(opened, **FEW)
    opened.locator("#output_format").get_by_test_id("png-radio-label").click()
    (apple,) = make(opened, session)
    opened.get_by_role("button", name="Inpaint").click()
    expect(opened.locator("#image img")).to_be_visible()
    paint(opened)
    fill(opened, prompt="a full moon on a green background")
    (made,) = make(opened, session)
    assert made.given["image"].read_bytes() == apple.path.read_bytes()
    with Image.open(made.given["mask"]) as image:
        mask = np.asarray(image.convert("L")) > 0
    assert mask.shape == (SIDE, SIDE)
    assert 0.01 < mask.mean() < 0.5
    assert mask[SIDE // 2, SIDE // 2]
    old, new = pixels(apple.path), pixels(made.path)
    assert (old == new)[~mask].all()
    assert (old != new)[mask].any()
    expect(opened.locator("#slider img")).to_have_count(2)  # before and after
    for side, share in (("Before", 1), ("After", 0), ("Both", 0.5)):
        opened.locator("#compare").get_by_text(side).click()
        opened.wait_for_function(WHERE, arg=share)


def test_a_click_counts_that_comes_before_the_last_is_answered(opened: Page, session: Session) -> None:
    fill(opened, **FEW)
    make(opened, session)
    opened.get_by_role("button", name="As image").first.click()
    expect(opened.locator("#image img")).to_be_visible()
    make(opened, session)
    expect(opened.locator("#slider img")).to_have_count(2)
    opened.wait_for_function(WHERE, arg=0.5)
    held: list[Route] = []
    opened.route(EVENT, lambda route: held.append(route), times=1)
    with opened.expect_request(EVENT):
        opened.locator("#compare").get_by_text("Before").click()
    opened.locator("#compare").get_by_text("After").click()
    expect(opened.locator("#compare input[value=After]")).to_be_checked()
    held[0].continue_()
    opened.wait_for_function(WHERE, arg=0)


def test_a_dropped_file_brings_back_its_settings(opened: Page, session: Session, tmp_path: Path) -> None:
    """The files are ones that the service made for anybody; made again on the page, they are the same to the byte."""
    defaults = {name: one.default for name, one in read_fields().items()}
    for number, ending in enumerate(("png", "jpg", "webp")):
        said = {
            "prompt": f"{number} “crème” 🐙 on a blue background",
            "negative_prompt": f"a leaf {number}",
            "aspect_ratio": "3:2",
            # Of the native size once, as many pixels as are quick twice.
            **({"width": 96, "height": 72 + number} if number else {}),
            "num_images": 2,
            "seed": 2**32 - 1 - number,
            "steps_prior": 2 + number,
            "steps_decoder": 1,
            "guidance_scale_prior": 3,
            "output_format": ending,
            "output_quality": 55 + number,
            "prompt_weighting": number != 1,
        }
        files = session.service.predict(defaults | said, lambda *_: None)
        originals = [file.read_bytes() for file in files]
        dropped = tmp_path / f"any.{ending}"
        dropped.write_bytes(originals[1])

        opened.locator("#drop input[type=file]").set_input_files(dropped)
        expect(field(opened, "prompt")).to_have_value(said["prompt"])
        expect(opened.locator("#drop-note")).to_have_text(f"The settings of any.{ending} are back.")
        for name in ("seed", "negative_prompt", "steps_prior"):
            expect(field(opened, name)).to_have_value(str(said[name]))
        expect(opened.locator("#output_quality input[type=number]")).to_have_value(str(said["output_quality"]))
        expect(field(opened, "prompt_weighting")).to_be_checked(checked=said["prompt_weighting"])
        made = make(opened, session, 2)
        assert [one.path.read_bytes() for one in made] == originals


def test_a_file_made_of_images_asks_for_them(opened: Page, session: Session, apple: Path, tmp_path: Path) -> None:
    given = {name: one.default for name, one in read_fields().items()}
    given |= {"image": apple, "image_prompts": [apple], "steps_prior": 2, "steps_decoder": 1, "seed": 3}
    (file,) = session.service.predict(given, lambda *_: None)
    original, dropped = file.read_bytes(), tmp_path / "made.webp"
    dropped.write_bytes(original)
    digest = read_record(dropped)["files"][0]["sha256"]

    opened.locator("#drop input[type=file]").set_input_files(dropped)
    expect(opened.locator("#drop-note")).to_contain_text(f"image (sha256 {digest[:12]})")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "other.png")
    opened.locator("#lacking input[type=file]").set_input_files(tmp_path / "other.png")
    expect(opened.locator("#drop-note .error")).to_contain_text("other.png")
    opened.locator("#lacking input[type=file]").set_input_files(apple)
    expect(opened.locator("#drop-note")).to_have_text("The settings of made.webp are back.")
    (made,) = make(opened, session)
    assert made.path.read_bytes() == original


def test_an_error_and_unknown_words_stand_beside_their_inputs(opened: Page, session: Session) -> None:
    before = len(session.made)
    fill(opened, height="5000")
    opened.locator("#make").click()
    error = opened.locator("#height-note .error")
    expect(error).to_have_text("height is 5000; it must be a whole number from 64 to 4096.")
    expect(opened.get_by_role("alert")).to_have_count(1)
    below = error.bounding_box()["y"] - opened.locator("#height").bounding_box()["y"]
    assert 0 < below < 200
    expect(field(opened, "height")).to_be_focused()
    expect(error).to_be_in_viewport()
    check_colours(opened, dark=False)
    assert len(session.made) == before
    fill(opened, height="", prompt="a red apple beside a cathedral", **FEW)
    make(opened, session)
    expect(error).to_have_count(0)
    expect(opened.locator("#prompt-note")).to_have_text("Stable Cascade mini does not know: cathedral.")
    opened.locator("#known button.label-wrap").click()
    expect(opened.locator("#known")).to_contain_text("accordion")


def test_what_is_no_picture_is_refused_at_once(opened: Page, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    opened.locator(".fold button.label-wrap").filter(has=opened.get_by_text("Start from an image", exact=True)).click()
    for name in ("image", "mask"):
        upload, error = opened.locator(f"#{name} input[type=file]"), opened.locator(f"#{name}-note .error")
        upload.set_input_files(tmp_path / "no.png")
        expect(error).to_contain_text(f"{name} is not a picture in one of the formats")
        expect(opened.locator(f"#{name} img")).to_have_count(0)
    expect(opened.get_by_role("alert")).to_have_count(2)  # and none of Gradio
    expect(opened.locator("#brush")).to_be_hidden()
    upload.set_input_files(tmp_path / "red.png")
    expect(error).to_have_count(0)
    expect(opened.locator("#mask img")).to_be_visible()


def test_a_picture_is_made_into_others(opened: Page, session: Session) -> None:
    fill(opened, seed="11", **FEW)
    (first,) = make(opened, session)
    count = len(session.made)
    opened.get_by_role("button", name="Again").click()
    (again,) = made_since(opened, session, count)
    assert again.path.read_bytes() == first.path.read_bytes()
    opened.get_by_role("button", name="Another seed").click()
    (other,) = made_since(opened, session, count + 1)
    assert other.seed != first.seed
    assert dict(other.given) | {"seed": 11} == dict(first.given)
    for name in ("As image prompt", "As control"):
        opened.get_by_role("button", name=name).click()
    expect(opened.locator("#image_prompts img")).to_have_count(1)
    expect(opened.locator("#control_images img")).to_have_count(1)
    (guided,) = make(opened, session)
    for name in ("image_prompts", "control_images"):
        (image,) = guided.given[name]
        assert image.read_bytes() == other.path.read_bytes()
    # A picture of the gallery, not the newest; another window has made one that this one does not know of.
    list(session.make({**other.given, "seed": 12}, threading.Event()))
    opened.locator("#gallery button.thumbnail-lg").nth(3).click()
    opened.get_by_text("Settings of this picture").click()
    expect(opened.locator("#said")).to_contain_text("11")
    opened.get_by_role("button", name="Enlarge").click()
    (large,) = made_since(opened, session, count + 4)
    assert pixels(large.path).shape == (2 * SIDE, 2 * SIDE, 3)
    assert large.given["image"].read_bytes() == first.path.read_bytes()


def test_the_page_has_what_the_model_has(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.page import Page as Layout

    def folds_and_buttons() -> tuple[set[str], set[str]]:
        page = Layout(session)
        folds = {fold.label for fold in page.fold_of.values() if fold.visible}
        return folds, {name for name, button in page.does.items() if button.visible}

    monkeypatch.setattr(session.service.cascade, "ip_adapter", None)
    folds, buttons = folds_and_buttons()
    assert folds == set(FOLDS) - {"IP-Adapter"}
    for name, value in (("ip_adapter", session.service.cascade.prior), ("image_prompts", None), ("controlnets", {})):
        monkeypatch.setattr(session.service.cascade, name, value)
    assert folds_and_buttons() == (
        folds - {"Image prompts", "Edges and other controls"} | {"IP-Adapter"},
        buttons - {"As image prompt", "As control"},
    )


def test_the_keyboard_suffices(opened: Page, session: Session) -> None:
    keys, before = opened.keyboard, len(session.made)

    def go(matches: str, key: str = "Tab", text: str = "") -> None:
        there = f"one => one.matches({matches!r}) && one.textContent.includes({text!r})"
        for _ in range(120):
            if opened.evaluate(f"({there})(document.activeElement)"):
                return
            keys.press(key)
        raise AssertionError(f"no {matches} {text} is reached")

    def give(name: str, value: str) -> None:
        go(f"#{name} :is(textarea, input)")
        keys.press("Control+A")
        keys.press("Delete")
        keys.type(value)

    give("prompt", "a robot on a beige background")
    go("#num_images input[value='4']")
    keys.press("Space")
    give("seed", "21")
    go("button.label-wrap", text="Settings")
    keys.press("Enter")
    opened.locator("#steps_prior").wait_for()
    for name, value in LONG.items():
        give(name, value)
    go("#make", "Shift+Tab")
    keys.press("Enter")
    opened.locator("#view .previews img").first.wait_for()
    keys.press("Escape")
    expect(opened.locator("#status")).to_contain_text("Cancelled.")
    expect(opened.locator("#make")).to_be_focused()
    assert len(session.made) == before
    go("#num_images input[value='1']")
    keys.press("Space")
    for name, value in (dict.fromkeys(LONG, "") | FEW).items():
        give(name, value)
    go("#make", "Shift+Tab")
    keys.press("Enter")
    (made,) = made_since(opened, session, before)
    assert (made.seed, made.given["prompt"]) == (21, "a robot on a beige background")
    # Painting needs a mouse; the mask can be said, too.
    go("#actions button", text="Inpaint")
    keys.press("Enter")
    expect(opened.locator("#image img")).to_be_visible()
    give("rectangle", f"0, 0, {SIDE // 2}, {SIDE}")
    go("#make", "Shift+Tab")
    keys.press("Enter")
    (masked,) = made_since(opened, session, before + 1)
    with Image.open(masked.given["mask"]) as mask:
        assert mask.getbbox() == (0, 0, SIDE // 2, SIDE)
    go("#compare input[value='Before']")
    keys.press("Space")
    opened.wait_for_function(WHERE, arg=1)


@pytest.mark.parametrize("look", [{"viewport": {"width": 360, "height": 740}, "colors": "dark"}])
def test_a_narrow_window_in_the_dark(opened: Page, session: Session, look: dict[str, Any]) -> None:
    fill(opened, **FEW)
    make(opened, session)
    tops = [opened.locator(one).bounding_box()["y"] for one in ("#prompt", "#make", "#view", "#gallery", "#seed")]
    assert tops == sorted(tops)
    # What a button fills is shown, even if it is below the window.
    opened.get_by_role("button", name="As image prompt").click()
    expect(opened.locator("#image_prompts img")).to_be_in_viewport()
    fill(opened, height="5000")
    opened.locator("#make").click()
    expect(opened.locator("#height-note .error")).to_be_in_viewport()
    check_colours(opened, dark=True)
    assert opened.evaluate("document.documentElement.scrollWidth") <= look["viewport"]["width"]
