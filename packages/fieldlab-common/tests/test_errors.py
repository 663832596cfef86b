"""The tree of errors and its codes."""

import pickle

import pytest
from fieldlab_common import errors
from fieldlab_common.context import CommandFailed


def test_every_exported_error_has_a_code_of_its_own():
    classes = [getattr(errors, name) for name in errors.__all__ if name != "BY_CODE"]
    assert len({c.code for c in classes}) == len(classes)
    assert all(errors.BY_CODE[c.code] is c for c in classes)


def test_an_error_says_what_happened_and_what_to_do():
    error = errors.NotFound("There is no node 'a'.", advice="Look at client.nodes().")
    assert str(error) == "There is no node 'a'. Look at client.nodes()."


@pytest.mark.parametrize(
    "error",
    [
        errors.BarrierBroken("broken", advice="a", details={"missing": ["x"]}),
        errors.PlanError("no", problems=["a", "b"]),
        errors.ConnectorError("no", transient=False),
        CommandFailed("no", exit_code=3, output="text"),
    ],
)
def test_an_error_survives_the_way_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.details == error.details
