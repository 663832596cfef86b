"""Log lines are what their writers ended, however the node cut them into chunks."""

from fieldlab.logs import LogFilter, assemble
from fieldlab_common import protocol as p
from fieldlab_common import wire


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
    assert texts(LogFilter(deployment="d", step="s")) == "13"
    assert texts(LogFilter(stream="stderr")) == "3"
