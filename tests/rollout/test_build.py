from __future__ import annotations

import logging

import pytest

from minillm.data.rollouts import EngineError
from minillm.rollout import build


def test_without_vllm_auto_falls_back_in_one_line_and_vllm_insists(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "vllm_is_installed", lambda: False)
    build._say_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert build.choose_engine("auto") == "transformers"
        assert build.choose_engine("auto") == "transformers"
    assert [record.message for record in caplog.records] == [
        "vLLM is not installed: sampling with transformers instead, several times slower."
    ]
    with pytest.raises(EngineError, match=r"vllm is not installed; pip install 'minillm\[vllm\]'"):
        build.choose_engine("vllm")
    assert build.choose_engine("transformers") == "transformers"
    monkeypatch.setattr(build, "vllm_is_installed", lambda: True)
    assert build.choose_engine("auto") == "vllm"
