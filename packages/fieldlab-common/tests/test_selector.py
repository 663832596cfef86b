"""Selectors: data that can be asked of a node, compared and explained."""

import copy
import pickle

import pytest
from fieldlab_common.errors import DefinitionError, StepMisuseError
from fieldlab_common.node import Node
from fieldlab_common.selector import as_selector, node

PI = Node.dummy("raspi-1", architecture="linux/arm64", os="linux", site="lab", cpus=4, tags=["edge", "wifi"])


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        (node.os == "linux", True),
        (node.os != "linux", False),
        (node["cpus"] >= 4, True),
        (node["cpus"] < 4, False),
        (node.name.matches("raspi-*"), True),
        (node.name.matches("RASPI-*"), False),
        (node["site"].isin(["lab", "roof"]), True),
        (node["tags"].contains("edge"), True),
        (node["ipv4"].exists(), False),
        ((node.os == "linux") & (node["cpus"] > 8), False),
        ((node.os == "macos") | (node["cpus"] == 4), True),
        (~(node.os == "linux"), False),
        (as_selector(lambda n: n["cpus"] == 4), True),
        (as_selector(None), True),
    ],
)
def test_it_holds_or_not(selector, holds):
    assert selector.holds(PI) is holds


def test_a_missing_property_makes_a_comparison_false_and_says_so():
    verdict = (node["rack"] != "r1").explain(PI)
    assert not verdict.holds
    assert verdict.because == "has no `rack`"


def test_a_comparison_of_things_that_do_not_compare_is_false_and_says_so():
    assert "does not compare" in (node["cpus"] > "four").explain(PI).because


def test_an_explanation_names_the_part_that_failed():
    verdict = ((node.os == "linux") & (node["site"] == "roof")).explain(PI)
    assert verdict.because == "`site` is 'lab', not 'roof'"


def test_equal_selectors_are_equal():
    assert ((node.os == "linux") & (node["a"] > 1)) == ((node.os == "linux") & (node["a"] > 1))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: bool(node.os == "linux"),
        lambda: (node.os == "linux") and (node.os == "macos"),
        lambda: 1 < node["cpus"] < 8,
        lambda: bool(node.os),
    ],
)
def test_a_selector_has_no_truth_value(wrong):
    with pytest.raises(StepMisuseError):
        wrong()


@pytest.mark.parametrize("wrong", [lambda: (node.a == 1) & "x", lambda: as_selector(node.os), lambda: as_selector(3)])
def test_what_is_no_condition_is_refused(wrong):
    with pytest.raises(DefinitionError):
        wrong()


def test_an_opaque_condition_is_explained_as_one():
    def is_fast(n: Node) -> bool:
        return False

    assert as_selector(is_fast).explain(PI).because == "the function is_fast() says no"


SERVER = Node.dummy(
    "server",
    python=["3.11", "3.13"],
    kernel="6.1.0-23-amd64",
    ssh="OpenSSH_9.6p1",
    release=6,
    rolling="unstable",
    root=True,
    ipv4="10.1.2.3/24",
    ips=["192.168.7.1", "fe80::1%eth0", "::ffff:172.16.0.9", "server.local"],
    hosts=["a", "b"],
    none=[],
)


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        (node["kernel"].version >= "6.1", True),
        (node["kernel"].version == "6.1", True),
        (node["kernel"].version != "6.1.0.0", False),
        (node["kernel"].version > "6.1", False),
        (node["kernel"].version < "6.10", True),
        (node["kernel"].version <= "5.15", False),
        (node["ssh"].version == "9.6", True),
        (node["release"].version < "10", True),
        (node.python.version >= "3.13", True),
        (node.python.version >= "3.14", False),
        (node.python.version != "3.11", False),
        (node["lacks"].version >= "1", False),
        (node["rolling"].version >= "1", False),
        (node["root"].version >= "1", False),
        (node["none"].version >= "0", False),
    ],
)
def test_versions_compare_number_by_number(selector, holds):
    assert selector.holds(SERVER) is holds


@pytest.mark.parametrize(
    ("selector", "holds"),
    [
        (node["ipv4"].address.within("10.0.0.0/8"), True),
        (node["ipv4"].address.within("10.1.2.3"), True),
        (node["ipv4"].address.within("11.0.0.0/8", "10.1.0.0/16"), True),
        (node["ipv4"].address.within("2001:db8::/32"), False),
        (node["ipv4"].address.within(), False),
        (node["ipv4"].address.isin(["10.9.0.0/16", "10.1.2.3"]), True),
        (node["ipv4"].address.isin("10.0.0.0/8"), True),
        (node["ipv4"].address == "10.1.2.3", True),
        (node["ipv4"].address != "10.1.2.4", True),
        (node["ips"].address.within("192.168.0.0/16"), True),
        (node["ips"].address.within("fe80::/10"), True),
        (node["ips"].address.within("172.16.0.0/12"), True),
        (node["ips"].address == "fe80:0:0::1", True),
        (node["ips"].address != "192.168.7.1", False),
        (node["ips"].address.within("10.0.0.0/8"), False),
        (node["hosts"].address.within("0.0.0.0/0"), False),
        (node["hosts"].address != "10.0.0.1", False),
        (node["none"].address.within("0.0.0.0/0"), False),
        (node["release"].address == "0.0.0.6", False),
        (node["lacks"].address.within("0.0.0.0/0"), False),
    ],
)
def test_addresses_lie_in_networks_or_not(selector, holds):
    assert selector.holds(SERVER) is holds


@pytest.mark.parametrize(
    ("selector", "because"),
    [
        (node["kernel"].version >= "6.1", "kernel version >= '6.1'"),
        (node["kernel"].version > "6.2", "`kernel` is '6.1.0-23-amd64', not version > '6.2'"),
        (node["rolling"].version > "6.2", "`rolling` is 'unstable', which does not compare with '6.2'"),
        (node["ipv4"].address.within("10.0.0.0/8"), "ipv4 address within '10.0.0.0/8'"),
        (
            node["ipv4"].address.within("11.0.0.0/8", "::/0"),
            "`ipv4` is '10.1.2.3/24', not address within '11.0.0.0/8' or '::/0'",
        ),
        (node["lacks"].address == "::1", "has no `lacks`"),
    ],
)
def test_versions_and_addresses_are_explained(selector, because):
    assert selector.explain(SERVER).because == because


def test_versions_and_addresses_compare_as_data():
    assert (node["k"].version > "1") == (node["k"].version > "1")
    assert (node["k"].address == "::1") == (node["k"].address == "0::1")
    assert (node["k"].version > "1") != (node["k"] > "1")
    assert (~(node["k"].address == "::1")).fields() == {"k"}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: node["kernel"].version >= 6.1,
        lambda: node["kernel"].version == "new",
        lambda: node["ipv4"].address == "10.0.0.0/8",
        lambda: node["ipv4"].address.within("10.0.0.1/8"),
        lambda: node["ipv4"].address.within("lab"),
        lambda: as_selector(node["kernel"].version),
        lambda: as_selector(node["ipv4"].address),
    ],
)
def test_what_is_no_version_or_address_is_refused_where_it_is_written(wrong):
    with pytest.raises(DefinitionError):
        wrong()


@pytest.mark.parametrize(
    "wrong", [bool, lambda view: pickle.dumps(view), lambda view: copy.copy(view)], ids=["bool", "pickle", "copy"]
)
@pytest.mark.parametrize("view", [node["kernel"].version, node["ipv4"].address], ids=repr)
def test_a_version_or_address_is_for_comparing_only(wrong, view):
    with pytest.raises(StepMisuseError, match="compared"):
        wrong(view)


def test_a_function_that_asks_for_what_a_node_lacks_is_false_and_says_so():
    verdict = as_selector(lambda n: n["rack"] == 4).explain(PI)
    assert not verdict
    assert "'rack'" in verdict.because


def test_a_function_that_fails_is_named_with_the_node():
    with pytest.raises(DefinitionError, match=rf"lambda.*{PI.name}.*ZeroDivisionError"):
        as_selector(lambda n: 1 / 0).holds(PI)
