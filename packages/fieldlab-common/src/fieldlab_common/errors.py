"""The one tree of errors, shared by the client, the director and the executor.

Every error has a stable ``code``, a sentence that says what happened to what, and ``advice``: what to do next.
Those the director answers with also have an HTTP ``status``; ``BY_CODE`` turns the ``code`` of a problem document
(RFC 9457) back into the class, so that one table serves the server, the client and the docs.

Invariant: a code is used by one class only, and is never reused for another meaning.
"""

from __future__ import annotations

TYPE_CHECKING = (
    False  # typing's own would load typing, which is more than all of the process from which steps are forked
)
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import ClassVar

__all__ = [
    "BY_CODE",
    "ArgumentError",
    "ArtifactNameError",
    "AuthenticationError",
    "BadAnswer",
    "BarrierBroken",
    "BlobMismatch",
    "CertificateRefused",
    "ClaimRefused",
    "ConfigurationError",
    "ConnectorError",
    "CycleError",
    "DefinitionError",
    "DirectorError",
    "DirectorTimeout",
    "DirectorUnreachable",
    "DoubledIdentity",
    "Drained",
    "DuplicateNameError",
    "EventTooLarge",
    "ExperimentExists",
    "FieldlabError",
    "IllegalState",
    "IllegalTransition",
    "InternalError",
    "InvalidMessage",
    "InvalidNameError",
    "InvalidRequest",
    "NotEnoughNodes",
    "NotFound",
    "PermissionDenied",
    "PlanError",
    "ProtocolMismatch",
    "RateLimited",
    "ResultNotReady",
    "RunFailed",
    "SelectionError",
    "StepFailed",
    "StepMisuseError",
    "TooLarge",
    "Unavailable",
    "UnknownConnector",
    "UnknownNameError",
    "UnpicklableError",
    "UnsupportedEncoding",
    "UnsupportedError",
    "UntrustedValue",
    "WaitTimeout",
]


class FieldlabError(Exception):
    """Base of every error that fieldlab raises on purpose.

    ``message`` says what happened and to what; ``advice`` what to do next; ``details`` is JSON for programs.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    default_advice: ClassVar[str] = ""

    def __init__(self, message: str, *, advice: str = "", details: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice or self.default_advice
        self.details: dict[str, object] = dict(details or {})

    def __str__(self) -> str:
        between = "\n" if "\n" in self.message else " "  # what has several lines is not continued on the last of them
        return f"{self.message.rstrip()}{between}{self.advice}".rstrip()


# --- what a user defines ---------------------------------------------------------------------------------------------


class DefinitionError(FieldlabError):
    """A task, a DAG or an experiment is not well defined. Correct the line that the message points at."""

    code = "definition"
    status = 422


class ArgumentError(DefinitionError, TypeError):
    """A task was called with arguments that its signature does not take."""

    code = "argument"


class StepMisuseError(DefinitionError, TypeError):
    """A step was used as if it were already its value (iterated, compared, formatted …)."""

    code = "step_misuse"


class CycleError(DefinitionError):
    """The edges of a DAG form a circle; ``details["steps"]`` lists it. Remove one of its edges."""

    code = "cycle"


class DuplicateNameError(DefinitionError):
    """Two things that must be told apart by name have the same one. Rename one, e.g. with ``.named(...)``."""

    code = "duplicate_name"


class UnknownNameError(DefinitionError, KeyError):
    """A name is not there; the message has the closest that is."""

    code = "unknown_name"


class InvalidNameError(DefinitionError, ValueError):
    """A name has characters or a length that names may not have."""

    code = "invalid_name"


class ArtifactNameError(InvalidNameError):
    """An artifact's name would leave the step's folder or is not portable. Use one like ``out/trace.csv``."""

    code = "artifact_name"


class UnpicklableError(DefinitionError):
    """A task's code or an argument cannot be sent to a node; the message names the variable to blame."""

    code = "unpicklable"


class UnsupportedError(DefinitionError):
    """A construct that this version, this platform or this node does not support."""

    code = "unsupported"


class SelectionError(DefinitionError, LookupError):
    """A selection of nodes found nothing that fits; the message says what is there."""

    code = "selection"


class NotEnoughNodes(SelectionError):
    """Fewer nodes fit than were asked for; the message says how many there are and which."""

    code = "not_enough_nodes"


class PlanError(FieldlabError):
    """An experiment cannot run as it is. ``problems`` lists everything that was found, the nearest miss first."""

    code = "plan"
    status = 422

    def __init__(self, message: str, *, problems: Sequence[str] = (), advice: str = "") -> None:
        super().__init__(message, advice=advice, details={"problems": list(problems)})
        self.problems = tuple(problems)


# --- what happens while it runs --------------------------------------------------------------------------------------


class RunFailed(FieldlabError):
    """A run ended otherwise than well, and the caller asked to be told by an error."""

    code = "run_failed"


class StepFailed(FieldlabError):
    """The value of a step was asked for, but it did not succeed. See ``.error`` and ``.logs``."""

    code = "step_failed"


class ResultNotReady(FieldlabError):
    """The value of a step was asked for before the step ended. Wait for the run first."""

    code = "result_not_ready"


class UntrustedValue(FieldlabError):
    """The value travelled as a pickle, and opening one can run code. Call ``.trust()`` if you trust the node."""

    code = "untrusted_value"


class WaitTimeout(FieldlabError, TimeoutError):
    """A wait for an event, a barrier, a gate or a run reached its deadline; the message says what was seen so far."""

    code = "wait_timeout"


class BarrierBroken(FieldlabError):
    """A barrier can no longer fill; ``details["missing"]`` names the parties that will never come."""

    code = "barrier_broken"


class IllegalTransition(FieldlabError):
    """A state change that the tables in ``lifecycle`` do not have."""

    code = "illegal_transition"
    status = 409


class ConnectorError(FieldlabError):
    """A connector could not do what was asked of it. ``retryable`` says whether trying again can help.

    ``log`` is all that programs on the node said meanwhile, for the deployment's log.
    """

    code = "connector"
    status = 502

    def __init__(self, message: str, *, advice: str = "", transient: bool = True, log: str = "") -> None:
        super().__init__(message, advice=advice, details={"transient": transient})
        self.transient = transient
        self.log = log


class ConfigurationError(FieldlabError):
    """A setting is missing or wrong; the message names it and where it was looked for."""

    code = "configuration"


# --- what the director answers ---------------------------------------------------------------------------------------


class DirectorError(FieldlabError):
    """The director answered with an error. ``request_id`` finds the request in its log."""

    code = "director"
    request_id: str | None = None
    http_status: int | None = None


class AuthenticationError(DirectorError):
    """The token is missing, wrong, expired or revoked."""

    code = "unauthenticated"
    status = 401
    default_advice = "Log in again, or give a valid token (argument token=, FIELDLAB_TOKEN, or the profile)."


class Drained(AuthenticationError):
    """The director has everything of this deployment, and the executor's token ended with that."""

    code = "drained"
    status = 401
    default_advice = "There is nothing left to do: the executor may end and remove its journal."


class DoubledIdentity(AuthenticationError):
    """Two machines ask as one agent, so that neither is trusted any more: a disk was copied."""

    code = "doubled_identity"
    status = 401
    default_advice = "Remove the agent, and let each machine join anew, with a new token."


class PermissionDenied(DirectorError):
    """The caller is known, and may not do this."""

    code = "forbidden"
    status = 403


class NotFound(DirectorError, LookupError):
    """It does not exist, or is not the caller's, which looks the same."""

    code = "not_found"
    status = 404


class ExperimentExists(DirectorError):
    """An experiment of that name exists."""

    code = "experiment_exists"
    status = 409
    default_advice = (
        'Choose another name, or if_exists="attach" for the run of that name, or if_exists="new" for a new run of it.'
    )


class IllegalState(DirectorError):
    """What was asked for does not fit the present state."""

    code = "illegal_state"
    status = 409


class ClaimRefused(DirectorError):
    """Another executor holds this deployment, or the launch is older than the present one. The executor must exit."""

    code = "claim_refused"
    status = 409


class BlobMismatch(DirectorError):
    """The bytes that arrived are not those that were announced (size, offset or SHA-256)."""

    code = "blob_mismatch"
    status = 409


class InvalidRequest(DirectorError, ValueError):
    """The request does not have the documented form; ``details["path"]`` says where."""

    code = "invalid_request"
    status = 422


class UnknownConnector(DirectorError):
    """The director has no connector for that kind of infrastructure; the message lists those it has."""

    code = "unknown_connector"
    status = 422


class TooLarge(DirectorError):
    """A body, a name or a number of things is over its limit; the message says which."""

    code = "too_large"
    status = 413


class UnsupportedEncoding(DirectorError):
    """A body is compressed in a way that the director, or a proxy before it, does not take. Send it as it is."""

    code = "unsupported_encoding"
    status = 415


class EventTooLarge(TooLarge):
    """An event's data is over 64 KiB. Put the data into an artifact and its name into the event."""

    code = "event_too_large"


class RateLimited(DirectorError):
    """Too many requests. ``details["retry_after"]`` has the seconds to wait."""

    code = "rate_limited"
    status = 429
    retryable = True


class ProtocolMismatch(DirectorError):
    """Client or executor and director share no version of the protocol; the message has both."""

    code = "protocol_mismatch"
    status = 426


class InternalError(DirectorError):
    """The director failed. Its log has the request id."""

    code = "internal"
    status = 500
    default_advice = "Try again; if it stays, give the request id to the director's admin."


class Unavailable(DirectorError):
    """The director cannot answer now (starting, stopping, or its disk is full)."""

    code = "unavailable"
    status = 503
    retryable = True


class DirectorUnreachable(DirectorError):
    """No director answers at the endpoint."""

    code = "unreachable"
    retryable = True


class CertificateRefused(DirectorUnreachable):
    """What answers at the endpoint did not prove to be the director: nothing was sent to it."""

    code = "certificate"
    retryable = False


class DirectorTimeout(DirectorError, TimeoutError):
    """The director did not answer in time."""

    code = "director_timeout"
    retryable = True


class BadAnswer(DirectorError):
    """Something answered, and it does not speak the director's protocol (a proxy's page, a cut body …)."""

    code = "bad_answer"


class InvalidMessage(FieldlabError, ValueError):
    """Data does not have the form of the type that it should be; ``details["path"]`` says where."""

    code = "invalid_message"
    status = 422


def _all(base: type[FieldlabError]) -> list[type[FieldlabError]]:
    return [base] + [c for sub in base.__subclasses__() for c in _all(sub)]


BY_CODE: dict[str, type[FieldlabError]] = {cls.code: cls for cls in _all(FieldlabError)}
