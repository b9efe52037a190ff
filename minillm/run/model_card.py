"""The README of a student's folder: what it is, what it was made from and how, and what was measured."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from minillm.evaluation.metrics import HELD_OUT
from minillm.evaluation.results import current_results, with_interval
from minillm.redaction import redacted
from minillm.run.recipe import Recipe, Stage


def write_card(folder: Path, recipe: Recipe, stage: Stage = "minillm") -> Path:
    """Write `folder/README.md` from the recipe and, where the evaluate stage has made them, its results.

    Args:
        stage: the one that trained what is in the folder.

    The licence is the teacher's own to tell: it is copied from its model card where that lies in a local folder.
    """
    teacher, base = recipe.teacher.source, recipe.student.source
    pruned = base == "prune"
    licence = _licence(Path(teacher))
    head: dict[str, Any] = {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["minillm", *_tags(recipe, stage)],
        "base_model": teacher if pruned else base,
    }  # fmt: skip
    if licence and pruned:
        head["license"] = licence
    made = f"{recipe.student.keep_layers} layers of its teacher" if pruned else f"`{base}`"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {folder.resolve().parent.name}",
        f"{made[0].upper()}{made[1:]}, {_how(recipe, stage)}, with minillm {version('minillm')}.",
        f"**Licence.** What is made from a teacher's weights or answers is bound by its licence: {licence or f'see that of `{teacher}`'}."
        + ("" if pruned else f" That of `{base}` holds too."),
        *_results(current_results(recipe.run_dir)),
        "## Recipe\n\n```yaml\n" + yaml.safe_dump(_said(recipe), sort_keys=False, allow_unicode=True) + "```",
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'ask = pipeline("text-generation", "{folder.name}")\nprint(ask({_question(recipe)}))\n```\n\n'
        f"For llama.cpp: `python convert_hf_to_gguf.py {folder.name} --outfile {folder.name}.gguf` (its own tool).",
    ]
    card = folder / "README.md"
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def _question(recipe: Recipe) -> str:
    """What a pipeline is asked, in Python: as the model was trained to be asked."""
    from minillm.data.examples import Example
    from minillm.data.templates import prompt_text

    example, data = Example(0, "Why is the sky blue?"), recipe.data
    if data.template == "chat":
        system = [] if data.system is None else [{"role": "system", "content": data.system}]
        return json.dumps([*system, {"role": "user", "content": example.text}], ensure_ascii=False)
    return json.dumps(prompt_text(example, data.template, data.system), ensure_ascii=False)


def _tags(recipe: Recipe, stage: Stage) -> list[str]:
    if stage == "minillm":
        return ["distillation", recipe.objective.divergence.name.replace("_", "-")]
    return (
        ["sft"]
        if stage == "sft" or (recipe.warmup.cross_entropy == 1 and recipe.warmup.targets == "references")
        else ["distillation"]
    )


def _how(recipe: Recipe, stage: Stage) -> str:
    """What a stage has done to the model."""
    teacher, warmup = f"`{recipe.teacher.source}`", recipe.warmup
    if stage == "minillm":
        name = recipe.objective.divergence.name
        source = " (MiniLLM, [arXiv 2306.08543](https://arxiv.org/abs/2306.08543))" if name == "reverse_kl" else ""
        what = "the reverse KL divergence" if name == "reverse_kl" else name.replace("_", " ")
        return f"distilled from {teacher} by minimising {what} on its own samples{source}"
    answers = (
        f"answers of {teacher}"
        if stage == "warmup" and warmup.targets == "teacher"
        else "the answers in its training data"
    )
    if stage == "sft" or warmup.cross_entropy == 1:
        return f"fine-tuned on {answers}"
    share = "" if warmup.cross_entropy == 0 else f" and {warmup.cross_entropy:g} of cross-entropy"
    return f"distilled from {teacher} by minimising {warmup.divergence.name.replace('_', ' ')}{share} on {answers}"


def push(folder: Path, hub_id: str, token: str | None = None) -> str:
    """Upload a student's folder to the hub, which needs a token (by default that of `hf auth login`); returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    address = str(api.create_repo(hub_id, exist_ok=True))
    api.upload_folder(repo_id=hub_id, folder_path=str(folder), commit_message="Student distilled by minillm")
    return address


def _said(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what it leaves to the defaults, without where this machine keeps it, and without secrets."""
    return redacted(recipe.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir", "push_to_hub"}))


def _results(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    rows = ""
    for name, scores in results["models"].items():
        rows += f"| {name} | {' | '.join(with_interval(scores.get(metric.key)) for metric in HELD_OUT)} |\n"
    heads = " | ".join(metric.title for metric in HELD_OUT)
    note = f"{results['prompts']} held-out prompts, sampling seeds {', '.join(map(str, results['seeds']))}; mean [95 % interval]."
    return [f"## Results\n\n| model | {heads} |\n|---{'|---' * len(HELD_OUT)}|\n{rows}\n{note}"]


def _licence(teacher: Path) -> str | None:
    """What the front matter of a local model card says."""
    card = teacher / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        head = yaml.safe_load(lines[1]) if len(lines) > 2 else None
    except yaml.YAMLError:
        return None
    return head.get("license") if isinstance(head, dict) else None
