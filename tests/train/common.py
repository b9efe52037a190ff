"""What the tests of training share: prompts, settings, short runs, and an engine with weights of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments

from minillm.errors import EngineError
from minillm.loss.config import Objective
from minillm.models.load import load_model
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.teacher.local import LocalTeacher
from minillm.train.base import DistillationTrainer
from minillm.train.on_policy import MiniLLMTrainer

PROMPTS = [{"prompt": f"<user> w{i} w{i + 1} <bot>"} for i in range(12)]

ROLLOUT = RolloutConfig(
    engine="transformers",
    num_rollouts=8,
    inner_epochs=2,
    teacher_mix=0.3,
    max_new_tokens=10,
    max_prompt_tokens=8,
)

OFF_POLICY = Objective.recommended(long_term=0.0, divergence={"name": "skew_reverse_kl", "skew": 0.1})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **(settings | changes))


def stop_after(trainer: Any, stop: int | None) -> None:
    """Have a trainer save and stop after an update; None: it goes on to its end."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            if state.global_step == stop:
                control.should_save = control.should_training_stop = True
            return control

    trainer.add_callback(Stop())


def train(
    pair: tuple[str, str], folder: Path, *, resume: str | None = None, stop: int | None = None, **changes: Any
) -> MiniLLMTrainer:
    keys = ("objective", "rollout", "train_dataset", "text_dataset", "responses", "processing_class", "eval_dataset")
    options = {key: changes.pop(key) for key in keys if key in changes}
    options = {"rollout": ROLLOUT, "train_dataset": PROMPTS} | options
    trainer = MiniLLMTrainer(*pair, arguments(folder, **changes), **options)
    stop_after(trainer, stop)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class OwnEngine(TransformersEngine):
    """Samples from weights of its own, as a server does; `trace` records the calls and their times."""

    def __init__(
        self, pair: tuple[str, str], trace: list[tuple[str, float, float]], fail_at: int | None = None
    ) -> None:
        student, teacher = (cast("Any", load_model(folder, torch.float32)) for folder in pair)
        super().__init__(student, teacher=LocalTeacher(teacher))
        self._trace, self._fail_at, self.calls = trace, fail_at, 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._fail_at:
            raise EngineError("http://gone: ConnectError")
        start = time.monotonic()
        out = super().generate(*args, **kwargs)
        time.sleep(0.2)
        self._trace.append(("generate", start, time.monotonic()))
        return out


def teacher_model(trainer: DistillationTrainer) -> Any:
    """The model of a teacher in this process."""
    assert isinstance(trainer.teacher, LocalTeacher)
    return trainer.teacher.model


def launch(pair: tuple[str, str], folder: Path, kind: str) -> None:
    """Run `tests.train.two_processes` in two processes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "tests.train.two_processes",
        *pair,
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if kind.startswith("fsdp2"):
        environment |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(folder), kind], capture_output=True, text=True, timeout=900, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
