"""netunicorn's own task objects on our executor: unchanged, and with what came of them on netunicorn's."""

import contextlib
import os
import pathlib
import shutil
import socket
import time

import fieldlab as fl
import pytest
from fieldlab.contrib import netunicorn as nu
from netunicorn.base import (
    Architecture,
    CyclePipeline,
    DockerImage,
    ExecutionGraph,
    Failure,
    FlagValues,
    Pipeline,
    ShellExecution,
    Success,
    Task,
    TaskDispatcher,
    is_successful,
)
from netunicorn.executor import get_local_executor
from netunicorn.library.tasks.basic import DummyTask, ShellCommand, SleepTask
from netunicorn.library.tasks.capture.tcpdump import StartCapture, StopNamedCapture
from netunicorn.library.tasks.flags import (
    AtomicDecrementFlagTask,
    AtomicIncrementFlagTask,
    GetFlagTask,
    SetFlagTask,
    WaitForExactFlagResultTask,
)
from netunicorn.library.tasks.measurements.ping import Ping


class Give(Task):
    def __init__(self, value, name=None):
        super().__init__(name)
        self.value = value

    def run(self):
        return self.value


class Raise(Task):
    def run(self):
        raise ValueError(f"{self.name} raises")


class Previous(Task):
    """Tells what it sees of the tasks before it, as text."""

    def run(self):
        return {
            name: [
                ("ok", r.unwrap()) if is_successful(r) else ("failed", str(r.failure())[-40:].strip()) for r in results
            ]
            for name, results in self.previous_steps.items()
        }


class Missing(Task):
    def run(self):
        return self.previous_steps["nobody"]


class Die(Task):
    def run(self):
        os._exit(3)


class Write(Task):
    def run(self):
        with open("shared.txt", "w") as file:
            file.write(self.name)


class Read(Task):
    def run(self):
        with open("shared.txt") as file:
            return file.read()


class Background(Task):
    """Starts a process as netunicorn's captures do, and gives its pid."""

    def run(self):
        import subprocess

        return Success(subprocess.Popen(["sleep", "600"]).pid)


class Alive(Task):
    def __init__(self, of):
        super().__init__("alive")
        self.of = of

    def run(self):
        os.kill(self.previous_steps[self.of][-1].unwrap(), 0)
        return True


class Where(TaskDispatcher):
    def dispatch(self, node):
        if node.architecture == Architecture.LINUX_ARM64:
            return Give(f"arm at {node['site']}", name=self.name)
        if node.architecture == Architecture.LINUX_AMD64:
            return Give("pc", name=self.name)
        raise NotImplementedError(f"Where is not implemented for {node.architecture}")


@pytest.fixture
def theirs(impatient):
    """Runs a graph on netunicorn's executor."""

    def run(graph):
        executor = get_local_executor(graph)
        with contextlib.ExitStack() as stack:
            for handler in executor.logger.handlers[:]:
                stack.callback(executor.logger.removeHandler, handler)
                stack.callback(handler.close)
            executor()
        return executor.execution_graph_results

    return run


def ours(graph, **options):
    dag = nu.from_graph(graph, install=False, **options)
    return nu.result_of(dag, fl.run(dag, timeout=100), trust=True)


def plain(result):
    """A result without tracebacks, whose line numbers are each executor's own: of them, the last line."""
    found = result.unwrap() if is_successful(result) else result.failure()
    content = {
        name: [
            (True, r.unwrap()) if is_successful(r) else (False, str(r.failure()).strip().splitlines()[-1]) for r in rs
        ]
        for name, rs in found.items()
    }
    return is_successful(result), content


def mixed():
    """Every way in which a task ends, and what those after it see."""
    graph = ExecutionGraph(early_stopping=False)
    give, fail, crash, seen = (
        Give({"rate": 3}, "give"),
        Give(Failure("too slow"), "fail"),
        Raise("crash"),
        Previous("seen"),
    )
    graph.graph.add_edges_from([("root", give), (give, fail), (fail, crash), (crash, "all"), ("all", seen)])
    return graph


def guarded():
    graph = ExecutionGraph()
    fail, rescue, on_success, both = Raise("fail"), Give(1, "rescue"), Give(2, "on_success"), Give(3, "both")
    graph.graph.add_edge("root", fail)
    graph.graph.add_edge(fail, rescue, traverse_on="failure")
    graph.graph.add_edge(fail, on_success, traverse_on="success")
    graph.graph.add_edge(fail, both, traverse_on="any")
    return graph


def left_out_once():
    """A join whose one side runs in the first round only: netunicorn is content with that in the second."""
    graph = ExecutionGraph()
    start, side, end, other = Flaky("start"), Give(1, "side"), Give(2, "end"), Give(3, "other")
    graph.graph.add_edge("root", start)
    graph.graph.add_edge(start, side, traverse_on="failure")
    graph.graph.add_edge(start, other, traverse_on="any")
    graph.graph.add_edges_from([(side, end), (other, end)])
    graph.graph.add_edge(end, "root", type="weak", counter=1)
    return graph


class Flaky(Task):
    """Fails the first time, and only then."""

    def run(self):
        return Success(1) if self.previous_steps[self.name] else Failure("at first")


def never_both():
    """A join of which one side never runs, and the other does."""
    graph = ExecutionGraph(early_stopping=False)
    start, side, end, other = Give(0, "start"), Give(1, "side"), Give(2, "end"), Give(3, "other")
    graph.graph.add_edge("root", start)
    graph.graph.add_edge(start, side, traverse_on="failure")
    graph.graph.add_edge(start, other, traverse_on="success")
    graph.graph.add_edges_from([(side, end), (other, end)])
    return graph


# This module is imported on the node for the classes in it, where nothing is converted.
CONVERTED_AT_IMPORT = nu.from_graph(Pipeline().then(Give(1, "a")), install=False)

GRAPHS = {
    "stages": lambda: Pipeline().then([Give(1, "a"), Give("b", "b")]).then(Previous("seen")),
    "a failure stops it": lambda: Pipeline().then(Raise("a")).then(Give(1, "b")),
    "a failure does not stop it": lambda: Pipeline(early_stopping=False).then(Raise("a")).then(Give(1, "b")),
    "outcomes": mixed,
    "conditions": guarded,
    "rounds": lambda: CyclePipeline(cycles=3).then(Give(1, "a")).then(Previous("seen")),
    "left out once": left_out_once,
    "never both": never_both,
    "an unknown task before": lambda: Pipeline().then(Missing("a")),
    "one name twice": lambda: Pipeline().then(Give(1, "a")).then(Give(2, "a")).then(Previous("seen")),
    "names of any text": lambda: Pipeline().then(Give(1, "the first / Ω")).then(Previous("seen")),
    "library": lambda: Pipeline().then([DummyTask("d"), SleepTask(0, "s")]).then(ShellCommand(["echo", "x"], name="c")),
    "library failure": lambda: Pipeline().then(ShellCommand(["ls", "/none/of/these"], name="c")).then(DummyTask("d")),
}


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_a_graph_gives_what_it_gives_on_netunicorns_executor(make, theirs):
    expected = plain(theirs(make()))
    assert plain(ours(make())) == expected
    assert expected[1]


def test_tasks_share_a_folder_as_they_do_on_netunicorns_executor(theirs):
    assert plain(ours(Pipeline().then(Write("w")).then(Read("r"))))[1]["r"] == [(True, "w")]


def test_a_process_that_a_task_leaves_running_runs_until_a_later_task_ends_it():
    pipeline = Pipeline().then(Background("capture")).then(Alive("capture"))
    pipeline.then(stop := StopNamedCapture("capture", name="stop"))
    assert stop
    dag = nu.from_graph(pipeline, install=False)
    results = fl.run(dag, timeout=60)
    assert plain(nu.result_of(dag, results)) == (
        True,
        {"capture": [(True, results["capture"].value)], "alive": [(True, True)], "stop": [(True, "")]},
    )


class Knock(Task):
    """Sends datagrams to this machine, where nobody listens."""

    def run(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(5):
                sender.sendto(b"knock", ("127.0.0.1", 9))


class Captured(Task):
    """The packets of a capture file, by their length: 24 bytes of head, then 16 before each (pcap-savefile(5))."""

    def run(self):
        data, place, lengths = pathlib.Path("lo.pcap").read_bytes(), 24, []
        while place < len(data):
            lengths.append(int.from_bytes(data[place + 8 : place + 12], "little"))
            place += 16 + lengths[-1]
        return lengths


def test_the_librarys_capture_captures_what_later_tasks_send():
    if os.geteuid() != 0 or shutil.which("tcpdump") is None:
        pytest.skip("a capture takes tcpdump and root")
    arguments = ["-Z", "root", "--immediate-mode", "-i", "lo", "udp port 9"]
    pipeline = Pipeline().then(StartCapture("lo.pcap", arguments, name="capture")).then(Knock("knock"))
    pipeline.then(SleepTask(1, "settle")).then(StopNamedCapture("capture", name="stop")).then(Captured("captured"))
    succeeded, content = plain(ours(pipeline))
    assert succeeded
    assert content["captured"] == [(True, [14 + 20 + 8 + len(b"knock")] * 5)]  # Ethernet, IPv4, UDP


def test_a_task_that_dies_without_a_result_is_a_failure_here_and_was_a_success_there(theirs):
    pipeline = Pipeline().then(Die("die")).then(Give(1, "after"))
    assert is_successful(theirs(pipeline))
    assert plain(ours(Pipeline().then(Die("die")).then(Give(1, "after"))))[0] is False


# --- tasks by themselves ---------------------------------------------------------------------------------------------


def test_a_task_is_a_step_among_others():
    give = nu.from_task(Give(20, "give"), install=False)

    @fl.task
    def double(value):
        return 2 * value

    with fl.DAG("mixed") as dag:
        double(give())
    assert fl.run(dag)["double"].value == 40


def test_a_converted_graph_is_a_dag_that_repeats_within_another():
    converted = nu.from_graph(Pipeline().then(Write("w")).then(Previous("seen")), install=False)
    with fl.DAG("outer") as dag:
        fl.repeat(converted().named("rounds"), times=2)
    rounds = fl.run(dag, timeout=60)["rounds"]
    assert rounds[1]["seen"].value == {"w": [("ok", None), ("ok", None)], "seen": [("ok", {"w": [("ok", None)]})]}


def test_a_failure_that_is_returned_fails_the_step_with_what_it_holds():
    with fl.DAG("failing") as dag:
        nu.from_task(Give(Failure({"code": 7}), "bad"), install=False)()
    result = fl.run(dag)["bad"]
    assert (result.status, result.message) == ("failed", "{'code': 7}")


def test_a_plan_has_what_the_tasks_require_and_netunicorn_itself():
    task = Give(1, "give").add_requirement("pip install numpy").add_requirement("touch /tmp/made")
    graph = Pipeline(environment_definition=ShellExecution(commands=["apt-get install -y iperf3"])).then(task)
    (deployment,) = fl.plan(nu.from_graph(graph)).deployments
    needs = deployment.environment.requirements
    assert deployment.environment.kind == "venv"
    assert needs.packages[0].startswith("netunicorn-base==")
    assert needs.packages[1:] == ("requests", "numpy")
    assert (needs.system_packages, needs.setup) == (("iperf3",), ("touch /tmp/made",))


def test_what_is_no_task_of_netunicorns_is_refused():
    with pytest.raises(fl.DefinitionError, match="neither a task nor a dispatcher"):
        nu.from_task(lambda: 1)


# --- dispatchers ------------------------------------------------------------------------------------------------------

PI = fl.Node.dummy("pi", architecture="linux/arm64", site="roof")
OTHER_PI = fl.Node.dummy("pi-2", architecture="linux/arm64", site="cellar")
PC = fl.Node.dummy("pc", architecture="linux/amd64")
MAC = fl.Node.dummy("mac", architecture="darwin/arm64")


def test_a_dispatcher_gives_each_node_its_task():
    dag = nu.from_graph(Pipeline().then(Where("where")), install=False)
    run = fl.run(fl.Experiment("sites").map(dag, [PI, OTHER_PI, PC]), timeout=100)
    assert {name: run.results[name]["where"].value for name in run.results} == {
        "pi": "arm at roof",
        "pi-2": "arm at cellar",
        "pc": "pc",
    }


def test_a_plan_says_what_a_dispatcher_gave_and_why_a_node_gets_nothing():
    dag = nu.from_graph(Pipeline().then(Where("where")), install=False)
    plan = fl.plan(fl.Experiment("sites").map(dag, [PI, MAC]))
    assert "Where.dispatch() gave Give" in [choice.because for choice in plan.choices]
    assert [problem.deployment for problem in plan.problems] == ["mac"]
    assert "Where is not implemented for Architecture.UNKNOWN" in plan.problems[0].message


def test_nodes_for_which_a_dispatcher_gives_the_same_task_share_one_graph():
    dag = nu.from_graph(Pipeline().then(Ping("10.0.0.1", 3, "ping")), install=False)
    plan = fl.plan(fl.Experiment("pings").map(dag, [PI, PC]))
    one, other = plan.deployments
    assert one.graph is other.graph
    assert {choice.implementation for choice in plan.choices if choice.task == "ping"} == {"PingLinuxImplementation"}


# --- flags ------------------------------------------------------------------------------------------------------------


def test_flags_of_text_and_number_go_between_nodes():
    wanted = FlagValues(text_value="go", int_value=2)
    server = Pipeline().then(SetFlagTask("stage", FlagValues(text_value="go", int_value=0)))
    server.then(WaitForExactFlagResultTask("stage", wanted, sleep_time=0.05, attempts=400))
    client = Pipeline().then(WaitForFlag("stage")).then(AtomicIncrementFlagTask("stage"))
    server_dag, client_dag = (nu.from_graph(graph, install=False) for graph in (server, client))
    experiment = fl.Experiment("flags").map(server_dag, [PC]).map(client_dag, [PI, OTHER_PI])
    run = fl.run(experiment, timeout=100)
    assert run.state == "succeeded", run
    assert nu.get_flag(run, "stage") == wanted
    assert nu.get_flag(run, "unset") is None


class WaitForFlag(Task):
    """Waits until the flag is set, through netunicorn's gateway as its library does."""

    def __init__(self, flag):
        super().__init__("wait")
        self.flag = flag

    def run(self):
        import requests

        gateway, experiment = os.environ["NETUNICORN_GATEWAY_ENDPOINT"], os.environ["NETUNICORN_EXPERIMENT_ID"]
        for _ in range(1000):
            answer = requests.get(f"{gateway}/api/v1/experiment/{experiment}/flag/{self.flag}", timeout=10)
            if answer.status_code == 200:
                return answer.json()
            time.sleep(0.02)  # netunicorn's flags can only be polled
        return Failure("The flag was never set.")


def test_an_unset_flag_counts_from_zero_and_a_task_reads_what_it_wrote():
    pipeline = (
        Pipeline()
        .then(AtomicDecrementFlagTask("n"))
        .then(AtomicDecrementFlagTask("n"))
        .then(GetFlagTask("n", name="g"))
    )
    assert plain(ours(pipeline))[1]["g"] == [(True, FlagValues(int_value=-2))]


def test_a_person_sets_a_flag_that_a_task_waits_for():
    dag = nu.from_graph(Pipeline().then(WaitForFlag("manual")), install=False)
    with contextlib.closing(fl.run(fl.Experiment("manual").map(dag, [PC]), wait=False)) as run:
        nu.set_flag(run, "manual", FlagValues(text_value="by hand"))
        run.wait(timeout=60)
        assert run.results["pc"]["wait"].value == {"text_value": "by hand", "int_value": 0}


class AskGateway(Task):
    """What the gateway answers to a request that is none of a flag's."""

    def __init__(self, name, path, body=None):
        super().__init__(name)
        self.path, self.body = path, body

    def run(self):
        import requests

        gateway = os.environ["NETUNICORN_GATEWAY_ENDPOINT"]
        base = gateway if self.path.startswith("/api") else gateway.rpartition("/")[0]
        url = base + self.path
        return (
            requests.get(url, timeout=10) if self.body is None else requests.post(url, self.body, timeout=10)
        ).status_code


def test_the_gateway_answers_nobody_without_its_secret_and_survives_nonsense():
    flag = "/api/v1/experiment/x/flag/f"
    pipeline = Pipeline().then(AskGateway("no secret", "/guess" + flag))
    pipeline.then(AskGateway("unknown", "/api/v2")).then(AskGateway("no json", flag, b"{"))
    pipeline.then(AskGateway("no values", flag, b"{}")).then(AskGateway("unset", flag))
    content = plain(ours(pipeline))[1]
    assert {name: outcomes[0][1] for name, outcomes in content.items()} == {
        "no secret": 404,
        "unknown": 404,
        "no json": 422,
        "no values": 400,
        "unset": 404,
    }


# --- what has no equivalent is named ---------------------------------------------------------------------------------


def endless():
    return CyclePipeline().then(Give(1, "a"))


def two_sources():
    graph = ExecutionGraph()
    a, b = Give(1, "a"), Give(2, "b")
    graph.graph.add_edges_from([("root", a), ("root", b)])
    graph.graph.add_edge(a, "root", type="weak", counter=2)
    graph.graph.add_edge(b, "root", type="weak", counter=2)
    return graph


def uncertain_counter():
    graph = ExecutionGraph()
    a, b = Give(1, "a"), Give(2, "b")
    graph.graph.add_edge("root", a)
    graph.graph.add_edge(a, b, traverse_on="failure", counter=1)
    graph.graph.add_edge(a, "root", type="weak", counter=3, traverse_on="any")
    return graph


def strong_circle():
    graph = ExecutionGraph()
    a, b = Give(1, "a"), Give(2, "b")
    graph.graph.add_edges_from([("root", a), (a, b), (b, a)])
    graph.override_graph_validation = True
    return graph


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (endless, "1 -> 'root' closes has no counter"),
        (two_sources, "'a' -> 'root' and 'b' -> 'root'"),
        (uncertain_counter, "'a' -> 'b' goes down only"),
        (strong_circle, "form a circle"),
    ],
)
def test_what_cannot_be_mapped_is_named(make, named):
    with pytest.raises(fl.UnsupportedError, match=named):
        nu.from_graph(make(), install=False)


def test_an_image_is_given_where_the_dag_is_mapped():
    graph = Pipeline(environment_definition=DockerImage(image="alpine")).then(Give(1, "a"))
    with pytest.raises(fl.UnsupportedError, match="the image 'alpine'"):
        nu.from_graph(graph)
    assert len(nu.from_graph(graph, install=False))


def test_what_netunicorn_refuses_is_refused_in_its_words():
    graph = ExecutionGraph()
    graph.graph.add_node(Give(1, "a"))
    with pytest.raises(fl.DefinitionError, match="weakly connected"):
        nu.from_graph(graph)


def test_an_endless_cycle_runs_as_often_as_is_said():
    assert plain(ours(endless(), rounds=3))[1] == {"a": [(True, 1)] * 3}
