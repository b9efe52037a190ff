"""A teacher behind stock `vllm serve` processes: log-probabilities of the drawn tokens and of some others.

One request a response gives log p of every drawn token, which is all that sampled rewards need: with `reward: sampled` the
long-term term is what it is with a teacher at hand. KL(q‖p) would need whole rows. Here it is that of a partition: the
student's `top_k` likeliest tokens, the drawn one, and all others as one event. It is smaller than the true one by
q(others) · KL(q‖p within the others); README says what that is for a real pair. The same goes for `reward: expected`.

The request also tells the teacher's own likeliest tokens. Where those leave out one of the student's, the place is asked
for by itself, which the server's prefix cache makes a matter of one block of tokens.

A token that the teacher excludes comes as −inf, or as the −9999 that vLLM writes for it: its mass is 0, and its log p
`minillm.data.logprobs.LOG_ZERO`, as with a teacher at hand. What is above 0 or not a number is no answer, and asked for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from minillm.data.rollouts import Rollout, TeacherRows
from minillm.data.sampling import Sampling
from minillm.errors import InputError
from minillm.models.servers import PLAIN, Servers, checked_logprob, read_completion

_TOP_LOGPROBS = 20  # as many as a server gives unless --max-logprobs says otherwise
_NEGLIGIBLE = -9.2  # log 1e-4: less likely tokens of the student are left to the others


class ServedTeacher:
    """Scores rollouts; holds no model.

    Args:
        urls: `http://host:port` of each server. They need no setting of their own; `VLLM_API_KEY` is sent where it is set.
        source: folder or hub id of the teacher's tokenizer and config.
        top_k: tokens of the student per place; 0 where only drawn tokens count.

    Rows of the teacher's head beyond the vocabulary, which a teacher at hand leaves out, count in the server's numbers:
    log p is smaller by log(1 − their mass), which trained models keep far below rounding.
    """

    def __init__(self, urls: Sequence[str], source: str, *, top_k: int = 16, patience: float = 600.0) -> None:
        if not urls:
            raise InputError("teacher.servers: no address")
        if top_k >= _TOP_LOGPROBS:
            raise InputError(
                f"teacher.top_k ({top_k}): an engine tells fewer than {_TOP_LOGPROBS} of its likeliest tokens"
            )
        self.source, self.top_k = source, top_k
        self._servers = Servers(urls, patience=patience, setting="rollout.server_patience")

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher's head."""
        return AutoConfig.from_pretrained(self.source).get_text_config().vocab_size

    def attach(self, max_length: int) -> None:
        """Make sure that every server is there and takes sequences of `max_length` tokens.

        Raises:
            EngineError: which does not.
        """
        for server in self._servers.each:
            # The token that a request for log-probabilities has to draw besides takes a place too.
            self._servers.call_with_retries(lambda server=server: server.attach(max_length + 1), server)

    def score(self, rollouts: Sequence[Rollout], sampling: Sampling) -> None:
        """Fill in `teacher_logprobs` and `teacher_rows` of the rollouts that lack them.

        Raises:
            ValueError: a temperature other than 1, of which the server's numbers are not.
        """
        if sampling.temperature != 1.0:
            raise InputError(f"a served teacher's log-probabilities are of temperature 1, not {sampling.temperature:g}")
        missing = [rollout for rollout in rollouts if rollout.teacher_logprobs is None]
        tables = self._servers.all([lambda r=r: self._read(r) for r in missing])
        places = [
            (table, rollout.prompt_ids + rollout.response_ids[:place], unknown)
            for rollout, rows in zip(missing, tables, strict=True)
            for place, table in enumerate(rows)
            if (unknown := [token for token in self._wanted(rollout, place) if token not in table])
        ]
        found = self._servers.all(
            [lambda prefix=prefix, ids=ids: self._named(prefix, ids) for _, prefix, ids in places]
        )
        for (table, _, _), more in zip(places, found, strict=True):
            table |= more
        for rollout, rows in zip(missing, tables, strict=True):
            self._fill(rollout, rows)

    def close(self) -> None:
        """Let go of the servers."""
        self._servers.close()

    def _wanted(self, rollout: Rollout, place: int) -> list[int]:
        """The student's likeliest tokens at a place, the drawn one left out."""
        if not self.top_k or rollout.top_logprobs is None:
            return []
        drawn = rollout.response_ids[place]
        top_logprobs = sorted(rollout.top_logprobs[place].items(), key=lambda entry: -entry[1])
        return [token for token, logq in top_logprobs if token != drawn and logq > _NEGLIGIBLE][: self.top_k]

    def _read(self, rollout: Rollout) -> list[dict[int, float]]:
        """For each place, log p of the drawn token and of the teacher's likeliest."""
        tokens = len(rollout.response_ids)
        body = PLAIN | {
            "prompt": rollout.prompt_ids + rollout.response_ids, "max_tokens": 1, "temperature": 1.0,
            "prompt_logprobs": _TOP_LOGPROBS if self.top_k else 0,
        }  # fmt: skip

        def read(answer: Any) -> list[dict[int, float]]:
            [choice] = answer["choices"]
            rows = choice["prompt_logprobs"][-tokens:]
            tables = [{int(token): checked_logprob(entry["logprob"]) for token, entry in row.items()} for row in rows]
            if len(tables) != tokens or any(
                token not in table for token, table in zip(rollout.response_ids, tables, strict=True)
            ):
                raise InputError("log-probabilities of some tokens are missing")
            return tables

        return self._servers.complete(body, read)

    def _named(self, prefix: list[int], ids: list[int]) -> dict[int, float]:
        body = PLAIN | {"prompt": prefix, "max_tokens": 1, "temperature": 1.0, "logprobs": 1, "logprob_token_ids": ids}
        [table] = self._servers.complete(body, lambda answer: read_completion(answer, ids)).tables
        return {token: table[token] for token in ids}

    def _fill(self, rollout: Rollout, tables: list[dict[int, float]]) -> None:
        slots = [[token, *self._wanted(rollout, place)] for place, token in enumerate(rollout.response_ids)]
        width = max(map(len, slots))
        ids = [row + row[:1] * (width - len(row)) for row in slots]
        logprobs = [[table[token] for token in row] for row, table in zip(ids, tables, strict=True)]
        rollout.teacher_rows = TeacherRows(torch.tensor(ids), torch.tensor(logprobs))
        rollout.teacher_logprobs = rollout.teacher_rows.logprobs[:, 0].clone()
