"""The evaluation of a run's models on held-out text, beside that on held-out prompts.

The scores of each model's blocks are kept in the store of its answers, under `text-MODEL`, and made again when the
model, the teacher or the text is another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minillm.data.text import Block
from minillm.evaluation.dependencies import Dependencies, digest
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.language_model import score_blocks
from minillm.evaluation.language_model_metrics import text_intervals
from minillm.evaluation.report.console import announce
from minillm.evaluation.store import AnswerStore, Row, Task
from minillm.loss.in_forward import bind_scoring
from minillm.models.conventions import Conventions
from minillm.models.head import keeps_sequences_apart
from minillm.models.vocabulary import head_width
from minillm.rollout.config import RolloutConfig


def evaluate_text(
    folder: Path,
    models: Mapping[str, str],
    blocks: Sequence[Block],
    conventions: Conventions,
    *,
    teacher: str | None = None,
    quantization: str | None = None,
    bootstrap: int = 2000,
) -> dict[str, Any]:
    """Score every model on blocks of held-out text.

    Args:
        folder: where the scores are kept.
        models: folder or hub id of each model by name.
        blocks: the text (`language_model.heldout_blocks`).
        conventions: the tokenizer and the vocabulary that all the models share.
        teacher: folder or hub id of the model that p is taken from; None leaves KL(p‖q) out.
        quantization: precision in which the teacher is loaded.
        bootstrap: number of bootstrap samples of the blocks.

    Returns:
        `blocks` and `tokens`, the size of the text, and `models`: of each the metrics with their intervals.
    """
    store = AnswerStore(folder)
    text = digest([[list(piece) for piece in pieces] for pieces in blocks])
    facts = Dependencies(
        tokenizer=conventions.tokenizer,
        settings={"text": text, "quantization": quantization},
        teacher=teacher,
        ends=(conventions.eos_ids, conventions.vocab_size),
    )

    def rows(label: str, _: Sequence[int]) -> list[Row]:
        announce(f"  {label}: held-out text")
        return _scored(evaluator, models[label], blocks, conventions, teacher)

    parts = {label: f"text-{label}" for label in models}
    # No engine is started, because nothing is sampled.
    with closing(Evaluator(RolloutConfig(), 1, teacher=teacher, quantization=quantization)) as evaluator:
        store.complete(
            [
                Task(replace(facts, model=models[label]), {part: ()}, partial(rows, label))
                for label, part in parts.items()
            ]
        )
    scored = {label: store.read(part) for label, part in parts.items()}
    first = next(iter(scored.values()))
    return {
        "blocks": len(blocks),
        "tokens": int(sum(row["tokens"] for row in first)),
        "models": {label: text_intervals(found, bootstrap) for label, found in scored.items()},
    }


def _scored(
    evaluator: Evaluator, source: str, blocks: Sequence[Block], conventions: Conventions, teacher: str | None
) -> list[Row]:
    """The rows of one model."""
    model = bind_scoring(evaluator.load(source))
    if source == teacher:
        evaluator.score_with(model)
    width = min(conventions.vocab_size, head_width(model))
    found = score_blocks(
        model,
        blocks,
        conventions.tokenizer,
        width if teacher is None else min(width, head_width(evaluator.teacher.model)),
        share_rows=keeps_sequences_apart(model),
        teacher=None if teacher is None else evaluator.teacher,
    )
    return [{"row": number, **row} for number, row in enumerate(found)]
