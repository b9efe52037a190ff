"""The generation config of a model, in a form that transformers saves with the weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from minillm.models.sources import locate

logger = logging.getLogger(__name__)

# Settings that others depend on, and that are therefore set before them.
_SET_FIRST = (
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
    """Read the generation config of a model, without settings that are invalid together.

    Published models have such settings, for example a temperature with sampling turned off. transformers reads them
    with a warning, and refuses to save them with the weights once those have been trained.

    Args:
        source: Folder, hub id or GGUF file of the model.
        config: The model's config, which is used if there is no generation config that can be read.
    """
    folder, _ = locate(source)
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
                "%s: generation_config.json cannot be read (%s); the model's config is used instead", source, error
            )
    return savable(GenerationConfig.from_model_config(config).to_diff_dict(), str(source))


def savable(settings: dict[str, Any], source: str) -> GenerationConfig:
    """Build a generation config from the settings that are valid together with those before them.

    A warning names the settings that are left out.

    Args:
        settings: Settings of a generation config.
        source: Name of the model, for the warning.
    """
    given = {name: value for name, value in settings.items() if value is not None and not name.startswith("_")}
    given.pop("transformers_version", None)
    changes: list[str] = []
    sampling = {name: given[name] for name in _SAMPLING if name in given}
    if given.get("do_sample") is None and given.get("temperature") != 0 and not _valid(sampling):
        given["do_sample"] = True
        changes.append(f"do_sample is set, for {', '.join(sampling)}")
    kept: dict[str, Any] = {}
    for name in (*_SET_FIRST, *(name for name in given if name not in _SET_FIRST)):
        if name not in given:
            continue
        if _valid(kept | {name: given[name]}):
            kept[name] = given[name]
        else:
            changes.append(f"{name} ({given[name]}) is left out")
    if changes:
        logger.warning("%s: its generation config could not be saved as it is: %s", source, "; ".join(changes))
    return GenerationConfig(**kept)


def mend_generation_config(model: Any) -> None:
    """Replace the generation config of a model, in place, if transformers would refuse to save it."""
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
