"""Preset `reference`, compared with the formulas of the LMOps code on padded [B, S] blocks of one micro-batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.loss import credit
from minillm.loss.config import Objective
from minillm.loss.credit import SampledTokens
from minillm.loss.on_policy import OnPolicyLoss
from minillm.loss.token_scores import ScoringSettings, token_scores
from minillm.models.head import Head, TeacherStates

LENGTHS, LIMIT, V, H = [3, 1, 6], 8, 11, 5
TEXT = 4


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def plain(
    logits: Tensor, ids: Tensor, logq_old: Tensor, logp: Tensor, teacher: Tensor, behaviour: Tensor, mask: Tensor
) -> Tensor:
    """Sections 1.4 to 1.8 of the notes on LMOps. All tensors are [B, S] or [B, S, V], and zero in the padding."""
    reward = ((logp - logq_old) / 0.5).clamp(-100, 100) * mask
    advantage = torch.zeros_like(reward)
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            total = sum(0.95 ** (k - t) * float(reward[b, k]) for k in range(t, n))
            advantage[b, t] = total / (n - t)  # the paper counts from 1: T − t + 1
    mean, var = advantage.mean(), advantage.var(unbiased=False)  # including the padding
    advantage = (advantage - mean) * torch.rsqrt(var + 1e-8) * mask
    weight = (logq_old - behaviour).exp()
    logq = torch.log_softmax(logits, -1)
    drawn = logq.gather(-1, ids[..., None])[..., 0]
    ratio = (drawn - logq_old).exp() * weight
    long = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    single = (logq.exp() * (logq - torch.log_softmax(teacher, -1))).sum(-1)
    return mean_over(long, mask) + mean_over(single, mask)


def plain_text(logits: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """Section 1.9: half cross-entropy and half soft cross-entropy. The teacher's entropy is a constant."""
    logq, p = torch.log_softmax(logits, -1), torch.softmax(teacher, -1)
    return (0.5 * -logq.gather(-1, ids[:, None])[:, 0] + 0.5 * -(p * logq).sum(-1)).mean()


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_micro_batch_gradient_is_the_authors(chunk: int) -> None:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    n = sum(LENGTHS)
    hidden, weight = draw(n + TEXT, H).requires_grad_(), draw(V, H).requires_grad_()
    teacher_hidden, teacher_weight = draw(n + TEXT, H), draw(V, H)
    ids = torch.randint(V, (n + TEXT,), generator=g)
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.t()
        at = ids[:, None]
        logp = torch.log_softmax(teacher, -1).gather(1, at)[:, 0]
        # The student has moved since it sampled, so that ratios differ from 1 and some are clipped.
        old = torch.log_softmax((hidden + 0.3 * draw(n + TEXT, H)) @ weight.t(), -1).gather(1, at)[:, 0]
        behaviour = (0.8 * old.exp() + 0.2 * logp.exp()).log()

    sampled = SampledTokens(old[:n], behaviour[:n], logp[:n], torch.tensor(LENGTHS))
    loss_of = OnPolicyLoss(Objective.reference(), sampled, count=n, text_count=TEXT, slots=len(LENGTHS) * LIMIT)
    loss, _ = token_scores(
        hidden,
        Head(weight),
        ids,
        TeacherStates(teacher_hidden, Head(teacher_weight)),
        loss_fn=loss_of,
        settings=ScoringSettings(chunk=chunk),
    )
    got = torch.autograd.grad(loss, [hidden, weight])
    assert 0 < float(loss_of.tally.sums["clipped"]) < n

    mask = torch.zeros(len(LENGTHS), LIMIT, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        mask[b, :length] = 1

    def block(values: Tensor) -> Tensor:
        out = torch.zeros(*mask.shape, *values.shape[1:], dtype=values.dtype)
        return out.index_put(tuple(mask.nonzero().t()), values[:n])

    logits = hidden @ weight.t()
    want_loss = plain(block(logits), block(ids), block(old), block(logp), block(teacher), block(behaviour), mask)
    want_loss = want_loss + plain_text(logits[n:], teacher[n:], ids[n:])
    want = torch.autograd.grad(want_loss, [hidden, weight])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_hand_worked_advantages() -> None:
    """Two responses in blocks of four tokens, with rewards 1, 2 and 4 before scaling."""
    data = SampledTokens(torch.zeros(3), torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 1]))
    objective = Objective.reference()
    rewards = credit.precomputed_rewards(data, objective)
    assert rewards is not None
    assert rewards.tolist() == [2.0, 4.0, 8.0]
    values = credit.returns(rewards, data, objective)
    assert values.tolist() == pytest.approx([(2 + 0.95 * 4) / 2, 4.0, 8.0])  # 2.9, 4, 8
    # Over eight slots the mean is 14.9/8, and the mean square (2.9² + 4² + 8²)/8.
    mean, square = 14.9 / 8, (2.9**2 + 16 + 64) / 8
    deviation = (square - mean**2 + 1e-8) ** 0.5
    assert credit.whiten(values, slots=8).tolist() == pytest.approx(
        [(v - mean) / deviation for v in (2.9, 4.0, 8.0)], rel=1e-5
    )


def test_whitening_is_over_all_processes() -> None:
    """The micro-batches of two processes are whitened as one."""
    parts = [torch.tensor([1.0, 5.0]), torch.tensor([-2.0, 0.5, 3.0])]
    want = credit.whiten(torch.cat(parts), slots=8 + 12)
    joined = []
    for mine, slots, other, other_slots in ((parts[0], 8, parts[1], 12), (parts[1], 12, parts[0], 8)):
        sums = []

        def total(
            value: Tensor, other: Tensor = other, other_slots: int = other_slots, sums: list[float] = sums
        ) -> float:
            """Return the result of an all-reduce, in which the other process makes the same call."""
            place = len(sums)
            sums.append(float(value))
            count = 20.0
            mean = float(torch.cat(parts).double().sum()) / count
            theirs = (
                float(other_slots),
                float(other.double().sum()),
                float(((other.double() - mean) ** 2).sum()) + (other_slots - len(other)) * mean**2,
            )
            return sums[place] + theirs[place]

        joined.append(credit.whiten(mine, slots=slots, total=total))
    torch.testing.assert_close(torch.cat(joined), want, rtol=1e-6, atol=1e-7)
