"""A Slurm cluster as a user's own nodes: each deployment is a job, with the limits that the user gave."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fieldlab as fl
import pytest
import slurmlab
from fieldlab_director import Embedded, embedded

DEADLINE = 90.0


@dataclass(frozen=True)
class Cluster:
    """A cluster, attached; ``folder`` is what its nodes share."""

    lab: slurmlab.Slurmlab
    folder: Path

    def jobs(self) -> list[str]:
        """The numbers of all jobs that have not ended."""
        return self.lab.run("squeue", "--noheader", "--format=%i").split()

    def of(self, results: fl.Results, node: str) -> dict[str, str]:
        """What Slurm knows of the job of a deployment."""
        id = results[node]["place"].value["job"]
        said = self.lab.run("scontrol", "show", "job", "--oneliner", id)
        return dict(word.partition("=")[::2] for word in said.split())


@pytest.fixture(scope="module")
def director(own_cache: None) -> Iterator[Embedded]:
    """A director of their own: the nodes that are attached here are not for other tests."""
    with embedded() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(director: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := slurmlab.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    with contextlib.closing(slurmlab.Slurmlab(folder / "lab")) as lab:
        spec = fl.Slurm(folder=str(folder / "shared"), config=str(lab.config), properties={"site": "lab"})
        with fl.Client(director.url, token=director.token) as client:
            client.infrastructures.attach("slurm", spec)
        yield Cluster(lab, folder / "shared")


@pytest.fixture
def nodes(client: fl.Client, cluster: Cluster) -> fl.NodePool:
    return client.nodes().where(fl.node["infrastructure"] == "slurm")


@fl.task
def place() -> dict[str, str]:
    return {"node": os.environ["SLURMD_NODENAME"], "job": os.environ["SLURM_JOB_ID"]}


@fl.task
def fails() -> None:
    raise ValueError("no luck")


def test_an_experiment_runs_on_two_nodes_as_jobs_with_its_limits(
    client: fl.Client, cluster: Cluster, nodes: fl.NodePool, name: str, until: Callable[..., fl.Results]
) -> None:
    with fl.DAG("d") as dag:
        place() >> fl.barrier("both", timeout=DEADLINE).named("both") >> fl.wait_for("go", timeout=DEADLINE)
    asked = fl.Resources(cpus=2, memory="300 MiB", walltime="10m")
    run = client.submit(fl.Experiment(name).map(dag, nodes.where(fl.node.name.matches("c[12]")), resources=asked))
    results = until(run, lambda results: all(one["both"].status.terminal for one in results.values()))
    assert {node: one["place"].value["node"] for node, one in results.items()} == {"c1": "c1", "c2": "c2"}
    job = cluster.of(results, "c1")
    assert (job["NumCPUs"], job["MinMemoryNode"], job["TimeLimit"], job["Requeue"]) == ("2", "428M", "00:12:00", "0")
    run.events.send("go")
    assert run.wait(timeout=DEADLINE) is fl.ExperimentState.SUCCEEDED, run.results


def test_a_failing_task_fails_its_deployment_and_a_cancel_ends_the_job(
    client: fl.Client, cluster: Cluster, nodes: fl.NodePool, name: str, until: Callable[..., fl.Results]
) -> None:
    with fl.DAG("bad") as bad:
        fails()
    with fl.DAG("long") as long:
        place() >> fl.wait_for("never")
    c1, c2 = nodes.where(fl.node.name.matches("c[12]"))
    run = client.submit(fl.Experiment(name).map(bad, [c1]).map(long, [c2]))
    results = until(
        run, lambda results: results["c1"].state.terminal and results["c2"]["place"].status is fl.StepState.SUCCEEDED
    )
    assert "no luck" in results["c1"]["fails"].error
    assert cluster.of(results, "c2")["JobState"] == "RUNNING"
    run.cancel("enough")
    assert run.wait(timeout=DEADLINE) is fl.ExperimentState.CANCELLED, run.results
    cluster.lab.until(lambda: results["c2"]["place"].value["job"] not in cluster.jobs())


def test_a_job_that_is_cancelled_with_slurms_own_means_is_seen(
    client: fl.Client, cluster: Cluster, nodes: fl.NodePool, name: str, until: Callable[..., fl.Results]
) -> None:
    with fl.DAG("long") as dag:
        place() >> fl.wait_for("never")
    c1, c2 = nodes.where(fl.node.name.matches("c[12]"))
    run = client.submit(fl.Experiment(name).map(dag, [c1, c2]))
    results = until(run, lambda results: all(one["place"].status.terminal for one in results.values()))
    cluster.lab.run("scancel", results["c1"]["place"].value["job"])
    cluster.lab.run("scancel", "--batch", "--signal=KILL", results["c2"]["place"].value["job"])
    assert run.wait(timeout=DEADLINE) is fl.ExperimentState.FAILED, run.results
    # Slurm's signal reaches the executor and its step: whichever of them is quicker to end says so.
    assert run.results["c1"].info.reason in (fl.Reason.TERMINATED, fl.Reason.STEP_FAILED)
    assert run.results["c2"].info.reason is fl.Reason.EXECUTOR_LOST


def test_a_deployment_whose_job_waits_says_what_for_and_runs_in_its_turn(
    client: fl.Client, cluster: Cluster, nodes: fl.NodePool, name: str, tmp_path: Path
) -> None:
    (tmp_path / "busy").write_text("#!/bin/sh\nexec sleep 600\n")
    busy = ("--parsable", "--exclusive", "--nodelist=c3", "--output=/dev/null", str(tmp_path / "busy"))
    other = cluster.lab.run("sbatch", *busy).strip()
    with fl.DAG("d") as dag:
        place()
    run = client.submit(fl.Experiment(name).map(dag, nodes.where(fl.node.name == "c3")))
    while "waits: Resources" not in run.refresh(5.0)["c3"].message:
        assert not run.results.info.state.terminal, run.results
    assert run.results["c3"].state is fl.DeploymentState.LAUNCHING
    cluster.lab.run("scancel", other)
    assert run.wait(timeout=DEADLINE) is fl.ExperimentState.SUCCEEDED, run.results
    assert run.results["c3"].message == ""
