"""Says which setting to change where the memory of a device ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minillm.errors import OutOfMemory

_SHORTER = "or shorten data.max_prompt_tokens and rollout.max_new_tokens"
_CHECKPOINTING = "set gradient_checkpointing: true"
_ENGINE = "lower rollout.engine_memory, or use servers on other GPUs (rollout.servers)"
# What helps in each phase, after the micro-batch that update, teacher and rescoring read.
_REMEDIES = {
    "update": _CHECKPOINTING,
    "teacher": "load the teacher in 8 bits (teacher.quantization), shard it (teacher.shard) or serve it",
    "engine_start": _ENGINE,
    "sync": _ENGINE,
    "rollout": "sample fewer responses at once (rollout.num_rollouts), or with vLLM (rollout.engine)",
}
_BY_MICRO_BATCH = ("update", "teacher", "rescoring", "validation")


@contextmanager
def memory_named(phase: str, args: Any, update: int) -> Iterator[None]:
    """Turn an error of PyTorch about memory that ran out into one that names a setting.

    Halving the micro-batch and doubling the accumulation leaves every update as it was: losses are divided by the
    tokens of the whole update. A run that is started again with both goes on from its last checkpoint.

    Args:
        phase: What was done.
        args: The arguments of the training.
        update: The number of the last update.

    Raises:
        OutOfMemory: Memory ran out in the body of the `with` statement.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        ways = []
        if phase in _BY_MICRO_BATCH and size > 1:
            halved = f"per_device_train_batch_size: {-(-size // 2)} and gradient_accumulation_steps: {2 * accumulation}"
            ways.append(f"set {halved} (now {size} and {accumulation}), which trains on the same responses")
        ways += [_REMEDIES[phase]] if phase in _REMEDIES else []
        raise OutOfMemory(
            f"update {update + 1}: the GPU's memory ran out in the phase {phase}: {'; or '.join([*ways, _SHORTER])}. "
            f"PyTorch says: {str(error).splitlines()[0][:300]}"
        ) from error
