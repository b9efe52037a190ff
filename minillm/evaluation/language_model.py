"""Scores a language model on blocks of held-out text: its loss, its calibration, and its distance from a teacher.

Every distribution is taken at temperature 1, whatever a training used, so that models of several trainings compare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.data.batches import pad
from minillm.data.text import Block, TextBlocks
from minillm.errors import InputError
from minillm.evaluation.language_model_metrics import BINS
from minillm.evaluation.store import Row
from minillm.loss.in_forward import Scoring, score
from minillm.loss.token_scores import ScoringSettings, TokenScores
from minillm.teacher.routed import ExactTeacher, hidden_states, join_states

_TIE = 1e-5  # nats by which the most likely token's probability may differ from itself, computed in two ways


def heldout_blocks(rows: Iterable[dict[str, Any]], tokenizer: Any, block: int, limit: int) -> list[Block]:
    """Pack the first blocks of held-out text, the same for all models.

    Args:
        rows: rows with `text`.
        tokenizer: of the models.
        block: most tokens of a block.
        limit: most blocks.

    Raises:
        InputError: the text has no token to predict.
    """
    text = TextBlocks(rows, tokenizer, block, 1, 0, updates=limit, several=True)
    found = []
    while len(found) < limit and text.has(len(found)):
        found.append(text.pieces(len(found)))
    if not found:
        raise InputError("the held-out text has no token to predict: give more text")
    return found


def score_blocks(
    student: Any,
    blocks: Sequence[Block],
    tokenizer: Any,
    width: int,
    *,
    share_rows: bool,
    teacher: ExactTeacher | None = None,
) -> list[Row]:
    """Score blocks of text, one forward each.

    Args:
        student: a model to which scoring is bound (`minillm.loss.in_forward.bind_scoring`); it may be wrapped.
        blocks: pieces of documents, which do not attend to each other.
        tokenizer: decodes tokens, whose bytes are counted. A character that two pieces share counts in neither as what
            it is, a byte or two.
        width: size of the vocabulary that both models share.
        share_rows: whether the student keeps sequences that share a row apart (`keeps_sequences_apart`).
        teacher: a teacher whose states are known.

    Returns:
        For each block the sums of `language_model_metrics.SUMS`; without a teacher, without those that compare.
    """
    device, rows = next(student.parameters()).device, []
    for pieces in blocks:
        prompts, responses = [ids[:1] for ids in pieces], [ids[1:] for ids in pieces]
        batch = pad(prompts, responses, device, rows=[0] * len(pieces) if share_rows else None)
        targets = None
        if teacher is not None:
            names = [None] * len(pieces)
            states = [found.to(device) for found in hidden_states(teacher, prompts, responses, names)]
            targets = join_states(teacher, states, names)
        with torch.no_grad():
            scoring = Scoring(batch, ScoringSettings(width=width), targets, divergence=_most_likely)
            _, found = score(student, scoring)
        sums = _sums(found) | {"bytes": sum(_bytes(tokenizer, ids) for ids in pieces)}
        rows.append(sums | (_compared(found) if teacher is not None else {}))
    return rows


def _most_likely(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """log q of the most likely token."""
    return student_logits.max(-1).values - student_logits.logsumexp(-1)


def _sums(found: TokenScores) -> Row:
    """Loss, and confidence and correctness by bin."""
    assert found.divergence is not None
    logq, most = found.logq.double().cpu(), found.divergence.double().cpu()
    confidence, correct = most.exp(), (logq >= most - _TIE).double()
    edges = torch.arange(1, BINS, dtype=torch.float64) / BINS
    bins = torch.bucketize(confidence, edges)  # closed on the right
    by_bin = (
        torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, values).tolist() for values in (confidence, correct)
    )
    return {"tokens": len(logq), "nll": -float(logq.sum()), **dict(zip(("confidence", "correct"), by_bin, strict=True))}


def _compared(found: TokenScores) -> Row:
    """What a teacher adds."""
    return {"teacher_nll": -float(found.logp.double().sum()), "forward_kl": float(found.forward_kl.double().sum())}


def _bytes(tokenizer: Any, ids: Sequence[int]) -> int:
    """Bytes of the predicted tokens of a piece, all but its first; an end token is no text."""

    def length(some: Sequence[int]) -> int:
        text = tokenizer.decode(list(some), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode())

    return max(length(ids) - length(ids[:1]), 0)
