"""The program that the type checkers read also does what it says: planned, here, and at a real director."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import fieldlab as fl
import pytest
from fieldlab_director import embedded


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("program", Path(__file__).parent / "program.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["program"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["program"]


@pytest.fixture(scope="module")
def client() -> Iterator[fl.Client]:
    with embedded() as director, fl.Client(director.url, token=director.token) as made:
        yield made


def test_it_is_planned_with_the_implementation_that_each_node_takes(program: ModuleType) -> None:
    exp = fl.Experiment("planned")
    for name, shell in (("bash", "bash"), ("posh", "powershell")):
        exp.map(program.define(), fl.Node.dummy(name, os="linux", python=["3.11"], ipv4="::1", cpus=2, shell=shell))
    plan = program.plan_it(exp, program.define())
    assert plan.problems == ()
    chosen = {choice.deployment: choice.implementation for choice in plan.choices if choice.step == "resolve"}
    assert chosen == {"bash": "", "posh": "resolve_windows"}
    assert [d.environment.kind for d in plan.deployments] == ["venv", "host"]
    assert plan.deployments[0].environment.requirements.packages == ("dnspython>=2.6",)
    assert program.later().min_nodes == 2


def test_its_pipeline_and_its_choice_of_dags_run_here(program: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("one two\nthree four\n")
    nodes = fl.NodePool([fl.Node.dummy("pi-1", os="macos"), fl.Node.dummy("pi-2", os="linux")])
    value, run = program.run_here(program.define_pipeline(str(tmp_path / "words")), program.define_choice(nodes))
    assert value == "one\nthree\n"
    assert [run.results[f"{name}-second"]["trace"].value for name in ("pi-1", "pi-2")] == ["other", "linux"]
    run.close()


def test_all_of_it_runs_at_a_director(program: ModuleType, client: fl.Client, tmp_path: Path) -> None:
    assert program.attach(client).name == "my-lab"
    pis = program.choose_nodes(client)
    exp = fl.Experiment("dns").map(program.define(interval=0.01), pis, role="client")
    run = program.use(client, exp, tmp_path)
    assert run.state is fl.ExperimentState.SUCCEEDED
    one = run.results["pi-1"]
    assert one["resolve-2"].value == ["EXAMPLE.NET"]
    assert one["summarise"].value == {"loss": 0.25, "answers": 2}
    assert one["upload"].value == len("eth0")
    assert one["notify"].status is fl.StepState.SKIPPED
    assert one["trace"].value == "10.0.0.1"
    assert one["Probe"].value == [{"loss": 0.0, "n": 5}]
    assert one["fetch"].value == [1, 2]
    assert one["wait_for"].value == {"rate": 10}
    factor = 2 * pis["pi-1"]["cpus"]
    assert one["all-of-it"].value == ["seen", one["all-of-it"].value[1], factor, 0, "dns", ["pi-1", "pi-2"]]
    assert one["status"].value == "succeeded"
    assert one["picked"].value == 0.25
    assert (tmp_path / "pi-1" / "capture" / "1" / "trace.pcap").read_text() == "eth0"


def test_its_looks_back_find_what_ran(program: ModuleType, client: fl.Client) -> None:
    if "pi-1" not in client.nodes():
        program.attach(client)
    exp = program.define_choice(program.choose_nodes(client))
    first = client.submit(exp)
    again = program.look_back(client, exp)
    assert again.name == "dns-baseline#2"
    assert again.state is fl.ExperimentState.CANCELLED
    assert first.wait(60) is fl.ExperimentState.SUCCEEDED
