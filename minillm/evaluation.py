"""Models answer held-out prompts; answers are scored against the teacher's answers and its distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minillm import metrics
from minillm.data.batches import bucket, pad, seed_of
from minillm.data.examples import Prompt
from minillm.data.rollouts import Sampling
from minillm.metrics import Floats, Interval
from minillm.models.scoring import Scoring, bind_scoring, head_of, score
from minillm.results import finite
from minillm.rollout.engine import Engine
from minillm.teacher.local import LocalTeacher
from minillm.verdict import check as check

Row = dict[str, Any]


def answer(engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], tokenizer: Any) -> dict[int, list[Row]]:
    """By seed, one sampled answer a prompt: row, seed, text, ids, finished.

    The answers to one prompt are drawn beside each other: an engine that caches prefixes reads it once.
    """
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    drawing = [seed_of("evaluate", seed, prompt.example.row) for prompt, seed in wanted]
    rollouts = engine.generate([prompt.ids for prompt, _ in wanted], sampling, drawing, progress=True)
    rows: dict[int, list[Row]] = {seed: [] for seed in seeds}
    for (prompt, seed), rollout in zip(wanted, rollouts, strict=True):
        row: Row = {"row": prompt.example.row, "seed": seed, "ids": rollout.response_ids, "finished": rollout.finished}
        rows[seed].append(row | {"text": tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()})
    return rows


def token_divergences(
    student: Any, teacher: LocalTeacher, prompts: Sequence[list[int]], responses: Sequence[list[int]], width: int, temperature: float,
    progress: bool = False,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """For each response KL(q‖p) and KL(p‖q) at its tokens [T], in nats: full distributions at the states it leads through.

    Args:
        student: bound (`bind_scoring`); it may be wrapped.
    """
    out: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))] * len(prompts)
    device = next(student.parameters()).device
    for group in tqdm(bucket([len(ids) for ids in responses], teacher.batch_size), desc="scoring", disable=not progress):
        own, theirs = [prompts[i] for i in group], [responses[i] for i in group]
        batch = pad(own, theirs, device)
        hidden = torch.cat(teacher.hidden(own, theirs)).to(device)
        with torch.no_grad():
            _, scores = score(student, Scoring(batch, width, hidden, head_of(teacher.model), temperature=temperature))
        parts = (values.double().cpu().split(batch.lengths.tolist()) for values in (scores.reverse_kl, scores.forward_kl))
        for i, reverse, forward in zip(group, *parts, strict=True):
            out[i] = reverse, forward
    return out


def add_reverse_kl(
    rows: Sequence[Row], prompts: Sequence[Prompt], student: PreTrainedModel, teacher: LocalTeacher, width: int, temperature: float
) -> None:
    """Write `reverse_kl`, the sum of KL(q‖p) over an answer's tokens in nats, into each row; None where that is no number."""
    bind_scoring(student)
    by_row = {prompt.example.row: prompt.ids for prompt in prompts}
    own = [by_row[row["row"]] for row in rows]
    found = token_divergences(student, teacher, own, [row["ids"] for row in rows], width, temperature, progress=True)
    for row, (reverse, _) in zip(rows, found, strict=True):
        row["reverse_kl"] = finite(float(reverse.sum()))


@dataclass
class Scores:
    """Arrays over prompts, each entry the mean or the sum over seeds."""

    rouge_l: Floats
    finished: Floats
    tokens: Floats
    answers: int  # seeds
    reverse_kl: Floats | None


def collect(rows: Sequence[Row], references: Sequence[Row]) -> Scores:
    """Score answers. Those of one seed are compared with the references of every other seed, the best of them
    counting, so that a teacher scored on its own answers never meets the very same one."""
    reference = {(row["row"], row["seed"]): row["text"] for row in references}
    seeds = sorted({row["seed"] for row in references})
    order = sorted({row["row"] for row in rows})
    place = {row: i for i, row in enumerate(order)}
    rouge, finished, tokens, kl = (np.zeros(len(order)) for _ in range(4))
    for row in rows:
        i = place[row["row"]]
        others = [reference[row["row"], seed] for seed in seeds if seed != row["seed"]]
        rouge[i] += metrics.rouge_l(row["text"], others)
        finished[i] += 100 * row["finished"]
        tokens[i] += len(row["ids"])
        value = row.get("reverse_kl")
        kl[i] += np.nan if value is None else value
    n = len({row["seed"] for row in rows})
    return Scores(rouge / n, finished / n, tokens, n, None if np.isnan(kl).any() else kl)


def summarise(scores: Scores, times: int) -> dict[str, Interval]:
    """Means with 95 % intervals: Rouge-L and finished in percent, KL in nats a token, length in tokens."""
    n = len(scores.tokens)
    out = {
        "rouge_l": metrics.interval(metrics.mean_of(scores.rouge_l), n, times),
        "finished": metrics.interval(metrics.mean_of(scores.finished), n, times),
        "length": metrics.interval(metrics.mean_of(scores.tokens / scores.answers), n, times),
    }
    if scores.reverse_kl is not None:
        out["reverse_kl"] = metrics.interval(metrics.ratio_of(scores.reverse_kl, scores.tokens), n, times)
    return out


def compare(before: Scores, after: Scores, times: int) -> dict[str, Interval]:
    """Paired differences after − before over the same prompts, each with its levels `before` and `after`: Rouge-L in points, finished in
    percentage points; `reverse_kl_reduction` is relative, 1 − after/before, of levels in nats a token."""
    n = len(before.tokens)
    out: dict[str, Interval] = {}
    for name in ("rouge_l", "finished"):
        old, new = getattr(before, name), getattr(after, name)
        levels = {"before": float(old.mean()), "after": float(new.mean())}
        out[f"{name}_change"] = metrics.interval(metrics.mean_of(new - old), n, times) | levels
    if before.reverse_kl is not None and after.reverse_kl is not None:
        old = metrics.ratio_of(before.reverse_kl, before.tokens)
        new = metrics.ratio_of(after.reverse_kl, after.tokens)
        whole = np.arange(n)
        levels = {"before": float(old(whole)), "after": float(new(whole))}
        with np.errstate(divide="ignore", invalid="ignore"):  # of nothing, no share can fall
            out["reverse_kl_reduction"] = metrics.interval(lambda index: 1 - new(index) / old(index), n, times) | levels
    return out
