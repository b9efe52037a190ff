"""Exact sampling from p̃ = (1−α)·q + α·p at about the student's speed.

The engine drafts K tokens from q, and the teacher reads them in one forward. A drafted y is accepted with probability
min(1, p̃(y)/q(y)). At the first rejected token, a replacement is sampled from the normalised residual (p−q)+, which p̃
has and the accepted drafts lack. The residual is sampled by rejection: z ~ p is accepted with probability max(0, 1 −
q(z)/p(z)), so the engine scores a few tokens by id and never returns a whole row. The acceptance rate is 1 − α·TV(p,
q).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minillm.data.logprobs import mixture_logprobs
from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.rollout.engines.base import Engine
from minillm.rollout.samplers.base import Metrics
from minillm.teacher.local import LocalTeacher
from minillm.teacher.stream import TeacherStream

if TYPE_CHECKING:
    from jaxtyping import Float

# Candidates sampled from p that are scored together for one residual: few at first, then as many as an engine scores at
# once. After _TRIES rounds the residual is so thin (mass below 1e-3) that the last candidate is taken; this is needed
# with a probability of α times that mass.
_CANDIDATES, _MOST_CANDIDATES, _TRIES = 16, 96, 64
TOP_LOGPROBS = 20
"""Most likely tokens of each draft position whose log q is requested; vLLM servers return no more unless configured
to."""

# What a round costs besides its drafts, in steps of drafting: a call of the engine, which reads the last tokens again
# where they filled no block of its cache, the teacher's forward, and some resampling. Measured on a CPU, and on an H200
# (0.13 s per round, 0.01 s per step).
ROUND_COST = {"cpu": 5.0, "cuda": 13.0}
FIRST_DRAFT = 10
"""Draft length of the first batch with `draft_tokens: auto`."""
_LONGEST_DRAFT = 64


def draft_length(acceptance: float, device_type: str = "cpu") -> int:
    """The draft length K that gives the most tokens for its cost.

    Token j of a draft counts only if the j−1 tokens before it were accepted, so a round yields (1−a^K)/(1−a) tokens,
    the resampled one included. It costs K steps and the fixed cost of a round on this kind of device.

    Args:
        acceptance: the probability a that a drafted token is accepted.
        device_type: `cpu` or `cuda`; others count as `cuda`.
    """
    cost = ROUND_COST.get(device_type, ROUND_COST["cuda"])
    return max(range(1, _LONGEST_DRAFT + 1), key=lambda k: sum(acceptance**j for j in range(k)) / (k + cost))


class TeacherMixedSampler:
    """Samples the mixture with any engine. Its rollouts carry the teacher's targets already.

    `drafted`, `accepted` and `rounds` count since construction.

    Args:
        teacher: the teacher, a model in this process.
        alpha: the teacher's share α of the mixture, between 0 and 1.
        draft_tokens: tokens per draft; with `auto`, what suited the acceptance rate of the previous batch best. The
            draft length changes which tokens are sampled, but not their distribution.
        device_type: the kind of device, for `auto`.
    """

    def __init__(
        self, teacher: LocalTeacher, alpha: float, draft_tokens: int | Literal["auto"], device_type: str = "cpu"
    ) -> None:
        self._teacher, self._alpha, self._device_type = teacher, alpha, device_type
        self._adapts = draft_tokens == "auto"
        self._draft_tokens = FIRST_DRAFT if draft_tokens == "auto" else draft_tokens
        self.drafted = self.accepted = self.rounds = 0
        self._latest = (0, 0)  # accepted and drafted tokens of the latest call

    def generate(
        self, engine: Engine, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """Sample one response per prompt from the mixture; see `Sampler.generate`.

        Raises:
            InputError: the teacher has layers with a sliding window.
        """
        run = _Generation(engine, self._teacher, self._alpha, sampling, self._draft_tokens)
        rollouts = run.generate(prompts, seeds)
        self.drafted, self.accepted = self.drafted + run.drafted, self.accepted + run.accepted
        self.rounds += run.rounds
        self._latest = (run.accepted, run.drafted)
        return rollouts

    def behaviour_logprobs(
        self, student: Float[Tensor, " tokens"], teacher: Float[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        """Log-probabilities under the mixture; see `Sampler.behaviour_logprobs`."""
        return mixture_logprobs(student, teacher, self._alpha)

    def metrics(self) -> Metrics:
        """The acceptance rate and the draft length of the latest call."""
        accepted, drafted = self._latest
        return {"acceptance": (accepted, drafted), "draft_length": (self._draft_tokens, 1)} if drafted else {}

    def adapt(self, total: Callable[[float], float]) -> None:
        """With `draft_tokens: auto`, choose the next draft length by the acceptance rate over all processes."""
        if self._adapts:
            accepted, drafted = (total(count) for count in self._latest)
            self._draft_tokens = draft_length(accepted / max(drafted, 1.0), self._device_type)

    def state_dict(self) -> dict[str, Any]:
        """The draft length, which decides the very tokens that are sampled."""
        return {"draft_tokens": self._draft_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the draft length."""
        self._draft_tokens = state.get("draft_tokens", self._draft_tokens)


@dataclass
class _Row:
    """One response while it is sampled."""

    prompt: list[int]
    seed: int
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    logq: list[float] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)  # [n, H], one entry per round
    unread: list[int] = field(default_factory=list)  # tokens that the teacher has not read yet
    length: int | None = None  # tokens up to the one that ends the response, once there is one
    tail: Tensor | None = None  # [1, H], the state that predicts the next token, where it is known already

    def append(self, token: int, logq: float, logp: float) -> None:
        self.ids.append(token)
        self.logq.append(logq)
        self.logp.append(logp)


@dataclass
class _Rejected:
    """A position whose drafted token was rejected, and whose token is sampled from the residual."""

    row: _Row
    state: Tensor  # [1, H], the teacher's state that predicts the token
    known: dict[int, float]  # log q of some tokens; that of every other token is at most `ceiling`
    num_top: int  # how many of the known tokens are the most likely ones
    # Sampled from p: token, log p, and a uniform random number.
    candidates: list[tuple[int, float, float]] = field(default_factory=list)
    ceiling: float = 0.0
    draws: int = 0

    def __post_init__(self) -> None:
        # Only the most likely tokens bound the others: the rejected token is known too, whatever its rank.
        self.ceiling = min(sorted(self.known.values(), reverse=True)[: self.num_top], default=0.0)


def _add_candidates(
    rejected: Sequence[_Rejected],
    logp: Float[Tensor, "rejected vocab"],
    cumulative: Float[Tensor, "rejected vocab"],
    count: int,
) -> None:
    """Sample `count` more candidates per position from the teacher's rows, each with the row's own generator."""
    numbers = torch.stack(
        [torch.rand(2, count, generator=r.row.generator, dtype=torch.float64) for r in rejected]
    )  # [R, 2, count]
    thresholds = numbers[:, 0].to(cumulative.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=cumulative.shape[1] - 1)
    found = zip(rejected, tokens.tolist(), logp.gather(1, tokens).tolist(), numbers[:, 1].tolist(), strict=True)
    for r, ids, values, us in found:
        r.candidates += zip(ids, values, us, strict=True)
        r.draws += 1


class _Generation:
    """One call of `TeacherMixedSampler.generate`."""

    def __init__(
        self, engine: Engine, teacher: LocalTeacher, alpha: float, sampling: Sampling, draft_tokens: int
    ) -> None:
        self._engine, self._teacher, self._alpha = engine, teacher, alpha
        self._sampling, self._draft_tokens = sampling, draft_tokens
        self.drafted = self.accepted = self.rounds = 0

    def generate(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """Sample in rounds until every response has ended."""
        rows = [
            _Row(prompt, seed, torch.Generator().manual_seed(seed_of(seed, "verify")), unread=list(prompt))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        stream = TeacherStream(self._teacher, [len(prompt) for prompt in prompts])
        unfinished = rows
        while unfinished:
            self._round(unfinished, stream)
            self.rounds += 1
            keep = [i for i, row in enumerate(unfinished) if not self._has_ended(row)]
            unfinished = [unfinished[i] for i in keep]
            if unfinished:
                stream.keep(keep)
        self._complete_logq(rows)
        return [self._rollout(row) for row in rows]

    def _round(self, rows: list[_Row], stream: TeacherStream) -> None:
        """Draft, have the teacher read the drafts, accept what can be accepted, and resample at the first rejection."""
        room = [self._sampling.max_new_tokens - len(row.ids) for row in rows]
        drafts = self._engine.generate(
            [row.prompt + row.ids for row in rows],
            replace(self._sampling, max_new_tokens=min(self._draft_tokens, max(room)), top_logprobs=TOP_LOGPROBS),
            [seed_of(row.seed, "draft", self.rounds) for row in rows],
        )
        drafted = [draft.response_ids[:n] for draft, n in zip(drafts, room, strict=True)]
        read = stream.extend([row.unread + ids for row, ids in zip(rows, drafted, strict=True)])
        # states[j] predicts draft token j; the last one predicts the token after a draft that is accepted whole.
        states = [
            torch.cat([row.tail, hidden]) if row.tail is not None else hidden[len(row.unread) - 1 :]
            for row, hidden in zip(rows, read, strict=True)
        ]
        predicting = [s[: len(ids)] for s, ids in zip(states, drafted, strict=True)]
        logp = self._teacher.token_logprobs(
            torch.cat(predicting), [token for ids in drafted for token in ids], self._sampling
        )
        rejected: list[_Rejected] = []
        for i, (row, draft, row_logp) in enumerate(
            zip(rows, drafts, logp.split([len(ids) for ids in drafted]), strict=True)
        ):
            kept = self._accept(row, drafted[i], draft, row_logp)
            if kept < len(drafted[i]):
                stream.retract(i, len(drafted[i]) - kept)
                row.states.append(states[i][: kept + 1])
                known = dict(draft.top_logprobs[kept]) if draft.top_logprobs else {}
                rejected.append(_Rejected(row, states[i][kept : kept + 1], known, TOP_LOGPROBS))
            else:
                row.states.append(states[i][:kept])
                row.unread, row.tail = [], states[i][kept : kept + 1]
        self._resample(rejected)

    def _accept(self, row: _Row, ids: list[int], draft: Rollout, logp: Float[Tensor, " tokens"]) -> int:
        """Append the accepted tokens of a draft to its row, and return their number."""
        logq = draft.student_logprobs[: len(ids)]
        keep = (mixture_logprobs(logq, logp, self._alpha) - logq).exp()
        refused = (torch.rand(len(ids), generator=row.generator) >= keep).nonzero()
        kept = int(refused[0, 0]) if len(refused) else len(ids)
        for token, q, p in zip(ids[:kept], logq.tolist(), logp.tolist(), strict=False):
            row.append(token, q, p)
        self.drafted += min(kept + 1, len(ids))
        self.accepted += kept
        return kept

    def _resample(self, rejected: list[_Rejected]) -> None:
        """Append a token from (p−q)+ to each row whose draft was rejected.

        A candidate z ~ p is accepted with probability 1 − q(z)/p(z). Most candidates are among the draft's most likely
        tokens, whose q is known. That of the others is at most the lowest of those, which usually decides as well. The
        engine is asked only where it does not.
        """
        if not rejected:
            return
        logp = self._teacher.distribution(torch.cat([r.state for r in rejected]), self._sampling)
        # Computed on the device of the rows, so that a GPU returns only the sampled tokens.
        cumulative = logp.double().exp().cumsum(-1)
        waiting = list(range(len(rejected)))
        while waiting:
            # Each row continues until a candidate is accepted, or until the log q of one has to be requested.
            undecided = []
            while waiting:
                outcomes = {i: self._try_candidates(rejected[i]) for i in waiting}
                undecided += [i for i, outcome in outcomes.items() if outcome == "unknown"]
                waiting = [i for i, outcome in outcomes.items() if outcome == "empty"]
                few = [i for i in waiting if rejected[i].draws < 2]
                many = [i for i in waiting if rejected[i].draws >= 2]
                for some, count in ((few, _CANDIDATES), (many, _MOST_CANDIDATES)):
                    if some:
                        _add_candidates([rejected[i] for i in some], logp[some], cumulative[some], count)
            self._request_logq([rejected[i] for i in undecided])
            waiting = undecided

    def _request_logq(self, rejected: Sequence[_Rejected]) -> None:
        """Ask the engine for log q of the candidates of each position whose log q is not known."""
        if not rejected:
            return
        unknown = [sorted({token for token, _, _ in r.candidates} - r.known.keys()) for r in rejected]
        scored = self._engine.logprobs_of([r.row.prompt + r.row.ids for r in rejected], unknown, self._sampling)
        for r, ids, values in zip(rejected, unknown, scored, strict=True):
            r.known |= zip(ids, values.tolist(), strict=True)

    @staticmethod
    def _try_candidates(r: _Rejected) -> Literal["done", "empty", "unknown"]:
        """Try candidates in order until one is accepted, none is left, or the log q of one has to be requested."""
        while r.candidates:
            token, logp, u = r.candidates[0]
            logq = r.known.get(token)
            # The probability of acceptance; where log q is not known, a lower bound of it.
            stays = 1 - math.exp(min(0.0, (r.ceiling if logq is None else logq) - logp))
            if u < stays or r.draws > _TRIES:
                r.row.append(token, math.nan if logq is None else logq, logp)
                r.row.unread, r.row.tail = [token], None
                return "done"
            if logq is None:
                return "unknown"
            r.candidates.pop(0)
        return "empty"

    def _complete_logq(self, rows: Sequence[_Row]) -> None:
        """Request log q of the tokens that were accepted without it, all in one call."""
        missing = [(row, position) for row in rows for position, value in enumerate(row.logq) if math.isnan(value)]
        if missing:
            prefixes = [row.prompt + row.ids[:position] for row, position in missing]
            ids = [[row.ids[position]] for row, position in missing]
            scored = self._engine.logprobs_of(prefixes, ids, self._sampling)
            for (row, position), value in zip(missing, scored, strict=True):
                row.logq[position] = float(value[0])

    def _has_ended(self, row: _Row) -> bool:
        """Whether a response has ended; sets its length if an end token or a stop string ended it."""
        sampling = self._sampling
        # A draft stops at an end token, so only a stop string can end inside the new tokens; it may span two drafts.
        row.length = sampling.length(row.ids) if sampling.stop is not None or row.ids[-1] in sampling.eos_ids else None
        return row.length is not None or len(row.ids) >= sampling.max_new_tokens

    def _rollout(self, row: _Row) -> Rollout:
        n = row.length or len(row.ids)
        logq, logp = torch.tensor(row.logq[:n]), torch.tensor(row.logp[:n])
        mixed = mixture_logprobs(logq, logp, self._alpha)
        return Rollout(
            row.prompt,
            row.ids[:n],
            logq,
            mixed,
            self._engine.version,
            row.length is not None,
            teacher=TeacherTargets(logp, hidden=torch.cat(row.states)[:n]),
        )
