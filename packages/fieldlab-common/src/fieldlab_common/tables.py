"""Arrays, frames and tables as data: what numpy, pandas and pyarrow make, in forms that run nothing when opened.

An array travels as its bytes beside its type and shape; a frame as an Arrow stream, whose metadata hold what pandas
knows more (the kinds of columns and of the index). A series, an index, an extension array and a scalar of pandas are
frames with one column, or none. Nothing of these libraries is imported before there is a value of theirs.

Invariant: what cannot be put back precisely (types, index, names, frequency, what a column of objects holds) is
``NotData``, and is left to the opaque pickle. Checked on the types, and by a look at columns of objects: not by
encoding the value twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

__all__ = ["NotData", "Part", "Raw", "decode", "encode"]

_PLAIN = {"string", "bytes", "date", "empty"}  # what a column of objects may hold, in pandas' words

Write = Callable[[Any], object]  # takes anything with a buffer
Emit = Callable[["Part"], dict[str, Any]]  # puts a part where it goes, and says how it is found again
Encode = Callable[[Any], Any]
Document = Mapping[str, Any]


class NotData(Exception):
    """The value has no safe form that is the same."""


class Part(Protocol):
    """Bytes of a value, in a form of their own."""

    @property
    def size(self) -> int:
        """How many bytes they are."""
        ...

    def write(self, write: Write) -> None:
        """Give them all to ``write``, piece by piece; nothing is copied that need not be."""
        ...


class Raw:
    """Bytes that are there already."""

    def __init__(self, data: Any) -> None:
        self._data = memoryview(data)
        self.size = self._data.nbytes

    def write(self, write: Write) -> None:
        """Give them to ``write``."""
        write(self._data)


class _Stream:
    """A table as an Arrow stream, made as it is written."""

    def __init__(self, table: Any) -> None:
        import pyarrow

        self._table = table
        sink = pyarrow.MockOutputStream()
        self._write_to(sink)
        self.size = int(sink.size())

    def write(self, write: Write) -> None:
        """Make it."""
        self._write_to(_File(write))

    def _write_to(self, sink: Any) -> None:
        import pyarrow

        with pyarrow.ipc.new_stream(sink, self._table.schema) as writer:
            writer.write_table(self._table, max_chunksize=1 << 20)


class _File:
    """As much of a file as pyarrow needs."""

    closed = False

    def __init__(self, write: Write) -> None:
        self._write = write

    def write(self, data: Any) -> None:
        """Take bytes."""
        self._write(data)

    def flush(self) -> None:
        """Nothing is held back."""


# --- to documents -----------------------------------------------------------------------------------------------------


def encode(value: Any, emit: Emit, encode_other: Encode) -> dict[str, Any]:
    """The document of a value whose type is of one of those libraries; ``encode_other`` makes that of a name in it.

    Raises:
        NotData: it has none.
    """
    library = type(value).__module__.partition(".")[0]
    if library == "numpy":
        return _encode_numpy(value, emit)
    try:
        import pyarrow
    except ImportError as error:
        raise NotData(f"without pyarrow, a value of {library}") from error
    if type(value) is pyarrow.Table:
        return {"$": "table", **emit(_Stream(value))}
    if library == "pandas":
        return _encode_pandas(value, emit, encode_other)
    raise NotData(type(value).__name__)


def _encode_numpy(value: Any, emit: Emit) -> dict[str, Any]:
    import numpy

    cls = type(value)
    if not (cls is numpy.ndarray or isinstance(value, numpy.generic)) or value.dtype.hasobject:
        raise NotData(cls.__name__)
    dtype = value.dtype
    if dtype.names and not isinstance(value, numpy.ndarray):
        raise NotData("a record")
    document: dict[str, Any] = {"$": "ndarray" if isinstance(value, numpy.ndarray) else "scalar"}
    document["dtype"] = _described(dtype)
    document["shape"] = list(value.shape)
    flat = numpy.ascontiguousarray(value).reshape(-1)
    return {**document, **emit(Raw(flat.view(numpy.uint8) if flat.nbytes else b""))}


def _described(dtype: Any) -> Any:
    """A type as text, or, if it has fields, as a list of them."""
    import numpy

    if not dtype.names:
        if dtype.subdtype is not None or numpy.dtype(dtype.str) != dtype:
            raise NotData(f"an array of {dtype}")
        return dtype.str
    fields = [[name, _described(dtype.fields[name][0])] for name in dtype.names]
    if _dtype(fields) != dtype:  # gaps between its fields, titles, or metadata
        raise NotData("an array of records of an unusual layout")
    return fields


def _dtype(described: Any) -> Any:
    import numpy

    if isinstance(described, str):
        return numpy.dtype(described)
    return numpy.dtype([(str(name), _dtype(inner)) for name, inner in described])


def _encode_pandas(value: Any, emit: Emit, encode_other: Encode) -> dict[str, Any]:
    import pandas

    cls = type(value)
    if value is pandas.NaT or value is pandas.NA:
        return {"$": "pandas", "v": "NaT" if value is pandas.NaT else "NA"}
    if cls is pandas.DataFrame:
        return {"$": "dataframe", **_encode_frame(value, emit)}
    if cls is pandas.Series:
        if value.attrs:
            raise NotData("a series with attributes")
        return {"$": "series", "name": encode_other(value.name), **_encode_frame(value.to_frame("v"), emit)}
    if isinstance(value, pandas.Index):
        return {"$": "index", **_encode_frame(pandas.DataFrame(index=value), emit)}
    one = isinstance(value, pandas.Timestamp | pandas.Timedelta | pandas.Period | pandas.Interval)
    if not one and not isinstance(value, pandas.api.extensions.ExtensionArray):
        raise NotData(cls.__name__)
    series = pandas.Series([value] if one else value)
    if one:
        kept: Any = series.iloc[0]
        if type(kept) is not cls or kept != value:
            raise NotData(f"this {cls.__name__}")
    return {"$": "element" if one else "array", **_encode_frame(series.to_frame("v"), emit)}


def _encode_frame(frame: Any, emit: Emit) -> dict[str, Any]:
    import pandas
    import pyarrow

    try:
        table = pyarrow.Table.from_pandas(frame)
        empty = table.slice(0, 0).to_pandas()
    except (pyarrow.ArrowException, ValueError, TypeError, NotImplementedError) as error:
        raise NotData(f"a frame that is no table: {error}") from error
    document: dict[str, Any] = {}
    if type(frame.columns) is pandas.RangeIndex:
        document["columns"] = [frame.columns.start, frame.columns.stop, frame.columns.step]
        empty.columns = _range(document["columns"], empty.columns.name)
    if getattr(frame.index, "freq", None) is not None:
        document["freq"] = _frequency(frame.index)
    _check_frame(frame, empty)
    return {**document, **emit(_Stream(table))}


def _range(bounds: list[int], name: Any) -> Any:
    import pandas

    start, stop, step = map(int, bounds)
    return pandas.RangeIndex(start, stop, step, name=name)


def _check_frame(frame: Any, empty: Any) -> None:
    """Refuse what does not come back as it is; ``empty``: what came back of it, without its rows."""
    if not (list(empty.dtypes) == list(frame.dtypes) and _alike(empty.columns, frame.columns)):
        raise NotData("a frame with columns of a kind that Arrow does not have")
    if not empty.columns.equals(frame.columns):
        raise NotData("a frame with names of columns that Arrow does not have")
    if not _alike(empty.index, frame.index):
        raise NotData("a frame with an index of a kind that Arrow does not have")
    if frame.attrs != empty.attrs or not frame.flags.allows_duplicate_labels:
        raise NotData("a frame with attributes or flags")
    for position, dtype in enumerate(frame.dtypes):
        _check_held(frame.iloc[:, position], dtype)
    for level in range(frame.index.nlevels):
        held = frame.index.get_level_values(level)
        _check_held(held, held.dtype)


def _alike(empty: Any, index: Any) -> bool:
    """Whether two indexes are of one kind, and have the same names."""
    import pandas

    if type(empty) is not type(index) or empty.nlevels != index.nlevels:
        return False
    if type(index) is pandas.RangeIndex:  # of one without rows the name is not put back
        return isinstance(index.name, str | None)
    kinds = [[one.get_level_values(level).dtype for level in range(one.nlevels)] for one in (empty, index)]
    return kinds[0] == kinds[1] and list(empty.names) == list(index.names)


def _check_held(column: Any, dtype: Any) -> None:
    """Refuse a column that holds things of a kind that would become others: any objects, and two kinds of nothing."""
    import pandas

    if dtype.kind == "O" and not pandas.api.types.is_extension_array_dtype(dtype):
        if pandas.api.types.infer_dtype(column, skipna=True) not in _PLAIN:
            raise NotData("a column of objects")
        if not all(missing is None for missing in column[column.isna()]):
            raise NotData("a column of objects with several kinds of nothing in it")
    elif isinstance(dtype, pandas.CategoricalDtype):
        _check_held(dtype.categories, dtype.categories.dtype)
    elif dtype.kind == "f" and pandas.api.types.is_extension_array_dtype(dtype):
        known = column[~column.isna()].to_numpy(float, na_value=0.0)
        if (known != known).any():
            raise NotData("a column with missing values beside what is not a number")


def _frequency(index: Any) -> str:
    """The frequency of an index of times, as text that gives the same."""
    import pandas

    text = str(index.freqstr)
    try:
        same = pandas.tseries.frequencies.to_offset(text) == index.freq
    except ValueError:
        same = False
    if not same:
        raise NotData("an index of times with a frequency of its own")
    return text


# --- and back ---------------------------------------------------------------------------------------------------------


def decode(document: Document, raw: Callable[[Document], Any], decode_other: Encode) -> Any:
    """The value of a document; ``raw`` gives the bytes of its part, ``decode_other`` what stands for a name in it.

    Raises:
        ValueError, TypeError, LookupError: it is none that ``encode`` makes.
    """
    match document["$"]:
        case "ndarray":
            return _decode_array(document, raw(document))
        case "scalar":
            return _decode_array(document, raw(document))[()]
        case "table":
            return _decode_table(raw(document))
        case "pandas":
            return _decode_nothing(document["v"])
    frame = _decode_frame(document, raw(document))
    match document["$"]:
        case "dataframe":
            return frame
        case "index":
            return frame.index
        case "series":
            return frame["v"].rename(decode_other(document["name"]))
        case "array":
            return frame["v"].array
    return frame["v"].iloc[0]


def _decode_array(document: Document, data: Any) -> Any:
    import numpy

    dtype = _dtype(document["dtype"])
    if dtype.hasobject:
        raise ValueError("an array of objects is no data")
    view = memoryview(data)
    if view.readonly:
        view = memoryview(bytearray(view))
    array = numpy.frombuffer(view, dtype=dtype) if view.nbytes else numpy.empty(0, dtype)
    return array.reshape(document["shape"])


def _decode_table(data: Any) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.py_buffer(data)).read_all()


def _decode_frame(document: Document, data: Any) -> Any:
    frame = _decode_table(data).to_pandas()
    if "columns" in document:
        frame.columns = _range(document["columns"], frame.columns.name)
    if "freq" in document:
        frame.index.freq = str(document["freq"])  # which checks that it is so
    return frame


def _decode_nothing(name: str) -> Any:
    import pandas

    return {"NaT": pandas.NaT, "NA": pandas.NA}[name]
