"""Live progress of a run: what changed, and the tail of the log.

In a terminal, with rich installed, a table that is redrawn; in a notebook one that is replaced; elsewhere, in a file, a
pipe or a dumb terminal, one line for each change. Watching only reads: to stop watching changes nothing.
"""

from __future__ import annotations

import html
import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from fieldlab_common.lifecycle import DeploymentState, ExperimentState, StepState
from fieldlab_common.protocol import ExperimentInfo

from fieldlab.logs import LogLine
from fieldlab.results import DeploymentResults, Results
from fieldlab.standing import waiting
from fieldlab.text import clean, duration, html_table, instant, one_line

if TYPE_CHECKING:
    from fieldlab.runs import Run

__all__ = ["watch"]

LOOK = 0.5  # seconds between two looks at most
TAIL = 10  # log lines below the table
MOST_ROWS = 100  # deployments in a table that is redrawn; the rest is counted

Feed = Callable[[bool], Iterable[LogLine]]


class View(Protocol):
    """One way to show progress."""

    def show(self, results: Results, lines: Iterable[LogLine]) -> None:
        """Show how it stands, and new log lines."""

    def close(self, note: str) -> None:
        """Show a last remark, if there is one, and leave the terminal as it was."""


def watch(
    run: Run, feed: Feed | None, *, file: TextIO | None = None, detach: bool = True, until: float | None = None
) -> ExperimentState:
    """Show the run until it ends, or Ctrl-C if ``detach``, or the monotonic time ``until``; the state then reached."""
    view, note = _view(file), ""
    state, wait = ExperimentState.PREPARING, 0.0
    try:
        while not state.terminal and (until is None or time.monotonic() < until):
            results = run.refresh(wait)
            state, wait = results.info.state, LOOK
            view.show(results, feed(state.terminal) if feed is not None else ())
    except KeyboardInterrupt:
        if not detach:
            raise
        note = f"No longer watching; {run.name!r} is {state.value} and goes on: run.watch(), run.cancel()."
    except BrokenPipeError:
        return state  # who read it has gone (`| head`): there is nobody left to show anything to
    finally:
        view.close(note)
    return state


def _view(file: TextIO | None) -> View:
    out = file if file is not None else sys.stdout
    if file is None and (display := _notebook()) is not None:
        return Cell(display)
    plain = os.environ.get("TERM") == "dumb" or not out.isatty()
    if plain or importlib.util.find_spec("rich") is None:
        return Lines(out)
    return Screen(out)


def _notebook() -> Any:
    """IPython's ``display`` module if this is a notebook, else None. Nothing is imported that is not there already."""
    shell = sys.modules.get("IPython")
    if shell is None or not hasattr(shell.get_ipython(), "kernel"):
        return None
    return importlib.import_module("IPython.display")


class Lines:
    """One line for each change."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._states: dict[tuple[str, str], str] = {}
        self._over: set[tuple[str, str]] = set()  # steps that have ended: nothing of them changes any more

    def show(self, results: Results, lines: Iterable[LogLine]) -> None:
        """Write what changed since the last time."""
        self._changed("", "", f"{one_line(results.info.name)} is {_state(results.info)}")
        for name in results:
            one = results[name]
            why = f": {one_line(one.message, 200)}" if one.message and one.state.terminal else ""
            self._changed(name, "", f"{one_line(name)} is {one.state.value}{why}")
            for step in one.walk():
                if (name, step.name) not in self._over and step.status is not StepState.WAITING:
                    self._changed(name, step.name, repr(step).strip("<>"))
                    if step.status.terminal:
                        self._over.add((name, step.name))
                        del self._states[name, step.name]
        for line in lines:
            self._write(str(line))
        self._out.flush()

    def _changed(self, deployment: str, step: str, text: str) -> None:
        if self._states.get((deployment, step)) != text:
            self._states[deployment, step] = text
            self._write(f"{instant(time.time())}  {text}")

    def _write(self, text: str) -> None:
        coding = getattr(self._out, "encoding", None) or "utf-8"
        self._out.write(text.encode(coding, "backslashreplace").decode(coding) + "\n")

    def close(self, note: str) -> None:
        """Write the note."""
        if note:
            self._write(note)
            self._out.flush()


class Cell:
    """A table in the output of a notebook's cell, replaced as it changes, with the tail of the log below."""

    def __init__(self, display: Any) -> None:
        self._html = display.HTML
        self._handle = display.display(self._html(""), display_id=True)
        self._tail: deque[LogLine] = deque(maxlen=TAIL)
        self._table = ""
        self._shown = ""

    def show(self, results: Results, lines: Iterable[LogLine]) -> None:
        """Replace what is shown, if it is another."""
        self._tail.extend(lines)
        caption = f"{results.info.name}: {_state(results.info)}"
        self._table = html_table(_HEADER, _rows(results), caption=caption)
        self._update("")

    def _update(self, note: str) -> None:
        tail = "\n".join(html.escape(str(line)) for line in self._tail)
        page = f"{self._table}<pre>{tail}</pre>" + (f"<p>{html.escape(note)}</p>" if note else "")
        if page != self._shown:
            self._shown = page
            self._handle.update(self._html(page))

    def close(self, note: str) -> None:
        """Leave the last picture standing, with the note below."""
        if note:
            self._update(note)


class Screen:
    """A table that is redrawn, with the tail of the log below."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=out)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._tail: deque[LogLine] = deque(maxlen=TAIL)
        self._live.start()

    def show(self, results: Results, lines: Iterable[LogLine]) -> None:
        """Redraw."""
        from rich.console import Group
        from rich.text import Text

        self._tail.extend(lines)
        tail = [Text(str(line), overflow="ellipsis", no_wrap=True) for line in self._tail]
        self._live.update(Group(self._table(results), *tail))

    def _table(self, results: Results) -> Any:
        from rich.table import Table
        from rich.text import Text

        title = f"{one_line(results.info.name)}: {_state(results.info)}"
        made = Table(title=Text(title), title_justify="left", expand=False)
        for header in _HEADER:
            made.add_column(header)
        for row in _rows(results):
            made.add_row(*(Text(clean(cell)) for cell in row))
        return made

    def close(self, note: str) -> None:
        """Leave the last picture standing."""
        self._live.stop()
        if note:
            self._console.print(note, markup=False, highlight=False)


def _state(info: ExperimentInfo) -> str:
    return ", and ".join(filter(None, (info.state.value, waiting(info))))


_HEADER = ("deployment", "node", "state", "steps", "now", "for")


def _rows(results: Results) -> list[list[str]]:
    """A row for each deployment; of very many, those that have ended well are left out first."""
    names = list(results)
    if len(names) > MOST_ROWS:
        names.sort(key=lambda name: results[name].state is DeploymentState.SUCCEEDED)
    rows = [_row(results[name]) for name in names[:MOST_ROWS]]
    more = len(names) - MOST_ROWS
    return [*rows, [f"… {more} more", "", "", "", "", ""]] if more > 0 else rows


def _row(one: DeploymentResults) -> list[str]:
    steps = list(one.values())
    done = sum(step.status.terminal for step in steps)
    failed = sum(step.status is StepState.FAILED for step in steps)
    now = one.message if one.state.terminal else ", ".join(one.running)
    count = f"{done}/{len(steps)}" + (f", {failed} failed" if failed else "")
    ended = one.info.ended if one.info.ended is not None else time.time()
    took = duration(max(0.0, ended - one.info.started)) if one.info.started is not None else ""
    return [one_line(one.name), one_line(one.info.node), one.state.value, count, one_line(now), took]
