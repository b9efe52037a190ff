"""Sampling with the model itself: the fallback where vLLM is not installed, and the readable reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from minillm.data.batches import bucket
from minillm.data.logprobs import next_token_logprobs
from minillm.data.rollouts import Rollout
from minillm.data.sampling import Sampling
from minillm.models.device import device
from minillm.models.load import load_model
from minillm.models.shards import is_sharded
from minillm.rollout.engines.base import EngineCapabilities, EngineRequest, Unavailable

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
    """

    name: ClassVar[str] = "transformers"
    only_in_training: ClassVar[bool] = False
    capabilities = EngineCapabilities(
        max_top_logprobs=_UNLIMITED, max_logprobs_by_id=_UNLIMITED, supports_no_repeat_ngram=True
    )

    def __init__(self, model: PreTrainedModel, batch_size: int = 64, *, shared: bool = False) -> None:
        self._model = model
        self._shared = shared
        self._batch_size = batch_size
        self.version = 0

    @classmethod
    def unavailable(cls, model: Any = None) -> Unavailable | None:
        """See `RegisteredEngine.unavailable`. This engine samples every model that transformers loads."""
        return None

    @classmethod
    def create(cls, request: EngineRequest) -> TransformersEngine:
        """See `RegisteredEngine.create`. The trained model is sampled as it is, other models are loaded."""
        if request.model is not None and not is_sharded(request.model):
            return cls(request.model, shared=True)
        # Every forward of a sharded model is a collective operation, and the processes end their responses at different
        # lengths. Each process therefore samples a whole copy.
        loaded: Any = load_model(request.folder, request.sizing.dtype)
        return cls(loaded.to(device()))

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int], progress: bool = False
    ) -> list[Rollout]:
        """See `Engine.generate`."""
        rollouts: dict[int, Rollout] = {}
        groups = bucket([len(prompt) for prompt in prompts], self._batch_size)
        for group in tqdm(groups, desc="generating", disable=not progress):
            sampled = self._generate_batch([prompts[i] for i in group], sampling, [seeds[i] for i in group])
            rollouts.update(zip(group, sampled, strict=True))
        return [rollouts[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Rollout]:
        model = self._model
        generators = [torch.Generator(model.device).manual_seed(seed) for seed in seeds]
        rows = list(range(len(prompts)))  # prompts whose responses have not ended
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        top_logprobs: list[list[dict[int, float]]] = [[] for _ in prompts]
        inputs, mask = _left_pad(prompts, model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache: Any = None
        was_training = model.training
        model.eval()
        last = _last_position(model.device)
        for _ in range(sampling.max_new_tokens):
            out = model(
                inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
            cache = out.past_key_values
            logq = next_token_logprobs(out.logits[:, -1], sampling)
            if sampling.no_repeat_ngram:
                logq = _without_repeats(logq, [[*prompts[i], *ids[i]] for i in rows], sampling.no_repeat_ngram)
            tokens = _sample(logq, [generators[i] for i in rows])
            for i, token, value in zip(
                rows, tokens.tolist(), logq.gather(1, tokens[:, None])[:, 0].tolist(), strict=True
            ):
                ids[i].append(token)
                logprobs[i].append(value)
            if sampling.top_logprobs:
                values, tops = (x.tolist() for x in logq.topk(min(sampling.top_logprobs, logq.shape[-1])))
                for i, value, top in zip(rows, values, tops, strict=True):
                    # As in vLLM, the sampled token is in the table even where it is not among the most likely ones.
                    top_logprobs[i].append(dict(zip(top, value, strict=True)) | {ids[i][-1]: logprobs[i][-1]})
            unfinished = torch.tensor([not sampling.ended(ids[i]) for i in rows], device=model.device)
            if not unfinished.all():
                rows = [i for i, keep in zip(rows, unfinished.tolist(), strict=True) if keep]
                if not rows:
                    break
                cache.batch_select_indices(unfinished.nonzero()[:, 0])
                tokens, mask, positions = tokens[unfinished], mask[unfinished], positions[unfinished]
            inputs, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        model.train(was_training)
        return [
            Rollout.drawn(prompt, ids[i], logprobs[i], sampling, self.version, top_logprobs=top_logprobs[i] or None)
            for i, prompt in enumerate(prompts)
        ]

    @torch.inference_mode()
    def logprobs_of(
        self, prefixes: Sequence[list[int]], ids: Sequence[list[int]], sampling: Sampling
    ) -> list[Float[Tensor, " ids"]]:
        """See `Engine.logprobs_of`."""
        out: list[Tensor] = [torch.zeros(0)] * len(prefixes)
        was_training = self._model.training
        self._model.eval()
        last = _last_position(self._model.device)
        for group in bucket([len(prefix) for prefix in prefixes], self._batch_size):
            inputs, mask = _left_pad([prefixes[i] for i in group], self._model.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self._model(
                inputs, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=last
            ).logits[:, -1]
            for i, row in zip(group, next_token_logprobs(logits, sampling), strict=True):
                out[i] = row[torch.tensor(ids[i], device=row.device)].cpu()
        self._model.train(was_training)
        return out

    def update_weights(self, weights: NamedTensors, version: int) -> None:
        """See `Engine.update_weights`. With a shared model, only the version changes."""
        if not self._shared:
            own = self._model.state_dict()
            with torch.no_grad():
                for name, value in weights:
                    own[name].copy_(value)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: between calls the engine holds no memory except for the model."""

    def close(self) -> None:
        """Do nothing."""


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
