"""A server's answers are validated before they are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.data.logprobs import LOG_ZERO
from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.models.completions import read_completion
from minillm.teacher.served_logprobs import ServedLogprobs

NAN, INF = float("nan"), float("inf")


def answer(drawn: float, others: dict[str, float]) -> dict[str, Any]:
    logprobs = {"token_logprobs": [drawn], "top_logprobs": [{"token_id:5": drawn, **others}]}
    return {"choices": [{"token_ids": [5], "finish_reason": "length", "logprobs": logprobs}]}


@pytest.mark.parametrize("value", [NAN, INF, 0.5, -INF, -9999.0])
def test_a_sampled_token_has_a_probability(value: float) -> None:
    with pytest.raises(ValueError, match=r"invalid log-probability|a sampled token has a probability of 0"):
        read_completion(answer(value, {}))


def test_other_tokens_may_have_none() -> None:
    [table] = read_completion(
        answer(-0.5, {"token_id:6": -9999.0, "token_id:7": -INF, "token_id:8": 2e-4}), [6, 7]
    ).tables
    assert table == {5: -0.5, 6: LOG_ZERO, 7: LOG_ZERO, 8: 2e-4}
    for value in (NAN, INF, 0.5):
        with pytest.raises(ValueError, match="invalid log-probability"):
            read_completion(answer(-0.5, {"token_id:6": value}), [6])


class FixedAnswer:
    """Stands in for the servers of a served teacher, with one answer to every request."""

    def __init__(self, rows: list[dict[str, float]]) -> None:
        self.rows = [{token: {"logprob": value} for token, value in row.items()} for row in rows]

    def complete_all(self, requests: Any) -> list[Any]:
        return [read({"choices": [{"prompt_logprobs": [None, *self.rows]}]}) for _, read in requests]


def served(rows: list[dict[str, float]]) -> TeacherTargets:
    teacher = object.__new__(ServedLogprobs)
    teacher.top_k, teacher._servers = 2, FixedAnswer(rows)  # pyright: ignore[reportAttributeAccessIssue]
    drawn = torch.tensor([-0.1, -0.2])
    rollout = Rollout([3], [5, 1], drawn, drawn, 0, True, top_logprobs=[{5: -0.1, 6: -2.4}, {1: -0.2, 6: -1.7}])
    [targets] = teacher.score([rollout], Sampling(2, (1,), 32, top_logprobs=2))
    return targets


def test_a_served_teachers_zeros_are_floored_and_invalid_logprobs_are_refused() -> None:
    targets = served([{"5": -0.3, "6": -9999.0}, {"1": -INF, "6": -0.4}])
    assert targets.rows is not None
    assert targets.token_logprobs is not None
    assert targets.rows.logprobs.tolist() == [pytest.approx([-0.3, LOG_ZERO]), pytest.approx([LOG_ZERO, -0.4])]
    assert targets.token_logprobs.tolist() == pytest.approx([-0.3, LOG_ZERO])
    for value in (NAN, INF, 0.5):
        with pytest.raises(ValueError, match="invalid log-probability"):
            served([{"5": -0.3, "6": value}, {"1": -0.2, "6": -0.4}])
