"""What a vLLM server must be able to do before it samples, and how its answers to mixed requests are read."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch

from minillm.errors import EngineError
from minillm.models.completions import Completion, read_completion
from minillm.models.launcher import machines
from minillm.models.servers import PLAIN, Server, TransientServerError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

logger = logging.getLogger(__name__)

# A server's numbers vary a little with what else is in its batch: tolerances of the comparison of two ranges.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 0.1, 1e-3
_UNKNOWN_METHOD = "is not implemented"  # in vLLM's answer (status 500) to the name of a method that its workers lack


def check_addresses(servers: Sequence[str] | Literal["auto"]) -> None:
    """Refuse servers that some training processes cannot reach, because they are on another machine.

    A loopback address names another server on each machine, and process 0 sends weights to its own alone: the others
    would sample from the weights of their start.

    A warning tells of public addresses, because a server that takes new weights takes other commands as well.

    Args:
        servers: The value of `rollout.servers`.

    Raises:
        EngineError: The processes run on several machines, and a server listens on one of them only.
    """
    if servers != "auto":
        _warn_of_public(tuple(url for url in servers if _is_public(url)))
    if (count := machines()) == 1:
        return
    where = f"the run has processes on {count} machines"
    if servers == "auto":
        raise EngineError(
            f"rollout.servers: auto starts a server that listens on its own machine only, and {where}: start vllm "
            "serve and name its address, or set rollout.engine=auto without rollout.servers, for a vLLM in each process"
        )
    if own := [url for url in servers if is_loopback(url)]:
        raise EngineError(
            f"rollout.servers: {', '.join(own)} is another server on each machine, and {where}: name addresses that "
            "all machines reach"
        )


def is_loopback(url: str) -> bool:
    """Return whether an address (`http://host:port`) is one of the machine that asks, whichever that is."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _is_public(url: str) -> bool:
    """Whether an address is given by numbers that the whole internet reaches."""
    try:
        return ipaddress.ip_address(urlsplit(url).hostname or "").is_global
    except ValueError:
        return False


@cache
def _warn_of_public(urls: tuple[str, ...]) -> None:
    """Say, once, what the interface means that new weights are sent through."""
    if urls:
        logger.warning(
            "%s: a public address. A server that takes new weights (VLLM_SERVER_DEV_MODE=1) also takes commands from "
            "whoever reaches it: keep it on the loopback interface or in a private network.",
            ", ".join(urls),
        )


def check_logprobs_mode(server: Server) -> None:
    """Check that a server reports the log-probabilities that tokens were sampled with.

    Those depend on the temperature: differences between tokens at temperature 1 are twice those at temperature 2.

    Raises:
        EngineError: The server reports log-probabilities before temperature.
    """
    ranges, ids = [], [1, 2, 3]
    for temperature in (1.0, 2.0):
        body = {
            "temperature": temperature,
            "max_tokens": 1,
            "prompt": [1, 2],
            "logprobs": 1,
            "logprob_token_ids": ids,
        }
        table = server.complete(PLAIN | body, lambda answer: read_completion(answer, ids)).tables[0]
        ranges.append(max(table[token] for token in ids) - min(table[token] for token in ids))
    if abs(ranges[0] - 2 * ranges[1]) > _RELATIVE_TOLERANCE * ranges[0] + _ABSOLUTE_TOLERANCE:
        raise EngineError(
            f"{server.url} reports log-probabilities before temperature: start it with "
            "--logprobs-mode processed_logprobs"
        )


def start_pair(server: Server) -> None:
    """Have a server that holds a teacher beside the student sample from their mixture, where requests ask for it.

    Raises:
        TransientServerError: The server does not answer, or is overloaded, starting or ending.
        EngineError: It holds another model; the message says how to start it.
    """
    try:
        answer = server.ask("POST", "/collective_rpc", {"method": "minillm_start"})
    except TransientServerError as error:
        if _UNKNOWN_METHOD not in str(error):
            raise
        answer = str(error)
    except EngineError as error:
        answer = str(error)
    found = answer.get("results") if isinstance(answer, dict) else [answer]
    if not found or any(name != "StudentAndTeacher" for name in found):
        raise EngineError(
            f"{server.url} holds no teacher to mix in ({found[0] if found else answer}): start it where minillm is "
            "installed, with the arguments that minillm.rollout.engines.server names, or set rollout.teacher_mix: 0"
        )


def read_mixed(answer: Any, vocab_size: int) -> Completion:
    """Read and validate the JSON of a completion whose tokens are sampled from the mixture.

    Beside log q of each token stands its log p, under the next token id. A server that was restarted samples with
    vLLM's own sampler until `start_pair`, and returns the most likely token in its place.

    Args:
        answer: The parsed JSON.
        vocab_size: Number of ids that can be sampled.

    Raises:
        KeyError, TypeError, ValueError: The answer is not such a completion. `Server.complete` catches these.
    """
    completion = read_completion(answer)
    for token, table in zip(completion.ids, completion.tables, strict=True):
        if table.keys() != {token, (token + 1) % vocab_size}:
            raise ValueError(f"token {token} was not sampled from the mixture: log p is not beside it")
    return completion


def teacher_logprobs(completion: Completion, vocab_size: int) -> Float[Tensor, " tokens"]:
    """Return log p of each token of a completion that `read_mixed` has read."""
    return torch.tensor(
        [table[(token + 1) % vocab_size] for token, table in zip(completion.ids, completion.tables, strict=True)]
    )
