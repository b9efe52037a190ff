"""The evaluation of a run on its held-out prompts.

It is a test set whose references are the teacher's answers to the same prompt with the other seeds. Of several
teachers, each answers and scores the prompts that name it. If the prompts name none, every teacher answers all of them,
the best reference counts, and KL(q‖p) is left out.

Answers are kept and made again as those of a suite are (`minillm.evaluation.store`); their results are put together
here, because the two have no key but `models` and `seeds` in common: intervals over prompts and a verdict here, scores
by set and seed and differences to the first model there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from minillm.data.examples import Prompt
from minillm.data.files import write_json
from minillm.evaluation import scores, verdict
from minillm.evaluation.answers import DIVERGENCES
from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.dependencies import Dependencies, digest
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.console import announce
from minillm.evaluation.store import AnswerStore, Row, Task
from minillm.models.conventions import Conventions
from minillm.rollout.config import RolloutConfig
from minillm.teacher.config import teacher_label

logger = logging.getLogger(__name__)
_DIVERGENCES = [metric.key for metric in HELD_OUT if metric.key in DIVERGENCES]


def evaluate_heldout(
    folder: Path,
    models: Mapping[str, str],
    prompts: Sequence[Prompt],
    conventions: Conventions,
    rollout: RolloutConfig,
    config: EvaluateConfig,
    *,
    settings: Mapping[str, Any],
    teachers: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """Have every model answer the held-out prompts, score the answers, and judge the minillm stage.

    Args:
        folder: Where the answers are kept, `NAME.jsonl`, and the prompts' texts, `prompts.json`.
        models: Folder or hub id of each model by name, among them the `teacher_label` of each teacher.
        prompts: The held-out prompts.
        conventions: The tokenizer, end tokens and vocabulary that all the models share.
        rollout: Engine and stop strings; `max_prompt_tokens` is the length of the longest prompt.
        config: How the models are sampled and compared.
        settings: Settings that the answers depend on, in values that JSON can hold; they are noted beside the answers.
        teachers: The precision in which each teacher is loaded to score answers with, by its name; its own answers are
            sampled from the unquantised teacher. By default there is one, which has an empty name.

    Returns:
        The results: `models` (of each the metrics of `scores.summarise`), `prompts` (their number), `seeds`; and where
        both `warmed` and `minillm` are there, `minillm_against_warmed` (`scores.compare`) and `check`
        (`verdict.check`).
    """
    store = AnswerStore(folder)
    sampling = conventions.sampling(config.max_new_tokens, config.temperature, rollout.stop)
    panel = _Teachers({"": None} if teachers is None else teachers, models, prompts)
    models = {label: source for label, source in models.items() if panel.prompts_of(label)}
    scoring = panel.folders(models)

    def answers(label: str, seeds: Sequence[int]) -> list[Row]:
        announce(f"  {label}")
        model, own = evaluator.load(models[label]), panel.prompts_of(label)
        found = evaluator.answer(model, models[label], own, sampling, seeds, conventions.tokenizer)
        evaluator.sleep()
        rows = [row for some in found.values() for row in some]
        if panel.scored and label in panel.labels:
            evaluator.score_with(model, panel.labels[label])
            for row in rows:
                row |= dict.fromkeys(_DIVERGENCES, 0.0)  # the divergence of a model from itself
        elif panel.scored:
            evaluator.add_divergences(rows, prompts, model, sampling, _DIVERGENCES)
        return rows

    ends = conventions.eos_ids, conventions.vocab_size
    facts = Dependencies(
        tokenizer=conventions.tokenizer, settings={**settings, **panel.facts}, teacher=scoring, ends=ends
    )
    of = {label: replace(facts.of(models[label], rollout.engine), prompts=panel.prompts_of(label)) for label in models}
    max_length = rollout.max_prompt_tokens + config.max_new_tokens
    with closing(Evaluator(rollout, max_length, teacher=scoring, quantization=panel.quantization)) as evaluator:
        store.complete([Task(of[label], {label: config.seeds}, partial(answers, label)) for label in models])
    write_json(folder / "prompts.json", {prompt.example.row: prompt.example.text for prompt in prompts})
    return _results({label: store.read(label) for label in models}, panel.labels, len(prompts), config)


class _Teachers:
    """The teachers among the models, and which prompts each of them answers and scores.

    Args:
        quantization: The precision in which each teacher scores, by its name.
        models: The models.
        prompts: The held-out prompts.

    Attributes:
        labels: The name of each teacher by what `models` calls it.
        scored: Whether KL(q‖p) is computed: if there is one teacher, or if the prompts name theirs.
        facts: What the answers depend on beside the settings: the teacher of each prompt.
    """

    def __init__(
        self, quantization: Mapping[str, str | None], models: Mapping[str, str], prompts: Sequence[Prompt]
    ) -> None:
        self.quantization, self._prompts = quantization, prompts
        self.labels = {teacher_label(name): name for name in quantization}
        several = "" not in quantization
        self._routed = several and all(prompt.example.teacher in quantization for prompt in prompts)
        self.scored = self._routed or not several
        self.facts = {"teacher of each row": digest(*(p.example.teacher for p in prompts))} if self._routed else {}
        if not self.scored:
            logger.warning("The held-out rows name no teacher (column teacher): KL(q‖p) is left out.")

    def prompts_of(self, label: str) -> Sequence[Prompt]:
        """The prompts that a model answers."""
        if not self._routed or label not in self.labels:
            return self._prompts
        return [prompt for prompt in self._prompts if prompt.example.teacher == self.labels[label]]

    def folders(self, models: Mapping[str, str]) -> str | dict[str, str]:
        """The folders of the teachers among these models: of several by name."""
        folders = {name: models[label] for label, name in self.labels.items() if label in models}
        return folders.get("", folders)


def _results(
    rows: Mapping[str, Sequence[Row]], teachers: Iterable[str], prompts: int, config: EvaluateConfig
) -> dict[str, Any]:
    references = [row for label in teachers for row in rows.get(label, ())]
    scored = {name: scores.collect(some, references) for name, some in rows.items()}
    results: dict[str, Any] = {
        "models": {name: scores.summarise(some, config.bootstrap) for name, some in scored.items()},
        "prompts": prompts,
        "seeds": config.seeds,
    }
    if "warmed" in scored and "minillm" in scored:
        changes = scores.compare(scored["warmed"], scored["minillm"], config.bootstrap)
        results |= {"minillm_against_warmed": changes, "check": verdict.check(changes, config)}
    return results
