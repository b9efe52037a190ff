"""A trained model's weights under the names its plain architecture has, for an engine or a saved folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def plain_weights(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight, tied ones under each of their names; adapters are merged for the time being, then taken out again."""
    if not hasattr(model, "merge_adapter"):
        for name, value in model.state_dict().items():
            yield name, value.detach().to(dtype)
        return
    model.merge_adapter()
    try:
        for name, value in model.get_base_model().state_dict().items():
            if "lora_" not in name:
                # A copy: the reader may keep it until after the adapter has been taken out again.
                yield name.replace(".base_layer", ""), value.detach().to(dtype, copy=True)
    finally:
        model.unmerge_adapter()


def save_plain(model: Any, folder: str | Path) -> None:
    """Save as a folder of the plain architecture, adapters merged."""
    if not hasattr(model, "get_base_model"):
        model.save_pretrained(folder)
        return
    base = model.get_base_model()
    merged = dict(plain_weights(model, base.dtype))
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    with torch.device("meta"):
        plain = type(base)(base.config)
    plain.load_state_dict(merged, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
