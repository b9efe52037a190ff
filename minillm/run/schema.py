"""JSON schemas of recipes, suites and comparisons, from which editors complete and check keys.

A file may state only what differs from the one that it extends, so no key is required here: what is missing is found
when the file is read.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from minillm.evaluation.config import Suite
from minillm.run.experiments.config import Comparison
from minillm.run.recipe import Recipe
from minillm.run.stages import NAMES, STAGES
from minillm.train.supported_arguments import FINE_TUNING_ONLY, HONOURED
from minillm.train.update_size import RESPONSES

KINDS: dict[str, type[BaseModel]] = {"recipe": Recipe, "suite": Suite, "comparison": Comparison}
_RESPONSES = {
    "type": ["integer", "null"],
    "minimum": 1,
    "description": "Responses (of the pretrain stage: blocks of text) that one weight update trains on, whatever the "
    "number of processes. gradient_accumulation_steps follows from it, and per_device_train_batch_size is the largest "
    "micro-batch. null takes back that of an extended recipe.",
}
_EXTENDS = {
    "type": "string",
    "description": "A file, or the name of a shipped recipe, whose settings this one changes.",
}
# Sections that may be given as one string: a file, or a name.
_SHORT = {
    "Source": "The path of a JSONL file.",
    "TestSet": "The path of a JSONL file.",
    "DivergenceConfig": "Its name.",
}


def schema_text(kind: str) -> str:
    """The JSON schema of a kind of file, as it is shipped in recipes/schemas.

    Args:
        kind: `recipe`, `suite` or `comparison`.
    """
    return json.dumps(schema(kind), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a kind of file; see `schema_text`."""
    out = _adapted(KINDS[kind].model_json_schema())
    sections = out.setdefault("$defs", {})
    if kind == "comparison":
        recipe = schema("recipe")
        sections |= recipe.pop("$defs")
        sections["Recipe"] = {key: value for key, value in recipe.items() if key not in ("$schema", "title")}
        for place in (out["properties"], sections["Method"]["properties"]):
            place["recipe"] |= {"$ref": "#/$defs/Recipe"}
            place["recipe"].pop("additionalProperties")
        sections["Method"]["properties"]["tuning"]["items"] = {"$ref": "#/$defs/Recipe"}
    if kind == "recipe":
        _add_training_arguments(out)
        out["properties"]["stages"]["items"] = {"enum": list(NAMES)}
    for name, about in _SHORT.items():
        if name in sections and "anyOf" not in sections[name]:
            sections[name] = {"anyOf": [{"type": "string", "description": about}, sections[name]]}
    out["properties"]["extends"] = _EXTENDS
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **out, "title": f"minillm {kind}"}


def _adapted(found: Any) -> Any:
    """A schema of pydantic without what a file that extends another one need not have, and what no editor shows."""
    if isinstance(found, list):
        return [_adapted(one) for one in found]
    if not isinstance(found, dict):
        return found
    out = {}
    for key, value in found.items():
        names = key in ("properties", "$defs")  # whose keys are settings, which may have any name
        if names:
            out[key] = {name: _adapted(one) for name, one in value.items()}
        elif key == "description":
            out[key] = value.replace("\n", " ")
        elif key == "default" and isinstance(value, dict):
            continue
        elif key not in ("required", "title", "format", "discriminator"):
            out["anyOf" if key == "oneOf" else key] = _adapted(value)
    return out


def _add_training_arguments(recipe: dict[str, Any]) -> None:
    """Name the `TrainingArguments` that each stage honours."""
    for stage in STAGES:
        if stage.training is None:
            continue
        section, _, inner = stage.training.partition(".")
        properties = recipe["properties"]
        if inner:
            properties = recipe["$defs"][properties[section]["$ref"].rpartition("/")[2]]["properties"]
        names = sorted(HONOURED | FINE_TUNING_ONLY.keys() if stage.uses_trl else HONOURED)
        described: dict[str, Any] = {name: {"description": f"transformers.TrainingArguments.{name}"} for name in names}
        described[RESPONSES] = _RESPONSES
        properties[inner or section] |= {"properties": described, "additionalProperties": False}
