"""Code, arguments and values as bytes."""

import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import pickle
import threading
import uuid
import zoneinfo

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fieldlab_common.errors import InvalidMessage, UnpicklableError, UntrustedValue
from fieldlab_common.payload import Unresolved, decode_value, encode_value, seal, unseal
from hypothesis import example, given
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
    assert encoded.format == "json"
    return decode_value("json", encoded.json)


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
