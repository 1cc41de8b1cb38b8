"""What defines a run: what is refused, how many epochs there are, and the way through JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from streamgd.errors import OptionError
from streamgd.learn.recipe import Recipe
from streamgd.run.config import Config, RunOptions, differences

CLASSIFIER = Recipe(task="classification", loss="log_loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": 0}, "max_iter=0: expected 'auto' or a number of epochs"),
        ({"max_iter": 1.5}, "max_iter=1.5"),
        ({"max_iter": True}, "max_iter=True"),
        ({"max_iter": "many"}, "max_iter='many'"),
        ({"tol": "small"}, "tol='small': expected 'auto', None or a number"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"tol": False}, "tol=False"),
        ({"n_iter_no_change": 0}, "n_iter_no_change=0"),
        ({"seed": -1}, "random_state=-1"),
        ({"seed": 0.0}, "random_state=0.0"),
        ({"standardize": "half"}, "standardize='half': expected True, 'full' or False"),
        ({"shuffle": "yes"}, "shuffle='yes'"),
        ({"class_weight": "balanced"}, "class_weight needs a classification"),
        ({"class_weight": {0: 1.0}}, "class_weight needs a classification"),
        ({"class_weight": [1.0], "recipe": CLASSIFIER}, r"class_weight=\[1.0\]: expected None, 'balanced' or a dict"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_threads": 0}, "n_threads=0: expected None or a whole number of at least 1"),
        ({"n_threads": 2.0}, "n_threads=2.0"),
        ({"checkpoint_every_s": -1}, "checkpoint_every_s=-1: expected seconds"),
        ({"checkpoint_every_s": None}, "checkpoint_every_s=None"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RunOptions(**options)
    assert RunOptions(n_threads=np.int64(3), checkpoint_every_s=0).n_threads == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "n_epochs"),
    [
        (1, 256, 1000),  # never more than 1,000
        (2560, 256, 1000),
        (2561, 256, 910),  # 11 updates an epoch: the last, smaller batch counts
        (256 * 10_000, 256, 1),
        (256 * 10_000 - 256, 256, 2),
        (10**9, 256, 1),
        (10**4, 1, 1),
        (4000, 10, 25),
    ],
)
def test_epochs_by_default_make_ten_thousand_updates(n_rows: int, batch_size: int, n_epochs: int) -> None:
    config = Config(recipe=Recipe(batch_size=batch_size))
    assert config.n_epochs(n_rows) == n_epochs
    assert replace(config, max_iter=7).n_epochs(n_rows) == 7


def test_tol_in_units_of_the_loss() -> None:
    assert Config().absolute_tol(50.0) == pytest.approx(5e-4)
    assert Config(tol=None).absolute_tol(50.0) is None
    assert Config(tol=0.25).absolute_tol(50.0) == 0.25
    assert Config(tol=-np.inf).absolute_tol(50.0) == -np.inf


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(recipe=Recipe(loss="quantile", quantile=0.9, penalty="elasticnet", batch_size=17), tol=None, max_iter=3),
        Config(recipe=Recipe(optimizer="sgd", learning_rate="optimal", average=40), standardize="full", shuffle=False),
        Config(recipe=CLASSIFIER, class_weight="balanced", tol=1e-3, seed=2**62),
        Config(recipe=CLASSIFIER, class_weight={0: 1.0, 1: 2.5}),
        Config(recipe=CLASSIFIER, class_weight={"no": 1.0, "yes": 2.5}, standardize=False),
        Config(recipe=CLASSIFIER, class_weight={False: 1.0, True: 2.5}),
    ],
)
def test_json_and_back(config: Config) -> None:
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    if isinstance(config.class_weight, dict):
        assert isinstance(again.class_weight, dict)
        assert [type(label) for label in again.class_weight] == [type(label) for label in config.class_weight]


def test_numbers_of_numpy_are_the_same_configuration() -> None:
    numpy = Config(
        recipe=Recipe(task="classification", loss="log_loss", alpha=np.float32(0.5), batch_size=np.int32(8)),
        max_iter=np.int64(3),  # type: ignore[arg-type]
        tol=np.float64(0.1),
        seed=np.uint8(4),  # type: ignore[arg-type]
        shuffle=np.True_,  # type: ignore[arg-type]
        class_weight={np.int64(1): np.float64(2.0), np.str_("a"): 1},
    )
    plain = Config(
        recipe=Recipe(task="classification", loss="log_loss", alpha=0.5, batch_size=8),
        max_iter=3,
        tol=0.1,
        seed=4,
        class_weight={1: 2.0, "a": 1.0},
    )
    assert json.dumps(numpy.to_json()) == json.dumps(plain.to_json())


@pytest.mark.parametrize(
    ("recipe", "standardize", "expected"),
    [
        (Recipe(), False, False),
        (Recipe(optimizer="sgd"), True, False),
        (Recipe(optimizer="sgd"), False, True),
        (Recipe(learning_rate="constant"), False, True),
        (Recipe(optimizer="adam"), False, False),
    ],
)
def test_when_the_intercept_starts_at_zero(recipe: Recipe, standardize: bool, expected: bool) -> None:
    assert Config(recipe=recipe, standardize=standardize).starts_at_zero is expected


class TestDifferences:
    def test_each_entry_with_both_values(self) -> None:
        found = differences({"a": 1, "b": None, "c": [1, 2]}, {"a": 2, "b": None, "c": [1, 2], "d": "new"})
        assert found == ["a: 1 then, 2 now", "d: None then, 'new' now"]

    def test_nested_entries_are_named(self) -> None:
        old = {"files": [{"name": "a", "rows": 3}, {"name": "b", "rows": 4}]}
        new = {"files": [{"name": "a", "rows": 3}, {"name": "b", "rows": 5}]}
        assert differences(old, new) == ["files[1].rows: 4 then, 5 now"]
        assert differences(old, {"files": old["files"][:1]}) == [
            f"files: {old['files']!r} then, {old['files'][:1]!r} now"
        ]

    def test_a_message_stays_readable(self) -> None:
        found = differences({str(k): 0 for k in range(1000)}, {})
        assert len(found) == 11
        assert found[-1] == "… and 990 more"

    def test_none_between_equals(self) -> None:
        assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []
