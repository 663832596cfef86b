"""The client of a director: a library, and nothing that runs beside the program that uses it."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Literal
from urllib.parse import urlsplit

from fieldlab_common import accounts as a
from fieldlab_common import protocol as p
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ConfigurationError, DefinitionError
from fieldlab_common.experiment import Experiment
from fieldlab_common.lifecycle import ExperimentState

from fieldlab.account import Tokens, ask_password, until
from fieldlab.config import Profile, access, checked, profiles, same_endpoint
from fieldlab.http import HttpTransport
from fieldlab.infrastructure import Infrastructures
from fieldlab.pool import NodePool
from fieldlab.runs import Run
from fieldlab.secrets import Secrets
from fieldlab.ship import Shipment, pack, require_sound, step_names, upload
from fieldlab.source import DirectorSource
from fieldlab.text import duration, html_table, instant, table
from fieldlab.transport import Session, Settings, Transport, is_loopback, require_protocol

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


def _time(since: dt.datetime | float | str | None) -> float | None:
    if isinstance(since, dt.datetime):
        if since.tzinfo is None:
            raise DefinitionError("since has no time zone.", advice="Use datetime(..., tzinfo=...).")
        return since.timestamp()
    return None if since is None else time.time() - parse_duration(since)


_HEADER = ("name", "state", "created", "took", "message")


class Client:
    """A director, seen by one user.

    ``endpoint`` and ``token`` come from the arguments, else from FIELDLAB_ENDPOINT and FIELDLAB_TOKEN, else from the
    profile file (``fieldlab.config``); ``profile`` names one of its profiles. ``timeout`` is in seconds, for each
    request; ``ca`` is a file with the certificate authority of the director. Nothing is sent before it is used.

    ``transport``, ``clock`` and ``sleep`` are for tests (``fieldlab.testing``): what moves requests, and time.

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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if timeout <= 0:
            raise ConfigurationError(f"timeout={timeout}: it must be more than zero seconds.")
        found = access(endpoint, token, profile=profile, ca=ca)
        self.endpoint = found.endpoint
        moved = transport or HttpTransport(found.endpoint, ca=found.ca)
        self._token, self._clock = found.token, clock
        hint = _login_again(found.endpoint, found.user)
        settings = Settings(timeout=timeout)
        self._session = Session(found.endpoint, found.token, moved, settings, login=hint, clock=clock, sleep=sleep)
        self.infrastructures = Infrastructures(self._session)
        self.secrets = Secrets(self._session)
        self.tokens = Tokens(self._session)

    # --- logging in ---

    @classmethod
    def login(
        cls,
        endpoint: str,
        user: str,
        password: str | None = None,
        *,
        profile: str | None = None,
        ca: str | None = None,
        timeout: float = 30.0,
        transport: Transport | None = None,
    ) -> Client:
        """Log in, and keep that in the profile file: from then on ``fl.Client()`` is enough, also in other programs.

        ``password`` None: it is asked for. ``profile`` is a name for this director, by default its host. The password
        is not kept; what is kept is a token that expires.

        Raises:
            AuthenticationError: the name or the password is wrong. RateLimited: there were too many attempts.
            ConfigurationError: the password would travel unencrypted, or nobody can be asked for it.
        """
        endpoint = checked(endpoint)
        if endpoint.startswith("http:") and not is_loopback(endpoint):
            raise ConfigurationError(
                f"{endpoint} would get the password unencrypted.", advice="Use its https:// address, or a token."
            )
        known = profiles()
        name = profile or next((o.name for o in known if same_endpoint(o.endpoint, endpoint)), _host(endpoint))
        ca = ca or next((o.ca for o in known if o.name == name and same_endpoint(o.endpoint, endpoint)), None)
        secret = ask_password(f"Password of {user} at {endpoint}: ") if password is None else password
        with cls(endpoint, "", timeout=timeout, ca=ca, transport=transport) as client:
            made = client._session.call("login", a.NewToken, body=a.Login(user=user, password=secret))
        expires = until(made.expires)
        known.keep(Profile(name=name, endpoint=endpoint, user=user, token=made.token, expires=expires, ca=ca))
        return cls(endpoint, made.token, timeout=timeout, profile=name, transport=transport)

    def logout(self) -> None:
        """End this client's token, and forget it in the profile file. The endpoint stays there."""
        self._session.call("logout", p.Empty)
        if self._token is not None:
            profiles().forget_token(self._token)

    def change_password(self, current: str | None = None, new: str | None = None) -> None:
        """Change this user's password; what is None is asked for. Other logins end; this one, and tokens, stay good.

        Raises:
            InvalidRequest: the current one is wrong, or the new one too short. PermissionDenied: log in first.
        """
        current = ask_password("Current password: ") if current is None else current
        if new is None:
            new = ask_password("New password: ")
            if ask_password("New password again: ") != new:
                raise ConfigurationError("The two passwords differ.")
        self._session.call("change_password", p.Empty, body=a.ChangePassword(current=current, new=new))

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
        """Who the token belongs to, what it is good for, and when it expires."""
        return self._session.call("whoami", p.Principal)

    def nodes(self) -> NodePool:
        """The nodes that may be used, as they are known now, and who has them."""
        found = self._session.call("nodes", p.NodeList)
        return NodePool(found.nodes, holds=found.holds, again=self.nodes)

    def experiments(
        self,
        *,
        state: str | ExperimentState | None = None,
        name: str | None = None,
        since: dt.datetime | float | str | None = None,
        limit: int = 100,
    ) -> Experiments:
        """The newest experiments of this user, at most ``limit`` of them.

        ``state``: those in one state; ``name``: those whose name fits a pattern such as ``"dns-*"`` (``*``: any
        characters, ``?``: one; upper and lower case are alike); ``since``: those submitted from a time (with a time
        zone) on, or within a duration such as ``"2d"`` or seconds.

        Raises:
            DefinitionError: there is no such state, or it is no time.
        """
        wanted = {"state": None if state is None else _state(state), "name": name, "since": _time(since)}
        found, after = Experiments(), None
        while len(found) < limit:
            query = {**wanted, "limit": min(limit - len(found), 200), "after": after}
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

    def delete(self, name: str, *, force: bool = False) -> None:
        """Let the run of that name (or id) go, with all that it gave: see ``Run.delete``.

        Raises:
            NotFound: there is none, or it is not this user's.
            IllegalState: it has not ended, and ``force`` is false.
        """
        self.run(name).delete(force=force)

    def _run(self, info: p.ExperimentInfo, shipment: Shipment | None = None) -> Run:
        steps = step_names(shipment) if shipment is not None else {}
        return Run(DirectorSource(self._session, info.id), info, steps=steps, clock=self._clock)

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


def _state(state: str) -> str:
    try:
        return ExperimentState(state).value
    except ValueError:
        raise DefinitionError(f"state={state!r:.80}: it is one of {', '.join(ExperimentState)}.") from None


def _host(endpoint: str) -> str:
    return urlsplit(endpoint).netloc


def _login_again(endpoint: str, user: str | None) -> str:
    who = repr(user) if user else "user"
    return f"Log in again with: fl.Client.login({endpoint!r}, {who})"
