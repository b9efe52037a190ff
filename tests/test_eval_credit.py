"""The long worlds of `eval/credit.py`: their expectations are those of what is sampled in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eval.credit import METHODS, VARIANTS, enumerated, price, tables, tasks
from eval.long_worlds import LongWorld, batch_gradients
from minillm.loss.config import Objective
from tests.loss.worlds import World


def test_lengths_and_kl_of_samples_are_those_expected() -> None:
    world, rng = LongWorld(0, limit=30, mean_length=8.0), np.random.default_rng(0)
    rollouts, states = world.sample([3] * 2000, rng)
    lengths = torch.tensor([float(len(r.response_ids)) for r in rollouts])
    sums = torch.stack([r.reverse_kl.sum() for r in rollouts if r.reverse_kl is not None])
    with torch.no_grad():
        found = world.expected()
    assert len(states) == int(lengths.sum())
    for values, want in ((lengths, found.length[3]), (sums, found.reverse_kl[3])):
        assert abs(float(values.mean() - want)) < 4 * float(values.std()) / 2000**0.5
    unfinished = [float(not r.finished) for r in rollouts]
    assert abs(sum(unfinished) / 2000 - float(found.unfinished[3])) < 0.02


def test_the_exact_gradient_is_that_of_finite_differences() -> None:
    world, step = LongWorld(1, limit=30, mean_length=8.0), 1e-6
    got = world.exact("rate") / float(world.expected().length.mean().detach())
    direction = torch.randn(world.body.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            world.body += sign * step * direction
            found = world.expected()
            world.body -= sign * step * direction
        ends.append(float(found.reverse_kl.mean() / found.length.mean()))
    along = float((got[: world.body.numel()] * direction.flatten()).sum())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["rate", "words"])
def test_estimates_have_the_mean_of_the_exact_gradient(name: str) -> None:
    world = LongWorld(2, limit=40, mean_length=10.0)
    grads = batch_gradients(world, Objective.model_validate({"preset": name}), 150, 256, 0)
    exact = world.exact(name) / float(world.expected().length.mean().detach())
    along = grads @ exact / exact.norm()
    assert abs(float(along.mean() - exact.norm())) < 4 * float(along.std()) / len(along) ** 0.5


def test_the_tables_show_every_method_over_the_worlds_that_all_have_finished() -> None:
    found: dict[str, Any] = {}
    for key in tasks(3, 7):
        method, seed = key.split("|")[1:]
        value = 0.25 if method == "words" else 0.5
        names = ["sum", "rate", "words", "variance", "asymmetry", "share", "signal", "cosine", "length"]
        found[key] = dict.fromkeys([*names, "rate_mean", "answer", "forward", "log_length", "finished"], value)
        if key.startswith("trained") and seed == "1":
            found[key]["rate"] += 0.1
    del found["trained 7, 160|words, value, λ 0.9|2"]
    text = tables(found, 7)
    assert all(text.count(f"| {name} |") >= 3 for name in METHODS)
    assert all(text.count(f"| {name} |") == 3 for name in VARIANTS)
    assert "3 worlds of up to 64 tokens, 7 updates" in text
    assert "2 worlds of up to 160 tokens, 7 updates" in text
    # Worlds differ by 0.1 and methods by 0.25: the paired difference has no spread.
    assert text.count("| words | 0.283 [0.140, 0.427] | -0.250 [-0.250, -0.250] |") == 1
    assert "| words | 0.25 / 0.25 / 0.25 |" in text


def test_an_enumerated_method_has_the_bias_of_the_tests() -> None:
    """The bias of `rate` and `words` to what they are the gradient of is 0 without mixing, and nothing else is."""
    for name in ("rate", "words"):
        found = enumerated(METHODS[name], 3, 0.0)
        assert found[name] < 1e-9
        assert min(found[goal] for goal in ("sum", "rate", "words") if goal != name) > 1e-3
    assert enumerated(METHODS["exact"], 3, 0.5)["sum"] < 1e-9
    assert price(World.random(3), 0.0) == pytest.approx(World.random(3).kappa(), rel=1e-12)
