"""The tables of states, and the one way through them."""

import pytest
from fieldlab_common.errors import IllegalTransition
from fieldlab_common.lifecycle import TRANSITIONS, DeploymentState, ExperimentState, StepState, advance

KINDS = (ExperimentState, DeploymentState, StepState)
ALL = [state for kind in KINDS for state in kind]


def test_every_state_has_a_row_that_leads_to_states_of_its_own_kind():
    assert {kind: set(table) for kind, table in TRANSITIONS.items()} == {kind: set(kind) for kind in KINDS}
    assert all(type(new) is kind for kind, table in TRANSITIONS.items() for row in table.values() for new in row)


@pytest.mark.parametrize("first", [ExperimentState.PREPARING, DeploymentState.PENDING, StepState.WAITING])
def test_every_state_can_be_reached_and_can_reach_an_end(first):
    kind = type(first)
    assert _reach(first) == set(kind)
    assert all(any(s.terminal for s in _reach(state)) for state in kind)


def _reach(state):
    seen, stack = set(), [state]
    while stack:
        one = stack.pop()
        if one not in seen:
            seen.add(one)
            stack.extend(TRANSITIONS[type(one)][one])
    return seen


def test_advance_moves_along_the_table():
    assert advance(DeploymentState.RUNNING, DeploymentState.UNREACHABLE) is DeploymentState.UNREACHABLE


@pytest.mark.parametrize("end", [s for s in ALL if s.terminal])
def test_nothing_leaves_a_terminal_state(end):
    for other in type(end):
        with pytest.raises(IllegalTransition):
            advance(end, other)


def test_a_refusal_names_both_states_and_what_would_be_allowed():
    with pytest.raises(IllegalTransition, match=r"'waiting' cannot become 'succeeded'.*running"):
        advance(StepState.WAITING, StepState.SUCCEEDED)
