"""Live progress of a run: what changed, and the tail of the log.

With rich installed and a terminal, a table that is redrawn; else one line for each change, which is also what a file
or a notebook gets. Watching only reads: to stop watching changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from fieldlab_common.lifecycle import ExperimentState, StepState

from fieldlab.logs import LogLine
from fieldlab.results import DeploymentResults, Results
from fieldlab.text import clean, duration, instant, one_line

if TYPE_CHECKING:
    from fieldlab.runs import Run

__all__ = ["watch"]

LOOK = 0.5  # seconds between two looks at most
TAIL = 10  # log lines below the table

Feed = Callable[[], list[LogLine]]


class View(Protocol):
    """One way to show progress."""

    def show(self, results: Results, lines: list[LogLine]) -> None:
        """Show how it stands, and new log lines."""

    def close(self, note: str) -> None:
        """Show a last remark, if there is one, and leave the terminal as it was."""


def watch(
    run: Run, feed: Feed | None, *, file: TextIO | None = None, detach: bool = True, until: float | None = None
) -> ExperimentState:
    """Show the run until it ends, or Ctrl-C if ``detach``, or the monotonic time ``until``; the state then reached."""
    view, note = _view(file if file is not None else sys.stdout), ""
    state, wait = ExperimentState.PREPARING, 0.0
    try:
        while not state.terminal and (until is None or time.monotonic() < until):
            results = run.refresh(wait)
            state, wait = results.info.state, LOOK
            view.show(results, feed() if feed is not None else [])
    except KeyboardInterrupt:
        if not detach:
            raise
        note = f"No longer watching; {run.name!r} is {state.value} and goes on: run.watch(), run.cancel()."
    finally:
        view.close(note)
    return state


def _view(out: TextIO) -> View:
    plain = os.environ.get("TERM") == "dumb" or not out.isatty()
    if plain or importlib.util.find_spec("rich") is None:
        return Lines(out)
    return Screen(out)


class Lines:
    """One line for each change."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._states: dict[tuple[str, str], str] = {}

    def show(self, results: Results, lines: list[LogLine]) -> None:
        """Write what changed since the last time."""
        self._changed("", "", f"{one_line(results.info.name)} is {results.info.state.value}")
        for name in results:
            one = results[name]
            why = f": {one_line(one.message, 200)}" if one.message and one.state.terminal else ""
            self._changed(name, "", f"{one_line(name)} is {one.state.value}{why}")
            for step in one.walk():
                if step.status is not StepState.WAITING:
                    self._changed(name, step.name, repr(step).strip("<>"))
        for line in lines:
            self._write(str(line))
        self._out.flush()

    def _changed(self, deployment: str, step: str, text: str) -> None:
        if self._states.get((deployment, step)) != text:
            self._states[deployment, step] = text
            self._write(f"{instant(time.time())}  {text}")

    def _write(self, text: str) -> None:
        self._out.write(text + "\n")

    def close(self, note: str) -> None:
        """Write the note."""
        if note:
            self._write(note)
        self._out.flush()


class Screen:
    """A table that is redrawn, with the tail of the log below."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=out)
        self._live = Live(console=self._console, refresh_per_second=4, transient=False)
        self._tail: deque[LogLine] = deque(maxlen=TAIL)
        self._live.start()

    def show(self, results: Results, lines: list[LogLine]) -> None:
        """Redraw."""
        from rich.console import Group
        from rich.text import Text

        self._tail.extend(lines)
        tail = [Text(str(line), overflow="ellipsis", no_wrap=True) for line in self._tail]
        self._live.update(Group(self._table(results), *tail))

    def _table(self, results: Results) -> Any:
        from rich.table import Table
        from rich.text import Text

        title = f"{one_line(results.info.name)}: {results.info.state.value}"
        made = Table(title=Text(title), title_justify="left", expand=False)
        for header in ("deployment", "node", "state", "steps", "now", "for"):
            made.add_column(header)
        for name in results:
            made.add_row(*(Text(clean(cell)) for cell in _row(results[name])))
        return made

    def close(self, note: str) -> None:
        """Leave the last picture standing."""
        self._live.stop()
        if note:
            self._console.print(note, markup=False, highlight=False)


def _row(one: DeploymentResults) -> list[str]:
    steps = list(one.values())
    done = sum(step.status.terminal for step in steps)
    failed = sum(step.status is StepState.FAILED for step in steps)
    now = one.message if one.state.terminal else ", ".join(one.running)
    count = f"{done}/{len(steps)}" + (f", {failed} failed" if failed else "")
    ended = one.info.ended if one.info.ended is not None else time.time()
    took = duration(max(0.0, ended - one.info.started)) if one.info.started is not None else ""
    return [one_line(one.name), one_line(one.info.node), one.state.value, count, one_line(now), took]
