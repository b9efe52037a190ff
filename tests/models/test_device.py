"""A CPU that emulates bfloat16 computes in float32, whatever the recipe says."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillm.loss.token_scores import LossFn, ScoreGradients, TokenScores, token_scores
from minillm.models import device as hardware
from minillm.models.head import Head, TeacherStates
from minillm.run.stages import shared, stage_named
from minillm.run.stages.shared import training_arguments


@pytest.mark.parametrize("quick", [True, False])
def test_a_recipe_that_asks_for_bfloat16(
    quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "fast_bfloat16", lambda: quick)
    run: Any = SimpleNamespace(dir=tmp_path, recipe=SimpleNamespace(seed=0))
    given = {"bf16": True}
    with caplog.at_level(logging.WARNING):
        assert training_arguments(run, stage_named("warmup"), given).bf16 is quick
    assert any("stage warmup computes in float32" in record.message for record in caplog.records) is not quick
    assert given == {"bf16": True}


@pytest.mark.parametrize("quick", [True, False])
def test_logits_of_bfloat16_states_are_not_rounded(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: quick)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=g).bfloat16(), torch.randn(50, 16, generator=g).bfloat16()
    targets = torch.randint(50, (40,), generator=g)
    _, got = token_scores(hidden, Head(weight), targets, TeacherStates(hidden, Head(weight)))
    want = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, targets[:, None])[:, 0]
    assert float((got.logq - want).abs().max()) < 1e-5
    logits = Head(weight).logits(hidden)
    assert logits.dtype == torch.float32
    assert float((torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0] - want).abs().max()) < 1e-5


@pytest.mark.parametrize("quick", [True, False])
def test_products_are_made_in_bfloat16_only_inside_the_context(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cpu_multiplies_bfloat16", lambda: quick)
    setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = setting.fp32_precision

    def inside(*_: object) -> Any:
        assert (setting.fp32_precision == "bf16") is quick
        raise KeyError

    with pytest.raises(KeyError), hardware.float32_from_bfloat16_products():
        inside()
    assert setting.fp32_precision == before
    with hardware.float32_from_bfloat16_products(False):
        assert setting.fp32_precision == before
    states = torch.ones(3, 4)  # float32 states of a float32 computation are never rounded
    token_scores(states, Head(torch.ones(5, 4)), torch.zeros(3, dtype=torch.long), loss_fn=_seen(before))
    with pytest.raises(KeyError):
        token_scores(states.bfloat16(), Head(torch.ones(5, 4)), torch.zeros(3, dtype=torch.long), loss_fn=inside)
    assert setting.fp32_precision == before


def _seen(precision: str) -> LossFn:
    def loss_fn(part: slice, scores: TokenScores) -> tuple[torch.Tensor, ScoreGradients]:
        setting: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
        assert setting.fp32_precision == precision
        return scores.logq.sum(), ScoreGradients()

    return loss_fn


def test_the_working_dtype_is_one_of_the_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for quick, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "fast_bfloat16", lambda quick=quick: quick)
        assert hardware.working_dtype() == dtype


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="of glibc, without a GPU")
def test_freed_memory_is_kept_as_long_as_is_asked_for() -> None:
    """By what is resident after a block of 64 MiB was freed: inside, at the end, and after one more outside."""
    code = """
import resource, torch
from pathlib import Path
from minillm.models.device import keep_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
torch.set_num_threads(1)
torch.ones(8)
start = resident()
with keep_freed_memory():
    torch.ones(1 << 24)
    kept = resident() - start
at_the_end = resident() - start
torch.ones(1 << 24)
print(kept, at_the_end, resident() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, at_the_end, outside = map(int, done.stdout.split())
    assert kept >= 60
    assert max(at_the_end, outside) < 10
