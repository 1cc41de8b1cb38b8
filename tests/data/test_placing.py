"""The compiled code through `RowPlacer`, which is how everything reaches it, and the parts that stand alone."""

import numpy as np
import pytest

from streamgd.data.compiled.classes import find_classes
from streamgd.data.compiled.combining import combine_eights, combine_rows
from streamgd.data.compiled.memory import DTYPE_CODES
from streamgd.data.compiled.shuffle import permute, raw_numbers
from streamgd.data.rows import RowPlacer, Window
from streamgd.data.sources.base import Slice
from streamgd.data.targets import TargetCodec
from streamgd.errors import CorruptDataError, DataError, NonFiniteError, SchemaError
from tests.data.fake import FakeSource, layout_of

STORED = ["float16", "float32", "float64", *(name for name in DTYPE_CODES if name[0] in "iu"), "bool"]


def stored(dtype, n_rows, n_features, seed=0):
    generator = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind == "b":
        return generator.integers(0, 2, (n_rows, n_features)).astype(bool)
    if kind in "iu":
        bounds = np.iinfo(dtype)
        return generator.integers(bounds.min, bounds.max, (n_rows, n_features), dtype=dtype, endpoint=True)
    return (generator.standard_normal((n_rows, n_features)) * 30).astype(dtype)


def place(X, *, row_dtype="float32", shift=None, factor=None, seed=0, check=True, y=None, weight=None, codec=None):
    """Place one piece of rows and return the window, with rows back in their order."""
    n_rows = len(X) if isinstance(X, np.ndarray) else len(X[0])
    n_features = X.shape[1] if isinstance(X, np.ndarray) else len(X)
    source = FakeSource([n_rows], np.zeros((n_rows, n_features)), row_dtype=row_dtype, weight=weight, y=y)
    window = Window(layout_of(source, window_rows=n_rows + 5), source)
    window.X[:] = -1
    places = np.random.default_rng(seed).permutation(n_rows + 5)[:n_rows].astype(np.int32)
    placer = RowPlacer(source, codec, shift, factor, check=check)
    placer.place(window, Slice(X, y, weight), 0, 0, places)
    untouched = np.setdiff1d(np.arange(n_rows + 5), places)
    assert (window.X[untouched] == -1).all()
    window.X, window.y, window.ids = window.X[places], window.y[places], window.ids[places]
    if window.weight is not None:
        window.weight = window.weight[places]
    return window


def expected(X, shift, factor, row_dtype):
    return ((X.astype(np.float64) - shift) * factor).astype(row_dtype)


class TestFeatures:
    @pytest.mark.parametrize("row_dtype", ["float32", "float64"])
    @pytest.mark.parametrize("dtype", STORED)
    def test_same_bits_from_rows_and_columns_of_every_type(self, dtype, row_dtype):
        X = stored(dtype, 301, 7)
        generator = np.random.default_rng(1)
        shift, factor = generator.standard_normal(7) * 100, generator.uniform(0.1, 3, 7)
        wanted = expected(X, shift, factor, row_dtype).tobytes()
        columns = [np.ascontiguousarray(X[:, j]) for j in range(7)]
        for given in (X, columns, np.asfortranarray(X)):
            assert place(given, row_dtype=row_dtype, shift=shift, factor=factor).X.tobytes() == wanted

    def test_columns_of_different_types(self):
        columns = [stored(dtype, 200, 1, seed)[:, 0] for seed, dtype in enumerate(STORED)]
        found = place(columns, row_dtype="float64")
        assert np.array_equal(found.X, np.column_stack([column.astype(np.float64) for column in columns]))

    @pytest.mark.parametrize("n_features", [1, 2, 31, 32, 33, 100, 1500])
    @pytest.mark.parametrize("n_rows", [1, 127, 128, 129, 400])
    def test_sizes_around_the_tiles(self, n_rows, n_features):
        X = stored("float32", n_rows, n_features)
        shift, factor = np.linspace(-1, 1, n_features), np.linspace(0.5, 2, n_features)
        wanted = expected(X, shift, factor, np.float32)
        assert np.array_equal(place(X, shift=shift, factor=factor).X, wanted)
        assert np.array_equal(place(list(X.T.copy()), shift=shift, factor=factor).X, wanted)

    @pytest.mark.parametrize(
        "view",
        [
            lambda X: X[:, 1:6],  # rows with gaps between them
            lambda X: X[::3],
            lambda X: X[:, ::2],
            lambda X: X[::-1],
            lambda X: X[:, ::-1],
            lambda X: X.astype(">f4"),
            lambda X: np.frombuffer(b"x" + X.tobytes(), np.float32, offset=1).reshape(X.shape),  # misaligned
            lambda X: np.broadcast_to(X[:1], (50, X.shape[1])),
            lambda X: np.lib.stride_tricks.as_strided(X.view(np.uint8)[1:], X.shape, (X.strides[0], 1)),
        ],
    )
    def test_any_layout_in_memory(self, view):
        X = view(stored("float32", 211, 9))
        wanted = X.astype(np.float32)
        assert np.array_equal(place(X).X, wanted)
        assert np.array_equal(place([X[:, j] for j in range(X.shape[1])]).X, wanted)

    def test_unscaled_keeps_bits_and_minus_zero(self):
        X = np.array([[-0.0, 1e-45], [3.4e38, -1.17e-38]], np.float32)
        assert place(X).X.tobytes() == X.tobytes()

    def test_the_mean_is_subtracted_before_rounding(self):
        """float32 cannot tell two timestamps a minute apart."""
        times = 1_700_000_000 + 60 * np.arange(50, dtype=np.int64)[:, None]
        found = place(times, shift=np.array([1_700_000_000.0]), factor=np.array([1 / 60]))
        assert found.X[:, 0].tolist() == list(range(50))

    def test_refuses_another_number_of_rows_or_columns(self):
        source = FakeSource([4])
        window = Window(layout_of(source, window_rows=4), source)
        placer = RowPlacer(source, None, None, None, check=True)
        places = np.arange(4, dtype=np.int32)
        for X in (np.zeros((3, 3)), [np.zeros(4), np.zeros(4), np.zeros(3)]):
            with pytest.raises(CorruptDataError, match="gave 3 rows where 4"):
                placer.place(window, Slice(X, None, None), 0, 0, places)
        for X in (np.zeros((4, 2)), [np.zeros(4)] * 2):
            with pytest.raises(SchemaError, match="2 features: expected 3"):
                placer.place(window, Slice(X, None, None), 0, 0, places)

    def test_refuses_scales_of_another_length(self):
        with pytest.raises(SchemaError, match="one number for each feature"):
            RowPlacer(FakeSource([4]), None, np.zeros(2), None, check=True)


def shown(bad: float) -> str:
    return "NaN" if np.isnan(bad) else str(bad)


class TestBadNumbers:
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("columns", [False, True])
    @pytest.mark.parametrize(("row", "column"), [(0, 0), (129, 8), (299, 4)])
    def test_names_row_column_and_value(self, bad, columns, row, column):
        X = stored("float32", 300, 9)
        X[row, column] = bad
        X[299, 8] = np.nan  # a later one, which must not be the one that is named
        given = list(X.T.copy()) if columns else X
        with pytest.raises(NonFiniteError, match=rf"block 0, row {row}: feature number {column} is {shown(bad)}"):
            place(given)
        assert np.isnan(place(given, check=False).X[299, 8])

    def test_a_number_too_big_for_the_row_dtype(self):
        X = np.array([[1.0], [1e39]])
        with pytest.raises(
            NonFiniteError, match=r"row 1: feature number 0 is 1e\+39, which float32 cannot hold.*float64"
        ):
            place(X)
        assert place(X, row_dtype="float64").X[1, 0] == 1e39

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_targets(self, bad):
        y = np.array([1.0, 2.0, bad])
        with pytest.raises(NonFiniteError, match=f"row 2: target 'y' is {shown(bad)}: expected a finite number"):
            place(np.zeros((3, 1)), y=y, codec=TargetCodec(None))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5])
    def test_weights(self, bad):
        with pytest.raises(NonFiniteError, match=f"row 1: sample weight is {shown(bad)}"):
            place(np.zeros((3, 1)), weight=np.array([1.0, bad, 0.0]))

    def test_missing_and_unknown_classes(self):
        codec = TargetCodec(np.array(["no", "yes"], object))
        y = np.array(["no", None, "yes"], object)
        with pytest.raises(NonFiniteError, match="row 1: target 'y' is None: expected a class"):
            place(np.zeros((3, 1)), y=y, codec=codec)
        with pytest.raises(DataError, match=r"block 0, row 2: target 'perhaps' is none of the 2 known classes"):
            place(np.zeros((3, 1)), y=np.array(["no", "yes", "perhaps"], object), codec=codec)

    def test_no_target_to_encode(self):
        with pytest.raises(SchemaError, match="target="):
            RowPlacer(FakeSource([4], with_target=False), TargetCodec(None), None, None, check=True)


def test_targets_and_weights_go_with_their_rows():
    y, weight = stored("float64", 40, 3), np.linspace(0, 2, 40, dtype=np.float32)
    source_codec = TargetCodec(None, n_outputs=3)
    source = FakeSource([40], y=y, weight=weight)
    window = Window(layout_of(source, window_rows=40, n_outputs=3), source)
    places = np.random.default_rng(3).permutation(40).astype(np.int32)
    RowPlacer(source, source_codec, None, None, check=True).place(window, Slice(source.X, y, weight), 0, 0, places)
    assert (window.y[places] == y).all()
    assert window.weight is not None
    assert (window.weight[places] == weight).all()
    assert (window.X[places] == source.X).all()


def test_raw_numbers_are_numpys_philox():
    for seed in (0, 1, 2**100):
        sequence = np.random.SeedSequence(seed, spawn_key=(3, 1))
        found = np.empty(1003, np.uint64)
        raw_numbers(sequence.generate_state(2, np.uint64), found)
        assert (found == np.random.Philox(sequence).random_raw(1003)).all()


def test_permutations_are_complete():
    for n in (0, 1, 2, 3, 4, 5, 1000):
        out = np.empty(n, np.int32)
        permute(np.array([n, 7], np.uint64), out)
        assert sorted(out.tolist()) == list(range(n))


def test_find_classes():
    values = np.array([3.0, 1.0, np.nan, 7.5, np.inf, 2.0])
    out = np.empty(6)
    assert find_classes(values, np.array([1.0, 3.0, 7.5]), out) == 5
    assert out.tolist()[:2] == [1.0, 0.0]
    assert np.isnan(out[[2, 4]]).all()
    assert out[5] == -1
    assert find_classes(values[:4], np.array([1.0, 3.0, 7.5]), out[:4]) == -1


class TestCombining:
    """Predictions: rows times coefficients, added up one column after the other."""

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("n_rows", [0, 5, 8, 61])
    @pytest.mark.parametrize("n_outputs", [1, 3])
    def test_eight_rows_side_by_side_have_the_same_bits(self, dtype, n_rows, n_outputs):
        rng = np.random.default_rng(n_rows)
        X = (rng.normal(size=(n_rows, 9)) * 10.0 ** rng.integers(-8, 8, (n_rows, 9))).astype(dtype)
        factors, start = rng.normal(size=(n_outputs, 9)), rng.normal(size=n_outputs)
        found, expected = np.full((2, n_rows, n_outputs), np.nan)
        done = combine_eights(X, factors, start, found)
        assert done == n_rows // 8 * 8
        assert combine_rows(X.ctypes.data, DTYPE_CODES[dtype], 9, factors, start, expected)
        assert found[:done].tobytes() == expected[:done].tobytes()
        by_hand = np.zeros((n_rows, n_outputs))
        for j in range(9):
            by_hand += X[:, j, None].astype(float) * factors[:, j]
        assert (expected == by_hand + start).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("row", [0, 13, 39])
    def test_they_end_before_a_value_that_is_not_finite(self, value, row):
        X = np.ones((40, 4))
        X[row, 2] = value
        factors = np.array([[1.0, 2.0, 0.0, 1.0]])  # even where it does not count
        assert combine_eights(X, factors, np.zeros(1), np.empty((40, 1))) == row // 8 * 8
