"""The file of Gemma 3 270M, which `make gemma` fetches; tests that need it are skipped where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / ".assets" / "gemma" / "gemma-3-270m-q4_k_m.gguf"
needs_gemma = pytest.mark.skipif(not FILE.is_file(), reason="the file of Gemma 3 270M is missing: make gemma")
