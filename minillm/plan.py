"""What a recipe takes before it is launched: memory of each phase in one process, arithmetic, hours. No weights are read.

What autograd keeps is counted (`models.shape`), the rest is sums of sizes; hours rest on assumptions, which are stated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from minillm.loss.token_scores import CHUNK
from minillm.models.shape import Shape, kept_bytes, shape_of
from minillm.recipe import Recipe, Source
from minillm.rollout.vllm_engine import why_not_on_cpus

GIB = 1 << 30
_PROCESS = 1.0 * GIB  # libraries; on a GPU its context and communication buffers
_QUANTIZED = {"8bit": 1.0, "4bit": 0.516}  # bytes a weight: NF4's scales, themselves in 8 bits, take an eighth of a bit
_AT_ONCE = 64  # sequences that an engine makes room for where nothing is trained; the transformers engine's batch
_TRL_TILE = (4096, 32768)  # tokens, entries of the vocabulary
# Seconds however few the numbers, as measured on an H100: of a layer's forward and backward (PyTorch's launches), and of a step of vLLM.
_LAYER, _STEP = 4e-3, 12e-3
_WIDE = 4  # bytes of float32: masters, their gradients, two moments, sums over the vocabulary


@dataclass(frozen=True)
class Machine:
    """What a recipe is launched on; each process has a GPU, or all have this machine's CPU."""

    processes: int = 1
    memory: int = 80 * GIB
    gpu: bool = True
    bf16: bool = True
    """Whether it multiplies bfloat16; a CPU that does not computes in float32 whatever the recipe says."""
    shard: bool = False
    """The student in shards (FSDP2, ZeRO-3)."""
    flops: float = 989e12
    """Of one GPU in bfloat16 (an H100)."""
    utilisation: float = 0.35
    """Share of them that training and scoring reach (MFU)."""
    bandwidth: float = 3.35e12
    """Bytes a second from its memory, which bound decoding, of which it reaches half."""

    @property
    def itemsize(self) -> int:
        """Bytes of a weight where no training setting says otherwise."""
        return 2 if self.bf16 else _WIDE


@dataclass
class Phase:
    """Bytes in one process by what they are for, and what the phase costs in all."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    seconds: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.parts.values())


@dataclass
class Plan:
    phases: list[Phase]
    machine: Machine
    overrides: list[str] = field(default_factory=list)  # that `fitted` made

    @property
    def peak(self) -> float:
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    @property
    def hours(self) -> float:
        return sum(phase.seconds for phase in self.phases) / 3600


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """Peak memory of a process, floating-point operations and seconds of each training phase."""
    teacher = shape_of(recipe.teacher.source)
    pruned = recipe.student.source == "prune"
    student = shape_of(recipe.teacher.source, recipe.student.keep_layers) if pruned else shape_of(recipe.student.source)
    phases = []
    if "finetune" in recipe.stages:
        phases += _supervised("finetune", recipe, machine, teacher, None, recipe.finetune)
    if "responses" in recipe.stages:
        phases.append(
            _answers(
                "responses", recipe, machine, teacher, recipe.responses, _rows(recipe.data.train) * recipe.responses.samples_per_prompt
            )
        )
    for stage, training in (("warmup", recipe.warmup.training), ("sft", recipe.sft)):
        if stage in recipe.stages:
            # Warm-up always holds the teacher, fine-tuning for the KL of its validation.
            held = teacher if stage == "warmup" or recipe.data.validation is not None else None
            phases += _supervised(stage, recipe, machine, student, held, training)
    if "minillm" in recipe.stages:
        phases += _on_policy(recipe, machine, student, teacher)
    if "evaluate" in recipe.stages:
        for name, model in (("teacher", teacher), ("student", student)):
            models = 1 if model is teacher else 1 + sum(stage in recipe.stages for stage in ("warmup", "sft", "minillm"))  # and the start
            drawn = models * _rows(recipe.data.heldout) * len(recipe.evaluate.seeds)
            scored = _answers(f"evaluate: {name}", recipe, machine, model, recipe.evaluate, drawn)
            scored.parts[name] = model.parameters * machine.itemsize
            if model is student:  # one process reads it, so there are no shards
                scored.parts["teacher"] = _held(teacher, machine.itemsize, recipe.teacher.quantization)
            phases.append(scored)
    for phase in phases:
        cache = phase.parts.get("vLLM's cache")
        if cache and machine.gpu and recipe.rollout.engine_memory is None:
            # Where there is no room for all sequences at once, vLLM makes do with a smaller cache.
            phase.parts["vLLM's cache"] = max(cache - max(phase.peak - machine.memory, 0), min(cache, GIB / 8))
    return Plan(phases, machine)


def update_responses(training: dict[str, Any], machine: Machine) -> int:
    """Responses that an update trains on, in all processes."""
    return training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1) * machine.processes


def fitted(recipe: Recipe, machine: Machine, overridden: Any) -> tuple[Plan, Recipe]:
    """The plan of a recipe with as few changes as make it fit, in the order of what they cost.

    Args:
        overridden: gives the recipe with some `section.key=value` settings changed.
    """
    changes: list[str] = []
    current = plan(recipe, machine)
    for candidates in _remedies(recipe, machine) + _concessions(recipe, machine):
        if current.fits:
            break
        try:
            changed = overridden([*changes, *candidates])
        except ValueError:  # refused together with the rest of the recipe
            continue
        found = plan(changed, machine)
        if found.peak < current.peak:
            last = {change.split("=")[0]: change for change in [*changes, *candidates]}  # a batch that is halved again
            changes, recipe, current = list(last.values()), changed, found
    return replace(current, overrides=changes), recipe


def advice(recipe: Recipe, machine: Machine, overridden: Any) -> list[str]:
    """What would make the largest phase smaller, besides smaller batches; see `fitted`."""
    peak, out = plan(recipe, machine).peak, []
    if machine.processes > 1 and not machine.shard and plan(recipe, replace(machine, shard=True)).peak < peak:
        out.append("what is trained in shards: accelerate launch --config_file recipes/accelerate/fsdp2-8-gpus.yaml (plan with --shard)")
    for settings in [["teacher.shard=true", "rollout.teacher_mix=0"]] * (machine.processes > 1) + _concessions(recipe, machine):
        with suppress(ValueError):  # what cannot be combined with the rest is no advice
            if plan(overridden(settings), machine).peak < peak:
                out.append(" ".join(settings))
    return out


def _concessions(recipe: Recipe, machine: Machine) -> list[list[str]]:
    """Settings that train something else than the recipe, but nearly so, the least costly first."""
    source = recipe.teacher.source if recipe.student.source == "prune" else recipe.student.source
    quantizable = not machine.shard and shape_of(source).config.model_type != "gpt2"  # else the run refuses it
    out = []
    if not recipe.teacher.quantization and not recipe.teacher.shard:
        out += [["teacher.quantization=8bit"], ["teacher.quantization=4bit"]]
    if recipe.student.lora is None:
        out += [["student.lora.rank=16"]] + [["student.lora.rank=16", "student.lora.quantization=4bit"]] * quantizable
    elif recipe.student.lora.quantization is None and quantizable:
        out.append(["student.lora.quantization=4bit"])
    return out


def _remedies(recipe: Recipe, machine: Machine) -> list[list[str]]:
    sections = [
        (name, training)
        for name, training, stage in (
            ("training", recipe.training, "minillm"), ("warmup.training", recipe.warmup.training, "warmup"), ("sft", recipe.sft, "sft"),
            ("finetune", recipe.finetune, "finetune"),
        )
        if stage in recipe.stages
    ]  # fmt: skip
    out = [[f"{name}.gradient_checkpointing=true" for name, training in sections if not training.get("gradient_checkpointing")]]
    for halvings in (1, 2, 3, 4, 5):
        halved = []
        for name, training in sections:
            micro, accumulation = training.get("per_device_train_batch_size", 8), training.get("gradient_accumulation_steps", 1)
            if micro % (1 << halvings) == 0:  # an update keeps its responses
                halved += [f"{name}.per_device_train_batch_size={micro >> halvings}"]
                halved += [f"{name}.gradient_accumulation_steps={accumulation << halvings}"]
        out.append(halved)
    return [candidates for candidates in out if candidates]


def _training_parts(recipe: Recipe, machine: Machine, model: Shape, training: dict[str, Any], adapted: bool) -> dict[str, float]:
    """Weights, their gradients and moments."""
    shards = machine.processes if machine.shard else 1
    half = bool(training.get("bf16")) and machine.bf16
    lora = recipe.student.lora
    # What belongs to no block stays gathered through an update; of the blocks the one at work, the next, and a gradient on its way.
    size = 2 if half else _WIDE
    gathered = {"gathered weights": size * (model.parameters - model.body + 3 * model.body / model.layers)} if shards > 1 else {}
    if adapted and lora is not None:
        adapter = lora.rank * model.layers * (11 * model.hidden + 3 * model.inner)
        whole = _held(model, size, lora.quantization)
        return gathered | {"student": whole / shards, "adapter, gradients, moments": 4 * _WIDE * adapter}
    names = {"student" if adapted else "teacher": _WIDE, "gradients": _WIDE, "moments": 2 * _WIDE}
    if machine.processes > 1 and not machine.shard:
        names["gradients on their way"] = _WIDE  # DDP's buckets, a copy of all
    return gathered | {name: model.parameters * size / shards for name, size in names.items()}


def _scoring_parts(model: Shape, other: Shape | None, tokens: int, half: bool) -> dict[str, float]:
    """The head's chunk of logits with what is summed over it, its gradient, and the states'."""
    width = model.head // model.hidden
    rows = min(CHUNK, tokens)
    logits = rows * width * _WIDE * (4 if other is not None else 3)
    return {"head": logits + (0 if not half else model.head * 2) + model.head * _WIDE + 2 * tokens * model.hidden * _WIDE}


def _trl_head(model: Shape, tokens: int, gpu: bool) -> float:
    """What TRL's head takes, in tiles: on a GPU of the tokens that count, in bfloat16, and the gradient of the weights; elsewhere of all of
    them, in float32, eight times over (as seen in its backward)."""
    width = model.head // model.hidden
    tile = min(tokens, _TRL_TILE[0]) * min(width, _TRL_TILE[1])
    return tile * 2 + model.head * _WIDE if gpu else 8 * tile * _WIDE


def _supervised(name: str, recipe: Recipe, machine: Machine, model: Shape, other: Shape | None, training: dict[str, Any]) -> list[Phase]:
    rows, length = training.get("per_device_train_batch_size", 8), recipe.data.max_prompt_tokens + recipe.responses.max_new_tokens
    half = bool(training.get("bf16")) and machine.bf16
    checkpointing = bool(training.get("gradient_checkpointing"))
    idle = {"process": _PROCESS, **_training_parts(recipe, machine, model, training, adapted=name != "finetune")}
    if other is not None:  # beside TRL's trainer it is whole in every process
        idle["teacher"] = (
            _teacher_bytes(recipe, machine, other, half)
            if name == "warmup"
            else _held(other, 2 if half else _WIDE, recipe.teacher.quantization)
        )
    parts = dict(idle)
    parts["activations"] = kept_bytes(model, rows, length, half=half, checkpointing=checkpointing, sharded=machine.shard)
    tokens = rows * recipe.responses.max_new_tokens
    reads = other if name == "warmup" and recipe.warmup.cross_entropy < 1 else None
    if name == "warmup":
        parts |= _scoring_parts(model, reads, tokens, half)
    else:
        parts["head"] = _trl_head(model, tokens if machine.gpu else rows * length, machine.gpu)
    if reads is not None:
        parts["teacher's states"] = tokens * reads.hidden * (2 if half else _WIDE)
    passes, update = training.get("gradient_accumulation_steps", 1), update_responses(training, machine)
    updates = training.get("max_steps", -1)
    if updates < 0:
        updates = training.get("num_train_epochs", 3) * _rows(recipe.data.train) / update
    per_token = (8 if checkpointing else 6) * model.body + 6 * model.head + (0 if reads is None else 2 * (reads.body + reads.head))
    flops = updates * update * length * per_token
    layers = model.layers * (4 / 3 if checkpointing else 1) + (0 if reads is None else reads.layers / 3)
    trained = Phase(name, parts, flops, _training_seconds(flops, machine, updates * passes * layers))
    return [trained, *_validation(name, recipe, machine, model, training, updates, idle, trained)]


def _validation(
    name: str, recipe: Recipe, machine: Machine, model: Shape, training: dict[str, Any], updates: float, idle: dict[str, float],
    trained: Phase,
) -> list[Phase]:  # fmt: skip
    """What sampling adds where a stage is validated; on a CPU its engine stays while the stage trains."""
    if recipe.data.validation is None or training.get("eval_strategy", "no") == "no":
        return []
    size = 2 if training.get("bf16") and machine.bf16 else _WIDE
    own, length = recipe.rollout.num_rollouts // machine.processes, recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    engine = {} if recipe.rollout.engine == "server" else _engine_parts(recipe, machine, model, size, own, length, copied=machine.shard)
    if not machine.gpu and recipe.rollout.engine != "transformers":
        trained.parts |= engine
    phase = Phase(f"{name}: validation", {key: value for key, value in idle.items() if key != "gradients"} | engine)
    phase.flops, phase.seconds = _validating(recipe, machine, model, training, updates, size)
    return [phase]


def _validating(recipe: Recipe, machine: Machine, model: Shape, training: dict[str, Any], updates: float, size: int) -> tuple[float, float]:
    """Operations and seconds of all validations of a stage: one answer to each row, read once by the student and the teacher."""
    if recipe.data.validation is None or training.get("eval_strategy", "no") == "no":
        return 0.0, 0.0
    times = training.get("num_train_epochs", 3) if training["eval_strategy"] == "epoch" else updates / (training.get("eval_steps") or 500)
    rows, length = _rows(recipe.data.validation), recipe.data.max_prompt_tokens + recipe.rollout.max_new_tokens
    rows = min(rows, recipe.data.validation_limit or rows)
    flops = times * rows * length * 4 * (model.body + model.head)
    decoding = _decoding(machine, model, size, -(-rows // machine.processes), recipe.rollout.max_new_tokens, length)
    return flops, _seconds(flops, machine) + times * decoding


def _answers(name: str, recipe: Recipe, machine: Machine, model: Shape, sizes: Any, drawn: int) -> Phase:
    """Answers of a model that nothing trains, by one process."""
    length = recipe.data.max_prompt_tokens + sizes.max_new_tokens
    parts = {"process": _PROCESS, **_engine_parts(recipe, machine, model, machine.itemsize, _AT_ONCE, length)}
    if _by_transformers(recipe, machine, model):
        parts["the sampled model"] = model.parameters * machine.itemsize
    phase, alone = Phase(name, parts, flops=drawn * length * 2 * model.body), replace(machine, processes=1)
    decoding = _decoding(alone, model, machine.itemsize, _AT_ONCE, sizes.max_new_tokens, length)
    phase.seconds = _seconds(phase.flops, alone) + drawn / _AT_ONCE * decoding
    return phase


def _by_transformers(recipe: Recipe, machine: Machine, model: Shape) -> bool:
    return recipe.rollout.engine == "transformers" or (not machine.gpu and why_not_on_cpus(model.config) is not None)


def _engine_parts(
    recipe: Recipe, machine: Machine, model: Shape, size: int, sequences: int, length: int, *, copied: bool = False
) -> dict[str, float]:
    """What an engine holds: its copy of the weights and its cache; where the model at hand is sampled, the cache and its forward alone.

    Args:
        size: bytes of a weight.
        sequences: drawn together, of `length` tokens.
        copied: the model at hand is in shards, of which no process can sample alone.
    """
    rollout = recipe.rollout
    if _by_transformers(recipe, machine, model):
        rows = min(sequences, _AT_ONCE)
        reading = rows * recipe.data.max_prompt_tokens * (4 * model.hidden + 3 * model.inner) * size
        copy: dict[str, float] = {"a whole copy to sample": model.parameters * size} if copied else {}
        return copy | {"the sampled model's cache": rows * length * model.cached(size), "its reading of prompts": reading}
    cache = rollout.engine_memory * GIB if rollout.engine_memory else sequences * (length + 32) * model.cached(size)
    parts = {"vLLM's weights": model.parameters * size, "vLLM's cache": min(cache, 4 * GIB) if not machine.gpu else cache}
    if machine.gpu:
        parts["vLLM's buffers"] = 2 * GIB + 5 * min(max(sequences, 16), 256) * (model.head // model.hidden) * _WIDE
    return parts


def _decoding(machine: Machine, model: Shape, size: int, sequences: int, new_tokens: int, length: int) -> float:
    """Seconds of a batch of answers: weights and cache are read once a token, by half of the memory's bandwidth."""
    steps = new_tokens * -(-sequences // 256)
    read = model.parameters * size + min(sequences, 256) * length / 2 * model.cached(size)
    return steps * max(2 * read / machine.bandwidth, _STEP) if machine.gpu else 0.0


def _rows(source: Source) -> int:
    """A data set that has not been read counts as Dolly's 11,435, a part of it as what it says of itself."""
    file = source.file
    if file is None or not file.is_file():
        part = re.fullmatch(r"\w+\[(\d*):(\d+)\]", source.split)
        return int(part[2]) - int(part[1] or 0) if part else 11_435
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _on_policy(recipe: Recipe, machine: Machine, student: Shape, teacher: Shape) -> list[Phase]:
    training, rollout = recipe.training, recipe.rollout
    half = bool(training.get("bf16")) and machine.bf16
    size = 2 if half else _WIDE
    checkpointing = bool(training.get("gradient_checkpointing"))
    rows, own = training.get("per_device_train_batch_size", 8), rollout.num_rollouts // machine.processes
    length = recipe.data.max_prompt_tokens + rollout.max_new_tokens
    shared = {"process": _PROCESS, **_training_parts(recipe, machine, student, training, adapted=True)}
    if not recipe.teacher.servers:
        shared["teacher"] = _teacher_bytes(recipe, machine, teacher, half)
        shared["teacher's states"] = own * rollout.max_new_tokens * teacher.hidden * size
    idle = {name: value for name, value in shared.items() if name != "gradients"}  # freed after each update
    engine = {} if rollout.engine == "server" else _engine_parts(recipe, machine, student, size, own, length, copied=machine.shard)
    drawing = Phase("minillm: rollouts", idle | engine)
    if rollout.teacher_mix and not recipe.teacher.servers:
        drawing.parts["teacher's cache"] = own * length * teacher.cached(size)
    update = dict(shared)
    if not machine.gpu and rollout.engine != "transformers":
        update |= engine  # vLLM sleeps on GPUs alone
    sharded = machine.shard
    update["activations"] = kept_bytes(student, rows, length, half=half, checkpointing=checkpointing, sharded=sharded)
    tokens = rows * rollout.max_new_tokens
    text = recipe.data.text is not None and recipe.objective.language_model > 0
    if text:
        block = recipe.objective.language_model_block
        update["activations"] += kept_bytes(student, rows, block, half=half, checkpointing=checkpointing, sharded=sharded)
        tokens += rows * block
    update |= _scoring_parts(student, teacher, tokens, half)
    training_phase = Phase("minillm: update", update)
    updates = max(training.get("max_steps", 1000), 1)
    passes = training.get("gradient_accumulation_steps", 1)
    responses = updates * update_responses(training, machine)
    drawn = responses / rollout.inner_epochs
    training_phase.flops = responses * length * ((8 if checkpointing else 6) * student.body) + responses * rollout.max_new_tokens * (
        6 * student.head + 2 * teacher.head
    )
    if text:
        training_phase.flops += responses * recipe.objective.language_model_block * 6 * (student.body + student.head)
    layers = student.layers * (4 / 3 if checkpointing else 1) * (2 if text else 1)
    training_phase.seconds = _training_seconds(training_phase.flops, machine, updates * passes * layers)
    drawing.flops = drawn * length * 2 * (student.body + teacher.body)
    batches = drawn / rollout.num_rollouts
    flops, seconds = _validating(recipe, machine, student, training, updates, size)
    drawing.flops += flops
    drawing.seconds = (
        seconds
        + _seconds(drawing.flops - flops, machine)
        + batches * _decoding(machine, student, size, own, rollout.max_new_tokens, length)
    )
    return [drawing, training_phase]


def _teacher_bytes(recipe: Recipe, machine: Machine, teacher: Shape, half: bool) -> float:
    whole = _held(teacher, 2 if half else _WIDE, recipe.teacher.quantization)
    return whole / machine.processes if recipe.teacher.shard else whole


def _held(model: Shape, size: int, quantization: str | None) -> float:
    """Bytes of a frozen model's weights: quantised layers are all but the embeddings and the head."""
    if quantization is None:
        return model.parameters * size
    return model.body * _QUANTIZED[quantization] + (model.parameters - model.body) * size


def _seconds(flops: float, machine: Machine) -> float:
    return flops / (machine.processes * machine.flops * machine.utilisation)


def _training_seconds(flops: float, machine: Machine, layers: float) -> float:
    """Of so many operations of all processes, in so many forwards and backwards of a layer in each."""
    return max(_seconds(flops, machine), layers * _LAYER if machine.gpu else 0.0)


def fewest(recipe: Recipe, machine: Machine) -> int | None:
    """The fewest of 1, 2, 4 … and all of the machine's GPUs that the recipe fits on as it is, the student whole or in shards."""
    counts = sorted({1 << power for power in range(machine.processes.bit_length())} | {machine.processes})
    plans = ((count, shard) for count in counts for shard in (False, True))
    return next((n for n, shard in plans if plan(recipe, replace(machine, processes=n, shard=shard and n > 1)).fits), None)


def table(plans: Sequence[tuple[str, Plan, Plan, int | None]]) -> str:
    """Markdown: one row a recipe, its plan with the student whole in each process and in shards, and the fewest GPUs that it fits on."""

    def cell(plan: Plan) -> str:
        fits = "" if plan.fits else ", **does not fit**"
        return f"{plan.peak / GIB:.0f} GiB ({max(plan.phases, key=lambda phase: phase.peak).name}){fits}"

    rows = "".join(
        f"| {name} | {cell(whole)} | {cell(sharded)} | {least or 'more'} | {whole.hours:.1f} |\n" for name, whole, sharded, least in plans
    )
    return "| recipe | peak per GPU, student whole | in shards | GPUs, at least | hours, estimated |\n|---|---|---|---|---|\n" + rows
