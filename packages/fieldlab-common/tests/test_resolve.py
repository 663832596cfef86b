"""From an experiment to deployments: what is chosen, why, and every problem at once."""

import hashlib

import pytest
from fieldlab_common import payload, wire
from fieldlab_common.builtin import barrier, shell
from fieldlab_common.dag import DAG, choose
from fieldlab_common.deployment import MAX_INLINE, Graph, Need, On, inline, inlined
from fieldlab_common.environment import Host, Venv
from fieldlab_common.experiment import Experiment
from fieldlab_common.forms import background
from fieldlab_common.node import Node
from fieldlab_common.resolve import resolve
from fieldlab_common.selector import node
from fieldlab_common.step import by_node
from fieldlab_common.task import task


class Store:
    """Keeps blobs in memory."""

    def __init__(self):
        self.blobs = {}

    def seal(self, obj, what):
        data = payload.seal(obj, what=what)
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def seal_arguments(self, obj, what):
        data = payload.seal(obj, what=what)
        return inline(data) if len(data) <= MAX_INLINE else self.seal(obj, what)

    def seal_file(self, path):
        return hashlib.sha256(path.encode()).hexdigest()

    def bundles(self):
        return ()

    def open(self, digest):
        data = inlined(digest)
        return payload.unseal(self.blobs[digest] if data is None else data, lambda reference: reference)


@task
def plain(value=None):
    return value


@task(when=node["cpus"] >= 4, packages=["numpy==1"])
def heavy(): ...


@heavy.implementation(when=node["site"] == "lab", packages=[])
def heavy_lab(): ...


BIG = Node.dummy("big", os="linux", cpus=8, python=["3.11"])
LAB = Node.dummy("lab", os="linux", cpus=1, site="lab")
SMALL = Node.dummy("small", os="linux", cpus=1)


def resolved(dag, *nodes, python="3.11", **settings):
    store = Store()
    found = resolve(Experiment("e", **settings).map(dag, nodes), store, python=python)
    return found, store


def test_each_node_gets_the_first_implementation_that_fits_and_the_reason():
    with DAG("d") as dag:
        heavy()
    found, _ = resolved(dag, BIG, LAB)
    assert [(c.implementation, c.because) for c in found.choices] == [("", "cpus >= 4"), ("heavy_lab", "site == 'lab'")]
    assert found.choices[0].rejected[0].because == "has no `site`"


def test_a_node_that_nothing_fits_is_a_problem_that_names_every_miss():
    with DAG("d") as dag:
        heavy()
    found, _ = resolved(dag, SMALL)
    assert found.deployments == ()
    assert "has no `site`" in str(found.problems[0])
    assert "`cpus` is 1, not >= 4" in str(found.problems[0])


def test_choices_are_a_sequence_in_the_order_of_deployments_and_steps():
    with DAG("d") as dag:
        heavy()
        plain(1)
    choices = resolved(dag, BIG, LAB, SMALL)[0].choices
    one_by_one = [(c.deployment, c.step, c.implementation) for c in choices]
    assert one_by_one == [
        ("big", "heavy", ""),
        ("big", "plain", ""),
        ("lab", "heavy", "heavy_lab"),
        ("lab", "plain", ""),
        ("small", "plain", ""),  # nothing fits for the other
    ]
    assert [choices[i] for i in range(len(choices))] == list(choices)
    assert choices[-1] == choices[4]
    assert choices[1:3] == tuple(choices)[1:3]
    assert choices.of("lab") == choices[2:4]
    with pytest.raises(IndexError):
        choices[5]


def test_a_condition_in_python_is_asked_of_every_node():
    @task(when=lambda n: n["cpus"] > 4)
    def opaque(): ...

    @opaque.implementation(when=lambda n: n.name == "small")
    def opaque_small(): ...

    with DAG("d") as dag:
        opaque()
    found, _ = resolved(dag, BIG, SMALL, LAB)
    assert [c.implementation for c in found.choices] == ["", "opaque_small"]
    assert [p.deployment for p in found.problems] == ["lab"]


def test_packages_ask_for_a_venv_unless_told_otherwise():
    with DAG("d") as dag:
        heavy()
    found, _ = resolved(dag, BIG, LAB)
    assert [d.environment.kind for d in found.deployments] == ["venv", "host"]
    given = resolve(Experiment("e").map(dag, BIG, env=Host()), Store(), python="3.11")
    assert given.deployments[0].environment.kind == "host"


def test_nodes_that_resolve_alike_share_one_graph():
    with DAG("d") as dag:
        plain(1)
    found, store = resolved(dag, BIG, SMALL)
    assert found.deployments[0].graph is found.deployments[1].graph
    assert len(store.blobs) == 1


def test_isolation_is_what_the_task_says_else_its_dag_and_never_shared_in_the_background():
    alone = task(isolation="process")(plain.fn)
    with DAG("d", isolation="shared") as dag:
        tiny, kept, capture = plain(), alone(), background(plain("b"))
    with DAG("e") as other:
        usual, asked = plain(), task(isolation="shared")(plain.fn)()
    steps = {step.name: step.isolation for step in resolved(dag, BIG)[0].deployments[0].graph.steps}
    assert [steps[step.name] for step in (tiny, kept, capture)] == ["shared", "process", "process"]
    steps = {step.name: step.isolation for step in resolved(other, BIG)[0].deployments[0].graph.steps}
    assert [steps[step.name] for step in (usual, asked)] == ["process", "shared"]


def test_short_arguments_stand_in_the_graph_and_long_ones_are_blobs():
    with DAG("d") as dag:
        plain("short")
        plain("x" * 5000)
    (found,), _ = resolved(dag, BIG)[0].deployments, None
    short, long = found.graph.steps
    assert short.args.startswith("=")
    assert short.args not in found.graph.blobs()
    assert long.args in found.graph.blobs()


def test_by_node_is_computed_for_each_node():
    with DAG("d") as dag:
        plain([by_node(lambda n: n["cpus"] * 2)])
    found, store = resolved(dag, BIG, SMALL)
    assert [store.open(d.graph.steps[0].args)[0] for d in found.deployments] == [([16],), ([2],)]


def test_a_by_node_that_fails_for_a_node_is_a_problem_of_that_node_alone():
    with DAG("d") as dag:
        plain(by_node(lambda n: 8 / n["cpus"]["cores"] if n.name == "small" else n["cpus"]))
    found, _ = resolved(dag, BIG, SMALL)
    (problem,) = found.problems
    assert (problem.deployment, problem.step) == ("small", "plain")
    assert "fl.by_node failed: TypeError" in problem.message


def test_a_step_without_such_an_argument_is_shared_beside_one_that_has_it():
    with DAG("d") as dag:
        plain(by_node(lambda n: n["cpus"]))
        plain("same").named("same")
    found, store = resolved(dag, BIG, SMALL)
    first, second = (d.graph.steps for d in found.deployments)
    assert first[1] is second[1]
    assert store.open(first[1].args) == (("same",), {})


def test_steps_and_properties_in_arguments_leave_as_references_and_make_edges():
    with DAG("d") as dag:
        first = plain(1).named("first")
        plain({"v": [first["k"]], "ip": node["cpus"]}).named("second")
    found, store = resolved(dag, BIG)
    second = found.deployments[0].graph.steps[1]
    assert second.needs == (Need(step="first", on=On.SUCCESS, data=True),)
    assert store.open(second.args) == (({"v": [("step", "first", "value", ("k",))], "ip": ("node", "cpus")},), {})


def test_an_error_as_argument_implies_no_success_edge():
    with DAG("d") as dag:
        first = plain(1).named("first")
        plain(first.error).named("free")
        plain(first.error).named("on").after(first, on="failure")
    found, _ = resolved(dag, BIG)
    needs = {s.name: s.needs for s in found.deployments[0].graph.steps}
    assert needs["free"] == (Need(step="first", on=On.ALWAYS, data=True),)
    assert needs["on"] == (Need(step="first", on=On.FAILURE, data=True),)


def test_a_graph_survives_the_wire():
    with DAG("d", max_parallel=2) as dag:
        server = background(plain(1))
        plain(2).during(server).measured().exclusive("nic")
    found, _ = resolved(dag, BIG)
    graph = found.deployments[0].graph
    assert wire.loads(Graph, wire.dumps(graph)) == graph


def test_a_choice_of_dags_goes_by_the_node():
    def one(name):
        with DAG(name) as dag:
            plain(1)
        return dag

    found, _ = resolved(choose((node["site"] == "lab", one("a")), default=one("b")), LAB, BIG)
    assert [d.graph.name for d in found.deployments] == ["a", "b"]
    found, _ = resolved(choose((node["site"] == "lab", one("a"))), BIG)
    assert "no DAG fits" in str(found.problems[0])


def test_all_problems_are_found_at_once():
    lock = __import__("threading").Lock()

    @task
    def held():
        return lock

    with DAG("d") as dag:
        held()
        plain(node["ipv4"])
    windows = Node.dummy("win", os="windows", python=["3.9"])
    found, _ = resolved(dag, windows, Node.dummy("ok", ipv4="::1"))
    text = "\n".join(map(str, found.problems))
    for part in ("Windows", "has 3.9 only", "has no `ipv4`", "ok, step held", "'lock'"):
        assert part in text


@pytest.mark.parametrize(("reporting", "problems"), [("silent", 2), ("quiet", 0)])
def test_waiting_for_other_nodes_does_not_go_with_silence(reporting, problems):
    with DAG("d") as dag:
        barrier("b")
    assert len(resolved(dag, BIG, LAB, reporting=reporting)[0].problems) == problems


def test_conflicting_pins_of_two_tasks_are_a_problem():
    @task(packages=["numpy==2"])
    def other(): ...

    with DAG("d") as dag:
        heavy()
        other()
    found, _ = resolved(dag, BIG)
    assert "numpy is pinned to 1 and to 2" in str(found.problems[0])


def test_more_nodes_than_there_are_deployments_cannot_be_wished_for():
    with DAG("d") as dag:
        shell("true")()
    two = [Node.dummy("a"), Node.dummy("b")]
    assert not resolve(Experiment("e", min_nodes=2).map(dag, two), Store(), python="3.11").problems
    (problem,) = resolve(Experiment("e", min_nodes=3).map(dag, two), Store(), python="3.11").problems
    assert problem.message == "min_nodes=3, and there are 2 deployments."


def test_an_empty_experiment_is_a_problem():
    assert resolve(Experiment("e"), Store(), python="3.11").problems


def _local():
    @task
    def by_value(): ...

    return by_value


@pytest.mark.parametrize(
    ("make", "environment", "has", "said"),
    [
        (_local, None, ["3.12"], "code travels for Python 3.11, and the node has 3.12 only"),
        (_local, Venv(python="3.12"), ["3.11", "3.12"], "is to have Python 3.12, and code travels for 3.11"),
        (lambda: shell("true"), Venv(python="3.13"), ["3.11", "3.12"], "is to have Python 3.13, and the node has 3.11"),
        (lambda: shell("true"), Venv(python="3.12"), ["3.11", "3.12"], ""),
        (lambda: shell("true"), None, ["3.12"], ""),
        (_local, Venv(python="3.11"), [], ""),
    ],
)
def test_the_version_that_is_needed_is_that_of_code_by_value_or_of_the_environment(make, environment, has, said):
    with DAG("one") as dag:
        make()()
    experiment = Experiment("e").map(dag, Node.dummy("n", python=has), env=environment)
    found = [problem.message for problem in resolve(experiment, Store(), python="3.11").problems]
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_a_condition_travels_by_value_whatever_its_step_does():
    with DAG("conditional") as dag:
        first = shell("true")()
        shell("true")().when(first, lambda value: True)
    node_of_another = Node.dummy("n", python=["3.12"])
    assert resolve(Experiment("e").map(dag, node_of_another), Store(), python="3.11").problems


@pytest.mark.parametrize(("root", "kinds"), [(True, ["venv"]), (False, []), (None, ["host"])])
def test_system_packages_ask_for_an_environment_that_installs_them_where_it_can(root, kinds):
    with DAG("system") as dag:
        shell("hello", system_packages=["hello"])()
    facts = {} if root is None else {"root": root}
    found = resolve(Experiment("e").map(dag, Node.dummy("n", **facts)), Store(), python="3.11")
    assert [deployment.environment.kind for deployment in found.deployments] == kinds
    assert bool(found.problems) is (root is False)


@pytest.mark.parametrize(
    ("os", "infrastructure", "refused"),
    [("macos", "lab", True), ("macos", "dummy", False), ("windows", "dummy", True), ("linux", "lab", False)],
)
def test_a_node_of_a_system_that_executors_do_not_run_on_is_refused_by_name(os, infrastructure, refused):
    with DAG("d") as dag:
        plain()
    found, _ = resolved(dag, Node.dummy("n", os=os, infrastructure=infrastructure))
    said = [problem.message for problem in found.problems]
    assert bool(said) is refused
    assert not refused or {"macos": "macOS", "windows": "Windows"}[os] in said[0]


def test_a_barrier_for_a_role_that_no_deployment_has_is_a_problem():
    with DAG("d") as dag:
        barrier("start", parties="server")
    experiment = Experiment("e").map(dag, [BIG, SMALL], role="client")
    (problem,) = resolve(experiment, Store(), python="3.11").problems
    assert (problem.step, problem.code) == ("barrier", "unknown_name")
    assert "waits for the role 'server', which no deployment has ('client')" in str(problem)
    assert resolve(experiment.map(dag, LAB, role="server"), Store(), python="3.11").problems == ()
