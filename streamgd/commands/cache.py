"""``streamgd cache``: decode data once, so that every run over it reads plain numbers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from streamgd.commands import parameters as kinds


@click.command(short_help="Decode data once, for runs with --cache.")
@kinds.data_argument
@click.argument("folder", metavar="DIR", type=kinds.Folder())
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
@click.option(
    "--task",
    type=click.Choice(kinds.TASKS),
    help="Of the runs. It matters where classes are whole numbers from 2**53 on. [default: as the target suggests]",
)
@click.option("--buffer", default=kinds.BUFFER, show_default=True, metavar="BYTES", help="Memory to read in.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads that read. [default: all processors]")
@click.option("--quiet", is_flag=True, help="No progress: only the result, warnings and errors.")
def cache(data: tuple[str, ...], folder: Path, **given: Any) -> None:
    """Write the rows of DATA to DIR as plain numbers, for runs that name it with --cache.

    Such runs then decode nothing, from their first epoch on. They give the same result as runs that find no cache and
    write it themselves. Target, features and weight are to be the same as those of the runs. A cache that is there is
    checked, and written anew if it is damaged or the data has changed.
    """
    from streamgd.commands.choosing import choose_task
    from streamgd.commands.reading import open_data
    from streamgd.data.cache import Cache
    from streamgd.data.cache_writer import write_epoch
    from streamgd.data.layout import format_bytes, parse_bytes, plan_layout
    from streamgd.data.stream import find_classes
    from streamgd.data.targets import TargetCodec
    from streamgd.errors import CacheError, CorruptDataError, RunLockedError
    from streamgd.run.caching import needs
    from streamgd.run.inspection import about_data, entry

    source = open_data(
        data,
        target=kinds.split_names((given["target"],)),
        features=kinds.split_names(given["features"]),
        weight=given["weight"],
    )
    assert source.target is not None
    n_outputs = source.target.n_outputs if source.target.numeric else 1
    layout = plan_layout(source, parse_bytes(given["buffer"]), n_outputs=n_outputs, carry_rows=1)
    task, _ = choose_task(source.target, task=given["task"])
    codec = TargetCodec(None, n_outputs) if task == "regression" else find_classes(source)
    made = Cache(folder, source, codec)
    say = _silent if given["quiet"] else _say
    if made.is_whole:
        try:
            made.open().require_whole()
        except CorruptDataError as err:
            _say(f"warning: {err}")
        else:
            click.echo(f"nothing to do: the cache is in {made.path}, and whole")
            return
    try:
        writer = made.begin()
    except OSError as err:
        raise CacheError(
            f"no cache can be written to {made.path}: {err.strerror}: make room, or choose another folder"
        ) from err
    if writer is None:
        raise RunLockedError(f"another process writes the cache in {made.path}: wait until it is done")
    for line in (*about_data(source), entry("cache", needs(made))):
        say(line)
    began = shown = time.monotonic()
    for n_rows in write_epoch(made, writer, codec, layout, n_threads=given["threads"]):
        now = time.monotonic()
        if now - shown >= 1.0:
            shown = now
            left_s = (now - began) * (source.n_rows / n_rows - 1)
            say(f"{n_rows:,} of {source.n_rows:,} rows, {n_rows / (now - began):,.0f} a second, {left_s:,.0f} s left")
    click.echo(f"{source.n_rows:,} rows, {format_bytes(made.needed_bytes)}, in {made.path}")
    say(f"train with --cache {os.fspath(folder)}")


def _say(text: str) -> None:
    click.echo(text, file=sys.stderr)


def _silent(text: str) -> None:
    """Say nothing."""
