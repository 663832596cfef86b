"""The client of a director: a library, and nothing that runs beside the program that uses it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Literal

from fieldlab_common import protocol as p
from fieldlab_common.errors import ConfigurationError, DefinitionError
from fieldlab_common.experiment import Experiment

from fieldlab.config import access
from fieldlab.http import HttpTransport
from fieldlab.infrastructure import Infrastructures
from fieldlab.pool import NodePool
from fieldlab.runs import Run
from fieldlab.secrets import Secrets
from fieldlab.ship import Shipment, pack, require_sound, step_names, upload
from fieldlab.source import DirectorSource
from fieldlab.text import duration, html_table, instant, table
from fieldlab.transport import Session, Settings, Transport, require_protocol

__all__ = ["Client", "Experiments"]

IfExists = Literal["error", "attach", "new"]
IF_EXISTS = ("error", "attach", "new")


class Experiments(list[p.ExperimentInfo]):
    """Experiments, newest first; shown as a table."""

    def _rows(self) -> Iterator[list[object]]:
        for one in self:
            took = one.ended - one.started if one.ended is not None and one.started is not None else None
            yield [one.name, one.state.value, instant(one.created), duration(took), one.message]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self else "no experiments"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("name", "state", "created", "took", "message")


class Client:
    """A director, seen by one user.

    ``endpoint`` and ``token`` come from the arguments, else from FIELDLAB_ENDPOINT and FIELDLAB_TOKEN, else from the
    profile file (``fieldlab.config``); ``profile`` names one of its profiles. ``timeout`` is in seconds, for each
    request; ``ca`` is a file with the certificate authority of the director. Nothing is sent before it is used.

    It may be used from several threads. Close it, or use it in a ``with`` statement, to let go of its connections.

    Raises:
        ConfigurationError: no endpoint is said anywhere.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        *,
        timeout: float = 30.0,
        profile: str | None = None,
        ca: str | None = None,
        transport: Transport | None = None,
    ) -> None:
        if timeout <= 0:
            raise ConfigurationError(f"timeout={timeout}: it must be more than zero seconds.")
        found = access(endpoint, token, profile=profile, ca=ca)
        self.endpoint = found.endpoint
        moved = transport or HttpTransport(found.endpoint, ca=found.ca)
        self._session = Session(found.endpoint, found.token, moved, Settings(timeout=timeout))
        self.infrastructures = Infrastructures(self._session)
        self.secrets = Secrets(self._session)

    # --- who and what is there ---

    def health(self) -> p.Health:
        """Whether the director serves, and which versions it speaks.

        Raises:
            DirectorUnreachable: nothing answers at the endpoint.
            ProtocolMismatch: it shares no version with this client.
        """
        health = self._session.call("health", p.Health)
        require_protocol(health, self.endpoint)
        return health

    def whoami(self) -> p.Principal:
        """Who the token belongs to."""
        return self._session.call("whoami", p.Principal)

    def nodes(self) -> NodePool:
        """The nodes that may be used, as they are known now."""
        return NodePool(self._session.call("nodes", p.NodeList).nodes)

    def experiments(self, *, state: str | None = None, limit: int = 100) -> Experiments:
        """The newest experiments of this user, at most ``limit`` of them, or those in one state."""
        found, after = Experiments(), None
        while len(found) < limit:
            query = {"state": state, "limit": min(limit - len(found), 200), "after": after}
            page = self._session.call("experiments", p.ExperimentPage, query=query)
            found.extend(page.experiments)
            after = page.next
            if after is None or not page.experiments:
                break
        return Experiments(found[:limit])

    # --- runs ---

    def prepare(self, experiment: Experiment, *, if_exists: IfExists = "error") -> Run:
        """Send ``experiment`` and have its nodes made ready; ``run.start()`` then starts it everywhere at once.

        ``if_exists``, for when there is one of that name: ``"error"``; ``"attach"``, the run of that name is returned
        as it is; ``"new"``, a new run called ``name#2`` and so on.

        Raises:
            PlanError: it cannot run as it is; ``problems`` lists everything that was found.
            ExperimentExists: there is one of that name.
        """
        return self._submit(experiment, if_exists, start=False)

    def submit(self, experiment: Experiment, *, if_exists: IfExists = "error") -> Run:
        """Send ``experiment`` and start it as soon as its nodes are ready: ``prepare`` and ``start`` in one.

        Asked twice, for want of an answer, it makes one run: the request carries a key of its own.
        """
        return self._submit(experiment, if_exists, start=True)

    def _submit(self, experiment: Experiment, if_exists: IfExists, *, start: bool) -> Run:
        if if_exists not in IF_EXISTS:
            raise DefinitionError(f"if_exists={if_exists!r}: it is one of {', '.join(IF_EXISTS)}.")
        shipment = require_sound(pack(experiment))
        upload(self._session, shipment)
        info = self._session.call(
            "submit",
            p.ExperimentInfo,
            body=shipment.request(if_exists=if_exists, start=start),
            headers={"idempotency-key": uuid.uuid4().hex},
        )
        return self._run(info, shipment)

    def run(self, name: str) -> Run:
        """The run of that name (or id).

        Raises:
            NotFound: there is none, or it is not this user's.
        """
        return self._run(self._session.call("experiment", p.ExperimentInfo, path={"experiment": name}))

    def _run(self, info: p.ExperimentInfo, shipment: Shipment | None = None) -> Run:
        steps = step_names(shipment) if shipment is not None else {}
        return Run(DirectorSource(self._session, info.id), info, steps=steps)

    # --- the end ---

    def close(self) -> None:
        """Let go of all connections. Runs go on."""
        self._session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self.endpoint}>"
