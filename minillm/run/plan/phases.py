"""The plan of a recipe: memory of each phase in one process, arithmetic and seconds.

Memory is that of prompts and answers of full length, which some batch will have. Seconds are those of average ones: prompts as long as
the data's are by their text, answers of references as long as those, and others half as long as they may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from minillm.models.shape import Shape, shape_of
from minillm.rollout.engines.vllm_memory import GIB
from minillm.run.plan import memory, work
from minillm.run.plan.machine import Machine
from minillm.run.plan.work import item_size, update_responses
from minillm.run.recipe import Recipe
from minillm.run.stages import STAGES, stage_named
from minillm.run.training_arguments import argument

# Sampling from the mixture, in rounds, takes so many times as long on a CPU as plain sampling and the teacher's reading (eval/README.md).
# On a GPU the two have not been measured side by side; the plain ones are counted.
_MIXING_ON_A_CPU = 1.8


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
        return max((phase.peak for phase in self.phases), default=0.0)

    @property
    def fits(self) -> bool:
        return self.peak <= self.machine.memory

    @property
    def hours(self) -> float:
        return sum(phase.seconds for phase in self.phases) / 3600


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """Peak memory of a process, floating-point operations and seconds of each phase.

    Raises:
        DataError: a data file that is no such file.
    """
    planner = Planner(recipe, machine)
    phases = [phase for stage in STAGES if stage.name in recipe.stages for phase in stage.phases(planner)]
    for phase in phases:
        cache = phase.parts.get("vLLM's cache")
        if cache and machine.gpu and recipe.rollout.engine_memory is None:
            # Where there is no room for all sequences at once, vLLM makes do with a smaller cache.
            phase.parts["vLLM's cache"] = max(cache - max(phase.peak - machine.memory, 0), min(cache, GIB / 8))
    return Plan(phases, machine)


def _read(model: Shape, tokens: float, answer: float) -> float:
    """Operations of a forward over so many tokens, of which the answer's have logits."""
    return 2 * model.body * tokens + 2 * model.head * answer


class Planner:
    """The phases of one recipe on one machine, from which each stage takes its own."""

    def __init__(self, recipe: Recipe, machine: Machine) -> None:
        self.recipe, self.machine = recipe, machine
        self.teacher = shape_of(recipe.teacher.source)
        pruned = recipe.student.source == "prune"
        self.student = (
            shape_of(recipe.teacher.source, recipe.student.keep_layers) if pruned else shape_of(recipe.student.source)
        )

    def responses(self) -> list[Phase]:
        """The teacher answers the training prompts."""
        drawn = work.rows(self.recipe, "train").prompts * self.recipe.responses.samples_per_prompt
        return [self._answers("responses", self.teacher, self.recipe.responses.max_new_tokens, drawn)]

    def evaluation(self) -> list[Phase]:
        """The teacher, the untrained student and what each stage has trained answer the held-out prompts."""
        students = 1 + sum(stage.trains == "student" and stage.name in self.recipe.stages for stage in STAGES)
        return [self._evaluated("teacher", self.teacher, 1), self._evaluated("student", self.student, students)]

    # Training

    def _backward(self, training: dict[str, Any], adapted: bool) -> tuple[float, float]:
        """Operations for each parameter and token in training: of the body, of the head. Frozen weights have no gradient."""
        each = 4 if adapted and self.recipe.student.lora is not None else 6
        return each + 2 * bool(argument(training, "gradient_checkpointing")), each

    def supervised(self, name: str) -> list[Phase]:
        """A stage that trains on given answers, and its validation."""
        recipe, machine = self.recipe, self.machine
        training = stage_named(name).arguments(recipe)
        model = self.teacher if name == "finetune" else self.student
        size, micro = item_size(training, machine), argument(training, "per_device_train_batch_size")
        longest = recipe.responses.max_new_tokens
        length = recipe.data.max_prompt_tokens + longest
        idle = {
            "process": memory.PROCESS,
            **memory.trained(recipe, machine, model, training, "teacher" if name == "finetune" else "student"),
        }
        # Warm-up always holds the teacher, fine-tuning for the KL of its validation; beside TRL's trainer it is whole in every process.
        if name == "warmup":
            idle["teacher"] = memory.reading_teacher(recipe, machine, self.teacher, size)
        elif name == "sft" and recipe.data.validation is not None:
            idle["teacher"] = memory.held(self.teacher, size, recipe.teacher.quantization)
        parts = idle | {"activations": memory.activations(machine, model, training, length)}
        reads = self.teacher if name == "warmup" and recipe.warmup.cross_entropy < 1 else None
        if name == "warmup":
            parts["head"] = memory.scoring_head(model, reads, micro * longest, size)
        else:
            parts["head"] = memory.trl_head(model, micro * (longest if machine.gpu else length), machine.gpu)
        if reads is not None:
            parts["teacher's states"] = micro * longest * reads.hidden * size
        rows = work.trained_rows(recipe, name)
        updates, tokens = work.updates(recipe, name, training, machine), rows.prompt + rows.answer
        scored = tokens if name != "warmup" and not machine.gpu else rows.answer  # TRL's head there: prompts too
        of_body, of_head = self._backward(training, adapted=name != "finetune")
        flops = of_body * model.body * tokens + of_head * model.head * scored
        flops = (
            updates
            * update_responses(training, machine)
            * (flops + (0 if reads is None else _read(reads, tokens, rows.answer)))
        )
        phase = Phase(name, parts, flops)
        phase.seconds = machine.training_seconds(flops, size, updates * self._layers(training, model, reads))
        return [phase, *self._validation(name, training, updates, idle, phase)]

    @staticmethod
    def _layers(training: dict[str, Any], model: Shape, reads: Shape | None = None) -> float:
        """Forwards and backwards of a layer in an update; of another model that is read, which is a third of that."""
        once = model.layers * (4 / 3 if argument(training, "gradient_checkpointing") else 1) + (
            0 if reads is None else reads.layers / 3
        )
        return argument(training, "gradient_accumulation_steps") * once

    def _validation(
        self, name: str, training: dict[str, Any], updates: int, idle: dict[str, float], trained: Phase
    ) -> list[Phase]:
        """What sampling adds where a supervised stage is validated; an engine that does not sleep stays while the stage trains."""
        flops, seconds = self._validating(name, training, updates)
        if not seconds:
            return []
        model = self.teacher if name == "finetune" else self.student
        engine, stays = memory.rollout_engine(self.recipe, self.machine, model, item_size(training, self.machine))
        if stays:
            trained.parts |= engine
        without = {part: of for part, of in idle.items() if part != "gradients"}
        return [Phase(f"{name}: validation", without | engine, flops, seconds)]

    def _validating(self, name: str, training: dict[str, Any], updates: int) -> tuple[float, float]:
        """Operations and seconds of all validations of a stage: one answer to each row, read once by the model and the teacher."""
        recipe, machine = self.recipe, self.machine
        if recipe.data.validation is None:
            return 0.0, 0.0
        times = work.validations(training, updates, work.updates_per_epoch(recipe, name, training, machine))
        model, rows = (self.teacher if name == "finetune" else self.student), work.rows(recipe, "validation")
        answer, size = recipe.rollout.max_new_tokens / 2, item_size(training, machine)
        each = _read(model, rows.prompt + answer, answer)
        if name != "finetune" and not (name == "minillm" and recipe.teacher.servers):
            each += _read(model, rows.prompt + answer, answer) + _read(self.teacher, rows.prompt + answer, answer)
        flops = times * rows.referenced * each
        own = -(-rows.referenced // machine.processes)
        decoding = machine.decoding_seconds(model, size, own, recipe.rollout.max_new_tokens, rows.prompt + 2 * answer)
        return flops, machine.seconds(flops, size) + times * decoding

    # Answers of models that nothing trains, by one process

    def _answers(self, name: str, model: Shape, longest: int, drawn: int) -> Phase:
        recipe, machine, size = self.recipe, self.machine, self.machine.itemsize
        length = recipe.data.max_prompt_tokens + longest
        parts = {"process": memory.PROCESS, **memory.engine(recipe, machine, model, size, memory.AT_ONCE, length)}
        if memory.sampled_by_transformers(recipe, machine, model):
            parts["the sampled model"] = model.parameters * size
        prompt = work.rows(recipe, "train" if name == "responses" else "heldout").prompt
        phase, alone = (
            Phase(name, parts, flops=drawn * _read(model, prompt + longest / 2, longest / 2)),
            replace(machine, processes=1),
        )
        decoding = alone.decoding_seconds(model, size, memory.AT_ONCE, longest, prompt + longest)
        phase.seconds = alone.seconds(phase.flops, size) + drawn / memory.AT_ONCE * decoding
        return phase

    def _evaluated(self, name: str, model: Shape, models: int) -> Phase:
        """Answers with every seed; a student's are read by it and by the teacher."""
        recipe, size, heldout = self.recipe, self.machine.itemsize, work.rows(self.recipe, "heldout")
        longest = recipe.evaluate.max_new_tokens
        drawn = models * heldout.prompts * len(recipe.evaluate.seeds)
        phase = self._answers(f"evaluate: {name}", model, longest, drawn)
        phase.parts[name] = model.parameters * size
        if name == "student":  # one process reads it, so there are no shards
            phase.parts["teacher"] = memory.held(self.teacher, size, recipe.teacher.quantization)
            scored = drawn * sum(
                _read(each, heldout.prompt + longest / 2, longest / 2) for each in (model, self.teacher)
            )
            phase.flops += scored
            phase.seconds += replace(self.machine, processes=1).seconds(scored, size)
        return phase

    # MiniLLM

    def on_policy(self) -> list[Phase]:
        recipe, machine, student, teacher = self.recipe, self.machine, self.student, self.teacher
        training, rollout, objective = recipe.training, recipe.rollout, recipe.objective
        size, micro = item_size(training, machine), argument(training, "per_device_train_batch_size")
        served, own = bool(recipe.teacher.servers), max(rollout.num_rollouts // machine.processes, 1)
        length = recipe.data.max_prompt_tokens + rollout.max_new_tokens
        update = {"process": memory.PROCESS, **memory.trained(recipe, machine, student, training, "student")}
        mixing: dict[str, float] = {}
        if not served:
            update["teacher"] = memory.reading_teacher(recipe, machine, teacher, size)
            update["teacher's states"] = own * rollout.max_new_tokens * teacher.hidden * size
            if rollout.teacher_mix:
                mixing["teacher's cache"] = own * length * teacher.cached(size)
        engine, stays = memory.rollout_engine(recipe, machine, student, size)
        idle = {name: value for name, value in update.items() if name != "gradients"}  # freed after each update
        drawing = Phase("minillm: rollouts", idle | engine | mixing)
        if stays:
            update |= engine
        if rollout.overlap:  # the next batch is drawn meanwhile
            update |= mixing
            if mixing:
                update["teacher's states"] *= 2
        update["activations"] = memory.activations(machine, student, training, length)
        tokens, block = micro * rollout.max_new_tokens, objective.language_model_block
        text = recipe.data.text is not None and objective.language_model > 0
        if text:
            update["activations"] += memory.activations(machine, student, training, block)
            tokens += micro * block
        update["head"] = memory.scoring_head(student, None if served else teacher, tokens, size)
        updates = work.updates(recipe, "minillm", training, machine)
        prompt, answer = work.rows(recipe, "train").prompt, rollout.max_new_tokens / 2
        of_body, of_head = self._backward(training, adapted=True)
        each = (
            of_body * student.body * (prompt + answer)
            + (of_head * student.head + (0 if served else 2 * teacher.head)) * answer
        )
        if text:
            each += block * (of_body * student.body + of_head * student.head)
            each += _read(teacher, block, block) * (objective.language_model_distill > 0)
        updating = Phase("minillm: update", update, updates * update_responses(training, machine) * each)
        layers = updates * self._layers(training, student) * (2 if text else 1)
        updating.seconds = machine.training_seconds(updating.flops, size, layers)
        self._draw(drawing, updates, prompt, answer, updating.seconds)
        return [drawing, updating]

    def _draw(self, phase: Phase, updates: int, prompt: float, answer: float, training_seconds: float) -> None:
        """Operations and seconds of all batches of rollouts, the teacher's reading and validations included."""
        recipe, machine, student, teacher = self.recipe, self.machine, self.student, self.teacher
        rollout, size = recipe.rollout, item_size(recipe.training, self.machine)
        batches = math.ceil(updates / work.updates_of_batch(recipe, machine))
        given = round((1 - rollout.on_policy) * rollout.num_rollouts)
        drawn = rollout.num_rollouts - given - round(rollout.replay * (rollout.num_rollouts - given))
        sampling = batches * drawn * _read(student, prompt + answer, answer)
        reading = (
            0.0 if recipe.teacher.servers else batches * rollout.num_rollouts * _read(teacher, prompt + answer, answer)
        )
        again = (
            rollout.num_rollouts if recipe.objective.old_logprobs == "trainer" else given
        )  # log q by the trainer's own forward
        rescoring = batches * again * _read(student, prompt + answer, answer)
        # Servers are taken to be as fast as a GPU here, each.
        engines = machine.processes
        if rollout.engine == "server":
            engines = 1 if rollout.servers == "auto" else max(len(rollout.servers), 1)
        decoding = machine.decoding_seconds(
            student, size, -(-drawn // engines), rollout.max_new_tokens, prompt + 2 * answer
        )
        seconds = replace(machine, processes=engines).seconds(sampling, size) + batches * decoding
        read_seconds = machine.seconds(reading, size)
        if rollout.teacher_mix and not machine.gpu:
            seconds, read_seconds = seconds * _MIXING_ON_A_CPU, read_seconds * _MIXING_ON_A_CPU
        if rollout.overlap:
            seconds = max(
                seconds - training_seconds, seconds / batches
            )  # but for the first batch it is hidden by the updates
        flops, validating = self._validating("minillm", recipe.training, updates)
        phase.flops = sampling + reading + rescoring + flops
        phase.seconds = seconds + read_seconds + machine.seconds(rescoring, size) + validating
