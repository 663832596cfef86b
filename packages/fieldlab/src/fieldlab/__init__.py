"""fieldlab: run experiments, DAGs of Python tasks, across a fleet of unlike machines.

::

    import fieldlab as fl

Everything a program needs is a name of this module. Each is imported from where it is defined when it is first used,
so that importing fieldlab costs next to nothing; type checkers and editors see all of them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fieldlab_common import errors as errors
    from fieldlab_common.builtin import arg as arg
    from fieldlab_common.builtin import barrier as barrier
    from fieldlab_common.builtin import send as send
    from fieldlab_common.builtin import shell as shell
    from fieldlab_common.builtin import value as value
    from fieldlab_common.builtin import wait_for as wait_for
    from fieldlab_common.context import Artifact as Artifact
    from fieldlab_common.context import CommandFailed as CommandFailed
    from fieldlab_common.context import TaskContext as TaskContext
    from fieldlab_common.dag import DAG as DAG
    from fieldlab_common.dag import Pipeline as Pipeline
    from fieldlab_common.dag import choose as choose
    from fieldlab_common.environment import Container as Container
    from fieldlab_common.environment import Environment as Environment
    from fieldlab_common.environment import Host as Host
    from fieldlab_common.environment import Requirements as Requirements
    from fieldlab_common.environment import Resources as Resources
    from fieldlab_common.environment import Venv as Venv
    from fieldlab_common.errors import ArgumentError as ArgumentError
    from fieldlab_common.errors import ArtifactNameError as ArtifactNameError
    from fieldlab_common.errors import AuthenticationError as AuthenticationError
    from fieldlab_common.errors import BadAnswer as BadAnswer
    from fieldlab_common.errors import BarrierBroken as BarrierBroken
    from fieldlab_common.errors import BlobMismatch as BlobMismatch
    from fieldlab_common.errors import CertificateRefused as CertificateRefused
    from fieldlab_common.errors import ClaimRefused as ClaimRefused
    from fieldlab_common.errors import ConfigurationError as ConfigurationError
    from fieldlab_common.errors import ConnectorError as ConnectorError
    from fieldlab_common.errors import CycleError as CycleError
    from fieldlab_common.errors import DefinitionError as DefinitionError
    from fieldlab_common.errors import DirectorError as DirectorError
    from fieldlab_common.errors import DirectorTimeout as DirectorTimeout
    from fieldlab_common.errors import DirectorUnreachable as DirectorUnreachable
    from fieldlab_common.errors import DoubledIdentity as DoubledIdentity
    from fieldlab_common.errors import DuplicateNameError as DuplicateNameError
    from fieldlab_common.errors import EventTooLarge as EventTooLarge
    from fieldlab_common.errors import ExperimentExists as ExperimentExists
    from fieldlab_common.errors import FieldlabError as FieldlabError
    from fieldlab_common.errors import IllegalState as IllegalState
    from fieldlab_common.errors import IllegalTransition as IllegalTransition
    from fieldlab_common.errors import InternalError as InternalError
    from fieldlab_common.errors import InvalidMessage as InvalidMessage
    from fieldlab_common.errors import InvalidNameError as InvalidNameError
    from fieldlab_common.errors import InvalidRequest as InvalidRequest
    from fieldlab_common.errors import NotEnoughNodes as NotEnoughNodes
    from fieldlab_common.errors import NotFound as NotFound
    from fieldlab_common.errors import PermissionDenied as PermissionDenied
    from fieldlab_common.errors import PlanError as PlanError
    from fieldlab_common.errors import ProtocolMismatch as ProtocolMismatch
    from fieldlab_common.errors import RateLimited as RateLimited
    from fieldlab_common.errors import ResultNotReady as ResultNotReady
    from fieldlab_common.errors import RunFailed as RunFailed
    from fieldlab_common.errors import SelectionError as SelectionError
    from fieldlab_common.errors import StepFailed as StepFailed
    from fieldlab_common.errors import StepMisuseError as StepMisuseError
    from fieldlab_common.errors import TooLarge as TooLarge
    from fieldlab_common.errors import Unavailable as Unavailable
    from fieldlab_common.errors import UnknownConnector as UnknownConnector
    from fieldlab_common.errors import UnknownNameError as UnknownNameError
    from fieldlab_common.errors import UnpicklableError as UnpicklableError
    from fieldlab_common.errors import UnsupportedEncoding as UnsupportedEncoding
    from fieldlab_common.errors import UnsupportedError as UnsupportedError
    from fieldlab_common.errors import UntrustedValue as UntrustedValue
    from fieldlab_common.errors import WaitTimeout as WaitTimeout
    from fieldlab_common.events import Event as Event
    from fieldlab_common.experiment import Experiment as Experiment
    from fieldlab_common.forms import background as background
    from fieldlab_common.forms import map_ as map
    from fieldlab_common.forms import repeat as repeat
    from fieldlab_common.lifecycle import DeploymentState as DeploymentState
    from fieldlab_common.lifecycle import ExperimentState as ExperimentState
    from fieldlab_common.lifecycle import Reason as Reason
    from fieldlab_common.lifecycle import StepState as StepState
    from fieldlab_common.node import Availability as Availability
    from fieldlab_common.node import Elastic as Elastic
    from fieldlab_common.node import Node as Node
    from fieldlab_common.selector import Selector as Selector
    from fieldlab_common.selector import node as node
    from fieldlab_common.step import File as File
    from fieldlab_common.step import Step as Step
    from fieldlab_common.step import by_node as by_node
    from fieldlab_common.step import secret as secret
    from fieldlab_common.task import Task as Task
    from fieldlab_common.task import task as task

    from fieldlab.client import Client as Client
    from fieldlab.config import profiles as profiles
    from fieldlab.docker import Docker as Docker
    from fieldlab.infrastructure import Agents as Agents
    from fieldlab.infrastructure import Local as Local
    from fieldlab.local import run as run
    from fieldlab.planning import Plan as Plan
    from fieldlab.planning import plan as plan
    from fieldlab.pool import NodePool as NodePool
    from fieldlab.results import DeploymentResults as DeploymentResults
    from fieldlab.results import Results as Results
    from fieldlab.results import StepResult as StepResult
    from fieldlab.runs import Run as Run
    from fieldlab.simulated import Simulation as Simulation
    from fieldlab.simulation import simulate as simulate
    from fieldlab.slurm import Slurm as Slurm
    from fieldlab.ssh import SSH as SSH

    __version__: str

__all__ = [
    "DAG",
    "SSH",
    "Agents",
    "ArgumentError",
    "Artifact",
    "ArtifactNameError",
    "AuthenticationError",
    "Availability",
    "BadAnswer",
    "BarrierBroken",
    "BlobMismatch",
    "CertificateRefused",
    "ClaimRefused",
    "Client",
    "CommandFailed",
    "ConfigurationError",
    "ConnectorError",
    "Container",
    "CycleError",
    "DefinitionError",
    "DeploymentResults",
    "DeploymentState",
    "DirectorError",
    "DirectorTimeout",
    "DirectorUnreachable",
    "Docker",
    "DoubledIdentity",
    "DuplicateNameError",
    "Elastic",
    "Environment",
    "Event",
    "EventTooLarge",
    "Experiment",
    "ExperimentExists",
    "ExperimentState",
    "FieldlabError",
    "File",
    "Host",
    "IllegalState",
    "IllegalTransition",
    "InternalError",
    "InvalidMessage",
    "InvalidNameError",
    "InvalidRequest",
    "Local",
    "Node",
    "NodePool",
    "NotEnoughNodes",
    "NotFound",
    "PermissionDenied",
    "Pipeline",
    "Plan",
    "PlanError",
    "ProtocolMismatch",
    "RateLimited",
    "Reason",
    "Requirements",
    "Resources",
    "ResultNotReady",
    "Results",
    "Run",
    "RunFailed",
    "SelectionError",
    "Selector",
    "Simulation",
    "Slurm",
    "Step",
    "StepFailed",
    "StepMisuseError",
    "StepResult",
    "StepState",
    "Task",
    "TaskContext",
    "TooLarge",
    "Unavailable",
    "UnknownConnector",
    "UnknownNameError",
    "UnpicklableError",
    "UnsupportedEncoding",
    "UnsupportedError",
    "UntrustedValue",
    "Venv",
    "WaitTimeout",
    "__version__",
    "arg",
    "background",
    "barrier",
    "by_node",
    "choose",
    "errors",
    "map",
    "node",
    "plan",
    "profiles",
    "repeat",
    "run",
    "secret",
    "send",
    "shell",
    "simulate",
    "task",
    "value",
    "wait_for",
]

_HOMES = {
    "fieldlab.client": "Client",
    "fieldlab.config": "profiles",
    "fieldlab.docker": "Docker",
    "fieldlab.infrastructure": "Agents Local",
    "fieldlab.slurm": "Slurm",
    "fieldlab.ssh": "SSH",
    "fieldlab.local": "run",
    "fieldlab.planning": "Plan plan",
    "fieldlab.pool": "NodePool",
    "fieldlab.results": "DeploymentResults Results StepResult",
    "fieldlab.runs": "Run",
    "fieldlab.simulated": "Simulation",
    "fieldlab.simulation": "simulate",
    "fieldlab_common.builtin": "arg barrier send shell value wait_for",
    "fieldlab_common.context": "Artifact CommandFailed TaskContext",
    "fieldlab_common.dag": "DAG Pipeline choose",
    "fieldlab_common.forms": "background repeat",
    "fieldlab_common.environment": "Container Environment Host Requirements Resources Venv",
    "fieldlab_common.errors": (
        "ArgumentError ArtifactNameError AuthenticationError BadAnswer BarrierBroken BlobMismatch "
        "CertificateRefused ClaimRefused ConfigurationError ConnectorError CycleError DefinitionError DirectorError "
        "DirectorTimeout DirectorUnreachable DoubledIdentity DuplicateNameError EventTooLarge ExperimentExists "
        "FieldlabError IllegalState IllegalTransition InternalError InvalidMessage InvalidNameError InvalidRequest "
        "NotEnoughNodes NotFound PermissionDenied PlanError ProtocolMismatch RateLimited ResultNotReady "
        "RunFailed SelectionError StepFailed StepMisuseError TooLarge Unavailable UnknownConnector "
        "UnknownNameError UnpicklableError UnsupportedEncoding UnsupportedError UntrustedValue WaitTimeout"
    ),
    "fieldlab_common.events": "Event",
    "fieldlab_common.experiment": "Experiment",
    "fieldlab_common.lifecycle": "DeploymentState ExperimentState Reason StepState",
    "fieldlab_common.node": "Availability Elastic Node",
    "fieldlab_common.selector": "Selector node",
    "fieldlab_common.step": "File Step by_node secret",
    "fieldlab_common.task": "Task task",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("fieldlab")
    elif name == "errors":
        value = importlib.import_module("fieldlab_common.errors")
    elif name == "map":
        value = importlib.import_module("fieldlab_common.forms").map_
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'fieldlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
