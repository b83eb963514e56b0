"""The names that programs give the layers of Stable Cascade's networks.

A spelling is looked up with "_" in place of ".", as kohya's and LyCORIS' keys have it, so that one table serves all. The
table is made from the published names (diffusers' and transformers') in the given networks. In the published networks, no two
layers share a spelling.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Shapes = Mapping[str, Sequence[int]]

# The output of attention: Stability-AI/StableCascade and ComfyUI; kohya, 22 to 25 February 2024; OneTrainer, 20 to 23
# February 2024.
OUTPUTS = ("out_proj", "to_out", "to_out_proj", "to_out.0")
# q, k and v are parts of one matrix in the authors' files. OneTrainer numbers them.
INPUTS = {"to_q": "in_proj.0", "to_k": "in_proj.1", "to_v": "in_proj.2"}


def spellings(layer: str) -> Iterator[str]:
    """All names of a layer with a published name, that one first."""
    yield layer
    stem, found, last = layer.rpartition("attention.")
    if found and last == "to_out.0":
        yield from (f"{stem}attention.attn.{name}" for name in OUTPUTS)
    elif found and last in INPUTS:
        yield from (f"{stem}attention.attn.{name}" for name in (last, INPUTS[last]))
    if layer == "clip_txt_pooled_mapper":
        yield "clip_mapper"  # of Stage B, in the authors' names
    if layer.startswith("text_model."):
        yield layer.removeprefix("text_model.")


def flat(name: str) -> str:
    return name.replace(".", "_")


class Layers:
    """The layers of one network, by any of their names.

    Args:
        shapes: of the tensors in the network's state dict, by published name.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        # By spelling, the published layers: three for the authors' combined q, k and v.
        self._layers: dict[str, tuple[str, ...]] = {}
        self._tensors: dict[str, str] = {}
        for tensor in self.shapes:
            layer, _, kind = tensor.rpartition(".")
            for name in spellings(layer):
                self._layers.setdefault(flat(name), (layer,))
                self._tensors.setdefault(flat(f"{name}.{kind}"), tensor)
            stem, found, last = layer.rpartition("attention.")
            if found and last == "to_q":
                fused = tuple(f"{stem}attention.{name}" for name in INPUTS)
                self._layers.setdefault(flat(f"{stem}attention.attn.in_proj"), fused)

    def layer(self, name: str) -> tuple[str, ...]:
        """The published layers that a name means; () if there is none."""
        return self._layers.get(flat(name), ())

    def tensor(self, name: str) -> str | None:
        """The published tensor that the name of a whole tensor means, such as `clf.1.bias`."""
        return self._tensors.get(flat(name))


class Authored(NamedTuple):
    """A weight that the authors' training may adapt.

    Attributes:
        module: the dotted name that filters are compared with.
        layers: its published layers; three for combined q, k and v.
        shape: of the weight.
    """

    module: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]


# The order in which the authors' Stage C defines its parts.
TOP = (
    "clip_txt_mapper",
    "clip_txt_pooled_mapper",
    "clip_img_mapper",
    "embedding",
    "down_blocks",
    "down_downscalers",
    "down_repeat_mappers",
    "up_blocks",
    "up_upscalers",
    "up_repeat_mappers",
    "clf",
)


def authored(shapes: Shapes) -> list[Authored]:
    """The weights of Stage C in the order of the authors' `generator.modules()`, in which their files number them.

    Of attention, the output comes before q, k and v: a module's own weight follows those inside it.
    """
    found: list[tuple[int, Authored]] = []
    tops = {name: place for place, name in enumerate(TOP)}
    for tensor, shape in shapes.items():
        layer, _, kind = tensor.rpartition(".")
        if kind != "weight" or len(shape) < 2:
            continue
        stem, inside, last = layer.rpartition("attention.")
        if inside and last in INPUTS:
            continue
        place = tops.get(layer.partition(".")[0], len(tops))
        if not inside:
            found.append((place, Authored(layer, (layer,), tuple(shape))))
            continue
        found.append((place, Authored(f"{stem}attention.attn.out_proj", (layer,), tuple(shape))))
        fused = tuple(f"{stem}attention.{name}" for name in INPUTS)
        rows = sum(shapes[f"{name}.weight"][0] for name in fused)
        found.append((place, Authored(f"{stem}attention.attn", fused, (rows, *shape[1:]))))
    return [one for _, one in sorted(found, key=lambda item: item[0])]
