"""Training stops at the update where a number is not finite.

The error names the rows, and the weights and the last checkpoint stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from minillm.errors import MinillmError, TrainingDiverged
from minillm.loss.config import Objective
from minillm.train.finetune import FineTuner
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.train.common import PROMPTS, ROLLOUT, arguments, launch
from tests.train.test_finetune import ROWS

KINDS = ["minillm", "supervised", "finetune"]
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def make(kind: str, pair: tuple[str, str], args: TrainingArguments) -> Any:
    if kind == "minillm":
        return MiniLLMTrainer(*pair, args, rollout=ROLLOUT, train_dataset=PROMPTS)
    if kind == "supervised":
        return SupervisedTrainer(*pair, args, train_dataset=ROWS)
    return FineTuner(pair[0], args, train_dataset=ROWS)


def before_update(trainer: Any, update: int, action: Callable[[], object]) -> None:
    """Call `action` before an update, counted from 1."""

    class Before(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == update:
                action()

    trainer.add_callback(Before())


def break_a_forward(trainer: Any, update: int, nth: int = 2) -> list[Any]:
    """Make the hidden states of the nth forward of an update NaN, and return the inputs of its forwards."""
    forwards: list[Any] = []

    def states(_: Any, args: Any, given: Any, out: Any) -> Any:
        if not (torch.is_grad_enabled() and trainer.state.global_step + 1 == update):
            return out
        forwards.append(given["input_ids"])
        if len(forwards) == nth:
            out.last_hidden_state = out.last_hidden_state * float("nan")
        return out

    trainer.model.base_model.register_forward_hook(states, with_kwargs=True)
    return forwards


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_none_ends_training_with_the_checkpoint_before_it(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    whole = make(kind, pair, arguments(tmp_path / "whole", max_steps=2))
    whole.train()
    trainer = make(kind, pair, arguments(tmp_path / "broken", **SAVING))
    forwards = break_a_forward(trainer, 3)
    with pytest.raises(TrainingDiverged) as error:
        trainer.train()
    said = str(error.value)
    assert said.startswith("update 3: the loss is nan on train_dataset row")
    assert f"the last checkpoint is {tmp_path / 'broken' / 'checkpoint-2'}." in said
    assert isinstance(error.value, MinillmError)
    assert "\n" not in said
    # Exactly the rows of the second micro-batch are named.
    rows = [int(word.strip(",.;")) for word in said.split("rows ")[1].split(". The weights")[0].split()]
    prompts = (
        [trainer.source.prompts[row] for row in rows]
        if kind == "minillm"
        else [ROWS[row]["prompt_ids"] for row in rows]
    )
    read = [ids.tolist() for ids in forwards[1]]
    assert sorted(prompts) == sorted(ids[: len(prompt)] for prompt, ids in _matched(prompts, read))
    # The update changed nothing, and no checkpoint was saved after it.
    assert trainer.state.global_step == 2
    for ours, theirs in zip(trainer.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(folder.name for folder in (tmp_path / "broken").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


def _matched(prompts: list[list[int]], rows: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Pair each prompt with a different row that begins with it."""
    left, found = list(rows), []
    for prompt in sorted(prompts, key=len, reverse=True):
        row = next(row for row in left if row[: len(prompt)] == prompt)
        left.remove(row)
        found.append((prompt, row))
    assert not left
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_norm_that_is_none_ends_training_before_the_step(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    trainer = make(kind, pair, arguments(tmp_path))
    weight = next(trainer.model.parameters())
    before_update(trainer, 2, lambda: weight.register_hook(lambda grad: grad * float("inf")))
    with pytest.raises(
        TrainingDiverged,
        match=r"^update 2: the gradient norm is (nan|inf) on train_dataset row.* no checkpoint had been",
    ):
        trainer.train()
    assert all(bool(value.isfinite().all()) for value in trainer.model.state_dict().values())


@pytest.mark.parametrize("where", ["exp_avg", "exp_avg_sq"])
def test_a_state_that_is_none_ends_training_before_anything_is_saved(
    pair: tuple[str, str], tmp_path: Path, where: str
) -> None:
    """An infinite second moment would keep the weights unchanged for ever."""
    trainer = make("supervised", pair, arguments(tmp_path, **SAVING))
    value = float("nan") if where == "exp_avg" else float("inf")

    def spoil() -> None:
        state = next(iter(trainer.optimizer.state.values()))
        state[where].view(-1)[0] = value

    before_update(trainer, 2, spoil)
    what = "weights and the optimiser's state" if where == "exp_avg" else "the optimiser's state"
    with pytest.raises(
        TrainingDiverged, match=rf"^update 2: the step left {what} that are not finite, on train_dataset rows"
    ):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("by_engine", [True, False])
def test_rollouts_that_cannot_be_read_are_named_before_they_are_trained_on(
    pair: tuple[str, str], tmp_path: Path, by_engine: bool
) -> None:
    """KL(q‖p) of the rollouts comes from an engine that mixes the teacher in, and otherwise from a forward."""
    rollout = ROLLOUT.model_copy(update={"teacher_mix": 0.3 if by_engine else 0.0})
    trainer: Any = MiniLLMTrainer(*pair, arguments(tmp_path), rollout=rollout, train_dataset=PROMPTS)
    sample, score = trainer.source.sample, trainer.student_scores

    def sampled(*given: Any) -> Any:
        found = sample(*given)
        kl = found.rollouts[1].reverse_kl
        assert (kl is not None) is by_engine
        if kl is not None:
            kl[0] = float("nan")
        return found

    def scored(rollouts: Any, teacher: bool = False) -> Any:
        scores = score(rollouts, teacher)
        if teacher:
            scores[1].reverse_kl[0] = float("nan")
        return scores

    trainer.source.sample, trainer.student_scores = sampled, scored
    row = trainer.source.prompt_rows(0)[1]
    with pytest.raises(TrainingDiverged, match=rf"^update 1: KL\(q‖p\) is not finite on train_dataset row {row}\. "):
        trainer.train()


def test_text_and_given_responses_are_named_too(pair: tuple[str, str], tmp_path: Path) -> None:
    given = [{"prompt_ids": [2, 4 + i, 3], "response_ids": [5 + i, 6 + i, 1]} for i in range(5)]
    text = [{"text": f"w{i} w{i + 1} w7"} for i in range(8)]
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1),
        train_dataset=PROMPTS,
        text_dataset=text,
        responses=given,
        rollout=ROLLOUT.model_copy(update={"on_policy": 0.5, "teacher_mix": 0.0}),
        objective=Objective.recommended(long_term=0.0, language_model_block=4),
    )
    break_a_forward(trainer, 1, nth=1)
    with pytest.raises(TrainingDiverged) as error:
        trainer.train()
    said = str(error.value)
    assert 'text that begins "w' in said
    assert "responses row" in said


class Scaler:
    """A loss scaler, as far as the trainer uses it."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def test_gradients_that_a_loss_scaler_answers_for_do_not_end_training(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds until nothing is left to scale down."""
    for scale, ends in ((1024.0, False), (1.0, True)):
        trainer = make("supervised", pair, arguments(tmp_path))
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
        trainer.accelerator.scaler = Scaler(scale)
        monkeypatch.setattr("transformers.Trainer._get_grad_norm", lambda *_, **__: torch.tensor(float("inf")))
        trainer.begin(trainer.micro_batches(0))
        if ends:
            with pytest.raises(TrainingDiverged, match="the gradient norm is inf"):
                trainer._get_grad_norm(trainer.model)
        else:
            trainer._get_grad_norm(trainer.model)
            trainer.see(torch.tensor(float("nan")))  # no scale repairs a NaN
            with pytest.raises(TrainingDiverged, match="the loss is nan"):
                trainer._get_grad_norm(trainer.model)
        monkeypatch.undo()


def test_every_process_ends_with_the_one_that_has_the_fault(pair: tuple[str, str], tmp_path: Path) -> None:
    launch(pair, tmp_path, "broken")
    said = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("update 2: the loss is nan on train_dataset row")
