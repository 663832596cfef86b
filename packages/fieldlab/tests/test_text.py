"""Text from elsewhere is harmless in a terminal and in a notebook."""

import pytest
from fieldlab import text


@pytest.mark.parametrize("bad", ["\x1b[2J", "\r", "\x07", "\x9b31m", "\u202e", "\u2028", "\udc80"])
def test_what_a_terminal_would_obey_is_written_out(bad: str) -> None:
    assert bad not in text.clean(f"a{bad}b", lines=True)


def test_line_breaks_stay_only_where_lines_are_wanted() -> None:
    assert text.clean("a\r\nb\tc", lines=True) == "a\nb\tc"
    assert text.clean("a\nb") == "a\\x0ab"


def test_text_of_other_scripts_is_left_alone() -> None:
    assert text.clean("μs – Größe – 測定 – 🙂") == "μs – Größe – 測定 – 🙂"


def test_a_table_cannot_be_broken_by_a_cell() -> None:
    shown = text.table(["name"], [["a\nb\x1b[31m" + "x" * 500]])
    assert len(shown.splitlines()) == 3
    assert max(map(len, shown.splitlines())) <= 60
    assert "\x1b" not in shown


def test_html_is_escaped_in_cells_and_caption() -> None:
    shown = text.html_table(["n"], [["<script>alert(1)</script>"]], caption="<b>")
    assert "<script" not in shown
    assert "<b>" not in shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.012, "12 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations_are_readable(seconds: float, words: str) -> None:
    assert text.duration(seconds) == words


def test_the_closest_name_is_suggested() -> None:
    assert "'report'" in text.closest("reprot", ["resolve", "report"])
    assert text.closest("zzz", ["resolve"]) == ""
