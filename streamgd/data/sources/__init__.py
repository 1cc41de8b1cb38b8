"""Where rows come from: `open_source` finds the source that fits the data.

Each kind of source is imported when it is first needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from streamgd.data.sources.base import Source
from streamgd.data.sources.files import SUPPORTED, FileSet, data_files, file_format, find_files, is_path
from streamgd.errors import CorruptDataError, DataError, OptionError, SourceNotFoundError

__all__ = ["Source", "open_source", "reopen"]


def open_source(
    data: Any,
    target: Any = None,
    *,
    features: str | Sequence[str] | None = None,
    weight: Any = None,
    dtype: str = "auto",
) -> Source:
    """Open data where it lies.

    Parameters
    ----------
    data : path-like, sequence of path-like, array-like, DataFrame, dask collection or Source
        - Files: a path, a folder, a pattern (``"data/part-*.h5"``) or a list of these; HDF5, Parquet (hive partitions
          too) or one ``.npy`` file, told apart by content.
        - A NumPy array or memmap, a pandas DataFrame, or nested lists, of shape (n_rows, n_features).
        - A Dask array or a Dask DataFrame.
        - A `Source`, which is returned as it is.
    target : str, sequence of str, array-like, path-like or None, default=None
        For HDF5 the name of a dataset (default: ``"y"`` if there is one); for Parquet and DataFrames the name of a
        column, or of several for several outputs; for arrays an array of shape (n_rows,) or (n_rows, n_outputs); for a
        ``.npy`` file another one. DataFrames take arrays and Series too. Without a target, a source can only be
        predicted from.
    features : str, sequence of str or None, default=None
        For HDF5 the dataset of shape (n_rows, n_features) (default: ``"X"``), or several; for Parquet and DataFrames
        the columns (default: every column that is neither target nor weight). Not for arrays.
    weight : str, array-like, path-like or None, default=None
        Sample weights, given like the target.
    dtype : {"auto", "float32", "float64"}, default="auto"
        What rows are trained in. ``"auto"`` is float32 unless a feature is float64 or an integer of 32 bits or more.

    Returns
    -------
    Source
        Opened from its metadata; no rows are read (Dask collections whose lengths are unknown are measured).

    Raises
    ------
    SourceNotFoundError
        If a file, dataset or column is not there.
    SchemaError
        If types, shapes or row counts cannot be used together.
    DataError
        If the data is of a kind that cannot be read, with the way to convert it.
    OptionError
        If options do not belong to this kind of data.

    Examples
    --------
    >>> import numpy as np
    >>> from streamgd.data.sources import open_source
    >>> open_source(np.eye(3), np.arange(3.0))
    <memory source 'X': 3 rows in 1 blocks, 3 features as float64>
    """
    if isinstance(data, Source):
        if target is not None or features is not None or weight is not None or dtype != "auto":
            raise OptionError(
                "a source has its target, features, weight and dtype already; give them where the source is opened"
            )
        return data
    if is_path(data):
        return _open_files(data, target, features, weight, dtype)
    if isinstance(features, str):
        features = [features]
    if _is_dask(data):
        return _open_dask(data, target, features, weight, dtype)
    if _is_frame(data):
        return _open_frame(data, target, features, weight, dtype)
    return _open_arrays(data, target, features, weight, dtype)


def reopen(origin: Mapping[str, Any]) -> Source:
    """Open the source again that has this `Source.origin`.

    Raises
    ------
    DataError
        If it was not opened from files.
    """
    data = origin.get("data", origin.get("paths"))
    if data is None:
        raise DataError(
            f"the data came from Python ({origin.get('kind')}), not from files, and cannot be opened again by itself; "
            "pass it again"
        )
    options = {name: origin[name] for name in ("target", "features", "weight", "dtype") if origin.get(name) is not None}
    return open_source(data, **options)


def _open_files(data: Any, target: Any, features: Any, weight: Any, dtype: str) -> Source:
    kind, files = data_files(data)
    if kind == "npy":
        return _open_npy(files, target, features, weight, dtype)
    for what, part in (("target", target), ("weight", weight)):
        if part is not None and not (isinstance(part, str) or (isinstance(part, list | tuple) and what == "target")):
            raise OptionError(
                f"{what} is a {type(part).__name__}, but the data is in files ({kind}); expected the name of a "
                f"{'dataset' if kind == 'hdf5' else 'column'}"
            )
    if kind == "parquet":
        from streamgd.data.sources.parquet import ParquetSource

        return ParquetSource(files, target, [features] if isinstance(features, str) else features, weight, dtype)
    return _open_hdf5(files, target, features, weight, dtype)


def _open_hdf5(files: FileSet, target: Any, features: Any, weight: str | None, dtype: str) -> Source:
    from streamgd.data.sources.hdf5 import Hdf5Source
    from streamgd.data.sources.hdf5_files import has_dataset

    if target is not None and not isinstance(target, str):
        raise OptionError(
            f"target={target!r}: in HDF5 files several outputs are one dataset of shape (n_rows, n_outputs); "
            "name that dataset"
        )
    name = "y" if target is None and has_dataset(files.paths[0], "y") else target
    source = Hdf5Source(
        files.paths, features="X" if features is None else features, target=name, weight=weight, dtype=dtype
    )
    source.origin |= {"data": files.spec, "dtype": dtype}
    return source


def _open_npy(files: FileSet, target: Any, features: Any, weight: Any, dtype: str) -> Source:
    """Open a matrix in a ``.npy`` file, read through a memmap."""
    if len(files.paths) > 1:
        raise DataError(
            f"{len(files.paths)} .npy files as one source are not supported; put them in one file or in HDF5"
        )
    _refuse_features(features)
    loaded, spec = {}, {"data": str(files.paths[0]), "target": target, "weight": weight}
    for role, part in list(spec.items()):
        if isinstance(part, str | os.PathLike):
            loaded[role], spec[role] = _load_npy(part, role)
        else:
            loaded[role] = part
    source = _open_arrays(loaded["data"], loaded["target"], None, loaded["weight"], dtype)
    if all(part is None or isinstance(part, str) for part in spec.values()):
        source.origin |= {**spec, "dtype": dtype}
    return source


def _load_npy(path: Any, role: str) -> tuple[Any, str]:
    try:
        found = find_files(path).paths
    except SourceNotFoundError as err:
        hint = "" if role == "data" else f" (with X in a .npy file, {role} is a .npy file or an array)"
        raise SourceNotFoundError(f"{role}: {err}{hint}") from err
    if len(found) > 1 or file_format(found[0]) != "npy":
        raise DataError(
            f"{role} {os.fspath(path)!r} is not one .npy file; with X in a .npy file it must be one, or an array"
        )
    try:
        return np.load(found[0], mmap_mode="r", allow_pickle=False), str(found[0])
    except (ValueError, OSError, EOFError) as err:
        raise CorruptDataError(
            f"{str(found[0])!r} cannot be opened as an array: {err}. Arrays of Python objects are not supported; "
            "else the file is damaged"
        ) from err


def _open_dask(data: Any, target: Any, features: Any, weight: Any, dtype: str) -> Source:
    from streamgd.data.sources.dask import DaskSource

    kinds = {name: getattr(data, name, None) for name in ("npartitions", "ndim", "chunks")}  # a Delayed has them all
    if isinstance(kinds["npartitions"], int) and kinds["ndim"] == 2 and kinds["chunks"] is None:
        return DaskSource.from_dataframe(data, target, features, weight, dtype)
    if not isinstance(kinds["chunks"], tuple):
        raise DataError(
            f"a dask {type(data).__name__} has no rows and columns to train on; make it a Dask array "
            "(dask.array.from_delayed) or DataFrame (to_frame, to_dataframe, dask.dataframe.from_delayed)"
        )
    _refuse_features(features)
    _refuse_names(target, weight)
    return DaskSource(data, target, weight=weight, dtype=dtype)


def _open_frame(frame: Any, target: Any, features: Any, weight: Any, dtype: str) -> Source:
    """Open a pandas DataFrame; target and weight are columns of it, or values of their own."""
    from streamgd.data.sources.frames import pick_columns
    from streamgd.data.sources.memory import MemorySource

    names = [part if _is_names(part) else None for part in (target, weight)]
    X, y, w = pick_columns(frame, names[0], features, names[1])
    return MemorySource(
        X,
        target if names[0] is None else y,
        weight=weight if names[1] is None else w,
        dtype=dtype,
        target_name=target if isinstance(target, str) else "y",
    )


def _open_arrays(X: Any, y: Any, features: Any, weight: Any, dtype: str) -> Source:
    from streamgd.data.sources.memory import MemorySource

    if isinstance(X, Mapping | set | bytes) or not (hasattr(X, "__len__") or hasattr(X, "__array__")):
        raise DataError(f"cannot open a {type(X).__name__} as data; expected {SUPPORTED}")
    if hasattr(X, "__arrow_c_stream__") and not type(X).__module__.startswith("pandas"):
        raise DataError(
            f"cannot open a {type(X).__module__}.{type(X).__name__}; convert it with .to_pandas(), or write it to a "
            "Parquet file and pass the path"
        )
    _refuse_features(features)
    _refuse_names(y, weight)
    return MemorySource(X, y, weight=weight, dtype=dtype)


def _refuse_features(features: Any) -> None:
    if features is not None:
        raise OptionError(
            f"features={features!r} names columns, but an array has none; pick them before, with X[:, columns]"
        )


def _refuse_names(target: Any, weight: Any) -> None:
    for what, part in (("target", target), ("weight", weight)):
        if isinstance(part, str | os.PathLike):
            raise OptionError(
                f"{what}={str(part)!r} is a name, but the data is an array, which has no names; pass an array with one "
                "value for each row"
            )


def _is_names(part: Any) -> bool:
    """Tell whether `part` names columns: strings, and not as labels of classes row by row, which need an array."""
    return isinstance(part, str) or (
        isinstance(part, list | tuple) and len(part) > 0 and all(isinstance(name, str) for name in part)
    )


def _is_frame(data: Any) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(data, pandas.DataFrame)


def _is_dask(data: Any) -> bool:
    base = sys.modules.get("dask.base")
    return base is not None and bool(base.is_dask_collection(data))
