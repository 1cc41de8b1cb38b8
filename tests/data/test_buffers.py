"""Memory that is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from streamgd.data.sources.buffers import Buffers


def test_memory_is_handed_out_again() -> None:
    buffers = Buffers()
    first = buffers.take(10_000)
    assert len(first) == 10_000
    buffers.give(first)
    assert buffers.take(9_000) is first
    assert buffers.take(9_000) is not first  # it is in use


def test_big_memory_does_not_serve_for_little() -> None:
    buffers = Buffers()
    big, small = buffers.take(1_000_000), buffers.take(100_000)
    buffers.give(small)
    buffers.give(big)
    assert buffers.take(90_000) is small
    assert buffers.take(900_000) is big
    buffers.give(big)
    assert len(buffers.take(90_000)) == 90_000


def test_never_holds_more_than_was_in_use_at_once() -> None:
    """Sizes that come once, as of the last blocks of many files, do not pile up."""
    buffers = Buffers()
    generator = np.random.default_rng(0)
    for size in generator.integers(50_000, 5_000_000, 200).tolist():
        memory = buffers.take(size)
        assert len(memory) >= size
        assert sum(map(len, buffers._free)) + len(memory) <= 5_000_000
        buffers.give(memory)
        assert sum(map(len, buffers._free)) <= 5_000_000


def test_cleared_memory_is_gone_and_what_is_in_use_may_come_back() -> None:
    buffers = Buffers()
    used, free = buffers.take(10_000), buffers.take(20_000)
    buffers.give(free)
    buffers.clear()
    assert buffers.take(20_000) is not free
    buffers.give(used)


def test_no_memory_is_given_to_two() -> None:
    buffers = Buffers()

    def use(number: int) -> bool:
        memory = buffers.take(5_000 + number % 7)
        memory[:] = number % 256
        same = bool((memory == number % 256).all())
        buffers.give(memory)
        return same

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(2_000)))
