"""scikit-learn's conventions over ``streamgd.run``.

``base`` holds what both estimators share, ``inputs`` what they accept as data, ``runs`` their run folders.
"""

from streamgd.estimators.classifier import SGDClassifier
from streamgd.estimators.regressor import SGDRegressor
from streamgd.estimators.runs import load

__all__ = ["SGDClassifier", "SGDRegressor", "load"]
