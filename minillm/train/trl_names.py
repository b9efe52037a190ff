"""TRL's names of a trainer's parameters that are honoured here: `teacher_model` and `peft_config`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft import PeftConfig, get_peft_model

from minillm.errors import InputError
from minillm.models.load import load_model
from minillm.train.pair import resolve_tokenizer


def accepts_trl_names(init: Callable[..., None]) -> Callable[..., None]:
    """Let the constructor of a trainer take TRL's names too.

    `teacher_model` is `teacher`. `peft_config` gives the student a new adapter, as TRL does; a student that is named is
    then loaded in float32.

    Args:
        init: a constructor with the parameters `model`, `teacher` and `processing_class`.
    """

    @wraps(init)
    def with_names(self: Any, model: Any, *given: Any, **named: Any) -> None:
        if "teacher_model" in named:
            if given or "teacher" in named:
                raise InputError("teacher_model: another name of teacher, which is given too: give one of them")
            named["teacher"] = named.pop("teacher_model")
        config = named.pop("peft_config", None)
        if config is not None:
            tokenizer = resolve_tokenizer(model, named.get("processing_class"))
            model, named["processing_class"] = _with_adapter(model, config), tokenizer
        init(self, model, *given, **named)

    return with_names


def _with_adapter(model: Any, config: Any) -> Any:
    if not isinstance(config, PeftConfig):
        raise InputError(f"peft_config: a configuration of PEFT is needed, such as LoraConfig, not {type(config)}")
    if hasattr(model, "get_base_model"):
        raise InputError(
            "peft_config: the student has an adapter already: leave peft_config out, or give a plain model"
        )
    student: Any = load_model(model, torch.float32) if isinstance(model, str) else model
    return get_peft_model(student, config)
