"""The student that is being trained: an engine that samples it with its current weights, and how it is saved."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm.errors import InputError
from minillm.models.configs import context_length, text_config
from minillm.models.conventions import Conventions
from minillm.models.load import resolve_cached
from minillm.models.quantization import is_quantized
from minillm.models.saving import cast_folder, save_plain
from minillm.redaction import is_secret
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine, EngineSizing, Push
from minillm.rollout.engines.choose import make_engine, sync_weights
from minillm.teacher.base import Teacher
from minillm.teacher.local import LocalTeacher
from minillm.train.journal import Journal
from minillm.train.log import Metrics
from minillm.train.memory import memory_named
from minillm.train.mixin import TrainerPart

logger = logging.getLogger(__name__)


def check_one_gpu(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process (DataParallel).

    Raises:
        InputError: there are several; the message says how to start.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs are visible to one process: start with accelerate launch, or make one visible "
            "(CUDA_VISIBLE_DEVICES=0)"
        )


def check_sharded_student(accelerator: Accelerator, student: PreTrainedModel) -> None:
    """Check that a student sharded over processes (FSDP, ZeRO-3) can be trained, and saved whole.

    Raises:
        InputError: only shards of it would be saved, or it is quantised.
    """
    zero3, state = is_deepspeed_zero3_enabled(), accelerator.state
    deepspeed = getattr(state, "deepspeed_plugin", None) if zero3 else None
    fsdp = getattr(state, "fsdp_plugin", None)
    if deepspeed is not None and not deepspeed.hf_ds_config.get_value(
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ):
        raise InputError(
            "ZeRO-3 would save a student that nothing can read: set zero3_save_16bit_model: true in accelerate's "
            "configuration (stage3_gather_16bit_weights_on_model_save in DeepSpeed's)"
        )
    policy = getattr(fsdp, "mixed_precision_policy", None)
    if fsdp is not None and fsdp.fsdp_version == 2 and policy is not None:
        # Accelerate would sum gradients over processes in bfloat16; DDP sums them in float32.
        fsdp.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
    if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
        raise InputError(
            "FSDP would save only shards of the student: set fsdp_state_dict_type: FULL_STATE_DICT in accelerate's "
            "configuration"
        )
    if (deepspeed is not None or fsdp is not None) and is_quantized(student):
        raise InputError("a quantised student is not sharded over processes (FSDP, ZeRO-3): use plain data parallelism")


class StudentMixin(TrainerPart):
    """The part of a `transformers.Trainer` that samples and saves the student.

    Attributes:
        rollout_config: how the student is sampled.
        sampling: temperature, vocabulary and end tokens of its responses.
        width: the size of the shared vocabulary.
        compute_dtype: the dtype in which the student is sampled.
        metrics: what is measured between two logs.
        teacher: what the student is compared with; None if there is none.
    """

    teacher: Teacher | None = None
    journal = Journal()
    _comparable: bool | None = None  # whether the engine's sum of its weights was that of the trainer at first

    @property
    def mixed_teacher(self) -> LocalTeacher | None:
        """The teacher that the engine holds beside the student; a trainer that samples from a mixture has one."""
        return None

    def set_up_sampling(
        self, config: RolloutConfig, conventions: Conventions, compute_dtype: torch.dtype, engine: Engine | None = None
    ) -> None:
        """Prepare sampling, once the trainer is built. The student's saved configs then say where its responses end.

        Args:
            config: how the student is sampled.
            conventions: vocabulary and end tokens.
            compute_dtype: the dtype to sample in.
            engine: an engine to use; by default one is started at first use.

        Raises:
            InputError: the student is sharded (FSDP, ZeRO-3) in a way that cannot be trained, or saved whole.
        """
        check_sharded_student(self.accelerator, self._student)
        self.rollout_config, self.width, self.compute_dtype = config, conventions.vocab_size, compute_dtype
        self._engine = engine
        conventions.write_to(self._student)
        self.sampling = conventions.sampling(config.max_new_tokens, config.temperature, config.stop)
        self.metrics = Metrics(self.accelerator, self.args.device)

    def sync(self) -> Engine:
        """Send the current weights to the engine, which is started at its first use.

        Returns:
            The engine.
        """
        student = self.accelerator.unwrap_model(self.model)
        config, work = self.rollout_config, str(self.args.output_dir)
        if self._engine is None:
            with self.phase("engine_start"), tempfile.TemporaryDirectory() as spare:
                folder = self._folder_of(student, spare)
                length = config.max_prompt_tokens + config.max_new_tokens
                sizing = EngineSizing.from_config(
                    config,
                    max_length=min(length, context_length(text_config(student)) or length),
                    sequences=config.num_rollouts // self.accelerator.num_processes,
                    dtype=self.compute_dtype,
                )
                sizing = replace(sizing, new_tokens=config.max_new_tokens)
                self._engine = make_engine(
                    config, folder, sizing, tokenizer=folder, model=student, teacher=self.mixed_teacher, work=work
                )
        with self.phase("sync"):
            kept, version = self.journal.is_kept, self.state.global_step
            push = sync_weights(self._engine, student, self.compute_dtype, version, work, prove=kept)
        if push is not None:
            self._check_push(push)
        return self._engine

    def _check_push(self, push: Push) -> None:
        """Note which weights the engine was sent, and raise an alarm if it holds others than it held at first.

        An engine that lays weights out in a way of its own has another sum from the first push on; the sums of such an
        engine are not compared.
        """
        sent, held = push.sent, push.held.total
        self._comparable = sent == held if self._comparable is None else self._comparable
        same = None if sent is None or held is None or not self._comparable else sent == held
        why = "" if same is not None or held is None else "it lays weights out in its own way"
        self.journal.write("push", version=push.version, sent=sent, held=held, same=same, why=push.held.why or why)
        if same is False:
            told = f"the engine holds other weights than it was sent after update {push.version}: {held}, not {sent}"
            self.journal.write("alarm", update=push.version + 1, what=told)
            logger.warning("%s", told)

    def _folder_of(self, student: Any, spare: str) -> str:
        """A folder from which an engine reads the student and its tokenizer.

        This is the student's own folder if it holds both on every machine; otherwise they are saved in `spare`.
        """
        own = Path(resolve_cached(str(student.name_or_path)))
        # The base of an adapter is never sent to the engine, and may differ from what its folder holds.
        apart = self.rollout_config.lora == "adapter"
        lacks = apart or not all((own / name).is_file() for name in ("tokenizer_config.json", "config.json"))
        # Saving gathers shards, so either all processes do it or none; their machines' caches may differ.
        if not self.global_sum(float(lacks)):
            return str(own)
        save_plain(student, spare, merged=not apart)
        self.student_tokenizer.save_pretrained(spare)
        return spare

    def save_student(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Save the student and its tokenizer. An adapter is merged, and also saved alone in the subfolder `adapter`.

        Args:
            folder: where to save.
            dtype: dtype of the saved weights; by default that of training.
        """
        student: Any = self.accelerator.unwrap_model(self.model)
        student.config.use_cache = True  # it is off for training only
        main, target = self.accelerator.is_main_process, Path(folder)
        if hasattr(student, "get_base_model"):
            save_plain(student, folder, write=main)
            if main:
                self.student_tokenizer.save_pretrained(folder)
            folder = Path(folder) / "adapter"
        if not (self.is_deepspeed_enabled and self.deepspeed is None):
            self.save_model(str(folder))
        elif main:  # an earlier run had finished training, so DeepSpeed holds no model here
            self._save(str(folder), state_dict=student.state_dict())
        if main and dtype is not None:
            cast_folder(target, dtype)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as transformers does, but without the secrets among the arguments, which it would write down too."""
        secret = {
            name: value for name, value in vars(self.args).items() if isinstance(value, str) and is_secret(name, value)
        }
        vars(self.args).update(dict.fromkeys(secret))
        try:
            super()._save(output_dir, state_dict=state_dict)
        finally:
            vars(self.args).update(secret)

    def close(self) -> None:
        """Shut the engine down, and release the teacher's connections."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if self.teacher is not None:
            self.teacher.close()

    def global_sum(self, value: Tensor | float) -> float:
        """The sum of a number over all processes, each of which must call this."""
        return self.metrics.global_sum(value)

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Measure the time of a phase, which processes `tokens` tokens.

        Raises:
            OutOfMemory: the memory of the device did not suffice; the message names the setting to change.
        """
        with memory_named(name, self.args, self.state.global_step), self.metrics.phase(name, tokens):
            yield

    @property
    def student_tokenizer(self) -> Any:
        """The student's tokenizer; `Any`, because the classes of transformers share no useful base."""
        return self.processing_class

    @property
    def _student(self) -> PreTrainedModel:
        student: Any = self.model
        return student
