"""Several prompts in one batch, by the same graphs as several pictures of one."""

from pathlib import Path

import numpy as np
import pytest

from cascade import Cascade, Request

MINI = Path(__file__).parents[2] / "weights" / "mini"
STEPS = {"steps_prior": 4, "steps_decoder": 3}


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("memory", ["resident", "offload", "stream"])
def test_a_batch_is_what_generate_makes(memory: str) -> None:
    cascade = Cascade.load(MINI, "cuda", "float32", memory=memory)
    apple, pear = (Request(prompt, seed=7, **STEPS) for prompt in ("a red apple", "a pear on a blue background"))
    expected = cascade.generate(Request("a red apple", seed=7, num_images=2, **STEPS))
    same = cascade.batch([apple, Request("a red apple", seed=8, **STEPS)])
    assert [image.tobytes() for (image,) in same] == [image.tobytes() for image in expected]
    for request, (image,) in zip((apple, pear), cascade.batch([apple, pear]), strict=True):
        (alone,) = cascade.generate(request)
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 2
    assert [image.tobytes() for image in cascade.generate(Request("a red apple", seed=7, num_images=2, **STEPS))] == [
        image.tobytes() for image in expected
    ]
