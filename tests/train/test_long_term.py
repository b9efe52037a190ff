"""The presets of KL per token through MiniLLMTrainer: with a real engine, micro-batches, accumulation and a resume."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.train.on_policy import MiniLLMTrainer
from tests.train.common import PROMPTS, ROLLOUT, arguments, train

SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "weight_decay": 0.0}


def preset(name: str, **changes: Any) -> Objective:
    return Objective.model_validate({"preset": name, **changes})


def scored(trainer: MiniLLMTrainer, pair: tuple[str, str]) -> tuple[Any, list[dict[str, Tensor]]]:
    """The student before training, in float64, and log q, log p and KL of its rollouts with an autograd graph."""
    model, teacher = (load_model(folder, torch.float32).double() for folder in pair)
    found = []
    for r in trainer.rollouts:
        ids, first, n = torch.tensor([r.prompt_ids + r.response_ids]), len(r.prompt_ids) - 1, len(r.response_ids)
        logq, logp = (torch.log_softmax(m(ids).logits[0, first : first + n], -1) for m in (model, teacher))  # pyright: ignore
        logp = logp.detach()
        drawn, p = (x.gather(1, torch.tensor(r.response_ids)[:, None])[:, 0] for x in (logq, logp))
        going_on = torch.log1p(-logq.exp()[:, list(trainer.sampling.eos_ids)].sum(-1))
        kl = (logq.exp() * (logq - logp)).sum(-1)
        found.append({"drawn": drawn, "p": p, "kl": kl, "going_on": going_on})
    return model, found


@pytest.mark.parametrize("name", ["rate", "words"])
def test_an_update_is_that_of_a_plain_loop(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    """Padding, four micro-batches, teacher mixing; a rollout has no part in its own price."""
    rollout = ROLLOUT.model_copy(update={"inner_epochs": 1})
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, **SGD}
    objective = preset(name, discount=0.9)
    trainer = train(pair, tmp_path, rollout=rollout, objective=objective, **settings)
    model, found = scored(trainer, pair)
    sums = [(float(one["kl"].detach().sum()), len(one["kl"])) for one in found]
    loss: Any = 0.0
    ended = set()
    for i, (r, one) in enumerate(zip(trainer.rollouts, found, strict=True)):
        kappa = sum(s for j, (s, _) in enumerate(sums) if j != i) / sum(n for j, (_, n) in enumerate(sums) if j != i)
        old, n = one["drawn"].detach(), len(one["drawn"])
        rho = old.exp() / (0.7 * old.exp() + 0.3 * one["p"].exp())
        fixed = one["kl"].detach()
        score = one["drawn"] - one["going_on"] if name == "words" else one["drawn"]
        for t in range(n):
            is_end = r.response_ids[t] in trainer.sampling.eos_ids
            ended.add(is_end)
            advantage = sum(0.9 ** (k - t - 1) * (kappa - fixed[k]) for k in range(t + 1, n))
            loss = loss + one["kl"][t] - (0 if is_end and name == "words" else rho[t] * score[t] * advantage)
    assert ended == {True, False}
    (loss / sum(n for _, n in sums)).backward()
    after = trainer.model.state_dict()  # pyright: ignore[reportOptionalMemberAccess]
    for key, parameter in model.named_parameters():
        want = parameter.detach() - 0.5 * parameter.grad
        moved = float((0.5 * parameter.grad).norm())
        assert float((after[key].double() - want).norm()) < 1e-3 * moved + 1e-6, key


def exact_rate(model: Any, teacher: Any, prompt: list[int], limit: int, ends: list[int], words: bool) -> list[Tensor]:
    """The gradient of E[Σ KL] / E[T] of all responses of at most `limit` tokens to a prompt, by autograd."""
    vocab = model.config.vocab_size
    others = [token for token in range(vocab) if token not in ends]
    total = length = torch.zeros((), dtype=torch.float64)
    reached = torch.zeros(1, dtype=torch.float64)  # log-probability of each prefix
    for n in range(limit):
        prefixes = [list(p) for p in itertools.product(others, repeat=n)]
        ids = torch.tensor([prompt + prefix for prefix in prefixes])
        logq, logp = (torch.log_softmax(m(ids).logits[:, -1], -1) for m in (model, teacher))
        kl = (logq.exp() * (logq - logp.detach())).sum(-1)
        total, length = total + (reached.exp() * kl).sum(), length + reached.exp().sum()
        going_on = (1 - logq.exp()[:, ends].sum(-1)).log()
        drawn = logq[:, others]
        if words:
            drawn = drawn - going_on[:, None] + going_on.detach()[:, None]
        reached = (reached[:, None] + drawn).flatten()
    return list(torch.autograd.grad(total / length, list(model.parameters())))


class Gradients(TrainerCallback):
    """Keeps the gradients of every update along some directions."""

    def __init__(self, directions: list[list[Tensor]]) -> None:
        self.directions, self.along = directions, []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [p.grad.double() for p in model.parameters()]
        self.along.append(
            [float(sum((g * d).sum() for g, d in zip(grads, one, strict=True))) for one in self.directions]
        )


@pytest.mark.full
@pytest.mark.parametrize("name", ["rate", "words"])
def test_the_mean_update_is_the_gradient_of_the_objective(pair: tuple[str, str], tmp_path: Path, name: str) -> None:
    """A z-test with samples of a real engine, against every response of up to three tokens."""
    prompt, limit = {"prompt": "<user> w1 w2 <bot>"}, 3
    rollout = RolloutConfig(
        engine="transformers",
        num_rollouts=64,
        inner_epochs=1,
        teacher_mix=0.0,
        max_new_tokens=limit,
        max_prompt_tokens=8,
    )
    settings = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "max_steps": 60}
    trainer = MiniLLMTrainer(
        *pair,
        arguments(tmp_path, **{**settings, **SGD, "learning_rate": 0.0}),
        rollout=rollout,
        objective=preset(name),
        train_dataset=[prompt] * 64,
    )
    model, teacher = (load_model(folder, torch.float32).double() for folder in pair)
    ids, ends = trainer.source.prompts[0], sorted(trainer.sampling.eos_ids)
    exact = exact_rate(model, teacher, list(ids), limit, ends, name == "words")
    g = torch.Generator().manual_seed(0)
    directions = [exact, *([torch.randn(p.shape, generator=g, dtype=torch.float64) for p in exact] for _ in range(3))]
    seen = Gradients(directions)
    trainer.add_callback(seen)
    trainer.train()
    along = torch.tensor(seen.along, dtype=torch.float64)
    want = torch.tensor([float(sum((e * d).sum() for e, d in zip(exact, one, strict=True))) for one in directions])
    z = (along.mean(0) - want) / (along.std(0) / len(along) ** 0.5)
    assert float(z.abs().max()) < 3.5, z
    assert float(along[:, 0].mean()) > 3 * float(along[:, 0].std()) / len(along) ** 0.5  # there is something to see


def test_a_resumed_run_continues_with_the_price_and_the_value_of_the_batches_before(
    pair: tuple[str, str], tmp_path: Path
) -> None:
    """It stops within a batch (3) and between two (4)."""
    objective = preset("words", offset_memory=0.8, baseline="value", trace=0.9)
    settings: dict[str, Any] = {"objective": objective, "max_steps": 6}
    whole = train(pair, tmp_path / "whole", **settings)
    for stop in (3, 4):
        folder = tmp_path / f"{stop}"
        train(pair, folder, stop=stop, **settings)
        resumed = train(pair, folder, resume=str(folder / f"checkpoint-{stop}"), **settings)
        for (key, x), y in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):  # pyright: ignore
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=key)
        ours, theirs = (run.credit.state(finished=True) for run in (resumed, whole))
        assert ours["rate"] == pytest.approx(theirs["rate"], rel=1e-4)
        assert ours["value"] == pytest.approx(theirs["value"], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("field", [{"credit_offset": "rate_per_prompt"}, {"baseline": "prompt_position"}])
def test_what_compares_responses_to_a_prompt_needs_several(
    pair: tuple[str, str], tmp_path: Path, field: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"set rollout\.samples_per_prompt to 2 or more"):
        MiniLLMTrainer(
            *pair, arguments(tmp_path), rollout=ROLLOUT, train_dataset=PROMPTS, objective=preset("rate", **field)
        )


@pytest.mark.parametrize("baseline", ["position", "prompt_position", "value"])
def test_baselines_by_token_do_not_depend_on_the_micro_batches(
    pair: tuple[str, str], tmp_path: Path, baseline: str
) -> None:
    rollout = ROLLOUT.model_copy(update={"samples_per_prompt": 2})
    changes = {"trace": 0.9} if baseline == "value" else {}
    objective = preset("words", baseline=baseline, credit_offset="rate_per_prompt", **changes)
    settings: dict[str, Any] = {
        "objective": objective,
        "rollout": rollout,
        "max_steps": 6,
        **SGD,
        "learning_rate": 0.05,
    }
    runs = []
    for micro in (1, 4):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
        runs.append(train(pair, tmp_path / f"{micro}", **settings, **sizes))  # pyright: ignore[reportArgumentType]
    one, four = (run.credit for run in runs)
    assert [len(values) for values in one.baselines] == [len(r.response_ids) for r in runs[0].rollouts]
    for a, b in zip(one.baselines, four.baselines, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert baseline != "value" or float(a.abs().max()) > 0
    for (key, x), y in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5, msg=key)


def test_the_signal_of_the_long_term_term_is_logged_and_changes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, **SGD, "learning_rate": 0.05}
    runs = {
        every: train(pair, tmp_path / f"{every}", objective=preset("words", signal_every=every), **settings)
        for every in (0, 2)
    }
    for (key, x), y in zip(runs[0].model.state_dict().items(), runs[2].model.state_dict().values(), strict=True):  # pyright: ignore
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=key)
    names = {"long_term_share", "long_term_signal", "single_step_signal"}
    logged = {every: [entry for entry in run.state.log_history if "loss" in entry] for every, run in runs.items()}
    assert all(not names & entry.keys() for entry in logged[0])
    assert [names <= entry.keys() for entry in logged[2]] == [True, False, True, False]
    assert all(-1 < entry[name] < 1.01 for entry in logged[2][::2] for name in names if name.endswith("signal"))
    assert all(entry["single_step_signal"] > 0.2 for entry in logged[2][::2])  # KL has a long way to fall
