"""Everything that scikit-learn asks of an estimator, with no exception expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.utils.estimator_checks import parametrize_with_checks

from streamgd import SGDClassifier, SGDRegressor


@parametrize_with_checks([SGDRegressor(), SGDClassifier()])
def test_scikit_learn_check(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)
