"""The session with the director, against a director in memory that can be away, slow or wrong."""

import contextlib
import errno
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fieldlab_common import errors as e
from fieldlab_common.events import Event
from fieldlab_common.node import Node
from fieldlab_common.protocol import (
    PROBLEM,
    Ack,
    BlobStatus,
    CancelDeployment,
    Claim,
    ClaimRequest,
    DeploymentSpec,
    Lane,
    Poll,
    Problem,
    Record,
    Refusal,
    Tagged,
)
from fieldlab_common.wire import dumps, loads, unframe
from fieldlab_executor.journal import Files, Journal, JournalError
from fieldlab_executor.link import (
    Acked,
    ArtifactFailed,
    ArtifactStored,
    CancelArrived,
    EventsArrived,
    Item,
    Link,
    LinkFailed,
    Pace,
    pause,
)
from fieldlab_executor.recall import Recall, Recalled
from fieldlab_executor.transport import Answer, FileBody, Sink

CONTROL, BULK = Lane.CONTROL, Lane.BULK
DEADLINE = 20.0
DAY = 1_000_000 if os.environ.get("FIELDLAB_TEST_LONG") else 150_000  # log records
JSON = {"content-type": "application/json"}
SPEC = DeploymentSpec(name="d", node="n", environment=Tagged(kind="host"), graph="g")


class Director:
    """Answers as a director does; ``faults`` are raised, or answered, first, by endpoint."""

    chunk = 10

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.records: dict[str, dict[int, bytes]] = {"control": {}, "bulk": {}}
        self.batches: list[tuple[str, int]] = []
        self.refuse: set[int] = set()
        self.limit = 1 << 40  # bytes of a body that a proxy before it lets through
        self.missing: tuple[str, ...] = ()
        self.acked_floor: int | None = None
        self.announced: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.events: list[Event] = []
        self.cancel: CancelDeployment | None = None
        self.faults: dict[str, list[Exception | Answer]] = {}
        self.asked: list[str] = []
        self.waits: list[float] = []  # that polls asked for
        self.answers: list[str] = []
        self.recall: Recall | None = None
        self.after_chunk: Callable[[], None] = lambda: None
        self.away = False
        self.closed = False

    def request(
        self,
        endpoint: str,
        *,
        path: Mapping[str, str] | None = None,
        query: Mapping[str, str | int | float] | None = None,
        body: bytes | FileBody | None = None,
        timeout: float,
        start: int = 0,
        sink: Sink | None = None,
        recall: Recall | None = None,
    ) -> Answer:
        if recall is not None:
            recall.arm(threading.get_ident(), self.change)
        with self.lock:
            self.recall = recall
            self.asked.append(endpoint)
            self.lock.notify_all()
            if self.closed or self.away:
                raise e.DirectorUnreachable("away")
            if faults := self.faults.get(endpoint):
                fault = faults.pop(0)
                if isinstance(fault, Exception):
                    raise fault
                return fault
            data = b"".join(body.blocks()) if isinstance(body, FileBody) else body or b""
            if len(data) > self.limit:
                return Answer(status=413, body=b"<html>too large</html>")
            try:
                answer = getattr(self, "on_" + endpoint)(dict(path or {}), dict(query or {}), data, start, sink)
            except e.DirectorError as error:
                return problem(error)
            if recall is not None and recall.done:
                raise Recalled
            self.answers.append(endpoint)
        if isinstance(answer, Answer):
            return answer
        return Answer(status=200, headers=JSON, body=dumps(answer), sent=10, received=5)

    def on_claim(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> Claim:
        return Claim(experiment_id="e", experiment="x", deployment=SPEC, node=Node(name="n"), server_time=1000.0)

    def on_report(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> Ack:
        lane = self.records[query["lane"]]
        frames = list(unframe(body))
        self.batches.append((query["lane"], len(frames)))
        refused = [n for n, _, _ in frames if n in self.refuse]
        lane.update({number: record for number, record, _ in frames if number not in self.refuse})
        acked = frames[-1][0] if self.acked_floor is None else self.acked_floor
        refusals = tuple(Refusal(number=n, message="no") for n in refused)
        return Ack(acked=acked, refusals=refusals, missing=self.missing)

    def on_poll(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> Poll:
        recall = self.recall

        def news() -> bool:
            recalled = recall is not None and recall.done
            news = len(self.events) > query["after"] or self.cancel is not None
            return self.closed or self.away or recalled or news

        self.waits.append(query["wait"])
        self.lock.wait_for(news, min(query["wait"], DEADLINE))
        if self.closed:
            raise e.DirectorUnreachable("closed")
        events = tuple(self.events[query["after"] :])
        return Poll(events=events, cursor=query["after"] + len(events), cancel=self.cancel)

    def on_blob_status(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> BlobStatus:
        digest = path["digest"]
        if digest not in self.announced:
            raise e.NotFound("There is no such blob.")
        part = self.parts.get(digest, b"")
        return BlobStatus(digest=digest, offset=len(part), complete=digest in self.blobs)

    def on_put_blob(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> BlobStatus:
        digest, offset, size = path["digest"], query["offset"], query["size"]
        part = self.parts.get(digest, b"")
        if offset > len(part):
            raise e.BlobMismatch("beyond", details={"offset": len(part)})
        part = self.parts[digest] = part[:offset] + body
        if len(part) == size:
            if hashlib.sha256(part).hexdigest() != digest:
                self.parts.pop(digest)
                raise e.BlobMismatch("other bytes", details={"offset": 0})
            self.blobs[digest] = part
        self.lock.notify_all()
        self.after_chunk()
        return BlobStatus(digest=digest, offset=len(part), complete=digest in self.blobs)

    def on_get_blob(self, path: Any, query: Any, body: bytes, start: int, sink: Sink) -> Answer:
        data = self.blobs.get(path["digest"])
        if data is None:
            raise e.NotFound("There is no such blob.")
        sink(start, data[start : start + 10])
        if start + 10 < len(data):
            raise e.DirectorUnreachable("cut")
        return Answer(status=206)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify_all()

    def seen(self, endpoint: str, times: int) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: self.asked.count(endpoint) >= times, DEADLINE)

    def change(self, **values: Any) -> None:
        with self.lock:
            for name, value in values.items():
                setattr(self, name, value)
            self.lock.notify_all()


class Shredder(Director):
    """Takes every record, counts it, and keeps none."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = self.gaps = self.through = 0

    def on_report(self, path: Any, query: Any, body: bytes, start: int, sink: Any) -> Ack:
        for number, record, _ in unframe(body):
            gap = loads(Record, record).body if record.startswith(b'{"kind":"gap"') else None
            assert (gap["first"] if gap else number) == self.through + 1
            self.taken += gap is None
            self.gaps += number - self.through if gap else 0
            self.through = number
        return Ack(acked=self.through)


def on_disk(folder: Path) -> int:
    """The bytes of all files, some of which may go while they are counted."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def problem(error: e.DirectorError) -> Answer:
    body = Problem(title=error.code, status=error.status, code=error.code, detail=error.message, details=error.details)
    return Answer(status=error.status, headers={"content-type": PROBLEM}, body=dumps(body))


class Stage:
    """A link, its journal, a director, and what the link told."""

    def __init__(self, path: Path, **pace: Any) -> None:
        self.director = Director()
        self.journal = Journal(str(path / "journal"), segment_bytes=200)
        self.items: queue.Queue[Item] = queue.Queue()
        self.kept: list[Item] = []
        values = {"first": 0.001, "most": 0.01, "bulk_every": 0.0, "wait": DEADLINE, "idle": 0.001, **pace}
        self.link = Link(self.director, self.journal, self.items.put, pace=Pace(**values))

    def write(self, lane: Lane, count: int) -> None:
        for _ in range(count):
            self.journal.append(lane, b"record")
        assert self.journal.sync(DEADLINE)

    def next(self, kind: type) -> Any:
        """The next item of that kind."""
        while not isinstance(item := self.items.get(timeout=DEADLINE), kind):
            self.kept.append(item)
        return item

    def acked(self, lane: Lane, number: int) -> None:
        while (item := self.next(Acked)).lane is not lane or item.number < number:
            pass

    def file(self, path: Path, data: bytes) -> str:
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        self.director.announced[digest] = len(data)
        return digest


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(**pace: Any) -> Stage:
        made.append(Stage(tmp_path, **pace))
        return made[-1]

    yield make
    for stage in made:
        stage.link.close()
        stage.journal.close()


@pytest.fixture
def stage(make: Callable[..., Stage]) -> Stage:
    return make()


def ask_claim(stage: Stage, timeout: float = DEADLINE) -> Claim:
    return stage.link.claim(ClaimRequest(journal_id=stage.journal.id, epoch=1), timeout=timeout)


# --- records ----------------------------------------------------------------------------------------------------------


def test_both_lanes_arrive_whole_and_in_order(stage: Stage) -> None:
    stage.write(CONTROL, 50)
    stage.write(BULK, 50)
    stage.link.start()
    stage.write(CONTROL, 50)
    assert stage.link.drain(DEADLINE)
    assert list(stage.director.records["control"]) == list(range(1, 101))
    assert list(stage.director.records["bulk"]) == list(range(1, 51))
    assert stage.journal.acked(CONTROL) == 100


def test_a_director_that_was_away_gets_everything_once_it_is_back(stage: Stage) -> None:
    stage.director.away = True
    stage.link.start()
    stage.write(CONTROL, 20)
    stage.director.seen("report", 10)
    stage.director.change(away=False)
    stage.acked(CONTROL, 20)
    assert list(stage.director.records["control"]) == list(range(1, 21))


def test_pauses_grow_to_a_bound_are_spread_and_respect_what_the_director_asks_for() -> None:
    pace = Pace(first=0.2, most=15.0)
    assert [round(pause(pace, failures, 1.0), 1) for failures in range(9)] == [
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
        6.4,
        12.8,
        15,
        15,
    ]
    assert pause(pace, 10**6, 1.0) == 15.0  # for days
    assert (pause(pace, 8, 0.0), pause(pace, 8, 0.5)) == (0.0, 7.5)
    assert [pause(pace, 8, 0.0, asked) for asked in (5, 3600, "soon", None)] == [5.0, 60.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "fault",
    [
        e.DirectorTimeout("slow"),
        e.BadAnswer("half of it"),
        Answer(status=503, body=b"<html>starting</html>"),
        Answer(status=200, headers=JSON, body=b'{"acked": "many"}'),
        Answer(status=200, body=b"<html>Please log in to the hotel's network</html>"),
        Answer(status=403, headers={"content-type": "text/html"}, body=b"captive"),
        problem(e.InternalError("oops")),
        problem(e.RateLimited("slow down", details={"retry_after": 0.001})),
        Answer(status=418, headers={"content-type": PROBLEM}, body=b'{"code": 3}'),
        Answer(status=400, headers={"content-type": PROBLEM}, body=b'{"title": "t", "status": 400, "code": "newer"}'),
    ],
)
def test_no_answer_but_the_directors_own_word_ends_the_link(stage: Stage, fault: Exception | Answer) -> None:
    stage.director.faults["report"] = [fault] * 3
    stage.link.start()
    stage.write(CONTROL, 3)
    stage.acked(CONTROL, 3)


@pytest.mark.parametrize("error", [e.ClaimRefused("another's"), e.AuthenticationError("revoked")])
def test_a_refused_claim_or_token_stops_it_and_is_told_once(stage: Stage, error: e.DirectorError) -> None:
    stage.director.faults["report"] = [problem(error)] * 99
    stage.director.faults["poll"] = [problem(error)] * 99
    stage.link.start()
    stage.write(CONTROL, 3)
    assert isinstance(stage.next(LinkFailed).error, type(error))
    assert not stage.link.drain(DEADLINE)
    stage.link.close()
    assert stage.items.empty()


@pytest.mark.parametrize("endpoint", ["report", "put_blob", "poll"])
def test_when_the_answer_that_everything_arrived_was_lost_the_next_one_says_so_and_it_is_drained(
    stage: Stage, tmp_path: Path, endpoint: str
) -> None:
    stage.director.faults[endpoint] = [problem(e.Drained("The director has everything."))] * 9
    stage.write(CONTROL, 3)
    stage.write(BULK, 3)
    stage.link.upload(stage.file(tmp_path / "t", b"trace"), str(tmp_path / "t"), 5, 3)
    stage.link.start()
    assert stage.link.drain(DEADLINE)
    stage.link.close()
    assert not any(isinstance(item, LinkFailed) for item in stage.items.queue)


def test_a_lost_answer_doubles_nothing(stage: Stage) -> None:
    lost = stage.director.on_report

    def lose(*args: Any) -> Any:
        lost(*args)
        stage.director.on_report = lost  # type: ignore[method-assign]
        raise e.DirectorUnreachable("cut")

    stage.director.on_report = lose  # type: ignore[method-assign]
    stage.write(CONTROL, 3)
    stage.link.start()
    stage.acked(CONTROL, 3)
    assert list(stage.director.records["control"]) == [1, 2, 3]


def test_refusals_are_handed_on_and_hold_nothing_up(stage: Stage) -> None:
    stage.director.refuse = {2}
    stage.write(CONTROL, 3)
    stage.link.start()
    acked = stage.next(Acked)
    assert acked.number == 3
    assert [r.number for r in acked.refusals] == [2]


def test_a_director_that_acknowledges_nothing_is_asked_again_with_pauses(stage: Stage) -> None:
    stage.director.acked_floor = 0
    stage.write(CONTROL, 3)
    stage.link.start()
    stage.director.seen("report", 5)
    stage.director.change(acked_floor=None)
    stage.acked(CONTROL, 3)


@pytest.mark.parametrize("lane", [CONTROL, BULK])
def test_a_record_that_no_proxy_lets_through_is_given_up_visibly_and_holds_up_nothing(
    make: Callable[..., Stage], lane: Lane
) -> None:
    stage = make()
    stage.director.limit = 100_000
    for size in (10, 200_000, 10):
        stage.journal.append(lane, bytes(size))
    assert stage.journal.sync(DEADLINE)
    stage.link.start()
    stage.acked(lane, 3)
    records = stage.director.records[lane.value]
    assert [len(records[number]) for number in (1, 3)] == [10, 10]
    gap = loads(Record, records[2])
    assert (gap.kind, gap.body["first"], gap.body["last"]) == ("gap", 2, 2)


def test_a_disk_that_fails_amid_the_drain_ends_the_link_and_keeps_nobody_waiting(stage: Stage) -> None:
    class Broken(Files):
        def sync(self, descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    stage.journal._files = Broken()
    stage.link.start()
    stage.journal.append(CONTROL, b"record")
    assert not stage.link.drain(DEADLINE)
    assert isinstance(stage.next(LinkFailed).error, JournalError)


@pytest.mark.parametrize("away", [False, True], ids=["there", "away for half of it"])
def test_a_day_of_log_records_stays_within_its_quota_on_the_node(tmp_path: Path, away: bool) -> None:
    segment, quota, count = 256 * 1024, 4 * 1024 * 1024, DAY
    director = Shredder()
    director.away = away
    items: queue.Queue[Item] = queue.Queue()
    pace = Pace(first=0.001, most=0.01, bulk_every=0.0, batch=segment)
    record = dumps(Record(kind="log", at=1.0, body={"step": "s", "text": "x" * 40}))
    most = 0
    with contextlib.ExitStack() as stack:
        path = tmp_path / "journal"
        journal = stack.enter_context(
            contextlib.closing(Journal(str(path), segment_bytes=segment, quota=quota, reserve=0))
        )
        link = stack.enter_context(contextlib.closing(Link(director, journal, items.put, pace=pace)))
        link.start()
        for number in range(1, count + 1):
            journal.append(BULK, record)
            if number % 5_000 == 0:
                director.away = away and number < count // 2
                while not director.away and journal.acked(BULK) < number - 30_000:  # no faster than they are taken
                    items.get(timeout=DEADLINE)
                most = max(most, on_disk(path))
        assert link.drain(60)
    assert most <= quota + 2 * segment
    assert director.through == count
    assert (director.gaps > 0) is away
    assert director.taken + director.gaps == count


def test_a_director_that_was_restored_from_a_backup_gets_again_what_is_there_and_a_gap_for_the_rest(
    stage: Stage,
) -> None:
    stage.write(CONTROL, 20)  # of several segments
    stage.link.start()
    stage.acked(CONTROL, 20)
    stage.director.change(records={"control": {}, "bulk": {}}, acked_floor=5)
    stage.write(CONTROL, 1)
    stage.director.seen("report", stage.director.asked.count("report") + 1)
    stage.director.change(acked_floor=None)
    assert stage.link.drain(DEADLINE)
    got = stage.director.records["control"]
    assert sorted(got) == list(range(6, 22))
    assert loads(Record, got[6]).kind == "gap"
    assert got[20] == b"record"


def test_a_proxy_with_a_small_limit_gets_small_batches(make: Callable[..., Stage]) -> None:
    stage = make()
    for _ in range(20):
        stage.journal.append(CONTROL, bytes(1000))
    assert stage.journal.sync(DEADLINE)
    stage.director.faults["report"] = [Answer(status=413, body=b"too large")] * 2
    stage.link.start()
    stage.acked(CONTROL, 20)
    assert max(count for _, count in stage.director.batches) <= 5


def test_logs_that_come_faster_than_one_upload_takes_them_are_not_waited_with(make: Callable[..., Stage]) -> None:
    stage = make(bulk_every=1e6)
    stage.write(BULK, 100)  # of several segments
    stage.link.start()
    stage.acked(BULK, 100)
    assert len(stage.director.batches) > 5


def test_nothing_is_shipped_while_it_is_held(stage: Stage) -> None:
    stage.link.hold(True)
    stage.link.start()
    stage.write(CONTROL, 5)
    stage.write(BULK, 5)
    stage.director.seen("poll", 1)
    assert "report" not in stage.director.asked
    assert stage.director.waits[-1] == 0.0  # a heartbeat: nothing is sent down later either
    stage.link.hold(False)
    stage.acked(CONTROL, 5)


def test_a_poll_that_is_open_when_it_is_held_is_taken_back_and_no_event_comes_down(stage: Stage) -> None:
    stage.link.start()
    stage.director.seen("poll", 1)
    stage.link.hold(True)
    stage.director.seen("poll", 2)  # the heartbeat
    assert [wait > 0.0 for wait in stage.director.waits] == [True, False]
    stage.director.change(events=[Event(name="noise", number=1)])
    assert stage.director.asked.count("poll") == 2
    assert stage.director.answers == ["poll"]  # to the heartbeat alone
    stage.link.hold(False)
    stage.director.seen("poll", 3)


def test_an_upload_stops_between_two_chunks_when_it_is_held_and_then_goes_on(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"0123456789" * 3)
    digest = hashlib.sha256(b"0123456789" * 3).hexdigest()
    director = stage.director
    director.chunk, director.announced = 10, {digest: 30}
    held = threading.Event()
    director.after_chunk = lambda: held.set() or stage.link.hold(True)
    stage.link.start()
    stage.write(CONTROL, 1)
    stage.link.upload(digest, str(tmp_path / "big"), 30, 1)
    assert held.wait(DEADLINE)
    with director.lock:
        assert director.lock.wait_for(lambda: 0.0 in director.waits, DEADLINE)  # the heartbeat: it is quiet
        assert len(director.parts[digest]) == 10
        director.after_chunk = lambda: None
    stage.link.hold(False)
    with director.lock:
        assert director.lock.wait_for(lambda: digest in director.blobs, DEADLINE)
    assert director.asked.count("put_blob") == 3


def test_silence_has_no_poll_either_and_ends_with_the_drain(stage: Stage) -> None:
    stage.link.hold(True, silent=True)
    stage.link.start()
    stage.write(CONTROL, 5)
    assert stage.director.asked == []
    assert stage.link.drain(DEADLINE)
    stage.director.seen("poll", 1)


def test_draining_gives_up_at_its_time(stage: Stage) -> None:
    stage.director.away = True
    stage.link.start()
    stage.write(CONTROL, 1)
    assert not stage.link.drain(0.01)


def test_control_traffic_is_counted_and_bulk_is_not(stage: Stage) -> None:
    stage.write(BULK, 5)
    stage.director.away = True
    stage.link.start()
    stage.director.seen("poll", 1)
    stage.director.change(away=False)
    stage.write(CONTROL, 1)
    stage.acked(CONTROL, 1)
    assert stage.link.drain(DEADLINE)
    traffic = stage.link.traffic
    assert traffic.requests == [lane for lane, _ in stage.director.batches].count("control")
    assert traffic.bytes == 15 * traffic.requests


# --- what comes down --------------------------------------------------------------------------------------------------


def test_events_arrive_in_order_and_once(stage: Stage) -> None:
    stage.link.start(cursor=1)
    events = [Event(name=f"e{n}", number=n) for n in range(1, 5)]
    stage.director.change(events=events[:2])
    assert stage.next(EventsArrived) == EventsArrived(events=(events[1],), cursor=2)
    stage.director.change(events=events)
    assert stage.next(EventsArrived) == EventsArrived(events=tuple(events[2:]), cursor=4)


def test_the_order_to_stop_comes_once(stage: Stage) -> None:
    stage.link.start()
    stage.director.change(cancel=CancelDeployment(reason="wrong site"))
    assert stage.next(CancelArrived) == CancelArrived(reason="wrong site")
    stage.director.seen("poll", 5)
    stage.link.close()
    assert not [item for item in stage.items.queue if isinstance(item, CancelArrived)]


# --- at the start -----------------------------------------------------------------------------------------------------


def test_a_claim_waits_for_the_director_and_compares_the_clocks(stage: Stage) -> None:
    stage.director.faults["claim"] = [e.DirectorUnreachable("starting")] * 5
    times = iter([10.0] * 5 + [10.0, 14.0])
    stage.link = Link(stage.director, stage.journal, stage.items.put, pace=Pace(first=0.001), wall=lambda: next(times))
    assert ask_claim(stage).experiment == "x"
    offset = stage.link.clock_offset
    assert offset is not None
    assert (offset.offset, offset.bound) == (988.0, 2.0)


@pytest.mark.parametrize("error", [e.ClaimRefused("c"), e.AuthenticationError("a"), e.ProtocolMismatch("p")])
def test_a_refused_claim_is_told_at_once(stage: Stage, error: e.DirectorError) -> None:
    stage.director.faults["claim"] = [problem(error)]
    with pytest.raises(type(error)):
        ask_claim(stage)
    assert stage.director.asked == ["claim"]


def test_a_claim_that_nobody_answers_ends_at_its_deadline(stage: Stage) -> None:
    now = iter(range(1000))
    stage.director.away = True
    link = Link(stage.director, stage.journal, stage.items.put, pace=Pace(first=0.0), clock=lambda: float(next(now)))
    with pytest.raises(e.DirectorUnreachable):
        link.claim(ClaimRequest(journal_id="j", epoch=1), timeout=30.0)
    assert 10 < len(stage.director.asked) <= 31


def test_a_claim_that_comes_again_goes_on_after_what_was_acknowledged(stage: Stage) -> None:
    stage.write(CONTROL, 5)
    answer = Claim(experiment_id="e", experiment="x", deployment=SPEC, node=Node(name="n"), control=3)
    stage.director.faults["claim"] = [Answer(status=200, headers=JSON, body=dumps(answer))]
    ask_claim(stage)
    stage.link.start()
    stage.acked(CONTROL, 5)
    assert list(stage.director.records["control"]) == [4, 5]


def test_a_blob_is_fetched_in_spite_of_cuts_and_verified(stage: Stage, tmp_path: Path) -> None:
    data = os.urandom(95)
    digest = hashlib.sha256(data).hexdigest()
    stage.director.blobs[digest] = data
    stage.link.fetch_blob(digest, str(tmp_path / "blob"), timeout=DEADLINE)
    assert (tmp_path / "blob").read_bytes() == data
    assert len(stage.director.asked) == 10
    stage.link.fetch_blob(digest, str(tmp_path / "blob"), timeout=DEADLINE)
    assert len(stage.director.asked) == 10


def test_a_blob_with_other_bytes_is_refused_and_not_kept(stage: Stage, tmp_path: Path) -> None:
    stage.director.blobs["ab"] = b"evil"
    with pytest.raises(e.BlobMismatch):
        stage.link.fetch_blob("ab", str(tmp_path / "blob"), timeout=DEADLINE)
    assert not list(tmp_path.glob("blob*"))


def test_a_blob_that_is_not_there_is_told_at_once(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(e.NotFound):
        stage.link.fetch_blob("ab", str(tmp_path / "blob"), timeout=DEADLINE)
    assert stage.director.asked == ["get_blob"]


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_an_artifact_follows_its_announcement_in_pieces(stage: Stage, tmp_path: Path) -> None:
    data = os.urandom(95)
    digest = stage.file(tmp_path / "trace", data)
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "trace"), 95, number=2)
    stage.write(CONTROL, 1)
    stage.acked(CONTROL, 1)
    assert "blob_status" not in stage.director.asked
    stage.write(CONTROL, 1)
    assert stage.next(ArtifactStored).sha256 == digest
    assert stage.director.blobs[digest] == data
    assert stage.director.asked.count("put_blob") == 10


def test_a_cut_upload_goes_on_where_the_director_has_it(stage: Stage, tmp_path: Path) -> None:
    data = os.urandom(50)
    digest = stage.file(tmp_path / "trace", data)
    stage.director.parts[digest] = data[:25]
    stage.director.faults["put_blob"] = [e.DirectorUnreachable("cut"), e.DirectorTimeout("slow")]
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "trace"), 50, number=0)
    stage.next(ArtifactStored)
    assert stage.director.asked.count("put_blob") == 2 + 3


def test_an_empty_artifact_is_stored(stage: Stage, tmp_path: Path) -> None:
    digest = stage.file(tmp_path / "empty", b"")
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "empty"), 0, number=0)
    assert stage.next(ArtifactStored).sha256 == digest


@pytest.mark.parametrize("damage", ["gone", "shorter", "other"])
def test_a_file_that_is_not_what_was_announced_is_given_up(stage: Stage, tmp_path: Path, damage: str) -> None:
    digest = stage.file(tmp_path / "trace", b"x" * 30)
    if damage == "gone":
        (tmp_path / "trace").unlink()
    else:
        (tmp_path / "trace").write_bytes(b"y" * (30 if damage == "other" else 20))
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "trace"), 30, number=0)
    failed = stage.next(ArtifactFailed)
    assert failed.sha256 == digest
    assert not stage.link.drained
    stage.link.forget(digest)
    assert stage.link.drained


def test_the_drain_waits_for_artifacts(stage: Stage, tmp_path: Path) -> None:
    digest = stage.file(tmp_path / "trace", b"x" * 30)
    stage.director.faults["put_blob"] = [Answer(status=503)] * 20
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "trace"), 30, number=0)
    assert stage.link.drain(DEADLINE)
    assert digest in stage.director.blobs


def test_an_artifact_that_a_restored_director_misses_is_sent_again(stage: Stage, tmp_path: Path) -> None:
    digest = stage.file(tmp_path / "trace", b"x" * 30)
    stage.link.start()
    stage.link.upload(digest, str(tmp_path / "trace"), 30, number=0)
    stage.next(ArtifactStored)
    with stage.director.lock:
        stage.director.blobs.clear()
        stage.director.parts.clear()
        stage.director.missing = (digest,)
    stage.write(CONTROL, 1)
    assert stage.next(ArtifactStored).sha256 == digest


def test_closing_ends_every_thread_whatever_it_waits_for(stage: Stage) -> None:
    stage.director.away = True
    stage.link.start()
    stage.write(CONTROL, 1)
    stage.link.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("link-")]
