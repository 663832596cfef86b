"""One job in a child, from being handed over until the child and everything that it left behind is gone.

An attempt owns the child's socket and output pipes. It ends once: when the spawner has reaped the child and no orphan
bears its mark any more (``processes``); what a child leaves behind is killed. A child that can prove that it never had
a process below it says so with its result, after it has closed its descriptors, and is not waited for. Whether it was a
success is for the supervisor to judge from what stands here: the result frame, if one came, and the exit.

Output is passed on in whole lines, at most ``CHUNK`` characters and every ``FLUSH`` seconds: a step that prints
without end wakes the supervisor no more than that often for its journal.
"""

from __future__ import annotations

import codecs
import os
import signal
from collections.abc import Callable, Collection, Iterable
from typing import Any, Protocol

from fieldlab_common.errors import InvalidMessage

from fieldlab_executor import frames, processes
from fieldlab_executor.eventlog import Waiter
from fieldlab_executor.instructions import Evaluate, Key
from fieldlab_executor.loop import Loop, Timer
from fieldlab_executor.pool import Exit, Taker, Warm
from fieldlab_executor.secrets import Secrets

__all__ = ["Attempt", "Host", "Output"]

CHUNK = 32 * 1024
FLUSH = 0.2
LAST = 8 * 1024  # characters of its end that are kept
ENDING = 5.0  # seconds for what is left behind to be gone, once it was killed
_READ = 65536
_LAST_READS = 64  # of what is still in a pipe when the child is gone


class Host(Protocol):
    """Whom an attempt tells."""

    secrets: Secrets

    def waits(self, attempt: Attempt, waits: bool) -> None:
        """The child only waits for an event or a barrier, or no more."""

    def requested(self, attempt: Attempt, header: dict[str, Any]) -> None:
        """The child asks for something."""

    def said(self, attempt: Attempt, stream: str, text: str) -> None:
        """The child wrote something."""

    def over(self, attempt: Attempt) -> None:
        """The child and everything it left behind is gone."""


class Output:
    """Turns what comes from a pipe into chunks of text. ``held``: how many characters at an end wait for more."""

    __slots__ = ("_decoder", "_emit", "_held", "_loop", "_text", "_timer", "last")

    def __init__(self, loop: Loop, emit: Callable[[str], None], held: Callable[[str], int]) -> None:
        self._loop = loop
        self._emit = emit
        self._held = held
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._timer: Timer | None = None
        self.last = ""  # the end of it all

    def feed(self, data: bytes) -> None:
        """Take in what was read."""
        self._text += self._decoder.decode(data)
        while len(self._text) >= CHUNK:
            self._cut(self._text.rfind("\n", 0, CHUNK) + 1 or CHUNK - self._held(self._text[:CHUNK]))
        if self._text and self._timer is None:
            self._timer = self._loop.after(FLUSH, self._due)

    def close(self) -> None:
        """Pass on what is left."""
        self._text += self._decoder.decode(b"", True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._text:
            self._cut(len(self._text))

    def _due(self) -> None:
        self._timer = None
        self._cut(self._text.rfind("\n") + 1 or len(self._text) - self._held(self._text))
        if self._text:
            self._timer = self._loop.after(FLUSH, self._due)

    def _cut(self, length: int) -> None:
        text, self._text = self._text[:length], self._text[length:]
        if text:
            self.last = (self.last + text)[-LAST:]
            self._emit(text)


class Attempt:
    """``number`` is that of its job; ``key`` is the attempt's, and ``question`` what it answers instead, if it is none.

    ``shared``: it runs in a worker.
    """

    def __init__(
        self, loop: Loop, host: Host, number: int, key: Key, *, shared: bool, question: Evaluate | None = None
    ) -> None:
        self._loop = loop
        self._host = host
        self.number = number
        self.key = key
        self.shared = shared
        self.question = question
        self.folder = ""  # that was lent to it
        self.child: Warm | None = None
        self.exit: Exit | None = None
        self.early = False  # it was over before its child had been reaped
        self.worker: Warm | None = None  # which waits for its next job
        self.disturbed = False  # it was told to stop, and may not have heard of it when it answers
        self.result: dict[str, Any] | None = None
        self.data = b""
        self.fault = ""  # what the child said that is no frame
        self.killed = False  # by the supervisor
        self.over = ""  # why it was ended for want of memory
        self.started = 0.0
        self.artifacts: dict[str, None] = {}
        self.waiters: dict[int, Waiter] = {}
        self.questions: dict[int, dict[str, Any]] = {}
        self.left_behind = 0
        self.survivors: list[int] = []
        self.timer: Timer | None = None
        self.deadline: Timer | None = None
        self.taker: Taker | None = None  # it waits for a child
        self.note = ""  # why there never was an exit
        self._known: set[int] = set()  # descendants seen when it was killed
        self._out = bytearray()
        self._crowded = False  # it waits for room in the socket
        self._unpacker = frames.Unpacker()
        self._streams: dict[int, Output] = {}

    @property
    def pid(self) -> int:
        """The child's, or 0."""
        return self.child.pid if self.child is not None else 0

    @property
    def errors(self) -> str:
        """The end of what it wrote to standard error."""
        output = self._streams.get(self.child.err) if self.child is not None else None
        return output.last if output is not None else ""

    @property
    def cut(self) -> int:
        """How many bytes of a message came that never became whole."""
        return self._unpacker.pending

    # --- while it runs

    @property
    def subject(self) -> Key | int:
        """What the supervisor knows it by: its key, or the number of its question."""
        return self.key if self.question is None else self.question.id

    def begin(self, child: Warm, job: frames.Job) -> None:
        """Hand the job to the child."""
        self.child = child
        child.begin(self)
        self.write(job)

    def write(self, header: dict[str, Any] | frames.Job) -> None:
        """Send a frame to the child, as soon as it takes it."""
        if self.child is None or self.exit is not None:
            return
        waits = bool(self._out)
        self._out += frames.tell(header)
        if not waits:
            self._flush()

    def _flush(self) -> None:
        """Write what the socket takes; the rest when there is room again."""
        child = self.child
        if child is None:
            return
        try:
            while self._out:
                del self._out[: os.write(child.sock, self._out)]
        except BlockingIOError:
            pass
        except OSError:  # the child has closed its end: its exit follows
            self._out.clear()
        if bool(self._out) != self._crowded and self._loop.watches(child.sock):
            self._crowded = bool(self._out)
            self._loop.watch_room(child.sock, self._flush if self._crowded else None)

    def answered(self) -> None:
        """The child has written to its socket."""
        self._read()

    def printed(self, fd: int) -> None:
        """The child has written to its output."""
        self._drain(fd, 1)

    def _read(self) -> bool:
        """Read once from the socket; whether there may be more."""
        child = self.child
        if child is None or not self._loop.watches(child.sock):
            return False
        try:
            data = os.read(child.sock, _READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._loop.unwatch(child.sock)
            return False
        try:
            for header, body in self._unpacker.feed(data):
                self._take(header, body)
        except InvalidMessage as error:
            self.fault = str(error)
            self._loop.unwatch(child.sock)
            self.kill()
        if self.result is not None and "usage" in self.result and self.exit is None:
            if self.shared and self.disturbed:
                self.kill()  # what was sent to it must not hit its next job
            else:
                self._end_early(child)
            return False
        return True

    def _end_early(self, child: Warm) -> None:
        """The child has left nothing behind, and ends, or waits for its next job: it is not waited for."""
        try:
            cpu, peak = self.result["usage"] if self.result else (0, 0)  # microseconds, KiB
            self.exit, self.early = Exit(child.pid, 0, int(cpu) / 1e6, int(peak) * 1024), True
        except (TypeError, ValueError):  # not what our code sends; its exit will tell
            return
        self._drain_all(child)
        if self.shared:
            self.worker = child
        self._finish()
        self._host.over(self)

    def _take(self, header: dict[str, Any], body: bytes) -> None:
        if header.get("op") == "result":
            self.result, self.data = header, body
        elif self.result is None:
            self._host.requested(self, header)

    def _drain_all(self, child: Warm) -> None:
        for fd in child.news():
            if fd != child.sock and self._loop.watches(fd):
                self._drain(fd, _LAST_READS)

    def _drain(self, fd: int, reads: int) -> None:
        for _ in range(reads):
            try:
                data = os.read(fd, _READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.unwatch(fd)
                return
            self._output(fd).feed(data)

    def _output(self, fd: int) -> Output:
        if fd not in self._streams:
            stream = "stdout" if self.child is not None and fd == self.child.out else "stderr"
            host = self._host
            self._streams[fd] = Output(self._loop, lambda text: host.said(self, stream, text), host.secrets.held)
        return self._streams[fd]

    # --- stopping it

    def members(self) -> list[int]:
        """Every process of the attempt that is alive."""
        if not self.pid:
            return []
        table = processes.processes()
        found = {one.pid for one in processes.descendants(self.pid, table)}
        if self.pid in table and table[self.pid].alive:
            found.add(self.pid)
        found |= {one.pid for one in table.values() if one.alive and processes.marked(one, self.pid)}
        return sorted(found)

    def stop(self, number: int | None) -> int:
        """Say that it is to stop, and send a signal to all of its processes unless None; how many got it."""
        self.disturbed = True
        self.write({"op": "stop"})
        return 0 if number is None else processes.send(self.members(), number)

    def kill(self) -> int:
        """End all of its processes now; how many there were."""
        self.killed = self.disturbed = True
        members = self.members()
        self._known.update(members)
        return processes.send(members, signal.SIGKILL)

    # --- its end

    def exited(self, exit_: Exit, alone: bool, keepers: Collection[int] = ()) -> bool:
        """The spawner reaped a process. Whether the attempt is over.

        ``alone``: no other attempt runs. ``keepers``: pids of attempts whose processes outlive them.
        """
        if exit_.pid == self.pid:
            self.exit = exit_
            self._last_words()
        if self.exit is None or self.child is None:
            return False
        left = [pid for pid in exit_.orphans if self._is_mine(pid, alone, keepers)]
        if left:
            self._end_leftovers(left)
            return False
        self._finish()
        return True

    def _is_mine(self, pid: int, alone: bool, keepers: Collection[int]) -> bool:
        """Whether an orphan is to be ended with this attempt."""
        if pid in self._known:
            return True
        if alone and not keepers:
            return True
        one = processes.process(pid)
        if one is None or any(processes.marked(one, keeper) for keeper in keepers):
            return False
        return alone or processes.marked(one, self.pid)

    def _end_leftovers(self, left: Iterable[int]) -> None:
        table = processes.processes()
        found = set(left)
        for pid in left:
            found.update(one.pid for one in processes.descendants(pid, table))
        self.left_behind += len(found - self._known)
        self._known |= found
        processes.send(found, signal.SIGKILL)
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self._loop.after(ENDING, self._give_up)

    def _give_up(self) -> None:
        """What was killed is still there: it cannot be waited for any longer, and is reported."""
        self.survivors = [pid for pid in self._known if (one := processes.process(pid)) is not None and one.alive]
        self._finish()
        self._host.over(self)

    def _last_words(self) -> None:
        """Take in what the child wrote before it ended."""
        if self.child is None:
            return
        while self._read():
            pass
        self._drain_all(self.child)

    def abandon(self, note: str) -> None:
        """The spawner is gone, and nobody will ever tell of an exit: let go of the child."""
        self.note = note
        self._last_words()
        self._finish()

    def _finish(self) -> None:
        child = self.child
        if self.timer is not None:
            self.timer.cancel()
        if child is None:
            return
        for output in self._streams.values():
            output.close()
        if self.worker is None:
            child.close()
        else:
            child.job = None
