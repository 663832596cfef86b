"""Random graphs of netunicorn, on its executor and, converted, on our machine: the same tasks run, as often, alike.

Both are the real deciders. Netunicorn's executor starts its processes in place, so that nothing depends on a clock;
our machine is told how attempts end by a loop that runs what `join-...` steps decide. Graphs with cycles are of levels
(each edge from one level to the next): elsewhere what netunicorn does with a cycle depends on which task is quicker.
And what follows a synchronisation point follows nothing else: in the order of a set, netunicorn may start it twice.
"""

import asyncio
import logging
from collections import deque

import fieldlab as fl
import pytest
from fieldlab.contrib import netunicorn as nu
from fieldlab.contrib.netunicorn.node import joined
from fieldlab.contrib.netunicorn.tasks import their_task
from fieldlab.ship import pack
from fieldlab_common.lifecycle import StepState
from fieldlab_executor import machine as m
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from netunicorn.base import ExecutionGraph, Failure, Task, is_successful
from netunicorn.executor import executor as theirs
from netunicorn.executor import get_local_executor


class Planned(Task):
    """Ends as planned, each time it runs; the last of the plan stays."""

    def __init__(self, name, plan):
        super().__init__(name)
        self.plan = plan

    def outcome(self, time):
        return self.plan[min(time, len(self.plan) - 1)]

    def run(self):
        return self.name if self.outcome(len(self.previous_steps[self.name])) else Failure(self.name)


# --- netunicorn's executor, without a clock ---------------------------------------------------------------------------


class InPlace:
    """A process that has run when it is started."""

    exitcode = 0

    def __init__(self, target, args):
        self._work = target, args

    def start(self):
        target, args = self._work
        target(*args)

    def is_alive(self):
        return False

    def join(self):
        pass


class Box(deque):
    put, get = deque.append, deque.popleft

    def empty(self):
        return not self


@pytest.fixture(autouse=True)
def in_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it writes its log where it runs
    monkeypatch.setattr(theirs, "Process", InPlace)
    monkeypatch.setattr(theirs, "Queue", Box)
    logging.getLogger("executor_local").propagate = False


def on_theirs(graph):
    executor = get_local_executor(graph)
    for handler in executor.logger.handlers[:]:
        executor.logger.removeHandler(handler)
        handler.close()
    asyncio.run(executor.execute())
    result = executor.execution_graph_results
    found = result.unwrap() if is_successful(result) else result.failure()
    return is_successful(result), {name: [is_successful(one) for one in ones] for name, ones in found.items()}


# --- our machine ------------------------------------------------------------------------------------------------------


class Play:
    """Runs a converted graph on the machine, first come first served."""

    def __init__(self, dag):
        self.dag = dag
        (deployment,) = pack(fl.Experiment("x").map(dag, fl.Node.dummy("one"))).resolution.deployments
        self.machine = m.Machine(deployment.graph, now=0.0)
        self.ran = {}
        self.starts = deque()
        self.finish = None

    def run(self):
        self.take(self.machine.start(0.0))
        while self.finish is None:
            key = self.starts.popleft()
            self.take(self.machine.handle(m.AttemptEnded(key=key, outcome=self.outcome(key.step)), 0.0))
        return self.ran

    def take(self, effects):
        for effect in effects:
            if isinstance(effect, m.StartAttempt):
                self.starts.append(effect.key)
            elif isinstance(effect, m.Finish):
                self.finish = effect
            elif isinstance(effect, m.Report) and effect.record.settled:
                self.note(effect.record)
            elif isinstance(effect, m.Evaluate):
                self.take(self.machine.handle(m.Evaluated(id=effect.id, value=effect.handle), 0.0))

    def note(self, record):
        task = their_task(self.dag[record.step].task)
        if task is not None and record.state in (StepState.SUCCEEDED, StepState.FAILED):
            self.ran.setdefault(task.name, []).append(record.state is StepState.SUCCEEDED)

    def outcome(self, name):
        step = self.dag[name]
        task, value = their_task(step.task), True
        if task is not None:
            value = task.outcome(len(self.ran.get(task.name, ())))
        elif name.startswith("join-"):
            met, sources = step.args
            states = self.machine.states
            value = joined(met, [([states[pick.step.name].value for pick in runs], *rest) for runs, *rest in sources])
            return m.Outcome(state=StepState.SUCCEEDED, handle=value)
        return m.Outcome(state=StepState.SUCCEEDED if value else StepState.FAILED, handle=True)


# --- graphs -----------------------------------------------------------------------------------------------------------


def plans(draw, fail):
    return draw(st.lists(st.booleans() if fail else st.just(True), min_size=1, max_size=4))


def attributes(draw, source, condition):
    if not isinstance(source, Task):
        return {}
    chosen = draw(st.sampled_from(condition))
    return {"traverse_on": chosen} if chosen else {}


CONDITIONS = [None, None, "any", "success", "failure"]


def add_node(draw, index, fail=True):
    if draw(st.integers(0, 4)) == 0:
        return f"point-{index}"
    return Planned(f"t{index}", plans(draw, fail))


@st.composite
def acyclic(draw):
    graph = ExecutionGraph(early_stopping=draw(st.booleans()))
    nodes = ["root"]
    for index in range(draw(st.integers(1, 7))):
        node = add_node(draw, index)
        before = [nodes[i] for i in draw(st.lists(st.integers(0, len(nodes) - 1), min_size=1, max_size=3, unique=True))]
        points = [source for source in before if not isinstance(source, Task)]
        for source in points[:1] or before:
            graph.graph.add_edge(source, node, **attributes(draw, source, CONDITIONS))
        nodes.append(node)
    return graph


@st.composite
def cyclic(draw):
    graph = ExecutionGraph(early_stopping=draw(st.booleans()))
    levels = [["root"]]
    for level in range(draw(st.integers(1, 4))):
        these = [add_node(draw, f"{level}.{place}") for place in range(draw(st.integers(1, 2)))]
        for node in these:
            before = draw(st.lists(st.sampled_from(levels[-1]), min_size=1, unique=True))
            for source in before:
                graph.graph.add_edge(source, node, **attributes(draw, source, CONDITIONS))
        levels.append(these)
    start = draw(st.integers(1, len(levels) - 1))
    end = draw(st.integers(0, start))
    source, target = draw(st.sampled_from(levels[start])), draw(st.sampled_from(levels[end]))
    counter = draw(st.integers(1, 3))
    graph.graph.add_edge(source, target, type="weak", counter=counter, **attributes(draw, source, CONDITIONS))
    return graph


def show(graph):
    return [(getattr(u, "name", u), getattr(v, "name", v), d) for u, v, d in graph.graph.edges(data=True)]


def stopped(graph, ran):
    """Whether a failure that nothing provides for stopped everything."""
    if not graph.early_stopping:
        return False
    rescued = {
        u.name
        for u, _, data in graph.graph.edges(data=True)
        if isinstance(u, Task) and data.get("traverse_on") in ("failure", "any")
    }
    return any(not all(outcomes) and name not in rescued for name, outcomes in ran.items())


def compare(graph):
    play = Play(nu.from_graph(graph, install=False))  # before netunicorn uses the counters up
    shown, edges = show(graph), graph.graph.copy()
    ours = play.run()
    well, expected = on_theirs(graph)
    graph.graph = edges
    assert well == all(map(all, ours.values())), shown
    if stopped(graph, expected):  # what ran beside it may have ended just before
        assert stopped(graph, ours), shown
        common = {name: min(len(ours[name]), len(expected[name])) for name in ours.keys() & expected.keys()}
        assert [ours[n][:k] for n, k in common.items()] == [expected[n][:k] for n, k in common.items()], shown
    else:
        assert ours == expected, shown


def test_a_weak_edge_that_closes_no_cycle_starts_what_it_leads_to_once_more():
    graph = ExecutionGraph()
    first, slow, twice, after = (Planned(name, [True]) for name in ("first", "slow", "twice", "after"))
    graph.graph.add_edges_from([("root", first), (first, slow), (first, twice), (twice, after)])
    graph.graph.add_edge(slow, twice, type="weak")
    compare(graph)
    dag = nu.from_graph(graph, install=False)
    assert list(dag.steps) == ["first", "slow", "twice", "after", "twice#2", "after#2"]
    assert dag["twice"].exclusives == dag["twice#2"].exclusives != ()
    assert dag["slow"].exclusives == ()


FIXTURES_STAY = [HealthCheck.function_scoped_fixture]


@given(graph=acyclic())
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES_STAY)
def test_the_same_tasks_run_in_graphs_without_cycles(graph):
    compare(graph)


@given(graph=cyclic())
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES_STAY)
def test_the_same_tasks_run_as_often_in_graphs_with_a_cycle(graph):
    compare(graph)
