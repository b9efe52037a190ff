"""Student and teacher as one vLLM model, whose tokens are sampled from their mixture.

vLLM loads the student's folder under another architecture name, for which `StudentAndTeacher` is registered. This class
contains both models, each with its keys and values in vLLM's one paged cache, and vLLM schedules, batches, prefills and
preempts as for any other model. In place of vLLM's sampler, `sample_mixture` samples the tokens of those requests that
ask for it in their `extra_args`. All other requests are left to vLLM's sampler.

This module imports vLLM, and is itself imported by vLLM's processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from minillm.errors import EngineError
from minillm.rollout.engines.vllm_pair_samplers import MixedRow, NewerSampler, OlderSampler
from minillm.rollout.engines.vllm_plugin import ARCHITECTURE
from minillm.rollout.mixture import MixedTokens, MixtureRecord, sample_mixture, uniform_numbers
from minillm.teacher.local import LocalTeacher

_TEACHER = "teacher."  # prefix of the names of the teacher's weights


def register() -> None:
    """Make the architecture known to vLLM in this process, faster than by the plugin, which names the class only."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, StudentAndTeacher)


class StudentAndTeacher(nn.Module):
    """Two models of vLLM that read the same tokens; see `pair_overrides` for the settings in its config.

    Attributes:
        record: What the tokens that are sampled now are added to; None where nobody collects them.
        reads_alone: Whether the student reads without the teacher, so that nothing can be mixed. The cache holds no
            keys and values of the teacher then.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        folder = config.minillm_teacher
        self.student: Any = init_vllm_registered_model(
            vllm_config,
            hf_config=config,
            architectures=list(config.minillm_student),
            prefix=maybe_prefix(prefix, "student"),
        )
        teacher: Any = AutoConfig.from_pretrained(folder)
        with set_model_tag("teacher"):
            self.teacher: Any = init_vllm_registered_model(
                vllm_config, hf_config=teacher, prefix=maybe_prefix(prefix, "teacher")
            )
        # Further weights that vLLM's loader reads.
        self._loads_teacher = bool(config.minillm_loads_teacher)
        source = DefaultModelLoader.Source(model_or_path=folder, revision=None, prefix=_TEACHER)
        self.secondary_weights = [source] if self._loads_teacher else []
        self.record: MixtureRecord | None = None
        self.reads_alone = False
        self._width = 0  # of the student's final states, once it has read something
        self._states: Tensor | None = None  # the teacher's, of the step whose tokens are sampled next

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the student's embeddings."""
        return self.student.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> Tensor:
        """Return the hidden states of both models, side by side."""
        own = self.student(input_ids, positions, None, None)
        self._width = own.shape[-1]
        if self.reads_alone:
            return own
        return torch.cat([own, self.teacher(input_ids, positions, None, None)], dim=-1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the student's logits, and keep the teacher's states until the tokens are sampled."""
        self._states = None if self.reads_alone else hidden_states[:, self._width :].contiguous()
        return self.student.compute_logits(hidden_states[:, : self._width].contiguous())

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load weights of either model, and return the names of those that are loaded or will arrive later."""
        loaded: set[str] = set()
        for of_teacher, part in groupby(weights, key=lambda item: item[0].startswith(_TEACHER)):
            if of_teacher:
                names = self.teacher.load_weights((name.removeprefix(_TEACHER), value) for name, value in part)
                loaded |= {_TEACHER + name for name in names}
            else:
                loaded |= {f"student.{name}" for name in self.student.load_weights(part)}
        if not self._loads_teacher:
            loaded |= {_TEACHER + name for name, _ in self.teacher.named_parameters()}  # they arrive later
        return loaded

    def sample(self, rows: Sequence[MixedRow], logits: Tensor) -> MixedTokens:
        """Sample the tokens of those rows of a step that are mixed.

        Args:
            rows: The rows.
            logits: The student's logits of the whole step.
        """
        assert self._states is not None
        states, device = self._states, logits.device
        if len(rows) < len(logits):
            chosen = torch.tensor([row.number for row in rows], device=device)
            logits, states = logits[chosen], states[chosen]
        requests = [row.request for row in rows]
        sampled = sample_mixture(
            logits,
            self.teacher.compute_logits(states),
            uniform_numbers([request.seed for request in requests], [row.position for row in rows]),
            torch.tensor([request.alpha for request in requests], device=device),
            torch.tensor([request.temperature for request in requests], device=device),
            requests[0].vocab_size,
        )
        if (record := self.record) is not None:
            counted = [i for i, row in enumerate(rows) if row.counts and row.request.record == record.number]
            keys = [(rows[i].request.row, rows[i].position) for i in counted]
            if len(counted) == len(rows):
                record.add(keys, sampled, states)
            elif counted:
                chosen = torch.tensor(counted, device=device)
                record.add(keys, sampled.select(chosen), states[chosen])
        return sampled

    @classmethod
    def get_model_state_cls(cls) -> Any:
        """Return the class through which vLLM's newer runner asks for the sampler."""
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        class PairState(DefaultModelState):
            def custom_sampler(self, sampler: Any) -> Any:
                return NewerSampler(self.model, sampler), None

        return PairState


class PairControl:
    """Controls, from the trainer, a vLLM in this process that holds a teacher beside the student.

    The teacher's weights are those of the teacher in this process, wherever it was loaded from.

    Args:
        llm: The `vllm.LLM`.
        teacher: The teacher in this process.
        dtype: Dtype of vLLM's weights.
    """

    def __init__(self, llm: Any, teacher: LocalTeacher, dtype: torch.dtype) -> None:
        self._llm, self._teacher, self._dtype = llm, teacher, dtype
        self._alone = False
        llm.collective_rpc(_start)
        self.load_teacher()

    def load_student(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the student's weights."""
        self._replace("student", weights)

    def load_teacher(self) -> None:
        """Fill in the teacher's weights from the teacher in this process."""
        self._replace("teacher", self._teacher.weights(self._dtype))

    def read_alone(self) -> None:
        """Sample without the teacher from now on, so that it takes no time. CUDA graphs contain it, though."""
        if not torch.cuda.is_available():
            self._set(None, True)

    @contextmanager
    def recording(self) -> Iterator[MixtureRecord]:
        """Provide a record for the tokens that are sampled meanwhile."""
        record = MixtureRecord()
        if self._alone and not self._llm.reset_prefix_cache():
            raise EngineError("vLLM's prefix cache could not be dropped: it holds no keys and values of the teacher")
        self._set(record, False)
        try:
            yield record
        finally:
            self._set(None, False)

    def _set(self, record: MixtureRecord | None, alone: bool) -> None:
        self._alone = alone
        self._llm.collective_rpc(_set_record, args=(record, alone))

    def _replace(self, part: str, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._llm.collective_rpc(_replace_weights, args=(part, weights))


def _start(worker: Any) -> None:
    """Called in vLLM's worker once the engine stands: put the sampler in place, where the model did not bring it."""
    runner = worker.model_runner
    if not isinstance(runner.sampler, OlderSampler | NewerSampler):
        runner.sampler = OlderSampler(runner, runner.sampler)


def _set_record(worker: Any, record: MixtureRecord | None, reads_alone: bool) -> None:
    """Called in vLLM's worker before and after a generation; see the attributes of `StudentAndTeacher`."""
    model = worker.model_runner.get_model()
    model.record, model.reads_alone = record, reads_alone


def _replace_weights(worker: Any, part: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Called in vLLM's worker: replace all weights of one of the two models, `student` or `teacher`."""
    model = getattr(worker.model_runner.get_model(), part)
    with set_current_vllm_config(worker.vllm_config), torch.device(worker.device):
        initialize_layerwise_reload(model)
        model.load_weights(iter(weights))
        finalize_layerwise_reload(model, worker.model_runner.model_config)


class PairWorker:
    """What vLLM's workers of a server can do in addition (`--worker-extension-cls`), called by the server's engine."""

    def minillm_start(self) -> str:
        """Put the sampler in place, and return the class of the model."""
        model = self.model_runner.get_model()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(model, StudentAndTeacher):
            _start(self)
        return type(model).__name__

    def minillm_load_student(self, folder: str) -> None:
        """Replace the student's weights by those in a folder."""
        _replace_weights(self, "student", load_file(Path(folder) / "model.safetensors").items())
