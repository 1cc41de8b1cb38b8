"""The connection to a Dask scheduler that the command line was given."""

from __future__ import annotations

import contextlib
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
        client: Any = Client(address, timeout=_CONNECT_S, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as err:
        raise ClusterError(
            f"no scheduler at {address} ({type(err).__name__}: {err}): start one with `dask scheduler`, and workers "
            f"with `dask worker {address}`"
        ) from err
    with client:
        yield client
