"""What TRL's `GKDConfig` and `DistillationConfig` say, as settings of the on-policy trainer.

Given as `args`, without `objective` and `rollout`, they train what TRL's own trainers do: a divergence at every token
of responses that the student has just sampled, and nothing about later tokens. `objective=Objective.recommended()` is
then the step to MiniLLM.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from minillm.data.lazy import IN_MEMORY
from minillm.errors import InputError
from minillm.loss.config import DivergenceConfig, Objective
from minillm.rollout.config import RolloutConfig
from minillm.train.datasets import tokenize_answered, tokenize_prompts, tokenize_validation
from minillm.train.pair import resolve_tokenizer
from minillm.train.samples import SampleLog

logger = logging.getLogger(__name__)

SAMPLING = {
    "temperature": "rollout.temperature, which divides the logits of the loss too",
    "max_new_tokens": "rollout.max_new_tokens",
    "max_completion_length": "rollout.max_new_tokens",
    "lmbda": "rollout.on_policy: a share of each update, where TRL tosses a coin for each batch; the others are the "
    "answers of train_dataset",
    "use_vllm": "rollout.engine: vllm, or transformers",
}
"""Fields that are read if no `rollout` is given."""
READ = SAMPLING | {
    "beta": "objective.divergence, with objective.long_term: 0, if no objective is given",
    "teacher_model_name_or_path": "the teacher, if none is given",
    "log_completions": "samples.jsonl in output_dir, and a table in the trackers, every logging_steps",
}
"""Fields that `MiniLLMTrainer` reads, and what they set."""


def is_distillation_config(args: Any) -> bool:
    """Whether arguments are TRL's `GKDConfig` or `DistillationConfig`, or of a class made from them."""
    return any(kind.__name__ in ("GKDConfig", "DistillationConfig") for kind in type(args).__mro__)


def read_config(model: Any, named: dict[str, Any]) -> frozenset[str]:
    """Settle what the trainer is not given by what TRL's configuration says.

    Args:
        model: the student.
        named: the other parameters of the trainer by name. `teacher`, `objective`, `rollout`, `responses` and the rows
            are settled in place.

    Returns:
        The fields of the configuration that were read. The others count as not read, so that one which is set beside
        the parameter that decides is refused.

    Raises:
        InputError: a field excludes another parameter.
    """
    args, read = named.get("args"), set(READ)
    if not is_distillation_config(args) or "train_dataset" not in named:
        return frozenset()
    if (teacher := getattr(args, "teacher_model_name_or_path", None)) is not None:
        if named.get("teacher") is None:
            named["teacher"] = teacher
        else:
            read.discard("teacher_model_name_or_path")
    given_objective, given_rollout = named.get("objective"), named.get("rollout")
    if given_objective is None:
        named["objective"] = objective_of(args)
    else:
        read.discard("beta")
    if given_rollout is not None:
        return frozenset(read - SAMPLING.keys())
    _check_lmbda(args, named["objective"])
    tokenizer = resolve_tokenizer(model, named.get("processing_class"))
    named["processing_class"] = tokenizer
    rows = named["train_dataset"]
    if getattr(args, "lmbda", 1.0) < 1 and named.get("responses") is None:
        named["responses"] = tokenize_answered(rows, tokenizer)
    named["eval_dataset"] = tokenize_validation(named.get("eval_dataset"), tokenizer)
    longest = max((len(row["prompt_ids"]) for row in named["eval_dataset"] or ()), default=1)
    if len(rows) <= IN_MEMORY:
        prompts = tokenize_prompts(rows, tokenizer, sys.maxsize)
        longest = max(longest, *map(len, prompts))
        named["train_dataset"] = [{**rows[i], "prompt_ids": prompts[i]} for i in range(len(prompts))]
    else:
        longest = max(longest, RolloutConfig().max_prompt_tokens)
    named["rollout"] = rollout_of(args, longest)
    return frozenset(read)


def objective_of(args: Any) -> Objective:
    """The loss of TRL's trainers: the generalised Jensen-Shannon divergence of `beta` at each token, and no more.

    TRL takes the KL divergences themselves for β = 0 (forward) and β = 1 (reverse).
    """
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    divergence = (
        DivergenceConfig(name=ends[args.beta])
        if args.beta in ends
        else DivergenceConfig(name="jensen_shannon", beta=args.beta)
    )
    return Objective.recommended(divergence=divergence, long_term=0.0)


def rollout_of(args: Any, max_prompt_tokens: int) -> RolloutConfig:
    """How TRL's trainers sample: a new batch from the student alone for each update.

    Args:
        args: the configuration.
        max_prompt_tokens: the most tokens of a prompt, which TRL does not limit.

    Raises:
        InputError: responses have no limit.
    """
    limit = getattr(args, "max_completion_length", None) or getattr(args, "max_new_tokens", None)
    if limit is None:
        raise InputError("args.max_completion_length: responses need a limit here: give a number of tokens")
    if "GKDConfig" in {kind.__name__ for kind in type(args).__mro__} and args.temperature != 1:
        logger.warning(
            "temperature=%g divides the logits of the loss too; TRL's GKDTrainer samples with it and computes its loss "
            "at 1.",
            args.temperature,
        )
    return RolloutConfig(
        engine="vllm" if getattr(args, "use_vllm", False) else "transformers",
        num_rollouts=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        inner_epochs=1,
        on_policy=getattr(args, "lmbda", 1.0),
        teacher_mix=0.0,
        max_new_tokens=limit,
        max_prompt_tokens=max_prompt_tokens,
        temperature=args.temperature,
    )


def log_completions(trainer: Any) -> None:
    """Log samples of a trainer as TRL's `log_completions` does, if its arguments ask for it."""
    args = trainer.args
    if is_distillation_config(args) and getattr(args, "log_completions", False):
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        every = max(int(args.logging_steps), 1)
        trainer.add_callback(SampleLog(trainer, folder / "samples.jsonl", every))


def _check_lmbda(args: Any, objective: Objective) -> None:
    lmbda = getattr(args, "lmbda", 1.0)
    if lmbda < 1 and objective.long_term:
        raise InputError(
            f"args.lmbda: {lmbda:g} trains on the answers of the data too, and the long-term term of the objective "
            f"needs responses that the student has sampled: {type(args).__name__}(lmbda=1.0), or "
            "Objective(..., long_term=0)"
        )
