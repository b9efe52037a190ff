"""Reads and writes JSON and JSONL files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot express, by None.

    Args:
        value: Anything that JSON can hold, nested to any depth.

    Returns:
        A copy in which every number is finite. Mappings become dictionaries, and tuples become lists.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    return [finite(child) for child in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> Any:
    """Write `finite(value)` as JSON, in UTF-8. The file is replaced as a whole, so readers never see part of it.

    Args:
        path: File to write. Missing folders are created.
        value: Anything that JSON can hold.

    Returns:
        The value as it was written.
    """
    value = finite(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    part.replace(path)
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8 or not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, in UTF-8. The file is replaced as a whole, so readers never see part of it.

    Args:
        path: File to write. Missing folders are created.
        rows: The objects. They are written as they are; `finite` replaces numbers that JSON cannot express.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that this package has written. Blank lines are skipped.

    Files of users are read by `minillm.data.rows`, which reports faults with file and line.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, or a line is not JSON.
    """
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
