"""What a simulation shows: how each deployment and step ended, the timeline, and what was found wrong.

Plain values and their tables; nothing here decides. Times are virtual: seconds from the start of the experiment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState

from fieldlab.text import counted, duration, html_table, listed, one_line, table
from fieldlab.timeline import Timeline

__all__ = ["Finding", "SimulatedDeployment", "SimulatedStep", "Simulation"]

SHOWN = 40  # rows of a table; the rest is counted


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedStep:
    """How a step ended; ``status`` is ``waiting`` or ``running`` if it never did. ``attempts``: 0 if it never ran."""

    name: str
    status: StepState
    reason: Reason | None = None
    message: str = ""
    attempts: int = 0
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedDeployment:
    """How a deployment ended, as the director saw it; its state is not terminal if it never did."""

    name: str
    node: str
    dag: str
    role: str | None
    state: DeploymentState
    reason: Reason | None
    message: str
    ended: float | None
    steps: Mapping[str, SimulatedStep]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Something that is probably not meant.

    ``kind``: ``not_started`` (too few deployments could be prepared), ``barrier`` (it never opened: ``missing`` did not
    come), ``gate`` (nobody sent its event), ``never_ran`` (a step that ran in no deployment), ``unfinished``
    (deployments that never end). ``name`` is the barrier's, the event's or the step's.
    """

    kind: str
    name: str
    message: str
    deployments: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.message


class Simulation:
    """What an experiment would do. Printed, it is a table with the findings first; in a notebook, HTML."""

    def __init__(
        self,
        name: str,
        seed: int,
        state: ExperimentState,
        deployments: Mapping[str, SimulatedDeployment],
        timeline: Timeline,
        findings: tuple[Finding, ...],
    ) -> None:
        self.name, self.seed = name, seed
        self.state = state  # how the experiment ended; not terminal if it never would
        self.deployments = deployments
        self.timeline = timeline
        self.findings = findings

    @property
    def results(self) -> Mapping[str, Mapping[str, SimulatedStep]]:
        """By deployment, then step: ``simulation.results["pi-2"]["probe"].status``."""
        return {name: one.steps for name, one in self.deployments.items()}

    @property
    def ended(self) -> float:
        """When the last thing changed, in virtual seconds."""
        return self.timeline[-1].at if self.timeline else 0.0

    def _head(self) -> str:
        where = counted(len(self.deployments), "deployment")
        what = f"{self.state.value} after {duration(self.ended)}, {counted(len(self.timeline), 'change')} of state"
        return f"Simulation of {one_line(self.name)} (seed {self.seed}): {where}, {what}"

    def _rows(self) -> list[list[object]]:
        """One row for all deployments that ended alike."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for one in self.deployments.values():
            count: dict[str, int] = {}
            for step in one.steps.values():
                count[step.status.value] = count.get(step.status.value, 0) + 1
            steps = ", ".join(f"{number} {status}" for status, number in count.items())
            alike.setdefault((one.state, one.reason, steps, one.message), []).append(one.name)
        rows: list[list[object]] = [[listed(names, 4), *key] for key, names in alike.items()]
        more = len(rows) - SHOWN
        if more > 0:
            rows[SHOWN:] = [[f"… {more} more", "", "", "", ""]]
        return rows

    def __repr__(self) -> str:
        found = "\n".join(f"  ! {one_line(finding, 400)}" for finding in self.findings)
        head = [f"{counted(len(self.findings), 'finding')}:\n{found}"] if found else []
        return "\n\n".join([*head, self._head(), table(_COLUMNS, self._rows())])

    def _repr_html_(self) -> str:
        found = ""
        if self.findings:
            rows = [[f.kind, f.name, f.message, listed(f.deployments)] for f in self.findings]
            found = html_table(("finding", "name", "what", "deployments"), rows, caption="Findings")
        return found + html_table(_COLUMNS, self._rows(), caption=self._head())


_COLUMNS = ("deployments", "state", "reason", "steps", "message")
