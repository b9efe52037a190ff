"""A model's generation config: what ends a response, in a form that transformers saves with the weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from minillm.models.sources import place

logger = logging.getLogger(__name__)

# What others depend on, which therefore is set before them.
_FIRST = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "do_sample",
    "num_beams",
    "return_dict_in_generate",
    "use_cache",
)
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read_generation_config(source: str | Path, config: Any) -> GenerationConfig:
    """Of a folder or hub id, or from the model's `config` where it has none; without the settings that are invalid together.

    transformers reads some of these and warns, and refuses to save them with the weights, once those have been trained.
    Published models have them: a temperature, say, with sampling off.
    """
    folder, _ = place(source)
    file = cached_file(
        folder,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is not None:
        try:
            return savable(json.loads(Path(file).read_text(encoding="utf-8")), str(source))
        except (ValueError, AttributeError) as error:
            logger.warning(
                "%s: generation_config.json cannot be read (%s); the model's config stands in for it", source, error
            )
    return savable(GenerationConfig.from_model_config(config).to_diff_dict(), str(source))


def savable(settings: dict[str, Any], source: str) -> GenerationConfig:
    """A generation config of those settings that are valid with the ones before them; a warning names the others."""
    given = {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}
    given.pop("transformers_version", None)
    told: list[str] = []
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    if given.get("do_sample") is None and given.get("temperature") != 0 and not _valid(sampling):
        given["do_sample"] = True
        told.append(f"do_sample is set, for {', '.join(sampling)}")
    kept: dict[str, Any] = {}
    for name in (*_FIRST, *(name for name in given if name not in _FIRST)):
        if name not in given:
            continue
        if _valid(kept | {name: given[name]}):
            kept[name] = given[name]
        else:
            told.append(f"{name} ({given[name]}) is left out")
    if told:
        logger.warning("%s: its generation config could not be saved as it is: %s", source, "; ".join(told))
    return GenerationConfig(**kept)


def mend_generation_config(model: Any) -> None:
    """Have a model that is to be saved, however it was made, keep of its generation config what transformers saves."""
    held = getattr(model, "generation_config", None)
    if held is None:
        return
    try:
        held.validate(strict=True)
    except ValueError:
        model.generation_config = savable(held.to_diff_dict(), model.name_or_path or type(model).__name__)


def _valid(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True
