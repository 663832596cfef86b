"""What is remembered of executors' tokens: for a second, and only while nothing changes."""

import pytest
from fieldlab_director.services import familiar
from fieldlab_director.services.familiar import Familiar
from fieldlab_director.services.identity import ExecutorCaller
from fieldlab_director.store.base import Notifier, deployment_topic, experiment_topic

CALLER = ExecutorCaller(deployment_id="d1", epoch=1)
TOKEN = "fle_d1.1.signed"


@pytest.fixture
def known():
    """Somebody who was just found good, on a clock that stands at ``known.now``."""
    known = Familiar(lambda: known.now)
    known.now = 100.0
    known.keep(TOKEN, CALLER)
    return known


def test_a_token_is_known_for_a_second(known):
    assert known.of(TOKEN) == CALLER
    known.now += familiar.SECONDS
    assert known.of(TOKEN) is None


@pytest.mark.parametrize("token", ["fle_d1.1.forged", "fle_d1.2.signed", "fle_d2.1.signed", "fle_", ""])
def test_no_other_token_is_taken_for_it(known, token):
    assert known.of(token) is None


def test_it_is_forgotten_when_its_deployment_changes_and_for_no_other_reason(known):
    notifier = Notifier()
    notifier.listen(known.forget)
    notifier.wake([deployment_topic("d2"), experiment_topic("d1")])
    assert known.of(TOKEN) == CALLER
    notifier.wake([deployment_topic("d1")])
    assert known.of(TOKEN) is None


def test_no_more_are_known_than_there_is_room_for(known, monkeypatch):
    monkeypatch.setattr(familiar, "MOST", 1)
    known.keep("fle_d2.1.signed", ExecutorCaller(deployment_id="d2", epoch=1))
    assert known.of(TOKEN) is None
    assert known.of("fle_d2.1.signed") is not None
