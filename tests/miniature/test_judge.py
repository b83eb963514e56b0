import math

import pytest
import torch
from torch import Tensor

from miniature.compose import compose
from miniature.judge import Judge, background_colours, background_plane, nearest_colours
from miniature.scenes import COLOUR_NAMES, COLOURS, GRADIENT_WAYS, RELATIONS, sample_plans

NAMES = ["disc", "ring", "bar", "cross", "triangle", "stripes"]
STYLES = ["cartoon", "3D", "flat"]
INK = torch.tensor([[0.9, 0.5, 0.4], [0.3, 0.7, 0.9], [0.5, 0.45, 0.75]])


def shapes() -> Tensor:
    """Six shapes in three styles (inks), uint8 (18, 4, 96, 96), premultiplied."""
    at = torch.linspace(-1, 1, 96)
    y, x = torch.meshgrid(at, at, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    masks = [
        radius < 1,
        (radius < 1) & (radius > 0.6),
        x.abs() < 0.3,
        (x.abs() < 0.25) | (y.abs() < 0.25),
        y > 2 * x.abs() - 1,
        (x * 4 * math.pi).sin() > 0,
    ]
    alpha = torch.stack(masks).float()[:, None, None].expand(-1, 3, 1, -1, -1)
    colour = INK[None, :, :, None, None] * alpha
    return (torch.cat([colour, alpha], 2).flatten(0, 1) * 255).round().byte()


DRAWINGS = shapes()
JUDGE = Judge(DRAWINGS, NAMES, STYLES)


@pytest.fixture(scope="module")
def scenes() -> tuple:
    plans = sample_plans(60, NAMES, 1)
    return plans, compose(DRAWINGS, plans, size=(128, 128))


def blurred(pictures: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda x: x, blurred, lambda x: x + 0.02 * torch.sin(1e4 * x)])
def test_objects_of_real_scenes_are_named(scenes: tuple, change) -> None:
    plans, pictures = scenes
    right = 0
    for i, picture in enumerate(change(pictures)):
        relation = RELATIONS[plans.relations[i]] if plans.relations[i] >= 0 else None
        ranked = JUDGE.ranked(picture, STYLES[plans.styles[i, 0]], relation)
        assert all(sorted(names) == sorted(NAMES) for names in ranked)
        right += [names[0] for names in ranked] == [NAMES[k] for k in plans.objects[i] if k >= 0]
    assert right >= 0.97 * len(plans)


def test_a_wrong_object_is_not_found() -> None:
    plans = sample_plans(8, NAMES, 2)
    single = plans[plans.objects[:, 1] < 0]
    picture = compose(DRAWINGS, single[:1], size=(128, 128))[0]
    (ranking,) = JUDGE.ranked(picture)
    assert ranking[0] == NAMES[single.objects[0, 0]]
    assert len(set(ranking)) == len(NAMES)


def test_an_empty_picture_is_judged_without_failing() -> None:
    (ranking,) = JUDGE.ranked(torch.full((3, 128, 128), 0.5))
    assert len(ranking) == len(NAMES)
    assert len(JUDGE.ranked(torch.zeros(3, 128, 128), relation="above")) == 2


def test_background_colours_of_real_scenes(scenes: tuple) -> None:
    plans, pictures = scenes
    for i, picture in enumerate(pictures):
        expected = tuple(COLOUR_NAMES[colour] for colour in plans.colours[i])
        way = None if expected[0] == expected[1] else GRADIENT_WAYS[plans.gradient_ways[i]]
        assert background_colours(picture[None], way) == [expected]


def test_plane_follows_a_gradient_and_ignores_what_touches_the_border() -> None:
    ramp = torch.linspace(0.2, 0.8, 128)[None, None, :, None].expand(1, 3, 128, 128).clone()
    spoilt = ramp.clone()
    spoilt[..., 40:60] = 0
    assert (background_plane(ramp) - ramp).abs().max() < 0.005
    assert (background_plane(spoilt) - ramp).abs().max() < 0.03


def test_every_named_colour_is_nearest_to_itself() -> None:
    assert nearest_colours(torch.tensor(list(COLOURS.values())) / 255) == list(COLOUR_NAMES)
