"""Log lines are what their writers ended, however the node cut them into chunks."""

import datetime as dt
import tracemalloc
from collections.abc import Iterator

import pytest
from fieldlab.logs import MAX_OPEN, Assembler, LogFilter, LogLine, Logs, assemble, moment
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.errors import DefinitionError


def chunk(text: str, step: str = "s", stream: str = "stdout", deployment: str = "d") -> p.RecordEntry:
    body = wire.encode(p.LogRecord(step=step, text=text, stream=stream))
    return p.RecordEntry(seq=1, deployment=deployment, number=1, record=p.Record(kind="log", at=1.0, body=body))


def test_lines_are_put_together_across_chunks_and_streams() -> None:
    lines = assemble([chunk("he"), chunk("x\n", stream="stderr"), chunk("llo\nwor"), chunk("ld")])
    assert [line.text for line in lines] == ["x", "hello", "world"]


def test_a_line_without_end_is_handed_out_in_pieces() -> None:
    lines = list(assemble([chunk("x" * 200_000)]))
    assert max(len(line.text) for line in lines) <= 64 * 1024
    assert sum(len(line.text) for line in lines) == 200_000


def test_what_was_dropped_is_told_in_its_place() -> None:
    gap = p.Record(kind="gap", at=1.0, body=wire.encode(p.GapRecord(first=2, last=5, bytes=4096)))
    entries = [chunk("a\n"), p.RecordEntry(seq=2, deployment="d", number=5, record=gap), chunk("b\n")]
    lines = list(assemble(entries))
    assert [line.stream for line in lines] == ["stdout", "gap", "stdout"]
    assert "4 chunks" in lines[1].text


def test_what_is_missing_for_another_reason_says_which() -> None:
    gap = p.Record(kind="gap", at=1.0, body=wire.encode(p.GapRecord(first=2, last=2, reason="it was refused")))
    (line,) = assemble([p.RecordEntry(seq=2, deployment="d", number=2, record=gap)])
    assert line.stream == "gap"
    assert "missing: it was refused" in line.text


def test_a_line_is_harmless_when_it_is_printed_and_raw_when_it_is_read() -> None:
    line = next(assemble([chunk("\x1b[31mred\n")]))
    assert "\x1b" not in str(line)
    assert line.text == "\x1b[31mred"


def test_lines_are_filtered_by_deployment_step_and_stream() -> None:
    lines = list(
        assemble([chunk("1\n"), chunk("2\n", step="t"), chunk("3\n", stream="stderr"), chunk("4\n", deployment="e")])
    )

    def texts(wanted: LogFilter) -> str:
        return "".join(line.text for line in lines if wanted.takes(line))

    assert texts(LogFilter()) == "1234"
    assert texts(LogFilter(deployments=frozenset({"d"}), step="s")) == "13"
    assert texts(LogFilter(stream="stderr")) == "3"
    with pytest.raises(DefinitionError, match="stream='err': it is one of stdout, stderr"):
        LogFilter(stream="err")


def test_what_came_after_its_deployment_was_given_up_says_so() -> None:
    late = p.RecordEntry(seq=1, deployment="d", number=1, record=chunk("x\n").record, late=True)
    (line,) = assemble([late])
    assert line.late
    assert str(line) == "[d/s, late] x"


def test_lines_are_filtered_by_time() -> None:
    lines = [LogLine(deployment="d", step="s", text=str(at), at=at) for at in (1.0, 2.0, 3.0)]
    assert [line.text for line in lines if LogFilter(since=2.0).takes(line)] == ["2.0", "3.0"]


@pytest.mark.parametrize(
    ("since", "then"),
    [
        (None, None),
        (250.5, 250.5),
        ("10m", 400.0),
        (dt.timedelta(seconds=100), 900.0),
        (dt.datetime(1970, 1, 1, 0, 5, tzinfo=dt.UTC), 300.0),
    ],
)
def test_since_is_a_time_or_how_long_ago(since: object, then: float | None) -> None:
    assert moment(since, lambda: 1000.0) == then  # type: ignore[arg-type]


@pytest.mark.parametrize("since", ["yesterday", dt.datetime(2026, 1, 1), True, ["10m"]])  # noqa: DTZ001
def test_what_is_no_time_is_refused(since: object) -> None:
    with pytest.raises(DefinitionError):
        moment(since)  # type: ignore[arg-type]


def test_a_record_that_is_no_log_is_passed_over() -> None:
    broken = p.Record(kind="log", at=1.0, body={"step": 3})
    newer = p.Record(kind="from_the_future", at=1.0, body={})
    entries = [p.RecordEntry(seq=1, deployment="d", number=1, record=one) for one in (broken, newer)]
    assert [line.text for line in assemble([*entries, chunk("x\n")])] == ["x"]


def test_logs_are_read_anew_each_time_and_never_all_at_once() -> None:
    reads = []

    def read() -> Iterator[LogLine]:
        reads.append(1)
        return (LogLine(deployment="d", step="s", text=str(n)) for n in range(1000))

    logs = Logs(read)
    assert len(logs) == 1000
    assert (logs[0].text, logs[-1].text, logs[999].text) == ("0", "999", "999")
    assert [line.text for line in logs[10:12]] == ["10", "11"]
    assert [line.text for line in logs.tail(2)] == ["998", "999"]
    assert repr(logs).splitlines() == ["<1000 log lines, the last 20>", *map(str, range(980, 1000))]
    assert str(logs).count("\n") == 999
    with pytest.raises(IndexError):
        logs[1000]
    with pytest.raises(IndexError):
        logs[-1001]
    assert len(reads) > 5


def test_logs_of_nothing_are_false_and_empty() -> None:
    assert not Logs()
    assert repr(Logs()) == "<0 log lines>"


def test_lines_that_nobody_ends_are_held_only_so_far() -> None:
    assembler, found = Assembler(), 0
    tracemalloc.start()
    try:
        for n in range(2000):  # steps that each write much, and no line break
            found += sum(len(line.text) for line in assembler.add(chunk("x" * 30_000, step=f"s{n}")))
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_OPEN
    finally:
        tracemalloc.stop()
    assert found + sum(len(line.text) for line in assembler.rest()) == 2000 * 30_000
