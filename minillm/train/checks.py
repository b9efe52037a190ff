"""Checks of settings that belong to several rooms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minillm.data.lazy import LazySequence
from minillm.errors import InputError
from minillm.loss.config import Objective
from minillm.rollout.config import RolloutConfig
from minillm.teacher.config import START_COMMAND

if TYPE_CHECKING:
    from transformers import TrainingArguments

STATES_REMEDY = f"start servers that return states: {START_COMMAND}"


def check_on_policy(
    rollout: RolloutConfig,
    objective: Objective,
    *,
    served_teacher: bool,
    sharded_teacher: bool,
    can_overlap: bool,
    can_mix: bool,
    text: bool,
    responses: bool,
) -> None:
    """Refuse settings of on-policy training that exclude each other, before any weights load.

    Args:
        rollout: settings of the rollouts.
        objective: the loss.
        served_teacher: whether the teacher is behind a server.
        sharded_teacher: whether the teacher is sharded over processes.
        can_overlap: whether the engine can sample while the student trains.
        can_mix: whether the engine holds a teacher, or will be started with one.
        text: whether there is text for the language-model term.
        responses: whether there are given responses.

    Raises:
        InputError: the message names the setting to change.
    """
    if served_teacher:
        check_served_teacher(rollout)
    check_off_policy(rollout, objective)
    check_samples(rollout, objective)
    if sharded_teacher:
        check_sharded_teacher(rollout, objective, text)
    if rollout.teacher_mix and not can_mix:
        raise InputError(
            "rollout.teacher_mix: the given engine was started without a teacher: give it one (teacher=...), or set 0"
        )
    if rollout.on_policy < 1 and not responses:
        raise InputError(
            f"rollout.on_policy: {rollout.on_policy:g} trains on given responses too, and there are none (responses)"
        )
    if rollout.overlap and not can_overlap:
        raise InputError(
            "rollout.overlap must be used with an engine in another process, because responses are sampled while the "
            "student trains: set rollout.engine: server"
        )
    if rollout.overlap and (objective.old_logprobs == "trainer" or objective.importance == "prefix"):
        raise InputError(
            "rollout.overlap trains on responses of the weights before the last batch, which importance weights of "
            "single tokens can correct: objective.old_logprobs must be engine and objective.importance none or token"
        )


def check_off_policy(rollout: RolloutConfig, objective: Objective) -> None:
    """Refuse a long-term term on responses that the current student did not sample.

    Raises:
        InputError: the message names the setting to change.
    """
    for name, value in (("on_policy", rollout.on_policy < 1), ("replay", rollout.replay > 0)):
        if value and (objective.long_term or objective.single_step_weight != "none"):
            raise InputError(
                f"rollout.{name} trains on responses that the current student did not sample, which the long-term term "
                "and its weights do not allow: set objective.long_term: 0 and objective.single_step_weight: none"
            )


def check_samples(rollout: RolloutConfig, objective: Objective) -> None:
    """Refuse to compare a response with others to its prompt where there are none.

    Raises:
        InputError: the message names the setting to change.
    """
    if not objective.long_term or rollout.samples_per_prompt > 1:
        return
    if objective.credit_offset == "rate_per_prompt":
        raise InputError(
            "objective.credit_offset: rate_per_prompt takes the price of tokens from other responses to the same "
            "prompt: set rollout.samples_per_prompt to 2 or more, or credit_offset: rate"
        )
    if objective.baseline == "prompt_position":
        raise InputError(
            "objective.baseline: prompt_position is the mean of other responses to the same prompt: set "
            "rollout.samples_per_prompt to 2 or more, or baseline: position"
        )


def update_size_fault(rollout: RolloutConfig, update_size: int, processes: int) -> str | None:
    """The fault of a batch of rollouts that does not fill whole weight updates, and what to change; None if it does.

    Args:
        rollout: settings of the rollouts.
        update_size: responses of one weight update, over all processes.
        processes: how many processes train.
    """
    if not rollout.num_rollouts % update_size:
        return None
    return (
        f"rollout.num_rollouts ({rollout.num_rollouts}) must be a multiple of the {update_size} responses of an update "
        f"on {processes} process(es): change it, or the size of an update (responses_per_update, or "
        "per_device_train_batch_size × gradient_accumulation_steps)"
    )


def check_served_teacher(rollout: RolloutConfig) -> None:
    """Refuse what no served teacher can do, whatever its servers return.

    Raises:
        InputError: the message names the setting to change.
    """
    if rollout.teacher_mix:
        raise InputError(
            "rollout.teacher_mix with a served teacher: mixing samples from the teacher's whole distribution: set 0"
        )


def check_several_teachers(rollout: RolloutConfig, objective: Objective, text: bool) -> None:
    """Refuse what needs one teacher for everything.

    Raises:
        InputError: the message names the setting to change.
    """
    if rollout.teacher_mix:
        raise InputError(
            "rollout.teacher_mix with several teachers: the engine holds one teacher beside the student: set 0"
        )
    if text and objective.language_model and objective.language_model_distill:
        raise InputError("objective.language_model_distill with several teachers: rows of text name no teacher: set 0")


def check_shard_teacher(names: Collection[str], shard: bool) -> None:
    """Refuse to shard several teachers, of which processes read different ones at the same time.

    Args:
        names: the names of the teachers; empty if there is one for all rows.
        shard: whether the teacher is to be sharded.

    Raises:
        InputError: there are several.
    """
    if names and shard:
        raise InputError(
            "shard_teacher with several teachers: every forward of a sharded teacher needs all processes, which would "
            "ask each of them unequally often: leave it out, or serve the teachers (ServedTeacher)"
        )


def check_teacher_names(names: Collection[str], rows: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> None:
    """Refuse rows that do not name one of several teachers.

    Args:
        names: the names of the teachers; empty if there is one for all rows, and then nothing is checked.
        rows: the data sets of a trainer by the name of their argument.

    Raises:
        InputError: naming the row, and the names that are allowed.
    """
    for argument, dataset in rows.items() if names else ():
        if isinstance(dataset, LazySequence):  # its file was checked when it was read, and to check it makes every row
            continue
        for number in range(len(dataset or ())):
            row = dataset[number] if dataset is not None else {}
            if row.get("teacher") not in names:
                what = "names no teacher" if row.get("teacher") is None else f"names teacher {row['teacher']!r}"
                raise InputError(f"{argument} row {number} {what}; allowed in its column teacher: {', '.join(names)}")


def check_routing(
    names: Collection[str],
    rows: Mapping[str, Sequence[Mapping[str, Any]] | None],
    rollout: RolloutConfig,
    objective: Objective,
    text: bool,
) -> None:
    """Refuse what on-policy training cannot do with several teachers; see the two checks above for the arguments."""
    if names:
        check_several_teachers(rollout, objective, text)
        check_teacher_names(names, rows)


def check_logprob_teacher(rollout: RolloutConfig, objective: Objective, args: TrainingArguments) -> None:
    """Refuse what a teacher cannot do whose servers return log-probabilities of some tokens only.

    Args:
        rollout: settings of the rollouts.
        objective: the loss.
        args: the arguments of the training.

    Raises:
        InputError: the message names the setting to change, and how a server that can do it is started.
    """
    found = None
    if rollout.temperature != 1.0:
        found = (
            f"rollout.temperature: {rollout.temperature:g} with log-probabilities of a served teacher: they are of "
            "temperature 1, and those of another temperature need every logit: set 1"
        )
    elif rollout.on_policy < 1:
        found = (
            "rollout.on_policy below 1 with log-probabilities of a served teacher: the student's most likely tokens "
            "are known for sampled responses only: set 1"
        )
    elif objective.language_model and objective.language_model_distill:
        found = (
            "objective.language_model_distill with log-probabilities of a served teacher: they are not those of text: "
            "set 0"
        )
    elif (args.metric_for_best_model or "").removeprefix("eval_") == "reverse_kl":
        found = "args.metric_for_best_model: reverse_kl needs the teacher's states: choose another"
    if found is not None:
        raise InputError(f"{found}, or {STATES_REMEDY}")


def check_sharded_teacher(rollout: RolloutConfig, objective: Objective, text: bool) -> None:
    """Refuse settings with which processes call the teacher unequally often: each call involves all of them.

    Raises:
        InputError: the message names the setting to change.
    """
    if rollout.teacher_mix:
        raise InputError(
            "teacher.shard: every process samples by itself, and would need the whole teacher to mix it in: set "
            "rollout.teacher_mix: 0"
        )
    if text and objective.language_model and objective.language_model_distill:
        raise InputError(
            "teacher.shard: processes read different numbers of pieces of text, and every forward of a sharded teacher "
            "needs all processes: set objective.language_model_distill: 0"
        )
