"""The options that commands which train share."""

import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scripts import benchmark_training, train_lora, train_mini, train_stage_c
from training import run
from training.errors import TrainingError
from training.options import Options
from training.values import Amount, Share, check_values

STAGE = ["my.toml", "stage_a", "--data", "pictures", "--output", "run"]
STAGE_C = ["pictures", "--config", "my.toml", "--output", "run"]


@pytest.mark.parametrize(
    ("parse", "arguments", "option"),
    [
        (run.parse, STAGE, "--steps"),
        (train_stage_c.parse, STAGE_C, "--steps"),
        (train_mini.parse, [], "--at-once"),
        (benchmark_training.parse, ["speed"], "--steps"),
    ],
)
def test_numbers_below_1_are_refused(
    parse: Callable[[list[str]], object], arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = option.removeprefix("--").replace("-", "_")
    assert getattr(parse([*arguments, option, "1"]), name) == 1
    for value in ("0", "-3"):
        with pytest.raises(SystemExit) as ended:
            parse([*arguments, option, value])
        assert ended.value.code == 2
        assert capsys.readouterr().err.endswith(f"error: {option} is {value}; it must be at least 1\n")


@pytest.mark.parametrize(
    ("parse", "arguments", "option", "most"),
    [
        (run.parse, STAGE, "--minutes", math.inf),
        (train_stage_c.parse, STAGE_C, "--minutes", math.inf),
        (train_mini.parse, [], "--minutes", math.inf),
        (train_lora.parse, ["pictures", "--output", "run"], "--minutes", math.inf),
        (benchmark_training.parse, ["speed"], "--recompute", 1.0),
    ],
)
@given(value=st.floats())
@example(value=math.nan)
@example(value=math.inf)
@example(value=0.5)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_are_finite_and_in_their_range(
    parse: Callable[[list[str]], object],
    arguments: list[str],
    option: str,
    most: float,
    value: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [*arguments, f"{option}={value}"]
    if 0 <= value <= most and math.isfinite(value):
        assert getattr(parse(given), option.removeprefix("--")) == value
        return
    with pytest.raises(SystemExit) as ended:
        parse(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    rule = "must be from 0 to 1" if most == 1 else "must not be negative"
    assert said.endswith(
        f"error: {option} is {value}; it {rule if math.isfinite(value) else 'must be a finite number'}"
    )


RANGES = {float: (-math.inf, math.inf), Share: (0, 1), Amount: (0, math.inf)}


@given(st.floats() | st.integers() | st.just(10**400), st.sampled_from(list(RANGES)))
@example(math.inf, Amount)
@example(10**400, float)
def test_a_configuration_has_finite_numbers_only(value: float, kind: object) -> None:
    """Those that no float can hold are not."""
    least, most = RANGES[kind]
    given, kinds = {"name": value}, {"name": (kind, True)}
    if least <= value <= most and abs(value) < 10**309:
        check_values("[table]", given, kinds)
        return
    with pytest.raises(TrainingError, match=r"^\[table\] name is \S+; it must "):
        check_values("[table]", given, kinds)


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", math.inf), ("weight_decay", math.nan), ("steps", 10**400)]
)
def test_options_are_finite(name: str, value: float) -> None:
    """Also those that come from no file."""
    with pytest.raises(TrainingError, match=f"^{name} is .*; it must be a finite number"):
        Options(**{"steps": 9, "batch_size": 4, "learning_rate": 1e-3, name: value})
