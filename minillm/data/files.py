"""JSON and JSONL files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def finite(value: Any) -> Any:
    """NaN and infinities, which JSON has no word for, as None, however deep they lie; everything else as it is."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    return [finite(child) for child in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> Any:
    """Write `finite(value)` so that the file is either the old one or the whole new one; returns what was written."""
    value = finite(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    part.replace(path)
    return value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Rows that this package has written."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]
