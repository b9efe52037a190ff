"""Memory of one process, in bytes by purpose.

What autograd keeps is counted on fake tensors (`minillm.models.shape`); everything else is a sum of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minillm.loss.token_scores import chunk_of
from minillm.models.attention import training_attention
from minillm.models.config import AdapterConfig
from minillm.models.shape import Shape, kept_bytes
from minillm.rollout.engines.vllm_memory import (
    CPU_BLOCK,
    GIB,
    buffer_bytes,
    cache_needed,
    cache_wanted,
    why_not_mixed,
    why_not_on_cpus,
)
from minillm.run.plan.machine import Machine
from minillm.run.plan.work import StageTraining
from minillm.run.recipe import Recipe

Parts = dict[str, float]
"""Bytes by purpose."""

PROCESS = 1.0 * GIB  # the libraries; on a GPU its context and communication buffers
BATCH_SIZE = 64  # sequences that are sampled together where nothing is trained; also the transformers engine's batch
# Bytes of a quantised weight. The scales of NF4, which are stored in 8 bits themselves, add an eighth of a bit.
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.516}
_TRL_TILE = (4096, 32768)  # tokens, and entries of the vocabulary, of a tile of TRL's loss
_GPU_BLOCK = 16  # tokens of a block of vLLM's cache by default
_FLOAT32 = 4  # bytes: master weights, their gradients, each of two moments, sums over the vocabulary


def frozen_weights(model: Shape, itemsize: int, quantization: str | None) -> float:
    """Bytes of a frozen model's weights. All layers but the embeddings and the head are quantised.

    Args:
        model: the model.
        itemsize: bytes of a weight that is not quantised.
        quantization: `8bit`, `4bit` or None.

    Returns:
        The bytes of the whole model.
    """
    if quantization is None:
        return model.parameters * itemsize
    return model.body * _QUANTIZED_BYTES[quantization] + (model.parameters - model.body) * itemsize


def trained_weights(training: StageTraining, model: Shape) -> Parts:
    """Memory of a model that is trained: its weights, their gradients and moments.

    Args:
        training: the stage that trains it.
        model: the model.

    Returns:
        The bytes in one process by purpose. The weights are named `student` or `teacher`.
    """
    machine, lora = training.machine, training.recipe.student.lora
    shards = machine.processes if machine.shard else 1
    gathered: Parts = {}
    if shards > 1:
        # Weights outside the blocks stay gathered through an update. Of the blocks, the one that is computed and the
        # next one are gathered, and the gradient of a third is being reduced.
        weights = model.parameters - model.body + 3 * model.body / model.layers
        gathered["gathered weights"] = training.itemsize * weights
    if training.has_adapter and lora is not None:
        adapter = adapter_weights(lora, model)
        whole = frozen_weights(model, training.itemsize, lora.quantization)
        return gathered | {"student": whole / shards, "adapter with gradients and moments": 4 * _FLOAT32 * adapter}
    sizes = {training.trains: _FLOAT32, "gradients": _FLOAT32, "moments": 2 * _FLOAT32}
    if machine.processes > 1 and not machine.shard:
        sizes["gradient buckets"] = _FLOAT32  # DDP's, which hold a copy of all gradients
    return gathered | {part: model.parameters * itemsize / shards for part, itemsize in sizes.items()}


def adapter_weights(lora: AdapterConfig, model: Shape) -> float:
    """Number of weights of a LoRA adapter on all linear layers of a body with gated feed-forward layers.

    Args:
        lora: the settings of the adapter, of which the rank counts.
        model: the model that it is added to.
    """
    return lora.rank * model.layers * (11 * model.hidden + 3 * model.inner)


def activations(training: StageTraining, model: Shape, length: int) -> float:
    """What autograd keeps of the forward over one micro-batch.

    Args:
        training: the stage that trains the model.
        model: the model.
        length: tokens of each sequence.

    Returns:
        The bytes in one process.
    """
    attention = None
    if not training.definition.uses_trl:
        dtype = torch.bfloat16 if training.itemsize == 2 else torch.float32
        attention = training_attention("cuda" if training.machine.gpu else "cpu", dtype, length)
    return kept_bytes(
        model,
        training.micro_batch_size,
        length,
        attention=attention,
        half=training.itemsize == 2,
        checkpointing=training.argument("gradient_checkpointing"),
        sharded=training.machine.shard,
    )


def scoring_head(model: Shape, tokens: int, itemsize: int, *, with_teacher: bool, gpu: bool) -> float:
    """Memory of the output head in this library's losses.

    It consists of the logits of one chunk of tokens with the sums over the vocabulary, on a GPU of a copy of the
    student's head in bfloat16, of the head's gradient, and of the hidden states with their gradient.

    Args:
        model: the model that is trained.
        tokens: tokens of a micro-batch that have a loss.
        itemsize: bytes of the numbers that the stage computes with.
        with_teacher: whether the logits of the teacher are computed beside those of the model.
        gpu: whether the stage runs on a GPU.

    Returns:
        The bytes in one process.
    """
    vocabulary = model.head // model.hidden
    logits = min(chunk_of(vocabulary, gpu=gpu), tokens) * vocabulary * _FLOAT32 * (4 if with_teacher else 3)
    copy = model.head * 2 if gpu and itemsize == 2 else 0
    return logits + copy + model.head * _FLOAT32 + 2 * tokens * model.hidden * _FLOAT32


def trl_head(model: Shape, tokens: int, gpu: bool) -> float:
    """Memory of the output head in TRL's loss, which is computed in tiles.

    On a GPU it is one tile in bfloat16 and the gradient of the head's weights. On a CPU it is eight times a tile in
    float32, as observed in its backward.

    Args:
        model: the model that is trained.
        tokens: tokens of a micro-batch that the head reads: on a GPU those that have a loss, on a CPU all of them.
        gpu: whether the stage runs on a GPU.

    Returns:
        The bytes in one process.
    """
    vocabulary = model.head // model.hidden
    tile = min(tokens, _TRL_TILE[0]) * min(vocabulary, _TRL_TILE[1])
    return tile * 2 + model.head * _FLOAT32 if gpu else 8 * tile * _FLOAT32


@dataclass(frozen=True)
class SampledModel:
    """A model that the recipe's engine samples, and the memory that this takes."""

    recipe: Recipe
    """The recipe, whose rollout settings apply."""
    machine: Machine
    """The machine that it is planned for."""
    model: Shape
    """The model that is sampled."""
    itemsize: int
    """Bytes of a weight in the engine."""
    teacher: Shape | None = None
    """The teacher that the engine mixes in, if any."""

    @property
    def by_transformers(self) -> bool:
        """Whether transformers samples the model in this process, rather than vLLM."""
        engine, teacher, gpu = self.recipe.rollout.engine, self.teacher, self.machine.gpu
        if engine == "transformers" or not self.machine.vllm:
            return True
        # A server holds its teacher as it was started.
        if teacher is not None and engine != "server":
            quantized = self.recipe.teacher.first.quantization is not None
            if quantized or why_not_mixed(self.model.config, teacher.config, gpu) is not None:
                return True
        return not gpu and any(why_not_on_cpus(model.config) is not None for model in self._models)

    @property
    def _models(self) -> list[Shape]:
        return [self.model] if self.teacher is None else [self.model, self.teacher]

    def flops(self, prompt: float, response: float, per_prompt: int) -> float:
        """Operations of sampling one response, the mean over the responses to a prompt.

        vLLM finds a prompt that it has read before in its cache, but for the last block, which is not full or has to be
        read for the first token. The transformers engine reads every prompt again.

        Args:
            prompt: tokens of a prompt, on average.
            response: tokens of a response, on average.
            per_prompt: responses to each prompt, which are sampled together.
        """
        block = _GPU_BLOCK if self.machine.gpu else CPU_BLOCK
        known = 0.0 if self.by_transformers else max(prompt - (block + 1) / 2, 0.0)  # between 1 and all of a block
        first, others = (
            sum(model.dimensions.decoding([prompt], [response], [cached]) for model in self._models)
            for cached in (0.0, known)
        )
        return (first + (per_prompt - 1) * others) / per_prompt

    def engine(self, sequences: int, length: int, *, copied: bool = False) -> Parts:
        """Memory of the engine.

        vLLM holds its own copy of the weights and a cache. The transformers engine samples the model that is there: it
        adds the cache and the forward over the prompts. A teacher that is mixed in has the same parts.

        Args:
            sequences: responses that are sampled together.
            length: tokens of the longest prompt with the longest response.
            copied: whether the model that is there is sharded, so that the transformers engine samples a whole copy.

        Returns:
            The bytes in one process by purpose.
        """
        model, itemsize, machine, teacher = self.model, self.itemsize, self.machine, self.teacher
        if self.by_transformers:
            rows = min(sequences, BATCH_SIZE)
            numbers = rows * self.recipe.data.max_prompt_tokens * (4 * model.hidden + 3 * model.inner)
            copy: Parts = {"whole copy for sampling": model.parameters * itemsize} if copied else {}
            own: Parts = {
                "the sampled model's cache": rows * length * model.cached(itemsize),
                "activations of the prompts": numbers * itemsize,
            }
            mixed: Parts = {} if teacher is None else {"teacher's cache": rows * length * teacher.cached(itemsize)}
            return copy | own | mixed
        size = {"max_length": length, "sequences": sequences, "itemsize": itemsize}
        needed = sum(cache_needed(each.config, **size) for each in self._models)
        cache = cache_wanted(needed, self.recipe.rollout.engine_memory, machine.gpu)
        parts: Parts = {"vLLM's weights": model.parameters * itemsize, "vLLM's cache": cache}
        if teacher is not None:
            parts["vLLM's copy of the teacher"] = teacher.parameters * itemsize
        if machine.gpu:
            vocabulary = max(each.config.vocab_size for each in self._models)
            parts["vLLM's buffers"] = buffer_bytes(vocabulary, sequences, mixes=teacher is not None)
        return parts

    def engine_while_training(self) -> tuple[Parts, bool]:
        """Memory of the engine that samples rollouts of a model while it is trained.

        Returns:
            The bytes in one process by purpose, and whether the engine holds them during weight updates as well. There
            are none where the recipe names servers that the run does not start itself.
        """
        rollout, data = self.recipe.rollout, self.recipe.data
        if rollout.engine == "server" and rollout.servers != "auto":
            return {}, False
        own_server = rollout.engine == "server"  # one for all processes, on the GPU of the first
        sequences = rollout.num_rollouts if own_server else max(rollout.num_rollouts // self.machine.processes, 1)
        parts = self.engine(sequences, data.max_prompt_tokens + rollout.max_new_tokens, copied=self.machine.shard)
        # vLLM in the trainer's process frees its memory during updates, but on GPUs only.
        return parts, own_server or (not self.machine.gpu and not self.by_transformers)
