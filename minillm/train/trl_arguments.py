"""Fields of TRL's configurations, and parameters of its trainers, that go beyond those of transformers.

Those that are not read are refused, with their equivalents here, or change no result and are ignored with a warning.
`minillm.train.trl_settings` has those that the on-policy trainer reads.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers import TrainingArguments

from minillm.errors import InputError
from minillm.train.best_checkpoint import METRICS
from minillm.train.optimisation import Fault

logger = logging.getLogger(__name__)

_FILTER = "importance weights need every token that the student can sample: use RolloutConfig(temperature=...)"
_MODEL = "load the model yourself and give it as the trainer's model"
_TEACHER = "give the trainer its teacher: a name, a model or a ServedTeacher"
_SERVERS = 'RolloutConfig(engine="server", servers=["http://host:port"])'
_ENGINE = "RolloutConfig(engine_memory=..., engine_options=...)"
_CLIP = "Objective(clip=...)"
_ROWS = "rows are read by their columns, and rendered by the tokenizer's chat template: give other rows ready, as "
_ROWS += "prompt_ids and response_ids"
_OBJECTIVE = "the loss is the objective's"
EQUIVALENTS = {
    "temperature": "RolloutConfig(temperature=...), or temperature=... of SupervisedTrainer",
    "beta": 'Objective(divergence=DivergenceConfig(name="jensen_shannon", beta=...), long_term=0), '
    "or divergence=... of SupervisedTrainer",
    "lmbda": "RolloutConfig(on_policy=...)",
    "seq_kd": "SupervisedTrainer on the teacher's responses",
    "max_completion_length": "RolloutConfig(max_new_tokens=...)",
    "max_new_tokens": "RolloutConfig(max_new_tokens=...)",
    "max_prompt_length": "RolloutConfig(max_prompt_tokens=...)",
    "max_length": "RolloutConfig(max_prompt_tokens=..., max_new_tokens=...), or shorter rows for FineTuner",
    "num_generations": "RolloutConfig(samples_per_prompt=...)",
    "num_iterations": "RolloutConfig(inner_epochs=...)",
    "generation_batch_size": "RolloutConfig(num_rollouts=...)",
    "steps_per_generation": "RolloutConfig(num_rollouts=...)",
    "stop_strings": "RolloutConfig(stop=[...])",
    "disable_dropout": "dropout is always off",
    "use_vllm": 'RolloutConfig(engine="vllm")',
    "vllm_mode": 'RolloutConfig(engine="vllm"), or ' + _SERVERS,
    "vllm_tensor_parallel_size": "vllm serve --tensor-parallel-size N, and " + _SERVERS,
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_group_port"), _SERVERS),
    "vllm_server_timeout": "RolloutConfig(server_timeout=...)",
    **dict.fromkeys(("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_model_impl"), _ENGINE),
    **dict.fromkeys(
        (
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "generation_kwargs",
            "vllm_structured_outputs_regex",
        ),
        _FILTER,
    ),
    "shuffle_dataset": "prompts are always shuffled by the seed",
    "chat_template_kwargs": "render prompts yourself: rows with prompt_ids",
    "max_tool_calling_iterations": "responses are single turns, and no tools are called",
    "log_completions": "minillm.train.samples.SampleLog, a callback",
    "router_aux_loss_coef": _OBJECTIVE,
    "loss_type": _OBJECTIVE,
    "activation_offloading": "gradient_checkpointing=True saves memory",
    "pad_token": "padding is never read: leave it out",
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "dtype"), _MODEL),
    **dict.fromkeys(
        (
            "teacher_model_name_or_path",
            "teacher_model_revision",
            "teacher_model_init_kwargs",
            "use_teacher_server",
            "teacher_model_server_url",
            "teacher_server_urls",
        ),
        _TEACHER,
    ),
    **dict.fromkeys(("loss_top_k", "teacher_top_k"), "ServedTeacher(top_k=...)"),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta"), _CLIP),
    "importance_sampling_level": "Objective(importance=...)",
    "scale_rewards": "Objective(baseline=...)",
    "distillation_alpha": "Objective(divergence=DivergenceConfig(...))",
    "distillation_mode": "Objective(divergence=DivergenceConfig(...))",
    **dict.fromkeys(
        (
            "dataset_text_field",
            "dataset_kwargs",
            "truncation_mode",
            "packing",
            "packing_strategy",
            "eval_packing",
            "padding_free",
            "eos_token",
            "chat_template_path",
            "assistant_only_loss",
            "completion_only_loss",
        ),
        _ROWS,
    ),
}
"""Fields of TRL's configurations, and their equivalents here."""

IGNORED = {
    "ds3_gather_for_generation": "how weights reach the engine does not change what is sampled",
    "pad_to_multiple_of": "padding is not trained on",
    "cache_implementation": "the engine has its own cache",
    "vllm_enable_sleep_mode": "an engine in the training process always sleeps during updates",
    "dataset_num_proc": "rows are tokenised in the training process",
    "num_completions_to_print": "samples are written to a file and to trackers, four at a time",
    "log_unique_prompts": "samples are written to a file and to trackers, four at a time",
}
"""Fields that change no result, and why they do nothing here."""

# Fields of SFTConfig that FineTuner passes on to TRL.
_TO_TRL = frozenset(
    {"shuffle_dataset", "pad_to_multiple_of", "router_aux_loss_coef", "loss_type", "activation_offloading", "pad_token"}
)
# Values that always hold here, whether they are set or not.
_ALWAYS = {
    "disable_dropout": True,
    "completion_only_loss": True,
    "max_length": None,
    "shuffle_dataset": True,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
# Fields whose defaults say nothing by themselves.
_BESIDE_OTHERS = ("packing_strategy", "truncation_mode", "dataset_text_field", "loss_type")

# Parameters of transformers' and TRL's trainers that mean nothing here.
_PARAMETERS = {
    "data_collator": "batches are built from prompt_ids and response_ids",
    "compute_loss_func": "the loss is objective's",
    "compute_metrics": "validation measures " + ", ".join(METRICS),
    "preprocess_logits_for_metrics": "validation samples responses",
    "model_init": "give the model",
    "peft_config": "give a student that has its adapter: minillm.models.lora.load_student",
    "formatting_func": "render prompts first: rows with prompt or prompt_ids",
    "reward_funcs": "the reward is the teacher's log-ratio",
    "tools": "responses are single turns, and no tools are called",
    "quantization_config": "load the model yourself, or minillm.models.lora.load_student(..., AdapterConfig(...))",
}

_SHARED = frozenset(field.name for field in dataclasses.fields(TrainingArguments))
_warned: set[type] = set()


def check_parameters(given: Mapping[str, Any]) -> None:
    """Refuse parameters of a trainer that would be ignored.

    Args:
        given: parameters and their values.

    Raises:
        InputError: the message names the parameters and what to use instead.
    """
    if found := [
        f"{name}: not used here: {_PARAMETERS[name]}"
        for name in given
        if name in _PARAMETERS and given[name] is not None
    ]:
        raise InputError("\n".join(found))


def handed_to_trl(args: TrainingArguments) -> frozenset[str]:
    """Fields beyond those of `TrainingArguments` that `FineTuner` passes on to TRL's SFTTrainer."""
    return _TO_TRL if any(kind.__name__ == "SFTConfig" for kind in type(args).__mro__) else frozenset()


def extra_names(args: TrainingArguments) -> list[str]:
    """Fields that the class of `args` has beyond those of `TrainingArguments`."""
    return [field.name for field in dataclasses.fields(args) if field.init and field.name not in _SHARED]


def extra_faults(args: TrainingArguments, fresh: TrainingArguments, honoured: Collection[str]) -> Iterator[Fault]:
    """Fields that would be ignored, change results, and do not have their defaults.

    Args:
        args: the arguments.
        fresh: the arguments with the defaults of these fields.
        honoured: fields that the trainer reads.
    """
    for name in extra_names(args):
        value = getattr(args, name)
        holds = name in honoured or name in IGNORED or (name in _ALWAYS and _ALWAYS[name] == value)
        if value != getattr(fresh, name) and not holds:
            instead = f"; here: {EQUIVALENTS[name]}" if name in EQUIVALENTS else ""
            yield name, f"a field of {type(args).__name__} that is not read{instead} (given: {value!r})"


def warn_of_defaults(args: TrainingArguments, honoured: Collection[str]) -> None:
    """Warn once per class that some of its defaults are not read, and of fields that do nothing here."""
    declared = {field.name: field.default for field in dataclasses.fields(args)}
    others = [(name, getattr(args, name)) for name in extra_names(args) if name not in honoured]
    spare = [
        f"{name}={value!r}"
        for name, value in others
        if name in EQUIVALENTS and value not in (None, False, _ALWAYS.get(name))
        if not name.startswith(("vllm_", *_BESIDE_OTHERS))  # vLLM's need use_vllm
    ]
    idle = [
        f"{name} ({IGNORED[name]})"
        for name, value in others
        if name in IGNORED and value is not None and value != declared[name]
    ]
    if type(args) in _warned:
        return
    if spare:
        _warned.add(type(args))
        also = ", ".join(name for name in extra_names(args) if name in honoured)
        fields = f"the fields of TrainingArguments and {also}" if also else "only the fields of TrainingArguments"
        logger.warning("Of %s %s are read, not its %s.", type(args).__name__, fields, ", ".join(spare))
    if idle:
        _warned.add(type(args))
        logger.warning("Fields of %s that do nothing here: %s.", type(args).__name__, "; ".join(idle))
