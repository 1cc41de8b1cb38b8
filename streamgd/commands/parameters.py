"""Kinds of options, and the names that options can choose among.

The names are written out because the tables they come from, in `streamgd.learn`, take a second to import; a test holds
the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


Callback = Callable[[click.Context, click.Parameter, str | None], Any]


def number_or(kind: type[int] | type[float], *words: str, at_least: float | None = None) -> Callback:
    """Return what reads an option that takes a number, or one of a few words.

    Parameters
    ----------
    kind : {int, float}
        Which numbers.
    words : str
        Accepted beside numbers.
    at_least : float, optional
        The smallest number.
    """

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        if value is None or value.lower() in words:
            return None if value is None else value.lower()
        try:
            number = kind(value)
        except ValueError:
            number = None
        if number is None or number != number or (at_least is not None and number < at_least):
            least = "" if at_least is None else f" of at least {at_least:g}"
            also = "".join(f", or {word!r}" for word in words)
            what = "a whole number" if kind is int else "a number"
            raise click.BadParameter(f"{value!r} is not {what}{least}{also}")
        return number

    return read


def read_class_weights(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """Read ``balanced``, or label=weight pairs with commas between them, as a dict of the labels' text to numbers."""
    if value is None or value == "balanced":
        return value
    weights: dict[str, float] = {}
    for pair in value.split(","):
        label, equals, number = pair.rpartition("=")
        try:
            weights[label.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise click.BadParameter(
                f"{pair!r} is not a label, '=' and a number, such as 'spam=2.5'; or say 'balanced'"
            )
    return weights


def split_names(given: tuple[str, ...]) -> list[str] | None:
    """Gather names given in one option with commas, in several options, or both; None if there is none."""
    names = [name.strip() for text in given for name in text.split(",")]
    return [name for name in names if name] or None


def read_target(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> str | None:
    """Join the names of targets, given in one option or in several; refuse those that name nothing."""
    for names in value:
        if split_names((names,)) is None:
            raise click.BadParameter(f"{names!r} names no column")
    return ",".join(value) or None


class Folder(click.Path):
    """The path of a folder, whether it is there or not; an empty one is a slip, and not the folder one works in."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if value == "":
            self.fail("'' is no path: name a folder", param, ctx)
        return super().convert(value, param, ctx)


def data_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its data."""
    return click.argument("data", nargs=-1, required=True, metavar="DATA…")(command)


def features_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option that names the features."""
    return click.option(
        "--features",
        metavar="A,B,C",
        multiple=True,
        help="Feature columns, or HDF5 datasets; may be given several times. "
        "[default: every column but target and weight, or the dataset X; with RUN, those it was trained on]",
    )(command)


def weight_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option that names the weights."""
    return click.option("--weight", metavar="NAME", help="Column or dataset of sample weights.")(command)


def running_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that change how a run goes, but not what it computes."""
    for option in (
        click.option(
            "--workers-timeout",
            type=click.FloatRange(0),
            default=300.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait for workers where the cluster has none.",
        ),
        click.option("--scheduler", metavar="ADDRESS", help="Train on the workers of this Dask scheduler."),
        click.option("--quiet", is_flag=True, help="No progress: only the result, warnings and errors."),
        click.option(
            "--cache",
            type=Folder(),
            metavar="DIR",
            help="Decode the rows once, to DIR, and read later epochs from there, mixed as if shuffled whole.",
        ),
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
