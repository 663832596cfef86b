"""A DAG as a step of another: what it is called with, where that goes, what is refused, and DAGs in a row."""

import pytest
from fieldlab_common.builtin import arg, shell, value
from fieldlab_common.dag import DAG, Pipeline, choose
from fieldlab_common.deployment import MAX_DEPTH, On
from fieldlab_common.errors import ArgumentError, DefinitionError, InvalidNameError
from fieldlab_common.experiment import Experiment
from fieldlab_common.forms import background, map_, repeat
from fieldlab_common.node import Node
from fieldlab_common.resolve import resolve
from fieldlab_common.selector import node
from fieldlab_common.step import REQUIRED, File, by_node
from fieldlab_common.task import task

from .test_resolve import BIG, LAB, SMALL, Store


@task
def probe(host, rate=1): ...


@task
def summarise(found): ...


@task(when=node["cpus"] >= 4)
def heavy(): ...


@heavy.implementation(when=node["site"] == "lab", packages=["scapy"])
def heavy_lab(): ...


def collecting(**settings):
    with DAG("collect", **settings) as dag:
        summarise(probe(arg("host"), rate=arg("rate", 10)))
    return dag


def planned(dag, *nodes):
    store = Store()
    return resolve(Experiment("e").map(dag, nodes or [SMALL]), store, python="3.11"), store


def graph_of(dag, *nodes):
    resolution, store = planned(dag, *nodes)
    assert resolution.problems == ()
    return resolution.deployments[0].graph, store


def arguments(store, spec):
    return store.open(spec.args)


# --- what it is called with ---


def test_the_parameters_are_what_its_steps_mention_in_order():
    assert collecting().parameters == {"host": REQUIRED, "rate": 10}


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing: host"),
        (("a",), {"host": "b"}, "given twice: host"),
        (("a",), {"speed": 1}, "unknown: speed"),
        (("a", 1, 2), {}, "takes 2 arguments, not 3"),
    ],
)
def test_arguments_are_checked_where_it_is_called(args, kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        collecting()(*args, **kwargs)


def test_a_parameter_has_one_default():
    with DAG("d") as dag:
        probe(arg("host", "a"), arg("host", "b"))
    with pytest.raises(DefinitionError, match="defaults 'a' and 'b'"):
        dag()


@pytest.mark.parametrize("name", ["two words", "", 3])
def test_a_parameter_has_a_name_that_can_be_given(name):
    with pytest.raises(InvalidNameError):
        arg(name)


def test_a_default_is_no_step():
    with pytest.raises(DefinitionError, match="default"):
        arg("x", [probe("a")])


def test_without_its_arguments_it_cannot_be_mapped():
    resolution, _ = planned(collecting())
    assert [problem.code for problem in resolution.problems] == ["argument"]
    assert "missing: host" in resolution.problems[0].message


def test_alone_it_has_its_defaults():
    with DAG("d") as dag:
        probe(arg("host", "here"))
    graph, store = graph_of(dag)
    assert arguments(store, graph.steps[0]) == (("here",), {})


def test_calling_it_fixes_it_and_makes_a_step_of_the_dag_being_defined():
    collect = collecting()
    with DAG("d") as dag:
        step = collect("a")
    assert list(dag) == [step]
    assert step.name == "collect"
    with pytest.raises(DefinitionError, match="in use"):
        collect.add(probe("b"))


# --- where that goes ---


def test_values_and_node_properties_stand_in_the_arguments_as_if_written_there():
    collect = collecting()
    with DAG("d") as dag:
        collect(host=["x", node["ipv4"]], rate=by_node(lambda one: one.name)).named("one")
    graph, store = graph_of(dag, Node.dummy("small", ipv4="10.0.0.1"))
    (one,) = graph.steps
    assert (one.code, one.args, one.task) == ("", "", "collect")
    inner = one.graph.steps[0]
    assert arguments(store, inner) == ((["x", ("node", "ipv4")],), {"rate": "small"})
    assert inner.outer == ()


def test_a_step_of_the_dag_around_is_reached_from_inside_and_waited_for_outside():
    collect = collecting()
    with DAG("d") as dag:
        first = probe("a")
        collect(host=first["ip"], rate=first.status).after(first, on="always")
    graph, store = graph_of(dag)
    one = graph.steps[1]
    assert {(need.step, need.on, need.data) for need in one.needs} == {
        ("probe", On.SUCCESS, True),
        ("probe", On.ALWAYS, True),
    }
    inner = one.graph.steps[0]
    assert inner.outer == ("^probe",)
    assert arguments(store, inner) == (
        (("step", "^probe", "value", ("ip",)),),
        {"rate": ("step", "^probe", "status", ())},
    )


def test_a_parameter_is_handed_on_through_the_dags_between():
    collect = collecting()
    with DAG("middle") as middle:
        collect(host=arg("target"))
    with DAG("d") as dag:
        middle(target=probe("a"))
    graph, store = graph_of(dag)
    inner = graph.steps[1].graph.steps[0].graph.steps[0]
    assert inner.outer == ("^^probe",)
    assert arguments(store, inner)[0] == (("step", "^^probe", "value", ()),)


def test_mapped_the_item_is_its_first_parameter():
    collect = collecting()
    with DAG("d") as dag:
        map_(collect, probe("a"), rate=3)
    graph, store = graph_of(dag)
    assert graph.steps[1].over == "probe"
    inner = graph.steps[1].graph.steps[0]
    assert inner.outer == ("^",)
    assert arguments(store, inner) == ((("step", "^", "value", ()),), {"rate": 3})


def test_a_file_that_it_is_called_with_travels():
    collect = collecting()
    with DAG("d") as dag:
        collect(host=File("weights.bin"))
    graph, _ = graph_of(dag)
    assert graph.steps[0].graph.steps[0].files
    assert set(graph.steps[0].graph.steps[0].files) <= set(graph.blobs())


def test_a_list_that_is_a_parameter_can_be_mapped_over_and_decided_on():
    with DAG("inner") as inner:
        map_(probe, arg("hosts")).when(value(arg("go")), bool)
    with DAG("d") as dag:
        inner(hosts=["a", "b"], go=True)
    graph, store = graph_of(dag)
    hosts, go, mapped = sorted(graph.steps[0].graph.steps, key=lambda spec: ("hosts", "go", "probe").index(spec.name))
    assert (mapped.over, mapped.when.step) == ("hosts", "go")
    assert [arguments(store, one) for one in (hosts, go)] == [((["a", "b"],), {}), ((True,), {})]
    with pytest.raises(DefinitionError, match=r"fl\.value"):
        probe("a").when(arg("go"), bool)


def test_a_command_s_own_argument_may_have_a_default():
    echo = shell(["echo", arg("text", "hello")])
    assert echo().kwargs == {"text": "hello"}
    assert echo("bye").kwargs == {"text": "bye"}


# --- what it may be ---


def test_it_repeats_and_has_settings_for_its_attempts():
    collect = collecting(max_parallel=2, stop_on_failure=False)
    with DAG("d") as dag:
        repeat(collect.as_task(timeout="5m", retries=2, retry_delay=3)("a"), times=4).exclusive("nic").measured()
    (spec,) = graph_of(dag)[0].steps
    assert (spec.timeout, spec.retry.times, spec.retry.delay, spec.repeat.times) == (300.0, 2, 3.0, 4)
    assert (spec.exclusive, spec.measured, spec.slot) == (("nic",), True, False)
    assert (spec.graph.max_parallel, spec.graph.stop_on_failure) == (2, False)


def test_its_steps_are_isolated_as_the_innermost_dag_says_that_says_so():
    with DAG("own", isolation="process") as own:
        probe("a")
    with DAG("d", isolation="shared") as dag:
        collecting()("a")
        own()
    collect, other = sorted(graph_of(dag)[0].steps, key=lambda spec: spec.name)
    assert {spec.isolation for spec in collect.graph.steps} == {"shared"}
    assert {spec.isolation for spec in other.graph.steps} == {"process"}


def test_it_cannot_run_in_the_background():
    with pytest.raises(DefinitionError, match="cannot run in the background"):
        background(collecting()("a"))


def test_it_cannot_be_inside_of_itself():
    with DAG("d") as dag:
        probe("a")
        with pytest.raises(DefinitionError, match="step of itself"):
            dag()


def nested(depth):
    with DAG("innermost") as dag:
        probe("a")
    for _ in range(depth):
        inner = dag
        with DAG("outer") as dag:
            inner()
    return dag


def test_dags_are_inside_of_each_other_so_deep_and_no_deeper():
    nested(MAX_DEPTH).checked()
    with pytest.raises(DefinitionError, match="more than 8 deep"):
        nested(MAX_DEPTH + 1).checked()


# --- by node ---


def test_implementations_inside_are_chosen_by_node_and_explained():
    with DAG("inner") as inner:
        heavy()
    with DAG("d") as dag:
        inner()
    resolution, _ = planned(dag, BIG, LAB, SMALL)
    assert [(c.deployment, c.step, c.implementation) for c in resolution.choices if c.task == "heavy"] == [
        ("big", "inner/heavy", ""),
        ("lab", "inner/heavy", "heavy_lab"),
    ]
    assert [(p.deployment, p.step, p.code) for p in resolution.problems] == [
        ("small", "inner/heavy", "no_implementation")
    ]
    assert resolution.environments["lab"].endswith("inner/heavy")


def test_a_dag_inside_may_be_chosen_by_node():
    with DAG("other") as other:
        probe(arg("host"), rate=99)
    with DAG("d") as dag:
        choose((node["cpus"] >= 4, other), default=collecting())(host="a")
    resolution, _ = planned(dag, BIG, SMALL, LAB)
    big, small, lab = (one.graph.steps[0] for one in resolution.deployments)
    assert (big.implementation, len(big.graph.steps)) == ("other", 1)
    assert (small.implementation, len(small.graph.steps)) == ("collect", 2)
    assert small is lab
    assert resolution.choices.of("small")[0].rejected[0].implementation == "other"


def test_a_choice_of_which_none_fits_is_a_problem_of_the_node():
    with DAG("d") as dag:
        choose((node["cpus"] >= 4, collecting()))(host="a")
    resolution, _ = planned(dag, SMALL)
    assert [(p.step, p.code) for p in resolution.problems] == [("choice", "no_implementation")]


def test_every_dag_of_a_choice_must_take_the_arguments():
    with DAG("other") as other:
        probe("b")
    with pytest.raises(ArgumentError, match=r"other\(\): unknown: host"):
        choose((node["cpus"] >= 4, collecting()), default=other)(host="a")


# --- in a row ---


def named(name):
    with DAG(name) as dag:
        probe("a")
    return dag


def edges(dag):
    return {step.name: [edge.step.name for edge in step.edges] for step in dag}


def test_dags_in_a_row_and_beside_each_other_are_a_pipeline_of_steps():
    row = named("a") >> [named("b"), named("c")] >> named("d")
    assert isinstance(row, Pipeline)
    assert row.name == "a-b+c-d"
    assert edges(row) == {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def test_dags_of_one_name_are_told_apart_and_one_may_come_twice():
    a = named("a")
    assert edges([a, named("a")] >> a) == {"a": [], "a-2": [], "a-3": ["a", "a-2"]}


def test_a_stage_may_have_steps_and_dags():
    pipeline = Pipeline("p").then(probe("x")).then([named("a"), probe("y")])
    assert edges(pipeline) == {"probe": [], "a": ["probe"], "probe-2": ["probe"]}


def test_joining_makes_no_steps_of_the_dag_being_defined():
    with DAG("d") as dag:
        row = named("a") >> named("b")
        row()
    assert list(edges(dag)) == ["a-b"]


@pytest.mark.parametrize("other", [probe, [probe], "b"])
def test_only_dags_are_joined(other):
    with pytest.raises(DefinitionError):
        _ = named("a") >> other


def test_a_dag_that_needs_arguments_is_called_with_them_first():
    with pytest.raises(ArgumentError, match="missing: host"):
        _ = named("a") >> collecting()
    assert edges(Pipeline("p").then(named("a")).then(collecting()("x"))) == {"a": [], "collect": ["a"]}
