"""Several teachers by name: each response is scored by its own, and served ones are asked at the same time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.errors import EngineError, InputError
from minillm.models.head import Head
from minillm.teacher.base import score_missing
from minillm.teacher.local import LocalTeacher
from minillm.teacher.routed import RoutedTeacher, join_states
from minillm.teacher.served_states import ServedStates
from tests.conftest import tiny_llama

NAMES = ["chat", "math", "math", "chat", "chat"]
PROMPTS = [[2, i] for i in range(4, 9)]
RESPONSES = [[5] * 3, [6, 7], [8, 9, 1], [4], [7, 1]]
SAMPLING = Sampling(20, (1,), 30, temperature=0.7)


def rollouts(names: Sequence[str | None] = NAMES) -> list[Rollout]:
    zeros = torch.zeros(1)
    return [
        Rollout(p, r, zeros, zeros, 0, True, teacher_name=name)
        for p, r, name in zip(PROMPTS, RESPONSES, names, strict=True)
    ]


@pytest.fixture
def teachers() -> dict[str, LocalTeacher]:
    return {"math": LocalTeacher(tiny_llama(2, layers=3)), "chat": LocalTeacher(tiny_llama(5, width=96), batch_size=8)}


def test_each_response_is_scored_by_the_teacher_that_it_names(teachers: dict[str, LocalTeacher]) -> None:
    routed = RoutedTeacher(teachers)
    assert routed.batch_size == 8
    scored = rollouts()
    score_missing(routed, scored, SAMPLING)
    routed.add_token_logprobs(scored, SAMPLING)
    for rollout in scored:
        own = teachers[str(rollout.teacher_name)]
        [want] = own.hidden([rollout.prompt_ids], [rollout.response_ids])
        assert rollout.teacher is not None
        torch.testing.assert_close(rollout.teacher.hidden, want)
        logp = own.distribution(want, SAMPLING).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.teacher.token_logprobs, logp)
    for names, what in ((["chat"] * 4 + [None], "names no teacher"), (["code"] * 5, "names teacher 'code'")):
        with pytest.raises(InputError, match=f"a row {what}; allowed in the column teacher: math, chat"):
            routed.score(rollouts(names), SAMPLING)


def test_states_are_joined_by_runs_of_one_teacher(teachers: dict[str, LocalTeacher]) -> None:
    routed = RoutedTeacher(teachers)
    hidden = routed.hidden(PROMPTS, RESPONSES, NAMES)
    joined: Any = join_states(routed, hidden, NAMES)
    assert [len(states.hidden) for states in joined] == [3, 5, 3]
    assert [states.head.weight.shape[1] for states in joined] == [96, 64, 96]
    assert joined[0].head is joined[2].head
    single: Any = join_states(teachers["math"], hidden[1:3], [None, None])
    assert torch.equal(single.hidden, joined[1].hidden)


class Waiting(ServedStates):
    """Answers only when both teachers have been asked."""

    def __init__(self, barrier: threading.Barrier, closed: list[str], fails: bool = False) -> None:
        self._head, self._barrier, self._closed, self._fails = Head(torch.zeros(32, 4)), barrier, closed, fails

    def hidden(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
        self._barrier.wait(10)
        if self._fails:
            raise EngineError("http://gone: ConnectError")
        return [torch.zeros(len(response), 4) for response in responses]

    def close(self) -> None:
        self._closed.append("closed")


def test_served_teachers_are_asked_at_the_same_time_and_all_are_closed() -> None:
    barrier, closed = threading.Barrier(2), list[str]()
    routed = RoutedTeacher({"math": Waiting(barrier, closed), "chat": Waiting(barrier, closed)})
    assert [len(states) for states in routed.hidden(PROMPTS, RESPONSES, NAMES)] == [3, 2, 3, 1, 2]
    routed.close()
    assert closed == ["closed"] * 2
    routed = RoutedTeacher({"math": Waiting(barrier, closed), "chat": Waiting(barrier, closed, fails=True)})
    with pytest.raises(EngineError, match="ConnectError"):
        routed.hidden(PROMPTS, RESPONSES, NAMES)
