"""The connection to a Dask scheduler that the command line was given."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from streamgd.errors import ClusterError

#: Seconds until a scheduler that does not answer is given up.
_CONNECT_S = 30


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a scheduler for the length of a block.

    Parameters
    ----------
    address : str or None
        Such as ``tcp://host:8786``; None connects to nothing.

    Yields
    ------
    distributed.Client or None
        None without an address.

    Raises
    ------
    ClusterError
        If it does not answer.
    """
    if address is None:
        yield None
        return
    from distributed import Client

    try:
        asyncio.run(_reach(address))
        client: Any = Client(address, timeout=_CONNECT_S, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as err:  # the last: a greeting read as a length
        why = f"nobody answered within {_CONNECT_S} s" if isinstance(err, TimeoutError) else str(err)
        raise ClusterError(
            f"no scheduler at {address!r} ({type(err).__name__}: {why}): start one with `dask scheduler`, and workers "
            "with `dask worker ADDRESS`; it says its address, such as tcp://host:8786"
        ) from err
    with _quiet_logs(), client:
        yield client


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep Dask from logging tracebacks where a scheduler is lost: that is told once, as an error of ours."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]  # each has its own level
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


async def _reach(address: str) -> None:
    """Ask a scheduler who it is: a client would wait for whoever does not answer, and clean up for another minute."""
    from distributed.core import rpc
    from distributed.security import Security

    remote: Any = rpc
    security: Any = Security
    arguments = security().get_connection_args("client")

    async def ask() -> None:
        async with remote(address, connection_args=arguments) as scheduler:
            if (await scheduler.identity()).get("type") != "Scheduler":
                raise ValueError("something else answers there")

    await asyncio.wait_for(ask(), _CONNECT_S)
