"""The director's settings: one frozen object, built where the program starts and handed down. Nothing else is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fieldlab_common.errors import ConfigurationError

__all__ = ["Limits", "Settings", "limits_of"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of what a request may bring or wait for, and of what somebody may have. In bytes and seconds."""

    json_body: int = 32 * 1024 * 1024  # a request of JSON: the largest is a submit with thousands of deployments
    open_body: int = 16 * 1024  # a request that needs no token: a login
    report_body: int = 16 * 1024 * 1024  # one upload of journal records
    blob: int = 64 * 1024**3  # one blob
    free_disk: int = 64 * 1024**2  # less than this on the disk: uploads are refused, so that the database lives on
    blob_grace: float = 86_400.0  # a blob that nothing uses is kept so long after it was sent or asked for
    upload_age: float = 8 * 86_400.0  # an upload to which nothing was added for so long is thrown away
    sweep_every: float = 600.0  # between two rounds of that
    deployments: int = 10_000  # of one experiment
    experiments: int = 10_000  # of one user
    infrastructures: int = 100  # of one user
    user_bytes: int = 1024**4  # of one user's blobs together: code, inputs, artifacts
    events: int = 1_000_000  # of one experiment
    artifacts: int = 100_000  # of one experiment
    log_pace: float = 8 * 1024**2  # bytes a second of one deployment's logs, on average
    log_burst: float = 64 * 1024**2  # bytes of one deployment's logs at once
    page: int = 1_000  # entries of one answer
    page_bytes: int = 8 * 1024 * 1024  # records or events of one answer, together; the first always fits
    wait: float = 60.0  # one long-poll
    keep_alive: float = 15.0  # between two signs of life of a stream of events, and two looks at its token
    drain_for: float = 7 * 86_400.0  # after the end of a deployment its executor may deliver what is left
    head_seconds: float = 20.0  # the head of a request has so long to arrive
    head_bytes: int = 64 * 1024  # the head of a request
    body_silence: float = 60.0  # a body that brings nothing for so long is given up
    body_pace: float = 128.0  # bytes a second that a body brings at the least, on average from body_silence on


def limits_of(words: Sequence[str]) -> Limits:
    """The limits with those changed that ``words`` name, each like ``experiments=500``.

    Raises:
        ConfigurationError: there is no such limit, or that is no positive number.
    """
    changed: dict[str, float] = {}
    known = {field.name: float if isinstance(field.default, float) else int for field in fields(Limits)}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise ConfigurationError(f"There is no limit {name!r}.", advice=f"There are: {', '.join(known)}.")
        try:
            changed[name] = known[name](text)
        except ValueError:
            changed[name] = 0
        if not changed[name] > 0:
            raise ConfigurationError(f"--limit {word}: it must be a number above zero, like {name}=1000.")
    return replace(Limits(), **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the director keeps its data, where it listens, and what it allows.

    ``database_url`` is a PostgreSQL database, which several directors may share, instead of a file in the data folder.
    ``blobs_url`` is a bucket (``s3://bucket/prefix``, at ``blobs_endpoint`` if it is not Amazon's) for complete blobs.
    ``behind_proxy``: something in front of it does TLS. ``certificate`` and ``key`` are PEM files; ``ca`` is
    that of a CA which nodes do not trust by themselves: executors are given it. ``advertise`` is the URL at which
    executors reach it; None: the one it listens at. ``bootstrap`` names an admin who is made, with a token in the data
    folder, if not there yet. ``ephemeral``: when it stops it ends every run first, and leaves no data.
    ``allowed_addresses``: networks that connectors dial for everybody, although ``addresses`` would refuse them.
    ``open_files``: the limit of open files that what it starts gets (``descriptors``); None: its own.
    """

    data: Path
    host: str = "127.0.0.1"
    port: int = 8420
    certificate: Path | None = None
    key: Path | None = None
    ca: Path | None = None
    behind_proxy: bool = False
    advertise: str | None = None
    bootstrap: str | None = None
    ephemeral: bool = False
    allowed_addresses: tuple[str, ...] = ()
    database_url: str | None = None
    blobs_url: str | None = None
    blobs_endpoint: str | None = None
    proxies: tuple[str, ...] = ("127.0.0.1", "::1")  # from which X-Forwarded-For is believed, with behind_proxy
    stop_delay: float = 0.0  # seconds between /readyz saying no and the end: a balancer has to notice
    open_files: int | None = None
    stop_after: float = 10.0  # seconds that open requests have to end when it stops
    limits: Limits = field(default_factory=Limits)

    @property
    def database(self) -> Path:
        """The database file; it is there unless ``database_url`` is given."""
        return self.data / "director.db"

    @property
    def name_file(self) -> Path:
        """The name under which directors that share a database know the one that has this folder."""
        return self.data / "name"

    @property
    def key_file(self) -> Path:
        """The secret from which the keys are derived; keep it out of the database's backups."""
        return self.data / "secret.key"

    @property
    def blobs(self) -> Path:
        """The folder of partial uploads and, unless ``blobs_url`` is given, of complete blobs."""
        return self.data / "blobs"

    @property
    def complete_blobs(self) -> Path:
        """The folder of complete blobs, unless ``blobs_url`` is given."""
        return self.blobs / "complete"

    @property
    def executable(self) -> Path:
        """The executor as one file."""
        return self.data / "fieldlab.pyz"

    @property
    def connectors(self) -> Path:
        """The folder of the connectors' own folders."""
        return self.data / "connectors"

    @property
    def token_file(self) -> Path:
        """The token of the user that ``bootstrap`` names."""
        return self.data / "token"

    @property
    def lock(self) -> Path:
        """Locked for as long as a director has this folder."""
        return self.data / "director.lock"

    @property
    def scheme(self) -> str:
        """``https`` or ``http``."""
        return "https" if self.certificate else "http"

    @property
    def log(self) -> Path:
        """The director's own log: JSON, a line an entry."""
        return self.data / "director.log"
