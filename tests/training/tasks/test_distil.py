"""Distillation: the student learns the teacher's many guided steps, and the engine makes of the file what the student makes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from cascade import Cascade, Lora, Request
from cascade.sampling import Noise, finish
from cascade.speeds import SPEEDS
from cascade.weights import DISTILLED, PUBLISHED_SAMPLER, ModelFolder, StageSettings, save_model_folder
from tests.readme import ROOT
from tests.training.small import train, write_config, write_pictures
from training.configuration import read_configuration
from training.dataset import Dataset
from training.distilled import main as add_to_folder
from training.lora.adapters import add_lora, linear_layers
from training.options import Options
from training.randomness import step_generator
from training.shapes import Shapes
from training.tasks.distil import Distillation, file_tensors
from training.tasks.distil_b import DistilBTask
from training.tasks.distil_c import DistilCTask
from training.trainer import fit

CPU = torch.device("cpu")
OPTIONS = Options(steps=60, batch_size=16, learning_rate=1e-2, decay=40, warmup=5, ema=0.9)
NETWORKS = {
    DistilCTask: ("prior", "previewer", "text_encoder", "image_encoder"),
    DistilBTask: ("decoder", "effnet", "vqgan", "text_encoder"),
}
OWN = {DistilCTask: {"drop_text": 0.2, "keep_image": 0.3}, DistilBTask: {"semantic_noise": 0.1}}
TASKS = pytest.mark.parametrize("kind", NETWORKS, ids=["stage_c", "stage_b"])


class Letters(Dataset):
    """Pictures that differ in brightness, each with a letter as its caption."""

    def __init__(self, count: int, tokenizer: Any) -> None:
        super().__init__(["bcdefgh"[index % 7] for index in range(count)], tokenizer, (128, 128), CPU)

    def images(self, indices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = size or self.size
        light = (indices.float() / len(self)).view(-1, 1, 1, 1)
        return light * torch.linspace(0.5, 1, width).expand(len(indices), 3, height, width)


def make_task(components: dict[str, Any], kind: type[Distillation], **changes: Any) -> Distillation:
    torch.manual_seed(0)
    parts = copy.deepcopy({name: components[name] for name in NETWORKS[kind]})
    arguments = {
        "dataset": Letters(10, components["tokenizer"]),
        "unseen": Letters(3, components["tokenizer"]),
        "shapes": Shapes((128, 128), ((192, 128),), every=4),
        "settings": StageSettings(4, 4.0, 2.0, 0.7) if kind is DistilCTask else StageSettings(3, 1.1, 1.0, 0.7),
        "rank": 4,
        "paths": 48,
        "substeps": 3,
        "own": 0.5,
        **OWN[kind],
    }
    return kind(**parts, **{**arguments, **changes})


def batch(task: Distillation, index: int, size: int = 8) -> dict[str, Tensor]:
    return task.batch(index, size, step_generator(0, index, 0, CPU))


@pytest.mark.slow
@TASKS
def test_the_student_beats_its_teacher_in_as_few_steps(
    components: dict[str, Any], kind: type[Distillation], tmp_path: Path
) -> None:
    task = make_task(components, kind)
    teacher = {name: value.clone() for name, value in task.networks["teacher"].state_dict().items()}
    losses: list[float] = []
    note: Callable[..., None] = task.after_step
    task.after_step = lambda outputs, batch: (losses.append(outputs["error"].item()), note(outputs, batch))[1]
    before, _ = task.evaluate()
    assert fit(task, OPTIONS, tmp_path / "stage", tmp_path / "model")
    # Of the first and the last steps, on paths of either size and from either start.
    assert sum(losses[-12:]) < 0.5 * sum(losses[:12])
    figures, sheet = task.evaluate()
    assert figures["distance"] < 0.75 * figures["distance_without"]
    assert figures["distance"] < before["distance"]
    assert figures["distance_without"] == before["distance_without"]
    assert sheet.size[0] == sheet.size[1]  # three pictures by three ways
    (file,) = (tmp_path / "model").rglob("turbo.safetensors")
    assert all(tensor.any() for tensor in load_file(file).values())
    assert all(torch.equal(value, teacher[name]) for name, value in task.networks["teacher"].state_dict().items())


@pytest.mark.slow
@TASKS
def test_a_batch_has_the_steps_of_the_teachers_paths(components: dict[str, Any], kind: type[Distillation]) -> None:
    task = make_task(components, kind, own=0.0)
    for index, size in ((0, (128, 128)), (3, (192, 128))):
        made, paths = batch(task, index), task.paths(size, 8)
        steps = task.turbo.steps
        assert len(made["start"]) == len(made["step"]) == max(1, (8 if index == 0 else 5) // steps) * steps
        points = [made[name].unflatten(0, (-1, steps)) for name in ("start", "end")]
        assert torch.equal(points[0][:, 1:], points[1][:, :-1])
        conditions = task.conditions(task.dataset, {k: v for k, v in paths.items() if k != "points"})
        seeds = task._numbers[size]
        result = finish(task.steps(task.networks["teacher"], conditions, size, Noise(seeds), task.many))
        torch.testing.assert_close(paths["points"][:, -1].float(), result, atol=2e-3 * result.abs().max(), rtol=2e-3)
        shape = result.shape[1:]
        torch.testing.assert_close(paths["points"][:, 0].float(), Noise(seeds)(*shape), atol=1e-3, rtol=1e-3)
        assert len(seeds) == (42 if index == 0 else 6)
    assert task.many.steps == 3 * task.turbo.steps


@pytest.mark.slow
@TASKS
def test_a_new_student_steps_as_its_teacher_without_guidance(
    components: dict[str, Any], kind: type[Distillation]
) -> None:
    """From its own starts; one of them is the path's noise."""
    task = make_task(components, kind, own=1.0)
    made, steps = batch(task, 0), task.turbo.steps
    conditions = {name: made[name][::steps] for name in made if name not in ("start", "end", "step")}
    noise = made["start"][::steps]

    class Given(Noise):
        def __init__(self) -> None:
            super().__init__(range(len(noise)))

        def __call__(self, *shape: int) -> Tensor:
            return noise

    taken = [one.x for one in task.steps(task.networks["teacher"], conditions, (128, 128), Given(), task.turbo)]
    starts = made["start"].unflatten(0, (-1, steps))
    torch.testing.assert_close(starts[:, 1:], torch.stack(taken[:-1], dim=1), atol=1e-4, rtol=1e-4)
    errors = (torch.stack(taken, dim=1).flatten(0, 1) - made["end"]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(task(**made)["errors"], errors, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@TASKS
def test_a_stopped_training_goes_on_exactly(
    components: dict[str, Any], kind: type[Distillation], tmp_path: Path
) -> None:
    options = replace(OPTIONS, steps=6, warmup=0, decay=0)
    assert fit(make_task(components, kind), options, tmp_path / "one", tmp_path / "whole")
    for steps in (2, 6):
        fit(make_task(components, kind), replace(options, steps=steps), tmp_path / "two", tmp_path / "parts")
    ((file,), (other,)) = (list((tmp_path / name).rglob("turbo.safetensors")) for name in ("whole", "parts"))
    whole, parts = load_file(file), load_file(other)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)


@pytest.mark.slow
def test_the_engine_makes_what_the_student_makes(components: dict[str, Any], tmp_path: Path) -> None:
    """And, afterwards, what it made before, to the bit; beside another LoRA too."""
    folder, tasks = tmp_path / "weights", {}
    settings = {"prior": StageSettings(8, 4.0, 2.0, 0.7), "decoder": StageSettings(6, 1.1, 1.0, 0.7)}
    about = {"name": "Tiny", "license": "none", "native_size": 128, "dtype": torch.float32}
    save_model_folder(folder, components, sampler=settings, **about)
    for kind, name in ((DistilCTask, "prior"), (DistilBTask, "decoder")):
        tasks[name] = make_task(components, kind, settings=settings[name])
        assert fit(
            tasks[name], replace(OPTIONS, steps=12, warmup=0, decay=0, ema=0.0), tmp_path / name, tmp_path / "run"
        )
    state = {name: value.clone() for name, value in components["prior"].state_dict().items()}
    assert add_to_folder([str(tmp_path / "run"), str(folder)]) == 0
    ModelFolder.open(folder).verify()
    cascade = Cascade.load(folder, "cpu")
    request = Request("b", seed=5, width=128, height=128)
    before = cascade.generate(request)
    made = [one for one in cascade.steps(replace(request, speed="turbo")) if one.stage == "prior"]
    assert len(made) == 4
    task = tasks["prior"]
    given = {"rows": torch.tensor([0]), "image": torch.zeros(1, 1, 12)}
    conditions = task.conditions(task.dataset, given)
    student = finish(task.steps(task.networks["student"], conditions, (128, 128), Noise([5]), task.turbo))
    assert (made[-1].latents - student).norm() < 5e-3 * student.norm()  # of float16
    without = finish(task.steps(task.networks["teacher"], conditions, (128, 128), Noise([5]), task.turbo))
    assert (student - without).norm() > 5e-2 * student.norm()
    assert cascade.generate(request) == before
    assert all(torch.equal(value, state[name]) for name, value in cascade.prior.state_dict().items())
    lora = Lora(folder / DISTILLED, -1.0)  # takes back what turbo adds
    undone = cascade.generate(replace(request, speed="turbo", loras=[lora]))
    plain = {name: getattr(SPEEDS["turbo"], name) for name in ("prior", "decoder")}
    spelled = {"steps_prior": plain["prior"]["steps"], "steps_decoder": plain["decoder"]["steps"]}
    spelled |= {"guidance_scale_prior": 1, "guidance_scale_decoder": 1, "sampler": plain["prior"]["sampler"]}
    assert undone == cascade.generate(replace(request, **spelled))


@pytest.mark.slow
def test_a_folder_without_both_adapters(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "turbo_prior").mkdir()
    assert add_to_folder([str(tmp_path), str(model_folder)]) == 1
    assert capsys.readouterr().err == f"{tmp_path} has no turbo_decoder: run the stage distil_b first.\n"


def test_it_needs_the_models_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_pictures(tmp_path / "pictures", 2)
    assert train(write_config(tmp_path, "- model"), "distil_c", pictures, tmp_path / "run") == 1
    assert capsys.readouterr().err == "The configuration has no table [model], which distil_c needs.\n"


def test_the_recipe_for_the_published_model_has_its_settings() -> None:
    tables = read_configuration(ROOT / "training" / "turbo.toml")
    assert {name: StageSettings(**tables["model"][name]) for name in PUBLISHED_SAMPLER} == PUBLISHED_SAMPLER


def test_the_miniatures_file_has_less_than_two_megabytes() -> None:
    tables, size = read_configuration(ROOT / "miniature" / "mini.toml"), 0
    folder = ModelFolder.open(ROOT / "weights" / "mini")
    for stage, name in (("distil_c", "prior"), ("distil_b", "decoder")):
        network = folder.load_component(name)
        add_lora(network, linear_layers(network), rank=tables[stage]["task"]["rank"], alpha=1.0)
        size += len(safetensors.torch.save(file_tensors(name, network)))
    assert size < 2_000_000
