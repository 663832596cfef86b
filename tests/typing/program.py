"""The program of the design, section 2, with the type that every expression has: read by two type checkers, and run.

What needs a package or a node that a test does not have is defined and planned; everything else runs, here and at a
director. What only a client has is imported where it is used, because nodes import this module too. Bare edges
(``a >> b``) are what users write; a checker's remark on unused expressions is off for them.
"""

# pyright: reportUnusedExpression=false

import datetime as dt
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import fieldlab as fl
from fieldlab.infrastructure import Infrastructure
from fieldlab_common.builtin import Arg, Shell
from fieldlab_common.dag import Choice
from fieldlab_common.drawing import Svg
from fieldlab_common.protocol import InfrastructureInfo
from fieldlab_common.resolve import Problem
from fieldlab_common.step import Pick

# --- tasks ------------------------------------------------------------------------------------------------------------


@fl.task(packages=["dnspython>=2.6"], timeout=30, retries=2)
def resolve(name: str) -> list[str]:
    import dns.resolver  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

    return [r.to_text() for r in dns.resolver.resolve(name)]


@resolve.implementation(when=(fl.node.os == "windows") | (fl.node["shell"] == "powershell"), packages=[])
def resolve_windows(name: str) -> list[str]:
    return [name.upper()]


@fl.task
def capture(interface: str, *, ctx: fl.TaskContext) -> fl.Artifact:
    path = assert_type(ctx.artifact("trace.pcap"), fl.Artifact)
    Path(path).write_text(interface)
    ctx.ready()
    ctx.stopping.wait()
    return path


class Probe(fl.Task[dict[str, float]]):
    def __init__(self, n: int) -> None:
        self.n = n

    def run(self, host: str) -> dict[str, float]:
        return {"loss": 0.0, "n": self.n}


class Bare(fl.Task):
    def run(self, host: str) -> int:
        return len(host)


@fl.task
def summarise(answers: list[list[str]], address: str) -> dict[str, float]:
    return {"loss": 0.25, "answers": len(answers)}


@fl.task
def upload(file: fl.Artifact) -> int:
    return Path(file).stat().st_size


@fl.task
def notify(error: str | None) -> str:
    return error or "all is well"


@fl.task
def trace(host: str) -> str:
    return host


@fl.task
def urls_from(report: dict[str, float]) -> list[str]:
    return ["a", "bb"]


@fl.task
def fetch(url: str) -> int:
    return len(url)


@fl.task
def everything(factor: int, *, ctx: fl.TaskContext) -> list[Any]:
    """Every part of the context."""
    ctx.events.send("seen", {"factor": factor})
    event = assert_type(
        ctx.events.wait("seen", count=1, where=lambda e: e.data["factor"] == factor, timeout=30), list[fl.Event]
    )[0]
    assert_type(ctx.events.stream(after=0, timeout=0), Iterator[fl.Event])
    assert_type(ctx.events.latest("seen"), fl.Event | None)
    ctx.barrier("alone", parties=1, timeout=30)
    ctx.store["kept"] = factor
    ctx.log.info("attempt %d of %s", ctx.attempt, ctx.step)
    assert_type(ctx.node, fl.Node)
    assert_type(ctx.clock.offset, float)
    members = [member.deployment for member in ctx.experiment.deployments]
    return [event.name, ctx.events.count("seen"), ctx.store["kept"], ctx.iteration, ctx.experiment.name, members]


iperf = fl.shell("iperf3 -J -c {host} -t {seconds}", parse="json", system_packages=["iperf3"], ok_codes=(0,))
awk = fl.shell(["awk", "{print $1}", fl.arg("file")], name="first-column")
probe = Probe(n=5)

assert_type(resolve("example.org"), fl.Step[list[str]])
assert_type(resolve_windows("example.org"), list[str])
assert_type(notify.fn(None), str)
assert_type(Probe(n=5), Probe)
assert_type(Probe(n=5)("10.0.0.1"), fl.Step[dict[str, float]])
assert_type(Bare()("10.0.0.1"), fl.Step[Any])
assert_type(capture("eth0"), fl.Step[fl.Artifact])
assert_type(iperf, Shell)
assert_type(iperf("10.0.0.1", seconds=5), fl.Step[Any])
assert_type(fl.arg("file"), Arg)
assert_type(fl.node.os == "linux", fl.Selector)
assert_type((fl.node.cpus >= 4) & ~fl.node.name.matches("raspi-*"), fl.Selector)
assert_type((fl.node["kernel"].version >= "6.1") & (fl.node.python.version != "3.11"), fl.Selector)
assert_type(fl.node["ipv4"].address.within("10.0.0.0/8") | (fl.node["ipv4"].address == "::1"), fl.Selector)
assert_type(fl.node["site"].exists() | fl.node.tags.contains("x"), fl.Selector)

# --- a DAG ------------------------------------------------------------------------------------------------------------


def define_inner() -> fl.DAG:
    with fl.DAG("probing") as inner:
        resolve(fl.arg("name", "example.org")).when(fl.value(fl.arg("go", True)), bool)
    with fl.DAG("rounds") as rounds:
        assert_type(inner(name="example.net"), fl.Step[Any])
        assert_type(fl.repeat(inner.as_task(timeout="5m", retries=1)("example.com"), times=2), fl.Step[list[Any]])
        fl.map(inner, resolve("example.org"))
        fl.choose((fl.node.os == "linux", inner), default=inner)(name="example.net")
    assert_type(rounds >> [inner, inner], fl.Pipeline)
    return fl.Pipeline("stages").then(rounds).then([inner, inner()])


def define(interval: float = 60) -> fl.DAG:
    with fl.DAG("dns", stop_on_failure=True, max_parallel=None, isolation="process") as dag:
        sniff = fl.background(capture("eth0"), stop=signal.SIGINT, grace=10)
        answers = [resolve(n).during(sniff) for n in ("example.org", "example.net")]
        report = summarise(answers, fl.node["ipv4"])
        size = upload(sniff).after(report)
        notify(report.error).after(report, on="failure")
        trace("10.0.0.1").when(report, lambda r: r["loss"] > 0.1)
        rounds = fl.repeat(
            probe("10.0.0.1"),
            every=interval,
            duration=86_400,
            times=None,
            until=lambda r: r["loss"] == 0,
            on_failure="continue",
        )
        sizes = fl.map(fetch, urls_from(report))
        go = fl.wait_for("go", timeout=600)
        go >> report
        fl.barrier("start", parties="all") >> report
        fl.send("ready", {"node": fl.node.name}).after(report)
        tag = fl.by_node(lambda node: node["cpus"] * 2)
        everything(tag).named("all-of-it").after(sizes, rounds, need="all").exclusive("nic").measured()
        notify(sizes.status).named("status").after(sizes, on="always")
        trace(report["loss"]).named("picked")
        [go, sizes] >> trace("last").named("last")

    assert_type(dag, fl.DAG)
    assert_type(sniff, fl.Step[fl.Artifact])
    assert_type(answers, list[fl.Step[list[str]]])
    assert_type(report, fl.Step[dict[str, float]])
    assert_type(report.error, Pick)
    assert_type(report.status, Pick)
    assert_type(report["loss"], Pick)
    assert_type(report["loss"]["deeper"], Pick)
    assert_type(size, fl.Step[int])
    assert_type(rounds, fl.Step[list[dict[str, float]]])
    assert_type(sizes, fl.Step[list[int]])
    assert_type(go, fl.Step[Any])
    assert_type(dag["upload"], fl.Step[Any])
    assert_type(dag.to_svg(), Svg)
    assert_type(dag.to_mermaid(), str)
    assert_type(dag.to_dot(), str)
    return dag


def define_pipeline(path: str) -> fl.Pipeline:
    pipeline = fl.Pipeline("simple").then(trace("first")).then([awk(fl.File(path)), fetch("abc")])
    return assert_type(pipeline, fl.Pipeline)


def define_choice(nodes: fl.NodePool) -> fl.Experiment:
    choice = fl.choose(
        (fl.node.os == "linux", fl.Pipeline("a").then(trace("linux"))), default=fl.Pipeline("b").then(trace("other"))
    )
    assert_type(choice, Choice)
    exp = fl.Experiment("dns-baseline", reporting="live", lost_after="6h", min_nodes=None, start_at=None)
    exp.map(
        choice,
        nodes,
        name="{node}-second",
        env=fl.Host(),
        resources=fl.Resources(cpus=1, memory="1 GiB", walltime="2h"),
    )
    return assert_type(exp, fl.Experiment)


# --- plans, and runs here ---------------------------------------------------------------------------------------------


def plan_it(exp: fl.Experiment, dag: fl.DAG) -> fl.Plan:
    plan = fl.plan(exp)
    assert_type(plan, fl.Plan)
    assert_type(plan.problems, tuple[Problem, ...])
    assert_type(fl.plan(dag, node=fl.Node.dummy("windows-1", os="windows")), fl.Plan)
    return plan


def run_here(dag: fl.DAG, exp: fl.Experiment) -> tuple[Any, fl.Run]:
    results = fl.run(dag)
    assert_type(results, fl.DeploymentResults)
    assert_type(results["first-column"], fl.StepResult)
    assert_type(results["first-column"].value, Any)
    assert_type(results.to_svg(), Svg)
    assert_type(results.to_mermaid(), str)
    run = fl.run(exp)
    assert_type(run, fl.Run)
    assert_type(run.results["pi-2-second"]["trace"].value, Any)
    return results["first-column"].value, run


# --- a director -------------------------------------------------------------------------------------------------------


def choose_nodes(client: fl.Client) -> fl.NodePool:
    nodes = client.nodes()
    assert_type(nodes, fl.NodePool)
    pis = nodes.where((fl.node.os == "linux") & fl.node.name.matches("pi-*")).take(2)
    assert_type(pis, fl.NodePool)
    assert_type(pis[0], fl.Node)
    assert_type(pis["pi-1"], fl.Node)
    assert_type(pis[:1], fl.NodePool)
    return pis


def use(client: fl.Client, exp: fl.Experiment, folder: Path) -> fl.Run:
    from fieldlab.artifacts import ArtifactFile, ArtifactFiles
    from fieldlab.logs import LogLine, Logs
    from fieldlab.runs import Deployments
    from fieldlab.timeline import Timeline

    run = client.submit(exp, if_exists="error")
    assert_type(run, fl.Run)
    run.events.send("go", {"rate": 10})
    assert_type(run.events.wait("ready", count=2, where=None, after=0, timeout=60), list[fl.Event])
    assert_type(run.events.stream(after=0), Iterator[fl.Event])
    assert_type(run.watch(), fl.ExperimentState)
    assert_type(run.wait(timeout=3600), fl.ExperimentState)
    assert_type(run.wait(raise_on_failure=True), fl.ExperimentState)
    results = run.results
    assert_type(results, fl.Results)
    assert_type(results["pi-2"], fl.DeploymentResults)
    step = results["pi-2"]["upload"]
    assert_type(step, fl.StepResult)
    assert_type(step.value, Any)
    assert_type(step.error, str)
    assert_type(step.status, fl.StepState)
    assert_type(step.reason, fl.Reason | None)
    assert_type(step.attempts, int)
    assert_type(step.started, float | None)
    assert_type(step.ended, float | None)
    assert_type(step.logs, Logs)
    assert_type(results.rows(), list[dict[str, Any]])
    assert_type(run.deployments, Deployments)
    for line in run.logs(follow=True):
        assert_type(line, LogLine)
    assert_type(run.logs(), Logs)
    assert_type(run.logs(node="pi-1", stream="stdout", since="10m"), Logs)
    assert_type(run.logs(since=dt.timedelta(minutes=5)).tail(5), tuple[LogLine, ...])
    assert_type(results.rows(values=False), list[dict[str, Any]])
    timeline = run.timeline()
    assert_type(timeline, Timeline)
    assert_type(timeline.of("pi-2", "upload")[0].state, fl.StepState | fl.DeploymentState | fl.ExperimentState)
    assert_type(timeline.rows(), list[dict[str, Any]])
    assert_type(timeline.to_svg(), Svg)
    assert_type(run.events.latest("ready"), fl.Event | None)
    assert_type(run.events.count("ready"), int)
    assert_type(run.artifacts.list(step="upload", name="*.pcap"), ArtifactFiles)
    assert_type(run.artifacts.list(), ArtifactFiles)
    assert_type(run.artifacts.list()[0], ArtifactFile)
    assert_type(run.artifacts.download(folder), list[Path])
    return run


def try_out(exp: fl.Experiment) -> fl.Run:
    from fieldlab.testing import FakeDirector, InTurn, StandIn

    plays = {"probe": {"loss": 0.5}, ("pi-1", "trace"): InTurn(OSError("no route"), StandIn(value="way", after="2m"))}
    with FakeDirector(["pi-1", {"name": "pi-2", "site": "x"}], stand_ins=plays) as director:
        client = assert_type(director.client(), fl.Client)
        director.fail("nodes", fl.Unavailable("It restarts."), times=2)
        director.lose_answer("submit")
        assert_type(director.asked, tuple[str, ...])
        director.advance(60)
        assert_type(director.elapsed(), float)
        return client.submit(exp)


def look_back(client: fl.Client, exp: fl.Experiment) -> fl.Run:
    from fieldlab.client import Experiments

    assert_type(client.experiments(), Experiments)
    assert_type(client.run("dns-baseline"), fl.Run)
    assert_type(client.submit(exp, if_exists="attach"), fl.Run)
    prepared = client.prepare(exp, if_exists="new")
    assert_type(prepared.start(), fl.Run)
    assert_type(prepared.cancel(nodes=[one.node for one in prepared.deployments.values()]), fl.Run)
    assert_type(prepared.cancel(reason="wrong site"), fl.Run)
    assert_type(prepared.wait(timeout=60), fl.ExperimentState)
    return prepared


def attach(client: fl.Client) -> Infrastructure:
    lab = client.infrastructures.attach(
        "my-lab", fl.Local(nodes=[{"name": "pi-1", "site": "x"}, "pi-2"], properties={"shell": "powershell"})
    )
    assert_type(lab, Infrastructure)
    assert_type(client.infrastructures.attach("behind-nat", fl.Agents()).join_command(uses=40, expires="1h"), str)
    assert_type(client.infrastructures.list(), list[InfrastructureInfo])
    return lab


def later() -> fl.Experiment:
    return fl.Experiment(
        "later", reporting="quiet", lost_after=60.0, min_nodes=2, start_at=dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    )
