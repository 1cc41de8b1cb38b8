"""What counts as a number, a count or a flag in an option, and the error that says what was expected."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from streamgd.errors import OptionError


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are not."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not is_flag(value) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, (int, np.integer)) and not is_flag(value)


def is_flag(value: Any) -> bool:
    """Whether a value is True or False."""
    return isinstance(value, (bool, np.bool_))


def require(met: bool, name: str, found: object, expected: str) -> None:
    """Refuse an option.

    Raises
    ------
    OptionError
        Unless `met`; names the option, its value and what was expected.
    """
    if not met:
        raise OptionError(f"{name}={found!r}: expected {expected}")
