"""``streamgd predict``: a run's model applied to data, the result a Parquet or CSV file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from streamgd.commands import parameters as kinds


@click.command(short_help="Predict for each row, into a Parquet or CSV file.")
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@kinds.data_argument
@click.option(
    "--output",
    required=True,
    metavar="FILE.parquet",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the predictions go, one row for each row of DATA; FILE.csv writes CSV.",
)
@click.option("--proba", is_flag=True, help="Write the probability of each class.")
@kinds.features_option
def predict(run_path: Path, data: tuple[str, ...], output: Path, proba: bool, features: tuple[str, ...]) -> None:
    """Predict for each row of DATA with the model of the folder RUN.

    The columns are those it was trained on, by name; others, such as the target, are ignored. Neither the data nor the
    result is ever held in memory.
    """
    from streamgd.commands.reading import load, open_for_model
    from streamgd.data.sources.files import find_files
    from streamgd.errors import OptionError
    from streamgd.run.predictions import write_predictions

    saved = load(run_path)
    if any(os.path.realpath(path) == os.path.realpath(output) for path in find_files(list(data)).paths):
        raise OptionError(f"--output {output} is one of the files to read: choose another name")
    source = open_for_model(saved, data, features=kinds.split_names(features))
    n_rows = write_predictions(saved.trained.model(), source, output, proba=proba)
    click.echo(f"{n_rows:,} predictions in {output}")
