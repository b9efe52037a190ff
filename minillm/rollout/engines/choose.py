"""Engine factory: the registry of engines, and how one is chosen, created and updated.

To add an engine, write a class that has the members of `RegisteredEngine` and list it in `ENGINES`.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from minillm.errors import EngineError
from minillm.models.configs import text_config
from minillm.models.device import release_memory
from minillm.models.fingerprint import Fingerprint
from minillm.models.lora import adapter_rank, save_adapter
from minillm.models.weights import plain_weights, tied_names
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import (
    SHARED,
    Engine,
    EngineRequest,
    EngineSizing,
    Push,
    RegisteredEngine,
    SupportsAdapter,
    TellsWeights,
    WeightsSum,
)
from minillm.rollout.engines.local_server import check_local_server
from minillm.rollout.engines.server import VLLMServerEngine
from minillm.rollout.engines.server_checks import check_addresses
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.rollout.engines.vllm import VLLMEngine
from minillm.teacher.local import LocalTeacher

logger = logging.getLogger(__name__)

# By their values of `rollout.engine`. `auto` takes the first that can sample any model and is available.
_CLASSES: tuple[type[RegisteredEngine], ...] = (VLLMEngine, TransformersEngine, VLLMServerEngine)
ENGINES: dict[str, type[RegisteredEngine]] = {engine.name: engine for engine in _CLASSES}

_NOT_PART_OF_THE_SHAPE = ("dtype", "transformers_version", "use_cache")


def choose_engine(wanted: str, model: Any = None, teacher: Any = None) -> str:
    """Return the name of the engine that samples a model in this process, such as `vllm` or `transformers`.

    Where `auto` has to fall back, a warning says why, once per process. Servers (`wanted: server`) sample the student
    in training only; for other models the choice is the same as with `auto`.

    Args:
        wanted: Value of `rollout.engine`.
        model: The text config of the model that will be sampled, or None where it is not known yet.
        teacher: The text config of the teacher that is mixed in, or None without one.

    Raises:
        EngineError: An engine was named that is not installed or cannot sample the model.
    """
    if wanted in ENGINES and not ENGINES[wanted].only_in_training:
        refusal = ENGINES[wanted].unavailable(model, teacher)
        if refusal is not None:
            remedy = f"{refusal.remedy}, or " if refusal.remedy else ""
            raise EngineError(f"rollout.engine: {refusal.reason}: {remedy}set rollout.engine=auto")
        return wanted
    reasons = []
    for name, engine in ENGINES.items():
        if engine.only_in_training:
            continue
        refusal = engine.unavailable(model, teacher)
        if refusal is None:
            if reasons:
                _warn_of_fallback(reasons[0], name)
            return name
        reasons.append(refusal.reason)
    raise EngineError(f"rollout.engine: no engine can sample the model: {'; '.join(reasons)}")


def check_student_engine(config: RolloutConfig, model: Any = None, teacher: Any = None) -> None:
    """Refuse an engine that cannot sample the student in training.

    Nothing is asked of servers that somebody else starts. What they cannot do is found when training attaches to them.

    Args:
        config: Settings of the rollouts.
        model: The text config of the student, or None where it is not known yet.
        teacher: The text config of the teacher that is mixed in, or None without one.

    Raises:
        EngineError: The engine is not installed, cannot sample the model or mix the teacher in, or is a server that
            not every process can reach.
    """
    check_addresses(config.servers)
    if config.servers == "auto":
        check_local_server(model, teacher)
    elif not config.servers:
        choose_engine(config.engine, model, teacher)


def supports_overlap(wanted: str) -> bool:
    """Return whether the engine of a value of `rollout.engine` can sample while the student trains."""
    return wanted in ENGINES and ENGINES[wanted].capabilities.supports_overlap


@cache
def _warn_of_fallback(reason: str, name: str) -> None:
    """Warn that another engine is used than the fastest. The cache limits this to once per process."""
    logger.warning("%s: sampling with %s instead, several times slower.", reason, name)


def make_engine(
    config: RolloutConfig,
    folder: str | Path,
    sizing: EngineSizing,
    *,
    tokenizer: str | Path | None = None,
    model: PreTrainedModel | None = None,
    teacher: LocalTeacher | None = None,
    work: str | Path = "work",
) -> Engine:
    """Create an engine for the model in `folder`.

    Args:
        config: Settings of the rollouts.
        folder: Model folder or hub id.
        sizing: How much the engine must be able to hold; `EngineSizing.from_config` makes one.
        tokenizer: Folder of the tokenizer, for responses that stop strings end.
        model: The model in training, where there is one. The transformers engine then samples it directly (a sharded
            model: a copy of it). Servers sample nothing else.
        teacher: The teacher that `Sampling.teacher_mix` mixes in; None for an engine that samples the student alone.
        work: Folder for the engine's own files, which servers must see too.

    Raises:
        EngineError: The engine is not available, or cannot be started.
    """
    # An adapter that cannot be sent alone is refused whichever engine is chosen.
    lora_rank = 0 if model is None or config.lora == "merged" else adapter_rank(model)
    request = EngineRequest(config, folder, sizing, Path(work), tokenizer, model, lora_rank, teacher)
    wanted = ENGINES.get(config.engine)
    if wanted is not None and wanted.only_in_training and model is not None:
        return wanted.create(request)
    mixed = None if teacher is None else text_config(teacher.model)
    return ENGINES[choose_engine(config.engine, text_config(str(folder)), mixed)].create(request)


def sync_weights(
    engine: Engine, model: PreTrainedModel, dtype: torch.dtype, version: int, work: str | Path, *, prove: bool = False
) -> Push | None:
    """Send the model's current weights to an engine.

    An engine that was started for an adapter receives the adapter alone, by way of a folder in `work`. Every process
    must call this, because shards are gathered.

    Args:
        engine: The engine.
        model: The model in training.
        dtype: Dtype that the weights are sent in.
        version: Version of the weights.
        work: Folder for an adapter on its way to the engine.
        prove: Whether to sum up the weights on both sides, as far as the engine tells.

    Returns:
        The sums, with `prove`.
    """
    if isinstance(engine, SupportsAdapter) and engine.takes_adapter:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        folder = Path(work) / f"adapter-of-process-{rank}"
        save_adapter(model, folder, dtype)
        engine.update_adapter(folder, version)
        return Push(version, None, WeightsSum(None, "an adapter alone was sent")) if prove else None
    if not prove:
        engine.update_weights(plain_weights(model, dtype), version)
        return None
    tells = isinstance(engine, TellsWeights)
    if tells and engine.shares_weights:
        engine.update_weights(plain_weights(model, dtype), version)
        return Push(version, None, WeightsSum(None, SHARED))
    sent = Fingerprint(tied_names(model))
    engine.update_weights(sent.over(plain_weights(model, dtype)), version)
    return Push(version, sent.total, engine.weights_sum() if tells else WeightsSum(None, "it does not tell"))


class ReusableEngine:
    """Samples several models one after another, and reuses one engine for models of the same shape.

    Args:
        config: Settings of the rollouts. With `engine: server`, an engine is chosen as with `auto`.
        max_length: Maximum number of tokens of prompt and response together.
        sequences: How many responses are sampled together.
    """

    def __init__(self, config: RolloutConfig, max_length: int, sequences: int = 64) -> None:
        self._config = config
        self._sizing = EngineSizing.from_config(config, max_length, sequences)
        self._engine: Engine | None = None
        self._shape: dict[str, Any] = {}

    def of(self, model: PreTrainedModel, folder: str | Path) -> Engine:
        """Return the engine with the weights of `model`, which was loaded from `folder`."""
        shape = _shape(model)
        if self._engine is not None and shape == self._shape:
            self._engine.update_weights(plain_weights(model, self._sizing.dtype), self._engine.version + 1)
        else:
            self.close()
            self._engine = make_engine(self._config, folder, self._sizing, tokenizer=folder)
            self._shape = shape
        return self._engine

    def sleep(self) -> None:
        """Release the engine's memory until the next model, where the engine can."""
        if self._engine is not None:
            self._engine.sleep()

    def close(self) -> None:
        """Stop the engine and release its memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            release_memory()


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """Return the settings of a model's config that must be the same for an engine to take its weights."""
    config: dict[str, Any] = model.config.to_dict()
    return {
        key: value for key, value in config.items() if not key.startswith("_") and key not in _NOT_PART_OF_THE_SHAPE
    }
