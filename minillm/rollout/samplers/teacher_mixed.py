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
from typing import Literal

import torch
from torch import Tensor

from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.rollout.engines.base import Engine
from minillm.teacher.local import LocalTeacher
from minillm.teacher.stream import TeacherStream

# Draws from p scored together for one residual: few at first, then as many as an engine scores at once. After
# _TRIES times the residual is so thin (mass below 1e-3) that the last draw is taken: it was needed with probability
# α times that mass.
_CANDIDATES, _MOST_CANDIDATES, _TRIES = 16, 96, 64
_TOP_LOGPROBS = 20  # tokens of each draft place whose q comes along; vLLM servers give no more unless told to

# What a round costs beside its drafts, in steps of drafting: a call of the engine, which reads the last tokens again where
# they filled no block of its cache, the teacher's forward, some redrawing. Measured on a CPU, and on an H200 (0.13 s to a step's 0.01).
_ROUND_COST = {"cpu": 5.0, "cuda": 13.0}
FIRST_DRAFT, _LONGEST_DRAFT = 10, 64


def draft_length(acceptance: float, kind: str = "cpu") -> int:
    """Tokens to draft, K, that give most tokens for their cost when each is accepted with probability a.

    Token j of a draft comes to something if the j−1 before it were accepted, so a round yields (1−a^K)/(1−a) tokens, the
    redrawn one included; it costs K steps and what every round costs on this `kind` of device.
    """
    cost = _ROUND_COST.get(kind, _ROUND_COST["cuda"])
    return max(range(1, _LONGEST_DRAFT + 1), key=lambda k: sum(acceptance**j for j in range(k)) / (k + cost))


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
    length: int | None = None  # tokens up to the one that ends it, once there is one
    tail: Tensor | None = None  # [1, H], the state that predicts the next token, where it is known already

    def append(self, token: int, logq: float, logp: float) -> None:
        self.ids.append(token)
        self.logq.append(logq)
        self.logp.append(logp)


@dataclass
class _Rejected:
    """A place whose draft was refused and whose token comes from the residual."""

    row: _Row
    state: Tensor  # [1, H], the teacher's, that predicts the token
    known: dict[int, float]  # log q of some tokens; of all others it is at most `ceiling`
    top_logprobs: int  # how many of them are the likeliest of all
    candidates: list[tuple[int, float, float]] = field(
        default_factory=list
    )  # drawn from p: token, log p, a uniform number
    ceiling: float = 0.0
    draws: int = 0

    def __post_init__(self) -> None:
        # Of the likeliest tokens, that is: the refused one, which is among the known whatever its rank, bounds nothing.
        top_logprobs = sorted(self.known.values(), reverse=True)[: self.top_logprobs]
        self.ceiling = min(top_logprobs, default=0.0)


def _draw(rejected: Sequence[_Rejected], logp: Tensor, below: Tensor, count: int) -> None:
    """`count` more candidates for each, drawn from the teacher's rows [R, V] by their running sums, each with its own generator."""
    numbers = torch.stack(
        [torch.rand(2, count, generator=r.row.generator, dtype=torch.float64) for r in rejected]
    )  # [R, 2, count]
    places = numbers[:, 0].to(below.device) * below[:, -1:]
    tokens = torch.searchsorted(below, places, right=True).clamp(max=below.shape[1] - 1)
    found = zip(rejected, tokens.tolist(), logp.gather(1, tokens).tolist(), numbers[:, 1].tolist(), strict=True)
    for r, ids, values, us in found:
        r.candidates += zip(ids, values, us, strict=True)
        r.draws += 1


class TeacherMixedSampler:
    """Samples the mixture over any engine; rollouts come back with the teacher's states and log-probabilities.

    `draft_tokens` may be set between calls: it changes which tokens are drawn, not their distribution. `drafted`,
    `accepted` and `rounds` count since construction.
    """

    def __init__(self, engine: Engine, teacher: LocalTeacher, alpha: float, draft_tokens: int) -> None:
        self._engine, self._teacher, self._alpha, self.draft_tokens = engine, teacher, alpha, draft_tokens
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
        self._fill_in(rows, sampling)
        return [self._rollout(row) for row in rows]

    def _round(self, rows: list[_Row], stream: TeacherStream, sampling: Sampling, number: int) -> None:
        room = [sampling.max_new_tokens - len(row.ids) for row in rows]
        drafts = self._engine.generate(
            [row.prompt + row.ids for row in rows],
            replace(sampling, max_new_tokens=min(self.draft_tokens, max(room)), top_logprobs=_TOP_LOGPROBS),
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
        rejected: list[_Rejected] = []
        for i, (row, ids, draft, row_logp) in enumerate(
            zip(rows, drawn, drafts, logp.split([len(ids) for ids in drawn]), strict=True)
        ):
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
                rejected.append(
                    _Rejected(
                        row,
                        states[i][kept : kept + 1],
                        dict(draft.top_logprobs[kept]) if draft.top_logprobs else {},
                        _TOP_LOGPROBS,
                    )
                )
            else:
                row.states.append(states[i][:kept])
                row.unread, row.tail = [], states[i][kept : kept + 1]
        self._redraw(rejected, sampling)

    def _redraw(self, rejected: list[_Rejected], sampling: Sampling) -> None:
        """Append a token from (p−q)+ to each row.

        z ~ p stays with probability 1 − q(z)/p(z). Most z are among the draft's likeliest tokens, whose q is at hand; of
        the others q is at most the least of those, which mostly decides too. The engine is asked where it does not.
        """
        if not rejected:
            return
        logp = self._teacher.distribution(torch.cat([r.state for r in rejected]), sampling)
        below = logp.double().exp().cumsum(-1)  # where the rows are: of them, drawn tokens alone come back from a GPU
        waiting = list(range(len(rejected)))
        while waiting:
            # Each row goes on until one of its candidates stays, or one's log q has to be asked for.
            asked_of = []
            while waiting:
                states = {i: self._settle(rejected[i]) for i in waiting}
                asked_of += [i for i, state in states.items() if state == "unknown"]
                waiting = [i for i, state in states.items() if state == "empty"]
                few = [i for i in waiting if rejected[i].draws < 2]
                many = [i for i in waiting if rejected[i].draws >= 2]
                for some, count in ((few, _CANDIDATES), (many, _MOST_CANDIDATES)):
                    if some:
                        _draw([rejected[i] for i in some], logp[some], below[some], count)
            some = [rejected[i] for i in asked_of]
            asked = [sorted({token for token, _, _ in r.candidates} - r.known.keys()) for r in some]
            if some:
                scored = self._engine.logprobs_of([r.row.prompt + r.row.ids for r in some], asked, sampling)
                for r, ids, values in zip(some, asked, scored, strict=True):
                    r.known |= zip(ids, values.tolist(), strict=True)
            waiting = asked_of

    @staticmethod
    def _settle(r: _Rejected) -> Literal["done", "empty", "unknown"]:
        """Try candidates in order until one stays, none is left, or one's log q has to be asked for."""
        while r.candidates:
            token, logp, u = r.candidates[0]
            logq = r.known.get(token)
            # The probability to stay; where log q is not known, the least it can be.
            stays = 1 - math.exp(min(0.0, (r.ceiling if logq is None else logq) - logp))
            if u < stays or r.draws > _TRIES:
                r.row.append(token, math.nan if logq is None else logq, logp)
                r.row.unread, r.row.tail = [token], None
                return "done"
            if logq is None:
                return "unknown"
            r.candidates.pop(0)
        return "empty"

    def _fill_in(self, rows: Sequence[_Row], sampling: Sampling) -> None:
        """Log q of the tokens that could be kept without it, all at once."""
        missing = [(row, place) for row in rows for place, value in enumerate(row.logq) if math.isnan(value)]
        if missing:
            prefixes = [row.prompt + row.ids[:place] for row, place in missing]
            scored = self._engine.logprobs_of(prefixes, [[row.ids[place]] for row, place in missing], sampling)
            for (row, place), value in zip(missing, scored, strict=True):
                row.logq[place] = float(value[0])

    def _mixture(self, logq: Tensor, logp: Tensor) -> Tensor:
        return torch.logaddexp(logq + math.log1p(-self._alpha), logp + math.log(self._alpha))

    @staticmethod
    def _ended(row: _Row, sampling: Sampling) -> bool:
        # Drafts end with an end token, so that only a stop string, which may span two of them, can be amid the last tokens.
        row.length = sampling.length(row.ids) if sampling.stop is not None or row.ids[-1] in sampling.eos_ids else None
        return row.length is not None or len(row.ids) >= sampling.max_new_tokens

    def _rollout(self, row: _Row) -> Rollout:
        n = row.length or len(row.ids)
        logq, logp = torch.tensor(row.logq[:n]), torch.tensor(row.logp[:n])
        return Rollout(
            row.prompt, row.ids[:n], logq, self._mixture(logq, logp), self._engine.version, row.length is not None,
            teacher_logprobs=logp, teacher_hidden=torch.cat(row.states)[:n],
        )  # fmt: skip
