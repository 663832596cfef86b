"""The clock by which an executor tells when what happened."""

import time
from pathlib import Path
from typing import Any

import pytest
from fieldlab_executor.loop import Loop
from fieldlab_executor.supervisor import Supervisor


def _nothing(*_: Any) -> Any:
    """What a supervisor asks of others, of which there are none here."""


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0], ids=["forwards", "backwards"])
def test_times_go_on_steadily_when_the_nodes_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    asked = dict.fromkeys(("append", "announce", "hurry", "hold", "done"), _nothing)
    supervisor = Supervisor(tmp_path, Loop(), {}, **asked)
    before, wall = supervisor.now(), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + jump)
    assert before <= supervisor.now() < before + 3600
