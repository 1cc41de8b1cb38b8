"""Tests of `streamgd.data`; asserts in the shared contract are spelled out like those in test files."""

import pytest

pytest.register_assert_rewrite("tests.data.contract")
