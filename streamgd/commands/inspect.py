"""``streamgd inspect``: what data is made of, and what training on it would take. Reads no rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from streamgd.commands import parameters as kinds

if TYPE_CHECKING:
    from streamgd.commands.columns import StoredColumn
    from streamgd.data.sources.base import Source

#: Columns that are listed; of the rest, the number.
_LISTED = 30


@click.command(short_help="Say what data is made of, and what training would take.")
@kinds.data_argument
@click.option(
    "--target",
    multiple=True,
    callback=kinds.read_target,
    metavar="NAME",
    help="Target column or dataset, if it is known; several columns with commas.",
)
@kinds.features_option
@kinds.weight_option
@click.option("--buffer", default=kinds.BUFFER, show_default=True, metavar="BYTES", help="Memory to plan with.")
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Rows behind one update.")
@click.option("--lanes", type=click.IntRange(1), default=1, show_default=True, help="Lanes to plan for.")
@click.option("--dtype", type=click.Choice(kinds.DTYPES), default="auto", show_default=True, help="Of rows in memory.")
def inspect(data: tuple[str, ...], **given: Any) -> None:
    """Say what DATA is made of, what training on it would take, and how well its rows would be mixed."""
    from streamgd.commands.columns import stored_columns
    from streamgd.commands.reading import open_data
    from streamgd.data.layout import parse_bytes
    from streamgd.learn.recipe import Recipe
    from streamgd.run.config import Config
    from streamgd.run.inspection import about_blocks, about_cache, about_data, about_lanes, about_plan
    from streamgd.run.runs import least_state_bytes, plan_for

    target = kinds.split_names((given["target"],)) if given["target"] else None
    features, weight = kinds.split_names(given["features"]), given["weight"]
    columns = stored_columns(data)
    # First what is there: it is what helps if something about it cannot be used.
    for line in _list_columns(columns):
        click.echo(line)
    others = [column for column in columns if column.name not in {*(target or []), weight} and not column.is_index]
    unusable = [column for column in others if not column.is_number] if features is None else []
    if unusable:
        features = [column.name for column in others if column.is_number] or None
    source = open_data(data, target=target, features=features, weight=weight, dtype=given["dtype"])
    for line in (*about_data(source), *about_blocks(source), *_about_target(source)):
        click.echo(line)
    if unusable:
        for line in _about_unusable(unusable, features):
            click.echo(line)
    config = Config(
        recipe=Recipe(batch_size=given["batch_size"]), buffer_bytes=parse_bytes(given["buffer"]), n_lanes=given["lanes"]
    )
    layout = plan_for(source, config)
    state_bytes = least_state_bytes(source, config)
    lanes = about_lanes(config.n_lanes, config.batch_rows(source.n_rows), layout, source, state_bytes)
    for line in (*about_plan(source, layout, state_bytes), *lanes, *about_cache(source)):
        click.echo(line)


def _list_columns(columns: list[StoredColumn]) -> list[str]:
    from streamgd.run.inspection import entry

    if not columns:
        return []
    shown = columns[:_LISTED]
    width = max(len(column.name) for column in shown)
    lines = [entry("stored" if i == 0 else "", f"{c.name:<{width}}  {c.text}".rstrip()) for i, c in enumerate(shown)]
    if len(columns) > _LISTED:
        lines.append(entry("", f"… ({len(columns) - _LISTED:,} more)"))
    return lines


def _about_target(source: Source) -> list[str]:
    from streamgd.commands.choosing import choose_task
    from streamgd.run.inspection import entry

    if source.target is None:
        return [entry("target", "none given; name it with --target to see how it would be learnt")]
    task, reason = choose_task(source.target)
    return [entry("target", f"{source.target.name} ({source.target.dtype}): {task} ({reason})")]


def _about_unusable(unusable: list[StoredColumn], features: list[str] | None) -> list[str]:
    from streamgd.run.inspection import entry, listed

    named = listed([f"{column.name} ({column.text})" for column in unusable])
    lines = [entry("not numbers", f"{named}: planned without; store numbers in their place, or train with")]
    lines.append(entry("", f"--features {','.join(features)}" if features and len(features) <= 30 else "--features …"))
    return lines
