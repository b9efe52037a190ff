"""MiniLLMTrainer on tiny models: the weights that change, the loss, and what a resume continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.lazy import LazySequence
from minillm.loss.config import Objective
from minillm.loss.presets import PRESETS
from minillm.models.load import load_model
from minillm.train import datasets
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.train.common import PROMPTS, ROLLOUT, arguments, teacher_model, train


def test_every_layer_moves_and_the_teacher_does_not(pair: tuple[str, str], tmp_path: Path) -> None:
    before = load_model(pair[0], torch.float32).state_dict()
    trainer = train(pair, tmp_path)
    after = trainer.model.state_dict()  # pyright: ignore
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name]) and "rotary" not in name]
    assert not unmoved
    teacher = load_model(pair[1], torch.float32).state_dict()
    for name, value in teacher_model(trainer).state_dict().items():
        assert torch.equal(value, teacher[name])
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for key in (
        "reverse_kl",
        "sampled_reverse_kl",
        "forward_kl",
        "entropy",
        "importance_weight",
        "clipped",
        "advantage_std",
        "grad_norm",
    ):
        assert all(key in entry for entry in logged), key
    for key in ("response_length", "finished"):  # constant over the updates on one batch
        assert len({entry[key] for entry in logged}) == 1, key
    # Engine and trainer have the same weights only before the first update on a batch.
    assert ["engine_mismatch" in entry for entry in logged] == [True, False, False, False]
    assert logged[0]["engine_mismatch"] < 1e-5  # engine and trainer share one model here


def test_a_learning_rate_of_zero_changes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    before = load_model(pair[0], torch.float32).state_dict()
    after = train(pair, tmp_path, learning_rate=0.0).model.state_dict()  # pyright: ignore
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_training_lowers_the_reverse_kl(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"num_rollouts": 32})
    logs = train(
        pair, tmp_path, max_steps=60, rollout=rollout, per_device_train_batch_size=16, gradient_accumulation_steps=1
    ).state.log_history
    kl = [entry["reverse_kl"] for entry in logs if "reverse_kl" in entry]
    assert sum(kl[-8:]) < 0.7 * sum(kl[:8])


def test_batch_split_and_padding_do_not_change_the_update(pair: tuple[str, str], tmp_path: Path) -> None:
    runs = [
        train(
            pair,
            tmp_path / f"{micro}",
            max_steps=2,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
        )
        for micro in (1, 8)
    ]
    one, eight = (run.state.log_history for run in runs)
    for a, b in zip(one, eight, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for (name, x), y in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(pair: tuple[str, str], tmp_path: Path, stop: int) -> None:
    """The run stops between inner epochs (2), within one (3) and between rollout batches (4)."""
    whole = train(pair, tmp_path / "whole", max_steps=6)
    train(pair, tmp_path / "cut", max_steps=6, stop=stop)
    resumed = train(pair, tmp_path / "cut", max_steps=6, resume=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.state.global_step == 6
    for (name, x), y in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


def test_an_epoch_is_a_pass_over_the_prompts(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(
        *pair, arguments(tmp_path), rollout=ROLLOUT.model_copy(update={"num_rollouts": 4}), train_dataset=PROMPTS
    )
    rows = [row for number in range(3) for row in trainer.source.prompt_rows(number)]
    assert sorted(rows) == list(range(12))
    assert [row for number in range(3, 6) for row in trainer.source.prompt_rows(number)] != rows
    assert trainer.updates_per_epoch() == 3 * 1 * ROLLOUT.inner_epochs


def test_advantages_are_centred(pair: tuple[str, str], tmp_path: Path) -> None:
    """The baseline is the mean return of the rollouts, so the advantages have a mean near 0."""
    rollout = ROLLOUT.model_copy(update={"num_rollouts": 64, "inner_epochs": 1})
    settings: dict[str, Any] = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4, "max_steps": 1}
    for centre in ("centre", "none"):
        trainer = train(
            pair,
            tmp_path / centre,
            rollout=rollout,
            objective=Objective.paper(baseline=centre, length_norm=False),
            **settings,
        )
        logged = trainer.state.log_history[0]
        size = abs(logged["advantage"]) / logged["advantage_std"]
        assert (size < 0.2) is (
            centre == "centre"
        )  # tokens without a future have a return of 0, and do not count in the mean


@pytest.mark.parametrize("changes", [{}, {"old_logprobs": "trainer"}, {"reward": "sampled"}])
def test_the_baseline_is_the_mean_return_of_the_other_rollouts(
    pair: tuple[str, str], tmp_path: Path, changes: dict[str, str]
) -> None:
    """The mean is over the whole batch, from its first update on, however updates and micro-batches divide it."""
    objective, logged = Objective.recommended(single_step=0.0, **changes), []  # pyright: ignore
    for micro in (1, 4):
        settings: dict[str, Any] = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
        trainer = train(pair, tmp_path / f"{micro}", objective=objective, max_steps=2, learning_rate=0.0, **settings)
        returns = []
        for r in trainer.rollouts:
            assert r.teacher is not None
            ids, n = torch.tensor([r.prompt_ids + r.response_ids]), len(r.response_ids)
            with torch.no_grad():
                models: list[Any] = [trainer.model, teacher_model(trainer)]
                logq, logp = (torch.log_softmax(m(ids).logits[0, -n - 1 : -1].double(), -1) for m in models)
            rewards = -(logq.exp() * (logq - logp)).sum(-1)
            if objective.reward == "sampled":
                assert r.teacher.token_logprobs is not None
                rewards = (r.teacher.token_logprobs - r.student_logprobs).double()
            returns.append([float(rewards[t + 1 :].mean()) for t in range(n - 1)])
        advantages = []
        for i, own in enumerate(returns):
            others = [value for j, values in enumerate(returns) if j != i for value in values]
            assert float(trainer.credit.baselines[i]) == pytest.approx(sum(others) / len(others), rel=1e-4)
            advantages += [value - sum(others) / len(others) for value in own] + [0.0]
        logged.append([entry["advantage"] for entry in trainer.state.log_history if "advantage" in entry])
        tokens = [
            sum(len(trainer.rollouts[i].response_ids) for b in trainer.micro_batches(u) for i in b.rollouts)
            for u in (0, 1)
        ]
        mean = sum(a * n for a, n in zip(logged[-1], tokens, strict=True)) / sum(
            tokens
        )  # over both updates, which are the whole batch
        assert mean == pytest.approx(sum(advantages) / len(advantages), abs=1e-5)
        spread = (sum(a * a for a in advantages) / len(advantages)) ** 0.5
        assert abs(mean) < 0.02 * spread
    assert logged[0] == pytest.approx(logged[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("reward", "baseline"), [("expected", "centre"), ("sampled", "none"), ("sampled", "centre")])
def test_the_teachers_head_is_multiplied_before_the_loss_only_where_a_batch_is_centred_by_log_p(
    pair: tuple[str, str], tmp_path: Path, reward: str, baseline: str
) -> None:
    objective = Objective.recommended(reward=reward, baseline=baseline)
    plain = ROLLOUT.model_copy(update={"teacher_mix": 0.0})  # an engine that mixes knows log p anyway
    trainer = train(pair, tmp_path, objective=objective, rollout=plain, max_steps=1)
    known = {r.teacher is not None and r.teacher.token_logprobs is not None for r in trainer.rollouts}
    assert known == {reward == "sampled" and baseline == "centre"}


def test_several_samples_of_a_prompt_differ(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"samples_per_prompt": 4, "teacher_mix": 0.0})
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path), rollout=rollout, train_dataset=PROMPTS)
    rows = [trainer.source.prompt_rows(number) for number in range(6)]
    assert all(len(batch) == 8 and len(set(batch)) == 2 for batch in rows)
    assert sorted(row for batch in rows for row in batch) == sorted([*range(12)] * 4)  # six batches are a pass
    assert trainer.updates_per_epoch() == 6 * 2 * ROLLOUT.inner_epochs
    drawn = trainer.source.sample(0, trainer.sync(), trainer.sampling).rollouts
    assert len({tuple(r.response_ids) for r in drawn}) > 4


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(pair: tuple[str, str], tmp_path: Path, preset: str) -> None:
    logged = [
        e
        for e in train(
            pair, tmp_path, objective=Objective.model_validate({"preset": preset}), max_steps=2
        ).state.log_history
        if "loss" in e
    ]
    assert all(torch.isfinite(torch.tensor(e["grad_norm"])) and e["grad_norm"] > 0 for e in logged)


def test_reference_in_the_trainer_is_a_plain_loop_over_its_micro_batches(pair: tuple[str, str], tmp_path: Path) -> None:
    """One update of two micro-batches.

    Each is whitened over its own padding and divided by its own tokens; the loss is the mean of the two.
    """
    rollout = ROLLOUT.model_copy(update={"inner_epochs": 1, "num_rollouts": 8})
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "learning_rate": 0.5,
        "optim": "sgd",
    }
    settings |= {"max_grad_norm": 0.0, "weight_decay": 0.0}
    trainer = train(pair, tmp_path, rollout=rollout, objective=Objective.reference(), **settings)
    groups = [batch.rollouts for batch in trainer.micro_batches(0)]
    assert sorted(i for group in groups for i in group) == list(range(8))
    lengths = [[len(trainer.rollouts[i].response_ids) for i in group] for group in groups]
    assert any(a != sorted(a) for a in lengths)  # not ordered by length, which would change what is whitened together
    model: Any = load_model(pair[0], torch.float32).double()
    teacher: Any = load_model(pair[1], torch.float32).double()
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        long, single, advantages, parts = [], [], [], []
        for r in (trainer.rollouts[i] for i in group):
            ids, first, n = torch.tensor([r.prompt_ids + r.response_ids]), len(r.prompt_ids) - 1, len(r.response_ids)
            logq, logp = (torch.log_softmax(m(ids).logits[0, first : first + n], -1) for m in (model, teacher))
            drawn, p = (x.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0] for x in (logq, logp))
            old = drawn.detach()
            reward = ((p.detach() - old) / 0.5).clamp(-100, 100)
            advantages += [float(sum(0.95 ** (k - t) * reward[k] for k in range(t, n))) / (n - t) for t in range(n)]
            parts.append((drawn, old, (old.exp() / (0.7 * old.exp() + 0.3 * p.detach().exp()))))
            single.append((logq.exp() * (logq - logp.detach())).sum(-1))
        slots = len(group) * rollout.max_new_tokens
        mean = sum(advantages) / slots
        spread = (sum(a * a for a in advantages) / slots - mean**2 + 1e-8) ** 0.5
        whitened = torch.tensor([(a - mean) / spread for a in advantages], dtype=torch.float64)
        for (drawn, old, rho), a in zip(parts, whitened.split([len(x[0]) for x in parts]), strict=True):
            ratio = (drawn - old).exp() * rho
            long.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a))
        total = total + (torch.cat(long).mean() + torch.cat(single).mean()) / len(groups)
    total.backward()
    after = trainer.model.state_dict()  # pyright: ignore
    for name, parameter in model.named_parameters():
        want = parameter.detach() - 0.5 * parameter.grad
        moved = float((0.5 * parameter.grad).norm())
        assert float((after[name].double() - want).norm()) < 1e-3 * moved + 1e-6, name


def test_wrong_sizes_are_refused_by_name(pair: tuple[str, str], tmp_path: Path) -> None:
    def make(**changes: Any) -> None:
        rollout = ROLLOUT.model_copy(update=changes.pop("rollout", {}))
        MiniLLMTrainer(*pair, arguments(tmp_path), rollout=rollout, train_dataset=changes.pop("train_dataset", PROMPTS))

    with pytest.raises(ValueError, match=r"num_rollouts \(6\) must be a multiple"):
        make(rollout={"num_rollouts": 6})
    with pytest.raises(ValueError, match=r"row 1 has 9 prompt tokens; rollout.max_prompt_tokens is 8"):
        make(train_dataset=[PROMPTS[0], {"prompt": " ".join(["w1"] * 9)}])
    with pytest.raises(ValueError, match="exceed the student's context of 256"):
        make(rollout={"max_new_tokens": 250})
    with pytest.raises(ValueError, match="a row needs prompt or prompt_ids, or messages, or instruction; it has text"):
        make(train_dataset=[{"text": "w1"}])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make(train_dataset=[])


def test_a_large_data_set_of_prompts_trains_as_a_small_one(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given to the trainer itself. Of its rows some are tried before training, and the others when they are asked for."""
    small = train(pair, tmp_path / "small")
    monkeypatch.setattr(datasets, "IN_MEMORY", 3)
    large = train(pair, tmp_path / "large")
    assert isinstance(large.source.prompts, LazySequence)
    for one, other in zip(small.model.parameters(), large.model.parameters(), strict=True):  # pyright: ignore
        assert torch.equal(one, other)
    monkeypatch.setattr(datasets, "_TRIED", 4)
    long = [*PROMPTS[:7], {"prompt": " ".join(["w1"] * 9)}, *PROMPTS[8:]]
    prompts = datasets.tokenize_prompts(long, tiny_tokenizer(), 8)
    with pytest.raises(ValueError, match=r"row 7 has 9 prompt tokens; rollout.max_prompt_tokens is 8"):
        _ = prompts[7]
    with pytest.raises(ValueError, match=r"row 6 has 9 prompt tokens"):
        datasets.tokenize_prompts(long[1:], tiny_tokenizer(), 8)


def test_different_tokenizers_are_refused_before_weights_load(pair: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama(3).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="id 32 is None for the student and 'extra' for the teacher"):
        MiniLLMTrainer(pair[0], str(other), arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS)
