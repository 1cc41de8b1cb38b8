"""The command line: parse, call, print. Errors become one message and a status that scripts can test.

=====  =====================================================================
0      done
2      something is wrong with the options, the data or the run's folder
130    stopped by SIGINT; what `train` and `resume` had learnt is saved
143    stopped by SIGTERM, likewise
=====  =====================================================================

Anything else is a bug of streamgd's, which ends in a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

import streamgd
from streamgd.commands.cache import cache
from streamgd.commands.demo import demo
from streamgd.commands.evaluate import evaluate
from streamgd.commands.inspect import inspect
from streamgd.commands.predict import predict
from streamgd.commands.signals import Interrupted, StopRequest
from streamgd.commands.train import resume, train
from streamgd.errors import StreamgdError

#: Exit status of every error that is not a bug.
FAILED = 2


#: A line of its own for each example (click joins the lines of a paragraph that does not begin with a backspace).
_HELP = """Linear models of tables larger than memory: HDF5 and Parquet in, coefficients out.

\b
streamgd inspect data.parquet --target y
streamgd train data.parquet --target y --run run
streamgd resume run
streamgd evaluate run test.parquet
streamgd predict run new.parquet --output predictions.parquet
"""


@click.group(
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Each command has its own --help.",
)
@click.version_option(streamgd.__version__, message="streamgd %(version)s")
def cli() -> None:
    """Hold the commands together."""


for _command in (train, resume, predict, evaluate, inspect, cache, demo):
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    args : sequence of str, optional
        What stands behind ``streamgd``; the process's own arguments by default.

    Returns
    -------
    int
        The exit status.
    """
    with StopRequest() as stop:
        try:
            status = cli.main(args, prog_name="streamgd", standalone_mode=False, obj=stop)
        except click.ClickException as err:
            err.show()
            return err.exit_code
        except (Interrupted, click.Abort):
            if not stop.told:
                click.echo(f"stopped by {stop.name}", err=True)
            return stop.status
        except (StreamgdError, OSError) as err:
            click.echo(f"streamgd: error: {_message(err)}", err=True)
            return FAILED
    return status if isinstance(status, int) else 0


def _message(err: Exception) -> str:
    if isinstance(err, OSError) and not isinstance(err, StreamgdError) and err.strerror:
        return f"{err.filename}: {err.strerror}" if err.filename else err.strerror
    return str(err)
