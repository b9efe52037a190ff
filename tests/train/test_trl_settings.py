"""TRL's configurations for distillation as `args`: every field is read, ignored or refused by name, and the loss is TRL's."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.gkd.gkd_config import GKDConfig
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from minillm.errors import InputError
from minillm.loss.config import DivergenceConfig, Objective
from minillm.models.load import load_model
from minillm.train.arguments import check_arguments
from minillm.train.on_policy import MiniLLMTrainer
from minillm.train.trl_arguments import EQUIVALENTS, IGNORED, check_parameters, extra_names
from minillm.train.trl_settings import READ, SAMPLING, objective_of, rollout_of
from tests.conftest import tiny_tokenizer
from tests.train.argument_runs import NOWHERE
from tests.train.common import PROMPTS, ROLLOUT

# For every field that TRL adds, a value that is not its default. A new field of TRL is missing here, and fails a test.
CHANGED: dict[str, Any] = {
    "activation_offloading": True, "assistant_only_loss": True, "beta": 0.3, "cache_implementation": "static",
    "chat_template_kwargs": {"thinking": True}, "chat_template_path": "x", "completion_only_loss": False,
    "dataset_kwargs": {"a": 1}, "dataset_num_proc": 2, "dataset_text_field": "said", "disable_dropout": True,
    "ds3_gather_for_generation": False, "eos_token": "<bot>", "eval_packing": True, "generation_kwargs": {"num_beams": 2},
    "lmbda": 0.25, "log_completions": True, "log_unique_prompts": True, "loss_type": "dft", "max_completion_length": 5,
    "max_length": 64, "max_new_tokens": 6, "max_tool_calling_iterations": 2, "min_p": 0.1, "model_init_kwargs": {"a": 1},
    "num_completions_to_print": 3, "packing": True, "packing_strategy": "wrapped", "pad_to_multiple_of": 8,
    "pad_token": "<eos>", "padding_free": True, "repetition_penalty": 1.2, "router_aux_loss_coef": 0.1, "seq_kd": True,
    "shuffle_dataset": False, "teacher_model_init_kwargs": {"a": 1}, "teacher_model_name_or_path": "x",
    "teacher_model_revision": "main", "temperature": 0.7, "top_k": 5, "top_p": 0.9, "truncation_mode": "keep_end",
    "trust_remote_code": True, "use_vllm": True, "vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.5,
    "vllm_group_port": 1, "vllm_max_model_length": 64, "vllm_mode": "server", "vllm_model_impl": "transformers",
    "vllm_server_base_url": "http://x", "vllm_server_host": "x", "vllm_server_port": 1, "vllm_server_timeout": 1.0,
    "vllm_structured_outputs_regex": "a*", "vllm_tensor_parallel_size": 2,
}  # fmt: skip
OTHERS = {
    GKDConfig: {"disable_dropout": False, "shuffle_dataset": True},
    DistillationConfig: {},
}  # where the other class has another default


def config(kind: Any, folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return kind(str(folder), **(settings | changes))


def fields_of(kind: Any, folder: Path) -> list[str]:
    return extra_names(config(kind, folder))


@pytest.mark.parametrize("kind", [GKDConfig, DistillationConfig])
def test_every_field_of_trl_is_read_ignored_or_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    for name in fields_of(kind, tmp_path):
        value = (CHANGED | OTHERS[kind])[name]
        fresh = type(kind.__name__, (kind,), {})  # one warning per class
        args = config(fresh, tmp_path, **{name: value})
        caplog.clear()
        if name in READ or name in IGNORED:
            check_arguments(args, reads_teacher=True, honoured=frozenset(READ))
            assert (name in IGNORED) == (f"{name} ({IGNORED.get(name)})" in caplog.text), name
        elif (name, value) in (("disable_dropout", True), ("shuffle_dataset", True)):
            check_arguments(args, reads_teacher=True)  # it always holds here
        else:
            with pytest.raises(InputError) as caught:
                check_arguments(args, reads_teacher=True, honoured=frozenset(READ))
            line = f"args.{name}: a field of {kind.__name__} that is not read; here: {EQUIVALENTS[name]}"
            assert str(caught.value).startswith(line)


def test_no_table_names_a_field_that_trl_has_not(tmp_path: Path) -> None:
    there = {name for kind in (GKDConfig, DistillationConfig) for name in fields_of(kind, tmp_path)}
    assert CHANGED.keys() == there
    assert READ.keys() <= there
    assert IGNORED.keys() <= there
    assert not READ.keys() & IGNORED.keys()
    assert not EQUIVALENTS.keys() & IGNORED.keys()


def test_every_parameter_of_trls_trainers_is_taken_or_refused() -> None:
    taken = {*signature(MiniLLMTrainer.__init__).parameters, "teacher_model", "peft_config"}
    taken |= {"eval_dataset", "callbacks", "optimizers"}  # of base classes
    for kind in (GKDTrainer, DistillationTrainer):
        for name in list(signature(kind.__init__).parameters)[1:]:
            if name not in taken:
                with pytest.raises(InputError, match=f"{name}: not used here"):
                    check_parameters({name: object()})


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [GKDConfig, DistillationConfig])
def test_the_loss_of_an_update_is_trls(pair: tuple[str, str], tmp_path: Path, kind: Any, beta: float) -> None:
    """On the same responses, by TRL's own function over full logits."""
    own = {"max_new_tokens": 6, "lmbda": 0.5} if kind is GKDConfig else {"max_completion_length": 6}
    args = config(kind, tmp_path, temperature=0.7, beta=beta, **own)
    rows = [{"prompt": row["prompt"], "completion": f" w{n} w3"} for n, row in enumerate(PROMPTS)]
    trainer = MiniLLMTrainer(pair[0], teacher_model=pair[1], args=args, train_dataset=rows)
    trainer.train()
    rollouts = trainer.rollouts
    given = [trainer.source.others.is_given(rollout) for rollout in rollouts]
    assert sum(given) == (2 if kind is GKDConfig else 0)
    assert len(rollouts) == 4
    student, teacher = (load_model(folder, torch.float32) for folder in pair)
    total, count = 0.0, 0
    for rollout in rollouts:
        ids, start = torch.tensor([rollout.prompt_ids + rollout.response_ids]), len(rollout.prompt_ids) - 1
        with torch.no_grad():
            one, other = (model(ids).logits[:, start:-1] for model in (student, teacher))
            total += float(GKDTrainer.generalized_jsd_loss(one, other, None, beta, 0.7, "sum"))
        count += len(rollout.response_ids)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_what_is_not_given_is_what_trl_does(pair: tuple[str, str], tmp_path: Path) -> None:
    args = config(DistillationConfig, tmp_path, max_completion_length=6, teacher_model_name_or_path=pair[1])
    long = {"prompt": " ".join(["w1"] * 40)}
    trainer = MiniLLMTrainer(pair[0], None, args, train_dataset=[*PROMPTS, long])
    found = trainer.rollout_config
    assert (found.num_rollouts, found.inner_epochs, found.teacher_mix, found.on_policy) == (4, 1, 0.0, 1.0)
    assert (found.engine, found.max_new_tokens, found.temperature) == ("transformers", 6, 1.0)
    assert found.max_prompt_tokens == 40  # TRL cuts no prompt
    assert trainer.objective == Objective.recommended(divergence=DivergenceConfig(name="reverse_kl"), long_term=0.0)
    assert rollout_of(config(DistillationConfig, tmp_path, use_vllm=True), 8).engine == "vllm"
    assert objective_of(config(GKDConfig, tmp_path)).divergence.parameters == {"beta": 0.5}
    assert rollout_of(config(GKDConfig, tmp_path), 8).on_policy == 0.5


def test_completions_are_logged_where_trls_field_asks_for_it(pair: tuple[str, str], tmp_path: Path) -> None:
    args = config(DistillationConfig, tmp_path / "out", max_completion_length=4, log_completions=True)
    trainer = MiniLLMTrainer(*pair, args, train_dataset=PROMPTS)
    trainer.train()
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 4


def test_a_parameter_and_a_field_that_say_the_same_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {"train_dataset": PROMPTS, "processing_class": tiny_tokenizer()}
    args = config(GKDConfig, tmp_path, beta=0.3, teacher_model_name_or_path="x", temperature=0.7, lmbda=0.7)
    with pytest.raises(InputError) as caught:
        MiniLLMTrainer(NOWHERE, NOWHERE, args, objective=Objective.recommended(), rollout=ROLLOUT, **given)
    refused = [line.split(":")[0].removeprefix("args.") for line in str(caught.value).splitlines()]
    assert set(refused) == {"beta", "teacher_model_name_or_path", "temperature", "lmbda"}
    assert {"temperature", "lmbda"} <= SAMPLING.keys()
    with pytest.raises(InputError, match=r"args\.lmbda: 0\.5 trains on the answers of the data too.*lmbda=1\.0"):
        MiniLLMTrainer(NOWHERE, NOWHERE, config(GKDConfig, tmp_path), objective=Objective.recommended(), **given)
    with pytest.raises(InputError, match="max_completion_length: responses need a limit"):
        MiniLLMTrainer(NOWHERE, NOWHERE, config(DistillationConfig, tmp_path, max_completion_length=None), **given)
    ours = MiniLLMTrainer(
        *pair, config(GKDConfig, tmp_path, lmbda=1.0), objective=Objective.recommended(), train_dataset=PROMPTS
    )
    assert ours.objective.long_term == 1.0
    assert ours.rollout_config.temperature == 0.9
