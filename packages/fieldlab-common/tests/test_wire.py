"""The codec and the framing of records."""

import pytest
from fieldlab_common.deployment import Deployment, Graph, Need, On, StepSpec
from fieldlab_common.environment import Requirements, Venv
from fieldlab_common.errors import InvalidMessage
from fieldlab_common.node import Node
from fieldlab_common.wire import FRAME, MAX_FRAME, decode, dumps, encode, frame, loads, unframe
from hypothesis import given
from hypothesis import strategies as st

STEP = StepSpec(name="s", task="t", code="c", args="a", needs=(Need(step="r", on=On.FAILURE),), over_path=("k", 1))
GRAPH = Graph(name="g", steps=(STEP,))


def test_a_nested_value_comes_back_equal():
    deployment = Deployment(
        name="d",
        node=Node.dummy("n", cpus=2),
        graph=GRAPH,
        environment=Venv(requirements=Requirements(packages=("x",))),
    )
    assert loads(Deployment, dumps(deployment)) == deployment


def test_equal_values_give_equal_bytes():
    assert dumps(GRAPH) == dumps(loads(Graph, dumps(GRAPH)))


def test_unknown_fields_are_ignored_and_absent_ones_take_their_default():
    assert decode(Need, {"step": "a", "colour": "red"}) == Need(step="a")


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"name": "g", "steps": [{"name": 3}]}, r"\$.steps\[0\].name"),
        ({"name": "g"}, r"lacks 'steps'"),
        ({"name": "g", "steps": {}}, r"\$.steps"),
        ([], r"\$"),
        ({"name": "g", "steps": [], "max_parallel": "2"}, "max_parallel"),
        ({"name": "g", "steps": [], "max_parallel": True}, "max_parallel"),
        ({"name": "g", "steps": [], "stop_on_failure": 1}, "stop_on_failure"),
    ],
)
def test_a_wrong_type_is_an_error_with_its_path(data, path):
    with pytest.raises(InvalidMessage, match=path):
        decode(Graph, data)


def test_an_unknown_kind_lists_those_there_are():
    data = encode(Deployment(name="d", node=Node(name="n"), graph=GRAPH, environment=Venv()))
    data["environment"]["kind"] = "moon"
    with pytest.raises(InvalidMessage, match="container, host, venv"):
        decode(Deployment, data)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff", b'{"name": NaN}'])
def test_what_is_not_json_is_a_typed_error(data):
    with pytest.raises(InvalidMessage):
        loads(Graph, data)


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(min_value=0, max_value=60))
def test_whole_records_come_back_and_a_torn_tail_is_left(bodies, cut):
    data = b"".join(frame(n, body) for n, body in enumerate(bodies, 1))
    kept = data[: max(0, len(data) - cut)]
    read = list(unframe(kept))
    assert [(n, body) for n, body, _ in read] == list(enumerate(bodies, 1))[: len(read)]
    assert (read[-1][2] if read else 0) <= len(kept)
    assert cut or len(read) == len(bodies)


def test_a_flipped_bit_and_a_giant_length_are_errors():
    good = bytearray(frame(7, b"body"))
    good[-1] ^= 1
    with pytest.raises(InvalidMessage, match="checksum"):
        list(unframe(bytes(good)))
    with pytest.raises(InvalidMessage, match="over the limit"):
        list(unframe(FRAME.pack(MAX_FRAME + 1, 0, 1)))


def test_a_record_moved_to_another_number_is_an_error():
    good = bytearray(frame(7, b"body"))
    good[15] = 8
    with pytest.raises(InvalidMessage, match="checksum"):
        list(unframe(bytes(good)))


def test_half_a_character_does_not_stop_a_message():
    assert loads(Need, dumps(Need(step="a\ud800b"))).step == "a?b"
