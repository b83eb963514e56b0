"""Writes a shard as img2dataset does, so that others' loaders read it.

00012.tar           WebDataset: of each picture, key.webp (or .jpg, .png), key.txt with the prompt, key.json with its line
00012.parquet       a line for each picture, and for each row that has none, with its error: `Lines`
00012_stats.json    counts and times; written last, so that a shard that has it is done
"""

import io
import json
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from bulk.run import Run, name
from bulk.storage import Folder
from cascade.limits import LIMITS, Limits

# Inputs that say nothing of one picture: each has a line and a seed of its own, and there are no previews.
NOT_WRITTEN = ("num_images", "previews")
KINDS = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
KEPT = {"int": pyarrow.int64(), "float": pyarrow.float64(), "bool": pyarrow.bool_(), "str": pyarrow.string()}
BEFORE = {"key": pyarrow.string(), "row": pyarrow.int64(), "index": pyarrow.int64(), "status": pyarrow.string()}
AFTER = {"sha256": pyarrow.string(), "seconds": pyarrow.float64(), "error": pyarrow.string()}
# What no kept column may be called.
TAKEN = (*BEFORE, *AFTER)


def schema(keep: Mapping[str, str]) -> pyarrow.Schema:
    """The columns of a shard's parquet file: key, row, index (the picture's place among its row's), status, the inputs, sha256
    of the picture's file, seconds, error, and those that are kept, see `Run.keep`."""
    inputs = {one: column_of(limits) for one, limits in LIMITS.items() if one not in NOT_WRITTEN}
    return pyarrow.schema({**BEFORE, **inputs, **AFTER, **{one: KEPT[kind] for one, kind in keep.items()}})


def column_of(limits: Limits) -> pyarrow.DataType:
    """The type of an input's column. Pictures are texts: URLs and paths."""
    kind = KINDS.get(limits.kind, pyarrow.string())
    return kind if limits.most is None else pyarrow.list_(kind)


class ShardFiles:
    """A shard's files while they are written, on the local disk. A context, at whose end they are removed.

    Args:
        run: that the shard is of.
        shard: its number.
    """

    def __init__(self, run: Run, shard: int) -> None:
        self.name = name(shard)
        self.schema = schema(run.keep)
        self.lines: list[dict[str, Any]] = []
        self.begun = time.time()

    def __enter__(self) -> "ShardFiles":
        self.folder = tempfile.TemporaryDirectory(prefix="cascade-shard-")
        self.tar = tarfile.open(Path(self.folder.name, "tar"), "w")
        return self

    def __exit__(self, *_: object) -> None:
        self.tar.close()
        self.folder.cleanup()

    def add(self, line: dict[str, Any], ending: str, picture: bytes) -> None:
        """Add a picture.

        Args:
            line: its values by the columns of `schema`; it may lack some.
            ending: of its file, as in "webp".
            picture: the file's content.
        """
        line = {"status": "success", **line}
        self.lines.append(line)
        said = json.dumps({one: value for one, value in line.items() if value is not None})
        for suffix, content in ((ending, picture), ("txt", line["prompt"].encode()), ("json", said.encode())):
            member = tarfile.TarInfo(f"{line['key']}.{suffix}")
            member.size = len(content)
            self.tar.addfile(member, io.BytesIO(content))

    def fail(self, line: dict[str, Any], error: str) -> None:
        """Add a line that has no picture, and why."""
        self.lines.append({"status": "failed", **line, "error": error})

    def publish(self, output: Folder) -> dict[str, Any]:
        """Put the shard into the output's folder, and return its statistics."""
        self.tar.close()
        table, said = (Path(self.folder.name, one) for one in ("parquet", "json"))
        lines = sorted(self.lines, key=lambda line: (line["row"], line["index"]))
        parquet.write_table(pyarrow.Table.from_pylist(lines, schema=self.schema), table)
        errors = Counter(line["error"] for line in lines if line["status"] == "failed")
        stats = {
            "count": len(lines),
            "successes": len(lines) - errors.total(),
            "failed": errors.total(),
            "start_time": self.begun,
            "end_time": time.time(),
            "duration": time.time() - self.begun,
            "errors": dict(errors.most_common(10)),
        }
        said.write_text(json.dumps(stats))
        files = {"tar": Path(self.folder.name, "tar"), "parquet": table}
        output.publish({**{f"{self.name}.{one}": file for one, file in files.items()}, f"{self.name}_stats.json": said})
        return stats


def written(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as a line has them: each of its column's type. Those that are not allowed are left out."""
    found = {}
    for one, limits in LIMITS.items():
        value = inputs.get(one)
        if one in NOT_WRITTEN or value is None:
            continue
        is_picture = limits.kind is Image.Image
        try:
            value = limits.check(one, value, (lambda _, text: in_words(text)) if is_picture else None)
        except ValueError:
            continue
        found[one] = list(value) or None if isinstance(value, tuple) else value
    return found


def in_words(picture: Any) -> str:
    """A picture's URL or path. A data URL is cut off before its data."""
    text = str(picture)
    return f"{text.partition(',')[0]}," if text[:5].lower() == "data:" else text


def kept(values: Mapping[str, Any], keep: Mapping[str, str]) -> dict[str, Any]:
    """The values of kept columns, each of its column's type."""
    return {one: as_text(values.get(one)) if kind == "str" else values.get(one) for one, kind in keep.items()}


def as_text(value: Any) -> str | None:
    if value is None:
        return None
    # Lone surrogates, which JSON may have, cannot be written.
    return (value if isinstance(value, str) else json.dumps(value)).encode(errors="replace").decode()
