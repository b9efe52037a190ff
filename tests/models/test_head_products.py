"""Products with weights that are converted block by block."""

from __future__ import annotations

import pytest
import torch

from minillm.models import head as module
from minillm.models.head import project, project_back

BFLOAT16_SUM = 0.01
"""Rounding error of a result that may be stored in bfloat16."""


@pytest.mark.parametrize("rows", [50, 3, 64])
@pytest.mark.parametrize("states_dtype", [torch.bfloat16, torch.float32])
def test_blocks_give_the_whole_product(rows: int, states_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a last block that is shorter, with blocks that divide the vocabulary, and with one that holds it all."""
    g = torch.Generator().manual_seed(0)
    weight, states = torch.randn(50, 8, generator=g).bfloat16(), torch.randn(5, 8, generator=g).bfloat16()
    grad = torch.randn(5, 50, generator=g).bfloat16().float()
    monkeypatch.setattr(module, "_BLOCK", rows * 8)
    got = project(states.to(states_dtype), weight)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), states.double() @ weight.double().t(), rtol=1e-6, atol=1e-5)
    want = grad.double() @ weight.double()
    for multiplies in (True, False):
        monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda multiplies=multiplies: multiplies)
        error = (project_back(grad, weight).double() - want).norm() / want.norm()
        assert error < (BFLOAT16_SUM if multiplies else 1e-6)


def test_the_blocks_of_a_tracked_product_have_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 8)
    states, weight = torch.ones(2, 8).bfloat16().requires_grad_(), torch.ones(5, 8).bfloat16()
    project(states, weight).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, torch.full((2, 8), 5.0).bfloat16())
