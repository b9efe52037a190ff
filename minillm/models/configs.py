"""Reads the config of a model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from minillm.models.gguf import gguf_config
from minillm.models.sources import check_source, find_gguf


def read_config(source: str | Path) -> Any:
    """Read the config of a model. No weights are read.

    Args:
        source: Folder, hub id or GGUF file.

    Raises:
        MissingError, NotAFolderError, SourceError, InputError: As for `check_source`.
    """
    check_source(str(source), ("config",))
    file = find_gguf(str(source))
    return AutoConfig.from_pretrained(str(source)) if file is None else gguf_config(file)


def text_config(model: PreTrainedModel | str) -> Any:
    """Return the config of the text part of a model.

    Args:
        model: A model, or the folder, hub id or GGUF file of one, whose weights are not read.
    """
    config: Any = read_config(model) if isinstance(model, str) else model.config
    return config.get_text_config()


def head_size(config: Any) -> int:
    """Return the size of one attention head of a model with this (text) config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int | None:
    """Return the number of positions that a model was built for, or None if its (text) config does not say."""
    return getattr(config, "max_position_embeddings", None)
