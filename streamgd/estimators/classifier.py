"""`SGDClassifier`: linear classification with the conventions of scikit-learn."""

from __future__ import annotations

import os
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.metaestimators import available_if

from streamgd.errors import OptionError
from streamgd.estimators.base import SGDEstimator
from streamgd.estimators.inputs import is_streamed
from streamgd.learn.model import PROBABILISTIC


def _has_probabilities(estimator: Any) -> bool:
    if estimator.loss in PROBABILISTIC:
        return True
    raise AttributeError(
        f"probabilities are not available for loss={estimator.loss!r}: use one of "
        f"{', '.join(map(repr, PROBABILISTIC))}, or decision_function"
    )


class SGDClassifier(ClassifierMixin, SGDEstimator):  # type: ignore[misc]
    """Linear classification by mini-batch gradient descent, on data of any size.

    Minimises mean loss + alpha * penalty. Takes arrays, DataFrames and Dask collections, or a source that reads files
    where they lie. More than two classes are told apart by softmax under ``loss="log_loss"``, by one classifier against
    the rest for each under the other losses.

    Parameters
    ----------
    loss : str, default="log_loss"
        With p the decision value and s = 1 or -1 the class: ``"log_loss"`` is log(1 + exp(-s p)), logistic regression;
        ``"hinge"`` is max(0, 1 - s p), a linear support vector machine, and ``"squared_hinge"`` its square;
        ``"modified_huber"`` is the latter, made linear below s p = -1; ``"perceptron"`` is max(0, -s p).
    penalty : {None, "l2", "l1", "elasticnet"}, default=None
        What is added to the mean loss, `alpha` times: half the sum of squares of the coefficients, the sum of their
        sizes, or a mixture. It acts on the coefficients of the scaled features, see Notes; never on the intercept.
    alpha : float, default=1e-4
        Strength of the penalty. Also sets the pace of ``learning_rate="optimal"``.
    l1_ratio : float, default=0.15
        Share of the l1 part under ``penalty="elasticnet"``, from 0 to 1.
    fit_intercept : bool, default=True
        Whether there is an intercept. Without one, features are scaled but not shifted.
    max_iter : int or "auto", default="auto"
        Epochs (passes over the data) at most. By default a small set gets enough epochs to converge and a large one
        few: many updates, not many passes, are what converges. ``"auto"`` is as many epochs as make about 10,000
        updates, at most 1,000 and at least 1.
    tol : float, None or "auto", default="auto"
        Training ends when the loss of `n_iter_no_change` epochs in a row is not below the best one before by more than
        `tol`. ``"auto"`` is 1e-5 of the loss of the best constant prediction, and takes as many epochs more as 200
        updates need, of which those of little data have few; None goes on to `max_iter`.
    shuffle : bool, default=True
        Whether rows are shuffled, anew in each epoch. False keeps the order of the data.
    verbose : int, default=0
        Above 0, a line is printed after each epoch.
    random_state : int, RandomState instance or None, default=0
        Seed of the shuffle. None draws a fresh one for every fit.
    learning_rate : str, default="auto"
        How the size of the steps goes with the number t of the update: ``"constant"`` is eta0, ``"optimal"`` is
        1 / (alpha (t0 + t - 1)), ``"invscaling"`` is eta0 / t**power_t, ``"adaptive"`` is eta0 and a fifth of that
        whenever training would end by `tol`, ``"cosine"`` falls to zero over `max_iter` epochs. Setting one means
        ``optimizer="sgd"`` unless an optimizer is set too. See Notes for the pairs that go together.
    eta0 : float or "auto", default="auto"
        First learning rate: 0.5 for auto and adagrad, 0.01 for sgd, 0.001 for adam.
    power_t : float, default=0.5
        Exponent of ``learning_rate="invscaling"``.
    n_iter_no_change : int, default=5
        See `tol`.
    warm_start : bool, default=False
        Whether `fit` begins with the coefficients that are there. Scaling, classes and the unit of the steps stay those
        of the first call. Learning rates of sgd begin anew; the other optimizers go on.
    average : bool, int or "auto", default="auto"
        Whether ``coef_`` is an average over the updates. ``"auto"`` averages for the optimizers auto and dowg, later
        updates counting more. Under sgd, all updates count alike, and an int n above 1 begins with the n-th.
    class_weight : dict, "balanced" or None, default=None
        Factor on the weight of the rows of each class, by label; 1 for labels that are not named. Labels that the
        target does not have are an error, unless all that it has are named. ``"balanced"`` is
        n_rows / (n_classes * rows of the class), as of the first call; rows count by their sample weights, so that a
        weight is as good as so many rows, where scikit-learn counts rows whatever their weight. With one-versus-rest a
        row has the factor of its own class in every one of the models; scikit-learn applies it only in the model of
        that class.
    momentum : float, default=0.0
        Momentum of ``optimizer="sgd"``, from 0 to below 1.
    nesterov : bool, default=False
        Whether momentum is Nesterov's.
    optimizer : {"auto", "sgd", "adagrad", "adam", "dowg"}, default="auto"
        How gradients become steps. ``"auto"`` needs no tuning: AdaGrad in the units of the data, no step of which goes
        beyond the minimum of its batch, averaged.
    batch_size : int, default=256
        Rows behind one update.
    buffer : str or int, default="256MB"
        Memory for the data, all told; a number of bytes, or a text such as ``"2GB"`` or ``"512MiB"``. Rows are shuffled
        within windows of about half of it that are drawn from many places of the data; what fits is shuffled whole.
    standardize : {True, "full", False}, default=True
        Whether features are scaled to mean 0 and standard deviation 1 while training: by a sample of at least 65,536
        rows, by all rows (one pass more), or not. ``coef_`` is in the units of the data in any case.
    checkpoint_dir : path-like or None, default=None
        Folder where every fit keeps a run folder of its own, with checkpoints to resume from; see `fit`.
    checkpoint_every_s : float, default=60.0
        Seconds between checkpoints; there is one at the end of each epoch, too.
    cache : path-like or None, default=None
        Folder for a cache: the rows are decoded once and written there as plain numbers, which later epochs read at the
        disk's speed and in small blocks, so that they mix as if they had been shuffled whole, however the data was
        stored. See Notes of `fit`.
    n_threads : int or None, default=None
        Threads that read ahead; None is one for each processor. The result does not depend on it.
    n_lanes : int, default=1
        Parts of the data that are trained side by side and merged after each round, on a cluster (see `fit`) or in
        threads. The result depends on it, as on the seed, but not on where the lanes run. They share `buffer` and each
        batch (as far as 32 rows are left for each).

    Attributes
    ----------
    coef_ : ndarray of shape (1, n_features) or (n_classes, n_features)
        Coefficients, in the units of the data; one row for two classes.
    intercept_ : ndarray of shape (1,) or (n_classes,)
        Intercepts.
    classes_ : ndarray of shape (n_classes,)
        The classes, sorted.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features,), object
        Their names; only if the data has names that are strings.
    n_iter_ : int
        Epochs: of the last `fit`, and of every `partial_fit` since.
    t_ : int
        Updates since training began, plus 1; an update takes `batch_size` rows. A warm start under sgd counts anew.
    loss_curve_ : list of float
        Mean loss of each epoch, without the penalty. It is progressive: each row's loss before the update that uses the
        row, so that the first epoch's is an honest estimate for new rows.
    run_dir_ : Path or None
        The run folder of the last fit, if it has one.

    See Also
    --------
    SGDRegressor : The same for numbers.
    streamgd.open_source : Opens HDF5, Parquet and other data as a source.
    streamgd.load : Makes an estimator of a run folder.

    Notes
    -----
    **Optimizers and learning rates.** These go together, every other pair is an error:

    =========  ====================================================  ========================================
    optimizer  learning_rate                                         ``"auto"`` stands for
    =========  ====================================================  ========================================
    auto       auto                                                  constant
    sgd        constant, optimal, invscaling, adaptive, cosine       optimal, as in scikit-learn
    adagrad    constant, invscaling, adaptive, cosine                constant
    adam       constant, invscaling, adaptive, cosine                constant
    dowg       auto                                                  nothing: it needs no rate
    =========  ====================================================  ========================================

    **Penalties** act on the coefficients of the scaled features (as in glmnet and H2O), so that a feature in metres is
    treated like one in kilometres. With ``standardize=False`` they act on the coefficients as they are.

    **What differs from scikit-learn's estimator of the same name**

    - Other defaults: `loss` (``"hinge"`` there), `penalty`, `optimizer`, `learning_rate`, `eta0`, `average`,
      `max_iter`, `tol`, `standardize`. They are made for data that nobody has scaled, shuffled or looked at.
    - An update is made of `batch_size` rows, by the mean of their gradients.
    - Gradients are divided by the mean sample weight, so that the scale of the weights does not matter.
    - The intercept starts at the best constant prediction, not at zero (but for plain sgd without scaling).
    - ``loss="log_loss"`` is softmax for three or more classes, not one classifier against the rest for each.
    - There is no early stopping on a part held out.

    With ``optimizer="sgd"``, ``batch_size=1``, ``standardize=False``, ``average=False`` and ``shuffle=False`` the
    coefficients are scikit-learn's, but for softmax, for every loss and learning rate that both have and for penalty
    None or ``"l2"``.

    **Cost.** An epoch takes about as long as reading the data once. Memory is `buffer`, a constant, and some arrays of
    the size of ``coef_``. Arrays are neither copied nor cast: float32 data is trained in float32 rows, with
    coefficients kept in float64.

    **Determinism.** The result is a function of data, parameters and `random_state` alone, to the bit: neither threads,
    nor the type of processor, nor kills and resumes change it.

    Examples
    --------
    >>> import numpy as np
    >>> from streamgd import SGDClassifier
    >>> X = np.random.default_rng(0).normal(size=(1000, 2))
    >>> y = np.where(X[:, 0] > X[:, 1], "over", "under")
    >>> model = SGDClassifier().fit(X, y)
    >>> model.predict([[1.0, 0.0], [0.0, 1.0]])
    array(['over', 'under'], dtype='<U5')
    """

    _task = "classification"

    def __init__(
        self,
        loss: str = "log_loss",
        *,
        penalty: str | None = None,
        alpha: float = 1e-4,
        l1_ratio: float = 0.15,
        fit_intercept: bool = True,
        max_iter: int | str = "auto",
        tol: float | str | None = "auto",
        shuffle: bool = True,
        verbose: int = 0,
        random_state: int | np.random.RandomState | None = 0,
        learning_rate: str = "auto",
        eta0: float | str = "auto",
        power_t: float = 0.5,
        n_iter_no_change: int = 5,
        warm_start: bool = False,
        average: bool | int | str = "auto",
        class_weight: dict[Any, float] | str | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        optimizer: str = "auto",
        batch_size: int = 256,
        buffer: str | int = "256MB",
        standardize: bool | str = True,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every_s: float = 60.0,
        cache: str | os.PathLike[str] | None = None,
        n_threads: int | None = None,
        n_lanes: int = 1,
    ) -> None:
        self.loss = loss
        self.penalty = penalty
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.shuffle = shuffle
        self.verbose = verbose
        self.random_state = random_state
        self.learning_rate = learning_rate
        self.eta0 = eta0
        self.power_t = power_t
        self.n_iter_no_change = n_iter_no_change
        self.warm_start = warm_start
        self.average = average
        self.class_weight = class_weight
        self.momentum = momentum
        self.nesterov = nesterov
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.buffer = buffer
        self.standardize = standardize
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_every_s = checkpoint_every_s
        self.cache = cache
        self.n_threads = n_threads
        self.n_lanes = n_lanes

    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        resume: bool = False,
        client: Any = None,
        workers_timeout_s: float = 300.0,
    ) -> Self:
        """Fit the model.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features. A source (`streamgd.open_source`) brings its target and weights along.
        y : array-like of shape (n_samples,) or None
            The classes: numbers without fractions, strings, booleans; None where X brings them.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows; at least 0, not all 0.
        resume : bool, default=False
            Whether to go on with the newest checkpoint of the same fit in `checkpoint_dir`, where there is one: same
            data, same parameters, at most `max_iter` epochs done. A finished fit is left as it is; a larger `max_iter`
            goes on with it. False starts afresh.
        client : distributed.Client or None, default=None
            A Dask cluster to train the lanes on; None trains here. The coefficients are the same, to the bit, for any
            number of workers, lost ones included. Workers open files themselves, under the same paths; the blocks of
            Dask collections go from worker to worker.
        workers_timeout_s : float, default=300
            Seconds to wait for workers where the cluster has none.

        Returns
        -------
        self
            The fitted estimator.

        Raises
        ------
        ValueError
            If data or parameters cannot be used. Most such errors are of `streamgd.errors`.
        DivergenceError
            If the coefficients leave the finite numbers, or the loss ends a million times above that of the best
            constant prediction: a learning rate that is too large.
        RunLockedError
            If another process is at the same fit, in the same `checkpoint_dir`.
        ClusterError
            If the cluster cannot do it: other versions, files that a worker cannot read, too little memory, no workers.

        Notes
        -----
        With a `checkpoint_dir`, the run folder is named by a hash of parameters and data, so that no two fits of a
        grid search meet. A KeyboardInterrupt saves a checkpoint on its way out; a process that is killed loses what it
        did since the last one. A resumed fit equals an uninterrupted one bit for bit. `streamgd.load` makes an
        estimator of a run folder.

        With a `cache`, the first epoch writes the rows to disk while it trains, as they are stored and not scaled, and
        later epochs read them from there; where a window would draw on fewer than four blocks of the data, the cache is
        written before the first update. That there is a cache changes the order of rows and with it the last bits of
        the result; whether it was there before, and who wrote it, does not: fits over the same data share it. If the
        disk is full, a warning says so and the fit goes on without. Each part of about a megabyte is checked when it is
        first read.
        """
        return self._fit(X, y, sample_weight, resume=resume, client=client, workers_timeout_s=workers_timeout_s)

    def partial_fit(self, X: Any, y: Any = None, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch on some rows: further rows of a stream, or the same once more.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.
        y : array-like of shape (n_samples,) or None
            The classes; None where X brings them.
        classes : array-like of shape (n_classes,) or None, default=None
            All classes that will ever come. Needed in the first call, where `fit` was not called before.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows.

        Returns
        -------
        self
            The estimator, trained further. After an error it is as it was before.

        Notes
        -----
        Scaling, mean weight, classes and class weights are found in the first call and kept:
        let it have enough rows to tell. The last batch of a call is closed with the rows it has. `tol`,
        `checkpoint_dir` and `cache` are not used, and ``learning_rate="adaptive"`` keeps its rate.
        """
        fitted = self.__sklearn_is_fitted__()
        if not fitted and classes is None:
            raise OptionError("classes must be passed on the first call to partial_fit.")
        if fitted and classes is not None and not np.array_equal(self.classes_, np.unique(classes)):
            raise OptionError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: {self.classes_!r}"
            )
        return self._partial_fit(X, y, sample_weight, classes)

    def decision_function(self, X: Any) -> Any:
        """Return the decision values X · coef + intercept.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.

        Returns
        -------
        ndarray of shape (n_samples,) or (n_samples, n_classes), float64
            One value a row for two classes: above 0 means ``classes_[1]``.
            For a source or a Dask collection an iterator of such arrays, of consecutive rows in the order of the data,
            of about a megabyte of data each.
        """
        return self._predictions(X, "decision_function")

    def predict(self, X: Any) -> Any:
        """Predict the classes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.

        Returns
        -------
        ndarray of shape (n_samples,)
            Labels, of the type of ``classes_``.
            For a source or a Dask collection an iterator of such arrays, of consecutive rows in the order of the data,
            of about a megabyte of data each.
        """
        return self._predictions(X, "predict")

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class; for the losses log_loss and modified_huber.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64
            Probabilities, in the order of ``classes_``.
            For a source or a Dask collection an iterator of such arrays, of consecutive rows in the order of the data,
            of about a megabyte of data each.

        References
        ----------
        Zadrozny & Elkan (2002), Transforming classifier scores into multiclass probability estimates, KDD, for
        modified_huber: (clip(p, -1, 1) + 1) / 2, normalised over the classes.
        """
        return self._predictions(X, "predict_proba")

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_log_proba(self, X: Any) -> Any:
        """Return the logarithms of `predict_proba`; for the losses log_loss and modified_huber.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.

        Returns
        -------
        ndarray of shape (n_samples, n_classes), float64
            Logarithms of the probabilities, in the order of ``classes_``.
            For a source or a Dask collection an iterator of such arrays, of consecutive rows in the order of the data,
            of about a megabyte of data each.
        """
        return self._predictions(X, "predict_log_proba")

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy, the share of rows whose class is predicted.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features), DataFrame, Dask collection or Source
            The features.
        y : array-like of shape (n_samples,) or None
            The classes; None where X brings them.
        sample_weight : array-like of shape (n_samples,) or None, default=None
            Weights of the rows. Those of a source are used.

        Returns
        -------
        float
            From 0 to 1.
        """
        if is_streamed(X):
            return self._score_of_source(X, y, sample_weight)
        labels = np.asarray(y)
        if labels.dtype == object and self.classes_.dtype.kind in "biuf":  # which `fit` takes, but no metric
            y = np.array(labels.tolist())
        return float(super().score(X, y, sample_weight))
