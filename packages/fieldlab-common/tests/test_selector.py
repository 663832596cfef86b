"""Selectors: data that can be asked of a node, compared and explained."""

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
