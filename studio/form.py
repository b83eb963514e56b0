"""The form: the inputs of a request, what they say, and how they are filled. The inputs are read from `predict.py` (`fields`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cog
import gradio as gr

from cascade.images.reading import read_picture
from cascade.limits import ALPHA
from studio import views
from studio.fields import BASIC, FOLDS, fold_for, inputs_of, named_in, read_fields
from studio.masks import rectangle, strokes_of
from studio.session import Session

NEW_SEED = "new each time"
# New values of components.
Updates = dict[Any, Any]


class Form:
    """The form of one page, made while the page is laid out.

    Args:
        session: has the model.

    Attributes:
        fields, inputs, notes: the inputs, by name; their components; and the places for sentences beside them.
        fold_of: the folds of those that are in one.
        recalled: what `inputs_of` needs of a picture whose settings are in the form.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.fields = read_fields()
        self.inputs: dict[str, gr.components.Component] = {}
        self.notes: dict[str, gr.HTML] = {}
        self.fold_of: dict[str, gr.Accordion] = {}
        self.recalled = gr.State({})

    @property
    def components(self) -> list[gr.components.Component]:
        """Those whose values `given` takes, in order."""
        return [*self.inputs.values(), self.rectangle, self.alpha, self.brush]

    @property
    def folds(self) -> list[gr.Accordion]:
        return [*dict.fromkeys(self.fold_of.values())]

    # ---- what is where ----

    def lay_out_prompt(self) -> None:
        self._field("prompt", scale=5, autofocus=True, info=None, placeholder="What the picture shows")

    def lay_out_note(self, name: str, **options: Any) -> None:
        """Leave room for a sentence beside an input."""
        self.notes[name] = gr.HTML(visible=False, elem_id=f"{name}-note", **options)

    def lay_out_basic(self) -> None:
        with gr.Row(elem_id="basic"):
            for name in BASIC:
                hint = {"placeholder": NEW_SEED} if name == "seed" else {}
                self._field(name, info=None, min_width=90, **hint)
        for name in BASIC:
            self.lay_out_note(name)

    def lay_out_folds(self) -> None:
        for title in FOLDS:
            mine = [name for name in self.fields if name not in ("prompt", *BASIC) and fold_for(name) == title]
            with gr.Accordion(title, open=False, visible=self.has(title), elem_classes="fold") as fold:
                for name in mine:
                    if name == "mask":
                        self._lay_out_brush()
                    shape = "wide" if self.fields[name].is_wide else None
                    self._field(name, visible=self.takes(name), elem_classes=shape)
                    self.lay_out_note(name, elem_classes="wide")
                    self.fold_of[name] = fold

    def _field(self, name: str, **options: Any) -> None:
        self.inputs[name] = self.fields[name].component(**options)

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

    def has(self, fold: str) -> bool:
        """Whether the model has what the inputs of a fold need."""
        cascade = self.session.service.cascade
        needed = {
            "Start from an image": cascade.effnet,
            "Image prompts": cascade.image_prompts,
            "Edges and other controls": cascade.controlnets,
            "IP-Adapter": cascade.ip_adapter,
        }
        return fold not in needed or bool(needed[fold])

    def takes(self, name: str) -> bool:
        """Whether the service has what an input needs."""
        service = self.session.service
        needed = {
            "upscale": "super_resolution" in service.cascade.controlnets,
            "disable_safety_checker": service.safety is not None,
        }
        return needed.get(name, True)

    # ---- what it says ----

    def given(self, recalled: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
        """The inputs that the form says. values: of `components`; recalled: of `recalled`."""
        *values, corners, alpha, painted = values
        given = inputs_of(self.fields, dict(zip(self.inputs, values, strict=True)), recalled)
        mask = rectangle(corners, given["image"]) if (corners or "").strip() else strokes_of(painted)
        if alpha or mask is not None:
            given["mask"] = ALPHA if alpha else cog.Path(self.session.keep_drawn(mask))
        return given

    def wrong(self, error: str) -> Updates | None:
        """An error, beside the input that it names; None if it names none."""
        name = named_in(self.fields, error)
        if name is None:
            return None
        opened = {self.fold_of[name]: gr.update(open=True)} if name in self.fold_of else {}
        return {self.notes[name]: views.beside(error, "error")} | opened

    def look(self, name: str, file: dict[str, Any] | None) -> Updates:
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

    # ---- how it is filled ----

    def filled(self, inputs: Mapping[str, Any], exact: Mapping[str, Any] | None = None) -> Updates:
        """The form with these inputs, and the defaults of the others.

        exact: those without images, as they were recalled, see `inputs_of`; None: as they are in `inputs`.
        """
        if exact is None:
            exact = {name: value for name, value in inputs.items() if not self.fields[name].is_file}
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

    def changed(self, **values: Any) -> Updates:
        """The form with other values of some inputs."""
        fold = self.fold_of[next(iter(values))]
        filled = {self.inputs[name]: gr.update(value=self.fields[name].shown(value)) for name, value in values.items()}
        return filled | {fold: gr.update(open=True)}
