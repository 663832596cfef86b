"""Experiments: a named list of what runs where, and how the run treats its nodes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from fieldlab_common.dag import DAG, Choice
from fieldlab_common.environment import Environment, Resources, check_count, parse_duration
from fieldlab_common.errors import DefinitionError, DuplicateNameError, SelectionError
from fieldlab_common.node import Node
from fieldlab_common.step import check_name

__all__ = ["REPORTING", "Assignment", "Experiment"]

Reporting = Literal["live", "quiet", "silent"]
REPORTING = ("live", "quiet", "silent")
OnPrepareFailure = Literal["stop", "continue"]
ON_PREPARE_FAILURE = ("stop", "continue")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A DAG (or a choice of DAGs) for one node, before it is resolved. ``name`` is the deployment's."""

    name: str
    dag: DAG | Choice
    node: Node
    role: str | None = None
    environment: Environment | None = None
    resources: Resources = field(default_factory=Resources)


class Experiment:
    """A named list of deployments and its settings.

    ``reporting``: ``"live"``, ``"quiet"`` (nothing but a sign of life while a measured step runs) or ``"silent"``
    (nothing until the end). A node that is silent for longer than ``lost_after`` is lost. All nodes begin together, at
    ``start_at`` (a time with a time zone) if they can. If one cannot be prepared or launched, nothing is started
    (``on_prepare_failure="stop"``) or the others go on (``"continue"``); ``min_nodes``: they go on if they are so many.
    """

    def __init__(
        self,
        name: str,
        *,
        reporting: Reporting = "live",
        lost_after: float | str = "6h",
        min_nodes: int | None = None,
        start_at: dt.datetime | None = None,
        on_prepare_failure: OnPrepareFailure = "stop",
    ) -> None:
        if reporting not in REPORTING:
            raise DefinitionError(f"reporting={reporting!r}: it is one of {', '.join(REPORTING)}.")
        if start_at is not None and (not isinstance(start_at, dt.datetime) or start_at.tzinfo is None):
            raise DefinitionError(
                f"start_at={start_at!r:.80} is no time with a time zone.", advice="Use datetime(..., tzinfo=...)."
            )
        check_count("min_nodes", min_nodes)
        if on_prepare_failure not in ON_PREPARE_FAILURE:
            raise DefinitionError(
                f"on_prepare_failure={on_prepare_failure!r}: it is one of {', '.join(ON_PREPARE_FAILURE)}."
            )
        self.name = check_name(name, "an experiment")
        self.reporting: Reporting = reporting
        self.lost_after = parse_duration(lost_after)
        self.min_nodes = min_nodes
        self.start_at = start_at
        self.on_prepare_failure: OnPrepareFailure = on_prepare_failure
        self._assignments: dict[str, Assignment] = {}

    @property
    def needed(self) -> int | None:
        """How many deployments must be prepared and launched for the others to go on; None: all."""
        return 1 if self.min_nodes is None and self.on_prepare_failure == "continue" else self.min_nodes

    @property
    def assignments(self) -> tuple[Assignment, ...]:
        """What was mapped so far, in order."""
        return tuple(self._assignments.values())

    def map(
        self,
        dag: DAG | Choice,
        nodes: Iterable[Node] | Node,
        *,
        role: str | None = None,
        env: Environment | None = None,
        resources: Resources | None = None,
        name: str = "{node}",
    ) -> Experiment:
        """Add a deployment of ``dag`` for each of ``nodes``; returns the experiment.

        ``name`` is the deployment's, with ``{node}``, ``{role}`` and ``{index}`` (from 0) filled in. ``env`` None:
        a ``Venv`` if a task asks for packages, else ``Host``.

        Raises:
            DuplicateNameError: a deployment of that name is there already.
            SelectionError: there is no node.
        """
        if not isinstance(dag, DAG | Choice):
            raise DefinitionError(f"map() takes a DAG or fl.choose(...), not {dag!r:.80}.")
        if env is not None and not isinstance(env, Environment):
            raise DefinitionError(f"env={env!r:.80} is no environment.", advice="Give fl.Host() or fl.Venv().")
        if resources is not None and not isinstance(resources, Resources):
            raise DefinitionError(f"resources={resources!r:.80}: give fl.Resources(cpus=..., memory=...).")
        chosen = [nodes] if isinstance(nodes, Node) else list(nodes)
        if not chosen:
            raise SelectionError(f"map() of {dag!r} got no node.", advice="Look at client.nodes() for what is there.")
        for index, node in enumerate(chosen):
            if not isinstance(node, Node):
                raise DefinitionError(
                    f"{node!r:.80} is no node.", advice="Take nodes from client.nodes(), or fl.Node.dummy()."
                )
            if node.elastic is not None:
                raise DefinitionError(
                    f"{node.name!r} is a template.", advice="Take nodes of it: nodes.where(...).take(n) makes them."
                )
            self._add(
                Assignment(
                    name=check_name(self._deployment_name(name, node, role, index), "a deployment"),
                    dag=dag,
                    node=node,
                    role=role,
                    environment=env,
                    resources=resources or Resources(),
                )
            )
        return self

    def _deployment_name(self, template: str, node: Node, role: str | None, index: int) -> str:
        try:
            return template.format(node=node.name, role=role or "", index=index)
        except (KeyError, IndexError, ValueError) as error:
            raise DefinitionError(f"name={template!r}: only {{node}}, {{role}} and {{index}} are filled in.") from error

    def _add(self, assignment: Assignment) -> None:
        if assignment.name in self._assignments:
            raise DuplicateNameError(
                f"Experiment {self.name!r} has a deployment {assignment.name!r} already.",
                advice='Give map() another name, such as name="{node}-second".',
            )
        self._assignments[assignment.name] = assignment

    def __len__(self) -> int:
        return len(self._assignments)

    def __repr__(self) -> str:
        return f"<Experiment {self.name}: {len(self)} deployments>"
