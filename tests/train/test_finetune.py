"""Fine-tuning with TRL and with our own cross-entropy gives the same update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.loss.config import DivergenceConfig
from minillm.models.load import load_model
from minillm.train.finetune import FineTuner
from minillm.train.supervised import SupervisedTrainer
from tests.train.common import ROLLOUT, arguments

ROWS = [{"prompt_ids": [2, 4 + i, 3][: 2 + i % 2], "response_ids": [5 + i, *[9] * (i % 4), 1]} for i in range(12)]
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}


def weights_after(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_trls_update_is_that_of_our_cross_entropy(pair: tuple[str, str], tmp_path: Path) -> None:
    """One update on all rows, in micro-batches of unequal token counts."""
    settings = SGD | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    theirs = weights_after(FineTuner(pair[0], arguments(tmp_path / "trl", **settings), train_dataset=ROWS))
    ours = weights_after(
        SupervisedTrainer(*pair, arguments(tmp_path / "ours", **settings), train_dataset=ROWS, cross_entropy=1.0)
    )
    before = load_model(pair[0], torch.float32).state_dict()
    for name, value in theirs.items():
        moved = float((value - before[name]).norm())
        assert moved > 0 or "rotary" in name, name
        assert float((value - ours[name]).norm()) <= 1e-4 * moved, name


def test_fine_tuning_is_validated_on_samples_and_the_best_is_kept(pair: tuple[str, str], tmp_path: Path) -> None:
    rows = [{"prompt_ids": row["prompt_ids"], "references": ["w5"]} for row in ROWS[:4]]
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
    }
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "reverse_kl"}
    trainer = FineTuner(
        pair[0],
        arguments(tmp_path, **settings),
        train_dataset=ROWS,
        eval_dataset=rows,
        teacher=pair[1],
        rollout=ROLLOUT,
    )
    trainer.train()
    found = [e["eval_reverse_kl"] for e in trainer.state.log_history if "eval_reverse_kl" in e]
    assert len(found) == 2
    assert trainer.evaluate()["eval_reverse_kl"] == pytest.approx(min(found), rel=1e-4)
    trainer.close()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "skew_forward_kl", "total_variation"])
def test_given_answers_can_be_distilled_by_any_divergence(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    """The logged loss and the step of an update are those computed from full logits."""
    from minillm.loss import divergences

    config = DivergenceConfig(name=name)  # pyright: ignore[reportArgumentType]
    settings = SGD | {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    trainer = SupervisedTrainer(
        *pair, arguments(tmp_path, **settings), train_dataset=ROWS, cross_entropy=0.3, divergence=config
    )
    after = weights_after(trainer)
    student: Any = load_model(pair[0], torch.float32).double()
    teacher: Any = load_model(pair[1], torch.float32).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        ids, part = torch.tensor([row["prompt_ids"] + row["response_ids"]]), slice(len(row["prompt_ids"]) - 1, -1)
        s, t = (model(ids).logits[0, part] for model in (student, teacher))
        ce = -torch.log_softmax(s, -1).gather(1, torch.tensor(row["response_ids"])[:, None]).sum()
        total = total + 0.3 * ce + 0.7 * divergences.divergence_function(config)(s, t.detach()).sum()
        count += len(row["response_ids"])
    (total / count).backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    for name_of, parameter in student.named_parameters():
        assert parameter.grad is not None
        step = 0.1 * parameter.grad
        assert (
            float((after[name_of].double() - (parameter.detach() - step)).norm()) <= 1e-3 * float(step.norm()) + 1e-7
        ), name_of


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("own", [1.0, 1.4])
def test_answers_are_fitted_at_a_temperature_of_their_own(
    pair: tuple[str, str], tmp_path: Path, share: float, own: float
) -> None:
    """D at a temperature of 0.7, and the cross-entropy at 1 unless set otherwise, against float64."""
    from minillm.loss import divergences

    settings = SGD | {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    changes: dict[str, Any] = {} if own == 1.0 else {"cross_entropy_temperature": own}
    trainer = SupervisedTrainer(
        *pair, arguments(tmp_path, **settings), train_dataset=ROWS, cross_entropy=share, temperature=0.7, **changes
    )
    after = weights_after(trainer)
    student, teacher = (load_model(folder, torch.float32).double() for folder in pair)  # pyright: ignore
    ce, total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in ROWS:
        ids, part = torch.tensor([row["prompt_ids"] + row["response_ids"]]), slice(len(row["prompt_ids"]) - 1, -1)
        s, t = (model(ids).logits[0, part] for model in (student, teacher))
        ce = ce - torch.log_softmax(s / own, -1).gather(1, torch.tensor(row["response_ids"])[:, None]).sum()
        total = total + divergences.forward_kl(s, t.detach(), 0.7).sum()
        count += len(row["response_ids"])
    ((share * ce + (1 - share) * total) / count).backward()
    assert trainer.state.log_history[0]["cross_entropy"] == pytest.approx(float(ce.detach()) / count, rel=1e-5)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        step = 0.1 * parameter.grad
        assert float((after[name].double() - (parameter.detach() - step)).norm()) <= 1e-3 * float(step.norm()) + 1e-7, (
            name
        )
