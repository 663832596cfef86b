"""Settings of tasks that say something about processes: what is imported ahead, and what outlives its step."""

import os
import subprocess
import sys

import fieldlab as fl
import pytest


@fl.task(preload=["wave", "no_such_module"])
def loaded(name: str) -> bool:
    return name in sys.modules


@fl.task(keep_processes=True)
def leaves_a_process() -> int:
    return subprocess.Popen(["sleep", "600"]).pid


@fl.task
def leaves_one_too() -> int:
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


@fl.task
def running(*pids: int) -> list[bool]:
    return [os.path.exists(f"/proc/{pid}") for pid in pids]


def test_a_preloaded_module_is_there_before_the_step_imports_it_and_an_unknown_one_does_no_harm():
    dag = fl.DAG("preload")
    dag.add(loaded("wave"))
    dag.add(loaded("chunk"))
    results = fl.run(dag)
    assert (results["loaded"].value, results["loaded-2"].value) == (True, False)


def test_a_kept_process_runs_on_beside_later_steps_and_ends_with_the_deployment():
    with fl.DAG("keep") as dag:
        kept = leaves_a_process()
        other = leaves_one_too().after(kept)
        first = running(kept, other)
        running(kept).after(first).named("later")
    results = fl.run(dag)
    assert results["running"].value == [True, False]
    assert results["later"].value == [True]
    assert not os.path.exists(f"/proc/{results['leaves_a_process'].value}")


def test_a_step_that_keeps_processes_has_a_process_of_its_own_whatever_its_dag_says():
    with fl.DAG("keep", isolation="shared") as dag:
        leaves_a_process()
    (deployment,) = fl.plan(dag).deployments
    assert deployment.graph.steps[0].isolation == "process"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"preload": "numpy"}, "give a list"), ({"keep_processes": True, "isolation": "shared"}, "warm worker")],
)
def test_settings_that_make_no_sense_are_refused(given, said):
    with pytest.raises(fl.DefinitionError, match=said):
        fl.task(**given)
