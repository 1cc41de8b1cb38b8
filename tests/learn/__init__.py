"""Tests of `streamgd.learn`: ``training.py`` feeds the kernel as the loop does, ``reference.py`` does it in NumPy."""

import pytest

pytest.register_assert_rewrite("tests.learn.training")
