"""`minillm watch`: a live view of a run in the terminal, from its directory alone. It imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from minillm.run.progress import SAMPLES, read_log, read_stages
from minillm.run.stages import STAGES, stage_named
from minillm.run.stages.stage import Stage
from minillm.run.written import Sample, read_lines, read_results, those_that_are
from minillm.train.logged import LOGGED

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_QUIET = 600.0  # seconds without a log after which a stage is said to be silent
_RISE, _MISMATCH, _CLIPPED = 1.5, 0.05, 0.5
_RECENT = 20  # logs that the time of an update is taken from
_SEVERE = 2.0  # nats: KL(q‖p) of a token that is shown in red

Log = Sequence[Mapping[str, Any]]


def watch(run_dir: Path, *, once: bool = False, every: float = 2.0, console: Console | None = None) -> None:
    """Show a run until it is finished, or until Ctrl-C.

    Args:
        run_dir: The run's directory.
        once: Show it once, for a terminal that is not interactive.
        every: Seconds between two looks at the directory.
        console: Where to print.

    Raises:
        MissingError: `run_dir` is not a run directory.
    """
    console = console or Console()
    read_stages(run_dir)  # refuse another folder before anything is drawn
    if once or not console.is_terminal:
        console.print(view(run_dir))
        return
    try:
        with Live(view(run_dir), console=console, refresh_per_second=4) as live:
            while not _is_over(run_dir):
                time.sleep(every)
                live.update(view(run_dir))
            live.update(view(run_dir))
    except KeyboardInterrupt:
        return


def view(run_dir: Path, now: float | None = None) -> Group:
    """What the terminal shows: stages, progress with the time left, curves, alarms, the last samples, the conclusion.

    Args:
        run_dir: The run's directory.
        now: Seconds since the epoch; by default the present.
    """
    stages, now = read_stages(run_dir), time.time() if now is None else now
    parts: list[Any] = [Text(str(run_dir), style="bold"), _stage_line(stages)]
    stage = _last_training(stages)
    if stage is not None:
        log = read_log(run_dir, stage, stages)
        parts += _training(stage, log, finished=bool(stages[stage.name]["finished"]), now=now)
    samples = those_that_are(Sample, read_lines(run_dir / SAMPLES))[-2:]
    if samples and stage is not None and stage.name == "minillm":
        parts.append(Panel(Group(*map(_sample, samples)), title="last samples, red where KL(q‖p) is high"))
    results = run_dir / "results.json"
    if results.is_file() and stages.get("evaluate", {}).get("finished"):
        sentence = (read_results(results).get("check") or {}).get("sentence")
        parts += [Text(sentence, style="bold")] if sentence else []
    return Group(*parts)


def _stage_line(stages: Mapping[str, Any]) -> Text:
    line = Text()
    for name, entry in stages.items():
        seconds = f" {entry['seconds']:.0f} s" if "seconds" in entry else ""
        mark, style = ("✓", "green") if entry["finished"] else ("▶", "bold yellow")
        line.append(f"{mark} {name}{seconds}  ", style=style)
    return line


def _last_training(stages: Mapping[str, Any]) -> Stage | None:
    """The training stage that began last; names of stages that this version does not know are passed over."""
    known = {stage.name for stage in STAGES if stage.training}
    names = [name for name in stages if name in known]
    running = [name for name in names if not stages[name]["finished"]]
    chosen = (running or sorted(names, key=[stage.name for stage in STAGES].index))[-1:]
    return stage_named(chosen[0]) if chosen else None


def _training(stage: Stage, log: Log, *, finished: bool, now: float) -> list[Any]:
    if not log:
        return [Text(f"{stage.name}: nothing is logged yet")]
    last = log[-1]
    step, steps = int(last.get("step", 0)), int(last.get("max_steps", 0) or last.get("step", 0))
    left = None if finished else seconds_left(log)
    told = f"{stage.name}: update {step} of {steps}" + (f", {_duration(left)} left" if left is not None else "")
    parts: list[Any] = [Text(told), ProgressBar(total=max(steps, 1), completed=step, width=60), _curves(stage, log)]
    alarms = find_alarms(log, silent_for=None if finished else now - float(last.get("time", now)))
    return parts + [Text(f"! {alarm}", style="bold red") for alarm in alarms]


def _curves(stage: Stage, log: Log) -> Table:
    """A line for each metric that the stage plots, as far as it is logged, and for its validation."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    keys = {key: title for title, labels in stage.curves for key in labels}
    keys |= dict.fromkeys(("eval_reverse_kl", "eval_rouge_l"), "Validation")
    for key, title in keys.items():
        values = [float(entry[key]) for entry in log if entry.get(key) is not None]
        if values:
            table.add_row(key, sparkline(values), f"{values[0]:.3g} → {values[-1]:.3g}", Text(title, style="dim"))
    return table


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """A curve in one line of text: means of equal parts of the values, from the lowest block to the highest."""
    count = min(width, len(values))
    bounds = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def seconds_left(log: Log) -> float | None:
    """Estimate the rest of a stage from its last logs; None while there are too few of them."""
    timed = [(float(entry["time"]), int(entry["step"])) for entry in log if "time" in entry and "step" in entry]
    if len(timed) < 2:
        return None
    (start, first), (end, last) = timed[-_RECENT:][0], timed[-1]
    steps = int(log[-1].get("max_steps", 0))
    return None if last <= first or not steps else max(steps - last, 0) * (end - start) / (last - first)


def find_alarms(log: Log, silent_for: float | None = None) -> list[str]:
    """What should worry whoever watches, in words.

    Args:
        log: The log of a training stage.
        silent_for: Seconds since its last entry; None for a stage that is finished.
    """
    alarms = []
    if silent_for is not None and silent_for > _QUIET:
        alarms.append(f"nothing logged for {_duration(silent_for)}: is the run still alive?")
    if any("loss" in entry and entry["loss"] is None for entry in log):
        alarms.append("the loss was not finite")
    kl = [float(entry["reverse_kl"]) for entry in log if entry.get("reverse_kl") is not None]
    size = max(len(kl) // 5, 1)
    if len(kl) >= 5 and sum(kl[-size:]) > _RISE * sum(kl[:size]):
        rise = f"reverse_kl rose from {sum(kl[:size]) / size:.2f} to {sum(kl[-size:]) / size:.2f}"
        alarms.append(f"{rise}. {LOGGED['reverse_kl'].otherwise}")
    for key, limit, what in (
        ("engine_mismatch", _MISMATCH, "engine and trainer differ by {:.2f} nats a token"),
        ("clipped", _CLIPPED, "{:.0%} of the tokens are clipped"),
    ):
        values = [float(entry[key]) for entry in log[-_RECENT:] if entry.get(key) is not None]
        if values and sum(values) / len(values) > limit:
            alarms.append(f"{what.format(sum(values) / len(values))}. {LOGGED[key].otherwise}")
    return alarms


def _sample(sample: Mapping[str, Any]) -> Text:
    text = Text(f"update {sample['update']} · {' '.join(sample['prompt'].split())[-80:]}\n", style="dim")
    for piece, kl in zip(sample["tokens"][:80], sample["kl"], strict=False):
        share = min(max((kl or 0.0) / _SEVERE, 0.0), 1.0)
        text.append(piece, style=f"not dim rgb({128 + int(127 * share)},128,128)" if share > 0.1 else "not dim")
    return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _is_over(run_dir: Path) -> bool:
    """Whether every stage that began is finished, and nothing has been written for a while."""
    stages = read_stages(run_dir)
    idle = time.time() - (run_dir / "state.json").stat().st_mtime > 5
    return idle and bool(stages) and all(entry["finished"] for entry in stages.values())
