"""Exact draws from p̃ = (1−α)·q + α·p at about the student's speed.

The engine drafts K tokens from q; the teacher reads them in one forward. A drafted y is kept with probability
min(1, p̃(y)/q(y)); at the first that is not, the token comes from (p−q)+ normalised, which is what p̃ has and the kept
draws lack. That residual is drawn by rejection: z ~ p, kept with probability max(0, 1 − q(z)/p(z)), so the engine needs
to score a few named tokens and never returns a whole row. Acceptance is 1 − α·TV(p, q).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minillm.data.batches import seed_of
from minillm.rollout.engine import Engine, Rollout, Sampling
from minillm.teacher.local import LocalTeacher, TeacherStream

# Draws from p scored together for one residual: few at first, then as many as an engine scores at once. After
# _TRIES times the residual is so thin (mass below 1e-3) that the last draw is taken: it was needed with probability
# α times that mass.
_CANDIDATES, _MOST_CANDIDATES, _TRIES = 16, 128, 64


@dataclass
class _Row:
    prompt: list[int]
    seed: int
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    logq: list[float] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # [n, H], one entry a round
    unread: list[int] = field(default_factory=list)  # tokens the teacher has yet to read
    tail: Tensor | None = None  # [1, H], the state that predicts the next token, where it is known already

    def append(self, token: int, logq: float, logp: float) -> None:
        self.ids.append(token)
        self.logq.append(logq)
        self.logp.append(logp)


class TeacherMixedSampler:
    """Samples the mixture over any engine; rollouts come back with the teacher's states and log-probabilities.

    `drafted`, `accepted` and `rounds` count since construction.
    """

    def __init__(self, engine: Engine, teacher: LocalTeacher, alpha: float, draft_tokens: int) -> None:
        self._engine, self._teacher, self._alpha, self._draft_tokens = engine, teacher, alpha, draft_tokens
        self.drafted = self.accepted = self.rounds = 0

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Rollout]:
        """One response a prompt, in order; see `Engine.generate`."""
        rows = [
            _Row(prompt, seed, torch.Generator().manual_seed(seed_of(seed, "verify")), unread=list(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        stream = TeacherStream(self._teacher, [len(prompt) for prompt in prompts])
        going = rows
        number = 0
        while going:
            self._round(going, stream, sampling, number)
            number += 1
            keep = [i for i, row in enumerate(going) if not self._ended(row, sampling)]
            going = [going[i] for i in keep]
            if going:
                stream.keep(keep)
        self.rounds += number
        return [self._rollout(row, sampling) for row in rows]

    def _round(self, rows: list[_Row], stream: TeacherStream, sampling: Sampling, number: int) -> None:
        room = [sampling.max_new_tokens - len(row.ids) for row in rows]
        drafts = self._engine.generate(
            [row.prompt + row.ids for row in rows],
            replace(sampling, max_new_tokens=min(self._draft_tokens, max(room))),
            [seed_of(row.seed, "draft", number) for row in rows],
        )
        drawn = [draft.response_ids[:n] for draft, n in zip(drafts, room, strict=True)]
        read = stream.extend([row.unread + ids for row, ids in zip(rows, drawn, strict=True)])
        # states[j] predicts draft token j; the last one predicts what follows a wholly kept draft.
        states = [
            torch.cat([row.tail, hidden]) if row.tail is not None else hidden[len(row.unread) - 1 :]
            for row, hidden in zip(rows, read, strict=True)
        ]
        predicting = [s[: len(ids)] for s, ids in zip(states, drawn, strict=True)]
        logp = self._teacher.token_logprobs(torch.cat(predicting), [t for ids in drawn for t in ids], sampling)
        rejected: list[tuple[_Row, Tensor]] = []
        for i, (row, ids, draft, row_logp) in enumerate(zip(rows, drawn, drafts, logp.split([len(ids) for ids in drawn]), strict=True)):
            logq = draft.student_logprobs[: len(ids)]
            keep = (self._mixture(logq, row_logp) - logq).exp()
            refused = (torch.rand(len(ids), generator=row.generator) >= keep).nonzero()
            kept = int(refused[0, 0]) if len(refused) else len(ids)
            for token, q, p in zip(ids[:kept], logq.tolist(), row_logp.tolist(), strict=False):
                row.append(token, q, p)
            self.drafted += min(kept + 1, len(ids))
            self.accepted += kept
            if kept < len(ids):
                stream.retract(i, len(ids) - kept)
                row.states.append(states[i][: kept + 1])
                rejected.append((row, states[i][kept : kept + 1]))
            else:
                row.states.append(states[i][:kept])
                row.unread, row.tail = [], states[i][kept : kept + 1]
        self._redraw(rejected, sampling)

    def _redraw(self, rejected: list[tuple[_Row, Tensor]], sampling: Sampling) -> None:
        """Append a token from (p−q)+ to each row."""
        if not rejected:
            return
        logps = self._teacher.distribution(torch.cat([state for _, state in rejected]), sampling).cpu()
        waiting = [(row, logp) for (row, _), logp in zip(rejected, logps, strict=True)]
        for attempt in range(_TRIES):
            if not waiting:
                break
            count = _CANDIDATES if attempt < 2 else _MOST_CANDIDATES
            draws = [torch.multinomial(logp.exp(), count, True, generator=row.generator).tolist() for row, logp in waiting]
            named = [sorted(set(some)) for some in draws]
            scored = self._engine.logprobs_of([row.prompt + row.ids for row, _ in waiting], named, sampling)
            still = []
            for (row, logp), some, ids, values in zip(waiting, draws, named, scored, strict=True):
                logq = dict(zip(ids, values.tolist(), strict=True))
                uniform = torch.rand(len(some), generator=row.generator).tolist()
                for token, u in zip(some, uniform, strict=True):
                    last = attempt == _TRIES - 1
                    if last or u < 1 - math.exp(min(0.0, logq[token] - float(logp[token]))):
                        row.append(token, logq[token], float(logp[token]))
                        row.unread, row.tail = [token], None
                        break
                else:
                    still.append((row, logp))
            waiting = still

    def _mixture(self, logq: Tensor, logp: Tensor) -> Tensor:
        return torch.logaddexp(logq + math.log1p(-self._alpha), logp + math.log(self._alpha))

    @staticmethod
    def _ended(row: _Row, sampling: Sampling) -> bool:
        return row.ids[-1] in sampling.eos_ids or len(row.ids) >= sampling.max_new_tokens

    def _rollout(self, row: _Row, sampling: Sampling) -> Rollout:
        logq, logp = torch.tensor(row.logq), torch.tensor(row.logp)
        return Rollout(
            row.prompt, row.ids, logq, self._mixture(logq, logp), self._engine.version, row.ids[-1] in sampling.eos_ids,
            teacher_logprobs=logp, teacher_hidden=torch.cat(row.states),
        )  # fmt: skip
