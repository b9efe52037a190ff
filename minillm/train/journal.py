"""The journal of a training: what happened in it that a log of metrics does not tell, one JSON object a line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from minillm.data.files import finite
from minillm.data.rollouts import Rollout
from minillm.models.fingerprint import Fingerprint
from minillm.models.hardware import machine_facts
from minillm.redaction import redacted

logger = logging.getLogger(__name__)


class Journal:
    """Appends entries to a file, which is never rewritten; without a file it does nothing.

    An entry has `time` (seconds since 1970), `stage`, `process`, `kind` and facts of its kind:

    * `begin`, `resume`: the training begins, or goes on after `update`;
    * `push`: the weights after `update` were sent to an engine, with the sums of both sides (`Fingerprint`);
    * `batch`: the responses that this process sampled for a batch, by their digests;
    * `update`: the sum of the weights after the first update;
    * `skip`, `stop`: an update was refused, with what was wrong, and the file that holds its batch;
    * `alarm`: something that does not end a training, and should be looked at.

    Args:
        file: The file; None for a journal that nobody keeps.
        stage: The stage that the entries are of.
        process: The number of this process.
    """

    def __init__(self, file: Path | None = None, stage: str = "", process: int = 0) -> None:
        self._file, self._stage, self._process = file, stage, process
        self._told = False

    @property
    def is_kept(self) -> bool:
        """Whether entries are written."""
        return self._file is not None

    def write(self, kind: str, **facts: Any) -> None:
        """Append an entry. Secrets are hidden. A file that cannot be written is told of once, and ends nothing."""
        if self._file is None:
            return
        entry = {"time": round(time.time(), 3), "stage": self._stage, "process": self._process, "kind": kind}
        line = json.dumps(finite(redacted(entry | facts)), ensure_ascii=False, default=str) + "\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # One write to the end of the file: processes share it.
            target = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(target, line.encode("utf-8"))
            finally:
                os.close(target)
        except OSError as error:
            if not self._told:
                self._told = True
                logger.warning("%s: the journal cannot be written: %s", self._file, error.strerror or error)


def digests(rollouts: Sequence[Rollout]) -> dict[str, str]:
    """The SHA-256 of the rows and tokens of some rollouts, and that of the engine's log-probabilities, bit by bit."""
    ids = json.dumps([[rollout.row, rollout.response_ids] for rollout in rollouts])
    logprobs = hashlib.sha256()
    for rollout in rollouts:
        logprobs.update(rollout.student_logprobs.cpu().numpy().tobytes())
    return {"tokens": hashlib.sha256(ids.encode()).hexdigest(), "logprobs": logprobs.hexdigest()}


class Proof(TrainerCallback):
    """Writes the beginning of a training to its journal, and the weights after the first update.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note whether the training begins or goes on."""
        kind = "resume" if state.global_step else "begin"
        if state.is_world_process_zero:
            self._trainer.journal.write(kind, update=state.global_step, seed=args.seed, machine=machine_facts())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the sum of the weights after the first update. Every process takes part, because shards are gathered."""
        if state.global_step != 1 or not self._trainer.journal.is_kept:
            return
        student = self._trainer.accelerator.unwrap_model(self._trainer.model)
        found = Fingerprint.of(student, student.dtype)
        if state.is_world_process_zero:
            self._trainer.journal.write("update", update=1, weights=found.total)
