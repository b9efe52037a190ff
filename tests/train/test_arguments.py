"""Every field of TrainingArguments is honoured, or refused with a reason before weights load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from transformers import TrainingArguments

from minillm.train.arguments import FINE_TUNING_ONLY, HONOURED, IN_A_RECIPE, REFUSED, check_arguments, setting_faults
from minillm.train.finetune import FineTuner
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.supervised import SupervisedTrainer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.train.argument_runs import NOWHERE, ROWS, Weights, fine_tuned, furthest, supervised, weights_of
from tests.train.common import PROMPTS, ROLLOUT, arguments

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}

# For each honoured field that changes the training, a value that does.
CHANGES: dict[str, dict[str, Any]] = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 4},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 1},
    "num_train_epochs": {"num_train_epochs": 0.5, "max_steps": -1},
    "max_steps": {"max_steps": 2},
    "seed": {"seed": 1},
    "learning_rate": {"learning_rate": 2e-2},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
    "warmup_steps": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "weight_decay": {"weight_decay": 0.1},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.5"},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "max_grad_norm": {"max_grad_norm": 1e-5, "optim": "sgd"},
    "bf16": {"bf16": True},
}

# For other fields, a value that must not change the training.
KEEPS: dict[str, dict[str, Any]] = {
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "full_determinism": {"full_determinism": True},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "debug": {"debug": "underflow_overflow"},
    "accelerator_config": {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "eval_on_start": {"eval_on_start": True},
    "restore_callback_states_from_checkpoint": {"restore_callback_states_from_checkpoint": True},
    "do_train": {"do_train": True, "do_predict": True, "resume_from_checkpoint": "x"},
}

# All others: where and how training runs, and what is logged, saved, uploaded and validated. transformers handles
# these.
BESIDE = {
    "output_dir", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "logging_strategy",
    "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm",
    "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_strategy", "eval_steps", "eval_delay", "save_only_model", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model",
    "greater_is_better", "use_cpu", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "do_eval", "do_predict",
    "resume_from_checkpoint", "local_rank",
}  # fmt: skip

# A value of each refused field that is not its default.
OTHERS: dict[str, Any] = {
    "per_device_eval_batch_size": 4,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "label_names": ["labels"],
    "length_column_name": "tokens",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "auto_find_batch_size": True,
    "optim_target_modules": ["q_proj"],
    "parallelism_config": object(),
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "include_num_input_tokens_seen": "all",
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,
    "data_seed": 3,
    "ignore_data_skip": True,
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_pin_memory": False,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
}


def test_every_field_is_honoured_or_refused_with_a_reason() -> None:
    """A field that is new in transformers is refused until it has been examined."""
    assert HONOURED | REFUSED.keys() | FINE_TUNING_ONLY.keys() == FIELDS
    assert len(HONOURED) + len(REFUSED) + len(FINE_TUNING_ONLY) == len(FIELDS)
    assert CHANGES.keys() | KEEPS.keys() | BESIDE == HONOURED
    assert OTHERS.keys() == REFUSED.keys() | FINE_TUNING_ONLY.keys()
    assert IN_A_RECIPE.keys() <= HONOURED


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_not_honoured_is_refused_before_weights_load(tmp_path: Path, name: str) -> None:
    args = arguments(tmp_path)
    if name == "dataloader_pin_memory":
        args.use_cpu = False  # otherwise transformers resets the field itself
    setattr(args, name, OTHERS[name])
    reason = (REFUSED | FINE_TUNING_ONLY)[name][:20]
    with pytest.raises(ValueError, match=rf"^args\.{name}: not honoured here: .*(given: .*)$") as caught:
        SupervisedTrainer(NOWHERE, NOWHERE, args, train_dataset=ROWS, processing_class=tiny_tokenizer())
    assert reason in str(caught.value)
    with pytest.raises(ValueError, match=rf"args\.{name}: not honoured here"):
        MiniLLMTrainer(
            NOWHERE, NOWHERE, args, train_dataset=PROMPTS, rollout=ROLLOUT, processing_class=tiny_tokenizer()
        )
    if name in REFUSED:
        with pytest.raises(ValueError, match=rf"args\.{name}: not honoured here"):
            FineTuner(NOWHERE, args, train_dataset=ROWS)
    else:
        check_arguments(args, fine_tuning=True, reads_teacher=False)


def test_an_unknown_field_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of a later transformers is treated in this way."""
    monkeypatch.setattr("minillm.train.arguments.HONOURED", HONOURED - {"weight_decay"})
    check_arguments(arguments(tmp_path), reads_teacher=True)
    with pytest.raises(
        ValueError,
        match=r"args\.weight_decay: not honoured here: this version of minillm does not know it \(given: 0\.1\)",
    ):
        check_arguments(arguments(tmp_path, weight_decay=0.1), reads_teacher=True)


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    others = {
        "adam": {},
        "sgd": {"optim": "sgd"},
        "min_lr": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.0}},
    }
    return {name: weights_of(supervised(tmp_path_factory.mktemp(name), **changes)) for name, changes in others.items()}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_what_is_honoured_changes_what_is_trained(tmp_path: Path, baselines: dict[str, Weights], name: str) -> None:
    base = {"optim_args": "sgd", "max_grad_norm": "sgd", "lr_scheduler_kwargs": "min_lr"}.get(name, "adam")
    assert furthest(weights_of(supervised(tmp_path, **CHANGES[name])), baselines[base]) > 1e-4


@pytest.mark.parametrize("name", sorted(KEEPS))
def test_what_is_about_how_keeps_what_is_trained(
    tmp_path: Path, baselines: dict[str, Weights], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(variable, "0")  # full_determinism sets it for the whole process
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    trainer = supervised(tmp_path, **KEEPS[name])
    trainer.rollout_config = ROLLOUT
    try:
        assert furthest(weights_of(trainer), baselines["adam"]) < 1e-6
    finally:
        torch.use_deterministic_algorithms(False)
        trainer.close()
    assert name != "eval_on_start" or trainer.state.log_history[0]["eval_rouge_l"] >= 0


def test_updates_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    """AdamW with weight decay except on norms, clipping, and a warm-up, on the mean cross-entropy over all rows."""
    student = tiny_llama(1, layers=1, width=32)
    settings: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.3,
        "adam_beta1": 0.7,
        "adam_beta2": 0.8,
        "adam_epsilon": 1e-3,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }
    trainer = SupervisedTrainer(
        tiny_llama(1, layers=1, width=32),
        tiny_llama(2, layers=1, width=32),
        arguments(tmp_path, **settings),
        train_dataset=ROWS,
        cross_entropy=1.0,
        processing_class=tiny_tokenizer(),
    )
    found = weights_of(trainer)
    named = dict(student.named_parameters())
    groups = [
        {"params": [value for name, value in named.items() if "norm" not in name], "weight_decay": 0.3},
        {"params": [value for name, value in named.items() if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.7, 0.8), eps=1e-3)
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"] for row in ROWS])
    for rate in (0.0, 0.5, 1.0, 0.5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        logits = student(ids).logits[:, 2:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 3:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert furthest(found, {name: value.detach() for name, value in named.items()}) < 2e-5


def test_fine_tuning_honours_what_is_trls(tmp_path: Path) -> None:
    plain = fine_tuned(tmp_path)
    for changes in (
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"data_seed": 3},
        {"train_sampling_strategy": "sequential"},
    ):
        assert furthest(fine_tuned(tmp_path, **changes), plain) > 1e-3, changes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"per_device_train_batch_size": 0}, r"per_device_train_batch_size: must be at least 1 \(given: 0\)"),
        ({"learning_rate": float("nan")}, r"learning_rate: must be a finite number \(given: nan\)"),
        ({"weight_decay": -0.1}, r"weight_decay: must be at least 0.0 \(given: -0.1\)"),
        ({"adam_beta2": 1.0}, r"adam_beta2: must be below 1 \(given: 1\)"),
        ({"max_steps": 0}, r"max_steps: must be at least 1, or -1"),  # transformers would do one update
        ({"max_steps": -1, "num_train_epochs": 0}, r"num_train_epochs: must be more than 0"),
        (
            {"warmup_steps": 10},
            r"warmup_steps: lr_scheduler_type: constant has no warm-up: set constant_with_warmup, or 0 \(given: 10\)",
        ),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1}}, r"lr_scheduler_kwargs: lr_scheduler_type: constant takes none"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0.1}},
            "unexpected keyword argument 'min_lr'",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "1e-6"}},
            "min_lr: a number is needed",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            r"lr_scheduler_type: .*'num_decay_steps': set lr_scheduler_kwargs",
        ),
        ({"optim": "lomo"}, "optim: not honoured here: it steps inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "optim: not honoured here: it steps inside the backward pass"),
        ({"optim": "galore_adamw"}, "optim: not honoured here: it makes parameter groups of its own"),
        ({"optim": "schedule_free_adamw"}, "optim: not honoured here: the weights that it is meant to leave"),
        ({"optim_args": "momentum=0.9"}, "optim_args: momentum: optim: adamw_torch_fused does not read it"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.1"}, "optim_args: weight_decay: set weight_decay itself"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1: optim: sgd does not read it: leave it at 0.9"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches: not honoured here"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "num_steps: set gradient_accumulation_steps",
        ),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, "they do nothing without gradient_checkpointing"),
        ({"fp16": True}, "fp16: float16 is computed on GPUs only"),
        ({"report_to": "wandbb"}, "report_to: no such tracker; did you mean wandb"),
        ({"eval_strategy": "epoch"}, "eval_strategy: there are no rows to validate on: set eval_dataset"),
        ({"eval_on_start": True}, "eval_on_start: there are no rows to validate on: set eval_dataset"),
    ],
)
def test_values_that_would_fail_or_do_nothing_are_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=rf"^args\..*{fault}"):
        SupervisedTrainer(
            NOWHERE, NOWHERE, arguments(tmp_path, **changes), train_dataset=ROWS, processing_class=tiny_tokenizer()
        )


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("SwanLabCallback requires swanlab.")

    monkeypatch.setitem(
        __import__("minillm.train.optimisation").train.optimisation.INTEGRATION_TO_CALLBACK, "swanlab", absent
    )
    with pytest.raises(
        ValueError, match=r"args\.report_to: .* pip install swanlab\. Trackers installed: .*\(given: 'swanlab'\)"
    ):
        check_arguments(arguments(tmp_path, report_to=["swanlab"]), reads_teacher=True)


def test_settings_are_checked_without_starting_anything() -> None:
    """The first stage would inherit whatever the check of a recipe starts."""
    before = dict(PartialState._shared_state)
    PartialState._shared_state.clear()
    try:
        given: dict[str, Any] = {
            "learning_rate": "1e-6",
            "bf16": True,
            "tf32": True,
            "torch_compile": True,
            "fsdp": True,
        }
        assert list(setting_faults(given, fine_tuning=False, validated=False, reads_teacher=True)) == []
        assert given["learning_rate"] == 1e-6
        assert not PartialState._shared_state
    finally:
        PartialState._shared_state.update(before)


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "compute_loss_func", "model_init"])
def test_parameters_of_trainers_that_mean_nothing_here_are_refused(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {name: object()}
    with pytest.raises(ValueError, match=f"^{name}: not used here: "):
        SupervisedTrainer(
            NOWHERE, NOWHERE, arguments(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer(), **given
        )
