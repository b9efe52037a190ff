"""How the cost of an update grows: seconds by phase and peak memory along one axis at a time, beside `minillm plan`.

    python eval/speed/scaling.py [--only AXIS...] [--quick] [--table | --json] [--figures FOLDER]

The axes leave from one point, the quickstart's pair with `--tokens` and `--sequences`, and change one setting;
`corners` change several. Models of other sizes or vocabularies have random weights or heads, and all responses have a
fixed length. Every point is measured in a process of its own, in which `MiniLLMTrainer` and vLLM start anew: the
settings of a point decide how much memory vLLM takes, so an engine cannot be shared. The start is not part of an
update's seconds. At a third of the points TRL's `DistillationTrainer` takes turns with ours.

- `tokens`, `responses`, `vocabulary`, `student`, `teacher`: sizes of an update.
- `padding`: the longest response is so many times as long as the shortest one; the mean remains.
- `samples`: responses to each prompt.
- `rows`: rows of data, from the file to the first batch, and in each batch; no model is loaded.
- `models`: models of an evaluation, with sampling, scoring of the text, and the start of one engine.

A point is kept in `--out` when it is complete. A call that was stopped, or ran out of its `--minutes`, is made again
and goes on; points of another machine or version are not used. A point that is planned not to fit into memory is left
out by name. The peak memory of a process is its largest resident size, on a GPU what PyTorch had allocated at most.

Of each phase an exponent of a log-log fit is given with its 95 % interval, the exponent of the upper half of the axis,
and that of the operations that the phase consists of. What grows faster than these is named in `faults`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contenders import WorkerError
from scaling_figures import draw
from scaling_measure import Task, prepare
from scaling_models import Models
from scaling_plan import does_not_fit
from scaling_points import AXES, Point, Settings, in_order, points
from scaling_report import Measured, summarise, table
from scaling_results import Record, Results

import minillm
from minillm.models.device import machine as machine_name
from minillm.models.device import working_dtype
from minillm.run.plan import Machine, machine_for


class Curve:
    """Measures the points that are not measured yet.

    Args:
        results: Where records are kept.
        models: Makes the models.
        machine: The machine that points are planned for.
        planned_with: Where the numbers of its speed come from.
        minutes: After how many no further point is begun that would take longer.
    """

    def __init__(self, results: Results, models: Models, machine: Machine, planned_with: str, minutes: float) -> None:
        self._results, self._models, self._machine, self._with = results, models, machine, planned_with
        self._end = time.monotonic() + 60 * minutes
        self.left_out: dict[str, str] = {}
        """Points that were not measured, with the reason."""

    def measure(self, axes: dict[str, list[Point]], *, plan_again: bool = False) -> None:
        """Measure the points of all axes; those of which there are records are skipped, or only planned again."""
        for point in in_order(axes):
            record = self._results.by_key.get(point.key)
            if record is not None and point.trl and "trl" not in record:
                record = None  # it was measured without TRL, which is asked for now
            if record is not None and not plan_again:
                continue
            earlier = {one.x: found for one in axes.get("rows", []) if (found := self._results.by_key.get(one.key))}
            task = prepare(point, self._models, self._machine, earlier)
            planned = task.planned.record | {"with": self._with}
            if record is not None:
                self._results.add(point.key, record | {"planned": planned})
            else:
                self._try(task, planned)

    def _try(self, task: Task, planned: Record) -> None:
        point, memory = task.point, self._machine.memory
        if reason := does_not_fit(task.planned.peak, memory):
            self._leave_out(point, reason)
            return
        left = self._end - time.monotonic()
        if task.expected > left:
            self._leave_out(point, f"it takes {task.expected:.0f} s or so, of which {max(left, 0):.0f} are left")
            return
        if point.trl and (reason := does_not_fit(2 * (task.planned.peak or 0.0), memory)):
            self._leave_out(point, f"measured without TRL, because both are alive at once: {reason}", " TRL")
            task = prepare(_without_trl(point), self._models, self._machine, {})
        start = time.monotonic()
        try:
            found = task.measure()
        except WorkerError as error:
            self._leave_out(point, f"failed: {error}")
            return
        if point.trl:
            found.setdefault("trl", None)
        self._results.add(point.key, found | {"planned": planned})
        taken, own = time.monotonic() - start, found["ours"]
        say(f"{point}: {own['seconds']:.2f} s, {own['peak_bytes'] / 1e9:.2f} GB ({taken:.0f} s in all)")

    def _leave_out(self, point: Point, reason: str, what: str = "") -> None:
        self.left_out[f"{point}{what}"] = reason
        say(f"left out: {point}{what}: {reason}")


def _without_trl(point: Point) -> Point:
    return Point(point.axis, point.x, point.label, point.kind, point.settings)


def say(text: str) -> None:
    """Print to standard error, so that `--json` prints JSON alone."""
    print(text, file=sys.stderr, flush=True)


def measured(axes: dict[str, list[Point]], results: Results) -> dict[str, Measured]:
    """The points of each axis that have a record, with it."""
    return {
        axis: [(point, record) for point in some if (record := results.by_key.get(point.key)) is not None]
        for axis, some in axes.items()
    }


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=AXES, default=[], help="these axes alone")
    parser.add_argument("--quick", action="store_true", help="three points an axis, and no corners")
    parser.add_argument("--tokens", type=int, default=Settings.tokens, help="tokens of a response at the base point")
    parser.add_argument("--sequences", type=int, default=Settings.sequences, help="responses of an update there")
    parser.add_argument("--minutes", type=float, default=120.0, help="of a call; a further call goes on")
    parser.add_argument("--data", default="recipes/quickstart/train.jsonl", help="instructions that prompts come from")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling/points.jsonl"), help="where points are kept")
    parser.add_argument("--models", type=Path, default=Path("runs/scaling/models"), help="where models are kept")
    parser.add_argument("--plan-again", action="store_true", help="plan the points that are measured once more")
    parser.add_argument("--report", action="store_true", help="measure nothing, and report what is there")
    parser.add_argument("--table", action="store_true", help="Markdown tables")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--figures", type=Path, help="folder for a figure of each axis")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="of the figures")
    return parser.parse_args()


def main() -> None:
    """Measure, and report."""
    given, gpu = options(), torch.cuda.is_available()
    logging.disable(logging.WARNING)
    axes = points(Settings(tokens=given.tokens, sequences=given.sequences), given.only, quick=given.quick, gpu=gpu)
    versions = {"machine": machine_name(), "torch": torch.__version__, "minillm": minillm.__version__}
    results = Results(given.out, versions | {"dtype": str(working_dtype())})
    if results.others:
        say(f"{given.out}: {results.others} records are of another machine or version, and not used")
    result: dict[str, Any] = {}
    if not given.report:
        machine, planned_with = machine_for(gpus=1 if gpu else 0)
        say(f"planned with {planned_with}")
        curve = Curve(results, Models(given.models, given.data), machine, planned_with, given.minutes)
        try:
            curve.measure(axes, plan_again=given.plan_again)
        except KeyboardInterrupt:
            say(f"stopped; what is complete is in {given.out}, and the same command goes on")
            raise SystemExit(130) from None
        result["left_out"] = curve.left_out
    found = measured(axes, results)
    result |= summarise(found) | {"on": versions}
    if given.figures:
        result["figures"] = [str(file) for file in draw(found, given.figures, given.format)]
    if given.json:
        print(json.dumps(result))
    elif given.table:
        print(table(found))
    else:
        print(json.dumps({name: result[name] for name in result if name not in ("axes", "exponents")}, indent=1))


if __name__ == "__main__":
    main()
