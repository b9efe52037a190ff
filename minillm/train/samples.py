"""Logs a few of the responses that the student trains on, token by token."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from minillm.data.files import finite
from minillm.data.rollouts import Rollout

if TYPE_CHECKING:
    from minillm.train.on_policy import MiniLLMTrainer

logger = logging.getLogger(__name__)

_COUNT = 4
_LONGEST = 256  # tokens of a response that are written
_DIGITS = 4
_told: set[str] = set()


class SampleLog(TrainerCallback):
    """Writes some rollouts of process 0 to a file of JSON lines, and as tables to the trackers of `report_to`.

    A line has `update`; `row` of the data; `prompt` and `tokens` as text; `length` of the response in tokens, of which
    256 are written; `finished`; `teacher`, where there are several; and `origin` in words. For each token it has `kl`
    (KL(q‖p) in nats) and `advantage`, as they were when the student first trained on the response, and `teacher_share`,
    the probability that the teacher drew the token: 1 − (1−α)·q(y)/p̃(y), where p̃ is the mixture. It is null where no
    teacher was mixed in.

    Args:
        trainer: The trainer.
        file: The file. A training that starts anew, or from a checkpoint, drops the lines of later updates.
        every: Every how many updates. The first update is logged too.
    """

    def __init__(self, trainer: MiniLLMTrainer, file: Path, every: int) -> None:
        self._trainer, self._file, self._every = trainer, file, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of updates that will be made again."""
        if state.is_world_process_zero:
            drop_later_lines(self._file, "update", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log some rollouts of the batch that was trained on."""
        step = state.global_step
        if not state.is_world_process_zero or (step != 1 and step % self._every):
            return
        trained = [rollout for rollout in self._trainer.rollouts if rollout.advantage is not None]
        start = step // self._every * _COUNT  # other rollouts each time, where a batch serves several updates
        chosen = [trained[(start + i) % len(trained)] for i in range(min(_COUNT, len(trained)))]
        lines = [self._line(rollout, step) for rollout in chosen]
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines)
        tell_trackers(self._trainer, lines, step)

    def _line(self, rollout: Rollout, step: int) -> dict[str, Any]:
        trainer, advantage = self._trainer, rollout.advantage
        tokenizer, alpha = trainer.student_tokenizer, trainer.rollout_config.teacher_mix
        given = trainer.source.others.is_given(rollout)
        kl, share = rollout.reverse_kl, None
        if alpha and not given:
            share = 1 - (1 - alpha) * (rollout.student_logprobs - rollout.behaviour_logprobs).exp()
        version = f"sampled with the weights after update {rollout.weights_version}"
        return {
            "update": step,
            "row": rollout.row,
            "teacher": rollout.teacher_name,
            "origin": "a given response" if given else version,
            "finished": rollout.finished,
            "length": len(rollout.response_ids),
            "prompt": tokenizer.decode(rollout.prompt_ids),
            "tokens": token_texts(tokenizer, rollout.response_ids[:_LONGEST]),
            "kl": _numbers(kl),
            "advantage": _numbers(advantage),
            "teacher_share": None if share is None else _numbers(share.clamp(0, 1)),
        }


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to a response, so that together they are the response.

    A token that ends within a character adds nothing; the one that completes the character adds it.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(list(ids[:end]))
        if whole.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(before) :] if whole.startswith(before) else whole)
        before = whole
    return texts


def drop_later_lines(file: Path, key: str, last: int) -> None:
    """Drop the lines of a log whose number `key` is above `last`, and lines that cannot be read."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)[key] <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # an interrupted write
    file.write_text("".join(kept), encoding="utf-8")


def tell_trackers(trainer: Any, lines: Sequence[dict[str, Any]], step: int) -> None:
    """Log samples as a table `samples` to TensorBoard, trackio or Weights & Biases, where `report_to` names them.

    A tracker that fails is told of once, and training goes on.
    """
    heads = ["prompt", "answer", "KL(q‖p), nats a token", "advantage", "teacher's share"]
    rows = [
        [
            line["prompt"],
            "".join(line["tokens"]),
            _mean(line["kl"]),
            _mean(line["advantage"]),
            _mean(line["teacher_share"]),
        ]
        for line in lines
    ]
    for callback in trainer.callback_handler.callbacks:
        tracker = type(callback).__name__
        try:
            if tracker == "TensorBoardCallback" and getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_text("samples", _markdown(heads, rows), step)
            elif tracker == "TrackioCallback":
                trackio, pandas = sys.modules["trackio"], sys.modules["pandas"]  # its callback has loaded both
                trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows, columns=heads))}, step=step)
            elif tracker == "WandbCallback" and sys.modules["wandb"].run is not None:
                wandb = sys.modules["wandb"]
                wandb.log({"samples": wandb.Table(columns=heads, data=rows), "train/global_step": step})
        except Exception as error:
            if tracker not in _told:
                _told.add(tracker)
                logger.warning("%s takes no table of samples (%s); they are in the run's file", tracker, error)


def _numbers(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) for value in values[:_LONGEST]]


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        text = "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
