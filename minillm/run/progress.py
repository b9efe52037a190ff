"""What a run directory tells of its progress: states, logs and samples of its stages. It imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.data.files import read_json
from minillm.errors import MissingError
from minillm.run.stages.stage import Stage

SAMPLES = "samples.jsonl"
"""The file of a run directory that sampled responses are logged to."""


def read_stages(run_dir: Path) -> dict[str, Any]:
    """Read the states of a run's stages, in the order in which they began.

    Raises:
        MissingError: `run_dir` is not a run directory.
    """
    file = run_dir / "state.json"
    if not file.is_file():
        raise MissingError(f"{run_dir}: not the directory of a run (it has no state.json)")
    return read_json(file)["stages"]


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
        return read_json(kept)["log_history"]
    return read_lines(live)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a JSONL file that may be being written, or absent: a last line that is cut is left out."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
