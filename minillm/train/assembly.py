"""Rollouts and text as the tensors of one micro-batch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minillm.data.batches import Padded, pad, share_rows
from minillm.data.logprobs import mixture_logprobs
from minillm.data.rollouts import Rollout, TeacherRows, concatenate_rows
from minillm.data.text import TextBlocks
from minillm.loss.credit import SampledTokens
from minillm.loss.teacher_spans import Teacher
from minillm.loss.token_scores import TokenScores
from minillm.teacher.routed import ExactTeacher, join_states
from minillm.teacher.served_logprobs import ServedLogprobs

if TYPE_CHECKING:
    from jaxtyping import Float


def pad_micro_batch(
    rollouts: Sequence[Rollout], blocks: Sequence[int], text: TextBlocks | None, block_size: int, device: torch.device
) -> tuple[Padded, list[array[int]]]:
    """Pad rollouts, followed by pieces of text, to one batch. The first token of each piece is its prompt.

    Args:
        rollouts: the rollouts.
        blocks: blocks of the packed text.
        text: the packed text; None if there is none.
        block_size: tokens of a block.
        device: where the tensors are created.

    Returns:
        The batch, and the pieces of text in it.
    """
    rows, pieces = list(range(len(rollouts))), []
    if text and text.share_rows:  # beside blocks of text, a row for each rollout would be mostly padding
        lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
        rows = share_rows(lengths, max(*lengths, block_size))
    for row, block in enumerate((text.pieces(block) for block in blocks) if text else (), start=max(rows) + 1):
        rows += [row] * len(block)
        pieces += block
    prompts = [r.prompt_ids for r in rollouts] + [ids[:1] for ids in pieces]
    responses = [r.response_ids for r in rollouts] + [ids[1:] for ids in pieces]
    return pad(prompts, responses, device, rows=rows), pieces


def teacher_inputs(
    teacher: ExactTeacher | ServedLogprobs,
    rollouts: Sequence[Rollout],
    text: Sequence[array[int]],
    text_states: Sequence[Tensor] | None,
    device: torch.device,
) -> Teacher:
    """The teacher's output for the tokens of scored rollouts, followed by that for pieces of text.

    Args:
        teacher: the teacher, or several, that scored the rollouts.
        rollouts: the rollouts.
        text: the pieces of text.
        text_states: the teacher's final hidden states of each piece; None if text is not distilled.
        device: where the tensors are moved to.

    Returns:
        States for `token_scores`, or the rows of a served teacher. Text that is not distilled gets placeholders, which
        belong to the last rollout's teacher, so that they do not divide a chunk.
    """
    targets = [rollout.teacher for rollout in rollouts if rollout.teacher is not None]
    if isinstance(teacher, ServedLogprobs):
        rows = [of_one.rows for of_one in targets if of_one.rows is not None]
        for ids in text:
            tokens = torch.tensor(list(ids[1:]))[:, None]
            rows.append(TeacherRows(tokens, torch.full(tokens.shape, -1.0)))
        joined = concatenate_rows(rows)
        return TeacherRows(joined.ids.to(device), joined.logprobs.to(device))
    hidden = [of_one.hidden.to(device) for of_one in targets if of_one.hidden is not None]
    if text_states is not None:
        hidden += text_states
    else:
        hidden += [hidden[-1].new_zeros(len(ids) - 1, hidden[-1].shape[1]) for ids in text]
    names = [rollout.teacher_name for rollout in rollouts]
    return join_states(teacher, hidden, names + names[-1:] * len(text))


def sampled_tokens(rollouts: Sequence[Rollout]) -> SampledTokens:
    """Concatenate the log-probabilities of scored rollouts, and log p and KL(q‖p) if they are known for all of them."""
    known = [r.reverse_kl for r in rollouts if r.reverse_kl is not None]
    logp = [r.teacher.token_logprobs for r in rollouts if r.teacher and r.teacher.token_logprobs is not None]
    return SampledTokens(
        torch.cat([r.student_logprobs for r in rollouts]),
        torch.cat([r.behaviour_logprobs for r in rollouts]),
        torch.cat(logp) if len(logp) == len(rollouts) else None,
        torch.tensor([len(r.response_ids) for r in rollouts]),
        torch.cat(known) if len(known) == len(rollouts) else None,
    )


def keep_first_scores(
    rollouts: Sequence[Rollout], reverse_kl: Float[Tensor, " tokens"], advantages: Float[Tensor, " tokens"]
) -> None:
    """Write KL(q‖p) and advantages into those rollouts that have none yet.

    Later inner epochs keep the rewards of the first, although KL(q‖p) on the same prefixes has changed by then.

    Args:
        rollouts: the rollouts.
        reverse_kl: KL(q‖p) of their tokens, one rollout after another.
        advantages: their advantages, in the same order.
    """
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    parts = zip(rollouts, reverse_kl.cpu().split(lengths), advantages.cpu().split(lengths), strict=True)
    for rollout, divergence, advantage in parts:
        if rollout.reverse_kl is None:
            rollout.reverse_kl = divergence.clone()
        if rollout.advantage is None:
            rollout.advantage = advantage.clone()


def take_scores(
    rollouts: Sequence[Rollout], scores: Sequence[TokenScores], teacher_mix: float, *, kl: bool, logq: bool
) -> None:
    """Note a batch's scores by the student that begins to train on it, before it does.

    Args:
        rollouts: the rollouts, in which the scores are noted.
        scores: the scores of each.
        teacher_mix: α of the mixture that they were sampled from.
        kl: whether KL(q‖p) and the entropy are taken.
        logq: whether log q replaces that of the engine; p̃ is then computed from it.
    """
    for rollout, found in zip(rollouts, scores, strict=True):
        if kl:
            rollout.reverse_kl, rollout.entropy = found.reverse_kl, found.entropy
        if not logq:
            continue
        rollout.student_logprobs = rollout.behaviour_logprobs = found.logq
        logp = None if rollout.teacher is None else rollout.teacher.token_logprobs
        if logp is not None:
            rollout.behaviour_logprobs = mixture_logprobs(found.logq, logp, teacher_mix)
