"""What is stored in files, used or not: the columns of Parquet, the datasets of HDF5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamgd.data.sources.files import FileSet, data_files


@dataclass(frozen=True)
class StoredColumn:
    """A column or dataset.

    Attributes
    ----------
    name : str
        As stored.
    text : str
        Type, and shape where it has one.
    is_number : bool
        Whether it can be a feature.
    is_index : bool
        Whether it is the index that pandas wrote, which is no feature unless it is named.
    """

    name: str
    text: str
    is_number: bool = True
    is_index: bool = False


def stored_columns(data: Sequence[str]) -> list[StoredColumn]:
    """List what the first of some files holds.

    Parameters
    ----------
    data : sequence of str
        Files, folders or patterns.

    Returns
    -------
    list of StoredColumn
        Empty for a ``.npy`` file, whose columns have no names.
    """
    kind, files = data_files(list(data))
    if kind == "parquet":
        return _parquet_columns(files)
    return _hdf5_datasets(str(files.paths[0])) if kind == "hdf5" else []


def _parquet_columns(files: FileSet) -> list[StoredColumn]:
    from streamgd.data.sources.parquet_columns import read_partitions
    from streamgd.data.sources.parquet_footer import Layout, read_footer, sound_footer

    path = str(files.paths[0])
    footer = read_footer(path)
    with sound_footer(path):
        layout = Layout(footer.metadata)
    found = []
    for name in layout.names:
        kind = layout.leaves[name].type
        index = name in layout.index_names
        text = f"{kind.text} (the pandas index)" if index else kind.text
        found.append(StoredColumn(name, text, kind.number is not None, index))
    partitions = read_partitions([files.relative(path) for path in files.paths]).types
    return found + [
        StoredColumn(name, f"{kind.text} (partition)", kind.number is not None)
        for name, kind in partitions.items()
        if name not in layout.leaves
    ]


def _hdf5_datasets(path: str) -> list[StoredColumn]:
    from streamgd.data.sources.hdf5_files import list_datasets, open_file

    with open_file(path) as file:
        # They are lines for people; whether a dataset is a feature is for the user to say.
        return [StoredColumn(line, "") for line in list_datasets(file)]
