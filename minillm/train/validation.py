"""Sampling the student that is being trained: for rollouts, and to see how far it is."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from minillm.data.rollouts import Rollout
from minillm.data.seeding import seed_of
from minillm.errors import InputError
from minillm.evaluation import metrics
from minillm.evaluation.answers import token_divergences
from minillm.models.configs import context_length, text_config
from minillm.models.conventions import Conventions
from minillm.models.load import resolve_cached
from minillm.models.quantization import is_quantized
from minillm.models.saving import cast_folder, save_plain
from minillm.redaction import is_secret
from minillm.rollout.config import RolloutConfig
from minillm.rollout.engines.base import Engine, EngineSizing
from minillm.rollout.engines.choose import make_engine, sync_weights
from minillm.teacher.local import LocalTeacher
from minillm.teacher.served import ServedTeacher
from minillm.train.best_checkpoint import METRICS


def check_one_gpu(args: TrainingArguments) -> None:
    """Refuse several GPUs in one process (DataParallel).

    Raises:
        ValueError: saying how to start.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process: start with accelerate launch, or show it one (CUDA_VISIBLE_DEVICES=0)"
        )


class Validated:
    """A part of a `transformers.Trainer`: an engine with the student's current weights, and `evaluate` by sampling.

    With `eval_dataset` (rows with `prompt_ids` and `references`), what `TrainingArguments` say of evaluation validates the
    pure student on samples: `eval_rouge_l`, `eval_reverse_kl`, `eval_finished`, `eval_length`. `load_best_model_at_end` keeps the
    best checkpoint by `metric_for_best_model`, one of them, Rouge-L where none is given.
    """

    validation_metrics: Mapping[str, bool | None] = METRICS
    """What `evaluate` measures, without its prefix, and whether more of it is better; for subclasses that measure more."""

    accelerator: Any
    args: Any
    callback_handler: Any
    control: Any
    deepspeed: Any
    eval_dataset: Any
    is_deepspeed_enabled: bool
    log: Any
    model: Any
    model_wrapped: Any
    processing_class: Any
    save_model: Any
    state: Any
    teacher: LocalTeacher | ServedTeacher | None = None

    def set_up_sampling(
        self, config: RolloutConfig, conventions: Conventions, compute_dtype: torch.dtype, engine: Engine | None = None
    ) -> None:
        """How the student is sampled; called once the trainer is built. What is saved says of itself where its answers end.

        Raises:
            ValueError: the student is dealt out over processes (FSDP, ZeRO-3) in a way that it cannot be, or be saved whole.
        """
        self._check_shards()
        self.rollout_config, self.width, self.compute_dtype, self._engine = (
            config,
            conventions.vocab_size,
            compute_dtype,
            engine,
        )
        conventions.write_to(self.model)
        self.sampling = conventions.sampling(config.max_new_tokens, config.temperature, config.stop)
        self._seconds: dict[str, float] = defaultdict(float)
        self._phase_tokens: dict[str, float] = defaultdict(float)

    def _check_shards(self) -> None:
        zero3, state = is_deepspeed_zero3_enabled(), self.accelerator.state
        deepspeed, fsdp = (
            getattr(state, "deepspeed_plugin", None) if zero3 else None,
            getattr(state, "fsdp_plugin", None),
        )
        if deepspeed is not None and not deepspeed.hf_ds_config.get_value(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save"
        ):
            raise InputError(
                "ZeRO-3 would save a student that nothing can read: set zero3_save_16bit_model: true in accelerate's configuration "
                "(stage3_gather_16bit_weights_on_model_save in DeepSpeed's)"
            )
        policy = getattr(fsdp, "mixed_precision_policy", None)
        if fsdp is not None and fsdp.fsdp_version == 2 and policy is not None:
            # Accelerate would sum gradients over processes in bfloat16; DDP sums them in float32.
            fsdp.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
        if fsdp is not None and "FULL_STATE_DICT" not in str(fsdp.state_dict_type):
            raise InputError(
                "FSDP would save no student, but shards of one: set fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration"
            )
        if (deepspeed is not None or fsdp is not None) and is_quantized(self.model):
            raise InputError(
                "a quantised student is not dealt out over processes (FSDP, ZeRO-3): use plain data parallelism"
            )

    def sync(self) -> Engine:
        """Hand the current weights to the engine, which is started at its first use."""
        student = self.accelerator.unwrap_model(self.model)
        config = self.rollout_config
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
                self._engine = make_engine(
                    config, folder, sizing, tokenizer=folder, model=student, work=str(self.args.output_dir)
                )
        with self.phase("sync"):
            sync_weights(self._engine, student, self.compute_dtype, self.state.global_step, str(self.args.output_dir))
        return self._engine

    def _folder_of(self, student: Any, spare: str) -> str:
        """Where an engine can read the student and its tokenizer from: its own folder, or `spare`, where they are put."""
        own = Path(resolve_cached(str(student.name_or_path)))
        apart = (
            self.rollout_config.lora == "adapter"
        )  # then the base is never sent, and may not be what its folder holds
        if not apart and (own / "tokenizer_config.json").is_file() and (own / "config.json").is_file():
            return str(own)
        save_plain(student, spare, merged=not apart)
        self.processing_class.save_pretrained(spare)
        return spare

    def save_student(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Save the student and its tokenizer; one with an adapter merged, and the adapter by itself in `adapter`.

        Args:
            dtype: of the saved weights; by default they are saved as they were trained.
        """
        student = self.accelerator.unwrap_model(self.model)
        student.config.use_cache = True  # off for training, and not meant to be off for those who use it
        main, target = self.accelerator.is_main_process, Path(folder)
        if hasattr(student, "get_base_model"):
            save_plain(student, folder, write=main)
            if main:
                self.processing_class.save_pretrained(folder)
            folder = Path(folder) / "adapter"
        if not (self.is_deepspeed_enabled and self.deepspeed is None):
            self.save_model(str(folder))
        elif main:  # trained to the end before; DeepSpeed has nothing in hand
            self._save(str(folder), state_dict=student.state_dict())
        if main and dtype is not None:
            cast_folder(target, dtype)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers saves, but for the secrets of its arguments, which it would write down too."""
        secret = {
            name: value for name, value in vars(self.args).items() if isinstance(value, str) and is_secret(name, value)
        }
        vars(self.args).update(dict.fromkeys(secret))
        try:
            super()._save(output_dir, state_dict=state_dict)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            vars(self.args).update(secret)

    def close(self) -> None:
        """Shut the engine down, and let go of a served teacher."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        if isinstance(self.teacher, ServedTeacher):
            self.teacher.close()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Draw one answer to each row from the student alone, always with the same seeds; Rouge-L in percent against the
        best reference, KL(q‖p) in nats a token on the drawn answers (where the teacher is at hand)."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        mine = [rows[i] for i in range(len(rows))][self.accelerator.process_index :: self.accelerator.num_processes]
        with self.phase("validation"):
            drawn = self.answers([row["prompt_ids"] for row in mine])
            sums = {"rouge_l": 0.0, "finished": 0.0, "length": 0.0}
            for row, rollout in zip(mine, drawn, strict=True):
                text = self.processing_class.decode(rollout.response_ids, skip_special_tokens=True).strip()
                sums["rouge_l"] += metrics.rouge_l(text, row["references"])
                sums["finished"] += 100 * rollout.finished
                sums["length"] += len(rollout.response_ids)
            found = {name: self.global_sum(total) / len(rows) for name, total in sums.items()}
            if isinstance(self.teacher, LocalTeacher):
                # With shards every forward is done together: a process with a row less than others reads one more, which does not count.
                idle = [(list(rows[0]["prompt_ids"]), [0])] * (
                    -(-len(rows) // self.accelerator.num_processes) - len(drawn)
                )
                prompts, responses = zip(*[(r.prompt_ids, r.response_ids) for r in drawn], *idle, strict=True)
                kl = token_divergences(
                    self.model_wrapped, self.teacher, prompts, responses, self.width, self.sampling.temperature
                )
                total = self.global_sum(sum(float(reverse.sum()) for reverse, _ in kl[: len(drawn)]))
                found["reverse_kl"] = total / self.global_sum(sums["length"])
        out = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(out)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, out)
        return out

    def answers(self, prompts: Sequence[list[int]]) -> list[Rollout]:
        """The student's own, as it is now; always with the same seeds."""
        engine = self.sync()
        seeds = [seed_of("validation", *prompt) for prompt in prompts]
        drawn = engine.generate(prompts, replace(self.sampling, top_logprobs=0), seeds)
        engine.sleep()
        return drawn

    def global_sum(self, value: Tensor | float) -> float:
        """Sum over processes."""
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.reduce(tensor, reduction="sum"))  # pyright: ignore[reportArgumentType]

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels are only queued; the time is theirs
        self._seconds[name] += time.perf_counter() - start
        self._phase_tokens[name] += tokens
