"""Measures one point of `scaling.py`, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import scaling_rows
import scaling_suite
from contenders import PHASES, Worker, WorkerError, Workload
from measure import median
from scaling_models import Models
from scaling_plan import Planned, expected_rows, operations, plan_models, plan_update, prompt_lengths
from scaling_points import MICRO_BATCH, Point, Settings

from minillm.models.shape import shape_of
from minillm.run.plan import Machine

_START = 60.0  # seconds until a process with vLLM makes its first update, about
_PROMPTS = 32  # of an evaluation
_LONG = 60.0  # planned seconds of an update, from which it is measured once and without a round before
Record = dict[str, Any]


@dataclass(frozen=True)
class Rounds:
    """How often an update is made: before it is measured, and measured."""

    warm_up: int
    repeats: int

    @classmethod
    def of(cls, seconds: float) -> Rounds:
        """Choose the rounds of an update that is planned to take so many seconds.

        The first update compiles, mostly from a cache, and starts the engine. The latter is measured apart; the former
        hardly counts in a long one.
        """
        return cls(0, 1) if seconds >= _LONG else cls(1, 1 if seconds >= _LONG / 3 else 2)


@dataclass(frozen=True)
class Task:
    """A point that is ready to be measured."""

    point: Point
    planned: Planned
    measure: Callable[[], Record]
    """Measures it; raises `WorkerError` if a process fails."""
    expected: float
    """Seconds that this will take, roughly."""


def prepare(point: Point, models: Models, machine: Machine, earlier: dict[float, Record]) -> Task:
    """Make the models and data of a point, and plan it.

    Args:
        point: The point.
        models: Makes the models.
        machine: The machine that it is planned for.
        earlier: What was measured of fewer rows of data, by rows.
    """
    if point.settings is not None:
        work = workload(point.settings, models)
        planned = plan_update(work, machine)
        assert planned.seconds is not None
        rounds = Rounds.of(planned.seconds)
        count = rounds.warm_up + rounds.repeats
        expected = (1 + point.trl) * (_START + 1.5 * count * planned.seconds)
        return Task(point, planned, lambda: measure_update(work, rounds, trl=point.trl), expected)
    model = models.pair(Settings())[0]
    if point.kind == "models":
        count = int(point.x)
        planned = plan_models(model, models.prompts, _PROMPTS, count, machine)
        arguments = [model, models.prompts, str(count), str(_PROMPTS)]
        return Task(
            point,
            planned,
            lambda: {"ours": run_script(scaling_suite.__file__, arguments)},
            _START + 2 * (planned.seconds or 0.0),
        )
    planned = expected_rows(earlier, point.x)
    return Task(point, planned, lambda: measure_rows(model, models, int(point.x)), planned.seconds or 30.0)


def workload(settings: Settings, models: Models) -> Workload:
    """The workload of an update with these settings."""
    student, teacher = models.pair(settings)
    lengths = settings.lengths
    work = Workload(
        student,
        teacher,
        models.prompts,
        settings.sequences,
        max(lengths),
        min(MICRO_BATCH, settings.sequences),
        samples_per_prompt=settings.samples_per_prompt,
        lengths=() if len(set(lengths)) == 1 else tuple(lengths),
        measures_peak=False,
    )
    return replace(work, longest_prompt=max(prompt_lengths(work)))


def measure_update(work: Workload, rounds: Rounds, *, trl: bool) -> Record:
    """Measure updates of ours, and of TRL in turns.

    Args:
        work: The workload.
        rounds: How often.
        trl: Whether TRL takes part.

    Returns:
        `ours` and `trl` with `seconds`, `phases` and `peak_bytes` (medians, the peak of the process), the `flops` by
        phase, the `parameters` of both models, and `rounds`.
    """
    reports: dict[str, list[Record]] = {}
    with ExitStack() as stack:
        workers = []
        for name in ("ours", "trl") if trl else ("ours",):
            workers.append(Worker(name, work))
            stack.callback(workers[-1].kill)  # an interruption leaves no process behind
        for turn in range(rounds.warm_up + rounds.repeats):
            for worker in workers:
                report = worker.update()
                if turn >= rounds.warm_up:
                    reports.setdefault(worker.name, []).append(report)
        ends = {worker.name: worker.end() for worker in workers}
    _check(work, reports, ends)
    found: Record = {name: summarised(some, ends[name]) for name, some in reports.items()}
    shapes = {"student": shape_of(work.student), "teacher": shape_of(work.teacher)}
    return {
        **found,
        "flops": asdict(operations(work)),
        "parameters": {name: shape.parameters for name, shape in shapes.items()},
        "rounds": asdict(rounds),
    }


def _check(work: Workload, reports: dict[str, list[Record]], ends: dict[str, Record]) -> None:
    """Refuse results that would not be comparable."""
    wanted = sorted(set(work.lengths or (work.tokens,)))
    for name, end in ends.items():
        if end["lengths"] != wanted:
            raise WorkerError(f"{name}: responses have {end['lengths']} tokens, and not {wanted}")
        if not all(report["moved"] for report in reports[name]):
            raise WorkerError(f"{name}: an update has left weights as they were")


def summarised(reports: Sequence[Record], end: Record) -> Record:
    """Take medians of the seconds of updates and of their phases; `rest` is in no phase.

    The start of an engine, in a first update, is left out.
    """
    seconds = [report["seconds"] - report["engine_start_seconds"] for report in reports]
    phases: dict[str, list[float]] = {}
    for report, whole in zip(reports, seconds, strict=True):
        taken = {name.removesuffix("_seconds"): report["phases"][name] or 0.0 for name in PHASES}
        for name, value in (taken | {"rest": whole - sum(taken.values())}).items():
            phases.setdefault(name, []).append(value)
    found: Record = {"seconds": median(seconds), "peak_bytes": end["peak_bytes"]}
    known = any(report["phases"][name] for report in reports for name in PHASES)  # TRL reports none
    found["phases"] = {name: median(values) for name, values in phases.items()} if known else {}
    return found | ({"tokens": end["tokens"]} if "tokens" in end else {})


def measure_rows(tokenizer: str, models: Models, rows: int) -> Record:
    """Measure reading so many rows, from a file that is removed again."""
    file = models.folder / f"rows-{rows}.jsonl"
    try:
        scaling_rows.write_rows(file, models.rows, rows)
        return {"ours": run_script(scaling_rows.__file__, [tokenizer, str(file)])}
    finally:
        file.unlink(missing_ok=True)


def run_script(script: str | None, arguments: Sequence[str]) -> Record:
    """Run a script of this folder in a process of its own, and return the JSON on its last line.

    Raises:
        WorkerError: It has failed.
    """
    assert script is not None
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise WorkerError(f"{Path(script).name} failed (exit status {done.returncode}):\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
