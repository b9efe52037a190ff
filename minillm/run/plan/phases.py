"""The plan of a recipe: the memory of each phase in one process, its operations and its time.

Memory is that of prompts and responses of full length, which some batch will have. Operations and time are those of
average ones: prompts and references are as long as the text of the data says, and sampled responses are half as long as
the longest ones that are allowed, unless `Lengths` says how long those of the minillm stage are.
"""

from __future__ import annotations

from dataclasses import replace

from minillm.models.flops import Dimensions
from minillm.models.shape import Shape, shape_like, shape_of
from minillm.rollout.engines.vllm_memory import GIB, states_bytes
from minillm.run.plan import memory, work
from minillm.run.plan.machine import Machine
from minillm.run.plan.memory import Parts, SampledModel
from minillm.run.plan.phase import Phase, Plan
from minillm.run.plan.rollouts import batches, rollout_cost
from minillm.run.plan.teachers import Teachers, scoring_flops
from minillm.run.plan.work import Lengths, StageTraining
from minillm.run.recipe import Recipe
from minillm.run.stages import STAGES


def plan(recipe: Recipe, machine: Machine, lengths: Lengths | None = None) -> Plan:
    """Plan the stages of a recipe.

    Args:
        recipe: the recipe.
        machine: the machine to plan for.
        lengths: average lengths of the minillm stage's prompts and responses, where they are known.

    Returns:
        The memory, operations and time of each phase.

    Raises:
        DataError: a data file cannot be used.
        MissingError, SourceError: the config of a model cannot be read.
        InputError: the teacher has too few layers for `student.keep_layers`.
    """
    planner = Planner(recipe, machine, lengths)
    phases = [phase for stage in STAGES if stage.name in recipe.stages for phase in stage.phases(planner)]
    for phase in phases:
        cache = phase.parts.get("vLLM's cache")
        if cache and machine.gpu and recipe.rollout.engine_memory is None:
            # Where there is no room for all sequences at once, vLLM works with a smaller cache.
            phase.parts["vLLM's cache"] = max(cache - max(phase.peak - machine.memory, 0), min(cache, GIB / 8))
    return Plan(phases, machine)


def _trained_dimensions(training: StageTraining, model: Shape) -> Dimensions:
    """The dimensions of the model that a stage trains. Weights beside an adapter are frozen."""
    lora = training.recipe.student.lora
    if not training.has_adapter or lora is None:
        return model.dimensions
    return model.dimensions.frozen_beside(memory.adapter_weights(lora, model))


def _body_flops(training: StageTraining, trained: Dimensions, length: float) -> float:
    """Operations of the body's forward and backward over a sequence. Checkpointing computes the forward again."""
    forwards = 2 if training.argument("gradient_checkpointing") else 1
    return forwards * trained.forward([length]) + trained.backward([length])


class Planner:
    """The phases of one recipe on one machine. `Stage.phases` of each stage calls the method for its own phases.

    Args:
        recipe: the recipe.
        machine: the machine to plan for.
        lengths: as for `plan`.

    Attributes:
        teachers: the sizes of the teacher, or of several.
        student: the sizes of the student, after pruning.
        lengths: average lengths of the minillm stage, where they are known.
    """

    def __init__(self, recipe: Recipe, machine: Machine, lengths: Lengths | None = None) -> None:
        self.recipe, self.machine, self.lengths = recipe, machine, lengths or Lengths()
        self.teachers = Teachers(recipe)
        student, teacher = recipe.student, recipe.teacher.first.source
        if student.source == "config":
            self.student = shape_like(student.model_like(teacher), student.shape, work.vocabulary(recipe))
        else:
            self.student = shape_of(student.model_like(teacher), student.keep_layers if student.is_made else None)

    # Stages that sample from models without training them, in one process

    def responses(self) -> list[Phase]:
        """The phase in which the teacher answers the training prompts; of several, each has a phase."""
        train, settings = work.rows(self.recipe, "train"), self.recipe.responses
        samples = train.prompts * settings.samples_per_prompt / len(self.teachers)
        return [
            self._sampling(
                "responses" if len(self.teachers) == 1 else f"responses: {label}",
                teacher,
                samples,
                train.prompt_tokens,
                settings.max_new_tokens,
                settings.samples_per_prompt,
            )
            for label, (_, teacher) in self.teachers.by_label.items()
        ]

    def evaluation(self) -> list[Phase]:
        """The phases in which each teacher, the untrained student and all trained ones answer the held-out prompts."""
        students = 1 + sum(stage.trains == "student" and stage.name in self.recipe.stages for stage in STAGES)
        phases = [
            self._evaluation(label, teacher, 1 / len(self.teachers))
            for label, (_, teacher) in self.teachers.by_label.items()
        ]
        return [*phases, self._evaluation("student", self.student, students)]

    def _evaluation(self, name: str, model: Shape, models: float) -> Phase:
        """The answers of one or several models of one size, with every seed.

        The answers of a student are scored by the student and by the teacher.
        """
        recipe, itemsize = self.recipe, self.machine.itemsize
        heldout, longest = work.rows(recipe, "heldout"), recipe.evaluate.max_new_tokens
        seeds = len(recipe.evaluate.seeds)
        samples = models * heldout.prompts * seeds
        phase = self._sampling(f"evaluate: {name}", model, samples, heldout.prompt_tokens, longest, seeds)
        phase.parts[name] = model.parameters * itemsize
        if name == "student":
            # One process scores the answers, so that the teacher is not sharded.
            phase.parts["teacher"] = self.teachers.whole_weights(itemsize)
            prompt, response = heldout.prompt_tokens, longest / 2
            by_teacher = self.teachers.forward_flops(prompt, response)
            scoring = samples * (scoring_flops(model, prompt, response) + by_teacher)
            phase.flops += scoring
            phase.seconds += replace(self.machine, processes=1).seconds(scoring, itemsize)
        return phase

    def _sampling(self, name: str, model: Shape, samples: float, prompt: float, longest: int, per_prompt: int) -> Phase:
        """The phase in which one process samples from a model that is not trained.

        Args:
            name: the name of the phase.
            model: the model that is sampled.
            samples: responses in all.
            prompt: tokens of a prompt, on average.
            longest: tokens of the longest response.
            per_prompt: responses to each prompt.
        """
        alone, itemsize = replace(self.machine, processes=1), self.machine.itemsize
        sampled = SampledModel(self.recipe, self.machine, model, itemsize)
        length = self.recipe.data.max_prompt_tokens + longest
        parts = {"process": memory.PROCESS, **sampled.engine(memory.BATCH_SIZE, length)}
        if sampled.by_transformers:
            parts["the sampled model"] = model.parameters * itemsize
        flops = samples * sampled.flops(prompt, longest / 2, per_prompt)
        decoding = alone.decoding_seconds(model, itemsize, memory.BATCH_SIZE, longest, prompt + longest)
        return Phase(name, parts, flops, alone.seconds(flops, itemsize) + samples / memory.BATCH_SIZE * decoding)

    def text_flops(self, training: StageTraining, model: Shape, length: float, teacher: float | None) -> float:
        """Operations of training on a sequence of text.

        Args:
            training: the stage.
            model: the model that it trains.
            length: tokens of the sequence.
            teacher: size of the hidden states of a teacher that the loss reads; None without one.
        """
        trained = _trained_dimensions(training, model)
        return _body_flops(training, trained, length) + trained.head_training(length, teacher=teacher)

    # Supervised stages

    def supervised(self, name: str) -> list[Phase]:
        """The phases of a stage that trains on given responses: its training, and its validation where it has one.

        Args:
            name: the name of the stage: `finetune`, `warmup` or `sft`.
        """
        training = StageTraining(self.recipe, self.machine, name)
        model = self.trained_model(training)
        stage = training.definition
        scoring = self.teachers.widest if stage.teacher_in_loss(self.recipe) else None
        idle = {"process": memory.PROCESS, **memory.trained_weights(training, model)}
        # This library's trainer always holds the teacher, TRL's holds it for the KL of its validation. Beside TRL's
        # trainer the teacher is not sharded.
        if not stage.uses_trl:
            idle |= self.teachers.memory(self.machine, training.itemsize)
        elif stage.scores_with_teacher(self.recipe) and self.recipe.data.validation is not None:
            idle["teacher"] = self.teachers.whole_weights(training.itemsize)
        phase = Phase(name, idle | self._supervised_buffers(training, model, scoring))
        phase.flops = training.updates * self._supervised_flops(training, model, scoring)
        layers = training.updates * work.layers_per_update(training, model, scoring)
        phase.seconds = self.machine.training_seconds(phase.flops, training.itemsize, layers)
        return [phase, *self._validation_phases(training, idle, phase)]

    def trained_model(self, training: StageTraining) -> Shape:
        """The sizes of the model that a stage trains."""
        return self.teachers.first if training.trains == "teacher" else self.student

    def _supervised_buffers(self, training: StageTraining, model: Shape, scoring: Shape | None) -> Parts:
        """Memory that a weight update takes beside the weights; `scoring` is the teacher, where the loss reads it."""
        micro, longest, gpu = training.micro_batch_size, self.recipe.responses.max_new_tokens, self.machine.gpu
        length = self.recipe.data.max_prompt_tokens + longest
        parts: Parts = {"activations": memory.activations(training, model, length)}
        if not training.definition.uses_trl:
            tokens, with_teacher = micro * longest, scoring is not None
            parts["head"] = memory.scoring_head(model, tokens, training.itemsize, with_teacher=with_teacher, gpu=gpu)
        else:
            parts["head"] = memory.trl_head(model, micro * (longest if gpu else length), gpu)
        if scoring is not None:
            parts["teacher's hidden states"] = micro * longest * scoring.hidden * training.itemsize
        return parts

    def _supervised_flops(self, training: StageTraining, model: Shape, scoring: Shape | None) -> float:
        """Operations of a weight update; `scoring` is the teacher, where the loss reads it."""
        rows = work.trained_rows(self.recipe, training.stage)
        prompt, response = rows.prompt_tokens, rows.answer_tokens
        # On a CPU the head of TRL's loss reads the prompts as well.
        all_tokens = training.definition.uses_trl and not self.machine.gpu
        trained = _trained_dimensions(training, model)
        flops = _body_flops(training, trained, prompt + response)
        teacher = None if scoring is None else self.teachers.hidden
        flops += trained.head_training(prompt + response if all_tokens else response, teacher=teacher)
        flops += 0 if scoring is None else self.teachers.states_flops(prompt, response)
        return training.responses_per_update * flops

    # Validation

    def _validation_phases(self, training: StageTraining, idle: Parts, trained: Phase) -> list[Phase]:
        """The validation of a supervised stage, if it has one.

        Args:
            training: the stage.
            idle: memory of the stage between two weight updates, with gradients.
            trained: the phase of its training. An engine that does not free its memory between validations is added.
        """
        flops, seconds = self._validation_cost(training)
        if not seconds:
            return []
        model = self.trained_model(training)
        sampled = SampledModel(self.recipe, self.machine, model, training.itemsize)
        engine, stays = sampled.engine_while_training()
        if stays:
            trained.parts |= engine
        without = {part: size for part, size in idle.items() if part != "gradients"}
        return [Phase(f"{training.stage}: validation", without | engine, flops, seconds)]

    def _validation_cost(self, training: StageTraining) -> tuple[float, float]:
        """Operations and seconds of all validations of a stage.

        One response is sampled for each row that has a reference. The model and the teacher score it, if there is a
        teacher in the process.
        """
        recipe, machine, itemsize = self.recipe, self.machine, training.itemsize
        if recipe.data.validation is None:
            return 0.0, 0.0
        model, rows, times = self.trained_model(training), work.rows(recipe, "validation"), training.validations
        prompt, longest = rows.prompt_tokens, recipe.rollout.max_new_tokens
        each = model.dimensions.decoding([prompt], [longest / 2])
        if training.definition.scores_with_teacher(recipe):
            each += scoring_flops(model, prompt, longest / 2)
            local = training.definition.uses_trl  # whose validation loads the teacher, wherever it is served
            scoring = self.teachers.forward_flops(prompt, longest / 2)
            each += scoring if local else self.teachers.scoring_flops(prompt, longest / 2)
        flops = times * rows.referenced * each
        in_one_process = -(-rows.referenced // machine.processes)
        decoding = machine.decoding_seconds(model, itemsize, in_one_process, longest, prompt + longest)
        return flops, machine.seconds(flops, itemsize) + times * decoding

    # MiniLLM

    def on_policy(self) -> list[Phase]:
        """The phases of the minillm stage: its rollouts, with validation, and its weight updates."""
        training = StageTraining(self.recipe, self.machine, "minillm")
        rollouts, update = self._on_policy_memory(training)
        updating = Phase("minillm: update", update, *self.update_cost(training))
        flops, seconds = self._rollout_cost(training, updating.seconds)
        return [Phase("minillm: rollouts", rollouts, flops, seconds), updating]

    def update_cost(self, training: StageTraining) -> tuple[float, float]:
        """Operations and seconds of all weight updates of the minillm stage, without its rollouts.

        Args:
            training: the minillm stage.
        """
        flops = training.updates * self._on_policy_flops(training)
        layers = training.updates * work.layers_per_update(training, self.student) * (2 if self.trains_on_text else 1)
        return flops, self.machine.training_seconds(flops, training.itemsize, layers)

    @property
    def trains_on_text(self) -> bool:
        """Whether the objective has its language-model term."""
        return self.recipe.data.text is not None and self.recipe.objective.language_model > 0

    def _on_policy_memory(self, training: StageTraining) -> tuple[Parts, Parts]:
        """Memory of the minillm stage: while it samples rollouts, and during a weight update."""
        recipe, machine, itemsize = self.recipe, self.machine, training.itemsize
        rollout = recipe.rollout
        own_rollouts = max(rollout.num_rollouts // machine.processes, 1)
        length = recipe.data.max_prompt_tokens + rollout.max_new_tokens
        update: Parts = {"process": memory.PROCESS, **memory.trained_weights(training, self.student)}
        update |= self.teachers.memory(machine, itemsize)
        states = own_rollouts * rollout.max_new_tokens * self.teachers.widest.hidden
        update["teacher's hidden states"] = states * itemsize
        mixed = self.teachers.first if rollout.teacher_mix else None
        sampled = SampledModel(recipe, machine, self.student, itemsize, mixed)
        engine, stays = sampled.engine_while_training()
        # Gradients are freed after an update.
        sampling = {part: size for part, size in update.items() if part != "gradients"} | engine
        if mixed is not None and rollout.engine != "server":
            copied = min(own_rollouts, memory.BATCH_SIZE) if sampled.by_transformers else own_rollouts
            size = {"new_tokens": rollout.max_new_tokens, "sequences": own_rollouts + copied, "itemsize": itemsize}
            sampling["teacher's states while sampling"] = states_bytes(mixed.config, **size)
        if stays:
            update |= engine
        update["activations"] = memory.activations(training, self.student, length)
        tokens = training.micro_batch_size * rollout.max_new_tokens
        if self.trains_on_text:
            block = recipe.objective.language_model_block
            update["activations"] += memory.activations(training, self.student, block)
            tokens += training.micro_batch_size * block
        update["head"] = memory.scoring_head(self.student, tokens, itemsize, with_teacher=True, gpu=machine.gpu)
        return sampling, update

    def _on_policy_flops(self, training: StageTraining) -> float:
        """Operations of a weight update of the minillm stage."""
        objective, hidden = self.recipe.objective, self.teachers.hidden
        prompt, response = self.lengths.of(self.recipe)
        trained = _trained_dimensions(training, self.student)
        # The teacher's hidden states are kept from the rollouts; only its head is computed again.
        each = _body_flops(training, trained, prompt + response) + trained.head_training(response, teacher=hidden)
        if self.trains_on_text:
            block = objective.language_model_block
            each += _body_flops(training, trained, block) + trained.head_training(block, teacher=hidden)
            each += self.teachers.states_flops(0, block) * (objective.language_model_distill > 0)
        return training.responses_per_update * each

    def _rollout_cost(self, training: StageTraining, training_seconds: float) -> tuple[float, float]:
        """Operations and seconds of all batches of rollouts, with the teacher's scoring and with validations.

        Args:
            training: the minillm stage.
            training_seconds: the time of all weight updates, during which rollouts are sampled where they overlap.
        """
        cost = rollout_cost(training, self.student, self.teachers, self.lengths)
        seconds = cost.sampling
        if self.recipe.rollout.overlap:  # all batches but the first are sampled during the weight updates
            seconds = max(seconds - training_seconds, seconds / batches(training))
        validation_flops, validation_seconds = self._validation_cost(training)
        return cost.flops + validation_flops, seconds + cost.teacher + cost.rescoring + validation_seconds
