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


@click.command()
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@kinds.data_argument
@click.option("--target", metavar="NAME", help="What the target is called here. [default: as trained]")
@kinds.column_options
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
    from streamgd.commands.reading import load, open_for_model
    from streamgd.run.scoring import evaluate as evaluate_model

    saved = load(run_path)
    source = open_for_model(
        saved,
        data,
        features=kinds.split_names(features),
        target=kinds.split_names((target,)) if target else saved.target_names,
        weight=weight or saved.origin.get("weight"),
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
    shown = {"n_rows": found.n_rows, "n_unknown": found.n_unknown, **found.metrics}
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
    heads = [str(label) for label in labels]
    cells = [[f"{count:,}" for count in row] for row in found.confusion.tolist()]
    width = max(len(text) for text in [*heads, *(cell for row in cells for cell in row)]) + 2
    first = max(len("true \\ predicted"), *map(len, heads)) + 1
    lines.append(f"{'true \\ predicted':<{first}}" + "".join(f"{head:>{width}}" for head in heads))
    lines += [f"{head:<{first}}" + "".join(f"{c:>{width}}" for c in row) for head, row in zip(heads, cells, strict=True)]
    return lines
