"""The evaluation of a run on its held-out prompts.

It is a test set whose references are the teacher's answers to the same prompt with the other seeds. Answers are kept
and made again as those of a suite are (`minillm.evaluation.store`); their results are put together here, because the
two have no key but `models` and `seeds` in common: intervals over prompts and a verdict here, scores by set and seed
and differences to the first model there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from minillm.data.examples import Prompt
from minillm.data.files import write_json
from minillm.evaluation import scores, verdict
from minillm.evaluation.answers import DIVERGENCES
from minillm.evaluation.config import EvaluateConfig
from minillm.evaluation.dependencies import Dependencies
from minillm.evaluation.evaluator import Evaluator
from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.report.console import announce
from minillm.evaluation.store import AnswerStore, Row, Task
from minillm.models.conventions import Conventions
from minillm.rollout.config import RolloutConfig

TEACHER = "teacher"
"""Name of the model that gives the references."""
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
    quantization: str | None = None,
) -> dict[str, Any]:
    """Have every model answer the held-out prompts, score the answers, and judge the minillm stage.

    Args:
        folder: Where the answers are kept, `NAME.jsonl`, and the prompts' texts, `prompts.json`.
        models: Folder or hub id of each model by name, `teacher` among them.
        prompts: The held-out prompts.
        conventions: The tokenizer, end tokens and vocabulary that all the models share.
        rollout: Engine and stop strings; `max_prompt_tokens` is the length of the longest prompt.
        config: How the models are sampled and compared.
        settings: Settings that the answers depend on, in values that JSON can hold; they are noted beside the answers.
        quantization: The precision in which the teacher is loaded to score answers with; its own answers are sampled
            from the unquantised teacher.

    Returns:
        The results: `models` (of each the metrics of `scores.summarise`), `prompts` (their number), `seeds`; and where
        both `warmed` and `minillm` are there, `minillm_against_warmed` (`scores.compare`) and `check`
        (`verdict.check`).
    """
    store = AnswerStore(folder)
    sampling = conventions.sampling(config.max_new_tokens, config.temperature, rollout.stop)

    def answers(name: str, seeds: Sequence[int]) -> list[Row]:
        announce(f"  {name}")
        model = evaluator.load(models[name])
        found = evaluator.answer(model, models[name], prompts, sampling, seeds, conventions.tokenizer)
        evaluator.sleep()
        rows = [row for some in found.values() for row in some]
        if name == TEACHER:
            evaluator.score_with(model)
            for row in rows:
                row |= dict.fromkeys(_DIVERGENCES, 0.0)  # the divergence of a model from itself
        else:
            evaluator.add_divergences(rows, prompts, model, sampling, _DIVERGENCES)
        return rows

    facts = Dependencies(
        tokenizer=conventions.tokenizer,
        settings=settings,
        prompts=prompts,
        teacher=models[TEACHER],
        ends=(conventions.eos_ids, conventions.vocab_size),
    )
    of = {name: facts.of(source, rollout.engine) for name, source in models.items()}
    max_length = rollout.max_prompt_tokens + config.max_new_tokens
    with closing(Evaluator(rollout, max_length, teacher=models[TEACHER], quantization=quantization)) as evaluator:
        store.complete([Task(of[name], {name: config.seeds}, partial(answers, name)) for name in models])
    write_json(folder / "prompts.json", {prompt.example.row: prompt.example.text for prompt in prompts})
    return _results({name: store.read(name) for name in models}, len(prompts), config)


def _results(rows: Mapping[str, Sequence[Row]], prompts: int, config: EvaluateConfig) -> dict[str, Any]:
    scored = {name: scores.collect(some, rows[TEACHER]) for name, some in rows.items()}
    results: dict[str, Any] = {
        "models": {name: scores.summarise(some, config.bootstrap) for name, some in scored.items()},
        "prompts": prompts,
        "seeds": config.seeds,
    }
    if "warmed" in scored and "minillm" in scored:
        changes = scores.compare(scored["warmed"], scored["minillm"], config.bootstrap)
        results |= {"minillm_against_warmed": changes, "check": verdict.check(changes, config)}
    return results
