"""The plan: what would run where, with which implementation and environment, and why. Making one sends nothing.

It is what a submit would do, up to the point where something is sent: the same resolving and the same sealing, so that
what the plan finds nothing against is what is submitted.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fieldlab_common.choosing import Choices
from fieldlab_common.dag import DAG
from fieldlab_common.deployment import Deployment
from fieldlab_common.errors import DefinitionError
from fieldlab_common.experiment import Experiment
from fieldlab_common.node import Node
from fieldlab_common.resolve import Problem, Resolution, StepChoice

from fieldlab.ship import Blobs, Shipment, pack
from fieldlab.text import clean, counted, duration, html_table, listed, one_line, size, table

__all__ = ["Plan", "plan"]


def plan(experiment: Experiment | DAG, *, node: Node | None = None) -> Plan:
    """Tell what ``experiment`` would do. A DAG is planned for one ``node``: by default, this machine.

    Raises nothing for what is wrong with it: see ``Plan.problems``.
    """
    if isinstance(experiment, DAG):
        from fieldlab.here import this_node

        experiment = Experiment(experiment.name).map(experiment, node or this_node())
    try:
        return Plan(pack(experiment))
    except DefinitionError as error:  # a DAG that is wrong on every node, such as a circle
        return Plan(Shipment(name=experiment.name, resolution=_nothing(error), blobs=Blobs(), graphs={}))


def _nothing(error: DefinitionError) -> Resolution:
    problem = Problem(code=error.code, message=str(error))
    return Resolution(deployments=(), choices=Choices(), problems=(problem,), environments={})


class Plan:
    """What would run where, and why. Printed, it is a table with the problems first; in a notebook, HTML."""

    def __init__(self, shipment: Shipment) -> None:
        self._shipment = shipment
        self._resolution = shipment.resolution
        self._sizes: dict[str, int] = {}  # by the digest of the graph

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._shipment.name

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Why it cannot run as it is, the nearest miss first; empty: it can be submitted."""
        return self._resolution.problems

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """The deployments that could be resolved."""
        return self._resolution.deployments

    @property
    def choices(self) -> Sequence[StepChoice]:
        """For each step of each deployment, the implementation that was chosen, and why."""
        return self._resolution.choices

    def __bool__(self) -> bool:
        """Whether it can run as it is."""
        return not self.problems

    def why(self, deployment: str) -> str:
        """Why a deployment's environment is what it is."""
        return self._resolution.environments.get(deployment, "")

    def code_size(self, deployment: Deployment) -> int:
        """Bytes of code, arguments, files and sources that a deployment takes to its node."""
        digest = self._shipment.graphs[deployment.name]
        if digest not in self._sizes:
            self._sizes[digest] = sum(map(self._shipment.blobs.size, deployment.graph.blobs()))
        return self._sizes[digest]

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "experiment": self.name,
            "problems": [
                {"code": p.code, "message": p.message, "deployment": p.deployment, "step": p.step}
                for p in self.problems
            ],
            "deployments": [self._deployment(d) for d in self.deployments],
        }

    def _deployment(self, deployment: Deployment) -> dict[str, Any]:
        return {
            "name": deployment.name,
            "node": deployment.node.name,
            "role": deployment.role,
            "dag": deployment.graph.name,
            "environment": {
                "kind": deployment.environment.kind,
                "packages": list(deployment.environment.requirements.packages),
                "why": self.why(deployment.name),
            },
            "python": deployment.python or None,
            "code_bytes": self.code_size(deployment),
            "resources": _resources(deployment),
            "steps": [_choice(choice) for choice in self._resolution.choices.of(deployment.name)],
        }

    def _problem_lines(self) -> list[str]:
        return [clean(problem) for problem in self.problems]

    def _head(self) -> str:
        nodes = len({d.node.name for d in self.deployments})
        graphs = {id(d.graph): d.graph for d in self.deployments}
        blobs = {b: self._shipment.blobs.size(b) for graph in graphs.values() for b in graph.blobs()}
        where = f"{counted(len(self.deployments), 'deployment')} on {counted(nodes, 'node')}"
        what = f"{counted(len(blobs), 'blob')} of {size(sum(blobs.values()))}"
        return f"Plan of {one_line(self.name)}: {where}, {what}"

    def _deployment_table(self) -> tuple[tuple[str, ...], list[list[object]]]:
        """The header and the rows; a column for limits where any were asked for."""
        rows: list[list[object]] = [
            [d.name, d.node.name, d.role, d.graph.name, _environment(d), self.why(d.name), size(self.code_size(d))]
            for d in self.deployments
        ]
        limits = [_limits(d) for d in self.deployments]
        if not any(limits):
            return _DEPLOYMENTS, rows
        return (*_DEPLOYMENTS, "limits"), [[*row, limit] for row, limit in zip(rows, limits, strict=True)]

    def _choice_rows(self) -> list[list[object]]:
        """One row for all deployments that chose alike."""
        choices = self._resolution.choices
        alike: dict[tuple[object, ...], list[list[int]]] = {}
        for decision, places in choices.alike():
            for c in decision.choices(""):
                misses = "; ".join(f"{r.implementation or 'base'}: {r.because}" for r in c.rejected)
                key = (c.step, c.task, c.implementation or "base", c.because, misses)
                alike.setdefault(key, []).append(places)

        @functools.cache
        def names(places: tuple[int, ...]) -> str:
            return listed([choices.names[place] for place in sorted(places)], 4)

        return [[*key[:3], names(tuple(itertools.chain(*groups))), *key[3:]] for key, groups in alike.items()]

    def __repr__(self) -> str:
        parts = []
        if self.problems:
            parts.append(
                f"{counted(len(self.problems), 'problem')}:\n" + "\n".join(f"  ! {p}" for p in self._problem_lines())
            )
        parts.append(self._head())
        if self.deployments:
            parts.append(table(*self._deployment_table()))
        if self.choices:
            parts.append(table(_CHOICES, self._choice_rows()))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        found = ""
        if self.problems:
            rows = [[p.deployment, p.step, p.code, p.message] for p in self.problems]
            found = html_table(("deployment", "step", "problem", "what"), rows, caption="Problems")
        found += html_table(*self._deployment_table(), caption=self._head())
        return found + html_table(_CHOICES, self._choice_rows(), caption="Steps")


_DEPLOYMENTS = ("deployment", "node", "role", "dag", "environment", "why", "code")
_CHOICES = ("step", "task", "implementation", "for", "because", "rejected")


def _environment(deployment: Deployment) -> str:
    packages = deployment.environment.requirements.packages
    return deployment.environment.kind + (f" ({listed(packages, 4)})" if packages else "")


_HELD = {
    "group": "for all steps together (a control group)",
    "process": "for each process",
    "nothing": "not held: the node has no way for it",
    "unknown": "as the node can hold it",
}


def _held(deployment: Deployment) -> str:
    """How a limit of memory would be held, by what the node says of itself."""
    said = deployment.node.properties.get("memory_limit")
    if said in _HELD:
        return str(said)
    return "nothing" if deployment.node.os not in ("", "linux") else "unknown"


def _limits(deployment: Deployment) -> str:
    asked = deployment.resources
    memory, walltime = asked.memory_bytes, asked.walltime_seconds
    said = [f"{size(memory)} {_HELD[_held(deployment)]}"] if memory is not None else []
    said += [f"{asked.cpus:g} CPUs"] if asked.cpus is not None else []
    said += [f"ends after {duration(walltime)}"] if walltime is not None else []
    return ", ".join(said)


def _resources(deployment: Deployment) -> dict[str, Any]:
    asked = deployment.resources
    held = None if asked.memory is None else _held(deployment)
    return {
        "cpus": asked.cpus,
        "memory": asked.memory_bytes,
        "memory_limit": held,
        "walltime": asked.walltime_seconds,
    }


def _choice(choice: StepChoice) -> Mapping[str, Any]:
    return {
        "step": choice.step,
        "task": choice.task,
        "implementation": choice.implementation or "base",
        "because": choice.because,
        "rejected": [{"implementation": r.implementation or "base", "because": r.because} for r in choice.rejected],
    }
