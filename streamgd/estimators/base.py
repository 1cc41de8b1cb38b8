"""What both estimators share: the ways from parameters and data to a run, and from a run to attributes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from streamgd.data.plan import parse_bytes
from streamgd.data.sources.base import Source
from streamgd.errors import OptionError
from streamgd.estimators.inputs import is_streamed, rows_source, training_source
from streamgd.estimators.runs import feature_names, folder_of, resumable
from streamgd.learn import kernels
from streamgd.learn.losses import Task
from streamgd.learn.model import LinearModel
from streamgd.learn.recipe import Recipe
from streamgd.learn.state import State
from streamgd.run.checkpoint import Checkpoint
from streamgd.run.config import Config, RunOptions
from streamgd.run.continuing import Trained
from streamgd.run.folder import RunFolder
from streamgd.run.loop import Run, Watcher, prepare, train
from streamgd.run.scoring import evaluate, predict_array, predict_source
from streamgd.run.survey import Survey

Array = NDArray[Any]


class SGDEstimator(BaseEstimator):  # type: ignore[misc]
    """Base of `SGDRegressor` and `SGDClassifier`; abstract.

    Subclasses list every parameter in ``__init__``, as scikit-learn wants it, and set `_task`.
    """

    _task: ClassVar[Task]
    # `resume` says how to fit, it is no data that meta-estimators could route.
    __metadata_request__fit: ClassVar[dict[str, str]] = {"resume": "$UNUSED$"}

    loss: str
    checkpoint_dir: str | os.PathLike[str] | None
    checkpoint_every_s: float
    max_iter: int | str
    n_threads: int | None
    random_state: Any
    tol: float | str | None
    verbose: int
    warm_start: bool
    _trained: Trained

    # --- from parameters and data to a run ---
    def _config(self, seed: int) -> Config:
        """Check the parameters and gather those that define the run."""
        given = self.get_params(deep=False)
        recipe = {name: given[name] for name in Recipe.__dataclass_fields__ if name in given}
        own = {name: given[name] for name in Config.__dataclass_fields__ if name in given}
        return Config(
            recipe=Recipe(task=self._task, **recipe),
            seed=seed,
            buffer_bytes=parse_bytes(given["buffer"]),
            **own,
        )

    def _options(self) -> RunOptions:
        return RunOptions(n_threads=self.n_threads, checkpoint_every_s=self.checkpoint_every_s)

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, resume: bool) -> Self:
        config, options = self._config(_seed_of(self.random_state)), self._options()
        if resume and self.checkpoint_dir is None:
            raise OptionError("resume=True needs a checkpoint_dir, where the run to go on with lies")
        if resume and self.random_state is None:
            raise OptionError(
                "resume=True with random_state=None: such a run draws its seed anew each time, and is never found "
                "again. Set random_state to a number"
            )
        trained: Trained | None = getattr(self, "_trained", None) if self.warm_start else None
        labels = self._task == "classification"
        source = training_source(self, X, y, sample_weight, reset=trained is None, labels=labels)
        start = None if trained is None else trained.warm_start(source, config, *self._coefficients())
        watcher = _Announcer(self.verbose)
        if self.checkpoint_dir is None:
            run = start or prepare(source, config)
            train(run, options=options, watcher=watcher)
            self._adopt(run, None)
            return self
        with RunFolder(folder_of(self.checkpoint_dir, config, source, start)) as folder:
            found = resumable(folder, source, config) if resume else None
            run = found or start or prepare(source, config)
            self._begin(folder, run, anew=found is None)
            train(run, options=options, folder=folder, watcher=watcher)
        self._adopt(run, folder.path)
        return self

    def _begin(self, folder: RunFolder, run: Run, *, anew: bool) -> None:
        """Make the folder the run's, unless it is already."""
        if not anew and folder.holds_run and folder.checkpoints.files():
            folder.cut_metrics(run.state.cursor)
            return
        description = {
            "config": run.config.to_json(),
            "fingerprint": run.source.fingerprint,
            "row_dtype": run.source.row_dtype.name,
            "source": run.source.origin,
        }
        folder.start(description, replace=True)
        if not anew:  # a run with another max_iter goes on here
            folder.checkpoints.save(run.to_checkpoint(), int(run.state.counters[kernels.N_ROWS]))

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, classes: Any) -> Self:
        trained: Trained | None = getattr(self, "_trained", None)
        config = self._config(_seed_of(self.random_state) if trained is None else trained.config.seed)
        if config.recipe.schedule == "cosine":
            raise OptionError(
                "learning_rate='cosine' is shaped by the end of the run, which partial_fit does not know: use fit, or "
                "another learning rate"
            )
        labels = self._task == "classification"
        source = training_source(self, X, y, sample_weight, reset=trained is None, labels=labels)
        if trained is None:
            run = prepare(source, _one_epoch(config), classes=classes)
        else:
            run = trained.next_epoch(source, config)
        train(run, options=self._options(), watcher=_Announcer(self.verbose))
        self._adopt(run, None)
        return self

    # --- from a run to attributes ---
    def _adopt(self, run: Run, folder: Path | None) -> None:
        self._set_attributes(Trained.of(run))
        self.run_dir_ = folder
        tol = self.tol
        if run.finished == "max_iter" and folder is not None or True:
            pass
        if run.config.tol is not None and not isinstance(tol, str) and run.finished == "max_iter" and tol is not None:
            if tol > -np.inf:
                warnings.warn(
                    f"the loss still fell by more than tol={tol} when max_iter={run.n_epochs} epochs were over: raise "
                    "max_iter, or set tol='auto' or None if that is wanted",
                    ConvergenceWarning,
                    stacklevel=4,
                )
