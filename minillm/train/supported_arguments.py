"""Which `transformers.TrainingArguments` are honoured, and which are refused and why."""

from __future__ import annotations

# One name per line would take a hundred lines.
HONOURED = frozenset({
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm", "bf16", "fp16", "tf32", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "logging_nan_inf_filter", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
    "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
    "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "restore_callback_states_from_checkpoint", "full_determinism", "seed", "use_cpu", "accelerator_config",
    "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug", "skip_memory_metrics", "do_train", "do_eval",
    "do_predict", "resume_from_checkpoint", "local_rank",
})  # fmt: skip
"""Honoured by every trainer, as transformers documents them."""

_SAMPLED = "validation samples responses and scores them itself"
_FORWARD = "it replaces parts of the forward that the loss is computed in"
REFUSED = {
    "per_device_eval_batch_size": _SAMPLED,
    "prediction_loss_only": _SAMPLED,
    "eval_do_concat_batches": _SAMPLED,
    "eval_use_gather_object": _SAMPLED,
    "eval_accumulation_steps": _SAMPLED,
    "include_for_metrics": _SAMPLED,
    "batch_eval_metrics": _SAMPLED,
    "bf16_full_eval": _SAMPLED + ", in the engine's dtype",
    "fp16_full_eval": _SAMPLED + ", in the engine's dtype",
    "label_names": "training data are prompt_ids and response_ids",
    "length_column_name": "rows have no column of lengths; their lengths are known",
    "use_liger_kernel": _FORWARD,
    "liger_kernel_config": _FORWARD,
    "use_cache": "training reads whole sequences at once and keeps no keys and values",
    "auto_find_batch_size": "an update would train on fewer rows than the settings say; lower "
    "per_device_train_batch_size and raise gradient_accumulation_steps",
    "optim_target_modules": "it belongs to GaLore and APOLLO, which are refused (optim)",
    "parallelism_config": "one process scores whole sequences: use FSDP or ZeRO-3 for models that do not fit",
}
"""Refused by every trainer, with the reason."""

LOADER = "the data of an update follow from its number and the seed; no data loader reads them"
FINE_TUNING_ONLY = {
    "neftune_noise_alpha": "noise on the student's embeddings is not part of the objective, and its log-probabilities "
    "would no longer be those of the student that is sampled",
    "label_smoothing_factor": "the loss is the objective's, computed from student's and teacher's distributions",
    "average_tokens_across_devices": "losses are divided by token counts over all processes (objective.normalise)",
    "include_num_input_tokens_seen": "updates log their own tokens and tokens per second",
    "train_sampling_strategy": "rows are ordered by the seed, and rows of similar length share a micro-batch",
    "remove_unused_columns": "rows are read by the names of their columns",
    "data_seed": "seed orders the data too",
    "ignore_data_skip": "the data of an update follow from its number, so a resume skips none",
    **dict.fromkeys(
        (
            "dataloader_drop_last",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        LOADER,
    ),
}
"""Honoured by FineTuner alone, whose loss and data loader are TRL's; the reason is for the other trainers."""

_PUSH = "set push_to_hub at the top of the recipe, which uploads the finished student"
_SCRIPT = "the stages of the recipe say what is done"
IN_A_RECIPE = {
    "output_dir": "it follows from run_dir",
    "seed": "set seed at the top of the recipe",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _PUSH),
    "do_train": _SCRIPT,
    "do_eval": _SCRIPT,
    "do_predict": _SCRIPT,
    "resume_from_checkpoint": "a stage continues from its own last checkpoint",
    "save_only_model": "a stage continues from its last checkpoint, which needs the optimiser's state",
    "enable_jit_checkpoint": "a stage that it stopped would count as finished; Ctrl-C (SIGINT) finishes the update "
    "and saves",
    "local_rank": "the launcher sets it",
    "save_on_each_node": "all nodes share run_dir, and would write the same files in it at once",
}
"""Honoured by trainers, but not set in a recipe, where they belong to the stage and not to the user."""

RENAMED = {
    "warmup_ratio": "warmup_steps, where a number below 1 is a share of the updates",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
}
"""Names in transformers 4, and those of today."""

# Limits of numbers.
AT_LEAST = {
    "learning_rate": 0.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "warmup_steps": 0.0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "adam_epsilon": 0.0,
    "save_total_limit": 1,
    "eval_delay": 0.0,
    "torch_empty_cache_steps": 1,
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": 0.0,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
}
MORE_THAN = {"logging_steps": 0, "eval_steps": 0, "save_steps": 0}
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "label_smoothing_factor": 1}

CHECKPOINTING_OPTIONS = {
    "use_reentrant",
    "preserve_rng_state",
    "determinism_check",
    "debug",
    "early_stop",
    "context_fn",
    "every_n_layers",
    "offload",
}
"""Options of gradient checkpointing."""
