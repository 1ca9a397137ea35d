"""Each benchmark's sum worked out by hand, and the interval of that sum."""

import numpy as np
import pytest

from trainers.bench.aggregates import COMPLETE, OMNIREF_DIMENSIONS, Scored, aggregate, case_score, columns
from trainers.bench.cases import Case, Plan
from trainers.bench.report import summarise
from trainers.judges.statistics import Bootstrap
from trainers.judges.vlm.values import combine


def test_gedit_weighs_groups_alike_and_the_others_cases():
    scored = [Scored("a", 1, 2.0), Scored("a", 1, 4.0), Scored("b", 1, 9.0), Scored("b", 1, None)]
    macro = aggregate("gedit", scored)
    assert (macro.value, macro.groups) == (6.0, {"a": 3.0, "b": 9.0})
    assert (macro.judged, macro.total) == (3, 4)
    assert aggregate("own", scored).value == 5.0


def test_gedit_has_three_numbers_per_language_and_over_the_intersection():
    def row(task, semantics, quality, language="en", common=True):
        extra = {"language": language, "intersection": common}
        return Scored(task, 1, (semantics * quality) ** 0.5, {"semantics": semantics, "quality": quality}, extra)

    rows = [row("a", 4, 9), row("a", 1, 1, common=False), row("b", 9, 4), row("b", 0, 8, "cn")]
    parts = aggregate("gedit", rows).parts
    assert parts["en"] == {"G_SC": (2.5 + 9) / 2, "G_PQ": (5 + 4) / 2, "G_O": (3.5 + 6) / 2}
    assert parts["en, intersection"] == {"G_SC": 6.5, "G_PQ": 6.5, "G_O": 6.0}
    assert parts["cn"] == {"G_SC": 0.0, "G_PQ": 8.0, "G_O": 0.0}


def test_imgedit_weighs_its_types_alike():
    scored = [Scored("add", 1, 5.0), Scored("add", 1, 4.0), Scored("style", 1, 1.5)]
    assert aggregate("imgedit", scored).value == 3.0
    assert case_score("imgedit", 6.0, {}, None) == 3.0  # the judge's 0..10 is twice the marks' 1..5


def test_a_capped_mean_counts_no_mark_for_more_than_the_first():
    assert combine([2, 5, 1], "capped_mean") == pytest.approx(5 / 3)
    assert combine([5, 4, 3], "capped_mean") == 4


def test_multicom_is_the_mean_of_its_halves_as_in_the_paper():
    scored = [Scored("x", 3, 0.8214), Scored("x", 4, 0.6296)]
    assert aggregate("multicom", scored).value == pytest.approx(0.7255)
    assert aggregate("multicom", scored[:1]).value is None  # one half is no overall


def test_omniref_is_the_mean_of_its_dimensions_over_the_cases_that_have_them():
    def row(**values):
        return Scored("subject", 2, sum(values.values()) / len(values), values)

    rows = [
        row(text_adherence=8, subject_consistency=6, aesthetic_quality=4, style_consistency=2),
        row(text_adherence=4, subject_consistency=2, aesthetic_quality=8, lighting_consistency=9),
        row(text_adherence=6, subject_consistency=1, aesthetic_quality=6),
    ]
    assert aggregate("omniref", rows).value is None  # no case has a background
    found = aggregate("omniref", [*rows, row(text_adherence=10, subject_consistency=3, background_consistency=5)])
    means = {"text_adherence": 7, "subject_consistency": 3, "aesthetic_quality": 6, "style_consistency": 2}
    assert found.parts["dimensions"] == means | {"lighting_consistency": 9, "background_consistency": 5}
    assert found.value == pytest.approx((7 + 3 + 6 + 2 + 9 + 5) / 6)
    assert found.groups["subject"] == pytest.approx((5 + 5.75 + 13 / 3 + 6) / 4)  # each the mean of its marks


def test_mico_multiplies_the_weight_with_both_scores():
    values = {"sc": 6.0, "pq": 8.0}
    assert case_score("mico", 6.9, values, 0.5) == 24.0
    assert case_score("mico", None, {"sc": None, "pq": 8.0}, 1.0) is None
    with pytest.raises(ValueError, match="--weights DIR"):
        case_score("mico", 6.9, values, None)
    assert case_score("multicom", 7.0, {}, None) == 0.7


@pytest.mark.parametrize("bench", ["own", "gedit", "imgedit", "multicom", "omniref"])
def test_the_interval_is_of_the_aggregate_of_each_resample(bench):
    rng = np.random.default_rng(0)
    scored = [
        Scored("often" if i % 5 else "rare", 2 + i % 4, score, {name: score + k for k, name in enumerate(dimensions)})
        for i in range(40)
        for score, dimensions in [(float(rng.uniform(0, 10)), OMNIREF_DIMENSIONS[i % 2 :])]
    ]
    scored[7] = Scored("often", 3, None)
    bootstrap = Bootstrap(len(scored), seed=0, draws=60)
    resamples = [[one for one, k in zip(scored, row, strict=True) for _ in range(int(k))] for row in bootstrap.counts]
    expected = [aggregate(bench, one).value for one in resamples]
    table = np.array(list(columns(bench, scored).values()), float).T
    found = bootstrap.mean_of_columns(table, bench in COMPLETE)
    assert found.value == pytest.approx(aggregate(bench, scored).value)
    assert (found.low, found.high) == pytest.approx(np.percentile(expected, [2.5, 97.5]))


def test_the_difference_is_of_the_aggregates_and_not_of_the_plain_means():
    """B is worse on the many cases of one group and better on the few of the other."""
    rows, cases = {}, []
    for i in range(40):
        many = i < 30
        cases.append(Case(str(i), "many" if many else "few", "x", ("a",), None, f"{i}.png", {}))
        for label, score in (("A", 5.0 + i % 3), ("B", 5.0 + i % 3 + (-0.3 if many else 0.7))):
            rows[label, str(i), "judge"] = {"score": score}
    first, second = summarise(Plan("gedit", 0, tuple(cases), (), {"A": {}, "B": {}}), rows, "judge").values()
    assert second["value"] - first["value"] == pytest.approx(0.2)
    assert [second["minus_first"], *second["minus_first_ci95"]] == pytest.approx([0.2] * 3)
    assert second["mean_over_cases"] < first["mean_over_cases"]
    low, high = first["ci95"]
    assert low < first["value"] < high


def test_half_a_benchmark_has_no_interval():
    half = np.array([[1.0, np.nan], [2.0, np.nan], [4.0, np.nan]])
    bootstrap = Bootstrap(3, seed=0)
    assert bootstrap.mean_of_columns(half, complete=True) is None
    assert bootstrap.mean_of_columns(half[:, :1]).value == pytest.approx(7 / 3)
    assert bootstrap.mean_of_columns(half).value == pytest.approx(7 / 3)
    assert bootstrap.mean_of_columns(np.where(half > 2, half, np.nan)) is None  # one case alone
