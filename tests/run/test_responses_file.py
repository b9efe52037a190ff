"""The file of the teacher's responses: continued wherever it ends, and read without being kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minillm.run import responses_file
from minillm.run.responses_file import ResponsesFile, open_responses
from minillm.run.stages import responses


def test_responses_continue_where_they_were_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the file ends, also within a line, the same rows follow: by teacher, sample and row."""
    names, samples = ["math", "chat"], 2
    rows = {"math": [1, 4, 5], "chat": [0], "none": []}

    def prompts_after(row: int, name: str) -> Iterator[Any]:
        yield from (SimpleNamespace(example=SimpleNamespace(row=found)) for found in rows[name] if found > row)

    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(responses=SimpleNamespace(samples_per_prompt=samples)), prompts_after=prompts_after
    )
    expected = [(name, sample, row) for name in names for sample in range(samples) for row in rows[name]]
    lines = [json.dumps({"row": row, "teacher": name}) + "\n" for name, _, row in expected]
    for done in range(len(lines) + 1):
        for torn in ("", '{"row": 3, "teac'):
            path = tmp_path / "responses.jsonl"
            path.write_text("".join(lines[:done]) + torn)
            file = ResponsesFile(path)
            left = names[names.index(file.progress.teacher or "math") :]
            for name in left:
                unanswered = responses._unanswered(run, name, file.progress)
                while wave := list(islice(unanswered, 2)):
                    file.append([{"row": prompt.example.row, "teacher": name} for prompt, _ in wave])
                    assert path.read_text() == "".join(lines[: len(path.read_text().splitlines())])
            assert path.read_text() == "".join(lines), (done, torn)
    found = responses._unanswered(run, "math", ResponsesFile(tmp_path / "new.jsonl").progress)
    assert [(sample, prompt.example.row) for prompt, sample in found] == [
        (sample, row) for name, sample, row in expected if name == "math"
    ]
    monkeypatch.setattr(responses_file, "IN_MEMORY", 3)
    some = [{"prompt_ids": [1] * i, "response_ids": [2, 3]} for i in range(1, 7)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    large: Any = open_responses(tmp_path / "some.jsonl")
    assert (list(large), large.longest) == (some, 8)
