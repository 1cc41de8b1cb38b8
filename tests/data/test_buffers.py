"""Memory that is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from streamgd.data.sources.buffers import Buffers, Kept


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


def test_never_holds_much_more_than_was_in_use_at_once() -> None:
    """Sizes that come once, as of the last blocks of many files, do not pile up."""
    buffers = Buffers()
    generator = np.random.default_rng(0)
    for size in generator.integers(50_000, 5_000_000, 200).tolist():
        memory = buffers.take(size)
        assert len(memory) >= size
        assert buffers._idle + len(memory) <= 10_000_000
        buffers.give(memory)
        assert buffers._idle <= 10_000_000


def test_sizes_that_take_turns_keep_their_memory() -> None:
    """Chunks of targets and of features, say, each used while the other is not."""
    buffers = Buffers()
    few, many = buffers.take(100_000), buffers.take(1_000_000)
    for _ in range(3):
        buffers.give(many)
        assert buffers.take(1_000_000) is many
        buffers.give(few)
        assert buffers.take(100_000) is few
    alone = Buffers()
    for _ in range(3):
        memory = alone.take(1_000_000)
        alone.give(memory)
        other = alone.take(100_000)
        alone.give(other)
    assert alone.take(1_000_000) is memory
    assert alone.take(100_000) is other


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


def piece(n_bytes: int = 1000) -> np.ndarray:
    return np.zeros(n_bytes, np.uint8)


def test_nothing_is_kept_unless_it_is_allowed() -> None:
    kept = Kept()
    kept.put("a", piece())
    assert kept.get("a") is None
    assert not kept.has_room(1)


def test_kept_as_far_as_memory_is_allowed() -> None:
    kept = Kept()
    kept.allow(4000)
    first = piece()
    for name in "abc":
        kept.put(name, first if name == "a" else piece())
    kept.put("a", piece())  # by a thread that was slower
    assert kept.get("a") is first
    assert kept.get("b") is not None
    assert kept.get("c") is None  # each costs a little beside its bytes
    assert kept.has_room(400)
    assert not kept.has_room(500)


def test_kept_no_longer_than_allowed() -> None:
    kept = Kept()
    kept.allow(4000)
    kept.put("a", piece())
    kept.allow(3000)
    assert kept.get("a") is not None
    kept.allow(0)
    assert kept.get("a") is None
    kept.allow(1512)
    kept.put("b", piece())
    assert kept.get("b") is not None
    kept.clear()
    assert kept.get("b") is None
    assert kept.has_room(1000)
