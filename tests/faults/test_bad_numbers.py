"""Numbers and texts that nothing can be learned from: found at their update, written down, and stopped at or skipped."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from minillm.data.rollouts import Rollout
from minillm.errors import InputError, OutOfMemory, TrainingDiverged
from minillm.loss.config import Objective
from minillm.train.journal import Journal
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.rollout_faults import Degenerate, LooksWrong, is_looping, rollout_faults
from tests.conftest import tiny_llama
from tests.train.common import PROMPTS, ROLLOUT, OwnEngine, arguments, teacher_model
from tests.train.test_finite import KINDS, break_a_forward, make

PLAIN = ROLLOUT.model_copy(update={"teacher_mix": 0.0})
UPDATES_OF_A_BATCH = 4  # 8 rollouts, 4 an update, twice


def snapshots(trainer: Any) -> dict[int, list[torch.Tensor]]:
    """The weights after each update, which are filled in while the trainer trains."""
    found: dict[int, list[torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found[0] = [value.clone() for value in trainer.model.state_dict().values()]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            found[state.global_step] = [value.clone() for value in trainer.model.state_dict().values()]

    trainer.add_callback(Keep())
    return found


def moved(weights: dict[int, list[torch.Tensor]]) -> list[bool]:
    """Whether each update changed any weight."""
    return [
        any(not torch.equal(a, b) for a, b in zip(weights[n - 1], weights[n], strict=True))
        for n in range(1, len(weights))
    ]


def journal_of(trainer: Any, folder: Path) -> Callable[[], list[dict[str, Any]]]:
    trainer.journal = Journal(folder / "journal.jsonl", "minillm")
    return lambda: [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


class Broken(OwnEngine):
    """An engine with weights of its own, whose first batch is spoilt."""

    def __init__(self, pair: tuple[str, str], spoil: Callable[[list[Rollout]], object]) -> None:
        super().__init__(pair, [])
        self._spoil = spoil

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        found = super().generate(*args, **kwargs)
        if self.calls == 1:
            self._spoil(found)
        return found


def on_policy(pair: tuple[str, str], folder: Path, engine: Any = None, **settings: Any) -> MiniLLMTrainer:
    rollout, objective = settings.pop("rollout", PLAIN), settings.pop("objective", None)
    args = arguments(folder, **{"max_steps": 6, **settings})
    return MiniLLMTrainer(*pair, args, rollout=rollout, objective=objective, train_dataset=PROMPTS, engine=engine)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_the_student_that_is_no_number_is_skipped(
    pair: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    trainer = make(kind, pair, arguments(tmp_path, max_steps=3))
    trainer.on_fault, entries = "skip", journal_of(trainer, tmp_path)
    weights = snapshots(trainer)
    break_a_forward(trainer, 2)
    trainer.train()
    assert moved(weights) == [True, False, True]
    assert trainer.skipped_updates == 1
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("skipped_updates") for entry in logged] == [None, 1.0, 1.0]
    ours = [value for entry in logged for key, value in entry.items() if key != "entropy" or kind != "finetune"]
    assert all(value == value for value in ours), "only TRL's own entropy of a skipped update is no number"
    [skip] = [entry for entry in entries() if entry["kind"] == "skip"]
    assert skip["update"] == 2
    assert skip["what"][0].startswith("the loss is nan on train_dataset row")
    batch = json.loads(Path(skip["batch"]).read_text())
    assert batch["faults"] == skip["what"]
    assert batch["batch"]


def nothing(rollouts: list[Rollout]) -> None:
    rollouts[1].response_ids, empty = [], torch.zeros(0)
    rollouts[1].student_logprobs = rollouts[1].behaviour_logprobs = empty


def no_number(rollouts: list[Rollout]) -> None:
    rollouts[1].student_logprobs = rollouts[1].student_logprobs * float("nan")


def above_zero(rollouts: list[Rollout]) -> None:
    rollouts[1].student_logprobs = rollouts[1].behaviour_logprobs = rollouts[1].student_logprobs.abs() + 1


def unknown_token(rollouts: list[Rollout]) -> None:
    rollouts[1].response_ids[0] = 10**12


def one_text(rollouts: list[Rollout]) -> None:
    for rollout in rollouts[1:]:
        rollout.response_ids = list(rollouts[0].response_ids)
        rollout.student_logprobs = rollout.behaviour_logprobs = rollouts[0].student_logprobs.clone() - 6
    rollouts[0].student_logprobs = rollouts[0].behaviour_logprobs = rollouts[0].student_logprobs - 6


ENGINE_FAULTS = [
    (nothing, "the response has no tokens"),
    (no_number, "log q is not finite"),
    (above_zero, "log q is above 0"),
    (unknown_token, "the response has tokens beyond the vocabulary (1000000000000, of 32)"),
    (one_text, "the engine returned one response 8 times, against its own probabilities"),
]


@pytest.mark.parametrize(("spoil", "said"), ENGINE_FAULTS, ids=[spoil.__name__ for spoil, _ in ENGINE_FAULTS])
def test_what_a_dead_engine_returns_ends_training_before_its_first_update(
    pair: tuple[str, str], tmp_path: Path, spoil: Callable[[list[Rollout]], object], said: str
) -> None:
    trainer = on_policy(pair, tmp_path, Broken(pair, spoil))
    row = trainer.source.prompt_rows(0)[1]
    with pytest.raises(TrainingDiverged) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith(f"update 1: {said}"), text
    assert str(row) in text.split(". The weights")[0]
    assert "Look at the engine and its log" in text
    [file] = (tmp_path / "faults").iterdir()
    assert str(file) in text
    written = json.loads(file.read_text())["batch"]
    assert {kept["fault"].partition(" (")[0] for kept in written} == {said.partition(" (")[0]}
    assert trainer.state.global_step == 0


def test_a_batch_of_a_dead_engine_is_skipped_as_a_whole(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = on_policy(pair, tmp_path, Broken(pair, no_number), save_strategy="steps", save_steps=2)
    trainer.on_fault, entries, weights = "skip", journal_of(trainer, tmp_path), snapshots(trainer)
    trainer.train()
    assert moved(weights) == [False] * UPDATES_OF_A_BATCH + [True, True]
    assert trainer.skipped_updates == UPDATES_OF_A_BATCH
    kinds = [entry["kind"] for entry in entries()]
    assert kinds.count("skip") == 1
    written = json.loads(next((tmp_path / "faults").iterdir()).read_text())["batch"]
    assert [kept["place"] for kept in written] == [1]
    assert set(written[0]["student_logprobs"]) == {"nan"}


@pytest.mark.parametrize("skip", [False, True])
def test_states_of_the_teacher_that_are_no_numbers_are_found_before_an_update(
    pair: tuple[str, str], tmp_path: Path, skip: bool
) -> None:
    trainer = on_policy(pair, tmp_path)
    trainer.on_fault, weights, calls = "skip" if skip else "stop", snapshots(trainer), []

    def spoil(_: Any, given: Any, out: Any) -> Any:
        calls.append(len(calls))
        out.last_hidden_state[0] *= float("nan") if len(calls) == 1 else 1.0
        return out

    teacher_model(trainer).base_model.register_forward_hook(spoil)
    if not skip:
        with pytest.raises(
            TrainingDiverged, match=r"^update 1: the teacher's states are not finite on train_dataset row"
        ):
            trainer.train()
        return
    trainer.train()
    assert moved(weights) == [False] * UPDATES_OF_A_BATCH + [True, True]


@pytest.mark.parametrize("old_logprobs", ["engine", "trainer"])
def test_an_engine_with_other_weights_ends_training(pair: tuple[str, str], tmp_path: Path, old_logprobs: Any) -> None:
    class Deaf(OwnEngine):
        """Samples another model, whatever it is sent."""

        def update_weights(self, weights: Any, version: int) -> None:
            for _ in weights:
                pass
            self.version = version

    engine = Deaf(pair, [])
    engine._model = tiny_llama(9)
    with torch.no_grad():
        for value in engine._model.parameters():
            value.mul_(3)
    objective = Objective.recommended(old_logprobs=old_logprobs)
    trainer = on_policy(pair, tmp_path, engine, objective=objective)
    with pytest.raises(TrainingDiverged, match=r"^update 1: log q of the sampled tokens differs by .* nats per token"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list((tmp_path / "faults").iterdir())


def test_importance_weights_that_would_overflow_are_bounded(pair: tuple[str, str], tmp_path: Path) -> None:
    """By e^20: e^200 is infinite in float32, and one such token would break the weights of the student."""

    def unlikely(rollouts: list[Rollout]) -> None:
        rollouts[1].behaviour_logprobs = rollouts[1].behaviour_logprobs - 200

    trainer = on_policy(pair, tmp_path, Broken(pair, unlikely))
    trainer.train()
    logged = [entry["importance_weight"] for entry in trainer.state.log_history if "importance_weight" in entry]
    assert 1e6 < max(logged) <= math.exp(20)
    assert all(
        bool(value.isfinite().all()) for value in trainer.accelerator.unwrap_model(trainer.model).state_dict().values()
    )


@pytest.mark.parametrize("phase", ["update", "teacher"])
def test_memory_that_ran_out_is_told_with_the_setting_to_change(
    pair: tuple[str, str], tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = on_policy(pair, tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model: Any = trainer.model if phase == "update" else teacher_model(trainer)
    model.base_model.register_forward_pre_hook(
        lambda *_: full() if phase == "teacher" or torch.is_grad_enabled() else None
    )
    with pytest.raises(OutOfMemory) as error:
        trainer.train()
    text = str(error.value)
    assert f"in the phase {phase}: set per_device_train_batch_size: 1 and gradient_accumulation_steps: 4" in text
    assert "Tried to allocate" in text
    assert "\n" not in text


def rollout(ids: Sequence[int], *, logq: float = -1.0, finished: bool = True) -> Rollout:
    values = torch.full((len(ids),), logq)
    return Rollout([2, 3], list(ids), values, values, 0, finished)


def test_a_collapsed_student_is_no_dead_engine() -> None:
    """Both return one text. Only the engine's own probabilities tell them apart."""
    ids = list(range(4, 14))
    assert rollout_faults([rollout(ids, logq=-0.1) for _ in range(8)], 8, 32) == {}
    assert len(rollout_faults([rollout(ids, logq=-1.0) for _ in range(8)], 8, 32)) == 8
    # Replayed and given responses may repeat sampled ones.
    assert rollout_faults([rollout(ids) for _ in range(8)], 1, 32) == {}


def test_degenerate_responses_are_counted_and_told_of_once() -> None:
    alarms: list[str] = []
    looks = LooksWrong(alarms.append)
    loop = [4, 5, 6] * 20
    well = [rollout([4 + i, 5, 6, 1]) for i in range(4)]
    cases = {
        "cut at the length limit": [rollout([4 + i, 5], finished=False) for i in range(4)],
        "end with their first token": [rollout([1]), *(rollout([1 + i % 2]) for i in range(3))],
        "the same as others": [rollout([4, 5, 1]) for _ in range(4)],
        "in a loop": [rollout([7 + i, *loop], finished=False) for i in range(3)] + [rollout([9, 1])],
    }
    for said, rollouts in cases.items():
        alarms.clear()
        for batch in (well, rollouts, rollouts, well):
            looks.look(Degenerate.of(batch))
        assert sum(said in alarm for alarm in alarms) == 1, (said, alarms)
    assert Degenerate.of(cases["in a loop"]) == Degenerate(4, 3, 0, 0, 3)
    assert Degenerate.of(cases["end with their first token"]).ended_at_once == 4
    assert not is_looping([4, 5] * 10)
    assert is_looping([9] * 32)
    assert not is_looping([*range(4, 28)] * 3)


@pytest.mark.parametrize("kind", ["one token", "truncated", "identical", "looping"])
def test_training_goes_on_with_degenerate_responses(
    pair: tuple[str, str], tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A student that collapses: every response is of one kind, with log-probabilities near 0."""

    class Collapsed(OwnEngine):
        def generate(self, prompts: Any, sampling: Any, *args: Any, **kwargs: Any) -> Any:
            ids = {"one token": [1], "identical": [7, 8, 1], "looping": [7] * 40}.get(kind)
            found = [[7 + i, 8, 9 + i] if ids is None else list(ids) for i in range(len(prompts))]
            return [
                Rollout.drawn(prompt, row, [-1e-3] * len(row), sampling, self.version)
                for prompt, row in zip(prompts, found, strict=True)
            ]

    config = PLAIN.model_copy(update={"max_new_tokens": 40, "mismatch_limit": 1e3})
    trainer = on_policy(pair, tmp_path, Collapsed(pair, []), rollout=config, max_steps=5)
    entries = journal_of(trainer, tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 5
    names = {"one token": "ended_at_once", "identical": "repeated", "looping": "looping"}
    logged = trainer.state.log_history[0]
    if kind in names:
        assert logged[f"responses_{names[kind]}"] > 0.8
    else:
        assert logged["finished"] == 0.0
    assert [entry for entry in entries() if entry["kind"] == "alarm"]
    assert "update 1: " in caplog.text


def test_a_prompt_at_the_context_limit_is_trained_on_and_one_beyond_it_refused(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    rows = [{"prompt": "<user> " + " ".join(f"w{i % 20}" for i in range(n)) + " <bot>"} for n in [244] * 8]
    config = PLAIN.model_copy(update={"max_prompt_tokens": 246})  # and 10 new ones are 256, all positions of the models

    def train(rollout: Any) -> MiniLLMTrainer:
        args = arguments(tmp_path, max_steps=1)
        trainer = MiniLLMTrainer(*pair, args, rollout=rollout, train_dataset=rows)
        trainer.train()
        return trainer

    assert max(map(len, train(config).source.prompts)) == 246
    with pytest.raises(InputError, match="256"):
        train(config.model_copy(update={"max_new_tokens": 11}))
