"""Each benchmark's sum worked out by hand."""

import pytest

from trainers.bench.aggregates import Scored, aggregate, case_score


def test_gedit_weighs_groups_alike_and_the_others_cases():
    scored = [Scored("a", 1, 2.0), Scored("a", 1, 4.0), Scored("b", 1, 9.0), Scored("b", 1, None)]
    macro = aggregate("gedit", scored)
    assert (macro.value, macro.groups) == (6.0, {"a": 3.0, "b": 9.0})
    assert (macro.judged, macro.total) == (3, 4)
    assert aggregate("own", scored).value == 5.0


def test_multicom_is_the_mean_of_its_halves_as_in_the_paper():
    scored = [Scored("x", 3, 0.8214), Scored("x", 4, 0.6296)]
    assert aggregate("multicom", scored).value == pytest.approx(0.7255)
    assert aggregate("multicom", scored[:1]).value is None  # one half is no overall


def test_mico_multiplies_the_weight_with_both_scores():
    values = {"sc": 6.0, "pq": 8.0}
    assert case_score("mico", 6.9, values, 0.5) == 24.0
    assert case_score("mico", None, {"sc": None, "pq": 8.0}, 1.0) is None
    with pytest.raises(ValueError, match="--weights DIR"):
        case_score("mico", 6.9, values, None)
    assert case_score("multicom", 7.0, {}, None) == 0.7
