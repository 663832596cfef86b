"""How a run stands, in words: what its deployments are doing, and which nodes it waits for."""

from __future__ import annotations

from collections import Counter

from fieldlab_common.protocol import ExperimentInfo, WaitsFor

from fieldlab.text import counted, one_line

__all__ = ["standing", "waiting"]

MOST_NAMED = 3  # nodes that are waited for; more are counted


def standing(info: ExperimentInfo) -> str:
    """How many deployments are in which state, and what the run waits for."""
    counts = Counter(deployment.state.value for deployment in info.deployments)
    said = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no deployments"
    return f"{said}; it {waits}" if (waits := waiting(info)) else said


def waiting(info: ExperimentInfo) -> str:
    """Which nodes a run that stands in the line waits for, and why; "" if it stands in none."""
    if not info.waits_for:
        return ""
    more = len(info.waits_for) - MOST_NAMED
    named = [_node(one) for one in info.waits_for[:MOST_NAMED]] + ([f"{more} more"] if more > 0 else [])
    return f"waits for {', '.join(named)}"


def _node(one: WaitsFor) -> str:
    holders = [f"your run {one_line(run)!r}" for run in one.runs]
    holders += [f"{counted(one.others, 'run')} of others"] if one.others else []
    why = [f"held by {' and '.join(holders)}"] if holders else []
    why += [f"{counted(one.before, 'run')} before this one in line"] if one.before else []
    return f"{one_line(one.node)} ({', '.join(why)})" if why else one_line(one.node)
