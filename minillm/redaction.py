"""Keeps secrets out of everything that is written: model cards, run states, results and checkpoints."""

from __future__ import annotations

import logging
import re
from typing import Any

HIDDEN = "(hidden)"
# Names of settings that hold secrets. `max_prompt_tokens` and `update_tokens` count tokens and are not among them.
_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|hub_token|api[_-]?key|key|secret|password|passwd|passphrase"
    r"|credentials?|auth|authorization|bearer|cookie)$",
    re.I,
)
# Forms that secrets have, whatever the name of the setting: tokens of well-known services, and long ones with a known
# start.
_SECRET_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9_]{8,}|api_org_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}"
    r"|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AKIA[A-Z0-9]{12,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*)"
)
_BEARER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}")
_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_IN_QUERY = re.compile(
    r"([?&;](?:[a-z0-9_.-]*(?:token|api[_-]?key|secret|password|passwd|signature|credential|auth)|key|sig|pwd)=)"
    r"[^&#\s\"']+",
    re.I,
)


def redacted(value: Any, name: str = "") -> Any:
    """Return a copy of settings without secrets: values under secret names, tokens, and credentials in URLs.

    Args:
        value: Anything that JSON can hold.
        name: Name of the setting that holds the value.

    Returns:
        The copy. Tuples become lists.
    """
    if isinstance(value, dict):
        return {key: redacted(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(inner, name) for inner in value]
    if _SECRET_NAME.search(name) and isinstance(value, str) and value:
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Return a text with its tokens, and the credentials in its URLs, hidden."""
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(f"{HIDDEN}@", text))
    return _BEARER.sub(rf"\1 {HIDDEN}", _SECRET_TEXT.sub(HIDDEN, text))


class Redacting(logging.Filter):
    """Hides secrets in everything that is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message of a record by one without secrets."""
        text = record.getMessage()
        hidden = redacted_text(text)
        if hidden != text:
            record.msg, record.args = hidden, ()
        return True


def is_secret(name: str, value: Any) -> bool:
    """Return whether a setting, or part of it, is left out of what is written.

    Args:
        name: Name of the setting.
        value: Its value.
    """
    return redacted(value, name) != (list(value) if isinstance(value, tuple) else value)
