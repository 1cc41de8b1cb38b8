"""``streamgd train`` and ``streamgd resume``: a run in a folder, until it is finished or asked to stop."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamgd.commands import parameters as kinds
from streamgd.commands.signals import Interrupted, StopRequest

if TYPE_CHECKING:
    from streamgd.run.config import RunOptions
    from streamgd.run.folder import RunFolder
    from streamgd.run.progress import View
    from streamgd.run.runs import Run


@click.command(short_help="Train a model on files, in a folder of its own.")
@kinds.data_argument
@click.option("--run", "run_path", required=True, type=click.Path(path_type=Path), help="Folder for the new run.")
@click.option(
    "--target",
    multiple=True,
    callback=kinds.read_target,
    required=True,
    metavar="NAME",
    help="Target column or dataset; several columns with commas.",
)
@kinds.features_option
@kinds.weight_option
@click.option("--task", type=click.Choice(kinds.TASKS), help="[default: as loss and target suggest]")
@click.option("--loss", type=click.Choice(kinds.LOSSES), help="[default: squared_error, or log_loss]")
@click.option("--epsilon", type=float, help="Shape of huber and the epsilon-insensitive losses. [default: 0.1]")
@click.option("--quantile", type=float, help="Which quantile the quantile loss estimates. [default: 0.5]")
@click.option("--penalty", type=click.Choice(kinds.PENALTIES), default="none", show_default=True)
@click.option("--alpha", type=float, help="Strength of the penalty. [default: 0.0001]")
@click.option("--l1-ratio", type=float, help="Share of l1 in elasticnet. [default: 0.15]")
@click.option(
    "--class-weight", callback=kinds.read_class_weights, metavar="balanced|A=1,B=2.5", help="Factor of each class."
)
@click.option("--optimizer", type=click.Choice(kinds.OPTIMIZERS), default="auto", show_default=True)
@click.option("--learning-rate", type=click.Choice(kinds.LEARNING_RATES), default="auto", show_default=True)
@click.option(
    "--eta0",
    metavar="NUMBER|auto",
    callback=kinds.number_or(float, "auto"),
    help="First learning rate. [default: auto]",
)
@click.option("--power-t", type=float, help="Exponent of invscaling. [default: 0.25, 0.5 for classes]")
@click.option("--momentum", type=float, help="Momentum of sgd. [default: 0]")
@click.option("--nesterov", is_flag=True, default=None, help="Nesterov's form of momentum.")
@click.option("--average/--no-average", default=None, help="Average the coefficients. [default: as the optimizer does]")
@click.option("--batch-size", type=click.IntRange(1), help="Rows behind one update. [default: 256]")
@click.option(
    "--epochs",
    metavar="N|auto",
    callback=kinds.number_or(int, "auto", at_least=1),
    help="Passes over the data at most. [default: auto, as many as make about 10,000 updates]",
)
@click.option(
    "--tol",
    metavar="NUMBER|auto|none",
    callback=kinds.number_or(float, "auto", "none"),
    help="Fall of an epoch's loss that counts. [default: auto, 1e-5 of a constant's loss]",
)
@click.option("--n-iter-no-change", type=click.IntRange(1), help="Epochs without any that end the run. [default: 5]")
@click.option(
    "--buffer", default=kinds.BUFFER, show_default=True, metavar="BYTES", help="Memory to read and shuffle in."
)
@click.option("--no-shuffle", is_flag=True, help="Take the rows in file order.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the shuffle.")
@click.option(
    "--standardize",
    type=click.Choice(kinds.STANDARDIZE),
    default="true",
    show_default=True,
    help="Scale features by a sample's moments, by exact ones (another pass), or not.",
)
@click.option(
    "--lanes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Parts that are trained side by side and merged in rounds; the result depends on it.",
)
@click.option("--no-intercept", is_flag=True, help="Without an intercept.")
@click.option("--dtype", type=click.Choice(kinds.DTYPES), default="auto", show_default=True, help="Of rows in memory.")
@kinds.running_options
@click.pass_obj
def train(stop: StopRequest, /, data: tuple[str, ...], run_path: Path, **given: Any) -> int:
    """Train a linear model on DATA: files, folders or patterns of HDF5 or Parquet.

    The run lives in the folder that --run names. Killed at any moment, `streamgd resume` goes on with it as if nothing
    had happened.
    """
    from streamgd.commands.choosing import choose
    from streamgd.commands.reading import open_data
    from streamgd.errors import UnfitWorkerError
    from streamgd.run.config import refuse_cache
    from streamgd.run.folder import RunFolder
    from streamgd.run.runs import plan_for
    from streamgd.run.session import begin

    options, view = _options(given), _view(quiet=given["quiet"])
    RunFolder(run_path).require_free()  # before anything that takes time
    source = open_data(
        data,
        target=kinds.split_names((given["target"],)),
        features=kinds.split_names(given["features"]),
        weight=given["weight"],
        dtype=given["dtype"],
    )
    config, reasons = choose(source, given)
    # What does not fit is refused before the folder is made.
    plan_for(source, config)
    refuse_cache(config, cached=options.cache is not None, on_cluster=given["scheduler"] is not None)
    with contextlib.ExitStack() as held:
        client = held.enter_context(_cluster(given["scheduler"], options))
        if client is not None:
            from streamgd.run.members import refuse_unfit

            refuse_unfit(client, source, config)
        folder = held.enter_context(RunFolder(run_path))
        try:
            view.say([f"surveying {source.name}: target, and a sample of the features"])
            run = begin(folder, source, config, cache=options.cache)
        except Interrupted:
            if folder.holds_run:
                _say_stopped(stop, run_path, "before the first update")
            raise
        try:
            return _train(run, folder, options, view, stop, reasons, client)
        except UnfitWorkerError:  # perhaps other options help, with which a run begins anew
            folder.discard()
            raise


@click.command(short_help="Go on with a run that was stopped or killed.")
@click.argument("run_path", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--epochs", type=click.IntRange(1), help="Passes over the data at most, those done included.")
@click.option("--data", "data", multiple=True, metavar="PATH", help="Where the data lies now, if it was moved.")
@kinds.running_options
@click.pass_obj
def resume(stop: StopRequest, /, run_path: Path, epochs: int | None, data: tuple[str, ...], **given: Any) -> int:
    """Go on with the run in the folder RUN, exactly as if it had not been stopped."""
    from streamgd.commands.reading import open_again
    from streamgd.errors import OptionError
    from streamgd.run.config import Config
    from streamgd.run.folder import RunFolder
    from streamgd.run.session import description_of, go_on, with_epochs

    described = description_of(RunFolder(run_path))  # before the folder is made or locked
    if described.get("cache") is not None and given["scheduler"] is not None:
        raise OptionError(
            f"the run {run_path} has a cache ({described['cache']}), which is for one machine: resume it without "
            "--scheduler"
        )
    given["cache"] = given["cache"] or described.get("cache")
    options, view = _options(given), _view(quiet=given["quiet"])
    with _cluster(given["scheduler"], options) as client, RunFolder(run_path) as folder:
        source = open_again(described, data)
        config = with_epochs(Config.from_json(described["config"]), epochs)
        try:
            run = go_on(folder, source, config, report=view.message)
        except Interrupted:
            _say_stopped(stop, run_path, "where it was before")
            raise
        return _train(run, folder, options, view, stop, {}, client)


@contextlib.contextmanager
def _cluster(scheduler: str | None, options: RunOptions) -> Iterator[Any]:
    """Connect to a scheduler, if there is one, whose workers then take part in the survey too."""
    from streamgd.commands.clusters import connected
    from streamgd.data.sources.dask_clients import computing_on

    with connected(scheduler) as client, computing_on(client, options.workers_timeout_s):
        yield client


def _train(
    run: Run,
    folder: RunFolder,
    options: RunOptions,
    view: View,
    stop: StopRequest,
    reasons: dict[str, str],
    client: Any,
) -> int:
    """Train, and say how it ended; return the exit status."""
    from streamgd.run.inspection import decisions, outcome, standing
    from streamgd.run.loop import train as train_run

    if run.finished:
        for line in outcome(run, folder.path, resumed=True):
            click.echo(line)
        return 0
    for text in decisions(run, folder.path, options, reasons):
        view.say([text])
    with view, stop.deferred():
        finished = train_run(run, options=options, folder=folder, watcher=view, stop=stop.event, client=client)
    if not finished:
        _say_stopped(stop, folder.path, f"{standing(run)}, and saved")
        return stop.status
    for line in outcome(run, folder.path, resumed=False):
        click.echo(line)
    return 0


def _say_stopped(stop: StopRequest, path: Path, where: str) -> None:
    command = f"streamgd resume {shlex.quote(str(path))}"
    click.echo(f"stopped by {stop.name} {where}; go on with: {command}", err=True)
    stop.told = True


def _options(given: dict[str, Any]) -> RunOptions:
    from streamgd.run.caching import cache_folder
    from streamgd.run.config import RunOptions

    return RunOptions(
        n_threads=given["threads"],
        checkpoint_every_s=given["checkpoint_every"],
        workers_timeout_s=given["workers_timeout"],
        cache=cache_folder(given["cache"]),
    )


def _view(*, quiet: bool) -> View:
    from streamgd.run.progress import choose_view

    return choose_view(sys.stderr, quiet=quiet, term=os.environ.get("TERM"))
