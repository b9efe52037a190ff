"""A teacher behind stock `vllm serve` processes that return log-probabilities only.

They return those of the sampled tokens and of some others. One request per response gives log p of every
sampled token, which is all that sampled rewards need: with `reward: sampled` the long-term term is the same as with a
teacher in this process. KL(q‖p) would need whole rows of log-probabilities. It is computed over a partition instead:
the student's `top_k` most likely tokens, the sampled token, and all others as one event. This is smaller than the true
value by q(others) · KL(q‖p within the others); docs/guides/teachers.md gives its size for a pair. The same holds for
`reward: expected`.

The request also returns the teacher's own most likely tokens. Where they leave out one of the student's, a second
request asks for that position alone, which costs one block of tokens because the server caches prefixes.

A token that the teacher excludes has log p = −inf, or the −9999 that vLLM writes for it. Its mass is 0, and its log p
becomes `minillm.data.logprobs.LOG_ZERO`, as with a teacher in this process. A value above 0, or one that is not a
number, counts as an invalid response, and the request is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from minillm.data.rollouts import Rollout, TeacherRows, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.errors import InputError
from minillm.models.completions import checked_logprob, read_completion
from minillm.models.servers import PLAIN, Servers

TOP_LOGPROBS = 20  # the most that a server returns unless --max-logprobs says otherwise
_NEGLIGIBLE = -9.2  # log 1e-4: less likely tokens of the student are counted among the others

T = TypeVar("T")
LogprobTable = dict[int, float]
"""Log p of some tokens at one position, by token id."""
Request = tuple[dict[str, Any], Callable[[Any], T]]
"""The body of a request, and what reads its answer."""


class ServedLogprobs:
    """Scores rollouts by the log-probabilities that servers return.

    Rows of the teacher's head beyond the vocabulary, which a teacher in this process leaves out, count in the server's
    log-probabilities: log p is smaller by log(1 − their mass), which for trained models is far below rounding.

    Args:
        urls: `http://host:port` of each server. The servers need no special settings.
        top_k: how many of the student's most likely tokens are scored per position; 0 where only sampled tokens count.
        max_length: tokens of the longest sequence that will be scored.
        patience: seconds for which a server that does not answer is retried.
        timeout: seconds that one request may take.

    Raises:
        EngineError: a server is unreachable, or serves shorter sequences.
    """

    def __init__(
        self, urls: Sequence[str], *, top_k: int, max_length: int, patience: float = 600.0, timeout: float = 300.0
    ) -> None:
        self.top_k = top_k
        self._servers = Servers(urls, patience=patience, timeout=timeout)
        try:
            for server in self._servers.each:
                # A request for log-probabilities has to sample one more token, which needs a position too.
                self._servers.call_with_retries(lambda server=server: server.attach(max_length + 1), server)
        except BaseException:
            self.close()
            raise

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> list[TeacherTargets]:
        """Score responses: log p of their tokens and of the student's most likely ones; see `Teacher.score`.

        Raises:
            InputError: the temperature is not 1, which is the temperature of the servers' log-probabilities.
        """
        if sampling.temperature != 1.0:
            raise InputError(f"a served teacher's log-probabilities are of temperature 1, not {sampling.temperature:g}")
        tables = self._servers.complete_all([self._response_request(rollout) for rollout in rollouts])
        incomplete = [
            (table, rollout.prompt_ids + rollout.response_ids[:position], unknown)
            for rollout, rows in zip(rollouts, tables, strict=True)
            for position, table in enumerate(rows)
            if (unknown := [token for token in self._wanted(rollout, position) if token not in table])
        ]
        found = self._servers.complete_all([_position_request(prefix, ids) for _, prefix, ids in incomplete])
        for (table, _, _), more in zip(incomplete, found, strict=True):
            table |= more
        return [self._targets(rollout, rows) for rollout, rows in zip(rollouts, tables, strict=True)]

    def close(self) -> None:
        """Close the connections to the servers."""
        self._servers.close()

    def _wanted(self, rollout: Rollout, position: int) -> list[int]:
        """The student's most likely tokens at a position, without the sampled one."""
        if not self.top_k or rollout.top_logprobs is None:
            return []
        sampled = rollout.response_ids[position]
        top_logprobs = sorted(rollout.top_logprobs[position].items(), key=lambda entry: -entry[1])
        return [token for token, logq in top_logprobs if token != sampled and logq > _NEGLIGIBLE][: self.top_k]

    def _response_request(self, rollout: Rollout) -> Request[list[LogprobTable]]:
        """Asks for log p of the sampled token and of the teacher's most likely ones, at each position of a response."""
        tokens = len(rollout.response_ids)
        body = PLAIN | {
            "prompt": rollout.prompt_ids + rollout.response_ids,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": TOP_LOGPROBS if self.top_k else 0,
        }

        def read(answer: Any) -> list[LogprobTable]:
            [choice] = answer["choices"]
            rows = choice["prompt_logprobs"][-tokens:]
            tables = [{int(token): checked_logprob(entry["logprob"]) for token, entry in row.items()} for row in rows]
            if len(tables) != tokens or any(
                token not in table for token, table in zip(rollout.response_ids, tables, strict=True)
            ):
                raise InputError("log-probabilities of some tokens are missing")
            return tables

        return body, read

    def _targets(self, rollout: Rollout, tables: list[LogprobTable]) -> TeacherTargets:
        """The targets of a response, from the tables of its positions."""
        slots = [[token, *self._wanted(rollout, position)] for position, token in enumerate(rollout.response_ids)]
        width = max(map(len, slots))
        ids = [row + row[:1] * (width - len(row)) for row in slots]
        logprobs = [[table[token] for token in row] for row, table in zip(ids, tables, strict=True)]
        rows = TeacherRows(torch.tensor(ids), torch.tensor(logprobs))
        return TeacherTargets(rows.logprobs[:, 0].clone(), rows=rows)


def _position_request(prefix: list[int], ids: list[int]) -> Request[LogprobTable]:
    """Asks for log p of some tokens after one prefix."""
    body = PLAIN | {"prompt": prefix, "max_tokens": 1, "temperature": 1.0, "logprobs": 1, "logprob_token_ids": ids}

    def read(answer: Any) -> LogprobTable:
        [table] = read_completion(answer, ids).tables
        return {token: table[token] for token in ids}

    return body, read
