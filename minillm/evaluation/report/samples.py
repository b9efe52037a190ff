"""The token-level view of responses that the student sampled while it trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from minillm.evaluation.formatting import number
from minillm.evaluation.report.html import block

_SHOWN = 12
_STRONG = 2.0  # nats: a token with this KL(q‖p), or more, has the full colour

EXPLAINED = (
    "Responses as they were when the student first trained on them. The colour is KL(q‖p) of the next-token "
    f"distributions at each token, strongest from {_STRONG:g} nats; point at a token for its numbers."
)
_BY_TEACHER = (
    " Where the teacher was mixed in, the other colour is the probability that the teacher drew the token: "
    "α·p(y) / (α·p(y) + (1−α)·q(y))."
)


def draw_samples(title: str, samples: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the last samples of a log, the newest first.

    Args:
        title: Heading of the view.
        samples: Lines of `samples.jsonl`; see `minillm.train.samples`.

    Returns:
        HTML; empty if there are no samples.
    """
    if not samples:
        return Markup("")
    mixed = any(sample.get("teacher_share") for sample in samples)
    shown = [_sample(sample) for sample in list(samples)[-_SHOWN:][::-1]]
    explained = EXPLAINED + (_BY_TEACHER if mixed else "")
    return block("samples", title=title, explained=explained, samples=shown, mixed=mixed)


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    count = len(sample["tokens"])
    kl, advantage = sample["kl"], sample["advantage"]
    share = sample.get("teacher_share") or [None] * count
    numbers = zip(sample["tokens"], kl, advantage, share, strict=True)
    cut = "" if count == sample["length"] else f", of which {count} are shown"
    ended = "" if sample["finished"] else ", cut at the length limit"
    teacher = f", teacher {sample['teacher']}" if sample.get("teacher") else ""
    return {
        "caption": f"update {sample['update']}, {sample['origin']}, {sample['length']} tokens{cut}{ended}{teacher}",
        "prompt": sample["prompt"],
        "tokens": [
            {
                "text": text,
                "kl": f"{min(max((one or 0.0) / _STRONG, 0.0), 1.0):.2f}",
                "teacher": f"{of_teacher or 0.0:.2f}",
                "told": _told(one, gain, of_teacher),
            }
            for text, one, gain, of_teacher in numbers
        ],
    }


def _told(kl: float | None, advantage: float | None, share: float | None) -> str:
    told = f"KL {number(kl)} nats, advantage {number(advantage)}"
    return told if share is None else f"{told}, drawn by the teacher with probability {number(share)}"
