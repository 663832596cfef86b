"""Code, arguments and values as bytes."""

import dataclasses
import datetime as dt
import decimal
import enum
import gc
import pathlib
import pickle
import sys
import threading
import uuid
import zoneinfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fieldlab_common.errors import InvalidMessage, UnpicklableError, UntrustedValue
from fieldlab_common.payload import Unresolved, decode_value, encode_value, seal, unseal
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    label: str = ""


class Level(enum.IntEnum):
    LOW = 1


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Place:
    what: object
    where: Point


class Opaque:
    pass


def round_trip(value):
    encoded = encode_value(value)
    assert encoded.format in ("json", "parts")
    return decode_value(encoded.format, encoded.json, encoded.body)


DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=[]))
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.datetimes(timezones=st.sampled_from([None, dt.UTC, zoneinfo.ZoneInfo("Europe/Paris")]))
    | st.timedeltas()
    | st.uuids()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.just("$"), inner)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=10,
)


@given(DATA)
def test_data_comes_back_as_what_it_was(value):
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        2**200,
        range(3, 9, 2),
        pathlib.Path("a/b"),
        {1, 2},
        bytearray(b"x"),
        dt.time(1, 2),
        dt.date(2026, 1, 2),
    ],
)
def test_less_usual_data_too(value):
    assert round_trip(value) == value


def test_not_a_number_stays_one():
    assert round_trip(float("nan")) != round_trip(float("nan"))


@pytest.mark.parametrize("dtype", ["float64", "int8", ">i4", "bool", "complex64", "datetime64[s]", "U5"])
def test_arrays_keep_type_shape_and_content(dtype):
    array = np.zeros((2, 3), dtype=dtype)
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert (back == array).all()
    assert back.flags.writeable


@given(hnp.arrays(hnp.scalar_dtypes() | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)))
def test_any_array_of_numbers_or_text_comes_back(array):
    back = round_trip(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [np.asfortranarray(np.eye(3)), np.arange(9)[::2], np.float32(1.5), np.str_("x")])
def test_the_layout_of_an_array_does_not_matter(array):
    back = round_trip(array)
    assert type(back) is type(array)
    assert np.array_equal(back, array)


FRAMES = [
    pd.DataFrame({"n": [1, 2], "t": ["x", None], "c": pd.Categorical(["u", "v"])}),
    pd.DataFrame({"at": pd.to_datetime(["2026-01-01", "2026-07-01"]).tz_localize("Europe/Paris")}),
    pd.DataFrame({0: [1.5], 1: [True]}, index=pd.MultiIndex.from_tuples([(1, "a")], names=["i", "j"])),
    pd.DataFrame(),
]


@pytest.mark.parametrize("frame", FRAMES)
def test_frames_come_back_with_their_index_and_types(frame):
    pd.testing.assert_frame_equal(round_trip(frame), frame)


def test_a_table_comes_back():
    table = pa.table({"n": [1, None], "nested": [[1, 2], []]})
    assert round_trip(table) == table


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"mixed": [1, "x", 2.5]}),
        pd.DataFrame({"objects": [Point(1), Point(2)]}),
        pd.DataFrame([[1, 2]], columns=["twice", "twice"]),
        pd.DataFrame({"numbers": pd.Series([1, 2], dtype=object)}),
        np.array([Point(1), None]),
        np.ma.array([1, 2], mask=[0, 1]),
    ],
    ids=["mixed", "objects", "doubled columns", "numbers as objects", "array of objects", "masked"],
)
def test_what_has_no_safe_form_that_is_the_same_is_a_pickle(value):
    encoded = encode_value(value)
    assert encoded.format == "pickle"
    back = decode_value("pickle", data=encoded.body, trust=True)
    assert back.equals(value) if isinstance(value, pd.DataFrame) else (back == value).all()


@pytest.mark.parametrize("value", [*Colour, *Level, *Rights, Rights.READ | Rights.WRITE, Rights(0)])
def test_members_of_enumerations_come_back_as_themselves(value):
    assert round_trip(value) is value


@given(st.builds(Place, DATA, st.builds(Point, st.integers(), st.text())))
def test_dataclasses_in_dataclasses_come_back(place):
    assert round_trip([place, {"key": place}]) == [place, {"key": place}]


@example(dt.timezone(dt.timedelta(microseconds=1)))
@given(st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)).map(dt.timezone))
def test_any_offset_of_a_moment_is_kept(zone):
    moment = dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=zone)
    back = round_trip(moment)
    assert back.isoformat() == moment.isoformat()
    assert back.fold == 1


def test_known_classes_come_back_without_running_their_constructors():
    assert round_trip([Point(1, "a"), Colour.RED]) == [Point(1, "a"), Colour.RED]


def test_an_unknown_class_comes_back_as_its_data_and_nothing_is_imported():
    document = {"$": "dataclass", "type": "antigravity:X", "v": {"a": 1}}
    assert decode_value("json", document) == Unresolved("antigravity:X", {"a": 1})


def test_anything_else_is_a_pickle_that_opens_only_on_trust():
    encoded = encode_value(Opaque())
    assert encoded.format == "pickle"
    assert "Opaque" in encoded.summary
    with pytest.raises(UntrustedValue, match="trust"):
        decode_value("pickle", data=encoded.body)
    assert type(decode_value("pickle", data=encoded.body, trust=True)).__name__ == "Opaque"


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def test_printing_and_opening_without_trust_run_nothing():
    with pytest.raises(UntrustedValue):
        decode_value("pickle", data=pickle.dumps(Bomb()))


def test_a_circle_is_no_data_but_still_travels():
    circle = []
    circle.append(circle)
    assert encode_value(circle).format == "pickle"


@pytest.mark.parametrize(
    "document",
    [{"$": "moon"}, {"$": "int", "v": "zz"}, {"$": "datetime"}, {"$": "ndarray", "dtype": "O", "shape": [1], "v": ""}],
)
def test_a_malformed_document_is_a_typed_error(document):
    with pytest.raises(InvalidMessage):
        decode_value("json", document)


def test_what_cannot_travel_names_the_variable_to_blame():
    lock = threading.Lock()
    settings = {"db": [1, lock]}

    def work():
        return settings

    with pytest.raises(UnpicklableError, match=r"'settings'.*'db'.*item 2 is a _thread.lock"):
        seal(work, what="task 'work'")
    with pytest.raises(UnpicklableError, match=r"result.*item 1 is a _thread.lock"):
        encode_value([lock])


def test_references_leave_as_such_and_are_resolved_where_they_arrive():
    class Later:
        def __fieldlab_reference__(self):
            return ("step", "a", "value", ("k",))

    data = seal({"x": [Later()], "y": 1}, what="arguments")
    assert unseal(data, lambda reference: reference) == {"x": [("step", "a", "value", ("k",))], "y": 1}


def test_uuid_and_decimal_are_exact_data():
    encoded = encode_value([uuid.UUID(int=3), decimal.Decimal("1.10")])
    assert encoded.exact
    assert not encode_value(Point(1)).exact


# --- pandas -----------------------------------------------------------------------------------------------------------

INSTANTS = st.integers(-(2**33), 2**33).map(lambda seconds: dt.datetime(1970, 1, 1) + dt.timedelta(seconds=seconds))  # noqa: DTZ001 - pandas gives them their zone
SPANS = st.timedeltas(dt.timedelta(days=-9999), dt.timedelta(days=9999))
COLUMNS = [
    (st.integers(-(2**63), 2**63 - 1), "int64"),
    (st.integers(0, 255), "uint8"),
    (st.floats(), "float64"),
    (st.floats(width=32), "float32"),
    (st.booleans(), "bool"),
    (st.text(st.characters(exclude_categories=["Cs"])) | st.none(), "str"),
    (st.text(st.characters(exclude_categories=["Cs"])) | st.none(), "string"),
    (st.text("ab") | st.none(), "category"),
    (st.integers(-(2**31), 2**31) | st.none(), "Int64"),
    (st.floats(allow_nan=False) | st.none(), "Float64"),
    (st.booleans() | st.none(), "boolean"),
    (INSTANTS | st.none(), "datetime64[us]"),
    (INSTANTS | st.none(), "datetime64[ns, Europe/Paris]"),
    (INSTANTS | st.none(), "datetime64[s, UTC]"),
    (SPANS | st.none(), "timedelta64[ns]"),
    (SPANS | st.none(), "timedelta64[us]"),
]
NAMES = st.none() | st.text("xyz ") | st.integers(-3, 3) | st.tuples(st.text("ab"), st.integers(0, 3))


@st.composite
def columns(draw, size):
    values, dtype = draw(st.sampled_from(COLUMNS))
    return pd.Series(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype)


@st.composite
def indexes(draw, size):
    kind = draw(st.sampled_from(["range", "column", "several", "regular"]))
    if kind == "range":
        return pd.RangeIndex(5, 5 + 2 * size, 2, name=draw(st.none() | st.text("ab")))
    if kind == "regular":
        return pd.date_range("2026-01-01", periods=size, freq=draw(st.sampled_from(["D", "15min", "MS"])), tz="UTC")
    if kind == "column":
        return pd.Index(draw(columns(size)).array, name=draw(st.none() | st.text("ab")))
    return pd.MultiIndex.from_arrays(
        [draw(columns(size)).array, draw(columns(size)).array], names=draw(st.sampled_from([[None, None], ["i", "j"]]))
    )


@st.composite
def series(draw):
    size = draw(st.integers(0, 4))
    made = draw(columns(size)).set_axis(draw(indexes(size)))
    return made.rename(draw(NAMES))


@st.composite
def frames(draw):
    size, width = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    labels = draw(st.sampled_from([range(3), ["a", "b", "c"], [("a", 1), ("a", 2), ("b", 1)]]))
    index = draw(indexes(size))
    held = {label: draw(columns(size)).set_axis(index) for label in labels[:width]}
    return pd.DataFrame(held, index=index, columns=pd.RangeIndex(width) if labels == range(3) else None)


def same(value):
    """Open it again: it is data, and exactly what it was, or a pickle."""
    encoded = encode_value(value)
    return decode_value(encoded.format, encoded.json, encoded.body, trust=encoded.format == "pickle")


@settings(deadline=None)
@given(series())
def test_a_series_comes_back_with_its_index_name_and_type(value):
    back = same(value)
    pd.testing.assert_series_equal(back, value, check_index_type="exact", check_freq=True, check_exact=True)
    assert type(back.name) is type(value.name)


@settings(deadline=None)
@given(frames())
def test_a_frame_comes_back_with_its_index_columns_and_types(value):
    exact = {"check_index_type": "exact", "check_column_type": "exact", "check_freq": True, "check_exact": True}
    pd.testing.assert_frame_equal(same(value), value, **exact)


@pytest.mark.parametrize(
    "value",
    [
        pd.Series([1, 2], name="n"),
        pd.Series(["x", None], index=pd.MultiIndex.from_product([["a"], [1, 2]], names=["i", None])),
        pd.Series(pd.Categorical(["a", "b", None], categories=["b", "a", "c"], ordered=True), name=("t", 1)),
        pd.Series(pd.to_datetime(["2026-10-25 00:30", "2026-10-25 01:30"], utc=True).tz_convert("Europe/Paris")),
        pd.Series(pd.interval_range(0, 3), name=3),
        pd.Series(pd.period_range("2026", periods=3, freq="M")),
        pd.Series([], dtype="float32"),
        pd.Series([1.5, 2.5], index=pd.date_range("2026", periods=2, freq="15min")),
    ],
)
def test_kinds_of_series_that_are_no_pickle(value):
    pd.testing.assert_series_equal(round_trip(value), value, check_index_type="exact", check_freq=True)


@pytest.mark.parametrize(
    "value",
    [
        pd.Index(["a", "b"], name="x"),
        pd.RangeIndex(2, 8, 3, name="x"),
        pd.date_range("2026", periods=3, freq="MS", tz="Europe/Paris"),
        pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["i", "j"]),
        pd.CategoricalIndex(["a", "b"], ordered=True),
        pd.timedelta_range("1h", periods=3, freq="20min"),
    ],
)
def test_indexes_come_back(value):
    pd.testing.assert_index_equal(round_trip(value), value, exact=True)
    assert getattr(round_trip(value), "freq", None) == getattr(value, "freq", None)


@pytest.mark.parametrize(
    "value",
    [
        pd.Timestamp("2026-10-25 00:30:00.000000001", tz="UTC").tz_convert("Europe/Paris"),
        pd.Timestamp("2026-10-25 02:30").as_unit("s"),
        pd.Timedelta("1h 3ns"),
        pd.Period("2026-03", "M"),
        pd.Interval(1.5, 2.5, closed="both"),
        pd.NaT,
        pd.NA,
    ],
)
def test_scalars_of_pandas_come_back(value):
    back = round_trip({"max": value})["max"]
    assert type(back) is type(value)
    assert back is value or back == value
    assert getattr(back, "unit", None) == getattr(value, "unit", None)
    assert str(getattr(back, "tz", None)) == str(getattr(value, "tz", None))


@pytest.mark.parametrize("value", [pd.Categorical(["a", None]), pd.array([1, None]), pd.array(["x"], dtype="string")])
def test_extension_arrays_come_back(value):
    back = round_trip(value)
    pd.testing.assert_extension_array_equal(back, value)
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        pd.Series([1, "x"]),
        pd.Series([1, 2], dtype=object),
        pd.Series([[1], [2]]),
        pd.Series([decimal.Decimal("1.0"), decimal.Decimal("1.00")]),
        pd.Series([None, np.nan, "x"], dtype=object),
        pd.Series(pd.arrays.SparseArray([0, 0, 1])),
        pd.Series([1 + 2j]),
        pd.Series([1, 2], index=pd.Index(["x", None], dtype=object)),
    ],
    ids=["mixed", "objects", "lists", "decimals", "two nothings", "sparse", "complex", "index of objects"],
)
def test_a_series_that_cannot_be_kept_exactly_is_a_pickle_and_says_so(value):
    encoded = encode_value(value)
    assert (encoded.format, encoded.summary) == ("pickle", "pandas.Series (pickle)")
    pd.testing.assert_series_equal(same(value), value)


def test_a_frame_with_attributes_is_a_pickle_or_keeps_them():
    frame = pd.DataFrame({"a": [1]})
    frame.attrs["unit"] = "ms"
    assert same(frame).attrs == {"unit": "ms"}


def test_a_nullable_column_keeps_what_is_missing_apart_from_what_is_no_number():
    column = pd.Series(pd.arrays.FloatingArray(np.array([1.0, np.nan, 2.0]), np.array([False, False, True])))
    back = same(column)
    assert back.isna().tolist() == column.isna().tolist()
    pd.testing.assert_series_equal(back, column)


@pytest.mark.parametrize(
    "dtype", [[("t", "<f8"), ("n", ">u2")], [("at", "M8[us]"), ("where", [("x", "f4"), ("y", "f4")])]]
)
def test_arrays_of_records_come_back(dtype):
    array = np.zeros(5, dtype=dtype)
    back = round_trip(array)
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


SIZE = 64 << 20


# --- parts ------------------------------------------------------------------------------------------------------------


def large(value):
    encoded = encode_value(value)
    assert encoded.format == "parts"
    body = encoded.body
    assert len(body) == encoded.size
    return body


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_travel_beside_the_document_as_they_are(kind):
    data = kind(range(256)) * 1000
    body = large({"pcap": data, "n": 1})
    assert bytes(data) in body
    assert len(body) < len(data) + 400
    back = decode_value("parts", data=body)
    assert back == {"pcap": data, "n": 1}
    assert type(back["pcap"]) is kind


def test_an_array_of_a_megabyte_takes_a_megabyte_and_is_not_copied_when_it_is_opened():
    array = np.arange(131_072, dtype="f8").reshape(256, 512)
    body = bytearray(large([array, "beside"]))
    assert len(body) < array.nbytes + 400
    back, _ = decode_value("parts", data=body)
    assert np.array_equal(back, array)
    assert np.shares_memory(back, np.frombuffer(body, np.uint8))
    assert back.flags.writeable
    assert decode_value("parts", data=bytes(body))[0].flags.writeable


def test_several_parts_keep_their_places():
    frame = pd.DataFrame({"n": np.arange(10_000), "t": ["abc"] * 10_000})
    value = [np.arange(10_000), {"$": b"x" * 40_001, "part": 0}, frame, frame["t"]]
    back = decode_value("parts", data=large(value))
    assert np.array_equal(back[0], value[0])
    assert back[1] == value[1]
    pd.testing.assert_frame_equal(back[2], frame)
    pd.testing.assert_series_equal(back[3], frame["t"])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda body: b"",
        lambda body: b"x" + body[1:],
        lambda body: body[:-70],
        lambda body: body.replace(b'"part":0', b'"part":7'),
        lambda body: body.replace(b'"part":0', b'"part":"'),
        lambda body: body.replace(b"<i8", b"|O8"),
        lambda body: body[:8] + b"\xff" * 8 + body[16:],
    ],
)
def test_damaged_parts_are_a_typed_error(wrong):
    body = large(np.arange(10_000, dtype="<i8"))
    with pytest.raises(InvalidMessage):
        decode_value("parts", data=wrong(body))


def test_a_document_that_names_bytes_itself_is_refused():
    for raw in ("text", 3, ["x"]):
        with pytest.raises(InvalidMessage):
            decode_value("json", {"$": "ndarray", "dtype": "u1", "shape": [1], "raw": raw})


def _resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def peak(act):
    """By how many bytes this process grew at most while it acted."""
    gc.collect()
    pa.default_memory_pool().release_unused()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is counted anew (proc(5))
    before = _resident("VmRSS")
    kept = act()
    grown = _resident("VmHWM") - before
    del kept
    return grown


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    "make",
    [
        lambda: b"x" * SIZE,
        lambda: np.ones(SIZE // 8),
        lambda: pd.DataFrame({name: np.ones(SIZE // 16) for name in "ab"}),
        lambda: pd.Series(np.ones(SIZE // 8)),
    ],
    ids=["bytes", "array", "frame", "series"],
)
def test_a_large_value_is_in_memory_at_most_twice_on_either_side(make, tmp_path):
    round_trip(make()[:1])  # so that the libraries are loaded
    file = tmp_path / "value"

    def write():
        with file.open("wb") as out:
            encode_value(make()).write(out.write)

    assert peak(write) < 2.4 * SIZE

    def read():
        data = bytearray()
        with file.open("rb") as source:
            while piece := source.read(1 << 20):
                data.extend(piece)
        return decode_value("parts", data=data)

    assert peak(read) < 2.4 * SIZE
