"""The options that commands which train share."""

from collections.abc import Callable

import pytest

from scripts import benchmark_training, train_mini, train_stage_c
from training import run


@pytest.mark.parametrize(
    ("parse", "arguments", "option"),
    [
        (run.parse, ["my.toml", "stage_a", "--data", "pictures", "--output", "run"], "--steps"),
        (train_stage_c.parse, ["pictures", "--config", "my.toml", "--output", "run"], "--steps"),
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
