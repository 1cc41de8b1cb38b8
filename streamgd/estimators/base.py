"""What both estimators share: the ways from parameters and data to a run, and from a run to attributes."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.metadata_routing import UNUSED
from sklearn.utils.validation import check_is_fitted

from streamgd.data.plan import parse_bytes
from streamgd.data.sources.base import Source
from streamgd.data.sources.dask_clients import computing_on
from streamgd.errors import OptionError
from streamgd.estimators.inputs import is_streamed, rows_source, training_source
from streamgd.estimators.runs import folder_of, open_run, stack_level
from streamgd.learn import kernels
from streamgd.learn.losses import Task
from streamgd.learn.model import LinearModel
from streamgd.learn.recipe import Recipe
from streamgd.run.config import Config, RunOptions, refuse_cache
from streamgd.run.continuing import Trained
from streamgd.run.folder import RunFolder
from streamgd.run.loop import Watcher, train
from streamgd.run.runs import Run, prepare
from streamgd.run.scoring import evaluate, predict_array, predict_source
from streamgd.run.session import Saved
from streamgd.run.survey_targets import require_weight

Array = NDArray[Any]


class SGDEstimator(BaseEstimator):  # type: ignore[misc]
    """Base of `SGDRegressor` and `SGDClassifier`; abstract.

    Subclasses say what the target is in `_task` and list every parameter in ``__init__``, as scikit-learn wants it.
    """

    _task: ClassVar[Task]
    # These say how to fit: they are no data that meta-estimators could route.
    __metadata_request__fit: ClassVar[dict[str, str]] = {
        "resume": UNUSED,
        "client": UNUSED,
        "workers_timeout_s": UNUSED,
    }

    checkpoint_dir: str | os.PathLike[str] | None
    checkpoint_every_s: float
    cache: str | os.PathLike[str] | None
    n_threads: int | None
    random_state: Any
    verbose: int
    warm_start: bool
    coef_: Array
    intercept_: Array
    _trained: Trained

    # --- from parameters and data to a run ---
    def _config(self, seed: int) -> Config:
        """Check the parameters that define a run, and gather them."""
        given = self.get_params(deep=False)

        def named(kind: type) -> dict[str, Any]:
            return {field.name: given[field.name] for field in fields(kind) if field.name in given}

        recipe = Recipe(task=self._task, **named(Recipe))
        return Config(recipe=recipe, seed=seed, buffer_bytes=parse_bytes(given["buffer"]), **named(Config))

    def _options(self) -> RunOptions:
        return RunOptions(n_threads=self.n_threads, checkpoint_every_s=self.checkpoint_every_s, cache=self.cache)

    def _source(self, X: Any, y: Any, sample_weight: Any, *, reset: bool) -> Source:
        return training_source(self, X, y, sample_weight, reset=reset, labels=self._task == "classification")

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, resume: bool, client: Any, workers_timeout_s: float) -> Self:
        config = self._config(_seed_of(self.random_state))
        options = replace(self._options(), workers_timeout_s=workers_timeout_s)
        self._check_manners()
        refuse_cache(config, cached=options.cache is not None, on_cluster=client is not None)
        if resume:
            self._require_findable()
        trained: Trained | None = getattr(self, "_trained", None) if self.warm_start else None
        with contextlib.ExitStack() as held:
            if client is not None:
                from streamgd.run.cluster import require_client

                require_client(client)
            held.enter_context(computing_on(client, options.workers_timeout_s))  # what the survey needs of a collection
            source = self._source(X, y, sample_weight, reset=trained is None)
            held.callback(source.let_go if source is X else source.close)
            start = None
            if trained is not None:
                start = trained.warm_start(source, config, np.atleast_2d(self.coef_), self.intercept_)
            if client is not None and not resume:  # perhaps there is nothing left to do
                from streamgd.run.members import refuse_unfit

                source.get_ready()
                options = replace(options, reports=refuse_unfit(client, source, config))
            run, self.run_dir_ = self._train(source, config, options, start, resume=resume, client=client)
        self._adopt(Trained.of(run))
        if run.finished == "max_iter" and isinstance(config.tol, (int, float)) and config.tol > -np.inf:
            warnings.warn(
                f"the loss was still falling by more than tol={config.tol} when max_iter={run.n_epochs} epochs were "
                "over: raise max_iter, or set tol to 'auto' or None if this is what you want",
                ConvergenceWarning,
                stacklevel=stack_level(),
            )
        return self

    def _train(
        self, source: Source, config: Config, options: RunOptions, start: Run | None, *, resume: bool, client: Any
    ) -> tuple[Run, Path | None]:
        """Train in memory, or in a run folder; return the run, and the folder."""
        watcher = _Announcer(self.verbose)
        if self.checkpoint_dir is None:
            run = start or prepare(source, config)
            train(run, options=options, watcher=watcher, client=client)
            return run, None
        path = folder_of(self.checkpoint_dir, config, source, start, cached=self.cache is not None)
        with RunFolder(path) as folder:
            run = open_run(folder, source, config, start, resume=resume, cache=self.cache)
            train(run, options=options, folder=folder, watcher=watcher, client=client)
        return run, folder.path

    def _check_manners(self) -> None:
        """Refuse parameters that change nothing of the model, and that nobody can use."""
        folder, verbose = self.checkpoint_dir, self.verbose
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise OptionError(f"checkpoint_dir={folder!r}: expected the path of a folder, or None")
        if not isinstance(verbose, (bool, int, float, np.number)):
            raise OptionError(f"verbose={verbose!r}: expected a number, 0 for silence")

    def _require_findable(self) -> None:
        if self.checkpoint_dir is None:
            raise OptionError("resume=True needs a checkpoint_dir: that is where the run to go on with lies")
        if self.random_state is None:
            raise OptionError(
                "resume=True with random_state=None: such a fit draws another seed each time, so that its run is never "
                "found again. Set random_state to a number"
            )

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Self:
        trained: Trained | None = getattr(self, "_trained", None)
        config = self._config(_seed_of(self.random_state) if trained is None else trained.config.seed)
        if config.recipe.schedule == "cosine":
            raise OptionError(
                "learning_rate='cosine' is shaped by the end of the run, which partial_fit cannot know: use fit, or "
                "another learning rate"
            )
        self._check_manners()
        source = self._source(X, y, sample_weight, reset=trained is None)
        if trained is None:
            run = prepare(source, replace(config, max_iter=1, tol=None), classes=classes)
            run.open_ended = True
        else:
            require_weight(source)
            run = trained.next_epoch(source, config, np.atleast_2d(self.coef_), self.intercept_)
        # One epoch of rows that will hardly come again is not worth a cache.
        train(run, options=replace(self._options(), cache=None), watcher=_Announcer(self.verbose))
        self.run_dir_ = None
        self._adopt(Trained.of(run))
        return self

    # --- from a run to attributes ---
    def _adopt(self, trained: Trained) -> None:
        """Set the attributes of a fitted estimator, all at once and only after training went well."""
        model, state = trained.model(), trained.state
        self._trained = trained
        self.coef_ = model.coef[0] if model.classes is None and model.is_vector else model.coef
        self.intercept_ = model.intercept
        if model.classes is not None:
            self.classes_ = model.classes
        self.n_iter_ = state.epoch
        self.t_ = int(state.counters[kernels.N_UPDATES]) + 1
        self.loss_curve_ = list(state.loss_curve)

    def _restore(self, saved: Saved, run_dir: Path) -> None:
        """Set them as of a run's newest checkpoint."""
        self.n_features_in_ = saved.trained.state.theta.shape[1] - 1
        if saved.feature_names is not None:
            self.feature_names_in_ = np.array(saved.feature_names, dtype=object)
        self.run_dir_ = run_dir
        self._adopt(saved.trained)

    def __sklearn_is_fitted__(self) -> bool:
        """Tell whether a fit has ended well."""
        return hasattr(self, "_trained")

    # --- predicting ---
    def _model(self) -> LinearModel:
        """Return the model that the attributes describe, as they are now."""
        check_is_fitted(self)
        kept = self._trained
        return LinearModel(
            self._task,
            kept.config.recipe.loss,
            np.atleast_2d(self.coef_),
            self.intercept_,
            getattr(self, "classes_", None),
            kept.is_vector,
        )

    def _predictions(self, X: Any, method: str) -> Array | Iterator[Array]:
        model = self._model()
        rows = rows_source(self, X)
        if not isinstance(rows, Source):
            return predict_array(model, rows, method, type(self).__name__)
        parts = predict_source(model, rows, method)
        return parts if is_streamed(X) else np.concatenate(list(parts))

    def _score_of_source(self, X: Any, y: Any, sample_weight: Any) -> float:
        model = self._model()
        return evaluate(model, self._source(X, y, sample_weight, reset=False)).score


class _Announcer(Watcher):
    """Turns what the loop says into warnings, and into a line for each epoch where that is wanted."""

    def __init__(self, verbose: int) -> None:
        self._verbose = verbose
        self._began = time.monotonic()

    def message(self, text: str) -> None:
        warnings.warn(text, stacklevel=stack_level())

    def note(self, text: str) -> None:
        if self._verbose > 0:
            print(text, flush=True)

    def epoch_ended(self, run: Run, loss: float) -> None:
        if self._verbose > 0:
            null = run.survey.null_loss
            explained = f", explained {1 - loss / null:.4f}" if null > 0 else ""
            took = time.monotonic() - self._began
            print(f"epoch {run.state.epoch}/{run.n_epochs}: loss {loss:.6g}{explained}, {took:.1f} s", flush=True)


def _seed_of(random_state: Any) -> int:
    """Turn scikit-learn's `random_state` into a seed."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(np.iinfo(np.int32).max))
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool):
        return int(random_state)
    raise OptionError(f"random_state={random_state!r}: expected a whole number, None or a numpy.random.RandomState")
