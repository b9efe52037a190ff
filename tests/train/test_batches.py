"""The rollouts that an update trains on: sampled, sampled ahead, replayed and given; and what the teacher reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.rollouts import Rollout
from minillm.errors import EngineError
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.teacher.local import LocalTeacher
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.schedule import BatchSchedule
from tests.train.common import OFF_POLICY, PROMPTS, ROLLOUT, OwnEngine, arguments, teacher_model, train


def test_a_resumed_run_samples_the_same_from_the_mixture(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"teacher_mix": 0.6, "inner_epochs": 1})
    whole = train(pair, tmp_path / "whole", max_steps=6, rollout=rollout)
    for stop in (3, 4):  # within a batch and between two
        folder = tmp_path / f"cut-{stop}"
        train(pair, folder, max_steps=6, rollout=rollout, stop=stop)
        resumed = train(pair, folder, max_steps=6, rollout=rollout, resume=str(folder / f"checkpoint-{stop}"))
        assert [r.response_ids for r in resumed.rollouts] == [r.response_ids for r in whole.rollouts]


@pytest.mark.parametrize(("preset", "rescoring"), [("recommended", 4), ("paper", 0), ("exact", 0), ("reference", 4)])
def test_forwards_are_counted(pair: tuple[str, str], tmp_path: Path, preset: str, rescoring: int) -> None:
    """Tokens that go through each model.

    The teacher reads each rollout once, whatever the number of inner epochs. The student reads it once per update;
    `reference` scores every rollout once more, and so does `recommended`, which centres expected returns, where the
    engine does not mix the teacher in.
    """
    rollout = ROLLOUT.model_copy(update={"teacher_mix": 0.0, "inner_epochs": 3})
    separate: Any = load_model(pair[0], torch.float32)
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, max_steps=6),
        rollout=rollout,
        train_dataset=PROMPTS,
        engine=TransformersEngine(separate),
        objective=Objective.model_validate({"preset": preset}),
    )
    read: dict[str, list[int]] = {"student": [], "teacher": []}
    for name, model in (("student", trainer.model), ("teacher", teacher_model(trainer))):
        count: Any = lambda _, args, kwargs, name=name: read[name].append(kwargs["input_ids"].numel())  # noqa: E731
        model.base_model.register_forward_pre_hook(count, with_kwargs=True)  # pyright: ignore
    trainer.train()
    # One batch of 8 rollouts, and six updates on 4 of them, each in two micro-batches of 2.
    rows = [len(r.prompt_ids) + len(r.response_ids) for r in trainer.rollouts]
    assert len(read["teacher"]) == 1
    assert read["teacher"] == [8 * max(rows)]
    assert len(read["student"]) == 12 + rescoring
    # Each rollout is in one micro-batch per epoch, padded to the longer rollout in it at most.
    epochs = 3 + (rescoring > 0)
    assert epochs * sum(rows) <= sum(read["student"]) <= epochs * len(rows) * max(rows)


def test_a_mixed_rollout_is_read_by_the_teacher_while_it_is_drawn(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path, max_steps=4), rollout=ROLLOUT, train_dataset=PROMPTS)
    calls: list[str] = []
    teacher_model(trainer).base_model.register_forward_hook(lambda *_: calls.append("teacher"))  # pyright: ignore
    original = trainer.update_on
    trainer.update_on = lambda *args: calls.append("update") or original(*args)  # pyright: ignore
    trainer.train()
    assert calls.count("update") == 8
    assert "teacher" not in calls[calls.index("update") :]


@pytest.mark.parametrize("preset", ["recommended", "exact"])
def test_a_mixing_engine_saves_the_forward_that_finds_expected_rewards(
    pair: tuple[str, str], tmp_path: Path, preset: str
) -> None:
    """`recommended` centres by KL(q‖p) of every token, which the engine knows; `exact` takes the KL of its own pass."""
    kept: list[Any] = []

    class Seen(MiniLLMTrainer):
        def use_batch(self, number: int, rollouts: list[Rollout]) -> None:
            kept.extend(None if r.reverse_kl is None else r.reverse_kl.clone() for r in rollouts)
            own = self.student_scores(rollouts, teacher=True)
            self.own = [scores.reverse_kl for scores in own]
            super().use_batch(number, rollouts)

    trainer = Seen(
        *pair,
        arguments(tmp_path, max_steps=2),
        rollout=ROLLOUT,
        train_dataset=PROMPTS,
        objective=Objective.model_validate({"preset": preset}),
    )
    trainer._rescore = lambda rollouts: pytest.fail("the batch is scored by the student once more")
    trainer.train()
    if preset == "exact":
        assert kept == [None] * 8
        return
    assert len(kept) == 8
    for engine, own in zip(kept, trainer.own, strict=True):
        torch.testing.assert_close(engine, own, rtol=1e-4, atol=1e-5)
    assert trainer.credit.baselines.unique().numel() == 8  # pyright: ignore[reportAttributeAccessIssue]


def test_reference_takes_the_trainers_own_logprobs(pair: tuple[str, str], tmp_path: Path) -> None:
    """An engine's log q may differ a little, as vLLM's does in bfloat16; `reference` replaces it as LMOps does."""
    off: Any = load_model(pair[0], torch.float32)
    teacher: Any = load_model(pair[1], torch.float32)
    engine = TransformersEngine(off, teacher=LocalTeacher(teacher))
    engine.update_weights = lambda weights, version: None  # pyright: ignore
    with torch.no_grad():
        off.model.norm.weight.mul_(1.05)
    seen = {}
    for preset in ("paper", "reference"):
        trainer = MiniLLMTrainer(
            *pair,
            arguments(tmp_path / preset, max_steps=1, learning_rate=0.0),
            rollout=ROLLOUT,
            train_dataset=PROMPTS,
            engine=engine,
            objective=Objective.model_validate({"preset": preset}),
        )
        trainer.train()
        logged = trainer.state.log_history[0]
        rollout = trainer.rollouts[0]
        own = load_model(pair[0], torch.float32)
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logq = torch.log_softmax(own(ids).logits[0, len(rollout.prompt_ids) - 1 : -1], -1)
        logq = logq.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        seen[preset] = float((rollout.student_logprobs - logq).abs().max())
        assert logged["engine_mismatch"] > 1e-3
        assert rollout.teacher is not None
        assert rollout.teacher.token_logprobs is not None
        mixture = (0.7 * rollout.student_logprobs.exp() + 0.3 * rollout.teacher.token_logprobs.exp()).log()
        torch.testing.assert_close(rollout.behaviour_logprobs, mixture, rtol=1e-5, atol=1e-6)
    assert seen["reference"] < 1e-5 < 1e-3 < seen["paper"]


def test_rescored_rollouts_of_an_engine_that_returns_no_states_keep_their_mixture(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """A server that mixes returns log p alone, which is that of its own student's rollout; p̃ is computed anew."""
    engine = TransformersEngine(
        load_model(pair[0], torch.float32), teacher=LocalTeacher(load_model(pair[1], torch.float32))
    )
    generate = engine.generate

    def without_targets(*args: Any, **kwargs: Any) -> Any:
        rollouts = generate(*args, **kwargs)
        for rollout in rollouts:
            rollout.teacher = None
        return rollouts

    engine.generate = without_targets  # pyright: ignore
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        rollout=ROLLOUT,
        train_dataset=PROMPTS,
        engine=engine,
        objective=Objective.recommended(old_logprobs="trainer"),
    )
    trainer.train()
    for rollout in trainer.rollouts:
        assert rollout.teacher is not None
        assert rollout.teacher.token_logprobs is not None
        mixture = (0.7 * rollout.student_logprobs.exp() + 0.3 * rollout.teacher.token_logprobs.exp()).log()
        torch.testing.assert_close(rollout.behaviour_logprobs, mixture, rtol=1e-5, atol=1e-6)


def test_an_engine_that_samples_another_student_is_reported_once(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for factor, alarms in ((1.05, 0), (4.0, 1)):
        off: Any = load_model(pair[0], torch.float32)
        engine = TransformersEngine(off, teacher=LocalTeacher(load_model(pair[1], torch.float32)))  # pyright: ignore
        engine.update_weights = lambda weights, version: None  # pyright: ignore
        with torch.no_grad():
            off.model.norm.weight.mul_(factor)
        trainer = MiniLLMTrainer(
            *pair,
            arguments(tmp_path, max_steps=5, learning_rate=0.0),
            rollout=ROLLOUT.model_copy(update={"mismatch_limit": 100.0}),
            train_dataset=PROMPTS,
            engine=engine,
        )
        trainer.train()
        assert (
            sum("between the sampling engine and the trainer" in record.message for record in caplog.records) == alarms
        )


def test_rewards_are_those_of_the_first_reading(pair: tuple[str, str], tmp_path: Path) -> None:
    """On later inner epochs KL(q‖p) has fallen on the same prefixes, but the advantages stay as they were."""
    rollout = ROLLOUT.model_copy(update={"inner_epochs": 6, "num_rollouts": 12})
    settings = {
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "learning_rate": 3e-3,
    }
    trainer = train(pair, tmp_path, rollout=rollout, objective=Objective.recommended(long_term=0.1), **settings)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["reverse_kl"] < 0.9 * logged[0]["reverse_kl"]
    for entry in logged[1:]:
        assert entry["advantage"] == pytest.approx(logged[0]["advantage"], rel=1e-4, abs=1e-6)


def test_the_next_batch_is_drawn_while_this_one_trains(pair: tuple[str, str], tmp_path: Path) -> None:
    trace: list[tuple[str, float, float]] = []
    rollout = ROLLOUT.model_copy(update={"overlap": True})
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, max_steps=12),
        rollout=rollout,
        train_dataset=PROMPTS,
        engine=OwnEngine(pair, trace),
    )
    original = trainer.update_on

    def traced(*args: Any) -> Any:
        start = time.monotonic()
        out = original(*args)
        trace.append(("update", start, time.monotonic()))
        return out

    trainer.update_on = traced  # pyright: ignore
    trainer.train()
    drawn = [(start, end) for kind, start, end in trace if kind == "generate"]
    updates = [(start, end) for kind, start, end in trace if kind == "update"]
    assert any(a <= start and end <= b for a, b in drawn for start, end in updates)  # a backward inside a generation
    assert len(updates) == 24
    assert trainer.state.global_step == 12
    logged = [entry for entry in trainer.state.log_history if "version_lag" in entry][::4]
    assert [entry["version_lag"] for entry in logged] == [0, 4, 4]  # in updates; a batch has four
    # Weights are relative to the student that sampled the tokens, so only the first batch is on policy.
    assert "engine_mismatch" in logged[0]
    assert "engine_mismatch" not in logged[1]
    first = next(r for r in trainer.rollouts)
    assert first.weights_version == 4


def test_given_and_earlier_responses_fill_up_a_batch(pair: tuple[str, str], tmp_path: Path) -> None:
    """GKD's share of given responses and DistiLLM's replay, under the skew KL. A resumed run has the same batches."""
    given = [{"prompt_ids": [2, 4 + i, 3], "response_ids": [5 + i, 6 + i, 1]} for i in range(5)]
    changes = {"on_policy": 0.5, "replay": 0.5, "replay_size": 6, "inner_epochs": 1, "teacher_mix": 0.0}
    rollout = ROLLOUT.model_copy(update=changes)
    batches: list[list[Any]] = []

    def run(folder: Path, **settings: Any) -> MiniLLMTrainer:
        batches.clear()
        settings = {"rollout": rollout, "objective": OFF_POLICY, "responses": given, "max_steps": 8} | settings
        original = MiniLLMTrainer.use_batch

        def adopt(self: Any, number: int, rollouts: Any) -> None:
            batches.append(list(rollouts))
            original(self, number, rollouts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MiniLLMTrainer, "use_batch", adopt)
            return train(pair, folder, **settings)

    whole = run(tmp_path / "whole")
    seen, rows = list(batches), [(r["prompt_ids"], r["response_ids"]) for r in given]
    drawn: list[Any] = []
    for number, batch in enumerate(seen):
        assert len(batch) == 8
        assert all((r.prompt_ids, r.response_ids) in rows for r in batch[4:])
        fresh = batch[: 4 if number == 0 else 2]
        assert all(r.weights_version == 2 * number for r in fresh)
        for r in batch[len(fresh) : 4]:
            assert any((r.prompt_ids, r.response_ids) == (e.prompt_ids, e.response_ids) for e in drawn[-6:])
            assert r.weights_version < 2 * number
        drawn += fresh
    logged = [e for e in whole.state.log_history if "loss" in e]
    assert all(e["loss"] == pytest.approx(e["divergence"], rel=1e-3) for e in logged)
    assert all(e["policy_loss"] == 0 for e in logged)
    run(tmp_path / "cut", stop=3)
    resumed = run(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert [r.response_ids for r in batches[-1]] == [r.response_ids for r in seen[-1]]
    for x, y in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_responses_of_others_are_refused_where_credit_needs_the_students_own(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    for changes in ({"on_policy": 0.5}, {"replay": 0.5}):
        with pytest.raises(ValueError, match=r"trains on responses that the current student did not sample"):
            MiniLLMTrainer(
                *pair, arguments(tmp_path), rollout=ROLLOUT.model_copy(update=changes), train_dataset=PROMPTS
            )
    with pytest.raises(ValueError, match=r"rollout.on_policy: 0.5 trains on given responses too, and there are none"):
        MiniLLMTrainer(
            *pair,
            arguments(tmp_path),
            rollout=ROLLOUT.model_copy(update={"on_policy": 0.5}),
            train_dataset=PROMPTS,
            objective=OFF_POLICY,
        )


def test_drawing_ahead_needs_weights_of_its_own(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"importance weights of single tokens can correct: objective.old_logprobs must be engine"
    ):
        MiniLLMTrainer(
            *pair,
            arguments(tmp_path),
            rollout=ROLLOUT.model_copy(update={"overlap": True}),
            train_dataset=PROMPTS,
            objective=Objective.reference(),
            engine=OwnEngine(pair, []),
        )
    with pytest.raises(ValueError, match=r"rollout.overlap must be used with an engine in another process"):
        MiniLLMTrainer(
            *pair, arguments(tmp_path), rollout=ROLLOUT.model_copy(update={"overlap": True}), train_dataset=PROMPTS
        )


def test_an_engine_that_goes_away_leaves_a_checkpoint(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"teacher_mix": 0.0})
    whole = train(pair, tmp_path / "whole", max_steps=8, rollout=rollout)
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path / "cut", max_steps=8),
        rollout=rollout,
        train_dataset=PROMPTS,
        engine=OwnEngine(pair, [], fail_at=2),
    )
    with pytest.raises(EngineError, match="http://gone"):
        trainer.train()
    resumed = train(pair, tmp_path / "cut", max_steps=8, rollout=rollout, resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for (name, x), y in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


def test_sequences_of_similar_length_share_a_micro_batch() -> None:
    """The rows of a micro-batch are as wide as its longest prompt and response together."""
    zeros = torch.zeros(1)
    sizes = [(1, 8), (7, 1), (5, 4), (1, 7), (3, 6), (8, 1), (2, 6), (3, 5)]
    rollouts = [Rollout([2] * prompt, [3] * response, zeros, zeros, 0, True) for prompt, response in sizes]
    schedule = BatchSchedule(RolloutConfig(num_rollouts=8), 4, 2)
    groups = [
        {sum(sizes[i]) for i in batch.rollouts} for batch in schedule.micro_batches(0, rollouts, None, lambda x: x)
    ]
    assert groups == [{8}, {9}]
