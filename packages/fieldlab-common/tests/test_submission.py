"""A request to submit is held to its form, with the path of what is wrong."""

from dataclasses import replace
from typing import Any

import pytest
from fieldlab_common.environment import Host
from fieldlab_common.errors import InvalidRequest, TooLarge
from fieldlab_common.messages import DeploymentSpec, SubmitExperiment, Tagged
from fieldlab_common.submission import check_submit
from fieldlab_common.wire import encode

SPEC = DeploymentSpec(name="a", node="n", environment=Tagged(kind="host", body=encode(Host())), graph="0" * 64, steps=1)
GOOD = SubmitExperiment(name="exp", deployments=(SPEC,))


def test_what_is_right_passes() -> None:
    check_submit(GOOD, most=1)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"name": "../a"}, "name"),
        ({"graph": "short"}, "graph"),
        ({"blobs": ("A" * 64,)}, "blobs"),
        ({"steps": -1}, "steps"),
        ({"environment": Tagged(kind="moon", body={})}, "environment"),
    ],
)
def test_what_is_wrong_with_a_deployment_is_said_with_its_path(change: dict[str, Any], path: str) -> None:
    wrong = replace(GOOD, deployments=(SPEC, replace(SPEC, **{"name": "b", **change})))
    with pytest.raises(InvalidRequest) as caught:
        check_submit(wrong, most=2)
    assert caught.value.details["path"] == f"$.deployments[1].{path}"


def test_names_that_stand_twice_are_told() -> None:
    with pytest.raises(InvalidRequest, match="more than once: a"):
        check_submit(replace(GOOD, deployments=(SPEC, SPEC)), most=2)


def test_more_than_one_experiment_may_have_is_too_much() -> None:
    with pytest.raises(TooLarge, match="2 deployments are more than the 1"):
        check_submit(replace(GOOD, deployments=(SPEC, replace(SPEC, name="b"))), most=1)
