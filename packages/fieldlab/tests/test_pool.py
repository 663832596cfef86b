"""A pool of nodes: filtered, taken from, looked at."""

import pytest
from fieldlab.pool import NodePool
from fieldlab_common.errors import NotEnoughNodes, UnknownNameError
from fieldlab_common.node import Availability, Node
from fieldlab_common.selector import node


@pytest.fixture
def pool() -> NodePool:
    return NodePool(
        [
            Node.dummy("pi-1", os="linux", architecture="linux/arm64", site="lab"),
            Node.dummy("pi-2", os="linux", architecture="linux/arm64", availability=Availability.OFFLINE),
            Node.dummy("mac", os="macos"),
        ]
    )


def test_where_keeps_those_that_fit(pool: NodePool) -> None:
    assert pool.where(node.os == "linux").names == ("pi-1", "pi-2")
    assert pool.where(lambda n: n.name == "mac").names == ("mac",)


def test_taking_too_many_says_what_is_there_and_why_others_do_not_fit(pool: NodePool) -> None:
    with pytest.raises(NotEnoughNodes) as caught:
        pool.where(node.os == "linux").take(2)
    text = str(caught.value)
    assert "pi-1" in text
    assert "pi-2: is offline" in text
    assert "mac: `os` is 'macos'" in text
    assert caught.value.details == {"asked": 2, "available": 1}


def test_taking_gives_available_nodes(pool: NodePool) -> None:
    assert pool.take(2).names == ("pi-1", "mac")


def test_a_node_is_found_by_name_and_by_place(pool: NodePool) -> None:
    assert pool["mac"] is pool[2]
    assert "mac" in pool
    with pytest.raises(UnknownNameError, match="'pi-1'"):
        pool["pi1"]


def test_a_misspelt_property_is_told_not_silently_empty(pool: NodePool) -> None:
    with pytest.raises(UnknownNameError, match="'architecture'"):
        pool.where(node.archtecture == "linux/arm64")


def test_a_property_that_no_node_has_is_simply_false(pool: NodePool) -> None:
    assert len(pool.where(node.gpu_model == "x")) == 0


def test_pools_are_added_without_doubles(pool: NodePool) -> None:
    assert (pool[:2] + pool[1:] + Node.dummy("extra")).names == ("pi-1", "pi-2", "mac", "extra")


def test_the_table_cannot_be_broken_by_a_nodes_name() -> None:
    pool = NodePool([Node(name="<b>\x1b[2J", properties={"memory": 2**30})])
    assert "\x1b" not in repr(pool)
    assert "1.0 GiB" in repr(pool)
    assert "<b>" not in pool._repr_html_()
