"""Classes to their codes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamgd.data.compiled.compiling import compiled


@compiled
def find_classes(values: NDArray[np.float64], classes: NDArray[np.float64], out: NDArray[np.float64]) -> int:
    """Write the index of each value among sorted classes; -1 for a value that is not one, NaN for NaN and infinities.

    Returns
    -------
    int
        The first row whose value is none of the classes (NaN and infinities are not counted), or -1.
    """
    unknown = -1
    for i in range(len(values)):
        value = values[i]
        low, high = 0, len(classes)
        while low < high:
            middle = (low + high) // 2
            if classes[middle] < value:
                low = middle + 1
            else:
                high = middle
        if low < len(classes) and classes[low] == value:
            out[i] = low
        elif value - value != 0:
            out[i] = np.nan
        else:
            out[i] = -1
            if unknown < 0:
                unknown = i
    return unknown
