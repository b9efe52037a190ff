"""A short run of MiniLLMTrainer that must give the same in one process and in two; started by accelerate launch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from minillm.errors import TrainingDiverged
from minillm.loss.config import Objective
from minillm.models.config import AdapterConfig
from minillm.models.load import load_model, load_tokenizer
from minillm.models.lora import load_student
from minillm.models.shards import is_sharded
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.transformers import TransformersEngine
from minillm.teacher.local import LocalTeacher
from minillm.train.on_policy import MiniLLMTrainer

PROMPTS = [{"prompt": f"<user> w{i} w{i + 1} <bot>"} for i in range(12)]


def deepspeed(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed; stage 3 shards weights, stage 2 gradients and optimiser states."""
    whole = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    zero = {"stage": stage} | (whole if stage == 3 else {})
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def shard_on_cpus() -> None:
    """Have accelerate shard over gloo, which it does only if it believes that there is an accelerator."""
    AcceleratorState.distributed_type = property(lambda _: DistributedType.FSDP, lambda *_: None)  # pyright: ignore
    original = AcceleratorState.__init__

    def told(self: Any, *given: Any, fsdp_plugin: Any = None, **others: Any) -> None:
        original(self, *given, fsdp_plugin=fsdp_plugin, **others)
        if fsdp_plugin is not None:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = told


def end_in_error(trainer: MiniLLMTrainer, folder: str) -> None:
    rank = trainer.accelerator.process_index
    states = lambda _, args, out: setattr(out, "last_hidden_state", out.last_hidden_state * float("nan"))  # noqa: E731

    def spoil(update: int) -> Any:
        if update == 1 and rank == trainer.accelerator.num_processes - 1:
            model: Any = trainer.model
            model.base_model.register_forward_hook(lambda *given: states(*given) if torch.is_grad_enabled() else None)
        return original(update)

    original, trainer.micro_batches = trainer.micro_batches, spoil
    try:
        trainer.train()
    except TrainingDiverged as error:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"error-{rank}").write_text(str(error), encoding="utf-8")


def run(student: str, teacher: str, folder: str, kind: str = "plain") -> int:
    """Train on two rollout batches of 8, with one update on each, and return the number of processes.

    Args:
        student: folder of the student.
        teacher: folder of the teacher.
        folder: where the run writes.
        kind: what the run is about. `whitened`: the objective of LMOps, with one micro-batch per update and divided by
            the update's tokens, so that the number of processes must not matter. `server`: a vLLM server started by the
            run. `words`: prices and baselines by prompt, whose responses are in both processes. `replay`: twelve updates, with replayed rollouts in every batch, different ones in each process.
            `zero3`, `fsdp2`: with two processes the student is sharded, and sampled as a whole copy. `zero2`: its
            gradients and optimiser states are. `zero3-lora`, `fsdp2-lora`: its adapter is. `own-base`: a student with
            an adapter, whose teacher is its base model. `broken`: the last process has a loss that is not finite, and
            every process writes the error to a file.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    micro, accumulation = (8 // world, 1) if kind == "whitened" else (2, 4 // world)
    if kind.startswith("fsdp2") and world > 1:
        shard_on_cpus()
    arguments = TrainingArguments(
        folder,
        optim="sgd",
        learning_rate=0.05,
        max_steps=2,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        deepspeed=deepspeed(int(kind[4])) if kind.startswith("zero") and world > 1 else None,
    )
    rollout = RolloutConfig(
        engine="server" if kind == "server" else "transformers",
        servers="auto" if kind == "server" else [],
        num_rollouts=8,
        inner_epochs=1,
        teacher_mix=0.3,
        max_new_tokens=10,
        max_prompt_tokens=8,
        server_patience=900,
    )
    text = [{"text": " ".join(f"w{(i * j) % 28}" for j in range(12))} for i in range(8)]
    changes: dict[str, Any] = {"language_model": 0.3, "language_model_block": 16}
    whitened = Objective.reference(normalise="update_tokens", **changes)
    objective = whitened if kind == "whitened" else Objective.recommended(**changes)
    if kind == "words":
        rollout = rollout.model_copy(update={"samples_per_prompt": 2})
        objective = Objective.words(baseline="prompt_position", credit_offset="rate_per_prompt", **changes)
    if kind == "replay":
        objective = Objective.recommended(long_term=0.0, **changes)
        rollout = rollout.model_copy(update={"replay": 0.5, "inner_epochs": 2, "teacher_mix": 0.0})
        arguments.max_steps, arguments.logging_steps = 12, 1
    engine = None
    given: Any = student
    sharded = kind.startswith(("zero", "fsdp2"))
    if sharded:
        engine = TransformersEngine(
            load_model(student, torch.float32), teacher=LocalTeacher(load_model(teacher, torch.float32))
        )
    if kind.endswith("-lora") or kind == "own-base":
        torch.manual_seed(0)
        given = load_student(student, AdapterConfig(rank=4))
    trainer = MiniLLMTrainer(
        given,
        None if kind == "own-base" else teacher,
        arguments,
        processing_class=load_tokenizer(student),
        objective=objective,
        rollout=rollout,
        train_dataset=PROMPTS,
        text_dataset=text,
        engine=engine,
    )
    if kind == "broken":
        end_in_error(trainer, folder)
        return world
    before = {
        name: value.clone() for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    trainer.train()
    if sharded:
        assert is_sharded(trainer.model) == (world == 2 and kind != "zero2")
        assert all(entry["engine_mismatch"] < 1e-5 for entry in trainer.state.log_history if "engine_mismatch" in entry)
        trainer.save_student(folder)
    trainer.close()
    if kind == "replay":
        # Whether all rollouts of a micro-batch are new differs between processes; the logged names must not.
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logged) == 12
        assert all(0 <= entry["finished"] <= 1 and 0 < entry["response_length"] <= 10 for entry in logged), logged
        assert any("engine_mismatch" in entry for entry in logged)
    if trainer.accelerator.is_main_process:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        torch.save(
            {"world": trainer.accelerator.num_processes, "weights": weights, "before": before}, f"{folder}/weights.pt"
        )
    return trainer.accelerator.num_processes


if __name__ == "__main__":
    from accelerate import PartialState

    state = PartialState(cpu=True)
    run(*sys.argv[1:])
    # At the interpreter's exit, gloo's threads sometimes end in std::terminate.
    state.wait_for_everyone()
    state.destroy_process_group()
