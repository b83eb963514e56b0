"""A row of the table becomes a job: its inputs, as `serving.inputs` checks them. Jobs become batches."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bulk.run import Run
from bulk.table import Row
from cascade.limits import LIMITS, InputError
from cascade.plan import OWN
from serving.inputs import PICTURES, URL, check_inputs, file_named

# Inputs in which the pictures of a batch may differ: the engine's own, and those that only files depend on.
APART = {*OWN, "output_format", "output_quality", "disable_safety_checker", "previews"}


@dataclass(frozen=True)
class Job:
    """A row, and what is to be made of it.

    Attributes:
        number: of the row in the table.
        key: of its picture; of several, what their keys begin with.
        values: of the row, by column.
        given: all inputs by name, with the paths of pictures as `Path`, and with a seed.
        inputs: `given`, checked; empty if something is not allowed.
        error: what is not allowed; "": nothing.
    """

    number: int
    key: str
    values: Mapping[str, Any]
    given: Mapping[str, Any]
    inputs: Mapping[str, Any]
    error: str

    def key_of(self, index: int) -> str:
        """Of one of the row's pictures."""
        return self.key if self.inputs["num_images"] == 1 else f"{self.key}-{index}"


def job_of(run: Run, number: int, row: Row) -> Job:
    """The job of a row. Reads no picture."""
    key = run.key(number)
    if row.error:
        return Job(number, key, row.values, {}, {}, row.error)
    # An empty cell is an input that is left out. A prompt is not left out by mistake.
    own = {name: value for name, value in row.values.items() if value is not None or name == "prompt"}
    # All inputs, in the order of predict.py: so records are those of other requests.
    given = {name: own.get(name, limits.default) for name, limits in LIMITS.items()}
    if given["seed"] is None:
        given["seed"] = run.seed_of(number)
    try:
        given |= {name: files_of(name, given[name], Path(run.folder)) for name in PICTURES if name in own}
        return Job(number, key, row.values, given, check_inputs(given), "")
    except InputError as error:
        return Job(number, key, row.values, given, {}, str(error))


def files_of(name: str, value: Any, folder: Path) -> Any:
    """A picture's input with paths instead of texts that name files: all that are neither URLs nor words.

    Raises:
        InputError: there is no such file.
    """
    if isinstance(value, list | tuple):
        return [files_of(f"{name}[{place}]", one, folder) for place, one in enumerate(value)]
    if not isinstance(value, str) or URL.match(value) or value in LIMITS[name.partition("[")[0]].choices:
        return value
    return file_named(name, value, folder)


def batches(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """The jobs that are made together: equal in all but `APART`, in their order, with at most `most` pictures or one row.

    jobs: without errors.
    """
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(job.inputs[name] for name in LIMITS if name not in APART), []).append(job)
    for group in groups.values():
        batch, pictures = [], 0
        for job in group:
            if batch and pictures + job.inputs["num_images"] > most:
                yield batch
                batch, pictures = [], 0
            batch.append(job)
            pictures += job.inputs["num_images"]
        yield batch
