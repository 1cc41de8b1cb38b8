"""Which columns of a Parquet table are features, target and weight; hive partitions are columns too.

A hive partition is a folder named ``key=value``; its files all have that value in column ``key``.
"""

from __future__ import annotations

import difflib
import re
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from streamgd.data.sources.parquet_footer import Layout, shown
from streamgd.data.sources.parquet_types import ColumnType
from streamgd.errors import NonFiniteError, OptionError, SchemaError, SourceNotFoundError

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_STRING = ColumnType("string", "string", None)

#: The value of each partition column in one file.
Values = dict[str, "str | int | float"]


@dataclass(frozen=True)
class Partitions:
    """Partition columns: their types, and their values in each file."""

    types: dict[str, ColumnType]
    values: tuple[Values, ...]


def read_partitions(relatives: Sequence[str]) -> Partitions:
    """Read partitions out of the files' names below their root.

    A column is whole numbers or numbers if all its values look so, else text. Whole numbers get the narrowest type that
    holds them, so that a year does not force rows into float64.

    Raises
    ------
    SchemaError
        If files differ in their keys.
    """
    keyed = [_keys(relative) for relative in relatives]
    for relative, keys in zip(relatives, keyed, strict=True):
        if list(keys) != list(keyed[0]):
            raise SchemaError(
                f"{relatives[0]!r} lies in partitions {list(keyed[0])}, but {relative!r} in {list(keys)}; "
                "every file must lie below folders of the same keys ('key=value'), or move it elsewhere"
            )
    types: dict[str, ColumnType] = {}
    values: list[Values] = [{} for _ in keyed]
    for key in keyed[0]:
        texts = [keys[key] for keys in keyed]
        types[key], parsed = _parsed(texts)
        for file, value in enumerate(parsed):
            values[file][key] = value
    return Partitions(types, tuple(values))


def _keys(relative: str) -> dict[str, str]:
    parts = [part.partition("=") for part in PurePosixPath(relative).parts[:-1]]
    return {urllib.parse.unquote(key): urllib.parse.unquote(value) for key, equals, value in parts if key and equals}


def _parsed(texts: list[str]) -> tuple[ColumnType, Sequence[str | int | float]]:
    present = [text for text in texts if text != _HIVE_NULL]
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", text) for text in present):
        numbers = [int(text) if text != _HIVE_NULL else 0 for text in texts]
        fitting = (np.iinfo(kind) for kind in (np.int8, np.int16, np.int32, np.int64))
        narrow = next(info.dtype for info in fitting if info.min <= min(numbers) and max(numbers) <= info.max)
        return ColumnType(str(narrow), "i", narrow), numbers
    if all(re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text) for text in present):
        return ColumnType("float64", "f", np.dtype(np.float64)), [float(t) if t != _HIVE_NULL else 0.0 for t in texts]
    return _STRING, texts


def refuse_null_partitions(relatives: Sequence[str], columns: Sequence[str]) -> None:
    """Refuse files whose partition value is missing, in the columns that are used."""
    for relative in relatives:
        for key, value in _keys(relative).items():
            if value == _HIVE_NULL and key in columns:
                raise NonFiniteError(
                    f"column {key!r} has no value in {relative!r} (partition {_HIVE_NULL}); leave the column or the "
                    "file out"
                )


@dataclass(frozen=True)
class Roles:
    """Columns by what they are used for, and those left out on purpose with the reason."""

    features: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None
    dropped: tuple[tuple[str, str], ...]

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are read: features, outputs, weight."""
        return (*self.features, *self.outputs, *(() if self.weight is None else (self.weight,)))


def choose_columns(
    path: str,
    layout: Layout,
    partitions: dict[str, ColumnType],
    target: str | Sequence[str] | None,
    features: Sequence[str] | None,
    weight: str | None,
) -> Roles:
    """Find the columns the user named, or by default every column but target and weight as features.

    Raises
    ------
    SourceNotFoundError
        If a column is not there.
    SchemaError
        If a name occurs twice, or a type cannot be used; all such columns are named.
    OptionError
        If a column is used twice.
    """
    types = {name: leaf.type for name, leaf in layout.leaves.items()}
    types |= {key: kind for key, kind in partitions.items() if key not in types}
    labels = [*layout.names, *(key for key in partitions if key not in layout.leaves)]
    outputs = () if target is None else (target,) if isinstance(target, str) else tuple(target)
    apart = [*outputs, *([] if weight is None else [weight])]
    dropped: list[tuple[str, str]] = []
    if isinstance(features, str):
        features = [features]
    if features is None:
        dropped = [(name, "the pandas index") for name in labels if name in layout.index_names and name not in apart]
        gone = {name for name, _ in dropped}
        chosen = [name for name in labels if name not in apart and name not in gone]
    else:
        chosen = list(features)
    missing = [name for name in [*chosen, *apart] if name not in types]
    if missing:
        raise SourceNotFoundError(_not_there(path, missing, labels))
    twice = [name for name in dict.fromkeys([*chosen, *apart]) if name in layout.repeated]
    if twice:
        raise SchemaError(
            f"column name {shown([repr(name) for name in twice])} occurs more than once in {path!r}; rename one of "
            "each, or leave them out with features=[...]"
        )
    reused = [name for name, n in Counter([*chosen, *apart]).items() if n > 1]
    if reused:
        raise OptionError(
            f"column {shown([repr(name) for name in reused])} would be used twice (as feature, target or weight); "
            "name each in one place only"
        )
    _check_features(path, chosen, types)
    _check_apart(path, outputs, weight, types)
    return Roles(tuple(chosen), outputs, weight, tuple(dropped))


def _not_there(path: str, missing: list[str], labels: list[str]) -> str:
    near = [name for lost in missing for name in difflib.get_close_matches(lost, labels, n=2)]
    hint = f" Did you mean {', '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    return (
        f"{path!r} has no column {shown([repr(name) for name in missing])}.{hint} "
        f"Its columns are {shown([repr(label) for label in labels])}"
    )


def _check_features(path: str, chosen: list[str], types: dict[str, ColumnType]) -> None:
    if not chosen:
        raise SchemaError(f"{path!r} has no columns left for features; at least one is needed")
    bad = [name for name in chosen if types[name].number is None]
    if not bad:
        return
    good = [name for name in chosen if types[name].number is not None]
    listed = f"features={good!r}" if 0 < len(good) <= 12 else "features=[...]"
    raise SchemaError(
        f"features must be numbers, booleans or decimals, but {len(bad)} of {len(chosen)} columns of {path!r} are not: "
        f"{shown([f'{name!r} ({types[name].text})' for name in bad])}. Leave them out with {listed}, or write the data "
        "with numbers in their place: categories and text as one 0/1 column for each value, dates as days or seconds "
        "since one day, lists as one column for each element"
    )


def _check_apart(path: str, outputs: tuple[str, ...], weight: str | None, types: dict[str, ColumnType]) -> None:
    """Check target and weight."""
    for name in outputs:
        kind = types[name]
        if kind.number is None and (kind.text == "null" or "<" in kind.text):
            what = "holds nothing but nulls" if kind.text == "null" else f"is {kind.text}"
            raise SchemaError(f"target {name!r} of {path!r} {what}; expected numbers, or labels of classes")
        if kind.number is None and len(outputs) > 1:
            raise SchemaError(
                f"target {name!r} of {path!r} is {kind.text}; several targets at once must all be numbers"
            )
    if weight is not None and types[weight].number is None:
        raise SchemaError(f"weight {weight!r} of {path!r} is {types[weight].text}; expected numbers")
