"""What tests of parity share: netunicorn's executor, which looks up once a second, made to look up often."""

import asyncio
import logging

import pytest
from netunicorn.executor import executor as their_executor


class _Impatient:
    """``asyncio`` as their executor sees it."""

    def __getattr__(self, name):
        return getattr(asyncio, name)

    async def sleep(self, seconds):
        await asyncio.sleep(min(seconds, 0.02))


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    monkeypatch.setattr(their_executor, "asyncio", _Impatient())
    monkeypatch.chdir(tmp_path)  # it writes its log where it runs
    logging.getLogger("executor_local").propagate = False
