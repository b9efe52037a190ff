"""Worlds with responses of 64 to 256 tokens, in which every expectation is known, trained by the library's own loss.

The next token depends on a state, and the state on the state before and the token. States lie in regions, and most
words stay in their region. In some regions the student can follow the teacher, in others it cannot, so that a word
decides about the KL of many tokens after it. The student is a linear map of too few features of the state. All
expectations over responses follow from the distribution of states at each position, without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.loss.config import Objective
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import ScoringSettings, token_scores
from minillm.models.head import Head, TeacherStates
from minillm.train.batch_credit import BatchCredit

EOS = 0
STATES, REGIONS, VOCAB, FEATURES, HIDDEN, PROMPTS = 48, 4, 12, 10, 6, 8


@dataclass
class Expected:
    """Expectations over the responses to each prompt, [prompts].

    Attributes:
        reverse_kl: E[Σ KL(q‖p)], in nats an answer.
        length: E[T], in tokens.
        unfinished: probability to reach the limit of tokens.
    """

    reverse_kl: Tensor
    length: Tensor
    unfinished: Tensor


class LongWorld:
    """A teacher, a student that is warmed up on the teacher's text, and prompts.

    Args:
        seed: of everything that is random in it.
        limit: longest response, in tokens.
        mean_length: about the mean length of the teacher's responses.

    Attributes:
        parameters: of the student.
    """

    def __init__(self, seed: int, limit: int = 160, mean_length: float = 40.0) -> None:
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.limit = limit
        region = torch.arange(STATES) % REGIONS
        self._next = self._transitions(region, g)
        self._features = torch.cat([torch.ones(STATES, 1), draw(STATES, FEATURES - 1)], 1)
        shared = self._features @ draw(FEATURES, VOCAB) / FEATURES**0.5
        difficulty = torch.tensor([0.3, 1.0, 1.7, 2.4])[region]
        self.teacher = 1.5 * shared + difficulty[:, None] * draw(STATES, VOCAB)
        others = torch.logsumexp(self.teacher[:, 1:], -1)
        self.teacher[:, EOS] = others - torch.log(torch.tensor(mean_length)) + 0.7 * draw(STATES)
        self.logp = torch.log_softmax(self.teacher, -1)
        self._starts = torch.randperm(STATES, generator=g)[:PROMPTS]
        self.body = (draw(FEATURES, HIDDEN) / FEATURES**0.5).requires_grad_()
        self.head = (0.3 * draw(VOCAB, HIDDEN)).requires_grad_()
        self.parameters = [self.body, self.head]
        self._warm_up()

    @staticmethod
    def _transitions(region: Tensor, g: torch.Generator) -> Tensor:
        """The next state of each state and token: in the same region for all but one word."""
        anywhere = torch.randint(STATES, (STATES, VOCAB), generator=g)
        inside = anywhere - anywhere % REGIONS + region[:, None]
        gates = torch.stack([torch.randperm(VOCAB - 1, generator=g)[:1] + 1 for _ in range(STATES)])
        leaves = torch.zeros(STATES, VOCAB, dtype=torch.bool).scatter(1, gates, torch.ones(STATES, 1, dtype=torch.bool))
        return torch.where(leaves, anywhere, inside.clamp(max=STATES - 1))

    def _warm_up(self, updates: int = 60) -> None:
        """Fit the student to the teacher's text by the forward KL, as a warm-up does, but not to the end."""
        optimiser = torch.optim.Adam(self.parameters, lr=0.03)
        weights = self._visits(self.logp).sum(0)
        for _ in range(updates):
            optimiser.zero_grad()
            (weights[:, None] * self.logp.exp() * -self.logq()).sum().div(weights.sum()).backward()
            optimiser.step()

    def logq(self) -> Tensor:
        """log q(y|s) [states, vocab]."""
        return torch.log_softmax(self._features @ self.body @ self.head.t(), -1)

    def _visits(self, logs: Tensor, fixed_end: bool = False) -> Tensor:
        """Expected number of visits of each state in a response to each prompt, [prompts, states]."""
        words = logs.exp()[:, 1:]
        if fixed_end:
            rest = words.sum(-1, keepdim=True)
            words = words / rest * rest.detach()
        move = torch.zeros(STATES, STATES, dtype=words.dtype).index_put(
            (torch.arange(STATES)[:, None].expand(-1, VOCAB - 1), self._next[:, 1:]), words, accumulate=True
        )
        now = torch.nn.functional.one_hot(self._starts, STATES).to(words.dtype)
        total = now
        for _ in range(self.limit - 1):
            now = now @ move
            total = total + now
        self._last = now
        return total

    def expected(self, logs: Tensor | None = None, fixed_end: bool = False) -> Expected:
        """Expectations over responses sampled from the student, or from other log-probabilities.

        Args:
            logs: log-probabilities [states, vocab] that sample.
            fixed_end: hold the probabilities of ending fixed for autograd, in the distribution of responses.
        """
        logq = self.logq() if logs is None else logs
        kl = (logq.exp() * (logq - self.logp)).sum(-1)
        visits = self._visits(logq, fixed_end)
        unfinished = (self._last * (1 - logq[:, EOS].exp())).sum(-1)
        return Expected((visits * kl).sum(-1), visits.sum(-1), unfinished)

    def measures(self) -> dict[str, float]:
        """What the student is like: KL and length, exactly."""
        with torch.no_grad():
            found, teacher, logq = self.expected(), self.expected(self.logp), self.logq()
            visits = self._visits(self.logp).sum(0)
            forward = (self.logp.exp() * (self.logp - logq)).sum(-1)
            return {
                "rate": float(found.reverse_kl.sum() / found.length.sum()),
                "rate_mean": float((found.reverse_kl / found.length).mean()),
                "answer": float(found.reverse_kl.mean()),
                "forward": float((visits * forward).sum() / visits.sum()),
                "length": float(found.length.sum() / teacher.length.sum()),
                "log_length": float((found.length / teacher.length).log().abs().mean()),
                "finished": float(1 - found.unfinished.mean()),
            }

    def gradient(self, value: Tensor) -> Tensor:
        """The gradient of a scalar by all parameters, as one vector."""
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, self.parameters, retain_graph=True)])

    def exact(self, kind: str) -> Tensor:
        """The exact gradient of an objective, times E[T] as the estimators have it.

        Args:
            kind: "sum" for E[Σ KL]; "rate" for J₂; "words" for J₂ with ending fixed; "single_step" for its first part;
                "length" for E[T] itself.
        """
        found = self.expected(fixed_end=kind == "words")
        total, length = found.reverse_kl.mean(), found.length.mean()
        if kind == "length":
            return self.gradient(length)
        if kind == "sum":
            return self.gradient(total)
        if kind == "single_step":
            logq = self.logq()
            visits = self._visits(logq.detach()).mean(0)
            return self.gradient((visits * (logq.exp() * (logq - self.logp)).sum(-1)).sum())
        return self.gradient(total / length) * length.detach()

    def sample(self, prompts: Sequence[int], rng: np.random.Generator) -> tuple[list[Rollout], Tensor]:
        """Sample a response to each prompt, and return the state of each of their tokens, one after another."""
        with torch.no_grad():
            logq = self.logq()
            kl, entropy = (logq.exp() * (logq - self.logp)).sum(-1), -(logq.exp() * logq).sum(-1)
        cumulative, following = logq.exp().cumsum(-1).numpy(), self._next.numpy()
        state = self._starts.numpy()[np.asarray(prompts)]
        alive, states, tokens = np.ones(len(prompts), dtype=bool), [], []
        for _ in range(self.limit):
            drawn = np.minimum((rng.random(len(prompts))[:, None] > cumulative[state]).sum(-1), VOCAB - 1)
            states.append(np.where(alive, state, -1))
            tokens.append(drawn)
            alive = alive & (drawn != EOS)
            state = following[state, drawn]
            if not alive.any():
                break
        table, ids = torch.tensor(np.array(states)).t(), torch.tensor(np.array(tokens)).t()
        rollouts, visited = [], []
        for prompt, row, drawn in zip(prompts, table, ids, strict=True):
            own = row[row >= 0]
            picked = drawn[: len(own)]
            logs = logq[own, picked]
            targets = TeacherTargets(self.logp[own, picked])
            done = bool(picked[-1] == EOS)
            rollout = Rollout([prompt], picked.tolist(), logs, logs, 0, done, targets, kl[own], entropy=entropy[own])
            rollouts.append(rollout)
            visited.append(own)
        return rollouts, torch.cat(visited)

    def estimate(self, objective: Objective, credit: BatchCredit, rollouts: list[Rollout], states: Tensor) -> Tensor:
        """The library's loss on a batch, which backpropagates to the parameters."""
        credit.start(rollouts)
        tokens, baseline = credit.tokens(rollouts, list(range(len(rollouts))))
        slots = len(rollouts) * self.limit
        loss_fn = OnPolicyLoss(objective, tokens, baseline=baseline, count=float(len(states)), slots=slots)
        targets = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
        teacher = TeacherStates(self.teacher[states], Head(torch.eye(VOCAB, dtype=torch.float64)))
        hidden = (self._features @ self.body)[states]
        settings = ScoringSettings(chunk=4096, end_ids=credit.end_ids)
        return token_scores(hidden, Head(self.head), targets, teacher, loss_fn=loss_fn, settings=settings)[0]

    def prompts(self, responses: int, samples: int, rng: np.random.Generator) -> list[int]:
        """The prompts of a batch, each several times in a row."""
        return [int(p) for p in rng.integers(PROMPTS, size=responses // samples) for _ in range(samples)]


def train(world: LongWorld, objective: Objective, updates: int, responses: int, seed: int, lr: float = 0.01) -> None:
    """Train the student on its own samples, a new batch for every update."""
    rng, credit = np.random.default_rng(seed), BatchCredit(objective, (EOS,))
    optimiser = torch.optim.AdamW(world.parameters, lr=lr, weight_decay=0.0)
    for _ in range(updates):
        rollouts, states = world.sample(world.prompts(responses, 4, rng), rng)
        optimiser.zero_grad()
        world.estimate(objective, credit, rollouts, states).backward()
        optimiser.step()


def batch_gradients(world: LongWorld, objective: Objective, batches: int, responses: int, seed: int) -> Tensor:
    """Estimated gradients of some batches, [batches, parameters], for the student as it is, a token."""
    rng, credit, found = np.random.default_rng(seed), BatchCredit(objective, (EOS,)), []
    for _ in range(batches):
        rollouts, states = world.sample(world.prompts(responses, 4, rng), rng)
        found.append(world.gradient(world.estimate(objective, credit, rollouts, states)).detach())
    return torch.stack(found)
