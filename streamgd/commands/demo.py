"""``streamgd demo``: see `streamgd.demo`."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import click


@click.command(short_help="Show on made-up data that a killed run loses nothing.")
@click.option("--dir", "parent", type=click.Path(path_type=Path), help="Where to work. [default: a temporary folder]")
@click.option("--keep", is_flag=True, help="Leave data and runs there.")
@click.option("--rows", type=click.IntRange(200_000), default=600_000, show_default=True, help="Rows of the data.")
def demo(parent: Path | None, keep: bool, rows: int) -> int:
    """Make data larger than its buffer, train, kill the run half-way, resume it, and show that nothing was lost."""
    from streamgd.demo import run_demo

    began = time.perf_counter()
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="streamgd-demo-", dir=parent))
    try:
        good = run_demo(folder, rows, click.echo)
    finally:
        if keep:
            click.echo(f"\ndata and runs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    took = f"({time.perf_counter() - began:.0f} s)"
    click.echo(f"\nas promised: killed runs lost nothing {took}" if good else f"\nNOT as promised {took}")
    return 0 if good else 1
