"""Strengths of the two parts of a penalty."""

from __future__ import annotations

import pytest

from streamgd.errors import OptionError
from streamgd.learn.penalties import PENALTIES, strengths


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [(None, (0, 0)), ("l2", (0, 0.5)), ("l1", (0.5, 0)), ("elasticnet", (0.1, 0.4))],
)
def test_strengths(penalty, expected):
    assert strengths(penalty, 0.5, 0.2) == pytest.approx(expected)


def test_elasticnet_goes_from_l2_to_l1():
    assert strengths("elasticnet", 0.5, 0.0) == strengths("l2", 0.5, 0.3)
    assert strengths("elasticnet", 0.5, 1.0) == strengths("l1", 0.5, 0.3)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_zero_alpha_is_no_penalty(penalty):
    assert strengths(penalty, 0, 0.5) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ridge", 1.0, 0.5), ["penalty='ridge'", "'elasticnet'"]),
        (("l2", -1.0, 0.5), ["alpha=-1.0", "at least 0"]),
        (("l2", float("nan"), 0.5), ["alpha=nan", "at least 0"]),
        (("l2", "1", 0.5), ["alpha='1'", "at least 0"]),
        (("l2", 1.0, 1.5), ["l1_ratio=1.5", "from 0 to 1"]),
        (("elasticnet", 1.0, None), ["l1_ratio=None", "from 0 to 1"]),
    ],
)
def test_what_cannot_be_used_is_named(arguments, words):
    with pytest.raises(OptionError) as refused:
        strengths(*arguments)
    for word in words:
        assert word in str(refused.value)
