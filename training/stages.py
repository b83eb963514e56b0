"""The stages of training: what each trains, and which components it needs."""

from dataclasses import dataclass
from pathlib import Path

from training.errors import TrainingError
from training.task import Task
from training.tasks.clip import ClipTask
from training.tasks.controlnet import CONTROL_KINDS, ControlNetTask
from training.tasks.distil_b import DistilBTask
from training.tasks.distil_c import DistilCTask
from training.tasks.ip_adapter import IPAdapterTask
from training.tasks.previewer import PreviewerTask
from training.tasks.semantic import SemanticTask
from training.tasks.stage_a import StageATask
from training.tasks.stage_b import StageBTask
from training.tasks.stage_c import StageCTask
from training.tasks.vision import VisionTask


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        task: the class that trains it. Its arguments follow from the other attributes and from ``[stage.task]``.
        trains: the components that it trains, the task's first arguments. Those in the model folder are trained further.
        needs: the frozen components of earlier stages, which the task takes by name.
        anew: whether the components always start from random weights.
        further: whether the components must exist already.
        of_all_sizes: whether it trains on all picture sizes of ``[data]``, which the task takes as ``shapes``.
        control: the kind of control of a ControlNet; None for other stages.
        adapts: the component, one of ``needs``, of which it trains an adapter, always from the start, which the task makes
            and writes as it is shipped. The task takes the component's settings in ``[model]`` as ``settings``. None for other
            stages.
    """

    task: type[Task]
    trains: tuple[str, ...]
    needs: tuple[str, ...] = ()
    anew: bool = False
    further: bool = False
    of_all_sizes: bool = False
    control: str | None = None
    adapts: str | None = None


_OF_STAGE_C = ("effnet", "previewer", "text_encoder", "image_encoder")

STAGES: dict[str, Stage] = {
    "stage_a": Stage(StageATask, ("vqgan",)),
    "clip": Stage(ClipTask, ("text_encoder", "image_encoder"), anew=True),
    "vision": Stage(VisionTask, ("image_encoder",), ("text_encoder",), further=True),
    "semantic": Stage(SemanticTask, ("decoder", "effnet", "previewer"), ("vqgan", "text_encoder")),
    "stage_b": Stage(StageBTask, ("decoder",), ("effnet", "vqgan", "text_encoder"), of_all_sizes=True),
    "stage_c": Stage(StageCTask, ("prior",), _OF_STAGE_C, of_all_sizes=True),
    "previewer": Stage(PreviewerTask, ("previewer",), ("effnet",), further=True),
    **{
        f"controlnet_{kind}": Stage(
            ControlNetTask, (f"controlnet_{kind}",), ("prior", *_OF_STAGE_C), of_all_sizes=True, control=kind
        )
        for kind in CONTROL_KINDS
    },
    "ip_adapter": Stage(IPAdapterTask, ("ip_adapter",), ("prior", *_OF_STAGE_C), of_all_sizes=True),
    "distil_c": Stage(
        DistilCTask,
        ("turbo_prior",),
        ("prior", "previewer", "text_encoder", "image_encoder"),
        of_all_sizes=True,
        adapts="prior",
    ),
    "distil_b": Stage(
        DistilBTask,
        ("turbo_decoder",),
        ("decoder", "effnet", "vqgan", "text_encoder"),
        of_all_sizes=True,
        adapts="decoder",
    ),
}

ORDER = ("tokenizer", *STAGES)


def maker(component: str) -> str:
    """The stage that makes a component. Other stages may train it further."""
    if component == "tokenizer":
        return "tokenizer"
    return next(name for name, stage in STAGES.items() if component in stage.trains and not stage.further)


def trained_by(name: str) -> tuple[str, ...]:
    """The components that a stage writes."""
    return ("tokenizer",) if name == "tokenizer" else STAGES[name].trains


def waits_for(name: str) -> tuple[str, ...]:
    """The earlier stages, in the order of `ORDER`, that write a component which a stage needs or trains further."""
    if name == "tokenizer":
        return ()
    components = {"tokenizer", *STAGES[name].needs, *STAGES[name].trains}
    return tuple(one for one in ORDER[: ORDER.index(name)] if components.intersection(trained_by(one)))


def check_needs(name: str, model: Path) -> None:
    """Checks that the model folder has the components that a stage needs.

    Raises:
        TrainingError: a component is missing; the error says which stages make it.
    """
    if name == "tokenizer":
        return
    stage = STAGES[name]
    needed = ["tokenizer", *stage.needs, *(stage.trains if stage.further else ())]
    lacking = [component for component in needed if not (model / component).is_dir()]
    if lacking:
        raise TrainingError(f"{name} needs {', '.join(lacking)}, which {model} lacks: {advice(lacking)}.")


def advice(components: list[str]) -> str:
    """A hint which stages make these components."""
    stages = [stage for stage in ORDER if stage in {maker(component) for component in components}]
    return f"run the stage{'s' * (len(stages) > 1)} {', '.join(stages)} first"
