"""Two directors on one PostgreSQL database and one bucket, behind an address that always leads to one that lives."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest

from .proxy import Line

START_SECONDS = 60


class Director:
    """A ``fieldlab-director serve`` on a folder of its own."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        ready, told = os.pipe()
        command = [sys.executable, "-m", "fieldlab_director", "serve", "--data", str(folder), "--port", "0"]
        command += ["--ready-fd", str(told), *arguments]
        with (folder / "start.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(told,), start_new_session=True)
        os.close(told)
        with os.fdopen(ready) as pipe:
            assert select.select([pipe], [], [], START_SECONDS)[0], (folder / "start.log").read_text()
            said = pipe.readline()
        assert said, (folder / "start.log").read_text()
        self.url, self.token = json.loads(said)["url"], json.loads(said)["token"]
        self.port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def directors(
    tmp_path: Path, postgres: Any, s3: Any, line: Callable[..., Line]
) -> Iterator[tuple[Director, Director, Line]]:
    """Two directors with the same key, and the address at which executors reach one of them: first the first."""
    balancer = line()
    bucket, endpoint = s3.make()
    shared = ["--database", postgres.make(), "--blobs", bucket, "--blobs-endpoint", endpoint]
    shared += ["--advertise", balancer.url, "--bootstrap", "me"]
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir(mode=0o700)
    one = Director(folders[0], shared)
    shutil.copy(folders[0] / "secret.key", folders[1])
    two = Director(folders[1], shared)
    balancer.target = one.port
    yield one, two, balancer
    for director in (one, two):
        director.kill()


@fl.task
def probe(*, ctx: fl.TaskContext) -> dict[str, int]:
    Path(ctx.artifact("trace.bin")).write_bytes(ctx.node.name.encode() * 3_000_000)
    ctx.events.send("measured")
    (event,) = ctx.events.wait("go", timeout=100)
    print("went on", flush=True)
    return {"rate": event.data["rate"]}


def submit(client: fl.Client) -> fl.Run:
    with fl.DAG("probing") as dag:
        probe()
    return client.submit(fl.Experiment("probing").map(dag, client.nodes().take(2)))


def test_a_run_that_reports_to_one_director_is_followed_at_another_and_outlives_the_first(
    directors: tuple[Director, Director, Line], tmp_path: Path
) -> None:
    one, two, balancer = directors
    with fl.Client(one.url, token=one.token) as first, fl.Client(two.url, token=two.token) as second:
        first.infrastructures.attach("here", fl.Local(nodes=["a", "b"]))
        run = submit(second)
        assert len(run.events.wait("measured", count=2, timeout=90)) == 2
        one.kill()
        balancer.target = two.port
        balancer.cut()
        run.events.send("go", {"rate": 7})
        assert run.wait(timeout=90) is fl.ExperimentState.SUCCEEDED
        assert [run.results[name]["probe"].value for name in ("a", "b")] == [{"rate": 7}] * 2
        found = run.artifacts.download(tmp_path / "out")
        assert [path.stat().st_size for path in found] == [3_000_000] * 2
