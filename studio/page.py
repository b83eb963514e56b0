"""The page: its layout, and what its buttons do. What it asks for is read from `predict.py` (`fields`)."""

import functools
import html
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cog
import gradio as gr
from PIL import Image

from cascade.images.reading import read_picture
from cascade.limits import ALPHA, InputError
from serving.inputs import check_inputs
from studio import views
from studio.blocks import Blocks
from studio.fields import BASIC, FOLDS, fold_for, inputs_of, named_in, read_fields
from studio.masks import before, rectangle, strokes_of
from studio.recall import recall
from studio.session import Cancelled, Session

NEW_SEED = "new each time"
# What Enlarge asks for where the model has no ControlNet for it: image to image that changes little.
ENLARGING = 0.2
# What the buttons that put a picture into the form put it into.
TARGETS = {"As image": "image", "As image prompt": "image_prompts", "As control": "control_images", "Inpaint": "brush"}
Updates = dict[Any, Any]


class Page:
    """The page of one session.

    Args:
        session: has the model.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.fields = read_fields()
        self.running: defaultdict[str, set[threading.Event]] = defaultdict(set)
        self.inputs: dict[str, gr.components.Component] = {}
        self.notes: dict[str, gr.HTML] = {}
        self.fold_of: dict[str, gr.Accordion] = {}
        self.blocks = Blocks(title=self.title, analytics_enabled=False, fill_width=True)
        with self.blocks:
            self._lay_out()
            self._wire()

    @property
    def title(self) -> str:
        return self.session.service.origin.model["name"]

    # ---- what is where ----

    def _lay_out(self) -> None:
        self.selected, self.recalled, self.dropped = gr.State(-1), gr.State({}), gr.State(None)
        gr.HTML(f"<h1>{html.escape(self.title)}</h1>", elem_id="title")
        with gr.Row(elem_id="ask"):
            self._field("prompt", scale=5, autofocus=True, info=None, placeholder="What the picture shows")
            with gr.Column(scale=1, min_width=140, elem_id="go"):
                self.make = gr.Button("Make", variant="primary", elem_id="make")
                self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", visible=False)
        self.notes["prompt"] = gr.HTML(visible=False, elem_id="prompt-note")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=3, min_width=320):
                self._lay_out_pictures()
            with gr.Column(scale=2, min_width=320):
                with gr.Row(elem_id="basic"):
                    for name in BASIC:
                        hint = {"placeholder": NEW_SEED} if name == "seed" else {}
                        self._field(name, info=None, min_width=90, **hint)
                for name in BASIC:
                    self.notes[name] = gr.HTML(visible=False, elem_id=f"{name}-note")
                self._lay_out_folds()
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

    def _lay_out_folds(self) -> None:
        for title in FOLDS:
            mine = [name for name in self.fields if name not in ("prompt", *BASIC) and fold_for(name) == title]
            with gr.Accordion(title, open=False, visible=self._has(title), elem_classes="fold") as fold:
                for name in mine:
                    if name == "mask":
                        self._lay_out_brush()
                    shape = "wide" if self.fields[name].is_wide else None
                    self._field(name, visible=self._takes(name), elem_classes=shape)
                    self.notes[name] = gr.HTML(visible=False, elem_id=f"{name}-note", elem_classes="wide")
                    self.fold_of[name] = fold
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

    def _lay_out_brush(self) -> None:
        """Other ways to say the mask: a brush, the image's transparency, and for the keyboard, a rectangle."""
        self.brush = gr.ImageEditor(
            label="Paint the mask", type="pil", image_mode="RGBA", format="png", sources=(), transforms=(), layers=False,
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"), buttons=[], height=420, elem_id="brush", elem_classes="wide",
        )  # fmt: skip
        self.rectangle = gr.Textbox(
            label="Mask a rectangle", info="Left, top, right, bottom in pixels of the image.", elem_id="rectangle"
        )
        self.alpha = gr.Checkbox(label="Repaint what is transparent in the image", elem_id="alpha")

    def _lay_out_known(self) -> None:
        known = self.session.service.vocabulary
        if known is None:
            return
        with gr.Accordion(f"The {len(known.objects):,} objects that this model knows", open=False, elem_id="known"):
            words = html.escape(", ".join(known.words))
            names = html.escape(", ".join(known.objects))
            gr.HTML(f"<p>It draws one object or two, and knows no other words than these: {words}.</p><p>{names}</p>")

    def _field(self, name: str, **options: Any) -> None:
        self.inputs[name] = self.fields[name].component(**options)

    def _has(self, fold: str) -> bool:
        """Whether the model has what the inputs of a fold need."""
        cascade = self.session.service.cascade
        needed = {
            "Start from an image": cascade.effnet,
            "Image prompts": cascade.image_prompts,
            "Edges and other controls": cascade.controlnets,
            "IP-Adapter": cascade.ip_adapter,
        }
        return fold not in needed or bool(needed[fold])

    def _takes(self, name: str) -> bool:
        service = self.session.service
        needed = {
            "upscale": "super_resolution" in service.cascade.controlnets,
            "disable_safety_checker": service.safety is not None,
        }
        return needed.get(name, True)

    def _can(self, action: str) -> bool:
        folds = {"As image prompt": "Image prompts", "As control": "Edges and other controls"}
        folds |= dict.fromkeys(("As image", "Inpaint", "Enlarge"), "Start from an image")
        return action not in folds or self._has(folds[action])

    # ---- what happens when ----

    def _wire(self) -> None:
        form = [*self.inputs.values(), self.rectangle, self.alpha, self.brush]
        folds = [*dict.fromkeys(self.fold_of.values())]
        picture = [
            *(self.view, self.slider, self.compare, self.status, self.actions, self.download, self.gallery),
            *(self.said, self.said_fold, self.selected),
        ]
        making = {
            "fn": self._make,
            "inputs": [self.recalled, self.selected, *form],
            "outputs": [*picture, self.make, self.cancel, *self.notes.values(), *folds],
            "concurrency_limit": None,  # the session lets one run; what is wrong with another is shown at once
            "show_progress": "hidden",
        }
        quick = {"show_progress": "hidden", "queue": False}
        # By default, Gradio ignores an event that comes while the one before is being answered.
        latest = quick | {"trigger_mode": "always_last"}
        gr.on([self.make.click, self.inputs["prompt"].submit], **making).then(js="() => window.studio.keepFocus()")
        self.cancel.click(self._cancel, **quick)
        self.gallery.select(self._select, None, picture, **quick)
        self.compare.input(views.compared, self.compare, self.slider, **latest)
        for name in ("image", "mask"):
            image, seen = self.inputs[name], [self.inputs[name], self.notes[name], self.brush]
            # Unprocessed: Gradio would open the file, and have no useful message for one that is not a picture.
            image.input(functools.partial(self._look, name), image, seen, preprocess=False, **latest)

        filling = [*form, self.recalled, *folds]
        lists = [self.inputs["image_prompts"], self.inputs["control_images"]]
        for name, button in self.does.items():
            act = getattr(self, f"_{name.lower().replace(' ', '_')}")
            filled = button.click(act, [self.selected, *lists], filling, **quick)
            if name in TARGETS:
                filled.then(js=f"() => window.studio.show('{TARGETS[name]}')")
            else:
                filled.then(**making)
        recalling = [*filling, self.drop, self.dropped, self.drop_note, self.lacking]
        self.drop.upload(self._drop, self.drop, recalling, **latest)
        self.lacking.upload(self._add, [self.dropped, self.lacking], recalling, **latest)
        self.blocks.load(self._open, None, picture, **quick)

    def _make(self, request: gr.Request, recalled: dict[str, Any], selected: int, *values: Any) -> Iterator[Updates]:
        """Check the form, show the request while it runs, and add its pictures to the gallery."""
        cancelled, mine = threading.Event(), self.running[request.session_hash]
        mine.add(cancelled)
        idle = {self.make: gr.update(visible=True), self.cancel: gr.update(visible=False)}
        clean = {note: gr.update(visible=False) for note in (*self.notes.values(), self.status)}
        try:
            given = self._given(recalled, values)
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

    def _given(self, recalled: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
        """The inputs that the form says."""
        *values, corners, alpha, painted = values
        given = inputs_of(self.fields, dict(zip(self.inputs, values, strict=True)), recalled)
        mask = rectangle(corners, given["image"]) if (corners or "").strip() else strokes_of(painted)
        if alpha or mask is not None:
            given["mask"] = ALPHA if alpha else cog.Path(self.session.keep_drawn(mask))
        return given

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
        return {self.notes["prompt"]: views.beside(text)} if unknown else {}

    def _wrong(self, error: str) -> Updates:
        """An error, beside the input that it names."""
        name = named_in(self.fields, error)
        if name is None:
            return {self.status: views.beside(error, "error")}
        opened = {self.fold_of[name]: gr.update(open=True)} if name in self.fold_of else {}
        return {self.notes[name]: views.beside(error, "error")} | opened

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
        defaults = {name: field.default for name, field in self.fields.items()}
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

    def _look(self, name: str, file: dict[str, Any] | None) -> Updates:
        """An image was chosen or removed: lay it under the brush, or remove a file that is not a picture, and say so."""
        updates = {self.notes[name]: gr.update(visible=False)}
        path = file and file["path"]
        try:
            if path is not None:
                read_picture(Path(path), name, needed=lambda *_: (1, 1))
        except ValueError as error:
            path = None
            updates = {self.notes[name]: views.beside(str(error), "error"), self.inputs[name]: None}
        return updates | ({self.brush: views.laid(path)} if name == "image" else {})

    # ---- what a picture is good for ----

    def _filled(self, inputs: Mapping[str, Any], exact: Mapping[str, Any]) -> Updates:
        """The form with these inputs, and the defaults of the others. `exact`: those without images, see `inputs_of`."""
        values = {name: inputs.get(name, field.default) for name, field in self.fields.items()}
        values["prompt"] = inputs.get("prompt", "")
        alpha = values["mask"] == ALPHA
        values["mask"] = None if alpha else values["mask"]
        opened = [name for name, field in self.fields.items() if field.is_file and values[name]]
        return {
            **{self.inputs[name]: gr.update(value=self.fields[name].shown(value)) for name, value in values.items()},
            **{self.fold_of[name]: gr.update(open=True) for name in opened},
            self.rectangle: "",
            self.alpha: alpha,
            self.brush: views.laid(self.fields["image"].shown(values["image"])),
            self.recalled: dict(exact),
        }

    def _with(self, **values: Any) -> Updates:
        """The form with other values of some inputs."""
        fold = self.fold_of[next(iter(values))]
        filled = {self.inputs[name]: gr.update(value=self.fields[name].shown(value)) for name, value in values.items()}
        return filled | {fold: gr.update(open=True)}

    def _again(self, at: int, *_: Any) -> Updates:
        return self._with_all(self.session.made[at].given)

    def _another_seed(self, at: int, *_: Any) -> Updates:
        return self._with_all({**self.session.made[at].given, "seed": None})

    def _enlarge(self, at: int, *_: Any) -> Updates:
        """Twice the size: by its ControlNet, or else as image to image that changes little."""
        made = self.session.made[at]
        with Image.open(made.path) as picture:
            width, height = picture.size
        needs_images = tuple(beginning for fold in FOLDS for beginning in FOLDS[fold] if fold != "LoRAs")
        given = {name: value for name, value in made.given.items() if not name.startswith(needs_images)}
        given |= {"image": made.path, "seed": made.seed, "num_images": 1, "width": None, "height": None}
        if self._takes("upscale"):
            return self._with_all({**given, "upscale": True, "guidance_scale_prior": None})
        return self._with_all({**given, "width": 2 * width, "height": 2 * height, "prompt_strength": ENLARGING})

    def _with_all(self, given: Mapping[str, Any]) -> Updates:
        return self._filled(given, {name: value for name, value in given.items() if not self.fields[name].is_file})

    def _as_image(self, at: int, *_: Any) -> Updates:
        image = self.session.made[at].path
        return self._with(image=image) | {self.brush: views.laid(str(image))}

    def _inpaint(self, at: int, *_: Any) -> Updates:
        image = self.session.made[at].path
        cleared = {self.rectangle: "", self.alpha: False, self.brush: views.laid(str(image))}
        return self._with(image=image, mask=None, outpaint=None, upscale=False, width=None, height=None) | cleared

    def _as_image_prompt(self, at: int, prompts: Any, _: Any) -> Updates:
        return self._with(image_prompts=[*paths_of(prompts), self.session.made[at].path])

    def _as_control(self, at: int, _: Any, controls: Any) -> Updates:
        return self._with(control_images=[*paths_of(controls), self.session.made[at].path])

    # ---- settings from a file ----

    def _drop(self, file: str) -> Updates:
        """Bring back the settings of a picture, and ask for the images that the session lacks."""
        try:
            found = recall(self.session, Path(file), self.fields)
        except InputError as error:
            return {self.drop_note: views.beside(str(error), "error"), self.lacking: gr.update(visible=False)}
        lacking = [f"{name} (sha256 {digest[:12] or 'not recorded'})" for name, digest in found.lacking]
        asked = f"It was made from images that are not here: {', '.join(lacking)}. Drop them below." if lacking else ""
        text = " ".join((f"The settings of {Path(file).name} are back.", *found.remarks, asked)).strip()
        return self._filled(found.inputs, found.exact) | {
            self.drop: None,  # ready for the next
            self.dropped: file,
            self.drop_note: views.beside(text),
            self.lacking: gr.update(visible=bool(lacking), value=None),
        }

    def _add(self, dropped: str, files: Sequence[str]) -> Updates:
        """Keep the images that a dropped picture was made from; say which are not among them."""
        wanted = {digest for _, digest in recall(self.session, Path(dropped), self.fields).lacking}
        others = [Path(file).name for file in files if self.session.keep(Path(file))[1] not in wanted]
        updates = self._drop(dropped)
        if others:
            updates[self.drop_note] = views.beside(
                f"{', '.join(others)}: not what that picture was made from.", "error"
            )
        return updates


def paths_of(gallery: Sequence[tuple[str, Any]] | None) -> list[str]:
    return [path for path, _ in gallery or ()]
