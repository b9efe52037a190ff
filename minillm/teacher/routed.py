"""Several teachers by name, each of which scores the responses that name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.errors import InputError
from minillm.models.head import TeacherStates
from minillm.teacher.served_states import ServedStates
from minillm.teacher.states import StatesTeacher

if TYPE_CHECKING:
    from jaxtyping import Float

T = TypeVar("T")


class RoutedTeacher:
    """Several teachers that return states. Those behind servers are asked at the same time.

    Args:
        by_name: the teachers by name.

    Attributes:
        batch_size: sequences that are scored together.
    """

    def __init__(self, by_name: Mapping[str, StatesTeacher]) -> None:
        self.by_name = dict(by_name)
        self.batch_size = min(teacher.batch_size for teacher in self.by_name.values())

    def of(self, name: str | None) -> StatesTeacher:
        """The teacher of this name.

        Raises:
            InputError: there is none.
        """
        if name is None or name not in self.by_name:
            what = "a row names no teacher" if name is None else f"a row names teacher {name!r}"
            raise InputError(f"{what}; allowed in the column teacher: {', '.join(self.by_name)}")
        return self.by_name[name]

    def hidden(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], names: Sequence[str | None]
    ) -> list[Float[Tensor, "tokens hidden"]]:
        """Final hidden states of each response by its own teacher; see `StatesTeacher.hidden`.

        Args:
            prompts: token ids, at least one per prompt.
            responses: token ids of the response to each prompt.
            names: the name of each response's teacher.

        Raises:
            InputError: there is no teacher of that name.
        """
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            self.of(name)
            groups.setdefault(str(name), []).append(i)

        def states(name: str) -> list[Tensor]:
            return self.by_name[name].hidden([prompts[i] for i in groups[name]], [responses[i] for i in groups[name]])

        served = [name for name in groups if isinstance(self.by_name[name], ServedStates)]
        pool = ThreadPoolExecutor(max(len(served), 1), thread_name_prefix="teachers")
        try:
            waiting = {name: pool.submit(states, name) for name in served}
            found = {name: states(name) for name in groups if name not in waiting}
            found |= {name: future.result() for name, future in waiting.items()}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an error or Ctrl-C does not wait for the other servers
        return _in_order(found, groups, len(names))

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> list[TeacherTargets]:
        """Score each response with the teacher that it names; see `StatesTeacher.score`."""
        prompts, responses = [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts]
        hidden = self.hidden(prompts, responses, [rollout.teacher_name for rollout in rollouts])
        return [TeacherTargets(None, hidden=states) for states in hidden]

    def add_token_logprobs(self, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
        """Add log p of their tokens to the targets that lack them; see `StatesTeacher.add_token_logprobs`."""
        for rollout in rollouts:
            self.of(rollout.teacher_name).add_token_logprobs([rollout], sampling)

    def close(self) -> None:
        """Release the connections of all teachers."""
        for teacher in self.by_name.values():
            teacher.close()


ExactTeacher = StatesTeacher | RoutedTeacher
"""A teacher, or several, whose scores are exact."""


def hidden_states(
    teacher: ExactTeacher,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    names: Sequence[str | None],
) -> list[Float[Tensor, "tokens hidden"]]:
    """Final hidden states of each response; `names` is read where there are several teachers."""
    if isinstance(teacher, RoutedTeacher):
        return teacher.hidden(prompts, responses, names)
    return teacher.hidden(prompts, responses)


def join_states(
    teacher: ExactTeacher, hidden: Sequence[Float[Tensor, "tokens hidden"]], names: Sequence[str | None]
) -> TeacherStates | list[TeacherStates]:
    """Join the hidden states of consecutive responses for `token_scores`.

    Args:
        teacher: the teacher, or several.
        hidden: the states of each response.
        names: the name of each response's teacher, which is read where there are several.

    Returns:
        The states with the teacher's head; with several teachers, those of each run of responses with the same teacher.
    """
    if not isinstance(teacher, RoutedTeacher):
        return TeacherStates(torch.cat(list(hidden)), teacher.head)
    runs: list[tuple[str | None, list[Tensor]]] = []
    for states, name in zip(hidden, names, strict=True):
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(states)
    heads = {name: teacher.of(name).head for name, _ in runs}
    return [TeacherStates(torch.cat(states), heads[name]) for name, states in runs]


def _in_order(found: Mapping[str, Sequence[T]], groups: Mapping[str, Sequence[int]], count: int) -> list[T]:
    """What was found for each group, in the order of the indices that the groups hold."""
    by_index = {i: value for name, indices in groups.items() for i, value in zip(indices, found[name], strict=True)}
    return [by_index[i] for i in range(count)]
