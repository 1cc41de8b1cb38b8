import datetime
import decimal
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgd.data.targets import ClassCounter, TargetCodec
from streamgd.errors import DataError, OptionError, SchemaError
from tests.data.fake import repeatable

DAY = datetime.date(2020, 2, 29)

#: Targets of every kind, with the classes that they amount to.
TARGETS = {
    "int64": (np.array([3, 1, 1, 2]), [1, 2, 3]),
    "uint8": (np.array([200, 3], np.uint8), [3, 200]),
    "bool": (np.array([True, False, True]), [False, True]),
    "float32": (np.array([0.1, -2.5], np.float32), np.array([-2.5, 0.1], np.float32).tolist()),
    "float16": (np.array([0.5, 2], np.float16), [0.5, 2]),
    "big integers": (np.array([2**60 + 1, 2**60, 5]), [5, 2**60, 2**60 + 1]),
    "fixed-width text": (np.array(["b", "a", "ccc"]), ["a", "b", "ccc"]),
    "bytes": (np.array([b"b", b"a"]), [b"a", b"b"]),
    "objects of text": (np.array(["b", "a", "b"], object), ["a", "b"]),
    "objects of integers": (np.array([2, 1], object), [1, 2]),
    "objects of booleans": (np.array([True, False], object), [False, True]),
    "dates": (np.array(["2020-02-29", "1999-01-01"], "M8[D]"), [datetime.date(1999, 1, 1), DAY]),
    "nanoseconds": (np.array([5, 3], "M8[ns]"), [3, 5]),
    "one column": (np.array([[1], [0]]), [0, 1]),
    "arrow text": (pa.array(["x", "ä", "x"]), ["x", "ä"]),
    "arrow large text": (pa.array(["x", "y"], pa.large_string()), ["x", "y"]),
    "arrow dictionary": (pa.array(["y", "x", "y"]).dictionary_encode(), ["x", "y"]),
    "arrow chunks": (pa.chunked_array([["y"], ["x", "y"]]), ["x", "y"]),
    "arrow date": (pa.array([DAY, datetime.date(1999, 1, 1)]), [datetime.date(1999, 1, 1), DAY]),
    "arrow decimal": (pa.array([decimal.Decimal("1.20"), decimal.Decimal("0.50")]), ["0.50", "1.20"]),
    "arrow boolean": (pa.array([True, False]), [False, True]),
    "arrow integers": (pa.array([7, 5]), [5, 7]),
    "arrow time": (pa.array([datetime.time(2), datetime.time(1)]), [datetime.time(1), datetime.time(2)]),
    "arrow binary": (pa.array([b"q", b"p"]), [b"p", b"q"]),
}


def classes_of(*pieces):
    counter = ClassCounter()
    for piece in pieces:
        assert counter.add(piece) is None
    return counter


@pytest.mark.parametrize("name", TARGETS)
def test_every_kind_of_class_there_and_back(name):
    y, classes = TARGETS[name]
    counter = classes_of(y)
    found = counter.classes.tolist()
    assert (list(map(str, found)) if name == "arrow decimal" else found) == classes
    assert counter.counts.sum() == len(y)
    codec = TargetCodec.from_json(json.loads(json.dumps(TargetCodec(counter.classes).to_json())))
    assert codec.classes.dtype == counter.classes.dtype
    codes = codec.encode(y)
    assert codes.shape == (len(y), 1)
    plain = [value.as_py() for value in y] if hasattr(y, "to_pylist") else y.ravel().tolist()
    assert codec.decode(codes).tolist() == plain


def test_classes_keep_the_stored_dtype():
    assert classes_of(np.array([1, 2], np.int8)).classes.dtype == np.int8
    assert classes_of(np.array([1, 2], np.int8), np.array([9], np.int32)).classes.dtype == np.int32
    assert classes_of(np.array(["a"]), np.array(["bcd"])).classes.dtype == np.dtype("U3")
    assert classes_of(pa.array(["a"])).classes.dtype == object


@pytest.mark.parametrize(
    "y",
    [
        np.array([1.0, np.nan, 2.0]),
        np.array([1.0, np.inf, 2.0]),
        np.array(["a", None, "b"], object),
        np.array(["a", np.nan, "b"], object),
        np.array(["a", pd.NA, "b"], object),
        np.array(["2020-01-01", "NaT", "2020-01-02"], "M8[D]"),
        pa.array(["a", None, "b"]),
        pa.array(["a", None, "b"]).dictionary_encode(),
        pa.array([True, None, False]),
        pa.array([1.5, float("nan"), 2.5]),
        pa.array([DAY, None, datetime.date(1999, 1, 1)]),
    ],
)
def test_missing_targets_are_told_and_count_for_nothing(y):
    counter = ClassCounter()
    assert counter.add(y) == 1
    assert counter.counts.tolist() == [1, 1]
    codes = TargetCodec(counter.classes).encode(y)
    assert np.isnan(codes[:, 0]).tolist() == [False, True, False]


@repeatable
@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=12), min_size=1, max_size=5),
    st.sampled_from(["int64", "float64", "U2", "object", "arrow"]),
)
def test_counts_do_not_depend_on_the_pieces(pieces, kind):
    def as_kind(values):
        if kind == "arrow":
            return pa.array(list(map(str, values)), pa.string())
        text = list(map(str, values))
        return (
            np.array(text, object)
            if kind == "object"
            else np.array(text, "U2")
            if kind == "U2"
            else np.array(values, kind)
        )

    counter, whole = ClassCounter(), [value for piece in pieces for value in piece]
    weight = np.arange(1.0, len(whole) + 1)
    at = 0
    for piece in pieces:
        counter.add(as_kind(piece), weight[at : at + len(piece)])
        at += len(piece)
    keys = sorted(set(whole)) if kind in ("int64", "float64") else sorted(set(map(str, whole)))
    names = [value if kind in ("int64", "float64") else str(value) for value in whole]
    assert counter.classes.tolist() == keys
    assert counter.counts.tolist() == [names.count(key) for key in keys]
    assert counter.weight_sums.tolist() == [sum(w for n, w in zip(names, weight, strict=True) if n == k) for k in keys]


def test_unknown_classes_are_named():
    codec = TargetCodec(np.array([0, 1]))
    with pytest.raises(DataError, match="row 2: target 7 is none of the 2 known classes"):
        codec.encode(np.array([0, 1, 7]))
    codes, row = codec.look_up(np.array([0, 1, 7, 8]))
    assert (codes[:, 0].tolist(), row) == ([0, 1, -1, -1], 2)
    with pytest.raises(DataError, match=r"target 'z'.*'a', 'b'"):
        TargetCodec(np.array(["a", "b"])).encode(pa.array(["a", "z"]))


def test_classes_match_across_types_of_the_same_kind():
    assert TargetCodec(np.array([0, 1])).encode(np.array([1.0, 0.0], np.float32))[:, 0].tolist() == [1, 0]
    assert TargetCodec(np.array(["a", "b"])).encode(pa.array(["b", "a"]))[:, 0].tolist() == [1, 0]
    assert TargetCodec(np.array(["a", "b"], object)).encode(np.array(["b", "a"]))[:, 0].tolist() == [1, 0]


def test_what_cannot_be_classes():
    with pytest.raises(SchemaError, match="3 columns cannot hold classes"):
        ClassCounter().add(np.zeros((4, 3)))
    with pytest.raises(SchemaError, match="mixes int and str"):
        _ = classes_of(np.array(["a", 1], object)).classes
    with pytest.raises(SchemaError, match="list cannot be a class"):
        ClassCounter().add(pa.array([[1], [2]]))
    with pytest.raises(DataError, match="regressor"):
        ClassCounter(max_classes=10).add(np.arange(11.0))


def test_classes_known_beforehand():
    assert TargetCodec.of_classes(["b", "a", "b"]).classes.tolist() == ["a", "b"]
    assert TargetCodec.of_classes(np.array([3, 1])).classes.tolist() == [1, 3]
    for wrong in ([], [1.0, np.nan]):
        with pytest.raises(OptionError, match="at least one class"):
            TargetCodec.of_classes(wrong)


class TestRegression:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "uint64", "bool"])
    def test_numbers_come_back_as_they_were(self, dtype):
        y = np.array([0, 1, 1], dtype)
        codec = TargetCodec.from_json(json.loads(json.dumps(TargetCodec(None, 1, dtype).to_json())))
        codes = codec.encode(y)
        assert codes.dtype == np.float64
        assert codes.shape == (3, 1)
        back = codec.decode(codes[:, 0])
        assert back.dtype == dtype
        assert (back == y).all()

    def test_several_outputs(self):
        y = np.arange(6, dtype=np.float32).reshape(3, 2)
        assert (TargetCodec(None, 2).encode(y) == y).all()
        with pytest.raises(SchemaError, match="2 columns: expected 1"):
            TargetCodec(None).encode(y)

    def test_arrow_numbers(self):
        assert TargetCodec(None).encode(pa.array([decimal.Decimal("1.5"), None]))[0, 0] == 1.5
        assert np.isnan(TargetCodec(None).encode(pa.array([1.0, None]))[1, 0])

    def test_text_is_refused(self):
        for y in (np.array(["a"]), pa.array(["a"]), np.array(["2020-01-01"], "M8[D]")):
            with pytest.raises(SchemaError, match="expected numbers"):
                TargetCodec(None).encode(y)

    def test_integers_too_big_to_keep_are_refused_where_they_must_be_kept(self):
        y = np.array([1, -(2**53) - 1])
        assert TargetCodec(None).encode(y)[1, 0] == -(2.0**53)
        with pytest.raises(DataError, match="-9007199254740993 cannot be kept exactly"):
            TargetCodec(None, 1, "int64").encode(y)
