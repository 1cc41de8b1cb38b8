"""Where Numba comes in: it takes arrays apart, releases the GIL, and keeps compiled code on disk.

What is compiled is written by `batch` and `measures`. The name of a compiled function, which is that of its files in
the cache, holds its types and a hash of the source (`streamgd.compiling`); whoever finds a file finds the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from streamgd.compiling import digest, kept
from streamgd.learn.kernels import batch, measures
from streamgd.learn.kernels.llvm import Code, Pointer, Value

Writer = Callable[[Code, dict[str, Pointer], dict[str, list[Value]]], None]

#: Names of the arrays that compiled functions take, in their order.
CONSUME = (
    *("X", "y", "weight", "ids", "cursor", "theta", "average", "slots", "subgradient"),
    *("scalars", "counters"),
    *("carry_X", "carry_y", "carry_weight", "checksum", "moments", "codes", "params", "class_weight", "target_scale"),
    *("places", "doubles", "narrow"),
)
MEAN_LOSS = ("y", "weight", "decisions", "codes", "params", "class_weight", "work", "result")
ADD_MOMENTS = ("X", "weight", "mean", "squares", "total", "n_rows")

#: The files that compiled code is written by, besides `streamgd.learn.codes`.
SOURCES = ("arithmetic", "batch", "entries", "llvm", "losses", "measures", "rows", "steps")


def instruction(names: tuple[str, ...], write: Writer) -> Any:
    """Make an instruction for Numba of something that writes code.

    Parameters
    ----------
    names : tuple of str
        Names of the arrays that it takes, in one tuple; they must be C-contiguous.
    write : callable
        write(code, arrays, shapes) writes the code, with pointers to the arrays and their shapes by name.
    """

    def typed(typingctx: Any, arrays: Any) -> Any:
        if any(array.layout != "C" for array in arrays):
            return None

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            code, pointers, shapes = Code(builder), {}, {}
            for i, (name, kind) in enumerate(zip(names, signature.args[0], strict=True)):
                struct = context.make_array(kind)(context, builder, builder.extract_value(args[0], i))
                pointers[name] = Pointer(code, struct.data)
                shapes[name] = [Value(code, builder.extract_value(struct.shape, axis)) for axis in range(kind.ndim)]
            write(code, pointers, shapes)
            return context.get_dummy_value()

        return types.void(arrays), codegen

    return intrinsic(typed)


_consume = instruction(CONSUME, batch.consume)
_mean_loss = instruction(MEAN_LOSS, measures.mean_loss)
_add_moments = instruction(ADD_MOMENTS, measures.add_moments)


def _call_consume(arrays):
    _consume(arrays)


def _call_mean_loss(arrays):
    _mean_loss(arrays)


def _call_add_moments(arrays):
    _add_moments(arrays)


@cache
def _digest() -> str:
    """Return a hash of all that compiled code follows from, but for the types."""
    return digest("streamgd.learn.codes", *(f"{__package__}.{name}" for name in SOURCES))


@cache
def _compiled(name: str, kind: str) -> Any:
    call = {"consume": _call_consume, "mean_loss": _call_mean_loss, "add_moments": _call_add_moments}[name]
    call.__qualname__ = f"{name}_{kind}_{_digest()}"
    options: dict[str, Any] = {"no_cfunc_wrapper": True, "no_rewrites": True}  # which nobody here would use
    return kept(call, **options)


@cache
def consume(dtype: np.dtype[Any]) -> Any:
    """Return the compiled `consume` for one type of rows."""
    return _compiled("consume", dtype.name)


def mean_loss() -> Any:
    """Return the compiled `mean_loss`."""
    return _compiled("mean_loss", "float64")


def add_moments() -> Any:
    """Return the compiled `add_moments`."""
    return _compiled("add_moments", "float64")
