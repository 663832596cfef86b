"""Simulations: what they repeat, what befalls them, what they find; and that they agree with a run."""

import datetime as dt
import gc

import fieldlab as fl
import pytest
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState


@fl.task
def probe(*values):
    raise AssertionError("user code ran in a simulation")


@fl.task(retries=1, retry_delay=5)
def shaky(*values):
    raise AssertionError("user code ran in a simulation")


@fl.task(timeout=10)
def slow():
    raise AssertionError("user code ran in a simulation")


def refuse(value):
    raise AssertionError("user code ran in a simulation")


def on(dag, count=3, **settings):
    return fl.Experiment("e", **settings).map(dag, [fl.Node.dummy(f"n-{i}") for i in range(count)])


def together():
    with fl.DAG("together") as dag:
        shaky(probe()) >> fl.barrier("start") >> probe().named("after")
    return dag


def kinds(simulation):
    return [finding.kind for finding in simulation.findings]


def states(simulation):
    return {name: {k: s.status for k, s in steps.items()} for name, steps in simulation.results.items()}


BAD = {"delay": (0.1, 3.0), "drop": 0.3, "double": 0.3, "retry": 2.0}


def test_the_same_seed_gives_the_same_simulation_and_another_seed_another():
    def play(seed):
        settings = {"outcomes": {"*": 0.7}, "network": BAD, "skew": 5.0, "lost": 1}
        return fl.simulate(on(together(), 8), seed=seed, **settings)

    one = play(4)
    assert one.timeline == play(4).timeline
    assert one.findings == play(4).findings
    assert one.timeline != play(5).timeline


def test_virtual_time_is_that_of_durations_and_delays():
    with fl.DAG("d") as dag:
        probe() >> shaky()
    result = fl.simulate(
        dag, durations={"probe": 60, "shaky": "2m"}, outcomes={"shaky": [False, True]}, network={"delay": 1}
    )
    steps = result.results["localhost"]
    assert (steps["probe"].started, steps["probe"].ended) == (1, 61)
    assert (steps["shaky"].started, steps["shaky"].ended, steps["shaky"].attempts) == (61, 306, 2)
    assert (result.state, result.ended) == (ExperimentState.SUCCEEDED, 307)


def test_a_lost_node_breaks_a_barrier_for_the_others_once_it_counts_as_lost():
    result = fl.simulate(on(together(), lost_after="1h"), lost={"n-1": 0.5}, durations={"*": 10})
    assert result.deployments["n-1"].state is DeploymentState.LOST
    assert result.deployments["n-1"].ended == 3600.5
    broken = result.results["n-0"]["barrier"]
    assert broken.reason is Reason.BARRIER_BROKEN
    assert "n-1 (lost)" in broken.message
    assert 3600.5 < broken.ended < 3602
    assert result.results["n-1"]["probe"].status is StepState.RUNNING
    assert result.findings[0].missing == ("n-1 (lost)",)


def test_how_many_nodes_are_lost_can_be_drawn():
    result = fl.simulate(on(together(), 6), durations={"*": "2h"}, lost=2)
    assert [one.state for one in result.deployments.values()].count(DeploymentState.LOST) == 2


def told(simulation, deployment):
    return [row.state for row in simulation.timeline if (row.deployment, row.step) == (deployment, None)]


D, E = DeploymentState, ExperimentState


def test_a_node_that_cannot_be_reached_goes_on_and_is_heard_of_again():
    with fl.DAG("d") as dag:
        probe().named("first") >> probe().named("second")
    play = {"durations": {"*": 600}, "network": {"delay": 1}}
    result = fl.simulate(on(dag, 2), unreachable={"n-1": ("5m", "15m")}, **play)
    assert told(result, "n-1")[-3:] == [D.UNREACHABLE, D.RUNNING, D.SUCCEEDED]
    assert [row.at for row in result.timeline.of("n-1") if row.state is D.UNREACHABLE] == [345]
    assert [row.at for row in result.timeline.of("n-1") if row.state is D.RUNNING and row.step is None] == [1, 900]
    assert told(result, "n-0") == [D.PREPARING, D.READY, D.LAUNCHING, D.RUNNING, D.SUCCEEDED]
    alone = fl.simulate(on(dag, 2), **play)
    assert states(alone) == states(result)
    assert [alone.results[n]["second"].ended for n in ("n-0", "n-1")] == [1202, 1202]
    assert result.results["n-1"]["second"].ended == 1202  # its steps never stopped


def test_what_it_says_meanwhile_comes_when_it_can_be_reached_again():
    with fl.DAG("d") as dag:
        probe() >> fl.barrier("meet")
    spans = [(5, 200), ("10m", "11m"), (150, 300)]  # two of them overlap
    result = fl.simulate(on(dag, 2), durations={"*": 100}, unreachable={"n-1": spans})
    assert 300 < result.results["n-0"]["barrier"].ended < 301
    assert result.state is E.SUCCEEDED


def test_a_node_that_is_away_for_too_long_is_lost_and_what_it_says_late_changes_nothing():
    result = fl.simulate(on(together(), lost_after="1h"), durations={"*": 10}, unreachable={"n-1": (5, "2h")})
    assert told(result, "n-1")[-3:] == [D.RUNNING, D.UNREACHABLE, D.LOST]
    assert result.results["n-0"]["barrier"].reason is Reason.BARRIER_BROKEN
    assert result.results["n-1"]["probe"].status is StepState.SUCCEEDED
    assert result.state is E.FAILED


def test_how_many_cannot_be_reached_can_be_drawn():
    result = fl.simulate(on(together(), 6), durations={"*": "3h"}, unreachable=2)
    assert sum(D.UNREACHABLE in told(result, name) for name in result.deployments) == 2
    assert result.state is E.SUCCEEDED


def test_nobody_begins_where_one_that_is_needed_was_never_launched():
    result = fl.simulate(on(together(), 2), lost={"n-1": 0}, durations={"*": 1})
    assert result.state is E.FAILED
    assert result.deployments["n-0"].state is D.CANCELLED
    assert result.results["n-0"]["barrier"].status is StepState.WAITING


def test_all_begin_at_one_time_however_long_each_launch_took():
    with fl.DAG("d") as dag:
        probe()
    result = fl.simulate(on(dag, 5), network={"delay": (0, 20)}, seed=3)
    claimed = {row.at for row in result.timeline if row.state is D.RUNNING and row.step is None}
    first = [result.results[name]["probe"].started for name in result.results]
    assert min(first) >= max(claimed)


def test_a_launch_that_never_arrives_has_failed():
    result = fl.simulate(on(together(), 2, min_nodes=1), lost={"n-1": 0}, durations={"*": 1})
    assert (result.deployments["n-1"].reason, result.deployments["n-1"].ended) == (Reason.LAUNCH_FAILED, 180)
    assert result.results["n-0"]["barrier"].reason is Reason.BARRIER_BROKEN


@pytest.mark.parametrize(
    ("min_nodes", "state", "kind"), [(None, E.FAILED, "not_started"), (3, E.FAILED, "not_started"), (2, E.FAILED, None)]
)
def test_it_starts_when_enough_could_be_prepared(min_nodes, state, kind):
    with fl.DAG("d") as dag:
        probe()
    play = {"preparing": {"*": 30, "n-2": "failed"}, "durations": {"*": 5}}
    result = fl.simulate(on(dag, min_nodes=min_nodes), **play)
    assert (result.state, kinds(result)) == (state, [kind] if kind else [])
    assert result.deployments["n-2"].reason is Reason.PREPARE_FAILED
    expected = D.CANCELLED if kind else D.SUCCEEDED
    assert result.deployments["n-0"].state is expected
    if kind:
        assert "min_nodes" in result.findings[0].message
        assert result.findings[0].deployments == ("n-2",)
        assert result.results["n-0"]["probe"].status is StepState.WAITING


def test_all_wait_for_the_slowest_preparation_and_for_start_at():
    with fl.DAG("d") as dag:
        probe()
    at = dt.datetime(2026, 12, 1, 8, tzinfo=dt.UTC)
    late = dt.timedelta(hours=1)
    play = {"preparing": {"n-0": (1, 2), "n-1": "10m"}, "network": {"delay": 1}}
    for start_at, begins in ((None, 602), (at + late, 3600), (at - late, 602)):
        result = fl.simulate(on(dag, 2, start_at=start_at), submitted=at, **play)
        assert {one["probe"].started for one in result.results.values()} == {begins}
        assert [row.state for row in result.timeline if row.deployment is None] == [
            E.PREPARING,
            E.READY,
            E.RUNNING,
            E.SUCCEEDED,
        ]
    assert fl.simulate(on(dag, 2, start_at=at), **play).results["n-0"]["probe"].started == 602


def test_a_timeline_shows_its_first_and_last_changes():
    with fl.DAG("d") as dag:
        fl.repeat(probe(), times=50)
    timeline = fl.simulate(on(dag, 2), durations={"*": 1}, network={"delay": 1}).timeline
    assert {row.deployment for row in timeline.of("n-1", "probe")} == {"n-1"}
    assert len(timeline.of(step="probe")) == 2 * 52
    lines = repr(timeline).splitlines()
    assert len(lines) == 2 + 41
    assert lines[2].split() == ["0.000", "s", "preparing"]
    assert "probe[0]" in repr(timeline)
    assert f"{len(timeline) - 40} more" in repr(timeline)
    assert "probe[49]" in timeline._repr_html_()


def test_garbage_is_collected_again_afterwards():
    fl.simulate(on(together()))
    assert gc.isenabled()
    gc.disable()
    try:
        fl.simulate(on(together()))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_messages_that_come_twice_late_or_again_change_no_outcome():
    good = fl.simulate(on(together(), 6), seed=2)
    doubled = fl.simulate(on(together(), 6), seed=2, network={"double": 1.0})
    bad = fl.simulate(on(together(), 6), seed=2, network=BAD)
    assert states(good) == states(doubled) == states(bad)
    assert good.state is doubled.state is bad.state is ExperimentState.SUCCEEDED
    rows = [(row.deployment, row.step, row.state) for row in doubled.timeline]
    assert len(rows) == len(set(rows)) == len(good.timeline)


def test_skewed_clocks_show_and_change_no_outcome():
    good, skewed = fl.simulate(on(together())), fl.simulate(on(together()), skew={"n-1": 1000.0})
    assert states(good) == states(skewed)
    assert {round(row.clock - row.at) for row in skewed.timeline if row.deployment == "n-1"} == {1000}
    assert {round(row.clock - row.at) for row in skewed.timeline if row.deployment == "n-0"} == {0}


@pytest.mark.parametrize(("parties", "missing"), [("all", ("n-2 (failed)",)), (5, ("n-2 (failed)",))])
def test_a_barrier_that_never_fills_is_found_with_who_is_missing(parties, missing):
    with fl.DAG("d") as dag:
        probe() >> fl.barrier("start", parties=parties, timeout="1h")
    result = fl.simulate(on(dag), outcomes={("n-2", "probe"): "failed"})
    (finding,) = [one for one in result.findings if one.kind == "barrier"]
    assert (finding.name, finding.deployments, finding.missing) == ("start", ("n-0", "n-1"), missing)
    assert result.state is ExperimentState.FAILED
    # A number of parties says nothing of who they are: those who are there may still send more, and wait until the end.
    reason = {5: Reason.RAISED}.get(parties, Reason.BARRIER_BROKEN)
    assert result.results["n-0"]["barrier"].reason is reason


def test_a_gate_that_nobody_opens_is_found_and_its_deployments_never_end():
    with fl.DAG("d") as dag:
        fl.wait_for("go") >> probe()
    result = fl.simulate(on(dag, 2))
    assert kinds(result) == ["gate", "never_ran", "unfinished"]
    assert result.findings[0].deployments == ("n-0", "n-1")
    assert result.state is ExperimentState.RUNNING
    assert "go" in repr(result)
    assert "<table>" in result._repr_html_()


def test_a_gate_opens_by_a_person_or_by_another_node_and_fails_by_its_timeout():
    with fl.DAG("d") as dag:
        fl.wait_for("go") >> probe()
        fl.wait_for("never", timeout=100).named("late")
    with fl.DAG("s", stop_on_failure=False) as sender:
        probe() >> fl.send("go")
    person = fl.simulate(dag, events={"go": "1m"})
    assert 60 < person.results["localhost"]["wait_for"].ended < 61
    experiment = on(dag, 1).map(sender, fl.Node.dummy("s"))
    other = fl.simulate(experiment, durations={"probe": 7})
    assert 7 < other.results["n-0"]["wait_for"].ended < 8
    late = other.results["n-0"]["late"]
    assert (late.status, late.reason, late.ended - late.started) == (StepState.FAILED, Reason.RAISED, 100)


@pytest.mark.parametrize(
    ("facts", "resources", "at_once"),
    [({"cpus": 3}, None, 3), ({}, fl.Resources(cpus=1.5), 2), ({"cpus": 8}, fl.Resources(cpus=1), 1), ({}, None, 1)],
)
def test_no_more_shared_steps_run_at_a_time_than_the_executor_has_workers(facts, resources, at_once):
    with fl.DAG("d", isolation="shared") as dag:
        for number in range(6):
            probe().named(f"p-{number}")
    experiment = fl.Experiment("e").map(dag, fl.Node.dummy("n", **facts), resources=resources)
    result = fl.simulate(experiment, durations={"*": 10.0})
    times = sorted(step.started for step in result.results["n"].values())
    assert [round((at - times[0]) / 10) for at in times] == [number // at_once for number in range(6)]


def test_shared_steps_that_wait_lend_their_worker():
    with fl.DAG("d", isolation="shared") as dag:
        gate = fl.wait_for("go")
        probe().after(gate)
        fl.send("go").after(probe().named("first"))
    result = fl.simulate(fl.Experiment("e").map(dag, fl.Node.dummy("n", cpus=1)))
    assert result.state is ExperimentState.SUCCEEDED


def looped(*steps, times=3):
    """A DAG that repeats another, in which what ``steps`` make stands one behind the other."""
    with fl.DAG("round") as inner:
        previous = None
        for make in steps:
            step = make()
            previous = step if previous is None else step.after(previous)
    with fl.DAG("d") as dag:
        fl.repeat(inner(), every=1, times=times)
    return dag


def test_each_round_of_a_repeated_dag_has_a_barrier_of_its_own():
    slow = {("n-0", "round/probe"): 1.0, ("n-1", "round/probe"): 10.0}
    result = fl.simulate(
        on(looped(probe, lambda: fl.barrier("start"), lambda: probe().named("after")), 2), durations=slow
    )
    assert result.state is ExperimentState.SUCCEEDED
    for number in (0, 1, 2):  # the fast one waits for the slow one in every round
        came = [row.at for row in result.timeline.of("n-1", f"round[{number}]/barrier") if row.state == "running"]
        went = [row.at for row in result.timeline.of("n-0", f"round[{number}]/after") if row.state == "running"]
        assert went >= came


def test_a_barrier_of_a_later_round_that_one_party_does_not_come_to_is_found():
    experiment = fl.Experiment("e").map(looped(lambda: fl.barrier("start")), fl.Node.dummy("long"))
    experiment.map(looped(lambda: fl.barrier("start"), times=2), fl.Node.dummy("short"))
    result = fl.simulate(experiment)
    (finding,) = [one for one in result.findings if one.kind == "barrier"]
    assert finding.missing == ("short (succeeded)",)
    assert "'start' in round 2 never fills" in finding.message
    assert result.results["long"]["round/barrier"].reason is Reason.BARRIER_BROKEN


def test_a_stand_in_for_a_step_inside_of_a_dag_is_told_its_path():
    with pytest.raises(fl.UnknownNameError, match="Did you mean 'round/first'"):
        fl.simulate(looped(lambda: probe().named("first")), durations={"first": 1})


def test_a_barrier_that_fills_in_no_round_is_one_finding():
    inner = looped(lambda: fl.barrier("start", timeout="1m"), times=5)
    with fl.DAG("d") as dag:
        fl.repeat(inner(), times=4, on_failure="continue")
    result = fl.simulate(
        fl.Experiment("e").map(dag, fl.Node.dummy("a")).map(together(), fl.Node.dummy("b")), lost={"b": 1}
    )
    (finding,) = [one for one in result.findings if one.kind == "barrier"]
    assert finding.message.endswith("Nor does it in 3 other rounds.")


def test_each_round_of_a_repeated_dag_waits_at_its_gate_for_an_event_of_its_own():
    gated = fl.Node.dummy("gated")
    enough = fl.Experiment("e").map(looped(lambda: fl.wait_for("go")), gated)
    enough.map(looped(probe, lambda: fl.send("go")), fl.Node.dummy("s"))
    result = fl.simulate(enough, durations={"*": 20.0})
    assert result.state is ExperimentState.SUCCEEDED
    opened = [
        row.at
        for row in result.timeline.of("gated")
        if row.state == "succeeded" and str(row.step).endswith("]/wait_for")
    ]
    assert [round(at / 20.0) for at in opened] == [1, 2, 3]
    few = fl.Experiment("e").map(looped(lambda: fl.wait_for("go")), gated)
    few.map(looped(probe, lambda: fl.send("go"), times=2), fl.Node.dummy("s"))
    (finding,) = [one for one in fl.simulate(few).findings if one.kind == "gate"]
    assert "event number 3 of that name" in finding.message


def test_conditions_and_lengths_take_stand_ins():
    with fl.DAG("d") as dag:
        first = probe()
        probe().named("no").when(first, refuse)
        fl.map(shaky, first).named("many")
        fl.repeat(probe(), until=refuse).named("again")
    result = fl.simulate(dag, answers={"no.when": False, "many.length": 4, "again.until": True})
    steps = result.results["localhost"]
    assert [steps[name].attempts for name in ("no", "many", "again")] == [0, 4, 1]
    assert steps["no"].reason is Reason.CONDITION
    assert kinds(result) == ["never_ran"]


def test_a_duration_above_the_timeout_is_a_timeout_and_background_steps_are_stopped():
    with fl.DAG("d", stop_on_failure=False) as dag:
        capture = fl.background(probe().named("capture"))
        slow().during(capture)
    steps = fl.simulate(dag, durations={"slow": 60}).results["localhost"]
    assert (steps["slow"].reason, steps["capture"].reason) == (Reason.TIMEOUT, Reason.STOPPED)
    assert steps["slow"].ended - steps["slow"].started == pytest.approx(10.1)


def test_what_never_ends_is_cut_at_the_horizon():
    with fl.DAG("d") as dag:
        fl.repeat(probe(), every=60, until=refuse)
    result = fl.simulate(dag, horizon="1h", durations={"probe": 1}, answers={"probe.until": False})
    assert result.results["localhost"]["probe"].attempts == 60
    assert kinds(result) == ["unfinished"]


def test_a_day_on_two_hundred_nodes_ends():
    with fl.DAG("day") as dag:
        fl.repeat(probe(), every="7m", duration="24h", on_failure="continue").after(fl.barrier("start"))
    result = fl.simulate(on(dag, 200), outcomes={"probe": 0.9}, durations={"probe": (1, 30)})
    assert result.state is ExperimentState.SUCCEEDED
    assert result.ended > 205 * 420
    assert {steps["probe"].attempts for steps in result.results.values()} == {206}
    assert not result.findings


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"durations": {"prob": 1}}, fl.UnknownNameError),
        ({"outcomes": {"probe": "perhaps"}}, fl.DefinitionError),
        ({"outcomes": {"probe": 1.5}}, fl.DefinitionError),
        ({"outcomes": {"barrier": False}}, fl.UnknownNameError),
        ({"answers": {"probe": True}}, fl.DefinitionError),
        ({"events": {"fieldlab.barrier": 1}}, fl.DefinitionError),
        ({"network": {"drop": 1.0}}, fl.DefinitionError),
        ({"network": {"dorp": 0.1}}, fl.DefinitionError),
        ({"lost": {"n-7": 1}}, fl.UnknownNameError),
        ({"skew": {"n-7": 1}}, fl.UnknownNameError),
        ({"unreachable": {"n-7": (1, 2)}}, fl.UnknownNameError),
        ({"unreachable": {"n-0": (2, 1)}}, fl.DefinitionError),
        ({"unreachable": {"n-0": [(1, 2), 3]}}, fl.DefinitionError),
        ({"unreachable": {"n-0": 5}}, fl.DefinitionError),
        ({"unreachable": 4}, fl.DefinitionError),
        ({"preparing": {"n-7": 1}}, fl.UnknownNameError),
        ({"preparing": {"n-0": "never"}}, fl.DefinitionError),
        ({"submitted": dt.datetime(2026, 1, 1, tzinfo=dt.UTC).replace(tzinfo=None)}, fl.DefinitionError),
    ],
)
def test_stand_ins_that_make_no_sense_are_refused(wrong, error):
    with pytest.raises(error):
        fl.simulate(on(together()), **wrong)


@fl.task
def works(*values):
    return 1


@fl.task
def fails(*values):
    raise ValueError("no")


def test_a_simulation_ends_as_a_run_with_equal_outcomes_does():
    with fl.DAG("d", stop_on_failure=False) as dag:
        first, bad = works(), fails()
        works(bad).named("skipped")
        works(first).named("handler").after(bad, on="failure")
        works().named("any").after(first, bad, need="any")
        fl.map(works, first).named("unmapped").after(bad)
        fl.send("go").after(first) >> fl.wait_for("go")
    played = fl.simulate(dag, outcomes={"fails": "failed"})
    ran = fl.run(dag)
    assert {k: (s.status, s.reason) for k, s in played.results["localhost"].items()} == {
        name: (ran[name].status, ran[name].reason) for name in played.results["localhost"]
    }
    assert played.deployments["localhost"].state is ran.state
