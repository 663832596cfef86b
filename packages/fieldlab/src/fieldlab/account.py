"""Logging in, and the user's own tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime

from fieldlab_common import accounts as a
from fieldlab_common import protocol as p
from fieldlab_common.environment import parse_duration
from fieldlab_common.errors import ConfigurationError, DefinitionError

from fieldlab.text import html_table, instant, table
from fieldlab.transport import Session

__all__ = ["Tokens", "ask_password", "until"]


def until(expires: float | None) -> str | None:
    """When a token expires, for people; None: never."""
    return None if expires is None else f"{datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M} UTC"


def ask_password(prompt: str, *, asked: Callable[[str], str] | None = None) -> str:
    """Ask whoever sits at the keyboard, in a terminal or a notebook, without showing what is typed.

    Raises:
        ConfigurationError: nobody can be asked.
    """
    import getpass

    if asked is None and not (sys.stdin is not None and sys.stdin.isatty()) and "ipykernel" not in sys.modules:
        raise ConfigurationError(
            "There is nobody to ask for a password here.", advice="Give password=, or a token instead of logging in."
        )
    return (asked or getpass.getpass)(prompt)


class _Listed(list[a.TokenInfo]):
    def _rows(self) -> list[list[object]]:
        return [
            [one.id, one.scope, one.label, "login" if one.login else "", instant(one.created), until(one.expires)]
            for one in self
        ]

    def __repr__(self) -> str:
        return table(_HEADER, self._rows()) if self else "no tokens"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, self._rows())


_HEADER = ("id", "scope", "label", "made by", "created", "expires")


class Tokens:
    """This user's tokens: for scripts and machines, and those that logins made."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, label: str = "", *, scope: str = "run", expires: float | str | None = "90d") -> a.NewToken:
        """Make a token. ``.token`` of what is returned is its text: keep it, for nobody can show it again.

        ``scope``: ``"read"`` looks, ``"run"`` runs experiments, ``"admin"`` may all that this user may. ``expires`` is
        how long it is good for, in seconds or like ``"90d"``; None: until it is revoked.

        Raises:
            DefinitionError: no such scope, or no duration. PermissionDenied: this client's token is not of scope admin.
        """
        try:
            wanted = a.Scope(scope)
        except ValueError:
            raise DefinitionError(f"scope={scope!r}: it is one of {', '.join(a.Scope)}.") from None
        lasts = None if expires is None else parse_duration(expires)
        body = a.CreateToken(label=label, scope=wanted, expires_in=lasts)
        return self._session.call("create_token", a.NewToken, body=body)

    def list(self) -> list[a.TokenInfo]:
        """The tokens that are good, the newest first, without their texts."""
        return _Listed(self._session.call("tokens", a.TokenList).tokens)

    def revoke(self, token_id: str) -> None:
        """End a token, by the id that ``list`` shows. It is refused from then on, everywhere.

        Raises:
            NotFound: there is none of that id.
        """
        self._session.call("revoke_token", p.Empty, path={"token": token_id})

    def __repr__(self) -> str:
        return repr(self.list())
