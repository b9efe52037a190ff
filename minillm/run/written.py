"""What a run has written, checked where it is read again: files are copied, cut and edited.

A line of a log that cannot be read is left out, because a line may be being written. A file of results that cannot be
read is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from minillm.data.files import read_json
from minillm.errors import RunError, one_line
from minillm.evaluation.metrics import HELD_OUT

_LARGEST = 1e15
Number = Annotated[float, Field(strict=True, ge=-_LARGEST, le=_LARGEST, allow_inf_nan=False)]
Kind = TypeVar("Kind", bound=BaseModel)


class _Kept(BaseModel):
    """Keeps what it does not name."""

    model_config = ConfigDict(extra="allow", strict=True)


class State(_Kept):
    """What `state.json` says of a stage."""

    finished: StrictBool
    seconds: Annotated[Number, Field(ge=0)] = 0.0
    processes: StrictInt = 1
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}


class Event(_Kept):
    """A line of the journal, as far as it is shown."""

    kind: StrictStr
    stage: StrictStr = ""
    process: Annotated[StrictInt, Field(ge=0)] = 0
    update: Annotated[StrictInt, Field(ge=0)] = 0
    what: StrictStr | list[StrictStr] = ""
    same: StrictBool | None = None
    why: StrictStr = ""
    models: dict[str, StrictStr | None] = {}


class Sample(_Kept):
    """A line of `samples.jsonl`."""

    update: StrictInt
    origin: StrictStr
    length: StrictInt
    finished: StrictBool
    prompt: StrictStr
    teacher: StrictStr | None = None
    tokens: list[StrictStr]
    kl: list[Number | None]
    advantage: list[Number | None]
    teacher_share: list[Number | None] | None = None


class Answer(_Kept):
    """A line of `evaluate/NAME.jsonl`, as far as it is shown."""

    row: StrictInt
    seed: StrictInt
    text: StrictStr


class _Criterion(_Kept):
    criterion: Annotated[StrictStr, Field(pattern=r"\S")]
    outcome: StrictStr


class _Check(_Kept):
    verdict: Literal["better", "no clear difference", "worse"]
    passed: StrictBool
    sentence: StrictStr
    criteria: list[_Criterion]


class _Interval(_Kept):
    mean: Number | None
    low: Number | None
    high: Number | None


class _Results(_Kept):
    """What is read of `results.json`."""

    models: dict[str, dict[str, Any]]
    prompts: StrictInt
    seeds: Annotated[list[StrictInt], Field(min_length=1)]


class _Recipe(BaseModel):
    sha256: str
    settings: dict[str, Any]


class _Hardware(BaseModel):
    threads: int
    processor: str = ""
    gpus: list[str] = []


class _Seeds(BaseModel):
    seed: int


class _StageSettings(BaseModel):
    settings: str


class CertifiedFile(BaseModel):
    """A file of data in a certificate, or why it was not hashed."""

    file: str | None = None
    sha256: str | None = None
    why: str = ""


class CertifiedModel(BaseModel):
    """A model in a certificate, with the hash of each of its files, or why it was not hashed."""

    source: str
    sha256: str | None = None
    files: dict[str, str] = {}
    why: str = ""


class _Pushes(BaseModel):
    all: int
    same_on_both_sides: int
    different: int
    not_compared: dict[str, int]


class Certificate(BaseModel):
    """What is read of `certificate.json`."""

    recipe: _Recipe
    hardware: _Hardware
    seeds: _Seeds
    stages: dict[str, _StageSettings]
    data: dict[str, CertifiedFile]
    made_files: dict[str, str]
    models: dict[str, CertifiedModel]
    changed: list[str]
    pushes: _Pushes
    engine_mismatch: dict[str, Number]
    events: dict[str, int]
    versions: dict[str, str]
    code: str
    hashed: dict[str, dict[str, Any]]


_SCORE: TypeAdapter[Any] = TypeAdapter(_Interval | None)
_CHANGES: TypeAdapter[Any] = TypeAdapter(dict[str, dict[str, Number | None]])
_PROMPTS: TypeAdapter[dict[int, str]] = TypeAdapter(dict[int, str])


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object that a run has written.

    Raises:
        RunError: The file cannot be read, or holds something else.
    """
    try:
        found = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise RunError(f"{file}: no JSON object, as a run writes it; choose another run_dir, or delete this one")
    return found


def read_states(file: Path) -> dict[str, Any]:
    """Read the states of the stages in `state.json`.

    Raises:
        RunError: It does not hold them.
    """
    stages = read_object(file).get("stages")
    if not isinstance(stages, dict):
        raise RunError(f"{file}: does not hold the states of stages; choose another run_dir, or delete this one")
    for name, entry in stages.items():
        try:
            State.model_validate(entry)
        except ValidationError as error:
            raise _unreadable(file, error, f" as the state of stage {name[:100]}") from error
    return stages


def read_results(file: Path) -> dict[str, Any]:
    """Read `results.json`.

    Raises:
        RunError: It does not hold what it should.
    """
    found = read_object(file)
    try:
        for scores in _Results.model_validate(found).models.values():
            for metric in HELD_OUT:
                _SCORE.validate_python(scores.get(metric.key))
        check = found.get("check")
        if isinstance(check, dict) and "sentence" not in check:  # of an earlier version
            _CHANGES.validate_python(found.get("minillm_against_warmed"))
        elif check is not None:
            _Check.model_validate(check)
    except ValidationError as error:
        raise _unreadable(file, error) from error
    return found


def read_certificate(file: Path) -> Certificate:
    """Read `certificate.json`.

    Raises:
        RunError: It does not hold what it should.
    """
    try:
        return Certificate.model_validate(read_object(file))
    except ValidationError as error:
        raise RunError(f"{file}: cannot be read as a certificate ({one_line(error)})") from error


def read_prompts(file: Path) -> dict[int, str]:
    """Read `evaluate/prompts.json`: the text of each held-out prompt by its row.

    Raises:
        RunError: It does not hold them.
    """
    try:
        return _PROMPTS.validate_python(read_object(file))
    except ValidationError as error:
        raise _unreadable(file, error) from error


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSONL file that may be being written, or absent; a line that is none is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def those_that_are(kind: type[Kind], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that are of a kind, as they are."""
    return [dict(row) for row in rows if _is(kind, row)]


def logged_numbers(history: Any) -> list[dict[str, Any]]:
    """Return the entries of a log that have a step, each with the values that are numbers.

    A loss that is None was not finite, and is kept.
    """
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    entries = [
        {key: value for key, value in row.items() if _is_number(value) or (key == "loss" and value is None)}
        for row in rows
    ]
    return [entry for entry in entries if isinstance(entry.get("step"), int)]


def _is(kind: type[BaseModel], row: Any) -> bool:
    try:
        found = kind.model_validate(row)
    except ValidationError:
        return False
    if isinstance(found, Sample):
        columns = (found.kl, found.advantage, found.teacher_share or found.tokens)
        return all(len(column) == len(found.tokens) for column in columns)
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) <= _LARGEST if isinstance(value, float) else abs(value) <= int(_LARGEST)


def _unreadable(file: Path, error: Exception, where: str = "") -> RunError:
    return RunError(f"{file}: cannot be read{where} ({one_line(error)}); choose another run_dir, or delete this one")
