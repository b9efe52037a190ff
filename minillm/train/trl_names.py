"""What trainers take from a script for TRL: `teacher_model`, `peft_config`, and configurations for distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Signature, signature
from typing import Any

import torch
from peft import PeftConfig, get_peft_model

from minillm.errors import InputError
from minillm.models.load import load_model
from minillm.train.datasets import tokenize_answered
from minillm.train.pair import resolve_tokenizer
from minillm.train.trl_settings import log_completions, read_config


def accepts_trl_names(init: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor of a trainer take TRL's names too.

    `teacher_model` is `teacher`. `peft_config` gives the student a new adapter, as TRL does; a student that is named is
    then loaded in float32.

    Args:
        init: a constructor with the parameters `model`, `args`, `teacher` and `processing_class`.
    """
    shape = signature(init)

    @wraps(init)
    def with_names(self: Any, model: Any, *given: Any, **named: Any) -> None:
        named = _by_name(shape, self, model, given, named)
        model = _translated(model, named)
        init(self, model, **named)

    return with_names


def reads_trl_configs(init: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor of the on-policy trainer do what TRL's configurations for distillation say.

    It takes TRL's names too; see `accepts_trl_names` and `minillm.train.trl_settings`.
    """
    shape = signature(init)

    @wraps(init)
    def with_config(self: Any, model: Any, *given: Any, **named: Any) -> None:
        named = _by_name(shape, self, model, given, named)
        if not hasattr(named.get("train_dataset", ()), "__len__"):
            raise InputError("train_dataset: rows with a length are needed, not a stream: load them without streaming")
        self.trl_fields = read_config(model, named)
        responses = named.get("responses")
        if responses and "prompt_ids" not in responses[0]:
            tokenizer = resolve_tokenizer(model, named.get("processing_class"))
            named["responses"] = tokenize_answered(responses, tokenizer, "responses")
        model = _translated(model, named)
        init(self, model, **named)
        log_completions(self)

    return with_config


def _by_name(shape: Signature, self: Any, model: Any, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters but the model by name, `teacher_model` as `teacher`."""
    placed = dict(shape.bind_partial(self, model, *given).arguments)
    placed = {name: placed[name] for name in list(placed)[2:]}
    out = dict(named)
    if "teacher_model" in out:
        if "teacher" in placed or "teacher" in out:
            raise InputError("teacher_model: another name of teacher, which is given too: give one of them")
        out["teacher"] = out.pop("teacher_model")
    if twice := placed.keys() & out.keys():
        raise TypeError(f"several values for {', '.join(sorted(twice))}")
    return placed | out


def _translated(model: Any, named: dict[str, Any]) -> Any:
    """The student, with a new adapter if `peft_config` asks for one; its tokenizer is then settled in place."""
    config = named.pop("peft_config", None)
    if config is None:
        return model
    named["processing_class"] = resolve_tokenizer(model, named.get("processing_class"))
    return _with_adapter(model, config, getattr(named.get("args"), "seed", 0))


def _with_adapter(model: Any, config: Any, seed: int) -> Any:
    if not isinstance(config, PeftConfig):
        raise InputError(f"peft_config: a configuration of PEFT is needed, such as LoraConfig, not {type(config)}")
    if hasattr(model, "get_base_model"):
        raise InputError(
            "peft_config: the student has an adapter already: leave peft_config out, or give a plain model"
        )
    student: Any = load_model(model, torch.float32) if isinstance(model, str) else model
    torch.manual_seed(seed)  # the same adapter in every process, as in TRL
    return get_peft_model(student, config)
