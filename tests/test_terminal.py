"""What a command shows: progress, what is kept from the terminal and why, JSON lines, and tables that fit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm import terminal
from minillm.evaluation.metrics import HELD_OUT
from minillm.noise import NOISE, Sieve, download_in
from minillm.run.results import summary
from minillm.terminal import Bar, Progress, Terminal, duration, whole

# What a run of the quickstart printed before anything was filtered.
PRINTED = """\
WARNING: Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please make sure
WARNING: Triton is installed, but doesn't include CPU backend. Disabling Triton.
/x/site-packages/vllm/triton_utils/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is deprecated
  if hasattr(value, "__dict__"):
[W1130 09:08:43.358373846 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy for memory allocation
Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]
\x1b[A
Rendering prompts: 100%|██████████| 128/128 [00:00<00:00, 4660.58it/s]
Processed prompts:   0%|          | 0/128 [00:00<?, ?it/s, est. speed input: 0.00 toks/s, output: 0.00 toks/s]
huggingface/tokenizers: The current process just got forked, after parallelism has already been used.
To disable this warning, you can either:
\t- Avoid using `tokenizers` before the fork if possible
\t- Explicitly set the environment variable TOKENIZERS_PARALLELISM=(true | false)
Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint directory:
\tlogging_steps: 2 (from args) != 1 (from trainer_state.json)
INFO 11-30 09:08:40 [core.py:75] Initializing a V1 LLM engine
[Gloo] Rank 0 is connected to 0 peer ranks. Expected number of connected peer ranks is : 0
"""
SEEN = """\
WARNING: stage minillm ended worse than it began
RuntimeError: CUDA error: out of memory
  hint: a line that belongs to it
/x/lib.py:3: UserWarning: the disk is nearly full
  warnings.warn(text)
"""


def test_noise_is_kept_from_the_terminal_and_nothing_else_is() -> None:
    assert Sieve().pick(PRINTED.splitlines()) == []
    assert Sieve().pick(SEEN.splitlines()) == SEEN.splitlines()
    assert Sieve().pick((PRINTED + SEEN + PRINTED).splitlines()) == SEEN.splitlines()
    assert Sieve().pick(["WARNING: twice", "other", "WARNING: twice", "other"]) == ["WARNING: twice", "other", "other"]


def test_a_download_is_told_of() -> None:
    bars = [
        "Loading weights: 100%|##| 236/236 [00:00<00:00, 1424.50it/s]",
        "model.safetensors:  12%|#2        | 337M/2.81G [00:03<00:22, 112MB/s]",
        "model.safetensors:  45%|####5     | 1.26G/2.81G [00:11<00:13, 112MB/s]",
    ]
    assert download_in(bars) == "downloading model.safetensors: 45% of 2.81G"
    assert download_in(["Processing Files (0 / 1):  9%|9 | 90.1MB / 1.00GB, 30MB/s"]) == (
        "downloading Processing Files (0 / 1): 9% of 1.00GB"
    )
    assert download_in([*bars[:1], *PRINTED.splitlines()]) is None
    assert Sieve().pick(bars) == []


def test_every_filter_has_its_reason() -> None:
    for pattern, reason in NOISE:
        assert pattern
        assert len(reason) > 5 or reason == "nothing"


CHILD = """
import logging, os, subprocess, sys
from pathlib import Path
from minillm.capture import keep_log, opened
from minillm.terminal import current
logging.basicConfig(format="%(levelname)s: %(message)s")
with opened(sys.argv[1], all_lines="all" in sys.argv) as shown:
    current().say("[1/2] teacher")
    os.write(2, b"[W1130 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy for memory\\n")
    keep_log(Path("logs/run.log"))
    logging.getLogger("x").warning("mind this")
    subprocess.run(["sh", "-c", "echo from another process; printf 'Loading: 10%%| |\\\\rLoading: 100%%|#|\\\\n' >&2"])
    part = dict(os.environ, **current().environment())
    if "parts" in sys.argv:
        subprocess.run([sys.executable, __file__, "json"], env=part, check=True, **current().streams())
    shown.event("stage", stage="teacher", seconds=1.5)
    shown.end("Results: here")
    if "fail" in sys.argv:
        raise ValueError("broken")
"""


def run_child(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("mode", "out", "err"),
    [
        ("plain", ["[1/2] teacher", "Results: here"], ["WARNING: mind this", "from another process"]),
        ("quiet", ["Results: here"], []),
        ("json", ['{"event": "stage", "stage": "teacher", "seconds": 1.5}'], ["WARNING: mind this", "from another process"]),
    ],
)  # fmt: skip
def test_what_libraries_and_other_processes_print_goes_to_the_log(
    tmp_path: Path, mode: str, out: list[str], err: list[str]
) -> None:
    done = run_child(tmp_path, mode)
    assert done.stdout.splitlines() == out
    assert done.stderr.splitlines() == err
    log = (tmp_path / "logs" / "run.log").read_text()
    for line in ("NUMA binding", "WARNING: mind this", "from another process", "Loading: 100%", "» [1/2] teacher"):
        assert log.count(line) == 1
    shown = run_child(tmp_path, mode, "all").stderr
    assert ("NUMA binding" in shown) == (mode != "quiet")


def test_the_last_json_object_says_how_it_ended(tmp_path: Path) -> None:
    done = run_child(tmp_path, "json", "fail")
    assert json.loads(done.stdout.splitlines()[-1]) == {"event": "run", "status": "failed", "error": "broken"}
    assert done.stderr.splitlines()[-1] == "ValueError: broken"  # the traceback is seen, wherever libraries write
    assert "failed: broken" in (tmp_path / "logs" / "run.log").read_text()


def test_a_part_of_a_command_leaves_headings_and_results_to_it(tmp_path: Path) -> None:
    done = run_child(tmp_path, "plain", "parts")
    assert done.stdout.splitlines() == ["[1/2] teacher", "[1/2] teacher", "Results: here"]  # its own lines are shown
    assert done.stderr.count("mind this") == 2
    done = run_child(tmp_path, "json", "parts")
    assert len(done.stdout.splitlines()) == 1


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", found)
    return found


def show_with(monkeypatch: pytest.MonkeyPatch, shown: Terminal) -> Terminal:
    monkeypatch.setattr(terminal, "_current", shown)
    return shown


def test_where_lines_stay_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    out = io.StringIO()
    shown = show_with(monkeypatch, Terminal("plain", out))
    shown.heading, shown.rest = "[5/7] minillm", lambda: 600.0
    progress = Progress(720, "updates")
    progress.start_at(120)
    for update in range(600):  # an hour
        clock.now += 6
        progress.update(note=f"KL(q‖p) {update / 1000:.3f}")
    lines = out.getvalue().splitlines()
    assert 5 <= len(lines) <= 11
    assert lines[0] == "[5/7] minillm 180/720 updates, 25%, 54 min left (run: 1 h 04 min), KL(q‖p) 0.059"
    assert max(map(len, lines)) <= 85


def test_in_a_terminal_it_is_one_line_that_others_do_not_garble(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    shown = show_with(monkeypatch, Terminal("plain", out, out))
    with Progress(10, "updates", "with a long name of what is done:") as progress:
        clock.now += 1
        progress.update()
        shown.warn("a warning")
        clock.now += 1
        progress.update()
    drawn = out.getvalue().split("\r\x1b[K")
    assert "\n" not in drawn[1]
    assert drawn[2] == "a warning\n"
    assert drawn[3] == drawn[1]
    assert all(len(line) < 40 for line in drawn)
    assert drawn[-1] == ""  # the line is taken away


@pytest.mark.parametrize("mode", ["quiet", "json"])
def test_progress_is_not_shown_otherwise(monkeypatch: pytest.MonkeyPatch, clock: Clock, mode: Any) -> None:
    out = io.StringIO()
    show_with(monkeypatch, Terminal(mode, out))
    progress = Progress(2, "updates")
    clock.now += 1000
    progress.update()
    assert out.getvalue() == ""


def test_waves_of_one_task_count_as_one(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    out = io.StringIO()
    show_with(monkeypatch, Terminal("plain", out))
    with whole(300, "responses", 100):
        for _ in range(2):
            bar = Bar(total=100, desc="Processed prompts")  # as vLLM uses one
            for _ in range(100):
                clock.now += 2
                bar.update(1)
                assert bar.format_dict["elapsed"] > 0
            bar.close()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("130/300 responses, 43%, 6 min left")
    assert lines[-1].split()[0] > "250/300"
    assert list(Bar(["a", "b"])) == ["a", "b"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (-1, 5, 99, 130, 3599, 4000)] == [
        "0 s", "5 s", "99 s", "2 min", "1 h 00 min", "1 h 07 min",
    ]  # fmt: skip


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.5, "high": mean + 0.5}


@pytest.mark.parametrize(("width", "intervals"), [(120, 4), (80, 3), (60, 1), (30, 0)])
def test_the_summary_fits(width: int, intervals: int) -> None:
    means = {"rouge_l": 21.25, "reverse_kl": 0.75, "finished": 98.5, "length": 41.5}
    models = {
        name: {key: interval(mean) for key, mean in means.items()}
        for name in ("teacher", "pruned", "warmed", "minillm")
    }
    lines = summary({"prompts": 261, "seeds": [1, 2, 3], "models": models}, width)
    assert max(map(len, lines)) <= max(width, 46)  # names and means alone are 46 wide
    assert [line.count("[") for line in lines if line.startswith("teacher")] == [intervals]
    assert [line.split()[0] for line in lines[-4:]] == list(models)
    for metric in HELD_OUT:
        assert all(word in " ".join(lines) for word in metric.title.split())
    assert set(means) == {metric.key for metric in HELD_OUT}
