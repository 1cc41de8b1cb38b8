import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgd.data.compiled.shuffle import permute, raw_numbers
from streamgd.data.plan import (
    EpochPlan,
    Layout,
    checksum_of,
    format_bytes,
    mixing,
    parse_bytes,
    plan_layout,
)
from streamgd.errors import BufferTooSmallError, OptionError
from tests.data.fake import FakeSource, layout_of, repeatable

sources = st.builds(
    FakeSource,
    st.lists(st.integers(1, 60), min_size=1, max_size=25),
    n_features=st.integers(1, 4),
    open_block_bytes=st.sampled_from([0, 100, 3000]),
)


def rows_of(plans):
    """List (block, row) of every row, in the order in which windows hand them out."""
    found = []
    for window in plans:
        rows = np.concatenate([np.c_[np.full(n, b), np.arange(s, s + n)] for b, s, n in window.slices])
        placed = np.empty_like(rows)
        placed[window.places()] = rows
        found += map(tuple, placed.tolist())
    return found


def every_row(source):
    return {(b, r) for b, n in enumerate(source.block_rows.tolist()) for r in range(n)}


@st.composite
def plans(draw):
    source = draw(sources)
    whole = draw(st.booleans())
    longest = int(source.block_rows.max())
    slice_rows = longest if whole else draw(st.integers(1, longest))
    window_rows = draw(st.integers(slice_rows, 4 * longest))
    layout = layout_of(source, window_rows=window_rows, slice_rows=slice_rows, n_open=draw(st.integers(1, 9)))
    return source, layout, draw(st.integers(0, 2**70)), draw(st.integers(0, 3)), draw(st.booleans())


class TestBytes:
    @pytest.mark.parametrize(
        ("text", "n_bytes"),
        [
            ("256MB", 256_000_000),
            ("1GiB", 2**30),
            ("64 kb", 64_000),
            ("1.5 GB", 1_500_000_000),
            ("0.5KiB", 512),
            ("300_000", 300_000),
            ("2G", 2 * 10**9),
            (12, 12),
            (np.int64(7), 7),
        ],
    )
    def test_reads_sizes(self, text, n_bytes):
        assert parse_bytes(text) == n_bytes

    @pytest.mark.parametrize("wrong", ["", "MB", "1 parsec", "-5MB", "0", 0, -1, 1.5, None, True, "1e6"])
    def test_refuses_anything_else(self, wrong):
        with pytest.raises(OptionError, match="256MB"):
            parse_bytes(wrong)

    def test_writes_what_it_reads(self):
        for n_bytes in (999, 64_000, 256_000_000, 1_500_000_000):
            assert parse_bytes(format_bytes(n_bytes)) == n_bytes


class TestLayout:
    @repeatable
    @given(sources, st.integers(1, 40), st.booleans(), st.integers(0, 60_000))
    def test_keeps_to_the_buffer(self, source, carry_rows, shuffle, extra):
        with pytest.raises(BufferTooSmallError) as refusal:
            plan_layout(source, 1, carry_rows=carry_rows, shuffle=shuffle)
        layout = plan_layout(source, refusal.value.needed_bytes + extra, carry_rows=carry_rows, shuffle=shuffle)
        windows = 3 if layout.resident else 2
        parts = windows * layout.window_bytes + layout.open_bytes + layout.piece_bytes + layout.carry_bytes
        assert layout.planned_bytes == parts <= layout.buffer_bytes
        assert layout.window_bytes == layout.window_rows * layout.row_bytes
        assert layout.open_bytes == layout.n_open * source.open_block_bytes
        assert 1 <= layout.n_open <= source.n_blocks
        assert 1 <= layout.piece_rows <= layout.slice_rows <= layout.window_rows <= source.n_rows
        if layout.slice_rows < source.block_rows.max():
            assert layout.slice_rows % layout.piece_rows == 0
        assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout

    @repeatable
    @given(sources, st.integers(1, 40))
    def test_names_the_smallest_buffer_that_does(self, source, carry_rows):
        with pytest.raises(BufferTooSmallError) as first:
            plan_layout(source, 1, carry_rows=carry_rows)
        needed = first.value.needed_bytes
        with pytest.raises(BufferTooSmallError, match=f"{needed:,} bytes") as second:
            plan_layout(source, needed - 1, carry_rows=carry_rows)
        assert second.value.needed_bytes == needed
        plan_layout(source, needed, carry_rows=carry_rows)

    def test_holds_everything_where_it_fits(self):
        source = FakeSource([10] * 7 + [3])
        layout = plan_layout(source, 100_000)
        assert layout.window_rows == 73
        assert layout.resident
        assert [window.n_rows for window in EpochPlan(source.block_rows, layout, seed=0, epoch=0).windows()] == [73]

    def test_takes_whole_small_blocks(self):
        # adult: 123 features, blocks of 32 rows, and a buffer for windows of about 2 % of the rows
        source = FakeSource([32] * 1017 + [17], np.zeros((32_561, 123), np.float32))
        layout = plan_layout(source, 930_000, carry_rows=256)
        assert layout.slice_rows == 32
        assert 600 <= layout.window_rows <= 700
        assert mixing(source, layout).blocks_per_window >= 18
        assert mixing(source, layout).verdict == "good"

    def test_opens_as_many_big_blocks_as_two_thirds_of_the_buffer_bear(self):
        source = FakeSource([1], n_features=28, open_block_bytes=1_000_000)
        source.block_rows = np.full(12, 1_000_000, np.int64)
        layout = plan_layout(source, 10_000_000)
        assert layout.n_open == 6
        assert 8 * layout.slice_rows < 1_000_000
        assert layout.window_rows == layout.n_open * layout.slice_rows
        assert str(mixing(source, layout)) == "fair: a window draws on about 6 of 12 blocks"
        assert mixing(source, plan_layout(source, 3_000_000)).verdict == "poor"

    def test_does_not_leave_the_last_blocks_of_an_epoch_alone(self):
        source = FakeSource([1], open_block_bytes=100_000)
        source.block_rows = np.full(9, 10**6, np.int64)
        layout = plan_layout(source, 1_500_000)
        assert layout.n_open == 5  # not eight, and then one alone

    def test_slices_of_big_blocks_are_not_tiny(self):
        source = FakeSource([1])
        source.block_rows = np.full(5000, 10**6, np.int64)
        assert plan_layout(source, 2_000_000).slice_rows >= 256

    def test_file_order_has_no_mixing(self):
        source = FakeSource([1000] * 50)
        layout = plan_layout(source, 50_000, shuffle=False)
        assert mixing(source.block_rows, layout).verdict == "none"
        assert "file order" in str(mixing(source, layout))

    def test_rows_a_float32_window_could_not_index_are_split(self):
        source = FakeSource([1], n_features=1)
        source.block_rows = np.full(3000, 10**6, np.int64)
        assert plan_layout(source, 10**12).window_rows == 2**31 - 1

    def test_refuses_a_layout_of_another_version(self):
        stored = plan_layout(FakeSource([5]), 10**6).to_json()
        with pytest.raises(OptionError, match="n_lists"):
            Layout.from_json({**stored, "n_lists": 3})


class TestOrder:
    @repeatable
    @given(plans())
    def test_every_row_once(self, plan):
        source, layout, seed, epoch, shuffle = plan
        epoch_plan = EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle)
        windows = list(epoch_plan.windows())
        rows = rows_of(windows)
        assert len(rows) == epoch_plan.n_rows == source.n_rows
        assert set(rows) == every_row(source)
        assert [window.index for window in windows] == list(range(len(windows)))
        assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
        assert epoch_plan.n_windows == len(windows)
        if not shuffle:
            assert rows == sorted(rows)

    @repeatable
    @given(plans())
    def test_slices_are_aligned_and_few_blocks_are_open(self, plan):
        source, layout, seed, epoch, shuffle = plan
        position: dict[int, int] = {}
        for window in EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle).windows():
            assert window.n_rows == sum(ref.n_rows for ref in window.slices) <= layout.window_rows
            for block, start, n_rows in window.slices:
                assert position.get(block, 0) == start
                assert start % layout.slice_rows == 0
                position[block] = start + n_rows
                n_open = sum(0 < row < source.block_rows[b] for b, row in position.items() if b != block) + 1
                assert n_open <= layout.n_open

    @repeatable
    @given(plans(), st.integers(0, 40))
    def test_begins_anywhere(self, plan, first):
        source, layout, seed, epoch, shuffle = plan
        epoch_plan = EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle)
        expected = list(epoch_plan.windows())[first:]
        found = list(epoch_plan.windows(first))
        assert [w.index for w in found] == [w.index for w in expected]
        assert rows_of(found) == rows_of(expected)

    @repeatable
    @given(plans(), st.integers(1, 6))
    def test_lanes_are_disjoint_complete_and_balanced(self, plan, n_lanes):
        source, layout, seed, epoch, shuffle = plan
        lanes = [
            EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch, shuffle=shuffle, lane=k, n_lanes=n_lanes)
            for k in range(n_lanes)
        ]
        rows = [row for lane in lanes for row in rows_of(lane.windows())]
        assert len(rows) == source.n_rows
        assert set(rows) == every_row(source)
        sizes = [lane.n_rows for lane in lanes]
        assert max(sizes) - min(sizes) <= source.block_rows.max()
        assert sum(lane.checksum for lane in lanes) % 2**64 == checksum_of(source.block_rows)

    def test_a_lane_has_the_same_blocks_in_every_epoch_in_another_order(self):
        source = FakeSource([7] * 40)
        layout = layout_of(source, window_rows=50)
        for lane in range(4):
            orders = [
                EpochPlan(source.block_rows, layout, seed=9, epoch=epoch, lane=lane, n_lanes=4).blocks.tolist()
                for epoch in range(5)
            ]
            assert len({tuple(sorted(order)) for order in orders}) == 1
            assert len(set(map(tuple, orders))) == 5
        dealt = {
            tuple(sorted(EpochPlan(source.block_rows, layout, seed=seed, epoch=0, n_lanes=4).blocks.tolist()))
            for seed in range(5)
        }
        assert len(dealt) == 5

    def test_epochs_and_seeds_differ(self):
        source = FakeSource([7] * 30)
        layout = layout_of(source, window_rows=50)
        orders = {
            (seed, epoch): tuple(rows_of(EpochPlan(source.block_rows, layout, seed=seed, epoch=epoch).windows()))
            for seed in (0, 42, 43, 2**32, 2**64 + 42)
            for epoch in range(4)
        }
        assert len(set(orders.values())) == len(orders)  # (42, 1) is not (43, 0), nor are epochs shifted copies

    def test_windows_lanes_and_blocks_have_streams_of_their_own(self):
        layout = layout_of(FakeSource([16] * 16), window_rows=16)
        places = set()
        for lane in range(2):
            plan = EpochPlan(np.full(16, 16), layout, seed=1, epoch=0, lane=lane, n_lanes=2)
            places |= {tuple(window.places().tolist()) for window in plan.windows()}
            places.add(tuple(plan.blocks.tolist()))
        assert len(places) == 18

    def test_the_order_never_changes(self):
        """Pinned: a stored cursor means these rows. If this fails, every checkpoint ever written resumes wrongly."""
        layout = layout_of(FakeSource([4, 3, 5]), window_rows=5, slice_rows=2, n_open=2)
        plan = EpochPlan(np.array([4, 3, 5]), layout, seed=42, epoch=1)
        assert [window.slices for window in plan.windows()] == GOLDEN_SLICES
        assert [window.places().tolist() for window in plan.windows()] == GOLDEN_PLACES

    def test_places_are_fisher_and_yates_on_numpys_philox(self):
        def reference(n, seed, *spawn_key):
            raw = np.random.Philox(np.random.SeedSequence(seed, spawn_key=spawn_key)).random_raw(n)
            order = list(range(n))
            i, paired = n - 1, 1 << 20
            for number in map(int, raw):
                if i > 0:
                    product = number * (i + 1)
                    j, rest = product >> 64, product % 2**64
                    order[i], order[j] = order[j], order[i]
                    i -= 1
                if 0 < i < paired:
                    j = rest * (i + 1) >> 64
                    order[i], order[j] = order[j], order[i]
                    i -= 1
            return order

        layout = layout_of(FakeSource([10] * 20), window_rows=45)
        for lane in range(2):
            plan = EpochPlan(np.full(20, 10), layout, seed=2**40 + 7, epoch=3, lane=lane, n_lanes=2)
            for window in plan.windows():
                assert window.places().tolist() == reference(window.n_rows, 2**40 + 7, 3, 1 + lane, 1 + window.index)
        order = EpochPlan(np.full(20, 10), layout, seed=5, epoch=0).blocks.tolist()
        assert order == reference(20, 5, 0, 0)
        first = EpochPlan(np.full(20, 10), layout, seed=5, epoch=3, n_lanes=2).blocks.tolist()
        mine = set(reference(20, 5, 0)[::2])  # dealt once for all epochs, one by one as they are equally long
        assert first == [block for block in reference(20, 5, 3, 0) if block in mine]

    def test_every_permutation_is_as_likely(self):
        layout = layout_of(FakeSource([3]), window_rows=3)
        seen: dict[tuple[int, ...], int] = {}
        for epoch in range(3000):
            window = next(EpochPlan(np.array([3]), layout, seed=0, epoch=epoch).windows())
            places = tuple(window.places().tolist())
            seen[places] = seen.get(places, 0) + 1
        assert len(seen) == 6
        assert sum((n - 500) ** 2 / 500 for n in seen.values()) < 20.5  # chi-square, 5 degrees: one in a thousand

    def test_a_million_blocks(self):
        rows = np.full(1_000_000, 1000, np.int64)
        layout = layout_of(FakeSource([1000]), window_rows=100_000)
        plan = EpochPlan(rows, layout, seed=3, epoch=5)
        assert plan.n_windows == 10_000
        last = next(plan.windows(9_999))
        assert last.last
        assert last.n_rows == 100_000

    @pytest.mark.parametrize("seed", [-1, 1.5, "7", None])
    def test_refuses_seeds_that_are_no_numbers(self, seed):
        with pytest.raises(OptionError, match="whole number"):
            EpochPlan(np.array([3]), layout_of(FakeSource([3]), window_rows=3), seed=seed, epoch=0)

    def test_refuses_lanes_that_are_none(self):
        with pytest.raises(OptionError, match="lane 2 of 2"):
            EpochPlan(np.array([3]), layout_of(FakeSource([3]), window_rows=3), seed=0, epoch=0, lane=2, n_lanes=2)

    def test_refuses_slices_longer_than_the_window(self):
        layout = layout_of(FakeSource([9]), window_rows=4)
        with pytest.raises(OptionError, match="plan_layout"):
            EpochPlan(np.array([9]), layout, seed=0, epoch=0)


class TestChecksum:
    def test_is_the_sum_of_splitmix64(self):
        def splitmix64(x):
            z = (x + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            return z ^ (z >> 31)

        expected = sum(splitmix64(b << 40 | r) for b, n in enumerate([3, 1, 4]) for r in range(n)) % 2**64
        assert checksum_of(np.array([3, 1, 4])) == expected

    @repeatable
    @given(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    def test_tells_block_sizes_apart(self, rows):
        assert checksum_of(np.array(rows)) != checksum_of(np.array([*rows, 1]))


def test_importing_the_plan_does_not_import_numba():
    code = "import sys, streamgd.data.plan; sys.exit('numba' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOLDEN_SLICES = [((2, 0, 2), (0, 0, 2)), ((2, 2, 2), (0, 2, 2), (2, 4, 1)), ((1, 0, 2), (1, 2, 1))]
GOLDEN_PLACES = [[1, 2, 0, 3], [2, 1, 3, 0, 4], [1, 2, 0]]


def test_long_permutations_take_one_step_from_each_raw_number_until_they_are_short():
    key, n = np.array([3, 4], np.uint64), (1 << 20) + 3
    found = np.empty(n, np.int32)
    permute(key, found)
    assert np.array_equal(np.sort(found), np.arange(n))
    raw = np.empty(n, np.uint64)
    raw_numbers(key, raw)
    order, i = np.arange(n), n - 1
    for number in map(int, raw.tolist()):
        product = number * (i + 1)
        j = product >> 64
        order[i], order[j], i = order[j], order[i], i - 1
        if 0 < i < 1 << 20:
            j = (product % 2**64) * (i + 1) >> 64
            order[i], order[j], i = order[j], order[i], i - 1
        if i <= 0:
            break
    assert np.array_equal(found, order)


@pytest.mark.parametrize(("block_rows", "n_blocks"), [(8192, 16), (500, 127), (30_000, 8)])
def test_windows_of_small_blocks_mix_well_and_stay_small(block_rows, n_blocks):
    """Sixteen blocks, or eight megabytes if they are more, or eight blocks if these are more than 32."""
    source = FakeSource(
        [block_rows] * (1_000_000 // block_rows), X=np.zeros((1_000_000 // block_rows * block_rows, 28), np.float32)
    )
    layout = plan_layout(source, parse_bytes("100MB"))
    assert layout.slice_rows == block_rows
    assert layout.window_rows // block_rows == n_blocks
