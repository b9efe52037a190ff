"""Ours and TRL's `DistillationTrainer` as contenders: each is a process of its own that makes an update on request.

`step.py` and `scaling.py` start them with `Worker`. Both contenders have the same pair of models, prompts, tokens, loss
(on-policy reverse KL, no long-term term) and optimiser.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from measure import resident
from transformers import TrainerCallback

from minillm.data.examples import read_examples
from minillm.models.device import device, fast_bfloat16, working_dtype
from minillm.models.hardware import measured_flops
from minillm.models.load import load_model, load_tokenizer
from minillm.models.shape import shape_of

LEARNING_RATE = 1e-5
PHASES = ("rollout_seconds", "teacher_seconds", "update_seconds", "sync_seconds")
_COMPARED = 64  # numbers of each weight that tell whether it has moved; a copy of all of them would count as memory


@dataclass(frozen=True)
class Workload:
    """What an update of a contender consists of."""

    student: str
    """Folder of the student."""
    teacher: str
    """Folder of the teacher."""
    prompts: str
    """JSONL file of the prompts, of which each update trains on the first ones."""
    sequences: int
    """Responses of an update."""
    tokens: int
    """Tokens of the longest response."""
    micro_batch: int = 8
    """Responses of one forward and backward."""
    longest_prompt: int = 192
    """The most tokens of a prompt."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    lengths: tuple[int, ...] = ()
    """Tokens of each response, which ours alone can have; by default all are as long as the longest."""
    measures_peak: bool = True
    """Whether the speed of matrix products is measured before each update."""

    @classmethod
    def read(cls, text: str) -> Workload:
        """Read what `json.dumps(asdict(workload))` has written."""
        given = json.loads(text)
        return cls(**given | {"lengths": tuple(given["lengths"])})

    def messages(self) -> list[list[dict[str, str]]]:
        """Read the prompts as chats, as many as an update has different ones, so that it trains on all of them."""
        examples = read_examples(self.prompts, limit=self.sequences // self.samples_per_prompt)
        return [[{"role": "user", "content": example.text}] for example in examples]

    def arguments(self, folder: str) -> dict[str, Any]:
        """Return the `TrainingArguments` of both contenders."""
        micro = min(self.sequences, self.micro_batch)
        return {
            "output_dir": folder,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "max_steps": 1000,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.sequences // micro,
            "bf16": fast_bfloat16(),
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
        }

    def peak(self) -> float | None:
        """Measure the speed of matmuls at the shapes of both models, in operations per second, if that is asked for."""
        if not self.measures_peak:
            return None
        shapes = (shape_of(name) for name in (self.student, self.teacher))
        products = [product for shape in shapes for product in shape.dimensions.products()]
        return measured_flops(device(), working_dtype(), products)


class UpdateOnRequest(TrainerCallback):
    """Makes one update per line of standard input and reports what it took; training stops when the input ends."""

    def __init__(self, model: Any, work: Workload) -> None:
        self._model, self._log, self._work = model, {}, work
        self._before = self._parts()

    def _parts(self) -> dict[str, torch.Tensor]:
        weights = self._model.named_parameters()
        return {name: weight.detach().flatten()[:_COMPARED].clone() for name, weight in weights}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._wait(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:  # the log of an update, not the totals of the whole run
            self._log = logs
            self._wait(control, self._report())

    def _report(self) -> dict[str, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = time.perf_counter() - self._started
        return {
            "seconds": taken,
            "moved": all(not torch.equal(part, self._before[name]) for name, part in self._parts().items()),
            "loss": self._log.get("loss"),
            "phases": {name: self._log.get(name) for name in PHASES},
            "engine_start_seconds": self._log.get("engine_start_seconds") or 0.0,
            "peak_flops": self._peak,
        }

    def _wait(self, control: Any, report: dict[str, Any] | None = None) -> None:
        if report is not None:
            print_report(report)
        if not sys.stdin.readline():
            control.should_training_stop = True
            return
        self._peak = self._work.peak()
        self._started = time.perf_counter()


def print_report(report: dict[str, Any]) -> None:
    """Print a report, with the peak memory of this process, for `Worker` to read."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")
    print("REPORT " + json.dumps(report | {"peak_bytes": peak}), file=sys.__stdout__, flush=True)


def optimiser_of(trainer: Any) -> list[Any]:
    """Name the optimiser of a trainer, with its settings."""
    [group, *_] = trainer.optimizer.param_groups
    return [type(trainer.optimizer.optimizer).__name__, *(group[key] for key in ("lr", "betas", "eps"))]


def set_lengths(lengths: Sequence[int]) -> None:
    """Have vLLM in this process end each response of a batch after so many tokens."""
    from minillm.rollout.engines.vllm import VLLMEngine

    run = VLLMEngine._run

    def limited(engine: Any, prompts: Any, params: list[Any], progress: bool) -> list[Any]:
        for one, length in zip(params, lengths, strict=True):
            one.max_tokens = length
        return run(engine, prompts, params, progress)

    VLLMEngine._run = limited  # pyright: ignore[reportAttributeAccessIssue]


def count_tokens(trainer: Any) -> dict[str, int]:
    """Count the tokens that the student's passes of a trainer have: `useful`, and `computed` with padding."""
    counted, update = {"useful": 0, "computed": 0}, trainer.update_on

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        counted["useful"] += sum(batch.sequence_lengths())
        counted["computed"] += batch.input_ids.numel()
        return update(model, batch, *rest)

    trainer.update_on = counting
    return counted


def ours(work: Workload) -> None:
    """Train with `MiniLLMTrainer` and vLLM, an update on each request."""
    from transformers import TrainingArguments

    from minillm.loss.config import Objective
    from minillm.rollout.config import RolloutConfig
    from minillm.train.on_policy import MiniLLMTrainer

    rollout = RolloutConfig(
        engine="vllm",
        num_rollouts=work.sequences,
        samples_per_prompt=work.samples_per_prompt,
        inner_epochs=1,
        teacher_mix=0.0,
        max_new_tokens=work.tokens,
        max_prompt_tokens=work.longest_prompt,
    )
    if work.lengths:
        set_lengths(work.lengths)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MiniLLMTrainer(
            work.student,
            work.teacher,
            TrainingArguments(**work.arguments(folder)),
            rollout=rollout,
            objective=Objective.recommended(long_term=0.0),
            train_dataset=[{"prompt": message} for message in work.messages()],
        )
        trainer.sampling = replace(trainer.sampling, eos_ids=())  # every response has all its tokens
        trainer.add_callback(UpdateOnRequest(trainer.model, work))
        tokens = count_tokens(trainer)
        trainer.train()
        lengths = {len(r.response_ids) for r in trainer.rollouts}
        print_report({"lengths": sorted(lengths), "optimiser": optimiser_of(trainer), "tokens": tokens})
        trainer.close()


def trl(work: Workload) -> None:
    """Train with TRL's `DistillationTrainer`, an update on each request."""
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    student: Any = load_model(work.student, torch.float32)
    teacher: Any = load_model(work.teacher, working_dtype())
    rows = [{"prompt": message} for message in work.messages() for _ in range(work.samples_per_prompt)]
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            **work.arguments(folder),
            max_completion_length=work.tokens,
            temperature=1.0,
            beta=1.0,
            generation_kwargs={"min_new_tokens": work.tokens},
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            processing_class=load_tokenizer(work.student),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.add_callback(UpdateOnRequest(student, work))
        lengths: set[int] = set()
        original = trainer._compute_loss

        def keep(model: Any, inputs: Any, *rest: Any) -> Any:
            lengths.update(inputs["completion_mask"].sum(1).tolist())
            return original(model, inputs, *rest)

        trainer._compute_loss = keep  # pyright: ignore[reportAttributeAccessIssue]
        trainer.train()
        print_report({"lengths": sorted(lengths), "optimiser": optimiser_of(trainer)})


class Worker:
    """A contender in a process of its own, which makes an update whenever it is asked to.

    Args:
        name: The name of a contender of `script`.
        work: Its workload.
        script: The script that `NAME WORKLOAD` is handed to.
    """

    def __init__(self, name: str, work: Workload, script: str = __file__) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, script, "--worker", name, json.dumps(asdict(work))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )

    def update(self) -> dict[str, Any]:
        """Have the contender make an update, and return its report."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self._read()

    def end(self) -> dict[str, Any]:
        """Have the contender stop training, and return its last report."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        out = self._read()
        self._process.wait(60)
        return out

    def kill(self) -> None:
        """Stop the process, whatever it does."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("REPORT "):
                return json.loads(line.removeprefix("REPORT "))
        return self._fail()

    def _fail(self) -> Any:
        code = self._process.wait(60)
        self._log.seek(0)
        raise WorkerError(f"{self.name} ended (exit status {code}):\n{self._log.read()[-3000:]}")


class WorkerError(RuntimeError):
    """A contender has ended before it was asked to."""


CONTENDERS = {"ours": ours, "trl": trl}


def main() -> None:
    """Be the contender that `Worker` starts: `contenders.py --worker NAME WORKLOAD`."""
    _, name, work = sys.argv[1:]
    logging.disable(logging.WARNING)
    CONTENDERS[name](Workload.read(work))


if __name__ == "__main__":
    main()
