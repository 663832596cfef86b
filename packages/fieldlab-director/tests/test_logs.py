"""The director's log: what a line is, where it goes, and how the file begins anew."""

import json
import logging

import pytest
import structlog
from fieldlab_director.logs import LogFile, configure


@pytest.fixture
def log(tmp_path):
    handlers, level = logging.root.handlers[:], logging.root.level
    configure(tmp_path / "log")
    yield lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_a_line_has_its_logger_level_time_and_what_it_is_bound_to(log, capsys):
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger("fieldlab.some").info("said", what=1)
    (line,) = log()
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "said", "what": 1, "request_id": "r1", "level": "info", "logger": "fieldlab.some"}
    assert capsys.readouterr().err == ""


def test_what_libraries_log_is_a_line_of_the_same_kind(log):
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        logging.getLogger("some.library").info("said %s", "this")
    (line,) = log()
    assert (line["event"], line["logger"], line["request_id"]) == ("said this", "some.library", "r1")


def test_a_warning_goes_to_standard_error_too_with_its_traceback(log, capsys):
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger("fieldlab.some").exception("fault")
        logging.getLogger("some.library").exception("theirs")
    ours, theirs = log()
    assert "ValueError: boom" in ours["exception"]
    assert "ValueError: boom" in theirs["exception"]
    assert [json.loads(line) for line in capsys.readouterr().err.splitlines()] == [ours, theirs]


def test_what_json_has_no_form_for_is_said_as_it_is_shown(log):
    structlog.get_logger().info("said", what=ValueError("boom"))
    assert log()[0]["what"] == "ValueError('boom')"


def test_a_full_file_is_set_aside_and_the_oldest_one_goes(tmp_path):
    file = LogFile(tmp_path / "log", most=10, kept=2)
    for number in range(5):
        file.write(b"line %d" % number)
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"log": "line 4\n", "log.1": "line 3\n", "log.2": "line 2\n"}


def test_a_disk_that_takes_no_line_fails_nobody(tmp_path, monkeypatch):
    file = LogFile(tmp_path / "log")
    monkeypatch.setattr("os.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    file.write(b"lost")
    assert (tmp_path / "log").read_text() == ""
