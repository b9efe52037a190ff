"""The model card of a trained student: what it is, how it was made, and what was measured."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi

import minillm
from minillm.data.examples import Example
from minillm.data.files import read_json
from minillm.data.templates import prompt_text
from minillm.errors import RunError
from minillm.evaluation.formatting import with_interval
from minillm.evaluation.language_model_metrics import TEXT_METRICS
from minillm.evaluation.metrics import HELD_OUT
from minillm.redaction import redacted
from minillm.run.recipe import Recipe
from minillm.run.results import current_results
from minillm.run.stages import stage_named
from minillm.run.stages.stage import teachers_in_words


def write_card(folder: Path, recipe: Recipe, stage: str = "minillm") -> Path:
    """Write `folder/README.md` from the recipe and, where the evaluate stage has made them, the results.

    The licence is copied from the teacher's model card, where that lies in a local folder. With several teachers, the
    card names the teachers instead.

    Args:
        folder: the student's folder.
        stage: the stage that trained it.

    Returns:
        The path of the card.
    """
    teacher, base = recipe.teacher.first.source, recipe.student.source
    pruned, random = base == "prune", base == "config"
    licence = None if recipe.teacher.several else _licence(Path(teacher))
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minillm", *stage_named(stage).tags(recipe)],
    }
    if not random:
        head["base_model"] = teacher if pruned else base
    if licence and pruned:
        head["license"] = licence
    terms = licence or f"see that of {teachers_in_words(recipe)}"
    made = f"{recipe.student.keep_layers} layers of its teacher" if pruned else f"`{base}`"
    if random:
        made = f"a model of the class of `{recipe.student.model_like(teacher)}` with random weights"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {folder.resolve().parent.name}",
        f"{made[0].upper()}{made[1:]}, {stage_named(stage).describe(recipe)}, with minillm {minillm.__version__}.",
        f"**Licence.** What is made from a teacher's weights or answers is bound by its licence: {terms}."
        + ("" if pruned or random else f" That of `{base}` holds too."),
        *_lengthened(recipe.run_dir, stage),
        *_results(current_results(recipe.run_dir)),
        "## Recipe\n\n```yaml\n"
        + yaml.safe_dump(_non_default_settings(recipe), sort_keys=False, allow_unicode=True)
        + "```",
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'ask = pipeline("text-generation", "{folder.name}")\nprint(ask({_question(recipe)}))\n```\n\n'
        f"For llama.cpp: `python convert_hf_to_gguf.py {folder.name} --outfile {folder.name}.gguf` (its own tool).",
    ]
    card = folder / "README.md"
    card.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return card


def _lengthened(run_dir: Path, stage: str) -> list[str]:
    """What a reader has to know of a training that went on for longer than it was to."""
    state = run_dir / "state.json"
    found = read_json(state)["stages"].get(stage, {}).get("lengthened", []) if state.is_file() else []
    if not found:
        return []
    lengths = ", then ".join([*(before for before, _ in found), found[-1][1]])
    return [
        f"**Length.** The training went on from its last checkpoint: {lengths}. A schedule that depends on the length "
        "was that of each in turn."
    ]


def _question(recipe: Recipe) -> str:
    """A prompt for the usage example, as Python source, in the form that the model was trained on."""
    example, data = Example(0, "Why is the sky blue?"), recipe.data
    if data.template == "chat":
        system = [] if data.system is None else [{"role": "system", "content": data.system}]
        return json.dumps([*system, {"role": "user", "content": example.text}], ensure_ascii=False)
    return json.dumps(prompt_text(example, data.template, data.system), ensure_ascii=False)


def push(folder: Path, hub_id: str, token: str | None = None) -> str:
    """Upload a student's folder to the hub.

    Args:
        hub_id: name of the repository, which is created where it does not exist.
        token: an access token; by default that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        RunError: the hub cannot be reached, or refuses the upload.
    """
    api = HfApi(token=token)
    try:
        address = str(api.create_repo(hub_id, exist_ok=True))
        api.upload_folder(repo_id=hub_id, folder_path=str(folder), commit_message="Student distilled by minillm")
    except Exception as error:  # errors of the HTTP library that the hub's client is built on
        reason = textwrap.shorten(str(error), 300)
        raise RunError(
            f"push_to_hub: {hub_id} cannot be uploaded to {api.endpoint} ({reason}): the student is kept in {folder}; "
            "check the name and the login (`hf auth login`), and upload it with --stage report"
        ) from error
    return address


def _non_default_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that differ from their defaults, without this machine's run directory and without secrets."""
    return redacted(recipe.model_dump(mode="json", exclude_defaults=True, exclude={"run_dir", "push_to_hub"}))


def _results(results: dict[str, Any]) -> list[str]:
    if not results:
        return []
    rows = ""
    for name, scores in results["models"].items():
        rows += f"| {name} | {' | '.join(with_interval(scores.get(metric.key)) for metric in HELD_OUT)} |\n"
    heads = " | ".join(metric.title for metric in HELD_OUT)
    seeds = ", ".join(map(str, results["seeds"]))
    note = f"{results['prompts']} held-out prompts, sampling seeds {seeds}; mean [95 % interval]."
    return [
        f"## Results\n\n| model | {heads} |\n|---{'|---' * len(HELD_OUT)}|\n{rows}\n{note}",
        *_text_results(results),
    ]


def _text_results(results: dict[str, Any]) -> list[str]:
    found = results.get("text")
    if not found:
        return []
    rows = ""
    for name, scores in found["models"].items():
        cells = " | ".join(with_interval(scores.get(metric.key), digits=4) for metric in TEXT_METRICS)
        rows += f"| {name} | {cells} |\n"
    heads = " | ".join(metric.title for metric in TEXT_METRICS)
    note = f"{found['blocks']} blocks of held-out text, {found['tokens']} tokens; mean [95 % interval]."
    return [f"| model | {heads} |\n|---{'|---' * len(TEXT_METRICS)}|\n{rows}\n{note}"]


def _licence(teacher: Path) -> str | None:
    """The licence that the front matter of a local model card names."""
    card = teacher / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").split("---")
    try:
        head = yaml.safe_load(lines[1]) if len(lines) > 2 else None
    except yaml.YAMLError:
        return None
    return head.get("license") if isinstance(head, dict) else None
