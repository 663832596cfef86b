"""A pool of nodes: filtered, taken from, looked at."""

import pytest
from fieldlab.pool import NodePool
from fieldlab_common.errors import DefinitionError, NotEnoughNodes, UnknownNameError
from fieldlab_common.node import Availability, Elastic, Node
from fieldlab_common.protocol import Hold
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


# --- elastic pools ---------------------------------------------------------------------------------------------------


def cloud(most: int | None = 3, **facts: object) -> Node:
    return Node.dummy("cloud", elastic=Elastic(most=most), os="linux", **facts)


def test_taking_from_a_template_makes_nodes_with_names_of_their_own() -> None:
    pool = NodePool([cloud(zone="a")])
    taken = pool.take(2) + pool.take(2)
    assert len(set(taken.names)) == 4
    assert all(name.startswith("cloud-") for name in taken.names)
    assert {(one.template, one.elastic, one["zone"]) for one in taken} == {("cloud", None, "a")}


def test_fixed_nodes_are_taken_before_any_are_made() -> None:
    taken = NodePool([cloud(), Node.dummy("pi")]).take(2)
    assert taken.names[0] == "pi"
    assert taken[1].template == "cloud"


def test_more_than_a_template_makes_are_not_to_be_had() -> None:
    with pytest.raises(NotEnoughNodes, match="cloud: makes at most 3 at a time"):
        NodePool([cloud()]).take(4)
    assert len(NodePool([cloud(None)]).take(40)) == 40


def test_nothing_is_made_of_a_template_whose_engine_is_away() -> None:
    with pytest.raises(NotEnoughNodes, match="cloud: is offline"):
        NodePool([cloud(availability=Availability.OFFLINE)]).take(1)


# --- who has what ----------------------------------------------------------------------------------------------------


def held() -> NodePool:
    nodes = [Node.dummy("a", availability=Availability.HELD), Node.dummy("b", availability=Availability.HELD), cloud()]
    holds = [
        Hold(node="a", infrastructure="dummy", since=0.0, run="exp"),
        Hold(node="b", infrastructure="dummy", since=0.0),
        Hold(node="cloud-1", infrastructure="dummy", since=0.0, template="cloud"),
    ]
    return NodePool(nodes, holds=holds, again=lambda: held().where(node.name != "b"))


def test_a_table_says_who_has_what_as_far_as_one_may_know() -> None:
    for text in (repr(held()), held()._repr_html_()):
        assert "exp since" in text
        assert "in use since" in text
        assert "1 of 3 in use" in text


def test_holds_are_those_of_the_pools_nodes() -> None:
    assert [hold.node for hold in held().where(node.name == "b").holds] == ["b"]
    assert [hold.node for hold in held().where(node.name == "cloud").holds] == ["cloud-1"]


def test_a_held_node_is_taken_after_those_that_are_free() -> None:
    assert (held() + Node.dummy("free")).take(2).names == ("free", "a")


def test_a_refreshed_pool_has_the_same_nodes_as_they_are_now() -> None:
    some = held()[:2].refresh()
    assert [(one.name, one.availability) for one in some] == [("a", Availability.HELD), ("b", Availability.OFFLINE)]
    assert held().refresh().names == ("a", "cloud")
    with pytest.raises(DefinitionError, match="not of a director"):
        NodePool([cloud()]).refresh()
