"""Kinds of options, and the names that options can choose among.

The names are written out because the tables they come from, in `streamgd.learn`, take a second to import; a test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

TASKS = ("regression", "classification")
LOSSES = (
    "squared_error",
    "huber",
    "epsilon_insensitive",
    "squared_epsilon_insensitive",
    "quantile",
    "log_loss",
    "hinge",
    "squared_hinge",
    "modified_huber",
    "perceptron",
)
PENALTIES = ("none", "l2", "l1", "elasticnet")
OPTIMIZERS = ("auto", "sgd", "adagrad", "adam", "dowg")
LEARNING_RATES = ("auto", "constant", "optimal", "invscaling", "adaptive", "cosine")
STANDARDIZE = ("true", "full", "false")
DTYPES = ("auto", "float32", "float64")
BUFFER = "256MB"


class NumberOr(click.ParamType):
    """A number, or one of a few words.

    Parameters
    ----------
    kind : {int, float}
        Which numbers.
    words : str
        Accepted beside numbers.
    at_least : float, optional
        The smallest number.
    """

    def __init__(self, kind: type[int] | type[float], *words: str, at_least: float | None = None) -> None:
        self.name = "|".join(("integer" if kind is int else "number", *words))
        self._kind, self._words, self._at_least = kind, words, at_least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or the word."""
        if not isinstance(value, str) or value.lower() in self._words:
            return value.lower() if isinstance(value, str) else value
        try:
            number = self._kind(value)
        except ValueError:
            number = None
        if number is None or number != number or (self._at_least is not None and number < self._at_least):
            least = "" if self._at_least is None else f" of at least {self._at_least:g}"
            words = "".join(f", or {word!r}" for word in self._words)
            self.fail(f"{value!r} is not {'a whole number' if self._kind is int else 'a number'}{least}{words}")
        return number


class Labels(click.ParamType):
    """Class weights: ``balanced``, or label=weight pairs with commas between them."""

    name = "balanced|label=weight,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word, or a dict of the labels' text to numbers."""
        if not isinstance(value, str) or value == "balanced":
            return value
        weights: dict[str, float] = {}
        for pair in value.split(","):
            label, equals, number = pair.rpartition("=")
            try:
                weights[label.strip()] = float(number)
            except ValueError:
                equals = ""
            if not equals:
                self.fail(f"{pair!r} is not a label, '=' and a number, such as 'spam=2.5'; or say 'balanced'")
        return weights


def split_names(given: tuple[str, ...]) -> list[str] | None:
    """Gather names given in one option with commas, in several options, or both; None if there is none."""
    names = [name.strip() for text in given for name in text.split(",")]
    return [name for name in names if name] or None


def data_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its data."""
    return click.argument("data", nargs=-1, required=True, metavar="DATA…")(command)


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say what is read."""
    for option in (
        click.option("--weight", metavar="NAME", help="Column or dataset of sample weights."),
        click.option(
            "--features",
            metavar="A,B,C",
            multiple=True,
            help="Feature columns, or HDF5 datasets; may be given several times. "
            "[default: every column but target and weight; the dataset X]",
        ),
    ):
        command = option(command)
    return command


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that change how a run goes, but not what it computes."""
    for option in (
        click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
        click.option(
            "--checkpoint-every",
            type=click.FloatRange(0),
            default=60.0,
            show_default=True,
            metavar="SECONDS",
            help="Time between two checkpoints; each epoch's end has one too.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1),
            metavar="N",
            help="Threads that read; no result depends on it. [default: one for each processor]",
        ),
    ):
        command = option(command)
    return command
