"""What tasks need and nobody else may see: stored with the director, and never read back."""

from __future__ import annotations

from fieldlab_common import protocol as p
from fieldlab_common.step import check_name

from fieldlab.text import html_table, instant, table
from fieldlab.transport import Session

__all__ = ["Secrets"]


class _Listed(list[p.SecretInfo]):
    def _rows(self) -> list[list[object]]:
        return [[one.name, instant(one.updated)] for one in self]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self else "no secrets"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("name", "updated")


class Secrets:
    """This user's secrets, by name; tasks get them with ``fl.secret(name)``."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def set(self, name: str, value: str) -> p.SecretInfo:
        """Store a text under ``name``, in place of what was stored there; deployments that start later get it.

        Raises:
            InvalidRequest: it is empty or longer than 16,384 characters, or there are too many.
        """
        path = {"secret": check_name(name, "a secret")}
        return self._session.call("put_secret", p.SecretInfo, path=path, body=p.SecretValue(value=value))

    def list(self) -> list[p.SecretInfo]:
        """What is stored: names and times, no texts."""
        return _Listed(self._session.call("secrets", p.SecretList).secrets)

    def delete(self, name: str) -> None:
        """Forget a secret. Deployments that have it keep it until they end.

        Raises:
            NotFound: there is none of that name.
        """
        self._session.call("delete_secret", p.Empty, path={"secret": check_name(name, "a secret")})

    def __repr__(self) -> str:
        return repr(self.list())
