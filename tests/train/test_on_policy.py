"""MiniLLMTrainer on tiny models: the data of an update, the weights that change, and what a resume continues."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from minillm.data.seeding import permutation, seed_of
from minillm.data.text import pack_text
from minillm.errors import EngineError
from minillm.evaluation.metrics import rouge_l
from minillm.loss.config import Objective
from minillm.models.config import AdapterConfig
from minillm.models.load import load_model
from minillm.models.lora import load_student
from minillm.models.saving import save_plain
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.samplers.teacher_mixed import FIRST_DRAFT, draft_length
from minillm.train import assembly
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import save, tiny_llama, tiny_tokenizer
from tests.train.two_processes import run

PROMPTS = [{"prompt": f"<user> w{i} w{i + 1} <bot>"} for i in range(12)]
ROLLOUT = RolloutConfig(
    engine="transformers",
    num_rollouts=8,
    inner_epochs=2,
    teacher_mix=0.3,
    max_new_tokens=10,
    max_prompt_tokens=8,
    draft_tokens=4,
)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def train(
    pair: tuple[str, str], folder: Path, *, resume: str | None = None, stop: int | None = None, **changes: Any
) -> MiniLLMTrainer:
    keys = ("objective", "rollout", "train_dataset", "text_dataset", "responses", "processing_class", "eval_dataset")
    options = {key: changes.pop(key) for key in keys if key in changes}
    options = {"rollout": ROLLOUT, "train_dataset": PROMPTS} | options
    trainer = MiniLLMTrainer(*pair, arguments(folder, **changes), **options)
    if stop is not None:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                if state.global_step == stop:
                    control.should_save = control.should_training_stop = True
                return control

        trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_every_layer_moves_and_the_teacher_does_not(pair: tuple[str, str], tmp_path: Path) -> None:
    before = load_model(pair[0], torch.float32).state_dict()
    trainer = train(pair, tmp_path)
    after = trainer.model.state_dict()  # pyright: ignore
    unmoved = [name for name, value in before.items() if torch.equal(value, after[name]) and "rotary" not in name]
    assert not unmoved
    teacher = load_model(pair[1], torch.float32).state_dict()
    for name, value in trainer.local_teacher.model.state_dict().items():
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
    for key in ("response_length", "finished", "acceptance"):  # constant over the updates on one batch
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


def test_drafts_follow_the_acceptance(pair: tuple[str, str], tmp_path: Path) -> None:
    """A resumed run uses the draft length of the uninterrupted one, which decides the sampled tokens."""
    rollout = ROLLOUT.model_copy(update={"draft_tokens": "auto", "teacher_mix": 0.6, "inner_epochs": 1})
    whole = train(pair, tmp_path / "whole", max_steps=6, rollout=rollout)
    logged = [entry for entry in whole.state.log_history if "draft_length" in entry][::2]
    assert len(logged) == 3
    assert logged[0]["draft_length"] == FIRST_DRAFT
    for before, after in pairwise(logged):
        assert after["draft_length"] == draft_length(before["acceptance"]) != FIRST_DRAFT
    for stop in (3, 4):  # within a batch and between two
        train(pair, tmp_path / f"cut-{stop}", max_steps=6, rollout=rollout, stop=stop)
        resumed = train(
            pair,
            tmp_path / f"cut-{stop}",
            max_steps=6,
            rollout=rollout,
            resume=str(tmp_path / f"cut-{stop}" / f"checkpoint-{stop}"),
        )
        assert [r.response_ids for r in resumed.rollouts] == [r.response_ids for r in whole.rollouts]


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
                models: list[Any] = [trainer.model, trainer.local_teacher.model]
                logq, logp = (torch.log_softmax(m(ids).logits[0, -n - 1 : -1].double(), -1) for m in models)
            rewards = -(logq.exp() * (logq - logp)).sum(-1)
            if objective.reward == "sampled":
                rewards = (r.teacher.token_logprobs - r.student_logprobs).double()
            returns.append([float(rewards[t + 1 :].mean()) for t in range(n - 1)])
        advantages = []
        for i, own in enumerate(returns):
            others = [value for j, values in enumerate(returns) if j != i for value in values]
            assert float(trainer.baselines[i]) == pytest.approx(sum(others) / len(others), rel=1e-4)
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


def test_text_is_fitted_at_its_own_temperature(pair: tuple[str, str], tmp_path: Path) -> None:
    """One update at a rollout temperature of 0.7, against float64.

    KL(q‖p) is taken at 0.7, and text is fitted at 1 unless set otherwise.
    """
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(30))} for i in range(6)]
    settings: dict[str, Any] = {
        "max_steps": 1,
        "learning_rate": 0.5,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
    }
    rollout = ROLLOUT.model_copy(update={"inner_epochs": 1, "temperature": 0.7, "num_rollouts": 4, "teacher_mix": 0.0})
    for own in (1.0, 1.3):
        changes: dict[str, Any] = {} if own == 1.0 else {"language_model_temperature": own}
        objective = Objective.recommended(long_term=0.0, language_model_distill=0.4, language_model_block=16, **changes)
        trainer = train(pair, tmp_path / f"{own}", rollout=rollout, objective=objective, text_dataset=text, **settings)
        student, teacher = (load_model(folder, torch.float32).double() for folder in pair)  # pyright: ignore
        single, fitted, nll = [], [], []
        for batch in trainer.micro_batches(0):
            for r in (trainer.rollouts[i] for i in batch.rollouts):
                n = len(r.response_ids)
                ids = torch.tensor([r.prompt_ids + r.response_ids])
                logq, logp = (torch.log_softmax(m(ids).logits[0, -n - 1 : -1] / 0.7, -1) for m in (student, teacher))
                single.append((logq.exp() * (logq - logp.detach())).sum(-1))
            for piece in (piece for block in batch.text for piece in trainer.text.pieces(block)):  # pyright: ignore
                ids = torch.tensor([list(piece)])
                logq, logp = (torch.log_softmax(m(ids).logits[0, :-1] / own, -1) for m in (student, teacher))
                nll.append(-logq.gather(1, ids[0, 1:, None])[:, 0])
                fitted.append(0.6 * nll[-1] + 0.4 * (logp.exp() * (logp - logq)).sum(-1))
        (torch.cat(single).mean() + torch.cat(fitted).mean()).backward()
        assert trainer.state.log_history[0]["text_nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
        after = trainer.model.state_dict()  # pyright: ignore
        for name, parameter in student.named_parameters():
            assert parameter.grad is not None
            step = 0.5 * parameter.grad
            assert (
                float((after[name].double() - (parameter.detach() - step)).norm()) < 1e-4 * float(step.norm()) + 1e-6
            ), name


def test_text_is_distilled_from_the_teachers_own_states(pair: tuple[str, str], tmp_path: Path) -> None:
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(4)]
    objective = Objective.recommended(language_model=1.0, language_model_distill=1.0, language_model_block=64)
    trainer = train((pair[1], pair[1]), tmp_path, objective=objective, text_dataset=text, max_steps=1)
    assert trainer.state.log_history[0]["language_model_loss"] == pytest.approx(
        0.0, abs=1e-5
    )  # the student is the teacher


def test_several_samples_of_a_prompt_differ(pair: tuple[str, str], tmp_path: Path) -> None:
    rollout = ROLLOUT.model_copy(update={"samples_per_prompt": 4, "teacher_mix": 0.0})
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path), rollout=rollout, train_dataset=PROMPTS)
    rows = [trainer.source.prompt_rows(number) for number in range(6)]
    assert all(len(batch) == 8 and len(set(batch)) == 2 for batch in rows)
    assert sorted(row for batch in rows for row in batch) == sorted([*range(12)] * 4)  # six batches are a pass
    assert trainer.updates_per_epoch() == 6 * 2 * ROLLOUT.inner_epochs
    trainer.sync()
    drawn = trainer._sample(0).rollouts
    assert len({tuple(r.response_ids) for r in drawn}) > 4


def test_text_joins_the_update(pair: tuple[str, str], tmp_path: Path) -> None:
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(30))} for i in range(6)]
    objective = Objective.recommended(language_model=0.5, language_model_distill=0.5, language_model_block=16)
    logged = [e for e in train(pair, tmp_path, objective=objective, text_dataset=text).state.log_history if "loss" in e]
    assert all(e["language_model_loss"] > 0 and e["text_nll"] > 0 for e in logged)
    assert logged[0]["language_model_loss"] == pytest.approx(
        0.5 * (0.5 * logged[0]["text_nll"] + 0.5 * text_kl(pair, text)), rel=1e-3
    )
    total = logged[0]["policy_loss"] + logged[0]["single_step_loss"] + logged[0]["language_model_loss"]
    assert logged[0]["loss"] == pytest.approx(total, rel=1e-3)


def test_responses_share_rows_beside_text_and_train_as_in_rows_of_their_own(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(70))} for i in range(6)]
    objective = Objective.recommended(language_model=0.5, language_model_block=64)
    shapes: list[tuple[int, ...]] = []
    original = assembly.pad

    def seen(*args: Any, **options: Any) -> Any:
        batch = original(*args, **options)
        shapes.append(tuple(batch.input_ids.shape))
        return batch

    monkeypatch.setattr(assembly, "pad", seen)
    common: Any = {"objective": objective, "text_dataset": text, "max_steps": 2}
    shared = train(pair, tmp_path / "a", **common)
    assert set(shapes) == {(3, 64)}  # two responses in one row, two blocks of text
    monkeypatch.setattr(assembly, "share_rows", lambda lengths, width: list(range(len(lengths))))
    apart = train(pair, tmp_path / "b", **common)
    assert set(shapes[4:]) == {(4, 64)}
    for (name, one), other in zip(shared.model.named_parameters(), apart.model.parameters(), strict=True):  # pyright: ignore
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def text_kl(pair: tuple[str, str], text: list[dict[str, str]]) -> float:
    """Mean KL(p‖q) over the predicted tokens of the first update's text, in separate pieces of at most 16 tokens."""
    student, teacher = (load_model(folder, torch.float32) for folder in pair)
    blocks = pack_text([tiny_tokenizer()(row["text"])["input_ids"] for row in text], 16, 1)
    order = [permutation(len(blocks), 42, "text", place // len(blocks))[place % len(blocks)] for place in range(4)]
    values = []
    for piece in (piece for i in order for piece in blocks[i]):
        ids = torch.tensor([piece])
        with torch.no_grad():
            logq, logp = (torch.log_softmax(model(ids).logits[0, :-1], -1) for model in (student, teacher))  # pyright: ignore
        values.append((logp.exp() * (logp - logq)).sum(-1))
    return float(torch.cat(values).mean())


def test_bfloat16_sampling_leaves_the_float32_masters_alone(pair: tuple[str, str], tmp_path: Path) -> None:
    trainer = MiniLLMTrainer(*pair, arguments(tmp_path, bf16=True), rollout=ROLLOUT, train_dataset=PROMPTS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}  # pyright: ignore
    trainer.sync()
    after = trainer.model.state_dict()  # pyright: ignore
    assert all(value.dtype == torch.float32 and torch.equal(value, after[name]) for name, value in before.items())


def test_an_adapter_trains_and_its_base_does_not(pair: tuple[str, str], tmp_path: Path) -> None:
    base = load_model(pair[0], torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    student: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # pyright: ignore
    trainer = train((student, pair[1]), tmp_path / "run", processing_class=tiny_tokenizer())
    save_plain(student, tmp_path / "plain")
    merged = load_model(tmp_path / "plain", torch.float32).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, merged[name])}
    assert moved
    assert all("q_proj" in name or "v_proj" in name for name in moved)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["engine_mismatch"] < 1e-5


def test_a_quantised_base_and_a_quantised_teacher(pair: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (minillm[quantized])")
    student = load_student(pair[0], AdapterConfig(rank=4, quantization="4bit"))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = load_model(pair[1], torch.float32, "8bit")
    pieces: Any = (student, teacher)
    trainer = train(pieces, tmp_path / "run", processing_class=tiny_tokenizer())
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0]["engine_mismatch"] < 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_students_own_base_teaches_as_a_copy_of_it_does(
    pair: tuple[str, str], tmp_path: Path, checkpointing: bool
) -> None:
    weights = []
    for teacher in (None, pair[0]):
        student = load_student(pair[0], AdapterConfig(rank=4))
        torch.manual_seed(1)
        for name, value in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
        models: Any = (student, teacher)
        trainer = train(models, tmp_path, processing_class=tiny_tokenizer(), gradient_checkpointing=checkpointing)
        assert next(entry for entry in trainer.state.log_history if "loss" in entry)["reverse_kl"] > 1e-3
        assert student.training
        weights.append({name: value for name, value in student.state_dict().items() if "lora_" in name})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(
        ValueError, match=r"None takes the student's base model as the teacher, .* this student has no adapter"
    ):
        MiniLLMTrainer(pair[0], None, arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS)


@pytest.mark.parametrize("preset", ["paper", "reference", "recommended", "exact"])
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


def test_padded_rows_of_the_heads_have_no_part_in_it(tmp_path: Path) -> None:
    """With 32 tokens and heads of 40 and 48 rows, the update does not depend on the padded rows."""
    logs = []
    for factor in (1.0, 30.0):
        folders = []
        for name, seed, vocab in (("student", 1, 40), ("teacher", 2, 48)):
            model = tiny_llama(seed, vocab=vocab, tied=False)
            with torch.no_grad():
                model.lm_head.weight[32:].mul_(factor)
            folders.append(save(model, tmp_path / f"{name}-{factor}"))
        trainer = train((folders[0], folders[1]), tmp_path / "run", max_steps=2)
        assert max(max(r.response_ids) for r in trainer.rollouts) < 32
        logs.append([e for e in trainer.state.log_history if "loss" in e])
    for a, b in zip(*logs, strict=True):
        for key in ("loss", "reverse_kl", "forward_kl", "entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_text_without_its_coefficient_is_said_to_be_unused(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = [{"text": "w1 w2 w3"}]
    MiniLLMTrainer(
        *pair,
        arguments(tmp_path),
        rollout=ROLLOUT,
        train_dataset=PROMPTS,
        text_dataset=text,
        objective=Objective.recommended(language_model=0.0),
    )
    assert any("text_dataset is not used: objective.language_model is 0" in record.message for record in caplog.records)


@pytest.mark.parametrize(("preset", "rescoring"), [("recommended", 4), ("paper", 0), ("exact", 0), ("reference", 4)])
def test_forwards_are_counted(pair: tuple[str, str], tmp_path: Path, preset: str, rescoring: int) -> None:
    """Tokens that go through each model.

    The teacher reads each rollout once, whatever the number of inner epochs. The student reads it once per update;
    `reference` scores every rollout once more, and so does `recommended`, which centres expected returns.
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
    for name, model in (("student", trainer.model), ("teacher", trainer.local_teacher.model)):
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
    trainer.local_teacher.model.base_model.register_forward_hook(lambda *_: calls.append("teacher"))  # pyright: ignore
    original = trainer.update_on
    trainer.update_on = lambda *args: calls.append("update") or original(*args)  # pyright: ignore
    trainer.train()
    assert calls.count("update") == 8
    assert "teacher" not in calls[calls.index("update") :]


def test_reference_takes_the_trainers_own_logprobs(pair: tuple[str, str], tmp_path: Path) -> None:
    """An engine's log q may differ a little, as vLLM's does in bfloat16; `reference` replaces it as LMOps does."""
    off: Any = load_model(pair[0], torch.float32)
    engine = TransformersEngine(off)
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
        mixture = (0.7 * rollout.student_logprobs.exp() + 0.3 * rollout.teacher.token_logprobs.exp()).log()
        torch.testing.assert_close(rollout.behaviour_logprobs, mixture, rtol=1e-5, atol=1e-6)
    assert seen["reference"] < 1e-5 < 1e-3 < seen["paper"]


def test_an_engine_that_samples_another_student_is_reported_once(
    pair: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for factor, alarms in ((1.05, 0), (4.0, 1)):
        off: Any = load_model(pair[0], torch.float32)
        engine = TransformersEngine(off)
        engine.update_weights = lambda weights, version: None  # pyright: ignore
        with torch.no_grad():
            off.model.norm.weight.mul_(factor)
        trainer = MiniLLMTrainer(
            *pair,
            arguments(tmp_path, max_steps=5, learning_rate=0.0),
            rollout=ROLLOUT,
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


def test_validation_samples_the_pure_student_and_the_best_checkpoint_is_kept(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    rows = [{"prompt_ids": [2, 4 + i, 3], "references": ["w3 w4 w5", "w8 w9"]} for i in range(9)]
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 6,
    }
    settings |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "reverse_kl",
        "greater_is_better": False,
        "learning_rate": 3e-3,
    }
    trainer = train(pair, tmp_path, eval_dataset=rows, **settings)
    found = [e for e in trainer.state.log_history if "eval_reverse_kl" in e]
    assert [e["step"] for e in found] == [2, 4, 6]
    best = min(e["eval_reverse_kl"] for e in found)
    assert trainer.state.best_metric == best
    # The best student is kept: its samples are drawn here again with the seeds of validation.
    again = trainer.evaluate()
    assert again["eval_reverse_kl"] == pytest.approx(best, rel=1e-4)
    model: Any = load_model(pair[1], torch.float32)
    student: Any = trainer.model
    total, tokens, rouge = 0.0, 0, 0.0
    for row in rows:
        [r] = TransformersEngine(student).generate(
            [row["prompt_ids"]], trainer.sampling, [seed_of("validation", *row["prompt_ids"])]
        )
        ids, first = torch.tensor([r.prompt_ids + r.response_ids]), len(r.prompt_ids) - 1
        with torch.no_grad():
            logq, logp = (torch.log_softmax(m(ids).logits[0, first:-1], -1) for m in (student, model))
        total, tokens = total + float((logq.exp() * (logq - logp)).sum()), tokens + len(r.response_ids)
        rouge += rouge_l(tiny_tokenizer().decode(r.response_ids, skip_special_tokens=True), row["references"])
    assert again["eval_reverse_kl"] == pytest.approx(total / tokens, rel=1e-4)
    assert again["eval_rouge_l"] == pytest.approx(rouge / 9)
    assert again["eval_length"] == pytest.approx(tokens / 9)


class OwnEngine(TransformersEngine):
    """Samples from weights of its own, as a server does; `trace` records the calls and their times."""

    def __init__(self, folder: str, trace: list[tuple[str, float, float]], fail_at: int | None = None) -> None:
        model: Any = load_model(folder, torch.float32)
        super().__init__(model)
        self._trace, self._fail_at, self.calls = trace, fail_at, 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._fail_at:
            raise EngineError("http://gone: ConnectError")
        start = time.monotonic()
        out = super().generate(*args, **kwargs)
        time.sleep(0.2)
        self._trace.append(("generate", start, time.monotonic()))
        return out


def test_the_next_batch_is_drawn_while_this_one_trains(pair: tuple[str, str], tmp_path: Path) -> None:
    trace: list[tuple[str, float, float]] = []
    rollout = ROLLOUT.model_copy(update={"overlap": True})
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, max_steps=12),
        rollout=rollout,
        train_dataset=PROMPTS,
        engine=OwnEngine(pair[0], trace),
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


OFF_POLICY = Objective.recommended(long_term=0.0, divergence={"name": "skew_reverse_kl", "skew": 0.1})


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
    with pytest.raises(ValueError, match=r"token weights can take: objective.old_logprobs must be engine"):
        MiniLLMTrainer(
            *pair,
            arguments(tmp_path),
            rollout=ROLLOUT.model_copy(update={"overlap": True}),
            train_dataset=PROMPTS,
            objective=Objective.reference(),
            engine=OwnEngine(pair[0], []),
        )
    with pytest.raises(ValueError, match=r"rollout.overlap samples beside the updates"):
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
        engine=OwnEngine(pair[0], [], fail_at=2),
    )
    with pytest.raises(EngineError, match="http://gone"):
        trainer.train()
    resumed = train(pair, tmp_path / "cut", max_steps=8, rollout=rollout, resume=str(tmp_path / "cut" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    for (name, x), y in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["plain", "whitened", "own-base"])
def test_two_processes_train_as_one_does(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """Rollouts are the same whichever process samples them, and so are the weights after two updates."""
    launch(pair, tmp_path / "two", kind)
    assert run(*pair, str(tmp_path / "one"), kind) == 1
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("one", "two"))
    moved = {name: float((value - one["before"][name]).norm()) for name, value in one["weights"].items()}
    for name, value in one["weights"].items():
        assert (moved[name] > 0) == ("lora" in name or kind != "own-base"), name
        assert float((value - two["weights"][name]).norm()) <= 1e-3 * moved[name], name
    assert (one["world"], two["world"]) == (1, 2)


def launch(pair: tuple[str, str], folder: Path, kind: str) -> None:
    """Run `tests.train.two_processes` in two processes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "tests.train.two_processes",
        *pair,
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if kind.startswith("fsdp2"):
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(folder), kind], capture_output=True, text=True, timeout=200, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]


deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (make test-full installs it)"
)


@pytest.mark.parametrize(
    "kind", ["fsdp2", "fsdp2-lora", *(pytest.param(kind, marks=deepspeed) for kind in ("zero2", "zero3", "zero3-lora"))]
)
def test_shards_train_and_save_the_student_of_one_process(pair: tuple[str, str], tmp_path: Path, kind: str) -> None:
    """The head is scored without being called, and weights are gathered for the engine, for updates and for saving."""
    launch(pair, tmp_path / "two", kind)
    run(*pair, str(tmp_path / "one"), kind)
    start = load_model(pair[0], torch.float32).state_dict()
    one, two = (load_model(tmp_path / name, torch.float32).state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        moved = float((value - start[name]).norm())
        assert moved > 0 or (kind.endswith("-lora") and "_proj" not in name), name
        assert float((value - two[name]).norm()) <= 1e-4 * moved, name


def test_shards_that_would_leave_no_student_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    tuner = (
        "from transformers import TrainingArguments; from minillm.train.finetune import FineTuner; "
        "FineTuner(sys.argv[1], TrainingArguments(sys.argv[3], use_cpu=True{}), train_dataset=[{{'prompt_ids': [2], 'response_ids': [1]}}])"
    )
    run_it = "from tests.train.two_processes import run; run(sys.argv[1], sys.argv[2], sys.argv[3])"
    for what, saved_as, refusal in (
        (run_it, "SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT"),
        (tuner.format(""), "SHARDED_STATE_DICT", "set fsdp_state_dict_type: FULL_STATE_DICT"),
    ):
        environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": saved_as}
        code = f"import sys; from tests.train.two_processes import shard_on_cpus; shard_on_cpus(); {what}"
        command = [sys.executable, "-c", code, *pair, str(tmp_path)]
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, cwd=root
        )
        assert refusal in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize("adapter", [False, True])
def test_gradient_checkpointing_changes_nothing(pair: tuple[str, str], tmp_path: Path, adapter: bool) -> None:
    weights = []
    for checkpointing in (False, True):
        student: Any = pair[0]
        if adapter:
            student = load_student(pair[0], AdapterConfig(rank=4))
        trainer = train(
            (student, pair[1]), tmp_path, gradient_checkpointing=checkpointing, processing_class=tiny_tokenizer()
        )
        trained: Any = trainer.model
        assert any(getattr(module, "gradient_checkpointing", False) for module in trained.modules()) == checkpointing
        weights.append(trained.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-7)


def test_of_a_stream_no_more_text_is_read_than_the_updates_need(pair: tuple[str, str], tmp_path: Path) -> None:
    read = []

    def endless() -> Iterator[dict[str, Any]]:
        for i in count():
            read.append(i)
            yield {"text": " ".join(f"w{(i * j) % 28}" for j in range(15))}

    objective = Objective.recommended(language_model_block=16)
    rows = [{"text": row["text"]} for row, _ in zip(endless(), range(16), strict=False)]
    read.clear()
    trained = [train(pair, tmp_path, objective=objective, text_dataset=text) for text in (endless(), rows)]
    assert len(read) == 16  # 4 updates of 4 blocks of 16 tokens: each block is a document of 15 tokens and its EOS
    ours, theirs = ([e["text_nll"] for e in trainer.state.log_history if "loss" in e] for trainer in trained)
    assert ours == theirs


def test_a_sharded_teacher_does_not_mix(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.shard: .* set rollout\.teacher_mix: 0"):
        MiniLLMTrainer(*pair, arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS, shard_teacher=True)


def test_processes_that_replay_different_rollouts_keep_in_step(pair: tuple[str, str], tmp_path: Path) -> None:
    launch(pair, tmp_path, "replay")
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["world"] == 2


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
    with pytest.raises(ValueError, match="a row needs prompt or prompt_ids; it has text"):
        make(train_dataset=[{"text": "w1"}])
    with pytest.raises(ValueError, match="train_dataset is empty"):
        make(train_dataset=[])


def test_different_tokenizers_are_refused_before_weights_load(pair: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_llama(3).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="id 32 is None for the student and 'extra' for the teacher"):
        MiniLLMTrainer(pair[0], str(other), arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS)
