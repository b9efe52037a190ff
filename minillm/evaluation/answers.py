"""Models answer held-out prompts; answers are scored against the teacher's answers and its distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minillm.data.batches import bucket, pad
from minillm.data.examples import Prompt
from minillm.data.files import finite
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.token_scores import ScoringSettings
from minillm.models.head import TeacherStates, head_of
from minillm.rollout.engines.base import Engine
from minillm.teacher.local import LocalTeacher

Row = dict[str, Any]


def answer(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], tokenizer: Any
) -> dict[int, list[Row]]:
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
    for group in tqdm(
        bucket([len(ids) for ids in responses], teacher.batch_size), desc="scoring", disable=not progress
    ):
        own, theirs = [prompts[i] for i in group], [responses[i] for i in group]
        batch = pad(own, theirs, device)
        hidden = torch.cat(teacher.hidden(own, theirs)).to(device)
        settings = ScoringSettings(temperature=temperature, width=width)
        with torch.no_grad():
            _, scores = score(student, Scoring(batch, settings, TeacherStates(hidden, head_of(teacher.model))))
        parts = (
            values.double().cpu().split(batch.lengths.tolist()) for values in (scores.reverse_kl, scores.forward_kl)
        )
        for i, reverse, forward in zip(group, *parts, strict=True):
            out[i] = reverse, forward
    return out


def add_reverse_kl(
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    student: PreTrainedModel,
    teacher: LocalTeacher,
    width: int,
    temperature: float,
) -> None:
    """Write `reverse_kl`, the sum of KL(q‖p) over an answer's tokens in nats, into each row; None where that is no number."""
    bind_scoring(student)
    by_row = {prompt.example.row: prompt.ids for prompt in prompts}
    own = [by_row[row["row"]] for row in rows]
    found = token_divergences(student, teacher, own, [row["ids"] for row in rows], width, temperature, progress=True)
    for row, (reverse, _) in zip(rows, found, strict=True):
        row["reverse_kl"] = finite(float(reverse.sum()))
