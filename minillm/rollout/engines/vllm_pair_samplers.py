"""The samplers of a pair of student and teacher inside vLLM, and how a request asks for the mixture.

vLLM has two model runners. In the older one (on CPUs), the sampler is an attribute of the runner and is replaced when
the engine has started. The newer one asks the model for its sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.outputs import SamplerOutput as OlderSamplerOutput

from minillm.rollout.engines.vllm_plugin import MixtureRequest
from minillm.rollout.mixture import MixedTokens


class MixedRow(NamedTuple):
    """One row of a step whose token is sampled from the mixture.

    Attributes:
        number: Number of the row in the step.
        request: What its request says.
        position: Position of the token in its response.
        counts: Whether all of the sequence has been read; otherwise vLLM drops the token.
    """

    number: int
    request: MixtureRequest
    position: int
    counts: bool


class OlderSampler:
    """Takes the place of the sampler in vLLM's older model runner. Its other duties stay with the runner's own.

    Args:
        runner: The model runner.
        plain: Its own sampler.
    """

    def __init__(self, runner: Any, plain: Any) -> None:
        self._runner, self._plain = runner, plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def __call__(self, logits: Tensor, sampling_metadata: Any, **kwargs: Any) -> Any:
        """Sample one token per request."""
        runner = self._runner
        rows: list[MixedRow] = []
        for i, name in enumerate(runner.input_batch.req_ids[: len(logits)]):
            state = runner.requests[name]
            if (request := MixtureRequest.of(state.sampling_params)) is not None:
                counts = not runner.discard_request_mask.np[i]
                rows.append(MixedRow(i, request, len(state.output_token_ids), counts))
        sampled = runner.get_model().sample(rows, logits) if rows else None
        if sampled is not None and len(rows) == len(logits):
            tokens = sampled.tokens.to(torch.int32)[:, None]
            logprobs = None
            if sampling_metadata.max_num_logprobs is not None:
                logprobs = _logprobs_of(sampled, rows[0].request.vocab_size)
            return OlderSamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)
        output = self._plain(logits=logits, sampling_metadata=sampling_metadata, **kwargs)
        return output if sampled is None else _with_mixed_rows(output, rows, sampled)


class NewerSampler:
    """Takes the place of the sampler in vLLM's newer model runner. Its other duties stay with the runner's own.

    Args:
        model: The pair, a `StudentAndTeacher`.
        plain: The runner's own sampler.
    """

    def __init__(self, model: Any, plain: Any) -> None:
        self._model, self._plain = model, plain
        self._requests: dict[int, MixtureRequest | None] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Note a new request."""
        self._plain.add_request(req_idx, sampling_params)
        self._requests[req_idx] = MixtureRequest.of(sampling_params)

    def __call__(self, logits: Tensor, input_batch: Any) -> Any:
        """Sample one token per request."""
        from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        indices = input_batch.idx_mapping_np
        ends = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        positions = ends - self._plain.req_states.prompt_len.np[indices]
        rows = [
            MixedRow(i, request, max(int(positions[i]), 0), bool(ends[i] >= input_batch.prefill_len_np[i]))
            for i, index in enumerate(indices)
            if (request := self._requests.get(int(index))) is not None
        ]
        sampled = self._model.sample(rows, logits) if rows else None
        if sampled is None or len(rows) < len(indices):
            output = self._plain(logits, input_batch)
            return output if sampled is None else _with_mixed_rows(output, rows, sampled)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self._plain.req_states.prefill_len.gpu,
        )
        logprobs = None
        if self._plain.get_logprobs_dims(indices) is not None:
            logprobs = _logprobs_of(sampled, rows[0].request.vocab_size)
        return SamplerOutput(
            sampled_token_ids=sampled.tokens[:, None],
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )


def _logprobs_of(sampled: MixedTokens, vocab_size: int) -> LogprobsTensors:
    """Return log q and log p of each token in the form of vLLM's log-probabilities.

    log q is that of the token itself. log p stands beside it under the next token id, because vLLM has room for
    log-probabilities of tokens only, one for each id.
    """
    tokens = sampled.tokens.to(torch.int32)
    ids = torch.stack([tokens, (tokens + 1) % vocab_size], dim=1)
    values = torch.stack([sampled.student_logprobs, sampled.teacher_logprobs], dim=1)
    return LogprobsTensors(ids, values, torch.ones_like(tokens))


def _with_mixed_rows(output: Any, rows: Sequence[MixedRow], sampled: MixedTokens) -> Any:
    """Put the tokens of mixed rows, and their log-probabilities, into the output of vLLM's own sampler."""
    index = torch.tensor([row.number for row in rows], device=sampled.tokens.device)
    output.sampled_token_ids[index, 0] = sampled.tokens.to(output.sampled_token_ids.dtype)
    plain = output.logprobs_tensors
    if plain is not None:
        mixed = _logprobs_of(sampled, rows[0].request.vocab_size)
        missing = 2 - plain.logprobs.shape[1]
        if missing > 0:
            plain = plain._replace(
                logprob_token_ids=nn.functional.pad(plain.logprob_token_ids, (0, missing)),
                logprobs=nn.functional.pad(plain.logprobs, (0, missing), value=-torch.inf),
            )
        plain.logprob_token_ids[index, :2] = mixed.logprob_token_ids.to(plain.logprob_token_ids.dtype)
        plain.logprobs[index, :2] = mixed.logprobs
        plain.selected_token_ranks[index] = mixed.selected_token_ranks.to(plain.selected_token_ranks.dtype)
        output.logprobs_tensors = plain
    return output
