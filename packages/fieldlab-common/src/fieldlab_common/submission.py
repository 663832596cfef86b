"""What a request to submit an experiment must be like, whichever director gets it.

Pure: it holds the form of a request alone. Whether its nodes, blobs and secrets are there is for the director to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from fieldlab_common.errors import FieldlabError, InvalidRequest, TooLarge
from fieldlab_common.messages import DeploymentSpec, SubmitExperiment, environment_of
from fieldlab_common.step import check_name

__all__ = ["at", "check_submit", "hold"]

_DIGEST = re.compile(r"[0-9a-f]{64}")
T = TypeVar("T")


def check_submit(request: SubmitExperiment, *, most: int) -> None:
    """Hold that a request can be stored as it is; the first thing that is wrong is said, with its path.

    Raises:
        InvalidRequest: a name, a digest, an environment or a choice is not one.
        TooLarge: more than ``most`` deployments.
    """
    at("$.name", lambda: check_name(request.name, "an experiment"))
    hold(request.if_exists in ("error", "attach", "new"), "$.if_exists", "must be error, attach or new")
    hold(request.settings.reporting in ("live", "quiet", "silent"), "$.settings.reporting", "is unknown")
    hold(request.settings.lost_after > 0, "$.settings.lost_after", "must be more than zero")
    hold(request.deployments, "$.deployments", "must have at least one deployment")
    if len(request.deployments) > most:
        raise TooLarge(f"{len(request.deployments)} deployments are more than the {most} that one experiment may have.")
    for index, spec in enumerate(request.deployments):
        _check_spec(spec, f"$.deployments[{index}]")
    doubles = [name for name, count in Counter(spec.name for spec in request.deployments).items() if count > 1]
    hold(not doubles, "$.deployments", f"have one name more than once: {', '.join(doubles[:5])}")


def hold(true: object, path: str, what: str) -> None:
    """Hold that something is true of what stands at ``path``.

    Raises:
        InvalidRequest.
    """
    if not true:
        raise InvalidRequest(f"{path} {what}.", details={"path": path})


def at(path: str, read: Callable[[], T]) -> T:
    """What ``read`` makes of what stands at ``path``.

    Raises:
        InvalidRequest: it cannot be read; in the words of the error that says so.
    """
    try:
        return read()
    except FieldlabError as error:
        raise InvalidRequest(f"{path}: {error.message}", advice=error.advice, details={"path": path}) from error


def _check_spec(spec: DeploymentSpec, path: str) -> None:
    at(f"{path}.name", lambda: check_name(spec.name, "a deployment"))
    hold(_DIGEST.fullmatch(spec.graph), f"{path}.graph", "must be a SHA-256 in lower-case hexadecimal")
    hold(all(map(_DIGEST.fullmatch, spec.blobs)), f"{path}.blobs", "must be SHA-256s in lower-case hexadecimal")
    hold(spec.steps >= 0, f"{path}.steps", "must not be negative")
    at(f"{path}.environment", lambda: environment_of(spec.environment))
