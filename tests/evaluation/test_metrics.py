"""Metrics against examples worked out by hand, slow definitions and the rouge-score package."""

from __future__ import annotations

import math
import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from minillm.evaluation import metrics, scores, statistics, text_metrics


def test_latin_text_is_scored_exactly_as_by_the_package() -> None:
    rng = random.Random(0)
    words = [
        "the",
        "a",
        "The",
        "cat",
        "cats",
        "Cat's",
        "cats.",
        "dog,",
        "dogs",
        "running",
        "runs",
        "RAN",
        "on",
        "in",
        "house",
        "houses",
    ]
    words += [
        "houses!",
        "(tree)",
        "trees;",
        "it's",
        "it’s",
        "x_y",
        "3",
        "3.5",
        "50 m²",
        "½",
        "—",
        "…",
        "e-mail",
        "“quoted”",
    ]
    words += ["❤\ufe0f", "1\ufe0f\u20e3", "👍🏽", "€5", "20°"]
    scorer, above = RougeScorer(["rougeL"], use_stemmer=True), 0
    for _ in range(1000):
        prediction, *references = (
            rng.choice(" \n").join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(rng.randint(2, 5))
        )
        got = text_metrics.rouge_l(prediction, references)
        assert got == 100 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references)
        above += got > 0
    assert above > 700
    assert (
        text_metrics.rouge_l("", ["", "cat"])
        == text_metrics.rouge_l("cat", [""])
        == text_metrics.rouge_l("?!", ["?!"])
        == 0
    )


def test_what_counts_as_latin() -> None:
    for text in ("", "42 + ?", "The cat", "“it’s” – 20° … ½ m² ™ 😀 ❤\ufe0f 1\ufe0f\u20e3 👍🏽"):
        assert text_metrics.is_latin(text), text
    for text in (
        "naïve café",
        "cafe\u0301",
        "Straße",
        "smørrebrød",
        "İstanbul",
        "ｃａｔ",
        "ﬁnd",
        "ab 猫猫",
        "猫在窗上",
        "кошка",
    ):
        assert not text_metrics.is_latin(text), text
    for text in ("القط", "แมว", "ねこ", "고양이", "é", "٤٢", "４２"):
        assert not text_metrics.is_latin(text), text


@pytest.mark.parametrize(
    ("text", "mangled"),
    [
        ("naïve", "na ve"),
        ("café", "caf"),
        ("cafe\u0301s", "cafe s"),
        ("Straße", "stra e"),
        ("ｃａｔ", ""),
        ("４２", ""),
    ],
)
def test_a_word_with_accents_is_one_token(text: str, mangled: str) -> None:
    """The package itself scores both texts as equal."""
    package = RougeScorer(["rougeL"], use_stemmer=True)
    assert package.score(f"the {text}", f"the {mangled}")["rougeL"].fmeasure == 1
    assert text_metrics.rouge_l(f"the {mangled}", [f"the {text}"]) < 70
    assert text_metrics.rouge_l(f"the {text}", [f"THE {unicodedata.normalize('NFD', text)}"]) == 100


@pytest.mark.parametrize(
    ("reference", "near", "common", "tokens", "other"),
    [
        ("猫在窗上", "猫在门外", 2, (4, 4), "狗跑"),
        ("𠀀𠀁々", "𠀀𠀂々", 2, (3, 3), "狗"),  # beyond the basic plane
        ("кошка сидит на окне", "кошка сидит у двери", 2, (4, 4), "собака лает"),
        ("القط ينام على السرير", "القط ينام تحت الطاولة", 2, (4, 4), "كلب يركض"),
        ("แมวนอน", "แมวกิน", 4, (6, 6), "สีดำ"),  # one token per character, the vowel ิ included
        ("猫がミルクを飲む", "猫がパンを食べた", 3, (8, 8), "いぬ"),
        ("고양이가 잔다", "고양이가 크게 뛴다", 1, (2, 3), "개는 짖는다"),
        ("बिल्ली सोती है", "बिल्ली भागती है", 2, (3, 3), "कुत्ता"),  # vowel signs are part of words
    ],
)
def test_scripts_that_the_package_ignores(
    reference: str, near: str, common: int, tokens: tuple[int, int], other: str
) -> None:
    assert RougeScorer(["rougeL"], use_stemmer=True).score(reference, reference)["rougeL"].fmeasure == 0
    assert text_metrics.rouge_l(reference, [reference]) == text_metrics.rouge_l(reference, [other, reference]) == 100
    assert text_metrics.rouge_l(other, [reference]) == 0
    # F1 = 2PR / (P + R) = 2 · common / (tokens of both)
    assert text_metrics.rouge_l(near, [reference]) == pytest.approx(100 * 2 * common / sum(tokens))


def test_a_text_of_several_scripts() -> None:
    text = "Кошка, пьёт CAFÉ_2: 第３章"
    assert text_metrics.UnicodeTokenizer().tokenize(text) == ["кошка", "пьёт", "café", "2", "第", "3", "章"]
    assert text_metrics.rouge_l(unicodedata.normalize("NFD", text).upper(), [text]) == 100
    assert (
        text_metrics.rouge_l("\u2764\ufe0f 猫\ufe0f", ["猫"]) == 100
    )  # neither an emoji nor a variation selector is a token
    # Of four and three tokens two are common: caf and é are not café.
    assert text_metrics.rouge_l("кошка пьёт caf é", ["кошка пьёт café"]) == pytest.approx(100 * 2 * 2 / (4 + 3))
    assert text_metrics.rouge_l("кошки любят cats", ["кошки любят cat"]) == 100  # English words are stemmed here too


def test_one_text_of_another_script_changes_the_tokenizer() -> None:
    assert text_metrics.rouge_l("кошка", ["cat", "кошка"]) == 100
    assert text_metrics.rouge_l("cat", ["кошка", "cats"]) == 100
    assert text_metrics.rouge_l("cat", ["кошка"]) == text_metrics.rouge_l("кошка", ["cat"]) == 0
    assert text_metrics.rouge_l("cat кошка собака", ["cat"]) == pytest.approx(
        100 * 2 * 1 / (3 + 1)
    )  # the package returns 100
    # The package sees only `yes` on both sides, and returns 100.
    assert text_metrics.rouge_l("yes кошка", ["yes собака"]) == pytest.approx(50)


def test_exact_match() -> None:
    assert text_metrics.exact_match(" The\n Cat! ", ["the cat"]) == 100
    assert text_metrics.exact_match("ice-cream", ["soup", "icecream"]) == 100
    assert text_metrics.exact_match("cat", ["the cat", "a cat"]) == 0  # articles are kept
    assert text_metrics.exact_match("the cat", ["cat the"]) == 0


# Several pairs of texts to a line, which ruff would not do.
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The answer.", "the answer"), ("don't", "dont"), ("don’t", "don't"), ('"Paris"', "Paris"),
        ("“Paris”", "paris"), ("«Paris»", "Paris"), ("(B)", "b"), ("B)", "B"), ("[A]", "A"),
        ("**Paris**", "Paris"), ("`-5`", "-5"), ("“-5”", "-5"), ('"+"', "+"), ("'<'", "<"), ("U.S.", "US"),
        ("e.g.", "eg"), ("Hello , world .", "Hello, world"), ("wait ...", "wait…"), ("C++.", "C++"),
        ("yes\u00a0no", "yes no"), ("1,000", "1000"), ("1,234,567.5", "1234567.5"), ("−5", "-5"),
        ("5–7", "5-7"), ("５", "5"), ("50 %", "50%"), ("3.5.", "3.5"), ("5,", "5"), ("猫。", "猫"), ("ｶﾞ", "ガ"),
        ("cafe\u0301", "café"), ("हाँ।", "हाँ"), ("**Answer:** Paris", "answer paris"), ("so\u00adda", "soda"),
    ],
)  # fmt: skip
def test_equal_meaning_matches(one: str, other: str) -> None:
    assert text_metrics.exact_match(one, [other]) == text_metrics.exact_match(other, [one]) == 100


# Several pairs of texts to a line, which ruff would not do.
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-", "+"), ("<", ">"), ("<=", "<"), ("!=", "="), ("->", "<-"), ("!", "?"), (":)", ":("),
        ("good :)", "good :("), ("", "?!"), ("", "+"), ("***", "*"), ("-.", "-"), ("@", "#"), ("3.5", "35"),
        ("3,5", "35"), ("-5", "5"), ("−5", "5"), ("+5", "-5"), (".5", "5"), ("50%", "50"), ("$5", "5"),
        ("€5", "5"), ("1.000", "1000"), ("1,00", "100"), ("0,123", "0123"), ("1,2,3", "123"),
        ("10:30", "1030"), ("1/2", "12"), ("2-3", "23"), ("2*3", "23"), ("1e-5", "1e5"), ("10²", "102"),
        ("½", "1/2"), ("5!", "5"), ("5'", '5"'), ("[1, 2]", "(1, 2)"), ("5 : 3", "5 3"), ("C", "C++"),
        ("C", "C#"), ("C++", "C#"), ("A+", "A-"), ("A*", "A"), (".NET", "NET"), ("a_b", "ab"), ("x-y", "xy"),
        ("-x", "x"), ("f(x)", "fx"), ("f()", "f"), ("R&D", "RD"), ("a=b", "ab"), ("*args", "args"),
        ("n=3", "n3"),
    ],
)  # fmt: skip
def test_different_meaning_does_not_match(one: str, other: str) -> None:
    assert text_metrics.exact_match(one, [other]) == text_metrics.exact_match(other, [one]) == 0
    assert text_metrics.exact_match(one, [other, one]) == 100


def test_long_answers_of_marks_only_are_matched_fast() -> None:
    for text in ("*" * 20_000, "a 'b" * 5_000, '" "' * 5_000, "1," * 10_000):
        assert text_metrics.exact_match(text, [f"{text} not"]) == 0


def test_distinct_n() -> None:
    assert metrics.distinct_n([[1, 2, 3, 1, 2, 3]], 2) == pytest.approx(100 * 3 / 5)  # the bigrams are 12 23 31 12 23
    assert metrics.distinct_n([[1, 2, 3, 4, 5], [1, 2, 3, 4], [5]]) == pytest.approx(
        100 * 2 / 3
    )  # 1234 2345 1234; none spans two sequences
    assert metrics.distinct_n([[1, 2], [2, 1]], 1) == 50
    assert math.isnan(metrics.distinct_n([[1, 2, 3], []]))
    assert math.isnan(metrics.distinct_n([]))


OWN, ORACLE = [[1.0, 2.0, 3.0], [4.0]], [[1.0, 1.0], [1.0, 0.0, 2.0]]


def test_excess_error() -> None:
    # The means over both samples are 2.5, 1, 1.5, 0 for own and 1, 0.5, 1, 0 for oracle. Their sums are
    # R = 2.5, 3.5, 5, 5 and lε = 1, 1.5, 2.5, 2.5.
    assert metrics.excess_error(OWN, ORACLE, 4).tolist() == pytest.approx([150, 100 * 2 / 1.5, 100, 100])
    assert metrics.excess_error(OWN, ORACLE, 1).tolist() == pytest.approx([150])
    assert metrics.excess_error(ORACLE, ORACLE, 4).tolist() == [0, 0, 0, 0]
    # The means are 1 and 3, of different numbers of samples; an empty response counts as a sample.
    assert metrics.excess_error([[2.0], []], [[3.0], [3.0], [3.0]], 1).tolist() == pytest.approx([100 * (1 - 3) / 3])
    with np.errstate(all="raise"):
        undefined = metrics.excess_error([[0.0, 1.0]], [[0.0, 0.0]], 2)
    assert math.isnan(undefined[0])
    assert undefined[1] == math.inf


def errors(rng: np.random.Generator, n: int, mean: float) -> list[list[float]]:
    return [rng.gamma(4, mean / 4, size=rng.integers(3, 9)).tolist() for _ in range(n)]


def test_the_interval_of_the_excess_error() -> None:
    rng = np.random.default_rng(0)
    double, oracle = errors(rng, 100, 2.0), errors(rng, 150, 1.0)
    interval, curve = (f(double, oracle, 5) for f in (metrics.excess_error_interval, metrics.excess_error))
    assert interval.shape == (5, 2)
    assert ((interval[:, 0] > 50) & (interval[:, 0] < curve) & (curve < interval[:, 1]) & (interval[:, 1] < 150)).all()
    assert (interval == metrics.excess_error_interval(double, oracle, 5)).all()
    assert (interval != metrics.excess_error_interval(double, oracle, 5, seed=1)).any()
    # Both arguments are the same samples. If both were resampled in the same way, every interval would have width 0.
    assert (np.diff(metrics.excess_error_interval(oracle, oracle, 5)) > 1).all()
    # Equal samples give an interval of width 0.
    assert metrics.excess_error_interval([[2.0]] * 3, [[1.0]] * 4, 2, times=20) == pytest.approx(np.full((2, 2), 100))


def test_the_interval_of_the_excess_error_has_its_nominal_coverage() -> None:
    rng, hits = np.random.default_rng(1), np.zeros(4)
    for _ in range(200):
        low, high = metrics.excess_error_interval(errors(rng, 60, 2.0), errors(rng, 60, 1.0), 4, times=300).T
        hits += (low <= 100) & (high >= 100)  # both have the same distribution of lengths, so R(l) is twice lε(l)
    assert ((hits >= 178) & (hits <= 198)).all()


def test_the_interval_of_the_excess_error_has_its_theoretical_width() -> None:
    """For one position, the log of a ratio of means has the standard deviation √(s²/n + t²/m).

    s and t are the relative standard deviations of the n and m samples.
    """
    rng = np.random.default_rng(1)
    own, oracle = (rng.gamma(16, 1 / 16, size=n) for n in (400, 200))
    relative = [values.std() / values.mean() / math.sqrt(len(values)) for values in (own, oracle)]
    width = 2 * 1.96 * math.hypot(*relative) * 100 * own.mean() / oracle.mean()
    low, high = metrics.excess_error_interval(own[:, None].tolist(), oracle[:, None].tolist(), 1, times=4000)[0]
    assert high - low == pytest.approx(width, rel=0.06)


def test_calibration_error() -> None:
    # Bin (0, 0.1]: 0 is wrong and 0.1 right, which gives |1 − 0.1|. Bin (0.2, 0.3]: 0.25 is wrong and 0.3 right, which
    # gives |1 − 0.55|. Bin (0.3, 0.4]: 0.35 is wrong. Bin (0.9, 1]: 1 is right.
    confidences, correct = [0.0, 0.1, 0.25, 0.3, 0.35, 1.0], [False, True, False, True, False, True]
    assert metrics.calibration_error(confidences, correct) == pytest.approx((0.9 + 0.45 + 0.35 + 0) / 6)
    assert metrics.calibration_error(confidences, correct, bins=1) == pytest.approx(abs(3 - 2.0) / 6)
    assert metrics.calibration_error([1.0, 0.0], [True, False]) == 0
    assert metrics.calibration_error([1.0, 0.0], [False, True]) == 1


def test_calibration_error_follows_its_definition_at_the_edges_of_bins() -> None:
    rng = random.Random(0)
    for bins in (1, 3, 7, 10, 15, 20):
        edges = [k / bins for k in range(bins + 1)]
        confidences = edges + [rng.random() for _ in range(40)]
        correct = [rng.random() < 0.5 for _ in confidences]
        total = 0.0
        for low, high in pairwise(edges):
            inside = [i for i, c in enumerate(confidences) if low < c <= high or c == low == 0]
            if inside:
                accuracy, mean = (sum(values[i] for i in inside) / len(inside) for values in (correct, confidences))
                total += len(inside) / len(confidences) * abs(accuracy - mean)
        assert metrics.calibration_error(np.array(confidences), correct, bins) == pytest.approx(total)


def test_an_edge_belongs_to_the_bin_below() -> None:
    for bins in range(2, 30):
        for k in range(1, bins + 1):
            edge, inside = k / bins, (k - 0.5) / bins  # in one bin, a right and a wrong answer offset each other
            assert metrics.calibration_error([edge, inside], [True, False], bins) == pytest.approx(
                abs(1 - edge - inside) / 2
            )


def test_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 10, 100)  # prompts differ far more than the two models
    better = statistics.paired_bootstrap(a, a + 1 + rng.normal(0, 1, 100), 1000)
    assert 0.5 < better["low"] < better["mean"] < better["high"] < 1.5
    assert better["p_worse"] == 0
    noise = rng.normal(0, 1, 100)
    level = statistics.paired_bootstrap(a, a + noise - noise.mean(), 1000)
    assert level["low"] < 0 < level["high"]
    assert 0.4 < level["p_worse"] < 0.6
    assert statistics.paired_bootstrap(a + 2, a, 100)["p_worse"] == 1
    assert statistics.paired_bootstrap(a, a, 100) == {
        "mean": 0,
        "low": 0,
        "high": 0,
        "p_worse": 1,
    }  # a difference of 0 counts as worse
    # Two prompts with differences 0 and 1: a resample has the mean 0, ½, ½ or 1, each with probability ¼.
    two = statistics.paired_bootstrap(np.array([3.0, 5.0]), np.array([3.0, 6.0]), 10_000)
    assert two["p_worse"] == pytest.approx(0.25, abs=0.02)
    assert (two["mean"], two["low"], two["high"]) == (0.5, 0, 1)


def test_paired_bootstrap_agrees_with_the_plain_interval_and_depends_on_its_seed() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0, 1, 30), rng.normal(0, 1, 30)
    found = statistics.paired_bootstrap(a, b, 200)
    assert found.items() >= statistics.interval(statistics.mean_of(b - a), 30, 200).items()
    assert found["low"] != statistics.paired_bootstrap(a, b, 200, seed=1)["low"]


def test_errors_name_what_cannot_be_scored() -> None:
    one = np.ones(1)
    for call, message in [
        (lambda: text_metrics.rouge_l("cat", []), "references is empty"),
        (lambda: text_metrics.exact_match("cat", []), "references is empty"),
        (lambda: metrics.distinct_n([[1]], 0), "n must be at least 1"),
        (lambda: metrics.excess_error([], ORACLE, 1), "own is empty"),
        (lambda: metrics.excess_error(OWN, [], 1), "oracle is empty"),
        (lambda: metrics.excess_error(OWN, ORACLE, 0), "length must be at least 1"),
        (lambda: metrics.excess_error_interval(OWN, [], 1), "oracle is empty"),
        (lambda: metrics.excess_error_interval(OWN, ORACLE, 0), "length must be at least 1"),
        (lambda: metrics.excess_error_interval(OWN, ORACLE, 1, times=0), "at least one unit and one resample"),
        (lambda: metrics.calibration_error([], []), "confidences is empty"),
        (lambda: metrics.calibration_error([0.5, 0.5], [True]), "2 confidences but 1 answers"),
        (lambda: metrics.calibration_error([1.5], [True]), "between 0 and 1"),
        (lambda: metrics.calibration_error([math.nan], [True]), "between 0 and 1"),
        (lambda: metrics.calibration_error([0.5], [True], bins=0), "bins must be at least 1"),
        (lambda: statistics.paired_bootstrap(one, np.ones(2), 10), "same prompts"),
        (lambda: statistics.paired_bootstrap(np.ones((2, 2)), np.ones((2, 2)), 10), "same prompts"),
        (lambda: statistics.paired_bootstrap(one[:0], one[:0], 10), "a is empty"),
        (lambda: statistics.paired_bootstrap(one, one, 0), "at least one unit and one resample"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_kl_of_an_answer_and_the_mean_over_answers() -> None:
    """An answer whose KL is not finite, or was not computed, has no value; nor has a seed without any."""
    rows = [
        {"row": 0, "seed": 1, "ids": [1, 2, 3, 4], "reverse_kl": 2.0},
        {"row": 1, "seed": 1, "ids": [1], "reverse_kl": 1.5},
        {"row": 2, "seed": 1, "ids": [1], "reverse_kl": None},
    ]
    groups = [rows, [{"row": 0, "seed": 2, "ids": [1]}]]
    assert scores.per_seed(groups, metrics.METRIC["reverse_kl_mean"]) == [1.0]  # (0.5 + 1.5) / 2
    assert scores.per_seed(groups, metrics.METRIC["reverse_kl_answer"]) == [1.75]


def test_the_students_kl_and_length_on_the_teachers_answers() -> None:
    rows = [{"own": [0.1] * 3, "oracle": [1.0, 2.0]}, {"own": [0.1], "oracle": [3.0, 4.0, 0.0]}]
    value = metrics.METRIC["teacher_forward_kl"].value, metrics.METRIC["length_ratio"].value
    assert value[0] is not None
    assert value[1] is not None
    assert (value[0](rows), value[1](rows)) == (2.0, 0.8)
