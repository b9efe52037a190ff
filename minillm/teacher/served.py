"""A teacher behind `vllm serve` processes, as a user names it: exact where they return states, otherwise an estimate.

A server that was started as `minillm.teacher.config.START_COMMAND` says returns the teacher's final hidden states
(`served_states`), and every score is that of a teacher in this process. A server that was started to generate returns
log-probabilities of a few tokens only (`served_logprobs`). Which of the two it is turns out when the servers are
attached.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from minillm.errors import EngineError, InputError
from minillm.models.head_weights import load_head
from minillm.models.servers import Servers
from minillm.teacher.config import START_COMMAND
from minillm.teacher.served_logprobs import TOP_LOGPROBS, ServedLogprobs
from minillm.teacher.served_states import STATES_PATH, ServedStates

logger = logging.getLogger(__name__)


class ServedTeacher:
    """Names a teacher's servers. They are asked for nothing before `attach`, and no model is held here.

    Args:
        urls: `http://host:port` of each server. All of them must return the same. `VLLM_API_KEY` is sent if it is set.
        source: folder or hub id of the teacher. Its tokenizer and config are read, and the weights of its head if the
            servers return states.
        top_k: how many of the student's most likely tokens are scored per position where the servers return
            log-probabilities only; 0 where only sampled tokens count.
        patience: seconds for which a server that does not answer is retried.
        timeout: seconds that a server may take for one response.

    Raises:
        InputError: there is no address, or `top_k` is more than servers return.
    """

    def __init__(
        self, urls: Sequence[str], source: str, *, top_k: int = 16, patience: float = 600.0, timeout: float = 300.0
    ) -> None:
        if not urls:
            raise InputError("teacher.servers: no address is given")
        if top_k >= TOP_LOGPROBS:
            raise InputError(
                f"teacher.top_k ({top_k}) must be less than {TOP_LOGPROBS}, the number of tokens that a server returns"
            )
        self.urls, self.source, self.top_k = urls, source, top_k
        self.patience, self.timeout = patience, timeout

    @property
    def vocab_size(self) -> int:
        """Rows of the teacher's head."""
        return AutoConfig.from_pretrained(self.source).get_text_config().vocab_size

    def returns_states(self) -> bool:
        """Ask every server whether it returns states.

        Raises:
            EngineError: a server is unreachable, or some servers return states and others do not.
        """
        servers, found = Servers(self.urls, patience=self.patience, timeout=self.timeout), dict[str, bool]()
        try:
            for server in servers.each:
                servers.call_with_retries(
                    lambda server=server: found.update({server.url: server.has_route(STATES_PATH)}), server
                )
        finally:
            servers.close()
        without = [url for url, does in found.items() if not does]
        if without and len(without) < len(found):
            raise EngineError(
                f"teacher.servers: {', '.join(without)} do not return states, as the other servers do: start all in "
                f"the same way ({START_COMMAND})"
            )
        return not without

    def attach(
        self, max_length: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> ServedStates | ServedLogprobs:
        """Connect to the servers and check that they accept sequences of `max_length` tokens.

        Args:
            max_length: tokens of the longest sequence that will be scored.
            dtype: dtype of states and head.
            device: where states and head are put; the CPU by default.

        Returns:
            The teacher. It is exact if it is a `ServedStates`.

        Raises:
            EngineError: a server is unreachable, serves shorter sequences or another model than the others, or returns
                states that do not fit the head of `source`.
            InputError: the logits of `source` are made in a way that is not scored.
        """
        settings: dict[str, Any] = {"max_length": max_length, "patience": self.patience, "timeout": self.timeout}
        if self.returns_states():
            head = load_head(self.source, dtype, device or torch.device("cpu"))
            return ServedStates(self.urls, head, **settings)
        logger.warning(
            "%s return log-probabilities of a few tokens%s. Servers that return states are exact: %s",
            ", ".join(self.urls),
            _estimate(self.top_k),
            START_COMMAND,
        )
        return ServedLogprobs(self.urls, top_k=self.top_k, **settings)


def _estimate(top_k: int) -> str:
    """What is known of KL(q‖p) from log-probabilities of a few tokens, as a clause."""
    if not top_k:
        return ", of which only those of the sampled tokens are used, and these are exact"
    size = "26 % of it with 1 token, 45 % with 4, 65 % with 16 and 67 % with 19"
    return (
        f", so that KL(q‖p) is that of the student's {top_k} most likely tokens, the sampled one, and all others as "
        f"one event: at temperature 1, {size} (measured for one pair: docs/guides/teachers.md)"
    )
