"""Tasks, steps, DAGs and experiments as a user writes them, and what is refused at the user's line."""

import datetime as dt
import re

import pytest
from fieldlab_common.builtin import arg, barrier, send, shell, wait_for
from fieldlab_common.context import CommandFailed, TaskContext, check_artifact_name
from fieldlab_common.dag import DAG, Pipeline
from fieldlab_common.environment import Venv
from fieldlab_common.errors import (
    ArgumentError,
    ArtifactNameError,
    CycleError,
    DefinitionError,
    DuplicateNameError,
    InvalidNameError,
    SelectionError,
    StepMisuseError,
    UnknownNameError,
)
from fieldlab_common.experiment import Experiment
from fieldlab_common.forms import background, map_, repeat
from fieldlab_common.node import Node
from fieldlab_common.selector import node
from fieldlab_common.step import by_node
from fieldlab_common.task import FunctionTask, Task, task


@task
def add(a: int, b: int = 0) -> int:
    return a + b


@task
def listen(port: int, *, ctx: TaskContext) -> None: ...


class Probe(Task[dict]):
    timeout = 5

    def __init__(self, n: int):
        self.n = n

    def run(self, host: str) -> dict:
        return {"n": self.n, "host": host}


def test_calling_a_task_makes_a_step_and_fn_is_the_plain_function():
    assert add(1).name == "add"
    assert add.fn(1, 2) == 3


def test_a_task_keeps_the_name_and_words_of_its_function():
    assert isinstance(add, FunctionTask)
    assert add.__name__ == "add"


@pytest.mark.parametrize("call", [lambda: add(), lambda: add(1, 2, 3), lambda: add(1, c=2), lambda: Probe(1)()])
def test_wrong_arguments_are_refused_where_they_are_written(call):
    with pytest.raises(ArgumentError, match=r"\("):
        call()


def test_the_context_is_filled_in_and_cannot_be_given():
    assert listen(80).takes_context
    with pytest.raises(ArgumentError, match="filled in"):
        listen(80, ctx=None)


def test_settings_of_a_class_task_are_its_class_attributes():
    assert Probe(1).implementations()[0].settings.timeout == 5


def test_implementations_are_tried_in_order_and_the_base_is_last():
    @task(timeout=3)
    def measure() -> str:
        return "base"

    @measure.implementation(when=node.os == "windows", packages=["pywin"])
    def measure_windows() -> str:
        return "windows"

    names = [(i.name, i.settings.packages, i.settings.timeout) for i in measure.implementations()]
    assert names == [("measure_windows", ("pywin",), 3), ("", None, 3)]


def test_an_implementation_with_another_signature_is_refused_when_it_is_used():
    @task
    def one(a: int) -> int:
        return a

    @one.implementation(when=node.os == "x")
    def other(b: str, c: str) -> int:
        return 0

    with pytest.raises(ArgumentError):
        one(1)


@pytest.mark.parametrize("settings", [{"packages": "numpy"}, {"timeout": 0}, {"retries": -1}, {"colour": "red"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(DefinitionError):
        task(**settings)


@pytest.mark.parametrize(
    "use",
    [iter, bool, len, lambda s: 1 in s, lambda s: f"{s}", lambda s: s == 1, lambda s: s < 1, lambda s: [*s["k"]]],
)
def test_a_step_is_not_its_value_yet(use):
    with pytest.raises(StepMisuseError, match="value exists only when it runs"):
        use(add(1))


def test_steps_are_named_after_their_task_in_order_of_use():
    with DAG("d") as dag:
        first, second, third = add(1), add(2), add(3).named("last")
    assert [s.name for s in (first, second, third)] == ["add", "add-2", "last"]
    assert list(dag.steps) == ["add", "add-2", "last"]


def test_a_name_that_is_taken_or_unfit_is_refused():
    with DAG("d"):
        add(1).named("x")
        with pytest.raises(DuplicateNameError):
            add(2).named("x")
        with pytest.raises(InvalidNameError):
            add(3).named("../x")


def test_a_step_made_outside_joins_the_dag_it_is_given_to_with_all_it_needs():
    outside = add(add(1))
    with DAG("d") as dag:
        add(2).after(outside)
    assert len(dag) == 3


def test_a_step_belongs_to_one_dag():
    with DAG("a"):
        step = add(1)
    with pytest.raises(DefinitionError, match="another DAG"):
        DAG("b").add(step)


def test_a_circle_is_refused_and_shown():
    with DAG("d") as dag:
        a, b, c = add(1).named("a"), add(2).named("b"), add(3).named("c")
        a >> b >> c >> a
    with pytest.raises(CycleError) as caught:
        dag.checked()
    assert set(caught.value.details["steps"]) == {"a", "b", "c"}


def test_order_puts_what_is_needed_first():
    with DAG("d") as dag:
        late = add(1).named("late")
        late.after(add(2).named("early"))
    assert [s.name for s in dag.checked()] == ["early", "late"]


def test_a_dag_in_use_cannot_change():
    with DAG("d") as dag:
        add(1)
    dag.checked()
    with pytest.raises(DefinitionError, match="in use"):
        dag.add(add(2))


def test_an_empty_dag_and_an_unknown_step_are_errors():
    with pytest.raises(DefinitionError, match="no step"):
        DAG("d").checked()
    with pytest.raises(UnknownNameError):
        DAG("d")["x"]


def test_stages_of_a_pipeline_follow_each_other():
    pipeline = (
        Pipeline("p").then(add(1).named("a")).then([add(2).named("b"), add(3).named("c")]).then(add(4).named("d"))
    )
    assert {s.name for s in pipeline["d"].neighbours()} == {"b", "c"}
    assert [s.name for s in pipeline["b"].neighbours()] == ["a"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: add(1).after(3),
        lambda: add(1).after(add(2), on="sometimes"),
        lambda: add(1).during(add(2)),
        lambda: repeat(add(1)),
        lambda: repeat(add(1), times=0),
        lambda: map_(add, [1, 2]),
        lambda: barrier("b", parties=0, timeout=1),
        lambda: barrier("b", parties=True, timeout=1),
        lambda: barrier("b", parties=2),
        lambda: send("fieldlab.barrier"),
        lambda: wait_for(""),
        lambda: DAG("d", max_parallel=0),
        lambda: DAG("d", isolation="threads"),
        lambda: task(isolation="thread"),
        lambda: task(3),
        lambda: shell([]),
        lambda: shell("x", parse="yaml"),
        lambda: background(task(isolation="shared")(print)("x")),
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(DefinitionError):
        wrong()


def test_a_barrier_of_a_number_of_parties_needs_a_deadline_and_says_why():
    with pytest.raises(DefinitionError, match=r"wait for ever.*timeout="):
        barrier("b", parties=2)
    assert barrier("b", parties=2, timeout="5m").task.task_name == "barrier"
    assert barrier("c", parties="all").task.task_name == "barrier"


def test_an_asynchronous_function_and_a_method_are_no_tasks():
    async def later():
        pass

    with pytest.raises(DefinitionError, match="asynchronous"):
        task(later)

    class Lab:
        @task
        def work(self):
            pass

    with pytest.raises(DefinitionError, match="class task"):
        Lab().work()


def test_a_background_task_without_a_context_is_stopped_by_a_signal():
    assert background(add(1)).background.signal == 15
    assert background(listen(1)).background.signal is None
    assert background(listen(1)).background.announces


def test_a_command_is_an_argument_list_whatever_the_arguments_hold():
    ping = shell("ping -c {n} {host}")
    assert ping.command({"n": 1, "host": "; rm -rf /"}) == ["ping", "-c", "1", "; rm -rf /"]
    awk = shell(["awk", "{print $1}", arg("file")], name="first")
    assert awk.command({"file": "a b"}) == ["awk", "{print $1}", "a b"]


@pytest.mark.parametrize("call", [lambda s: s(), lambda s: s(1, 2, 3), lambda s: s(1, n=1), lambda s: s(n=1, x=2)])
def test_wrong_arguments_of_a_command_are_refused(call):
    with pytest.raises(ArgumentError):
        call(shell("ping -c {n} {host}"))


NODES = [Node.dummy("a"), Node.dummy("b")]


def one_step():
    with DAG("d") as dag:
        add(1)
    return dag


def test_deployments_are_named_after_their_node_or_as_asked():
    exp = Experiment("e").map(one_step(), NODES).map(one_step(), NODES, role="r", name="{role}-{index}")
    assert [a.name for a in exp.assignments] == ["a", "b", "r-0", "r-1"]


def test_a_deployment_name_is_unique():
    with pytest.raises(DuplicateNameError, match="'a' already"):
        Experiment("e").map(one_step(), NODES).map(one_step(), NODES)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: Experiment("e").map(one_step(), []), SelectionError),
        (lambda: Experiment("e").map(one_step(), ["a"]), DefinitionError),
        (lambda: Experiment("e").map(add, NODES), DefinitionError),
        (lambda: Experiment("e").map(one_step(), NODES, name="{colour}"), DefinitionError),
        (lambda: Experiment("a/b"), InvalidNameError),
        (lambda: Experiment("e", reporting="loud"), DefinitionError),
        (lambda: Experiment("e", start_at=dt.datetime(2026, 1, 1)), DefinitionError),  # noqa: DTZ001
        (lambda: Experiment("e", start_at=1.5e9), DefinitionError),  # type: ignore[arg-type]
        (lambda: Experiment("e", min_nodes=0), DefinitionError),
        (lambda: Experiment("e", on_prepare_failure="perhaps"), DefinitionError),
    ],
)
def test_a_wrong_experiment_is_refused(wrong, error):
    with pytest.raises(error):
        wrong()


@pytest.mark.parametrize("name", ["trace.csv", "out/trace.csv", "a b.txt", "ü.csv"])
def test_portable_artifact_names_pass(name):
    assert check_artifact_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "/etc/x", "../x", "a/../b", "a//b", "a\\b", "C:x", "a\x00", "x" * 256, ".", "a/ ", 3]
)
def test_other_artifact_names_are_refused(name):
    with pytest.raises(ArtifactNameError):
        check_artifact_name(name)


def test_a_command_that_the_node_lacks_says_how_to_get_it():
    with pytest.raises(CommandFailed, match=r"no program 'fieldlab-nothing'.*system_packages") as caught:
        shell("fieldlab-nothing {x}").run(x=1)
    assert caught.value.exit_code == 127


class Nothing(Task[None]): ...


@pytest.mark.parametrize(
    "use",
    [
        lambda: repeat(add, times=2),  # type: ignore[arg-type]
        lambda: background(add),  # type: ignore[arg-type]
        lambda: Pipeline("stages").then(add),  # type: ignore[arg-type]
        lambda: add(Probe(1)),
        lambda: add(b=Probe, a=1),
    ],
)
def test_a_task_where_a_step_belongs_is_refused_and_told_to_be_called(use):
    with pytest.raises(DefinitionError, match=r"no step"):
        use()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: background(add(1), stop="INT"), "signal"),  # type: ignore[arg-type]
        (lambda: repeat(add(1), times="3"), "times='3'"),  # type: ignore[arg-type]
        (lambda: repeat(add(1), until=3), "until=3"),  # type: ignore[arg-type]
        (lambda: add(1).exclusive(), "names"),
        (lambda: add(1).exclusive(3), "names"),  # type: ignore[arg-type]
        (lambda: by_node(3), "function of a node"),  # type: ignore[arg-type]
        (lambda: DAG(max_parallel="3"), "max_parallel='3'"),  # type: ignore[arg-type]
        (lambda: Experiment("x", min_nodes="3"), "min_nodes='3'"),  # type: ignore[arg-type]
        (lambda: Experiment("x", start_at="tomorrow"), "no time"),  # type: ignore[arg-type]
        (lambda: Nothing()(), "Nothing has no run method"),
        (lambda: shell("grep 'a"), "No closing quotation"),
        (lambda: shell("tcpdump -r {file} | wc -l"), "no shell reads the '|'"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(use, words):
    with pytest.raises(DefinitionError, match=re.escape(words)):
        use()


@pytest.mark.parametrize(("setting", "given"), [("env", "venv"), ("env", Venv), ("resources", {"cpus": 1})])
def test_an_experiment_takes_environments_and_resources_of_their_kind(setting, given):
    with DAG() as dag:
        add(1)
    with pytest.raises(DefinitionError, match=f"{setting}="):
        Experiment("x").map(dag, Node.dummy(), **{setting: given})


@pytest.mark.parametrize(
    "settings",
    [{"env": {"RATE": 1}}, {"retry_if": 3}, {"retries": 1.5}, {"retries": "2"}, {"packages": ["numpy >> 3"]}],
)
def test_settings_of_the_wrong_kind_are_refused(settings):
    (name,) = settings
    with pytest.raises(DefinitionError, match="requirement" if name == "packages" else f"{name}="):
        task(**settings)


def test_steps_are_named_in_any_script_as_functions_are():
    assert add(1).named("größe").name == "größe"


def test_a_command_gives_its_step_a_name_that_steps_can_have():
    assert shell(["/opt/my tools/probe [1]", "-v"])().name == "probe--1-"
    with pytest.raises(InvalidNameError):
        shell("true", name="a/b")
