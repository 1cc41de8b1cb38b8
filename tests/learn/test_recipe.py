"""The recipe: what is accepted, what is refused and how, and what the kernel gets."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from streamgd.errors import OptionError
from streamgd.learn import kernels
from streamgd.learn.losses import LOSSES
from streamgd.learn.optimizers import OPTIMIZERS
from streamgd.learn.recipe import Recipe
from streamgd.learn.schedules import SCHEDULES

DESCENTS = {"constant", "invscaling", "adaptive", "cosine"}
VALID = {
    "auto": {"auto", "optimal", *DESCENTS},  # anything but auto makes it sgd
    "sgd": {"auto", "optimal", *DESCENTS},
    "adagrad": {"auto", *DESCENTS},
    "adam": {"auto", *DESCENTS},
    "dowg": {"auto"},
}
PAIRS = list(itertools.product(OPTIMIZERS, ["auto", *SCHEDULES]))


def test_the_table_is_complete():
    assert set(VALID) == set(OPTIMIZERS)
    assert set.union(*VALID.values()) == {"auto", *SCHEDULES}


@pytest.mark.parametrize(("optimizer", "learning_rate"), PAIRS)
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_every_pair_of_optimizer_and_learning_rate(task, optimizer, learning_rate):
    options = {"task": task, "loss": "log_loss" if task == "classification" else "squared_error"}
    if learning_rate in VALID[optimizer]:
        recipe = Recipe(**options, optimizer=optimizer, learning_rate=learning_rate)
        assert recipe.schedule in SCHEDULES
        expected = "sgd" if optimizer == "auto" and learning_rate != "auto" else optimizer
        assert recipe.the_optimizer.name == expected
        if learning_rate != "auto":
            assert recipe.schedule == learning_rate
    else:
        with pytest.raises(OptionError) as refused:
            Recipe(**options, optimizer=optimizer, learning_rate=learning_rate)
        assert f"learning_rate={learning_rate!r}" in str(refused.value)
        assert f"optimizer={optimizer!r}" in str(refused.value)
        for taken in VALID[optimizer]:
            assert repr(taken) in str(refused.value)


NUMBERS = ("x", None, [1.0], float("nan"), float("inf"), True)
BAD: list[tuple[str, tuple[Any, ...], str, dict[str, Any]]] = [
    ("task", ("ranking", None, ["regression"]), "'regression' or 'classification'", {}),
    ("loss", ("log", "hinge", None, 3, ["squared_error"]), "one of 'squared_error', 'huber'", {}),
    ("epsilon", (-0.1, *NUMBERS), "a number of at least 0", {}),
    ("epsilon", (0, 0.0), "a number above 0 for loss='huber'", {"loss": "huber"}),
    ("quantile", (0, 1, 1.5, -0.5, *NUMBERS), "a number between 0 and 1", {}),
    ("penalty", ("L2", "none", "", 2, ["l2"]), "None, 'l2', 'l1' or 'elasticnet'", {}),
    ("alpha", (-1e-4, *NUMBERS), "a number of at least 0", {}),
    ("l1_ratio", (-0.1, 1.1, *NUMBERS), "a number from 0 to 1", {"penalty": "elasticnet"}),
    ("fit_intercept", ("yes", 1, None), "True or False", {}),
    ("optimizer", ("SGD", "", None, 0, ["sgd"]), "one of 'auto', 'sgd', 'adagrad', 'adam', 'dowg'", {}),
    ("learning_rate", ("fast", None, 0.1, ["constant"]), "it takes 'auto', 'constant', 'optimal'", {}),
    ("eta0", (0, -1, "big", None, [0.1], float("nan"), float("inf"), True), "'auto' or a number above 0", {}),
    ("power_t", NUMBERS, "a number", {}),
    ("momentum", (1, 1.5, -0.1, *NUMBERS), "a number from 0 to below 1", {"optimizer": "sgd"}),
    ("nesterov", ("yes", 1, None), "True or False", {"optimizer": "sgd", "momentum": 0.5}),
    ("average", ("yes", -1, None, 1.5, [2]), "'auto', True, False or a number of updates", {}),
    ("batch_size", (0, -3, 1.5, "auto", None, True, [8]), "a whole number of at least 1", {}),
]


@pytest.mark.parametrize(
    ("name", "value", "expected", "others"),
    [(name, value, expected, others) for name, values, expected, others in BAD for value in values],
)
def test_a_bad_option_names_itself_and_what_is_expected(name, value, expected, others):
    with pytest.raises(OptionError) as refused:
        Recipe(**{**others, name: value})
    text = str(refused.value)
    assert f"{name}={value!r}" in text
    assert expected in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, ["momentum", "optimizer='adam'", "optimizer='sgd'"]),
        ({"momentum": 0.9}, ["momentum", "optimizer='auto'", "optimizer='sgd'"]),
        ({"optimizer": "dowg", "nesterov": True}, ["nesterov", "optimizer='dowg'", "optimizer='sgd'"]),
        ({"optimizer": "sgd", "nesterov": True}, ["nesterov=True", "momentum=0.9"]),
        ({"optimizer": "dowg", "eta0": 0.1}, ["eta0=0.1", "optimizer='dowg'", "no learning rate"]),
        ({"optimizer": "sgd", "learning_rate": "optimal", "alpha": 0}, ["learning_rate='optimal'", "alpha=0"]),
        ({"task": "classification", "loss": "hinge", "optimizer": "sgd", "alpha": 0}, ["'optimal'", "alpha=0"]),
    ],
)
def test_options_that_do_not_go_together_name_both(options, words):
    with pytest.raises(OptionError) as refused:
        Recipe(**options)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_serves_its_task_alone(loss):
    task = LOSSES[loss].task
    assert Recipe(task=task, loss=loss).the_loss is LOSSES[loss]
    other = "regression" if task == "classification" else "classification"
    with pytest.raises(OptionError, match=f"loss='{loss}' is not a loss for {other}"):
        Recipe(task=other, loss=loss)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0},
        {"l1_ratio": 1, "penalty": "elasticnet"},
        {"eta0": np.float32(0.5)},
        {"batch_size": np.int64(32)},
        {"power_t": -0.5},
        {"average": np.int32(7)},
        {"average": np.bool_(True)},
        {"fit_intercept": np.bool_(False)},
        {"optimizer": "sgd", "momentum": 0.9, "nesterov": np.bool_(True)},
        {"epsilon": 0, "loss": "epsilon_insensitive"},
        {"average": 0},
    ],
)
def test_what_numpy_and_scikit_learn_users_write_is_accepted(options):
    recipe = Recipe(**options)
    recipe.pack(n_classes=0, n_updates=1, mean_weight=1, moments=False)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "classification", "loss": "hinge", "penalty": "elasticnet", "alpha": 0.3, "l1_ratio": 0.2},
        {"optimizer": "sgd", "learning_rate": "cosine", "momentum": 0.5, "nesterov": True, "average": 12, "eta0": 2.5},
        {"loss": "quantile", "quantile": 0.1, "fit_intercept": False, "batch_size": 1, "optimizer": "dowg"},
    ],
)
def test_json_keeps_everything(options):
    recipe = Recipe(**options)
    values = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
    assert Recipe.from_json(values) == recipe
    assert {name: values[name] for name in options} == options


def test_json_that_was_edited_is_checked_again():
    values = Recipe().to_json()
    with pytest.raises(OptionError, match="batch_size=0"):
        Recipe.from_json({**values, "batch_size": 0})


# --- what it amounts to ----------------------------------------------------------------------------------------------
def test_the_default():
    recipe = Recipe()
    assert (recipe.the_optimizer.name, recipe.schedule, recipe.first_eta) == ("auto", "constant", 0.5)
    assert recipe.average_kind == kernels.AVERAGE_POLYNOMIAL
    assert (recipe.penalty, recipe.batch_size) == (None, 256)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, kernels.AVERAGE_POLYNOMIAL),
        ({"average": False}, kernels.AVERAGE_NONE),
        ({"average": 0}, kernels.AVERAGE_NONE),
        ({"optimizer": "sgd"}, kernels.AVERAGE_NONE),
        ({"optimizer": "sgd", "average": True}, kernels.AVERAGE_UNIFORM),
        ({"optimizer": "sgd", "average": 10}, kernels.AVERAGE_UNIFORM),
        ({"optimizer": "adam"}, kernels.AVERAGE_NONE),
        ({"optimizer": "adam", "average": True}, kernels.AVERAGE_POLYNOMIAL),
        ({"optimizer": "adagrad"}, kernels.AVERAGE_NONE),
        ({"optimizer": "dowg"}, kernels.AVERAGE_POLYNOMIAL),
    ],
)
def test_average_kind(options, kind):
    assert Recipe(**options).average_kind == kind


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_eta(name):
    assert Recipe(optimizer=name).first_eta == OPTIMIZERS[name].eta0
    if name != "dowg":
        assert Recipe(optimizer=name, eta0=0.125).first_eta == 0.125


def test_n_outputs():
    assert [Recipe().n_outputs(n, 0) for n in (1, 4)] == [1, 4]
    classify = Recipe(task="classification", loss="hinge")
    assert [classify.n_outputs(1, n) for n in (2, 3)] == [1, 3]


def test_packing():
    recipe = Recipe(
        loss="quantile",
        quantile=0.9,
        penalty="elasticnet",
        alpha=0.5,
        l1_ratio=0.25,
        optimizer="sgd",
        learning_rate="invscaling",
        eta0=0.3,
        power_t=0.7,
        momentum=0.6,
        nesterov=True,
        average=40,
        fit_intercept=False,
    )
    packed = recipe.pack(n_classes=0, n_updates=77, mean_weight=1.5, moments=True)
    codes, params = packed.codes, packed.params
    assert codes.dtype == np.int64
    assert params.dtype == np.float64
    assert codes[kernels.CODE_LOSS] == kernels.QUANTILE
    assert codes[kernels.CODE_OPTIMIZER] == kernels.SGD
    assert codes[kernels.CODE_SCHEDULE] == kernels.INVSCALING
    assert codes[kernels.CODE_AVERAGE] == kernels.AVERAGE_UNIFORM
    places = [kernels.CODE_SOFTMAX, kernels.CODE_CLASSES, kernels.CODE_INTERCEPT]
    assert codes[[*places, kernels.CODE_NESTEROV, kernels.CODE_MOMENTS]].tolist() == [0, 0, 0, 1, 1]
    expected = {
        kernels.PARAM_OVER: 0.1,
        kernels.PARAM_UNDER: 0.9,
        kernels.PARAM_L1: 0.125,
        kernels.PARAM_L2: 0.375,
        kernels.PARAM_ETA0: 0.3,
        kernels.PARAM_POWER_T: 0.7,
        kernels.PARAM_MOMENTUM: 0.6,
        kernels.PARAM_N_UPDATES: 77,
        kernels.PARAM_AVERAGE_FROM: 40,
        kernels.PARAM_MEAN_WEIGHT: 1.5,
        kernels.PARAM_ALPHA: 0.5,
    }
    assert {place: params[place] for place in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("loss", "n_classes", "softmax"), [("log_loss", 2, 0), ("log_loss", 3, 1), ("hinge", 3, 0)])
def test_softmax_is_for_three_classes_of_log_loss(loss, n_classes, softmax):
    recipe = Recipe(task="classification", loss=loss)
    packed = recipe.pack(n_classes=n_classes, n_updates=1, mean_weight=1, moments=False)
    assert packed.codes[kernels.CODE_SOFTMAX] == softmax


def test_codes_and_params_have_one_place_each():
    for prefix, size in (("CODE_", kernels.N_CODES), ("PARAM_", kernels.N_PARAMS)):
        places = [value for name, value in vars(kernels).items() if name.startswith(prefix)]
        assert sorted(places) == list(range(size))
