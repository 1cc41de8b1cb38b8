"""Arrow columns as numbers: which types can be features, which agree across files, and their values as NumPy arrays."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from streamgd.data.sources.base import Array

#: Integers up to this size, and powers of ten up to the 22nd, are exact in float64: their quotient is rounded once.
_EXACT_INTEGER = 1 << 53
_EXACT_POWER = 22


@dataclass(frozen=True)
class ColumnType:
    """What a column holds.

    Attributes
    ----------
    text : str
        The type, for messages.
    family : str
        Types of one family differ only in width, and files that differ so are one source.
    number : numpy.dtype or None
        The dtype its values come in, or None if it cannot be a feature.
    """

    text: str
    family: str
    number: np.dtype[Any] | None

    def widest(self, other: ColumnType) -> ColumnType:
        """Return the type, of the same family, that holds the values of both."""
        if self.number is None or other.number is None or self.number == other.number:
            return self if len(self.text) >= len(other.text) else other
        return self if np.promote_types(self.number, other.number) == self.number else other


def stored_type(arrow: pa.DataType) -> pa.DataType:
    """Return what an extension type is stored as.

    Whether columns have such types depends on who has registered them in this process, as pandas does once it reads or
    writes Parquet; what is read must not.
    """
    while isinstance(arrow, pa.BaseExtensionType):
        arrow = arrow.storage_type
    return arrow


def as_stored(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch without extension types."""
    if not any(isinstance(kind, pa.BaseExtensionType) for kind in batch.schema.types):
        return batch
    arrays = batch.columns
    for i, array in enumerate(arrays):
        while isinstance(array, pa.ExtensionArray):
            array = arrays[i] = array.storage
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


@functools.lru_cache(maxsize=1024)
def column_type(arrow: pa.DataType) -> ColumnType:
    """Classify an Arrow type; a dictionary counts as what it holds."""
    types = pa.types
    if types.is_dictionary(arrow):
        arrow = arrow.value_type
    text = str(arrow)
    if types.is_boolean(arrow):
        return ColumnType("bool", "bool", np.dtype(np.bool_))
    if types.is_floating(arrow) or types.is_integer(arrow):
        number = np.dtype(arrow.to_pandas_dtype())
        return ColumnType(str(number), number.kind, number)
    if types.is_decimal(arrow):
        return ColumnType(text, "decimal", np.dtype(np.float64))
    if types.is_string(arrow) or types.is_large_string(arrow) or text == "string_view":
        return ColumnType("string", "string", None)
    return ColumnType(text, text, None)


def to_numbers(values: pa.Array) -> Array:
    """Convert an array without nulls, of a type that can be a feature, to NumPy; numbers without a copy."""
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        return np.asarray(values.to_numpy())
    if pa.types.is_dictionary(values.type):
        return to_numbers(values.dictionary_decode())
    if pa.types.is_decimal(values.type):
        return _decimals(values)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def first_not_text(values: pa.Array) -> int | None:
    """Return the first row of an array without nulls whose text is not UTF-8; -1 if it is in its dictionary alone.

    Arrow hands text out as it is stored, and fails when somebody asks for it.
    """
    is_dictionary = pa.types.is_dictionary(values.type)
    texts = values.dictionary if is_dictionary else values
    if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type) or str(texts.type) == "string_view"):
        return None
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        bad = next(i for i in range(len(texts)) if not _is_text(texts[i]))
        if is_dictionary:
            found = np.flatnonzero(values.indices.to_numpy(zero_copy_only=False) == bad)
            return int(found[0]) if len(found) else -1
        return bad
    return None


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _decimals(values: pa.Array) -> Array:
    """Round decimals to the nearest float64; Arrow's own cast may be off in the last place."""
    kind = values.type
    scale = kind.scale
    if kind.bit_width > 128:
        return np.array([float(value) for value in values.to_pylist()], np.float64)
    if kind.bit_width < 128:
        values = values.cast(pa.decimal128(38, scale))
    words = np.frombuffer(values.buffers()[1], np.int64).reshape(-1, 2)[values.offset : values.offset + len(values)]
    low, high = words[:, 0], words[:, 1]
    one_word = high == low >> 63  # the upper word only extends the sign
    exact = one_word & (low >= -_EXACT_INTEGER) & (low <= _EXACT_INTEGER)
    if 0 <= scale <= _EXACT_POWER:
        found = low / np.float64(10**scale)
    else:
        found, exact = np.empty(len(low)), np.zeros(len(low), np.bool_)
    rest = np.flatnonzero(~exact)
    if len(rest):  # Python divides and multiplies whole numbers of any size with one rounding
        unscaled = [
            (h << 64) + (lo & 0xFFFFFFFFFFFFFFFF) for h, lo in zip(high[rest].tolist(), low[rest].tolist(), strict=True)
        ]
        power = 10 ** abs(scale)
        found[rest] = [u / power for u in unscaled] if scale >= 0 else [float(u * power) for u in unscaled]
    return found
