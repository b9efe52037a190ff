"""Sampling with the model itself: the fallback where vLLM is not installed, and the readable reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.data.batches import bucket
from minillm.data.logprobs import next_token_logprobs
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.models.device import device
from minillm.models.fingerprint import Fingerprint
from minillm.models.head import body, head_of
from minillm.models.load import load_model
from minillm.models.shards import is_sharded
from minillm.rollout.engines.base import EngineCapabilities, EngineRequest, Unavailable, WeightsSum
from minillm.rollout.mixture import MixtureRecord, sample_mixture, uniform_numbers
from minillm.teacher.local import LocalTeacher
from minillm.terminal import RESPONSES, Progress

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from minillm.rollout.engines.base import NamedTensors

_UNLIMITED = 1 << 30


class TransformersEngine:
    """Samples from a transformers model.

    Prompts of similar lengths are sampled together; a row leaves its batch when its response has ended.

    Args:
        model: The model to sample from.
        batch_size: Most prompts that are sampled together.
        shared: Whether `model` is the trained model itself. Its weights are then always current, and `update_weights`
            leaves them alone: the weights that it receives may be rounded to bfloat16, and the master weights must not
            be.
        teacher: The teacher that is mixed in.
    """

    name: ClassVar[str] = "transformers"
    only_in_training: ClassVar[bool] = False
    capabilities = EngineCapabilities(max_top_logprobs=_UNLIMITED, supports_no_repeat_ngram=True)

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int = 64,
        *,
        shared: bool = False,
        teacher: LocalTeacher | None = None,
    ) -> None:
        self._model = model
        self._teacher = teacher
        self.capabilities = replace(type(self).capabilities, mixes_teacher=teacher is not None)
        self._shared = shared
        self._batch_size = batch_size
        self.version = 0

    @classmethod
    def unavailable(cls, model: Any = None, teacher: Any = None) -> Unavailable | None:
        """See `RegisteredEngine.unavailable`. This engine samples every model that transformers loads."""
        return None

    @classmethod
    def create(cls, request: EngineRequest) -> TransformersEngine:
        """See `RegisteredEngine.create`. The trained model is sampled as it is, other models are loaded."""
        if request.model is not None and not is_sharded(request.model):
            return cls(request.model, shared=True, teacher=request.teacher)
        # Every forward of a sharded model is a collective operation, and the processes end their responses at different
        # lengths. Each process therefore samples a whole copy.
        loaded: Any = load_model(request.folder, request.sizing.dtype)
        return cls(loaded.to(device()), teacher=request.teacher)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        self.capabilities.check(sampling)
        rollouts: dict[int, Rollout] = {}
        groups = bucket([len(prompt) for prompt in prompts], self._batch_size)
        with Progress(len(prompts), RESPONSES, hidden=not progress) as shown:
            for group in groups:
                sampled = self._generate_batch([prompts[i] for i in group], sampling, [seeds[i] for i in group])
                rollouts.update(zip(group, sampled, strict=True))
                shown.update(len(group))
        return [rollouts[i] for i in range(len(prompts))]

    @torch.no_grad()  # not inference_mode: the teacher's states take part in the loss
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Rollout]:
        model = self._model
        teacher = self._teacher if sampling.teacher_mix else None
        steps = _PlainSteps(prompts, sampling, seeds) if teacher is None else _MixedSteps(teacher, sampling, seeds)
        rows = list(range(len(prompts)))  # prompts whose responses have not ended
        ids: list[list[int]] = [[] for _ in prompts]
        inputs, mask = _left_pad(prompts, model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        was_training = model.training
        model.eval()
        last = _last_position(model.device)
        for _ in range(sampling.max_new_tokens):
            arguments = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
            out = model(inputs, past_key_values=cache, logits_to_keep=last, **arguments)
            cache = out.past_key_values
            tokens = steps.sample(_Step(out.logits[:, -1], rows, ids, inputs, arguments))
            for i, token in zip(rows, tokens.tolist(), strict=True):
                ids[i].append(token)
            unfinished = torch.tensor([not sampling.ended(ids[i]) for i in rows], device=model.device)
            if not unfinished.all():
                rows = [i for i, keep in zip(rows, unfinished.tolist(), strict=True) if keep]
                if not rows:
                    break
                for used in (cache, steps.cache):
                    if used is not None:
                        used.batch_select_indices(unfinished.nonzero()[:, 0])
                tokens, mask, positions = tokens[unfinished], mask[unfinished], positions[unfinished]
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        model.train(was_training)
        return [
            Rollout.drawn(prompt, sampling=sampling, version=self.version, **found)
            for prompt, found in zip(prompts, steps.finish(ids), strict=True)
        ]

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """See `Engine.update_weights`. With a shared model, only the version changes."""
        if not self._shared:
            own = self._model.state_dict()
            with torch.no_grad():
                for name, value in weights:
                    own[name].copy_(value)
        self.version = version

    @property
    def shares_weights(self) -> bool:
        """See `TellsWeights.shares_weights`."""
        return self._shared

    def weights_sum(self) -> WeightsSum:
        """See `TellsWeights.weights_sum`."""
        return WeightsSum(Fingerprint.of(self._model, self._model.dtype).total)

    def sleep(self) -> None:
        """Do nothing: between calls the engine holds no memory except for the model."""

    def close(self) -> None:
        """Do nothing."""


@dataclass
class _Step:
    """One forward of the student, whose next tokens are to be sampled.

    Attributes:
        logits: The student's logits.
        rows: The number of each row's response.
        ids: The tokens of all responses so far.
        inputs: The tokens that the student has read.
        arguments: The other arguments of the forward, which hold for the teacher as well.
    """

    logits: Float[Tensor, "rows vocabulary"]
    rows: Sequence[int]
    ids: Sequence[list[int]]
    inputs: Int[Tensor, "rows width"]
    arguments: Mapping[str, Any]


class _PlainSteps:
    """Samples the tokens of one batch from the student alone, and collects what is known about them."""

    cache: Any = None

    def __init__(self, prompts: list[list[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
        self._prompts, self._sampling, self._seeds = prompts, sampling, seeds
        self._generators: list[torch.Generator] = []
        self._logprobs: list[list[float]] = [[] for _ in prompts]
        self._top_logprobs: list[list[dict[int, float]]] = [[] for _ in prompts]

    def sample(self, step: _Step) -> Int[Tensor, " rows"]:
        """Sample one token for each row of a step."""
        sampling, rows, logits = self._sampling, step.rows, step.logits
        self._generators = self._generators or [torch.Generator(logits.device).manual_seed(s) for s in self._seeds]
        logq = next_token_logprobs(logits, sampling)
        if sampling.no_repeat_ngram:
            logq = _without_repeats(logq, [[*self._prompts[i], *step.ids[i]] for i in rows], sampling.no_repeat_ngram)
        tokens = _sample(logq, [self._generators[i] for i in rows])
        values = logq.gather(1, tokens[:, None])[:, 0].tolist()
        for i, value in zip(rows, values, strict=True):
            self._logprobs[i].append(value)
        if sampling.top_logprobs:
            top, names = (x.tolist() for x in logq.topk(min(sampling.top_logprobs, logq.shape[-1])))
            for i, token, value, logs, likely in zip(rows, tokens.tolist(), values, top, names, strict=True):
                # As in vLLM, the sampled token is in the table even where it is not among the most likely ones.
                self._top_logprobs[i].append(dict(zip(likely, logs, strict=True)) | {token: value})
        return tokens

    def finish(self, ids: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Return the arguments of `Rollout.drawn` for each response."""
        return [
            {"ids": row, "logprobs": logprobs, "top_logprobs": top or None}
            for row, logprobs, top in zip(ids, self._logprobs, self._top_logprobs, strict=True)
        ]


class _MixedSteps:
    """Samples the tokens of one batch from the mixture: the teacher reads along, with a cache of its own."""

    def __init__(self, teacher: LocalTeacher, sampling: Sampling, seeds: Sequence[int]) -> None:
        self.cache: Any = None
        self._teacher, self._sampling, self._seeds = teacher, sampling, seeds
        self._head = head_of(teacher.model).narrow(sampling.vocab_size)
        self._record = MixtureRecord()

    def sample(self, step: _Step) -> Int[Tensor, " rows"]:
        """Sample one token for each row of a step, which the teacher reads too."""
        rows, inputs = step.rows, step.inputs
        with self._teacher.reading():
            out = body(self._teacher.model)(input_ids=inputs, past_key_values=self.cache, **step.arguments)
        self.cache = out.past_key_values
        states = out.last_hidden_state[:, -1].contiguous()  # a slice would keep the states of whole prompts
        positions = [len(step.ids[i]) for i in rows]
        found = sample_mixture(
            step.logits,
            self._head.logits(states),
            uniform_numbers([self._seeds[i] for i in rows], positions),
            self._sampling.teacher_mix,
            self._sampling.temperature,
            self._sampling.vocab_size,
        )
        self._record.add(list(zip(rows, positions, strict=True)), found, states)
        return found.tokens

    def finish(self, ids: Sequence[list[int]]) -> list[dict[str, Any]]:
        """Return the arguments of `Rollout.drawn` for each response."""
        return [
            {"ids": row, "logprobs": logq, "teacher": targets}
            for row, (logq, targets) in zip(ids, self._record.finish([len(row) for row in ids]), strict=True)
        ]


def _sample(logq: Float[Tensor, "rows vocabulary"], generators: Sequence[torch.Generator]) -> Int[Tensor, " rows"]:
    """Sample one token from each row of log-probabilities, with one generator per row.

    This is an exponential race: the argmax of q/e with e ~ Exp(1) is distributed as q.
    """
    noise = torch.stack(
        [
            torch.empty_like(row).exponential_(generator=generator)
            for generator, row in zip(generators, logq, strict=True)
        ]
    )
    return (logq - noise.log()).argmax(-1)


def _without_repeats(
    logq: Float[Tensor, "rows vocabulary"], sequences: Sequence[list[int]], n: int
) -> Float[Tensor, "rows vocabulary"]:
    """Exclude the tokens that would complete an n-gram which their sequence already contains, and renormalise."""
    logq = logq.clone()
    for row, ids in zip(logq, sequences, strict=True):
        last = ids[len(ids) - n + 1 :]
        seen = [ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]
        if seen and len(ids) >= n - 1:
            row[torch.tensor(seen, device=row.device)] = -torch.inf
    return torch.log_softmax(logq, -1)


def _last_position(device: torch.device) -> Int[Tensor, " position"]:
    """Return the position whose logits are needed, as a value of `logits_to_keep`.

    A plain number would select a slice whose rows are not contiguous. On a CPU in bfloat16, PyTorch then copies the
    head's weights once for every row (4.2 s and 0.9 GB for 16 rows of 49,152 × 576, instead of 0.01 s).
    """
    return torch.tensor([-1], device=device)


def _left_pad(
    prompts: Sequence[list[int]], device: torch.device
) -> tuple[Int[Tensor, "rows width"], Int[Tensor, "rows width"]]:
    """Return token ids and attention mask of prompts that are padded on the left."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
