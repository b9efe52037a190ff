"""Bytes in one process by what they are for. What autograd keeps is counted (`models.shape`), the rest is sums of sizes."""

from __future__ import annotations

from typing import Any

from minillm.loss.token_scores import CHUNK
from minillm.models.shape import Shape, kept_bytes
from minillm.rollout.engines.vllm_memory import GIB, buffer_bytes, cache_needed, cache_wanted, why_not_on_cpus
from minillm.run.plan.machine import Machine
from minillm.run.plan.work import item_size
from minillm.run.recipe import Recipe
from minillm.run.training_arguments import argument

Parts = dict[str, float]

PROCESS = 1.0 * GIB  # libraries; on a GPU its context and communication buffers
AT_ONCE = 64  # sequences that an engine makes room for where nothing is trained; the transformers engine's batch
_QUANTIZED = {"8bit": 1.0, "4bit": 0.516}  # bytes a weight: NF4's scales, themselves in 8 bits, take an eighth of a bit
_TRL_TILE = (4096, 32768)  # tokens, entries of the vocabulary
_WIDE = 4  # bytes of float32: masters, their gradients, two moments, sums over the vocabulary


def held(model: Shape, size: int, quantization: str | None) -> float:
    """A frozen model's weights: quantised layers are all but the embeddings and the head."""
    if quantization is None:
        return model.parameters * size
    return model.body * _QUANTIZED[quantization] + (model.parameters - model.body) * size


def reading_teacher(recipe: Recipe, machine: Machine, teacher: Shape, size: int) -> float:
    """The teacher in the warm-up and minillm stages, which may have it in shards."""
    whole = held(teacher, size, recipe.teacher.quantization)
    return whole / machine.processes if recipe.teacher.shard else whole


def trained(recipe: Recipe, machine: Machine, model: Shape, training: dict[str, Any], name: str) -> Parts:
    """Weights, their gradients and moments. `name`: of what is trained; the student's adapter, where it has one."""
    shards, size, lora = machine.processes if machine.shard else 1, item_size(training, machine), recipe.student.lora
    # What belongs to no block stays gathered through an update; of the blocks the one at work, the next, and a gradient on its way.
    gathered = (
        {"gathered weights": size * (model.parameters - model.body + 3 * model.body / model.layers)}
        if shards > 1
        else {}
    )
    if name == "student" and lora is not None:
        adapter = lora.rank * model.layers * (11 * model.hidden + 3 * model.inner)
        whole = held(model, size, lora.quantization)
        return gathered | {"student": whole / shards, "adapter, gradients, moments": 4 * _WIDE * adapter}
    sizes = {name: _WIDE, "gradients": _WIDE, "moments": 2 * _WIDE}
    if machine.processes > 1 and not machine.shard:
        sizes["gradients on their way"] = _WIDE  # DDP's buckets, a copy of all
    return gathered | {part: model.parameters * bytes_each / shards for part, bytes_each in sizes.items()}


def activations(machine: Machine, model: Shape, training: dict[str, Any], length: int) -> float:
    """What autograd keeps of a micro-batch of sequences of `length` tokens."""
    return kept_bytes(
        model, argument(training, "per_device_train_batch_size"), length, half=item_size(training, machine) == 2,
        checkpointing=argument(training, "gradient_checkpointing"), sharded=machine.shard,
    )  # fmt: skip


def scoring_head(model: Shape, other: Shape | None, tokens: int, size: int) -> float:
    """The head's chunk of logits with what is summed over it, its gradient, and the states'."""
    width = model.head // model.hidden
    logits = min(CHUNK, tokens) * width * _WIDE * (4 if other is not None else 3)
    return logits + (model.head * 2 if size == 2 else 0) + model.head * _WIDE + 2 * tokens * model.hidden * _WIDE


def trl_head(model: Shape, tokens: int, gpu: bool) -> float:
    """What TRL's head takes, in tiles: on a GPU of the tokens that count, in bfloat16, and the gradient of the weights; elsewhere of all of
    them, in float32, eight times over (as seen in its backward)."""
    width = model.head // model.hidden
    tile = min(tokens, _TRL_TILE[0]) * min(width, _TRL_TILE[1])
    return tile * 2 + model.head * _WIDE if gpu else 8 * tile * _WIDE


def sampled_by_transformers(recipe: Recipe, machine: Machine, model: Shape) -> bool:
    """Whether no vLLM samples the model in this process."""
    if recipe.rollout.engine == "transformers" or not machine.vllm:
        return True
    return not machine.gpu and why_not_on_cpus(model.config) is not None


def engine(
    recipe: Recipe, machine: Machine, model: Shape, size: int, sequences: int, length: int, *, copied: bool = False
) -> Parts:  # fmt: skip
    """What an engine holds: its copy of the weights and its cache; where the model at hand is sampled, the cache and its forward alone.

    Args:
        size: bytes of a weight.
        sequences: drawn together, of `length` tokens.
        copied: the model at hand is in shards, of which no process can sample alone.
    """
    if sampled_by_transformers(recipe, machine, model):
        rows = min(sequences, AT_ONCE)
        reading = rows * recipe.data.max_prompt_tokens * (4 * model.hidden + 3 * model.inner) * size
        copy: Parts = {"a whole copy to sample": model.parameters * size} if copied else {}
        return copy | {
            "the sampled model's cache": rows * length * model.cached(size),
            "its reading of prompts": reading,
        }
    needed = cache_needed(model.config, max_length=length, sequences=sequences, itemsize=size)
    cache = cache_wanted(needed, recipe.rollout.engine_memory, machine.gpu)
    parts: Parts = {"vLLM's weights": model.parameters * size, "vLLM's cache": cache}
    if machine.gpu:
        parts["vLLM's buffers"] = buffer_bytes(model.head // model.hidden, sequences)
    return parts


def rollout_engine(recipe: Recipe, machine: Machine, student: Shape, size: int) -> tuple[Parts, bool]:
    """What samples the student while it is trained, and whether it holds that through the updates too."""
    rollout, length = recipe.rollout, recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    if rollout.engine == "server" and rollout.servers != "auto":
        return {}, False
    own = rollout.engine == "server"  # one for all processes, on the GPU of the first
    sequences = rollout.num_rollouts if own else max(rollout.num_rollouts // machine.processes, 1)
    parts = engine(recipe, machine, student, size, sequences, length, copied=machine.shard)
    # In its process vLLM sleeps through the updates, on GPUs alone.
    return parts, own or (not machine.gpu and not sampled_by_transformers(recipe, machine, student))
