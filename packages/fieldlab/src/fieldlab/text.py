"""Text that others wrote, made harmless; and the tables in which it is shown.

Node names, log lines, error texts and event data come from machines that fieldlab does not control. A terminal obeys
escape sequences, a notebook obeys HTML, and a reader is misled by characters that reorder a line. Everything that is
printed passes through ``clean`` (terminal) and also ``html.escape`` (notebook): this is the only place that does it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum

__all__ = ["clean", "closest", "counted", "duration", "html_table", "instant", "listed", "one_line", "size", "table"]

# C0, DEL and C1 controls, surrogates, line separators, and the marks that reorder a line (bidirectional controls).
_HARMFUL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LAYOUT = "\n\t"
_CENTURY = (
    100 * 366 * 86_400.0
)  # seconds; what is beyond, from the epoch or in length, is no time that anybody measured


def _visible(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def clean(text: object, *, lines: bool = False) -> str:
    """``text`` with what a terminal would obey written out as ``\\x1b``; ``lines`` keeps line breaks."""
    raw = str(text.value if isinstance(text, Enum) else text)
    if raw.isprintable():  # nothing harmful is
        return raw
    if not lines:
        return _HARMFUL.sub(_visible, raw)
    raw = raw.replace("\r\n", "\n")
    return _HARMFUL.sub(lambda m: m[0] if m[0] in _LAYOUT else _visible(m), raw)


def one_line(text: object, width: int = 60) -> str:
    """``text`` in one harmless line of at most ``width`` characters."""
    raw = str(text.value if isinstance(text, Enum) else text)
    flat = clean(" ".join(raw[: 4 * width].split()))
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, width: int = 60) -> str:
    """A plain table for a terminal; cells are cut at ``width``."""
    cells = [[one_line("" if c is None else c, width) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    lines = [header, ["-" * w for w in widths], *cells]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """The same as HTML, escaped."""

    def row(cells: Sequence[object], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(one_line('' if c is None else c, 400))}</{tag}>" for c in cells)
        return f"<tr>{inner}</tr>"

    title = f"<caption>{html.escape(one_line(caption, 400))}</caption>" if caption else ""
    body = "".join(row(r, "td") for r in rows)
    return f"<table>{title}<thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"


def size(count: float | None) -> str:
    """Bytes for people: ``1.5 MiB``."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds for people: ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds is None:
        return ""
    if not abs(seconds) < _CENTURY:
        return f"{seconds:g} s"
    if seconds < 60:
        return f"{seconds * 1000:.0f} ms" if 0 <= seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def instant(at: float | None) -> str:
    """A time in seconds since the epoch, as local time of day with milliseconds."""
    if at is None:
        return ""
    if not abs(at) < _CENTURY:  # a node may say anything
        return f"{at:g} s"
    moment = datetime.fromtimestamp(at, tz=UTC).astimezone()
    return moment.strftime("%H:%M:%S.") + f"{moment.microsecond // 1000:03d}"


def closest(name: str, known: Iterable[str], likeness: float = 0.5) -> str:
    """``Did you mean 'x'?`` if one of ``known`` is alike (0 to 1), else nothing: for the end of a sentence."""
    import difflib

    found = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" Did you mean {clean(found[0])!r}?" if found else ""


def counted(count: int, word: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def listed(names: Iterable[str] | Mapping[str, object], most: int = 12) -> str:
    """Names for a message: the first few, and how many more there are."""
    known = list(names)
    shown = ", ".join(one_line(n) for n in known[:most])
    return (shown + (f" and {len(known) - most} more" if len(known) > most else "")) or "none"
