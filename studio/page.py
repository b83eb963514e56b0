"""The page: where the form and the pictures are, and what its buttons do."""

import functools
import html
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from cascade.limits import InputError
from serving.inputs import check_inputs
from studio import views
from studio.fields import FOLDS
from studio.form import Form, Updates
from studio.masks import before
from studio.recall import recall
from studio.session import Cancelled, Session

# What Enlarge asks for where the model has no ControlNet for it: image to image that changes little.
ENLARGING = 0.2
# What the buttons that put a picture into the form put it into.
TARGETS = {"As image": "image", "As image prompt": "image_prompts", "As control": "control_images", "Inpaint": "brush"}


class Page:
    """The page of one session.

    Args:
        session: has the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.running: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self.blocks = gr.Blocks(title=self.title, analytics_enabled=False, fill_width=True)
        with self.blocks:
            self._lay_out()
            self._wire()

    @property
    def title(self) -> str:
        return self.session.service.origin.model["name"]

    # ---- what is where ----

    def _lay_out(self) -> None:
        self.selected, self.form, self.dropped = gr.State(-1), Form(self.session), gr.State(None)
        gr.HTML(f"<h1>{html.escape(self.title)}</h1>", elem_id="title")
        with gr.Row(elem_id="ask"):
            self.form.lay_out_prompt()
            with gr.Column(scale=1, min_width=140, elem_id="go"):
                self.make = gr.Button("Make", variant="primary", elem_id="make")
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False)
        self.form.lay_out_note("prompt")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=320):
                self._lay_out_pictures()
            with gr.Column(scale=2, min_width=320):
                self.form.lay_out_basic()
                self.form.lay_out_folds()
                self._lay_out_recall()
                self._lay_out_known()

    def _lay_out_pictures(self) -> None:
        self.view = gr.HTML(views.EMPTY, elem_id="view")
        plain = {"show_label": False, "buttons": [], "interactive": False, "visible": False}
        self.slider = gr.ImageSlider(max_height=900, elem_id="slider", **plain)
        self.status = gr.HTML(visible=False, elem_id="status")
        with gr.Row(visible=False, elem_id="actions") as self.actions:
            names = ("Again", "Another seed", "As image", "As image prompt", "As control", "Inpaint", "Enlarge")
            self.does = {name: gr.Button(name, size="sm", min_width=60) for name in names if self._can(name)}
            self.download = gr.DownloadButton("Download", size="sm", min_width=60, elem_id="download")
        self.compare = gr.Radio([*views.SIDES], show_label=False, container=False, visible=False, elem_id="compare")
        self.gallery = gr.Gallery(columns=6, fit_columns=False, allow_preview=False, elem_id="gallery", **plain)
        with gr.Accordion("Settings of this picture", open=False, visible=False) as self.said_fold:
            self.said = gr.HTML(elem_id="said")

    def _lay_out_recall(self) -> None:
        with gr.Accordion("Settings from a picture", open=True, elem_classes="fold"):
            self.drop = gr.File(
                label="A picture that was made here", show_label=False, height=110, elem_id="drop", elem_classes="wide",
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
            )  # fmt: skip
            self.drop_note = gr.HTML(visible=False, elem_id="drop-note", elem_classes="wide")
            self.lacking = gr.File(
                label="Drop its images", file_types=["image"], file_count="multiple", height=110, visible=False,
                elem_id="lacking", elem_classes="wide",
            )  # fmt: skip

    def _lay_out_known(self) -> None:
        known = self.session.service.vocabulary
        if known is None:
            return
        with gr.Accordion(f"The {len(known.objects):,} objects that this model knows", open=False, elem_id="known"):
            words = html.escape(", ".join(known.words))
            names = html.escape(", ".join(known.objects))
            gr.HTML(f"<p>It draws one object or two, and knows no other words than these: {words}.</p><p>{names}</p>")

    def _can(self, action: str) -> bool:
        folds = {"As image prompt": "Image prompts", "As control": "Edges and other controls"}
        folds |= dict.fromkeys(("As image", "Inpaint", "Enlarge"), "Start from an image")
        return action not in folds or self.form.has(folds[action])

    # ---- what happens when ----

    def _wire(self) -> None:
        form = self.form
        picture = [
            *(self.view, self.slider, self.compare, self.status, self.actions, self.download, self.gallery),
            *(self.said, self.said_fold, self.selected),
        ]
        making = {
            "fn": self._make,
            "inputs": [form.recalled, self.selected, *form.components],
            "outputs": [*picture, self.make, self.cancel, *form.notes.values(), *form.folds],
            "concurrency_limit": None,  # the session lets one run; what is wrong with another is shown at once
            "show_progress": "hidden",
        }
        quick = {"show_progress": "hidden", "queue": False}
        gr.on([self.make.click, form.inputs["prompt"].submit], **making).then(js="() => window.studio.keepFocus()")
        self.cancel.click(self._cancel, **quick)
        self.gallery.select(self._select, None, picture, **quick)
        self.compare.input(views.compared, self.compare, self.slider, **quick)
        for name in ("image", "mask"):
            image, seen = form.inputs[name], [form.inputs[name], form.notes[name], form.brush]
            # Unprocessed: Gradio would open the file, and have no useful message for one that is not a picture.
            image.input(functools.partial(form.look, name), image, seen, preprocess=False, **quick)

        filling = [*form.components, form.recalled, *form.folds]
        lists = [form.inputs["image_prompts"], form.inputs["control_images"]]
        for name, button in self.does.items():
            act = getattr(self, f"_{name.lower().replace(' ', '_')}")
            filled = button.click(act, [self.selected, *lists], filling, **quick)
            if name in TARGETS:
                filled.then(js=f"() => window.studio.show('{TARGETS[name]}')")
            else:
                filled.then(**making)
        recalling = [*filling, self.drop, self.dropped, self.drop_note, self.lacking]
        self.drop.upload(self._drop, self.drop, recalling, **quick)
        self.lacking.upload(self._add, [self.dropped, self.lacking], recalling, **quick)
        self.blocks.load(self._open, None, picture, **quick)

    def _make(self, request: gr.Request, recalled: dict[str, Any], selected: int, *values: Any) -> Iterator[Updates]:
        """Check the form, show the request while it runs, and add its pictures to the gallery."""
        cancelled, mine = threading.Event(), self.running[request.session_hash]
        mine.add(cancelled)
        idle = {self.make: gr.update(visible=True), self.cancel: gr.update(visible=False)}
        clean = {note: gr.update(visible=False) for note in (*self.form.notes.values(), self.status)}
        try:
            given = self.form.given(recalled, values)
            check_inputs(given)
            yield clean | self._unknown(given["prompt"]) | self._busy()
            for state in self.session.make(given, cancelled):
                if not state.made:
                    yield {self.view: gr.update(value=views.running(given["prompt"], state))}
            yield idle | self._shown(len(self.session.made) - len(state.made))
        except Cancelled:
            yield idle | self._shown(selected) | {self.status: views.beside("Cancelled.")}
        except (ValueError, RuntimeError, OSError) as error:
            yield clean | idle | self._shown(selected) | self._wrong(str(error))
        finally:
            mine.discard(cancelled)

    def _busy(self) -> Updates:
        return {
            self.view: gr.update(value=views.BEGUN, visible=True),
            self.make: gr.update(visible=False),
            self.cancel: gr.update(visible=True),
            **dict.fromkeys((self.slider, self.compare, self.actions, self.said_fold), gr.update(visible=False)),
        }

    def _unknown(self, prompt: str) -> Updates:
        known = self.session.service.vocabulary
        unknown = known.unknown(prompt) if known else []
        text = f"{self.title} does not know: {', '.join(unknown)}."
        return {self.form.notes["prompt"]: views.beside(text)} if unknown else {}

    def _wrong(self, error: str) -> Updates:
        """An error, beside the input that it names."""
        return self.form.wrong(error) or {self.status: views.beside(error, "error")}

    def _shown(self, at: int) -> Updates:
        """The gallery, and one of its pictures in full; none at -1."""
        made = self.session.made
        if at < 0:
            return {self.view: gr.update(value=views.EMPTY, visible=True), self.selected: at}
        one = made[at]
        source = one.given["image"]
        slider = gr.update(visible=source is not None)
        if source is not None:
            with Image.open(one.path) as picture:
                old = self.session.keep_drawn(before(source, one.given["outpaint"], *picture.size))
            slider = gr.update(value=(str(old), str(one.path)), slider_position=views.SIDES["Both"], visible=True)
        newest_first = [(str(each.path), each.given["prompt"]) for each in reversed(made)]
        defaults = {name: field.default for name, field in self.form.fields.items()}
        return {
            self.view: gr.update(value=views.finished(one), visible=source is None),
            self.slider: slider,
            self.compare: gr.update(value="Both", visible=source is not None),
            self.status: gr.update(visible=False),
            self.actions: gr.update(visible=True),
            self.download: gr.update(value=str(one.path)),
            self.gallery: gr.update(value=newest_first, selected_index=len(made) - 1 - at, visible=True),
            self.said: views.settings(one, defaults),
            self.said_fold: gr.update(visible=True),
            self.selected: at,
        }

    def _select(self, event: gr.SelectData) -> Updates:
        # By its name: another window may have made pictures since this one's gallery was filled.
        name = Path(event.value["image"]["path"]).name
        return self._shown(next(at for at, one in enumerate(self.session.made) if one.path.name == name))

    def _open(self) -> Updates:
        """What a page shows after it was loaded again."""
        return self._shown(len(self.session.made) - 1)

    def _cancel(self, request: gr.Request) -> None:
        for one in tuple(self.running[request.session_hash]):
            one.set()

    # ---- what a picture is good for ----

    def _again(self, at: int, *_: Any) -> Updates:
        return self.form.filled(self.session.made[at].given)

    def _another_seed(self, at: int, *_: Any) -> Updates:
        return self.form.filled({**self.session.made[at].given, "seed": None})

    def _enlarge(self, at: int, *_: Any) -> Updates:
        """Twice the size: by its ControlNet, or else as image to image that changes little."""
        made = self.session.made[at]
        with Image.open(made.path) as picture:
            width, height = picture.size
        needs_images = tuple(beginning for fold in FOLDS for beginning in FOLDS[fold] if fold != "LoRAs")
        given = {name: value for name, value in made.given.items() if not name.startswith(needs_images)}
        given |= {"image": made.path, "seed": made.seed, "num_images": 1, "width": None, "height": None}
        if self.form.takes("upscale"):
            return self.form.filled({**given, "upscale": True, "guidance_scale_prior": None})
        return self.form.filled({**given, "width": 2 * width, "height": 2 * height, "prompt_strength": ENLARGING})

    def _as_image(self, at: int, *_: Any) -> Updates:
        image = self.session.made[at].path
        return self.form.changed(image=image) | {self.form.brush: views.laid(str(image))}

    def _inpaint(self, at: int, *_: Any) -> Updates:
        image = self.session.made[at].path
        changed = self.form.changed(image=image, mask=None, outpaint=None, upscale=False, width=None, height=None)
        return changed | {
            self.form.rectangle: "",
            self.form.alpha: False,
            self.form.brush: views.laid(str(image)),
        }

    def _as_image_prompt(self, at: int, prompts: Any, _: Any) -> Updates:
        return self.form.changed(image_prompts=[*paths_of(prompts), self.session.made[at].path])

    def _as_control(self, at: int, _: Any, controls: Any) -> Updates:
        return self.form.changed(control_images=[*paths_of(controls), self.session.made[at].path])

    # ---- settings from a file ----

    def _drop(self, file: str) -> Updates:
        """Bring back the settings of a picture, and ask for the images that the session lacks."""
        try:
            found = recall(self.session, Path(file), self.form.fields)
        except InputError as error:
            return {self.drop_note: views.beside(str(error), "error"), self.lacking: gr.update(visible=False)}
        lacking = [f"{name} (sha256 {digest[:12] or 'not recorded'})" for name, digest in found.lacking]
        asked = f"It was made from images that are not here: {', '.join(lacking)}. Drop them below." if lacking else ""
        text = " ".join((f"The settings of {Path(file).name} are back.", *found.remarks, asked)).strip()
        return self.form.filled(found.inputs, found.exact) | {
            self.drop: None,  # ready for the next
            self.dropped: file,
            self.drop_note: views.beside(text),
            self.lacking: gr.update(visible=bool(lacking), value=None),
        }

    def _add(self, dropped: str, files: Sequence[str]) -> Updates:
        """Keep the images that a dropped picture was made from; say which are not among them."""
        wanted = {digest for _, digest in recall(self.session, Path(dropped), self.form.fields).lacking}
        others = [Path(file).name for file in files if self.session.keep(Path(file))[1] not in wanted]
        updates = self._drop(dropped)
        if others:
            updates[self.drop_note] = views.beside(
                f"{', '.join(others)}: not what that picture was made from.", "error"
            )
        return updates


def paths_of(gallery: Sequence[tuple[str, Any]] | None) -> list[str]:
    return [path for path, _ in gallery or ()]
