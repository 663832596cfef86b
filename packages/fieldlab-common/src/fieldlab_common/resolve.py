"""From an experiment to its deployments: for every node, which implementation, which environment, and why.

Pure but for ``seal``, which the caller gives: it turns code or arguments into a blob and returns its digest (or
raises UnpicklableError). Everything that is wrong is found in one go and returned as problems, the nearest miss
first; nothing is raised for a node that does not fit.

Nodes that resolve alike share one ``Graph`` object, and so one blob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fieldlab_common.builtin import Barrier, WaitFor
from fieldlab_common.choosing import Choices, Decision, Picked, Rejected, StepChoice, Survey
from fieldlab_common.dag import DAG, DagTask, steps_of
from fieldlab_common.deployment import Condition, Deployment, Graph, Repeat, Retry, StepSpec
from fieldlab_common.environment import Environment, Host, Venv, conflicting_pins
from fieldlab_common.errors import ArgumentError, FieldlabError
from fieldlab_common.expand import Filler, Scope, Use, expand, has_choice, walk
from fieldlab_common.experiment import Assignment, Experiment
from fieldlab_common.node import DUMMY, facts_of
from fieldlab_common.step import Arg, ByNode, File, Pick, Secret, Step, name_of, needs_of
from fieldlab_common.task import Implementation, TaskSettings, arguments_for, sendable, task_of

__all__ = ["Problem", "Rejected", "Resolution", "Sealer", "StepChoice", "resolve"]


class Sealer(Protocol):
    """What makes blobs of code, arguments and files."""

    def seal(self, obj: Any, what: str) -> str:
        """Seal an object and return the digest; the same object gives the same digest."""
        ...

    def seal_arguments(self, obj: Any, what: str) -> str:
        """Seal a step's arguments and return the digest, or the short bytes themselves (``deployment.inline``)."""
        ...

    def seal_file(self, path: str) -> str:
        """Take a file in and return its digest.

        Raises:
            DefinitionError: it cannot be read.
        """
        ...

    def bundles(self) -> tuple[str, ...]:
        """Digests of the source bundles of the modules that what was sealed so far refers to."""
        ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why the experiment cannot run as it is. ``code`` is the stable code of the error that it stands for."""

    code: str
    message: str
    deployment: str | None = None
    step: str | None = None

    def __str__(self) -> str:
        where = ", step ".join(part for part in (self.deployment, self.step) if part)
        return f"{where}: {self.message}" if where else self.message


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What resolving gave. ``environments``: for each deployment, why its environment is what it is."""

    deployments: tuple[Deployment, ...]
    choices: Choices
    problems: tuple[Problem, ...]
    environments: Mapping[str, str]


def resolve(experiment: Experiment, sealer: Sealer, *, python: str) -> Resolution:
    """Choose everything for every node of ``experiment``. ``python`` is the client's version, like ``3.11``."""
    return _Resolver(experiment, sealer, python).run()


class _Resolver:
    def __init__(self, experiment: Experiment, sealer: Sealer, python: str) -> None:
        self._experiment = experiment
        self._sealer = sealer
        self._python = python
        self._deployments: list[Deployment] = []
        self._surveys: dict[tuple[int, ...], Survey] = {}  # by the id of the DAG, and of those chosen inside of it
        self._depends: dict[int, bool] = {}  # by the DAG's id: whether a DAG inside of it is chosen by node
        self._decided: list[tuple[str, Decision]] = []
        self._problems: list[Problem] = []
        self._why: dict[str, str] = {}
        self._graphs: dict[Any, Graph] = {}
        self._specs: dict[Any, dict[str, StepSpec]] = {}  # the steps that are the same for all that pick alike
        self._codes: dict[Any, str] = {}
        self._by_value: dict[int, bool] = {}

    def run(self) -> Resolution:
        if not len(self._experiment):
            self._problems.append(Problem(code="definition", message="The experiment has no deployment: map a DAG."))
        if (self._experiment.min_nodes or 1) > len(self._experiment) > 0:
            message = f"min_nodes={self._experiment.min_nodes}, and there are {len(self._experiment)} deployments."
            self._problems.append(Problem(code="definition", message=message))
        for assignment in self._experiment.assignments:
            self._assign(assignment)
        self._across_nodes()
        self._barriers()
        return Resolution(
            deployments=tuple(self._deployments),
            choices=Choices(self._decided),
            problems=tuple(dict.fromkeys(self._problems)),
            environments=self._why,
        )

    def _problem(self, assignment: Assignment, code: str, message: str, step: str | None = None) -> None:
        self._problems.append(Problem(code=code, message=message, deployment=assignment.name, step=step))

    def _assign(self, assignment: Assignment) -> None:
        dag = self._dag(assignment)
        if dag is None:
            return
        before = len(self._problems)
        try:
            survey = self._survey(dag, assignment)
        except ArgumentError as error:
            self._problem(assignment, error.code, str(error))
            return
        decision = self._implementations(assignment, survey)
        environment = self._environment(assignment, decision.picked)
        self._fits(assignment, environment)
        written = self._python if self._travels(survey, decision.picked) else ""
        self._fits_python(assignment, environment, written)
        self._arguments(assignment, survey)
        if len(self._problems) > before:
            return
        graph = self._graph(assignment, dag, survey, decision.picked)
        if graph is not None:
            self._deployments.append(
                Deployment(
                    name=assignment.name,
                    node=assignment.node,
                    graph=graph,
                    environment=environment,
                    resources=assignment.resources,
                    role=assignment.role,
                    python=written,
                )
            )

    def _dag(self, assignment: Assignment) -> DAG | None:
        choice = assignment.dag
        if isinstance(choice, DAG):
            return choice
        reasons = []
        for when, dag in choice.options:
            verdict = when.explain(assignment.node)
            if verdict.holds:
                return dag
            reasons.append(f"{dag.name}: {verdict.because}")
        if choice.default is None:
            self._problem(assignment, "selection", f"no DAG fits the node ({'; '.join(reasons)}); give a default.")
        return choice.default

    # --- implementations and environment ---

    def _survey(self, dag: DAG, assignment: Assignment) -> Survey:
        if id(dag) not in self._depends:
            self._depends[id(dag)] = has_choice(dag)
        uses: tuple[Use, ...] = ()
        key: tuple[int, ...] = (id(dag),)
        if self._depends[id(dag)] or key not in self._surveys:
            uses = expand(dag, assignment.node, Scope(dag.bind((), {}), isolation=dag.isolation))
        if self._depends[id(dag)]:
            key = (id(dag), *(id(use.dag) for use in walk(uses) if isinstance(use.step.task, DagTask)))
        if key not in self._surveys:
            self._surveys[key] = Survey(uses)
        return self._surveys[key]

    def _implementations(self, assignment: Assignment, survey: Survey) -> Decision:
        decision = survey.decide(assignment.node)
        self._decided.append((assignment.name, decision))
        for step, rejected in decision.unfit():
            misses = "; ".join(f"{r.implementation or 'base'}: {r.because}" for r in rejected)
            self._problem(assignment, "no_implementation", f"no implementation fits the node ({misses}).", step)
        return decision

    def _environment(self, assignment: Assignment, picked: Picked) -> Environment:
        needs, asking = picked.requirements, picked.asking
        if assignment.environment is not None:
            environment, why = assignment.environment, "given"
        elif asking:
            environment, why = Venv(), f"packages or setup commands are asked for by {_some(asking)}"
        elif needs.system_packages and assignment.node.get("root") is True:
            environment, why = Venv(), "system packages are asked for, and the node can install them"
        else:
            environment, why = Host(), "no task asks for packages"
        if isinstance(environment, Host) and needs.packages and assignment.environment is not None:
            why = f"given; the packages that {_some(asking)} asks for are expected to be there"
        self._why[assignment.name] = why
        environment = environment.needing(needs)
        for name, first, second in conflicting_pins(environment.requirements.packages):
            self._problem(assignment, "conflicting_pins", f"{name} is pinned to {first} and to {second}.")
        return environment

    def _fits(self, assignment: Assignment, environment: Environment) -> None:
        node = assignment.node
        if node.os == "windows" or (node.os == "macos" and node.infrastructure != DUMMY):
            name = {"windows": "Windows", "macos": "macOS"}[node.os]
            self._problem(assignment, "unsupported", f"the node runs {name}, which executors do not support yet.")
        if environment.kind not in node.environments:
            has = ", ".join(node.environments) or "none"
            self._problem(
                assignment, "unsupported", f"the node cannot run a {environment.kind} environment; it has {has}."
            )
        if isinstance(environment, Host) and environment.requirements.setup:
            self._problem(assignment, "unsupported", "there are setup commands, and Host runs none; use env=fl.Venv().")
        if environment.requirements.system_packages and node.get("root") is False:
            names = ", ".join(environment.requirements.system_packages)
            self._problem(
                assignment, "unsupported", f"system packages ({names}) need root, which the node does not give."
            )

    def _travels(self, survey: Survey, picked: Picked) -> bool:
        """Whether code travels by value, for one version of Python: a function that no module has, or a condition."""
        known = self._by_value.get(id(picked))
        if known is None:
            chosen = picked.implementations
            known = any(one.path in chosen and _is_by_value(one.step, chosen[one.path]) for one in survey.uses)
            self._by_value[id(picked)] = known
        return known

    def _fits_python(self, assignment: Assignment, environment: Environment, written: str) -> None:
        """Hold that the node has the version in which code travels, and the one that the environment is to have."""
        asked = environment.python if isinstance(environment, Venv) else ""
        if asked and written and asked != written:
            message = (
                f"the environment is to have Python {asked}, and code travels for {written};"
                f" leave out python=, submit from Python {asked}, or put the tasks into a module."
            )
            self._problem(assignment, "python_version", message)
        has = assignment.node.python
        if environment.kind == "container" or not has:
            return
        if written and written not in has:
            message = f"code travels for Python {written}, and the node has {', '.join(has)} only."
            self._problem(assignment, "python_version", message)
        elif asked and asked not in has:
            message = f"the environment is to have Python {asked}, and the node has {', '.join(has)} only."
            self._problem(assignment, "python_version", message)

    def _arguments(self, assignment: Assignment, survey: Survey) -> None:
        facts = facts_of(assignment.node)
        for name, steps in survey.fields.items():
            if name not in facts:
                message = f"the node has no `{name}`; it has {_some(sorted(facts))}."
                for step in steps:
                    self._problem(assignment, "unknown_name", message, step)

    def _across_nodes(self) -> None:
        if self._experiment.reporting != "silent" or len(self._experiment) < 2:
            return
        for assignment in self._experiment.assignments:
            for step in steps_of(assignment.dag):
                if isinstance(step.task, Barrier | WaitFor):
                    self._problem(
                        assignment,
                        "silent_events",
                        'waits for other nodes, which reporting="silent" does not allow.',
                        step.name,
                    )

    def _barriers(self) -> None:
        """Find barriers for a role that nobody has: such a one is broken from the start."""
        roles = {assignment.role for assignment in self._experiment.assignments}
        looked: set[int] = set()
        for assignment in self._experiment.assignments:
            if id(assignment.dag) in looked:
                continue
            looked.add(id(assignment.dag))
            for step in steps_of(assignment.dag):
                parties = step.args[1] if isinstance(step.task, Barrier) else "all"
                if isinstance(parties, str) and parties != "all" and parties not in roles:
                    has = ", ".join(sorted(repr(role) for role in roles if role is not None)) or "none has one"
                    message = f"waits for the role {parties!r}, which no deployment has ({has})."
                    self._problem(assignment, "unknown_name", message, step.name)

    # --- graphs ---

    def _graph(self, assignment: Assignment, dag: DAG, survey: Survey, picked: Picked) -> Graph | None:
        key = (id(picked), assignment.name if survey.by_node else "")
        if key in self._graphs:
            return self._graphs[key]
        before = len(self._problems)
        specs = self._specs_of(survey.top, assignment, survey, picked)
        if len(self._problems) > before:
            return None
        graph = Graph(
            name=dag.name,
            steps=specs,
            max_parallel=dag.max_parallel,
            stop_on_failure=dag.stop_on_failure,
            bundles=self._sealer.bundles(),
            preload=picked.preload,
        )
        self._graphs[key] = graph
        return graph

    def _specs_of(
        self, uses: tuple[Use, ...], assignment: Assignment, survey: Survey, picked: Picked
    ) -> tuple[StepSpec, ...]:
        shared = self._specs.setdefault(id(picked), {})
        specs: list[StepSpec] = []
        for use in uses:
            implementation = picked.implementations[use.path]
            try:
                if use.inside:
                    inside = self._specs_of(use.inside, assignment, survey, picked)
                    spec = self._nested(use, implementation, inside)
                else:
                    spec = shared.get(use.path) or self._spec(use, implementation, assignment)
            except FieldlabError as error:
                self._problem(assignment, error.code, str(error), use.path)
                continue
            specs.append(spec)
            if not use.inside and use.path not in survey.by_node:
                shared[use.path] = spec
        return tuple(specs)

    def _spec(self, use: Use, implementation: Implementation, assignment: Assignment) -> StepSpec:
        settings = implementation.settings
        filler = Filler(assignment.node, self._sealer.seal_file)
        arguments: Any = arguments_for(implementation.call, use.step.args, use.step.kwargs)
        if any(isinstance(r, ByNode | File | Arg) for r in use.step.refers):
            arguments = filler.fill(arguments, use.scope)
        return StepSpec(
            **self._common(use, implementation),
            code=self._code(use.step, implementation),
            args=self._sealer.seal_arguments(arguments, f"the arguments of step {use.path!r}"),
            env={name: value for name, value in settings.env.items() if isinstance(value, str)},
            secrets=tuple(
                dict.fromkeys(r.name for r in (*use.refers, *settings.env.values()) if isinstance(r, Secret))
            ),
            secret_env={name: value.name for name, value in settings.env.items() if isinstance(value, Secret)},
            cwd=settings.cwd,
            files=tuple(filler.files),
            outer=tuple(filler.outer),
            keep_processes=settings.keep_processes,
        )

    def _nested(self, use: Use, implementation: Implementation, inside: tuple[StepSpec, ...]) -> StepSpec:
        dag = use.dag
        assert dag is not None  # what is inside of it was found there
        graph = Graph(name=dag.name, steps=inside, max_parallel=dag.max_parallel, stop_on_failure=dag.stop_on_failure)
        return StepSpec(**self._common(use, implementation), code="", args="", graph=graph)

    def _common(self, use: Use, implementation: Implementation) -> dict[str, Any]:
        """What a step's spec has, whether it is a task or a DAG."""
        step = use.step
        return {
            "name": step.name,
            "task": step.task.task_name,
            "implementation": implementation.name,
            "needs": needs_of(step),
            "need": step.need,
            "during": tuple(dict.fromkeys(other.name for other in step.during_steps)),
            "background": step.background,
            "timeout": implementation.settings.timeout,
            "retry": self._retry(step, implementation),
            "when": self._condition(step),
            "repeat": self._repeat(step),
            "over": name_of(step.over),
            "over_path": step.over.path if isinstance(step.over, Pick) else (),
            "measured": step.is_measured,
            "exclusive": step.exclusives,
            "isolation": _isolation(use, implementation.settings),
            "slot": step.takes_slot,
        }

    def _code(self, step: Step[Any], implementation: Implementation) -> str:
        task = task_of(step)
        key = (id(task), implementation.name)
        if key not in self._codes:
            code, _ = sendable(task, implementation)
            self._codes[key] = self._sealer.seal(code, f"task {task.task_name!r}")
        return self._codes[key]

    def _function(self, function: Callable[..., Any], what: str) -> str:
        return self._sealer.seal(function, what)

    def _retry(self, step: Step[Any], implementation: Implementation) -> Retry:
        settings = implementation.settings
        if not settings.retries:
            return Retry()
        return Retry(
            times=settings.retries,
            delay=settings.retry_delay,
            backoff=settings.retry_backoff,
            condition=settings.retry_if and self._function(settings.retry_if, f"retry_if of step {step.name!r}"),
        )

    def _condition(self, step: Step[Any]) -> Condition | None:
        if step.condition is None:
            return None
        source, function = step.condition
        code = self._function(function, f"the condition of step {step.name!r}")
        path = source.path if isinstance(source, Pick) else ()
        return Condition(step=name_of(source) or "", code=code, path=path)

    def _repeat(self, step: Step[Any]) -> Repeat | None:
        if step.repetition is None:
            return None
        until = step.repetition["until"]
        code = None if until is None else self._function(until, f"until of step {step.name!r}")
        return Repeat(**{**step.repetition, "until": code})


def _is_by_value(step: Step[Any], implementation: Implementation) -> bool:
    settings = implementation.settings
    functions = (step.condition, step.repetition and step.repetition["until"], settings.retries and settings.retry_if)
    return any(functions) or sendable(task_of(step), implementation)[1]


def _isolation(use: Use, settings: TaskSettings) -> str:
    """What its task says, else what the DAGs around it say.

    A background step would keep a worker from all others, and a worker ends what a step leaves running.
    """
    if use.step.background is not None or settings.keep_processes:
        return "process"
    return settings.isolation or use.scope.isolation or "process"


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
