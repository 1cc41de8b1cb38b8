"""Go on from what an earlier call learnt, over rows that may be others: `partial_fit` and warm starts.

Resuming a run over the same rows is something else, see `streamgd.run.runs.restore`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgd.data.sources.base import Source
from streamgd.errors import OptionError, SchemaError
from streamgd.learn import kernels
from streamgd.learn.model import LinearModel
from streamgd.learn.state import State
from streamgd.run.config import Config
from streamgd.run.runs import Run, first_state, model_of, plan_for
from streamgd.run.survey import Survey

Floats = NDArray[np.float64]
_EMPTY: Floats = np.zeros(0)
#: Places in the state's scalars of what Adam and DoWG remember.
_MEMORY = [kernels.BETA_1_POWER, kernels.BETA_2_POWER, kernels.DOWG_DISTANCE, kernels.DOWG_SUM]


@dataclass(frozen=True)
class Trained:
    """What a fitted estimator keeps of a run: all that going on needs, and nothing of the data.

    Attributes
    ----------
    config : Config
        What defined the run.
    survey : Survey
        What was found before the first update; kept for good.
    state : State
        Where training stands. Between calls the open batch is empty, and its arrays take no room.
    is_vector : bool
        Whether the target was 1-D.
    """

    config: Config
    survey: Survey
    state: State
    is_vector: bool

    @classmethod
    def of(cls, run: Run) -> Trained:
        """Keep what a run learnt."""
        assert run.source.target is not None
        filled = int(run.state.counters[kernels.N_CARRY])
        return cls(run.config, run.survey, _with_carry(run.state, filled), run.source.target.is_vector)

    def model(self) -> LinearModel:
        """Return the model in the data's units."""
        return model_of(self.config, self.survey, self.state, self.is_vector)

    def next_epoch(self, source: Source, config: Config, coef: Floats, intercept: Floats) -> Run:
        """Return the run of one more epoch, over `source`; this object stays as it is.

        Parameters
        ----------
        source : Source
            Rows with as many features and targets as before.
        config : Config
            What is set now; only what shapes no array and no unit may differ from `config`.
        coef, intercept : ndarrays of shape (n_outputs, n_features) and (n_outputs,)
            Where to go on, in the data's units: somebody may have set others than were learnt.

        Raises
        ------
        OptionError
            If more differs than may.
        SchemaError
            If the target's columns are not as many as before.
        """
        self._require_compatible(source, config)
        state = self._between_epochs().with_penalty(sparse=config.recipe.is_sparse)
        model = self.model()
        if not (np.array_equal(coef, model.coef) and np.array_equal(intercept, model.intercept)):
            state.begin_at(self.survey.scaling.unfold(coef, intercept))
        config = replace(config, max_iter=state.epoch + 1, tol=None)
        state = _with_carry(state, config.batch_rows(source.n_rows), source)
        return Run(source, config, self.survey, plan_for(source, config), state, open_ended=True)

    def warm_start(self, source: Source, config: Config, coef: Floats, intercept: Floats) -> Run:
        """Return a run that starts from coefficients, with the survey of the first call; this object stays as it is.

        Plain sgd keeps nothing else, so that its rates start anew, as in scikit-learn. The other optimizers keep what
        they know of the gradients, and go on averaging: the first steps of a fresh AdaGrad, and an average of few
        updates, would lose most of what the coefficients were worth.

        Parameters
        ----------
        source : Source
            Rows with as many features and targets as before.
        config : Config
            What is set now.
        coef : ndarray of shape (n_outputs, n_features)
            In the data's units.
        intercept : ndarray of shape (n_outputs,)
            In the data's units.

        Raises
        ------
        OptionError, SchemaError
            As from `next_epoch`.
        """
        self._require_compatible(source, config)
        state = first_state(source, config, self.survey)
        state.begin_at(self.survey.scaling.unfold(coef, intercept))
        if config.recipe.the_optimizer.code != kernels.SGD:
            before, model = self._between_epochs(), self.model()
            if np.array_equal(coef, model.coef) and np.array_equal(intercept, model.intercept):
                state.theta[:], state.average[:] = before.theta, before.average
                state.subgradient[:] = before.with_penalty(sparse=config.recipe.is_sparse).subgradient
            state.slots[:] = before.slots
            state.scalars[_MEMORY] = before.scalars[_MEMORY]
            if config.recipe.schedule != "cosine":  # which has to begin at its beginning
                state.counters[kernels.N_UPDATES] = before.counters[kernels.N_UPDATES]
        return Run(source, config, self.survey, plan_for(source, config), state, open_ended=True)

    def _between_epochs(self) -> State:
        """Return a copy of the state in which no batch and no epoch is open."""
        state = self.state.with_penalty(sparse=self.config.recipe.is_sparse).copy()
        if state.counters[kernels.EPOCH_ROWS] or state.counters[kernels.N_CARRY]:
            _leave_epoch(state, self)
        return state

    def _require_compatible(self, source: Source, config: Config) -> None:
        then, now = _fixed(self.config), _fixed(config)
        changed = [f"{name}: {then[name]!r} then, {now[name]!r} now" for name in then if then[name] != now[name]]
        if changed:
            raise OptionError(
                f"these cannot change while training goes on: {'; '.join(changed)}. Set them back, or call fit with "
                "warm_start=False to start afresh"
            )
        assert source.target is not None
        n_targets = self.survey.codec.n_outputs
        if source.target.n_outputs != n_targets:
            raise SchemaError(
                f"{source.name}: the target has {source.target.n_outputs} columns, but training began with {n_targets}"
            )


def _fixed(config: Config) -> dict[str, Any]:
    """Return the options that units, arrays or the survey depend on."""
    recipe = config.recipe
    return {
        "optimizer": recipe.the_optimizer.name,
        "average": recipe.average_kind != kernels.AVERAGE_NONE,
        "fit_intercept": bool(recipe.fit_intercept),
        "standardize": config.standardize,
        "class_weight": config.class_weight,
    }


def _with_carry(state: State, n_rows: int, source: Source | None = None) -> State:
    """Return the state with an open batch that has room for `n_rows`; shares its other arrays."""
    filled = int(state.counters[kernels.N_CARRY])
    dtype = state.carry_X.dtype if source is None else source.row_dtype
    has_weight = len(state.carry_weight) > 0 if source is None else source.has_weight

    def resized(old: NDArray[Any], rows: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        fresh = np.zeros((rows, *old.shape[1:]), dtype)
        fresh[:filled] = old[:filled]
        return fresh

    return replace(
        state,
        carry_X=resized(state.carry_X, n_rows, dtype),
        carry_y=resized(state.carry_y, n_rows, state.carry_y.dtype),
        carry_weight=resized(state.carry_weight, n_rows if has_weight else 0, state.carry_weight.dtype),
    )


def _leave_epoch(state: State, trained: Trained) -> None:
    """Close a batch and an epoch that were left open (a run loaded from the middle of an epoch)."""
    survey, recipe = trained.survey, trained.config.recipe
    packed = recipe.pack(n_classes=survey.n_classes, n_updates=1, mean_weight=survey.mean_weight, moments=False)
    none = np.zeros((0, state.carry_X.shape[1]), state.carry_X.dtype)
    kernels.consume(
        none,
        np.zeros((0, state.carry_y.shape[1])),
        _EMPTY,
        np.zeros(0, np.uint64),
        0,
        0,
        True,
        state.learnt,
        (state.carry_X, state.carry_y, state.carry_weight),
        state.checksum,
        state.moments,
        packed.codes,
        packed.params,
        survey.class_factors,
        survey.output_scale(),
    )
    state.loss_curve = [*state.loss_curve, state.progressive_loss]
    state.scalars[[kernels.LOSS_SUM, kernels.WEIGHT_SUM, kernels.PENALTY_SUM]] = 0.0
    state.counters[kernels.EPOCH] += 1
    state.counters[[kernels.WINDOW, kernels.ROW, kernels.EPOCH_ROWS]] = 0
    state.checksum = np.zeros(1, np.uint64)
