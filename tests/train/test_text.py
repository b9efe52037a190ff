"""Text beside responses: how it is packed into updates, fitted and distilled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data.seeding import permutation
from minillm.data.text import pack_text
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.train import assembly
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import tiny_tokenizer
from tests.train.common import PROMPTS, ROLLOUT, arguments, train


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
    blocks = list(pack_text([tiny_tokenizer()(row["text"])["input_ids"] for row in text], 16, 1))
    order = [permutation(len(blocks), 42, "text", place // len(blocks))[place % len(blocks)] for place in range(4)]
    values = []
    for piece in (piece for i in order for piece in blocks[i]):
        ids = torch.tensor([piece])
        with torch.no_grad():
            logq, logp = (torch.log_softmax(model(ids).logits[0, :-1], -1) for model in (student, teacher))  # pyright: ignore
        values.append((logp.exp() * (logp - logq)).sum(-1))
    return float(torch.cat(values).mean())


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
