"""Where a response ends, and which checkpoints a rollout is restored from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minillm.data.rollouts import Rollout, TeacherTargets
from minillm.data.sampling import Sampling, StopStrings


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("w2 w3 w4", None),
        ("w2 w9 w4", 2),
        ("w9", 1),
        ("w2 w7 w8 w3", 3),  # a string of several tokens ends with its last
        ("w7 w2 w8", None),
        ("w7 w8 w9", 2),  # the first that appears, whichever it is
        ("w2 <eos>", 2),
        ("w2 <eos> w9", 2),  # what an engine drew beyond the end
        ("w9 <eos>", 1),
    ],
)
def test_a_response_ends_with_the_token_that_completes_a_string(tokenizer: Any, text: str, kept: int | None) -> None:
    sampling = Sampling(8, (1,), 32, stop=StopStrings(tokenizer, ["w9", "w7 w8"]))
    ids = ids_of(tokenizer, text)
    assert sampling.length(ids) == kept
    rollout = Rollout.drawn([2], ids, [-0.1 * i for i in range(len(ids))], sampling, 3, top_logprobs=[{} for _ in ids])
    n = kept or len(ids)
    assert rollout.response_ids == ids[:n]
    assert len(rollout.student_logprobs) == len(rollout.top_logprobs or []) == n
    assert rollout.finished == (kept is not None)


def test_no_stop_string_is_empty(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="stop: every string must have"):
        StopStrings(tokenizer, ["w1", ""])


def test_a_rollout_is_restored_from_its_saved_fields() -> None:
    logq = torch.tensor([-0.5, -1.0])
    rollout = Rollout(
        [2], [5, 1], logq, logq, 3, True, teacher=TeacherTargets(logq), top_logprobs=[{5: -0.5}, {1: -1.0}]
    )
    saved = rollout.to_saved()
    assert "teacher" not in saved  # the teacher returns its targets again
    restored = Rollout.from_saved(saved)
    assert restored.teacher is None
    assert restored.to_saved() == saved


def test_a_rollout_is_restored_from_a_checkpoint_of_an_earlier_version() -> None:
    logq, reverse_kl = torch.tensor([-0.5, -1.0]), torch.tensor([0.1, 0.2])
    fields: dict[str, Any] = {
        "prompt_ids": [2],
        "response_ids": [5, 1],
        "student_logprobs": logq,
        "behaviour_logprobs": logq,
        "weights_version": 3,
        "finished": True,
        "teacher_logprobs": None,
        "teacher_hidden": None,
        "teacher_rows": None,
        "reverse_kl": reverse_kl,
        "likeliest": [{5: -0.5}, {1: -1.0}],
    }
    rollout = Rollout.from_saved(fields)
    assert rollout.top_logprobs == [{5: -0.5}, {1: -1.0}]
    assert rollout.reverse_kl is reverse_kl
    assert rollout.teacher is None
