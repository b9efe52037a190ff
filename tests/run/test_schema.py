"""The schemas that editors read: shipped, up to date, and of one mind with the classes of the settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from minillm.run.recipe import Recipe
from minillm.run.schema import KINDS, schema, schema_text

ROOT = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("recipes", "eval")
    for path in sorted((ROOT / folder).rglob("*.yaml"))
    if path.parent.name != "accelerate"
]


def faults(kind: str, tree: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    return [error.json_path for error in jsonschema.Draft202012Validator(schema(kind)).iter_errors(tree)]


def kind_of(path: Path) -> tuple[str, Path]:
    """The kind that a file's first line says, and the schema that it names."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", line)
    assert found, f"{path}: its first line names no schema"
    return Path(found[1]).stem, (path.parent / found[1]).resolve()


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_up_to_date(kind: str) -> None:
    shipped = ROOT / "recipes" / "schemas" / f"{kind}.json"
    assert shipped.read_text(encoding="utf-8") == schema_text(kind), (
        f"minillm schema {kind} > {shipped.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_names_its_schema_and_keeps_to_it(path: Path) -> None:
    kind, named = kind_of(path)
    assert named == ROOT / "recipes" / "schemas" / f"{kind}.json"
    assert faults(kind, yaml.safe_load(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("kind", "text", "place"),
    [
        ("recipe", "rolout: {}", "$"),
        ("recipe", "rollout: {teacher_mx: 0.2}", "$.rollout"),
        ("recipe", "rollout: {teacher_mix: 1.5}", "$.rollout.teacher_mix"),
        ("recipe", "rollout: {engine: vlm}", "$.rollout.engine"),
        ("recipe", "stages: [minilm]", "$.stages[0]"),
        ("recipe", "training: {lerning_rate: 1}", "$.training"),
        ("recipe", "warmup: {training: {lerning_rate: 1}}", "$.warmup.training"),
        ("recipe", "data: {train: {fil: x}}", "$.data.train"),
        ("recipe", "teacher: {sourc: x}", "$.teacher"),
        ("suite", "set: {}", "$"),
        ("suite", "sets: {a: {fil: x}}", "$.sets.a"),
        ("comparison", "recipe: {rolout: {}}", "$.recipe"),
        ("comparison", "methods: {a: {tuning: [{trainin: {}}]}}", "$.methods.a.tuning[0]"),
    ],
)
def test_what_a_reader_refuses_is_marked(kind: str, text: str, place: str) -> None:
    assert place in faults(kind, yaml.safe_load(text))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("recipe", "extends: gpt2/120m\nseed: 1"),
        ("recipe", "data: {train: rows.jsonl, text: null}"),
        ("recipe", "objective: {divergence: skew_reverse_kl}"),
        ("recipe", "teacher: {math: {source: a}, chat: {source: b, servers: [c]}}"),
        ("recipe", "teacher: {shard: true}"),
        ("recipe", "sft: {neftune_noise_alpha: 5}"),
        ("suite", "sets: {a: rows.jsonl}"),
        ("comparison", "methods: {a: {recipe: {data: {train: x}}}}"),
    ],
)
def test_what_a_reader_takes_is_not_marked(kind: str, text: str) -> None:
    assert faults(kind, yaml.safe_load(text)) == []


def sections(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.description for name, field in model.model_fields.items()}


def test_the_texts_of_the_fields_are_there() -> None:
    found = schema("recipe")
    for name, about in sections(Recipe).items():
        said = found["properties"][name].get("description") or about
        assert said == " ".join((about or "").split("\n"))
    assert "Maximum number of tokens in a response" in schema_text("recipe")
    assert "Number of bootstrap samples" in schema_text("suite")
    assert "`transformers.TrainingArguments` of the minillm stage" in schema_text("comparison")
