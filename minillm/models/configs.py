"""What a config says of a model, without its weights."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from minillm.models.sources import check_source, place


def read_config(source: str | Path) -> Any:
    """The config of a folder, hub id or GGUF file, of which no weights are read."""
    check_source(str(source), ("config",))
    folder, gguf = place(source)
    if not gguf:
        return AutoConfig.from_pretrained(folder)
    return copy.deepcopy(
        _config_of_gguf(folder, gguf["gguf_file"], (Path(folder) / gguf["gguf_file"]).stat().st_mtime_ns)
    )


@cache
def _config_of_gguf(folder: str, file: str, _changed: int) -> Any:
    """A GGUF file's metadata holds its vocabulary: seconds to read, and several are asked for it."""
    return AutoConfig.from_pretrained(folder, gguf_file=file)


def text_config(model: PreTrainedModel | str) -> Any:
    """Of a model, or of the one in a folder, under a hub id or in a GGUF file, whose weights are not read."""
    config: Any = read_config(model) if isinstance(model, str) else model.config
    return config.get_text_config()


def attends_fully(config: Any) -> bool:
    """Whether every layer of a model with this (text) config attends to all that came before."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return not kinds - {"full_attention"} and (bool(kinds) or not getattr(config, "sliding_window", None))


def head_size(config: Any) -> int:
    """Numbers in one head of attention."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def context_length(config: Any) -> int | None:
    """Positions a model was built for, where its config says."""
    return getattr(config, "max_position_embeddings", None)
