"""Fields of TRL's configurations, and parameters of its trainers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl.experimental.gkd.gkd_config import GKDConfig
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from minillm.loss.config import Objective
from minillm.train.arguments import check_arguments
from minillm.train.finetune import FineTuner
from minillm.train.on_policy import MiniLLMTrainer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.train.argument_runs import NOWHERE, ROWS, Weights, furthest, weights_of
from tests.train.common import PROMPTS, ROLLOUT, train


def test_fields_of_trl_are_refused_with_their_names_here(tmp_path: Path) -> None:
    args = DistillationConfig(
        str(tmp_path), use_cpu=True, temperature=0.7, beta=0.5, max_completion_length=32, top_k=5, vllm_mode="server"
    )
    with pytest.raises(ValueError, match="temperature") as caught:
        MiniLLMTrainer(
            NOWHERE,
            NOWHERE,
            args,
            train_dataset=PROMPTS,
            objective=Objective.recommended(),
            rollout=ROLLOUT,
            processing_class=tiny_tokenizer(),
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for name, value, here in (
        ("temperature", 0.7, "RolloutConfig(temperature=...)"),
        ("beta", 0.5, "DivergenceConfig"),
        ("max_completion_length", 32, "RolloutConfig(max_new_tokens=...)"),
        ("top_k", 5, "RolloutConfig(temperature=...)"),
        ("vllm_mode", "'server'", 'RolloutConfig(engine="server"'),
    ):
        line = next(
            line
            for line in lines
            if line.startswith(f"args.{name}: a field of DistillationConfig that is not read; here: ")
        )
        assert here in line
        assert line.endswith(f"(given: {value})")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (DistillationConfig, {}),
        (GKDConfig, {}),
        (Seq2SeqTrainingArguments, {}),
        (GRPOConfig, {"per_device_train_batch_size": 8}),  # it computes generation_batch_size from other fields
        (DistillationConfig, {"disable_dropout": True}),
        (GKDConfig, {"max_length": None}),  # these always hold here
    ],
)
def test_a_configurations_own_defaults_are_no_choice(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: Any,
    changes: dict[str, Any],
) -> None:
    unseen = type(kind.__name__, (kind,), {})  # one warning per class: no other test has used this one
    for _ in range(2):
        check_arguments(unseen(str(tmp_path), use_cpu=True, **changes), reads_teacher=True)
    said = [record for record in caplog.records if "only the fields of TrainingArguments" in record.message]
    assert len(said) == (kind is not Seq2SeqTrainingArguments)


def test_a_classs_own_fields_are_looked_at_whoever_made_it(tmp_path: Path) -> None:
    @dataclass
    class Mine(TrainingArguments):
        alpha: float = 1.0

    check_arguments(Mine(str(tmp_path), use_cpu=True), reads_teacher=True)
    with pytest.raises(ValueError, match=r"args\.alpha: a field of Mine that is not read \(given: 2\.0\)"):
        check_arguments(Mine(str(tmp_path), use_cpu=True, alpha=2.0), reads_teacher=True)
    with pytest.raises(
        ValueError, match=r"args\.predict_with_generate: a field of Seq2SeqTrainingArguments that is not read"
    ):
        check_arguments(
            Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, predict_with_generate=True), reads_teacher=True
        )
    with pytest.raises(ValueError, match=r"args: transformers.TrainingArguments are needed \(given: dict\)"):
        check_arguments({}, reads_teacher=True)  # pyright: ignore[reportArgumentType]


def test_an_sft_config_reaches_trl_as_far_as_it_is_honoured(tmp_path: Path) -> None:
    def config(**changes: Any) -> SFTConfig:
        return SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=2,
            **changes,
        )

    def trained(**changes: Any) -> Weights:
        student = tiny_llama(1, layers=1, width=32)
        trainer = FineTuner(
            student, config(learning_rate=1e-2, **changes), train_dataset=ROWS, processing_class=tiny_tokenizer()
        )
        if changes:
            assert trainer.args.hub_token == "secret"
        return weights_of(trainer)

    assert furthest(trained(loss_type="dft", hub_token="secret"), trained()) > 1e-4
    for changes in (
        {"packing": True},
        {"max_length": 64},
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
    ):
        name = next(iter(changes))
        with pytest.raises(ValueError, match=rf"args\.{name}: a field of SFTConfig that is not read; here: "):
            FineTuner(NOWHERE, config(**changes), train_dataset=ROWS)
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        max_steps=1,
    )
    FineTuner(tiny_llama(1, layers=1, width=32), args, train_dataset=ROWS, processing_class=tiny_tokenizer())


def test_noise_on_embeddings_is_refused_by_the_on_policy_trainer(pair: tuple[str, str], tmp_path: Path) -> None:
    """NEFTune made log q of the sampled tokens differ from the engine's by 0.1 nats, which no warning reported."""
    with pytest.raises(ValueError, match=r"args\.neftune_noise_alpha: not honoured here"):
        train(pair, tmp_path, neftune_noise_alpha=5.0)
