"""The pages of the reference, by their address."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import minillm
from generate.commands import commands_page
from generate.include import recipe_anchor
from generate.keys import comparison_page, recipe_page, suite_page
from minillm import errors
from minillm.distribution import RECIPES
from minillm.evaluation.metrics import METRICS
from minillm.loss.config import DIVERGENCE_PARAMETERS
from minillm.run.shipped import names
from minillm.run.stages import STAGES
from minillm.train.logged import LOGGED, PHASES

PACKAGE = Path(minillm.__file__).parent
_PER = {
    "answer": "answer",
    "token": "token",
    "seed": "all answers of a seed",
    "choice": "all rows of a classification",
    "oracle": "all answers, beside the teacher's",
}
_BETTER = {True: "more", False: "less", None: "that depends"}
FURTHER_SYMBOLS = {
    "Settings": ["minillm.loss.config.DivergenceConfig", "minillm.train.alpha.AlphaConfig"],
    "Fine-tuning": ["minillm.train.finetune.FineTuner"],
    "Models": ["minillm.models.lora.load_student"],
    "Recipes": ["minillm.run.recipe_file.load_recipe", "minillm.run.runner.run_recipe"],
    "What a rollout is": ["minillm.data.rollouts.Rollout"],
    "An engine of your own": ["minillm.rollout.engines.base.Engine"],
    "Scores of tokens": ["minillm.loss.token_scores.token_scores"],
}
"""What users of the library need besides the names of `minillm`."""


def generated_pages() -> dict[str, str]:
    """The text of every generated page, by its address."""
    pages: dict[str, Callable[[], str]] = {
        "commands": commands_page,
        "recipe": recipe_page,
        "suite": suite_page,
        "comparison": comparison_page,
        "stages": stages_page,
        "divergences": divergences_page,
        "metrics": metrics_page,
        "training-log": log_page,
        "python": python_page,
        "recipes": recipes_page,
    }
    return {f"reference/{name}.md": page() for name, page in pages.items()}


def stages_page() -> str:
    """The stages, what each leaves, and where."""
    rows = []
    for stage in STAGES:
        about = (sys.modules[type(stage).__module__].__doc__ or "").partition(": ")[2].strip()
        section = ", ".join(f"[`{name}`](recipe.md#{name})" for name in stage.fields)
        left = f"`{stage.folder}/`" if stage.folder else ""
        label = f"`{stage.label}`" if stage.label else ""
        default = "yes" if stage.default else "where it is listed"
        rows.append(f"| `{stage.name}` | {about[:1].upper()}{about[1:]} | {section} | {left} | {label} | {default} |")
    return (
        "# Stages and folders\n\nA run makes its stages in this order. `stages:` of a recipe chooses them, and "
        "`--stage NAME` runs one. Each leaves its model in a folder of the run directory, and results call that model "
        "by the label.\n\n| stage | what it does | keys | folder | label in results | by default |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(rows) + "\n" + _RUN_DIRECTORY
    )


_RUN_DIRECTORY = """
`pretrain` continues from `student` (and reads the store of `logits`), `warmup` from `pretrain` where there is one, and
`minillm` from `warmup`.

## The run directory

| file or folder | what it holds |
| --- | --- |
| `state.json` | which stages are finished, with the settings and versions that they were made with |
| `responses.jsonl` | the teacher's answers to the training prompts |
| `logs/STAGE.jsonl` | the log of a training stage, one line for each logged update, written at once |
| `samples.jsonl` | sampled responses with KL(q‖p), advantage and the teacher's share of each token |
| `logits/` | the store of the teacher's distributions, where the stage `logits` ran |
| `evaluate/*.jsonl` | every answer of every model to the held-out prompts, with its scores |
| `results.json` | the numbers of the evaluation, with intervals and the verdict |
| `report.html` | the report; it loads nothing and opens from the disk |
| `work/STAGE/` | checkpoints, from which an interrupted stage continues |
| `student/` | the finished student: safetensors, tokenizer, chat template, generation config, model card |
| `adapter/` | inside a model folder: the LoRA adapter by itself |

## Environment variables

| name | what it does |
| --- | --- |
| `MINILLM_TRACEBACK` | if set, errors that a user can mend keep their traceback |
| `VLLM_API_KEY` | sent to vLLM servers; it is never written to a file |
| `XDG_CACHE_HOME` | `minillm plan --calibrate` keeps its numbers below it (by default `~/.cache`) |
| `TENSORBOARD_LOGGING_DIR` | where TensorBoard's files go, with `report_to: tensorboard` |
"""


def divergences_page() -> str:
    """Every divergence with the text of its function, without importing torch."""
    tree = ast.parse((PACKAGE / "loss" / "divergences.py").read_text(encoding="utf-8"))
    found = {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in DIVERGENCE_PARAMETERS
    }
    parts = [
        "# Divergences\n\nA divergence between the student's distribution q and the teacher's p of the next token, in "
        "nats. `objective.divergence` and `warmup.divergence` name one, with its parameters: "
        "`{name: jensen_shannon, beta: 0.5}`. The long-term term exists for `reverse_kl` only.\n"
    ]
    for name, parameters in DIVERGENCE_PARAMETERS.items():
        text = re.sub(r"^Return ", "", found[name].split("\n\nArgs:")[0].split("\n\nRaises:")[0])
        takes = ", ".join(f"`{parameter}`" for parameter in parameters) or "none"
        parts.append(f"## {name} {{ #{name} }}\n\n{text}\n\nParameters: {takes}.\n")
    return "\n".join(parts)


def metrics_page() -> str:
    """Every metric of an evaluation."""
    head = (
        "# Evaluation metrics\n\nThe columns of `results.json`, of the tables in the terminal and of the reports. "
        "Suites have all of them; a run's own evaluation, and validation in training (`eval_rouge_l` and so on), have "
        "those marked *in runs*. Means come with 95 % intervals, which are bootstrapped over prompts; differences "
        "between models are paired over prompts.\n"
    )
    entries = [
        f"## {metric.key} {{ #{metric.key} }}\n\n**{metric.title}**; one value for each {_PER[metric.per]}; better is "
        f"{_BETTER[metric.greater_is_better]}{'; in runs' if metric.held_out else ''}.\n\n{metric.about}\n"
        for metric in METRICS
    ]
    excess = (
        "## exposure_bias { #exposure_bias }\n\n**ExAccErr by position, %**. With `exposure_bias: true` in a suite: "
        "how much more KL(p‖q) a student accumulates along its own answers than along the teacher's, up to each "
        "position. 0 means that its own prefixes hurt it no more than the teacher's do.\n"
    )
    return "\n".join([head, *entries, excess])


def log_page() -> str:
    """Every number that training logs, with what its curve should look like."""
    head = (
        "# Logged metrics\n\nWhat training logs with each update, in `logs/STAGE.jsonl`, to the trackers of "
        "`report_to`, in `minillm watch` and in the report. Numbers are means over the tokens since the last log, over "
        "all processes, unless the text says otherwise. [Watch a run](../guides/monitoring.md) begins with symptoms "
        "instead of names.\n"
    )
    entries = [
        f"## {name} {{ #{name} }}\n\n{one.meaning} Unit: {one.unit}.\n\n**Should look like:** {one.expected}\n\n"
        f"**If not:** {one.otherwise}\n"
        for name, one in LOGGED.items()
    ]
    phases = "\n".join(f"| `{name}` | {about} |" for name, about in PHASES.items())
    seconds = (
        "## Seconds and tokens per second { #seconds }\n\n`PHASE_seconds` is the time of a phase since the last log, "
        "in process 0. `PHASE_tokens_per_second` is the speed of all processes together.\n\n| phase | what it is |\n"
        f"| --- | --- |\n{phases}\n"
    )
    return "\n".join([head, *entries, seconds])


def python_page() -> str:
    """The public names, which mkdocstrings documents."""
    homes = vars(minillm)["_HOME"]
    parts = [
        "# Python\n\n`from minillm import …` gives these names; each loads on first use, so that `import minillm` "
        "stays quick. The rest of this page is what a script may need besides.\n"
    ]
    for name in minillm.__all__:
        # What a Trainer calls is public to transformers, and not what a script calls.
        only = "    options: {members: [evaluate, close]}\n" if name.endswith("Trainer") else ""
        parts.append(f"::: {homes[name]}.{name}\n{only}")
    for title, paths in FURTHER_SYMBOLS.items():
        parts += [f"## {title}\n", *(f"::: {path}\n    options: {{heading_level: 3}}\n" for path in paths)]
    parts.append("## Errors\n\n" + inspect.cleandoc(errors.__doc__ or "") + "\n")
    parts += [f"::: minillm.errors.{name}\n    options: {{heading_level: 3}}\n" for name in error_names()]
    return "\n".join(parts)


def error_names() -> list[str]:
    """The classes of `minillm.errors`."""
    found = [name for name, value in vars(errors).items() if isinstance(value, type)]
    return [name for name in found if getattr(errors, name).__module__ == errors.__name__]


def recipes_page() -> str:
    """Every shipped recipe and every configuration of accelerate, as the file is."""
    accelerate = sorted((RECIPES / "accelerate").glob("*.yaml"))
    found = [*names(), *(f"accelerate/{path.stem}" for path in accelerate)]
    parts = [
        "# Recipes as they are\n\nThe files that come with the library. `minillm recipes` lists them, and "
        "`minillm show NAME` prints one with everything that it extends. [The shipped "
        "recipes](../guides/recipes.md) says what they are for.\n"
    ]
    for name in found:
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith("# yaml-language-server")]
        body = "\n".join(lines)
        parts.append(f"## {name} {{ #{recipe_anchor(name)} }}\n\n```yaml\n{body}\n```\n")
    return "\n".join(parts)
