"""Sampled answers to prompts, and the divergences between student and teacher along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import bucket, pad
from minillm.data.examples import Prompt
from minillm.data.files import finite
from minillm.data.sampling import Sampling
from minillm.data.seeding import seed_of
from minillm.evaluation.store import Row
from minillm.loss.in_forward import Scoring, bind_scoring, score
from minillm.loss.token_scores import ScoringSettings
from minillm.rollout.engines.base import Engine
from minillm.teacher.routed import ExactTeacher, hidden_states, join_states
from minillm.terminal import Progress

DIVERGENCES = ("reverse_kl", "forward_kl")
"""Metrics that `add_divergences` can write, in the order in which `token_divergences` returns them."""


def answer(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], tokenizer: Any
) -> dict[int, list[Row]]:
    """Sample one answer per prompt and seed.

    The answers to one prompt are requested one after another: an engine that caches prefixes then reads the prompt
    once.

    Args:
        engine: Samples the model.
        prompts: Rendered prompts.
        sampling: How tokens are sampled.
        seeds: Sampling seeds. An answer depends on its seed and on its prompt's row number, not on the other answers.
        tokenizer: Decodes the answers.

    Returns:
        For each seed one row per prompt: `row`, `seed`, `ids`, `finished`, `text`.
    """
    wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
    token_seeds = [seed_of("evaluate", seed, prompt.example.row) for prompt, seed in wanted]
    rollouts = engine.generate([prompt.ids for prompt, _ in wanted], sampling, token_seeds, progress=True)
    rows: dict[int, list[Row]] = {seed: [] for seed in seeds}
    for (prompt, seed), rollout in zip(wanted, rollouts, strict=True):
        row: Row = {"row": prompt.example.row, "seed": seed, "ids": rollout.response_ids, "finished": rollout.finished}
        rows[seed].append(row | {"text": tokenizer.decode(rollout.response_ids, skip_special_tokens=True).strip()})
    return rows


def token_divergences(
    student: Any,
    teacher: ExactTeacher,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    width: int,
    temperature: float,
    progress: bool = False,
    *,
    names: Sequence[str | None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Compute KL(q‖p) and KL(p‖q) of the full next-token distributions at every token of some responses.

    Args:
        student: A model to which scoring is bound (`bind_scoring`). It may be wrapped, e.g. by a trainer.
        teacher: The model that gives p, or several models.
        prompts: Token ids of the prompts.
        responses: Token ids of the responses, one per prompt.
        width: Size of the vocabulary that both share.
        temperature: Divides the logits of both.
        progress: Whether to show the progress.
        names: The name of each response's teacher, where there are several.

    Returns:
        For each response KL(q‖p) [T] and KL(p‖q) [T] in nats, float64 on the CPU.
    """
    out: list[tuple[Tensor, Tensor]] = [(torch.zeros(0), torch.zeros(0))] * len(prompts)
    device = next(student.parameters()).device
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    groups = bucket(lengths, teacher.batch_size)
    shown = Progress(len(prompts), "answers", "scoring", hidden=not progress)
    for group in groups:
        own, theirs = [prompts[i] for i in group], [responses[i] for i in group]
        batch = pad(own, theirs, device)
        chosen = [None if names is None else names[i] for i in group]
        hidden = [states.to(device) for states in hidden_states(teacher, own, theirs, chosen)]
        settings = ScoringSettings(temperature=temperature, width=width)
        with torch.no_grad():
            _, scores = score(student, Scoring(batch, settings, join_states(teacher, hidden, chosen)))
        parts = (
            values.double().cpu().split(batch.lengths.tolist()) for values in (scores.reverse_kl, scores.forward_kl)
        )
        for i, reverse, forward in zip(group, *parts, strict=True):
            out[i] = reverse, forward
        shown.update(len(group))
    shown.close()
    return out


def add_divergences(
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    student: PreTrainedModel,
    teacher: ExactTeacher,
    width: int,
    temperature: float,
    keys: Sequence[str] = DIVERGENCES,
) -> None:
    """Write the divergences between student and teacher along each answer into the answer's row, in nats.

    A divergence is the sum over the answer's tokens; it is None where that is not a finite number.

    Args:
        rows: Answers of the student.
        prompts: The prompts that the rows answer, in any order.
        student: The model that gave the answers.
        teacher: The model that gives p, or several, of which each prompt's example names its own.
        width: Size of the vocabulary that both share.
        temperature: Divides the logits of both.
        keys: Which of `DIVERGENCES` to write.
    """
    bind_scoring(student)
    by_row = {prompt.example.row: prompt for prompt in prompts}
    own = [by_row[row["row"]] for row in rows]
    found = token_divergences(
        student,
        teacher,
        [prompt.ids for prompt in own],
        [row["ids"] for row in rows],
        width,
        temperature,
        progress=True,
        names=[prompt.example.teacher for prompt in own],
    )
    for row, divergences in zip(rows, found, strict=True):
        sums = {key: float(values.sum()) for key, values in zip(DIVERGENCES, divergences, strict=True)}
        row |= {key: finite(sums[key]) for key in keys}
