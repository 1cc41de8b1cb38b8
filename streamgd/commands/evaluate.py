"""``streamgd evaluate``: how good a run's model is on data with a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamgd.commands import parameters as kinds

if TYPE_CHECKING:
    from streamgd.run.scoring import Evaluation

#: What the metrics are, for people.
_MEANING = {
    "loss": "mean {loss} loss",
    "mse": "mean squared error",
    "rmse": "its root",
    "mae": "mean absolute error",
    "r2": "R², share of the variance explained",
    "accuracy": "share of rows whose class is right",
    "log_loss": "mean −log probability of the class",
}


@click.command(short_help="Judge a run's model by data with a target.")
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@kinds.data_argument
@click.option(
    "--target",
    multiple=True,
    callback=kinds.read_target,
    metavar="NAME",
    help="What the target is called here. [default: as trained]",
)
@kinds.features_option
@click.option("--weight", metavar="NAME", help="Column or dataset of sample weights. [default: as trained]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    run_path: Path,
    data: tuple[str, ...],
    target: str | None,
    features: tuple[str, ...],
    weight: str | None,
    as_json: bool,
) -> None:
    """Judge the model of the folder RUN by DATA, which has a target."""
    from streamgd.commands.reading import known_target, known_weight, load, open_for_model
    from streamgd.run.scoring import evaluate as evaluate_model

    saved = load(run_path)
    source = open_for_model(
        saved,
        data,
        features=kinds.split_names(features),
        target=kinds.split_names((target,)) if target else known_target(saved),
        weight=weight or known_weight(saved),
    )
    trained = saved.trained
    found = evaluate_model(trained.model(), source, trained.config.recipe)
    labels = None if trained.survey.codec.classes is None else trained.survey.codec.classes.tolist()
    if as_json:
        click.echo(json.dumps(_as_json(found, labels)))
        return
    click.echo(f"{'rows':<12}{found.n_rows:,}{'' if not source.has_weight else ', weighted'}")
    for name, value in found.metrics.items():
        click.echo(f"{name:<12}{value:<12.6g}{_MEANING[name].format(loss=trained.config.recipe.loss)}")
    for line in _confusion_lines(found, labels):
        click.echo(line)


def _as_json(found: Evaluation, labels: list[Any] | None) -> dict[str, Any]:
    shown: dict[str, Any] = {"n_rows": found.n_rows, "n_unknown": found.n_unknown, **found.metrics}
    if found.confusion is not None and labels is not None:
        shown |= {"classes": [_plain(label) for label in labels], "confusion": found.confusion.tolist()}
    return shown


def _plain(label: Any) -> Any:
    return label if isinstance(label, str | int | float | bool) else str(label)


def _confusion_lines(found: Evaluation, labels: list[Any] | None) -> list[str]:
    lines = []
    if found.n_unknown:
        lines.append(f"{found.n_unknown:,} rows are of classes that the model does not know; they count as wrong")
    if found.confusion is None or labels is None:
        return lines
    heads = ["true \\ predicted", *map(str, labels)]
    rows = [
        [head, *(f"{count:,}" for count in counts)]
        for head, counts in zip(heads[1:], found.confusion.tolist(), strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    table = ("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in (heads, *rows))
    return [*lines, *table]
