"""What a run directory tells of its progress: states, logs and samples of its stages. It imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillm.errors import MissingError
from minillm.run.stages.stage import Stage
from minillm.run.written import logged_numbers, read_lines, read_object, read_states

SAMPLES = "samples.jsonl"
"""The file of a run directory that sampled responses are logged to."""
JOURNAL = "journal.jsonl"
"""The file of a run directory that every stage appends to what happened in it; see `minillm.train.journal`."""


def read_stages(run_dir: Path) -> dict[str, Any]:
    """Read the states of a run's stages, in the order in which they began.

    Raises:
        MissingError: `run_dir` is not a run directory.
        RunError: Its state cannot be read.
    """
    file = run_dir / "state.json"
    if not file.is_file():
        raise MissingError(f"{run_dir}: not the directory of a run (it has no state.json)")
    return read_states(file)


def log_file(run_dir: Path, stage: str) -> Path:
    """The file that a stage logs to while it trains."""
    return run_dir / "logs" / f"{stage}.jsonl"


def read_log(run_dir: Path, stage: Stage, stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the log of a training stage: of a finished one as it is kept with its model, else as far as it is written.

    Args:
        run_dir: The run's directory.
        stage: The stage.
        stages: The states of the stages; see `read_stages`.

    Returns:
        Entries of `log_history`; none if the stage has logged nothing.
    """
    kept, live = run_dir / str(stage.folder) / "trainer_state.json", log_file(run_dir, stage.name)
    is_running = stage.name in stages and not stages[stage.name]["finished"]
    if kept.is_file() and not is_running:
        return logged_numbers(read_object(kept).get("log_history"))
    return logged_numbers(read_lines(live))
