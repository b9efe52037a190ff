"""The parts of eval/speed/scaling.py that measure nothing: points, fits, results that resume, plans, and tables."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.conftest import save, tiny_llama

sys.path.append(str(Path(__file__).parents[2] / "eval" / "speed"))

import scaling
import scaling_rows
from contenders import WorkerError, Workload
from scaling_figures import draw
from scaling_fit import agreement, fit, grows_too_fast
from scaling_measure import Rounds, Task, summarised
from scaling_models import set_vocabulary
from scaling_plan import Planned, does_not_fit, expected_rows, operations, plan_update, prompt_lengths
from scaling_points import AXES, Point, Settings, in_order, points
from scaling_report import summarise, table
from scaling_results import Results

from minillm.models.shape import shape_of
from minillm.run.plan import Machine

ON = {"machine": "this one", "torch": "2"}


# Fits


def test_a_power_law_is_found_with_the_interval_of_a_line() -> None:
    generator = np.random.default_rng(0)
    xs = np.array([32.0, 64, 128, 256, 512, 1024])
    ys = 3 * xs**1.4 * np.exp(0.1 * generator.standard_normal(6))
    found = fit(xs.tolist(), ys.tolist())
    assert found is not None
    design = np.stack([np.log(xs), np.ones(6)], 1)
    solution, [squares], _, _ = np.linalg.lstsq(design, np.log(ys), rcond=None)
    error = math.sqrt(squares / 4 * np.linalg.inv(design.T @ design)[0, 0])
    assert found.exponent == pytest.approx(solution[0])
    assert (found.low, found.high) == pytest.approx((solution[0] - 2.776 * error, solution[0] + 2.776 * error))
    assert found.last == pytest.approx(math.log2(ys[-1] / ys[-2]))
    exact = fit([1, 2, 4, 8], [5, 20, 80, 320])
    assert exact is not None
    assert (exact.exponent, exact.low, exact.high, exact.last) == pytest.approx((2, 2, 2, 2))


def test_the_order_of_points_and_points_without_a_value_do_not_matter() -> None:
    assert fit([8, 1, 4, 2, 3], [8, 1, 4, 2, 0]) == fit([1, 2, 4, 8], [1, 2, 4, 8])
    assert fit([1, 2], [1, 0]) is None
    assert fit([2, 2], [1, 3]) is None
    two = fit([1, 4], [1, 2])
    assert two is not None
    assert (two.exponent, two.low, two.high) == (pytest.approx(0.5), -math.inf, math.inf)
    # Neighbours that are close to each other would tell nothing but noise: the step spans a factor of two at least.
    close = fit([1, 2, 4, 5], [1, 2, 4, 8])
    assert close is not None
    assert close.last == pytest.approx(math.log(4) / math.log(2.5))


def test_what_grows_faster_than_its_operations_is_noticed() -> None:
    line = fit([1, 2, 4, 8], [1, 2, 4, 8])
    with_constant, square = fit([1, 2, 4, 8], [11, 12, 14, 18]), fit([1, 2, 4, 8], [1, 4, 16, 64])
    late = fit([1, 2, 4, 8], [10, 10.5, 12, 40])  # hidden below a constant part at first
    assert not grows_too_fast(line, line)
    assert not grows_too_fast(with_constant, line)
    assert grows_too_fast(square, line)
    assert grows_too_fast(late, line)
    assert not grows_too_fast(square, square)
    assert not grows_too_fast(None, line)


def test_agreement_counts_points_within_a_share() -> None:
    assert agreement([], 0.25) is None
    found = agreement([(75, 100), (125, 100), (126, 100), (74, 100)], 0.25)
    assert found == {"points": 4, "within": 2, "lowest": 0.74, "median": 1.0, "highest": 1.26}


# Points


def test_axes_change_one_setting_and_share_the_base_point() -> None:
    base = Settings(tokens=64, sequences=8)
    axes = points(base)
    assert tuple(axes) == AXES
    for axis, some in axes.items():
        if some[0].settings is None or axis == "corners":
            continue
        changed = [sum(vars(one.settings)[name] != value for name, value in vars(base).items()) for one in some]
        assert set(changed) == {0, 1}, axis
        assert changed.count(0) == 1
        assert [one.x for one in some] == sorted(one.x for one in some)
    order = in_order(axes)
    assert len({one.key for one in order}) == len(order)
    assert {one.key for some in axes.values() for one in some} == {one.key for one in order}
    [shared] = [one for one in order if one.settings == base]
    assert shared.trl  # it is the first point of an axis that asks for it
    asked = [one.trl for some in axes.values() for one in some if one.kind == "update"]
    assert 0.25 < sum(asked) / len(asked) < 0.45  # a third
    assert all(len(some) == 3 for some in points(base, quick=True).values())
    assert list(points(base, ["rows", "tokens"])) == ["tokens", "rows"]


@pytest.mark.parametrize("sequences", [8, 15, 16, 20])
def test_uneven_responses_have_the_ratio_and_the_mean(sequences: int) -> None:
    for ratio in (1.0, 4.0, 16.0):
        lengths = Settings(tokens=64, sequences=sequences, ratio=ratio).lengths
        assert len(lengths) == sequences
        assert sum(lengths) / sequences == pytest.approx(64, rel=0.02)
        assert max(lengths) / min(lengths) == pytest.approx(ratio, rel=0.08)
    assert Settings(tokens=7).lengths == [7] * 8


# Results


def test_results_go_on_after_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "new" / "points.jsonl"
    first = Results(file, ON)
    first.add("a", {"ours": {"seconds": 1}})
    first.add("b", {"ours": {"seconds": 2}})
    whole = file.read_bytes()
    long = b'{"key": "d", "on": {"machine": "this one", "torch": "2"}, "ours": {"seconds": [' + b"1, " * 99
    for torn in (b"{", whole.splitlines()[1], long):  # the kill came while a line was written
        file.write_bytes(whole + torn)
        again = Results(file, ON)
        assert set(again.by_key) == {"a", "b"}
        again.add("c", {"ours": {"seconds": 3}})
        assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    Results(file, ON).add("a", {"ours": {"seconds": 4}})
    assert Results(file, ON).by_key["a"]["ours"]["seconds"] == 4  # the last one counts


def test_results_of_another_machine_or_version_are_not_used(tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    Results(file, ON | {"torch": "1"}).add("a", {})
    found = Results(file, ON)
    assert (found.by_key, found.others) == ({}, 1)
    found.add("a", {})
    assert Results(file, ON | {"torch": "1"}).others == 1
    file.write_text('{"key": 1}\n')
    with pytest.raises(SystemExit, match=r"points\.jsonl:1: no record"):
        Results(file, ON)


# Plans


def work(tmp_path: Path, **changes: Any) -> Workload:
    models = (save(tiny_llama(1, width=32), tmp_path / "s"), save(tiny_llama(2, width=64), tmp_path / "t"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"a b {i}"}) + "\n" for i in range(16)), encoding="utf-8")
    given = Workload(*models, str(rows), 8, 16, 4, longest_prompt=64, measures_peak=False)
    return replace(given, **changes)


def test_a_workload_survives_its_way_to_a_process(tmp_path: Path) -> None:
    given = work(tmp_path, lengths=(3, 4))
    assert Workload.read(json.dumps(vars(given))) == given


def test_an_update_is_planned_with_its_true_lengths(tmp_path: Path) -> None:
    machine = Machine(gpu=False, bf16=False)
    found = plan_update(work(tmp_path), machine)
    assert set(found.phases) == {"rollouts", "update"}
    assert found.seconds == pytest.approx(sum(found.phases.values()))
    twice = plan_update(work(tmp_path, sequences=16), machine)
    assert twice.phases["update"] == pytest.approx(2 * found.phases["update"], rel=0.02)
    uneven = plan_update(work(tmp_path, tokens=28, lengths=(4, 28) * 4), machine)  # the mean is 16 still
    assert uneven.phases["update"] == pytest.approx(found.phases["update"])
    assert found.peak is not None
    assert uneven.peak is not None
    assert uneven.peak > found.peak


def test_operations_of_several_responses_to_a_prompt(tmp_path: Path) -> None:
    given = work(tmp_path)
    alone, several = operations(given), operations(work(tmp_path, samples_per_prompt=4))
    [length] = set(prompt_lengths(given))
    # Six of eight responses find all of their prompt but its last token.
    read = shape_of(given.student).dimensions.forward([length - 1])
    assert alone.sampling - several.sampling == pytest.approx(6 * read)
    assert several.student == pytest.approx(alone.student, rel=0.05)


def test_a_point_beyond_the_memory_is_left_out() -> None:
    assert does_not_fit(None, 10**9) == ""
    assert does_not_fit(0.8e9, 10**9) == ""
    assert "0.9 GB are expected" in does_not_fit(0.9e9, 10**9)  # the plan may be 15 % too low


def test_rows_are_expected_by_fewer_rows() -> None:
    earlier = {
        rows: {"ours": {"seconds": rows / 100, "peak_bytes": 5e8 + own, "own_bytes": own}}
        for rows, own in ((100.0, 1e6), (1000.0, 1e7))
    }
    assert expected_rows({}, 10) == Planned(None, {}, None)
    more = expected_rows(earlier, 10_000)
    assert (more.seconds, more.peak) == (pytest.approx(100), pytest.approx(5e8 + 1e7 + 9e7))
    assert expected_rows(earlier, 500).seconds == pytest.approx(5)


# The loop


def curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **machine: Any) -> tuple[Any, Results, list[str]]:
    """A curve whose points take no time: (curve, results, names of the points that were measured)."""
    tried: list[str] = []

    def prepare(point: Point, models: Any, of: Machine, earlier: dict[float, Any]) -> Task:
        def measure() -> dict[str, Any]:
            tried.append(f"{point}{' trl' if point.trl else ''}")
            if point.x == 64:
                raise WorkerError("no more memory")
            return {"ours": {"seconds": 1.0, "peak_bytes": 1e9, "phases": {}}, **({"trl": {}} if point.trl else {})}

        return Task(point, Planned(1.0, {}, point.x * 1e7), measure, expected=point.x)

    monkeypatch.setattr(scaling, "prepare", prepare)
    results = Results(tmp_path / "points.jsonl", ON)
    return scaling.Curve(results, SimpleNamespace(), Machine(**machine), "a guess", 10), results, tried  # pyright: ignore[reportArgumentType]


def test_points_are_left_out_by_name_before_they_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = points(Settings(), ["tokens"])
    found, results, tried = curve(tmp_path, monkeypatch, memory=int(4e9))
    found.measure(axes)
    # 256 fits alone, and not twice with TRL; 512 and 1,024 do not fit; 64 fails; the others go on.
    assert tried == ["tokens 32 trl", "tokens 64", "tokens 128", "tokens 256"]
    assert len(results.by_key) == 3
    assert set(found.left_out) == {"tokens 64", "tokens 256 TRL", "tokens 512", "tokens 1,024"}
    assert "no more memory" in found.left_out["tokens 64"]
    assert "GB are expected" in found.left_out["tokens 512"]
    # A second call tries what is not there yet, and nothing twice.
    again, _, tried = curve(tmp_path, monkeypatch, memory=int(4e9))
    again.measure(axes)
    assert tried == ["tokens 64"]


def test_what_takes_longer_than_is_left_waits_for_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, results, tried = curve(tmp_path, monkeypatch, memory=1 << 60)
    found.measure(points(Settings(), ["tokens"]))
    assert tried[-1] == "tokens 512"
    assert "600 are left" in found.left_out["tokens 1,024"] or "599 are left" in found.left_out["tokens 1,024"]
    before = len(results.by_key)
    monkeypatch.setattr(scaling, "machine_for", None)
    found.measure(points(Settings(), ["tokens"]), plan_again=True)
    assert len(results.by_key) == before
    assert all(record["planned"]["with"] == "a guess" for record in results.by_key.values())


def test_long_updates_are_measured_once() -> None:
    assert [vars(Rounds.of(seconds)) for seconds in (5, 30, 600)] == [
        {"warm_up": 1, "repeats": 2},
        {"warm_up": 1, "repeats": 1},
        {"warm_up": 0, "repeats": 1},
    ]


def test_phases_and_the_rest_make_up_an_update_without_the_start_of_its_engine() -> None:
    phases = {"rollout_seconds": 2.0, "teacher_seconds": 1.0, "update_seconds": 4.0, "sync_seconds": None}
    report = {"seconds": 20.0, "engine_start_seconds": 12.0, "phases": phases}
    found = summarised([report], {"peak_bytes": 7, "tokens": {"useful": 1, "computed": 2}})
    assert found["seconds"] == 8.0
    assert found["phases"] == {"rollout": 2.0, "teacher": 1.0, "update": 4.0, "sync": 0.0, "rest": 1.0}
    assert summarised([report | {"phases": dict.fromkeys(phases)}], {"peak_bytes": 7})["phases"] == {}


# Reports


def records(
    axis: str, seconds: Callable[[float], float], memory: Callable[[float], float] = lambda x: 1e9
) -> list[tuple[Point, dict[str, Any]]]:
    """Measured points of an axis, whose update takes so many seconds and so much memory at x."""
    return [
        (
            one,
            {
                "ours": {"seconds": seconds(one.x), "peak_bytes": memory(one.x), "phases": {"update": seconds(one.x)}},
                "planned": {"seconds": 1.2 * one.x, "peak_bytes": 1e9},
                "flops": {} if one.settings is None else {"student": one.x, "sampling": 0.0, "teacher": 0, "head": 0},
                **({"trl": {"seconds": 3 * one.x}} if one.trl else {}),
            },
        )
        for one in points(Settings(), [axis])[axis]
    ]


def test_a_report_names_what_grows_too_fast() -> None:
    straight = summarise({"tokens": records("tokens", lambda x: x)})
    assert straight["faults"] == []
    assert straight["exponents"]["tokens"]["seconds"]["fit"]["exponent"] == pytest.approx(1)
    assert straight["plan"]["seconds"] == {"points": 6, "within": 6, "lowest": 1.2, "median": 1.2, "highest": 1.2}
    assert straight["plan"]["memory"]["within"] == 6
    square = summarise({"tokens": records("tokens", lambda x: x**1.5, lambda x: 1e6 * x**1.5)})
    assert square["faults"] == ["tokens: seconds", "tokens: update", "tokens: memory"]
    assert square["plan"]["seconds"]["within"] == 0
    flat = summarise({"models": records("models", lambda x: x), "rows": records("rows", lambda x: x)})
    assert flat["faults"] == []
    grown = summarise({name: records(name, lambda x: x, lambda x: 1e9 * x) for name in ("models", "rows")})
    assert grown["faults"] == ["models: memory", "rows: memory"]


def test_sizes_of_models_lie_where_their_parameters_say() -> None:
    measured = records("student", lambda x: x)
    for number, (_, record) in enumerate(measured, 1):
        record["parameters"] = {"student": 100 * number, "teacher": 7}
    assert [point["x"] for point in summarise({"student": measured})["axes"]["student"]] == [100, 200, 300, 400, 500]


def test_the_table_has_a_row_for_each_point() -> None:
    measured = records("tokens", lambda x: x)
    measured[0][1]["ours"]["tokens"] = {"useful": 3, "computed": 4}
    text = table({"tokens": measured[::-1], "rows": []})
    lines = text.splitlines()
    assert lines[0] == "### tokens: tokens of a response"
    head = lines[2].split(" | ")
    first = dict(zip(head, lines[4].split(" | "), strict=True))
    assert first["| point"] == "| 32"
    assert (first["seconds"], first["update"], first["TRL, seconds"]) == ("32.0", "32.0", "96.0")
    assert "75%" in lines[4]
    assert len(lines) == 4 + 6 + 2
    assert "seconds 1.00 [1.00, 1.00] (1.00; 1.00)" in lines[-1]
    assert "too fast" not in text
    assert "**too fast**" in table({"tokens": records("tokens", lambda x: x**2)})


def test_figures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    axes = {"tokens": records("tokens", lambda x: x), "rows": records("rows", lambda x: x), "samples": []}
    files = draw(axes, tmp_path / "figures")
    assert [file.name for file in files] == ["tokens.svg", "rows.svg"]
    before = files[0].read_bytes()
    assert b"<svg" in before
    draw(axes, tmp_path / "figures")
    assert files[0].read_bytes() == before


# Data and models


def test_the_way_from_rows_to_batches_is_measured(tmp_path: Path) -> None:
    source = work(tmp_path)
    file = tmp_path / "many.jsonl"
    scaling_rows.write_rows(file, source.prompts, 40)
    texts = [json.loads(line)["instruction"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(set(texts)) == 40
    found = scaling_rows.measure_rows(source.student, str(file), 8)
    assert found["rows"] == 40
    assert list(found["phases"]) == ["read", "tokenise", "hand over", "first batch"]
    assert found["seconds"] == pytest.approx(sum(found["phases"].values()))
    assert found["peak_bytes"] > 0


def test_a_vocabulary_is_cut_or_extended(tmp_path: Path) -> None:
    folder = Path(save(tiny_llama(1), tmp_path / "m"))
    letters = {text: number for number, text in enumerate(["<s>", *"abcd", "ab", "abc", "cd"])}
    model = {"type": "BPE", "vocab": letters, "merges": [["a", "b"], ["ab", "c"], ["c", "d"]]}
    file = folder / "tokenizer.json"
    content = {"version": "1.0", "added_tokens": [], "model": model}
    for name in ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"):
        content[name] = None
    for size, tokens in ((8, ["abc", "d"]), (6, ["ab", "c", "d"]), (20, ["abc", "d"])):
        file.write_text(json.dumps(content), encoding="utf-8")
        set_vocabulary(file, size)
        tokenizer = Tokenizer.from_file(str(file))
        assert tokenizer.get_vocab_size() == size
        assert tokenizer.encode("abcd").tokens == tokens
