"""Two codecs, one wire: what ``wire`` writes msgspec reads as the same, and the other way round, and both refuse alike.

Executors and clients use ``fieldlab_common.wire``; the director uses msgspec on the same classes.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec
import pytest
from fieldlab_common import protocol, wire
from fieldlab_common.errors import FieldlabError, InvalidMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MESSAGES = sorted(
    {
        value
        for name in protocol.__all__
        if isinstance(value := getattr(protocol, name), type)
        and dataclasses.is_dataclass(value)
        and value is not protocol.Endpoint
    },
    key=lambda cls: cls.__name__,
)

WHOLE = st.integers(-(2**63), 2**63 - 1)
REAL = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | WHOLE | REAL | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PLAIN: Mapping[Any, st.SearchStrategy[Any]] = {
    int: WHOLE,
    float: REAL,
    str: TEXT,
    bool: st.booleans(),
    type(None): st.none(),
    Any: JSON,
    object: JSON,
}
# Text and numbers that mean something: what the classes themselves check when they are made.
SPECIAL: Mapping[tuple[str, str], st.SearchStrategy[Any]] = {
    ("Resources", "cpus"): st.none() | st.floats(0.1, 64),
    ("Resources", "memory"): st.none() | st.integers(1, 2**40) | st.sampled_from(["1 GiB", "512MB"]),
    ("Resources", "walltime"): st.none() | st.floats(1, 1e6) | st.sampled_from(["2h", "90s"]),
}


def of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type, as a party would make them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return message(hint)
    if origin is tuple:
        return st.lists(of(args[0]), max_size=2).map(tuple)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return st.dictionaries(TEXT, of(args[1]), max_size=3)
    return st.one_of([of(arg) for arg in args])


def message(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Messages of a class, each optional field there or not."""
    hints = typing.get_type_hints(cls)
    needed: dict[str, Any] = {}
    optional: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        special = SPECIAL.get((cls.__name__, field.name))
        strategy = of(hints[field.name]) if special is None else special
        (needed if required else optional)[field.name] = strategy
    return st.fixed_dictionaries(needed, optional=optional).map(lambda values: cls(**values))


def both(cls: type[Any], data: bytes) -> tuple[Any, Any]:
    """What each codec makes of ``data``: the message, or None if it refuses."""
    try:
        pure = wire.loads(cls, data)
    except FieldlabError:
        pure = None
    try:
        fast = msgspec.json.decode(data, type=cls)
    except (msgspec.DecodeError, FieldlabError):
        fast = None
    return pure, fast


def test_there_are_messages_to_compare() -> None:
    assert {"SubmitExperiment", "Claim", "Record", "StepRecord", "Poll", "Launch"} <= {c.__name__ for c in MESSAGES}


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_what_one_writes_both_read_as_the_same(cls: type[Any], data: st.DataObject) -> None:
    sent = data.draw(message(cls))
    assert both(cls, wire.dumps(sent)) == (sent, sent)
    assert both(cls, msgspec.json.encode(sent)) == (sent, sent)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_field_of_another_type_is_read_alike_or_refused_by_both(cls: type[Any], data: st.DataObject) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    if not fields:
        return
    document = json.loads(msgspec.json.encode(data.draw(message(cls))))
    document[data.draw(st.sampled_from(fields))] = data.draw(JSON)
    pure, fast = both(cls, json.dumps(document).encode())
    assert pure == fast


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_what_is_not_an_object_is_refused_by_both(cls: type[Any]) -> None:
    for data in (b"[]", b"null", b'"x"', b"1", b"", b"{", b"\xff"):
        assert both(cls, data) == (None, None)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_field_of_a_newer_release_is_passed_over_by_both(cls: type[Any], data: st.DataObject) -> None:
    sent = data.draw(message(cls))
    newer = {**json.loads(wire.dumps(sent)), "from_the_future": {"x": [1]}}
    assert both(cls, json.dumps(newer).encode()) == (sent, sent)


def test_both_name_the_place_of_what_is_wrong() -> None:
    document = b'{"name": "x", "deployments": [{"name": 5}]}'
    with pytest.raises(InvalidMessage) as pure:
        wire.loads(protocol.SubmitExperiment, document)
    with pytest.raises(msgspec.ValidationError, match=r"\$\.deployments\[0\]\.name"):
        msgspec.json.decode(document, type=protocol.SubmitExperiment)
    assert pure.value.details["path"] == "$.deployments[0].name"
