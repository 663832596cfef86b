"""How secrets are kept out of text and data."""

from fieldlab_executor.secrets import Search, Secrets
from hypothesis import given
from hypothesis import strategies as st


def test_each_line_of_a_secret_is_hidden_but_short_ones():
    secrets = Secrets({"key": "-----BEGIN\nabcd1234\nxy\n-----END"})
    assert secrets.hide("-----BEGIN abcd1234 xy\n-----END") == "*** *** xy\n***"


def test_a_secret_that_holds_another_goes_first():
    assert Secrets({"a": "abcd", "b": "abcdefgh"}).hide("abcdefgh abcd") == "*** ***"


def test_data_that_holds_a_secret_is_known_as_it_is_and_as_json():
    secrets = Secrets({"key": 'pä"ss'})
    assert secrets.shown_in('"pä\\"ss"'.encode()) == "key"
    assert secrets.shown_in(b'"p\\u00e4\\"ss"') == "key"
    assert secrets.shown_in('pä"ss'.encode()) == "key"
    assert secrets.shown_in(b"pass") is None


@given(before=st.text("abc \n", max_size=20), after=st.text("abc \n", max_size=20), cut=st.integers(0, 60))
def test_a_secret_that_comes_in_two_pieces_is_hidden(before: str, after: str, cut: int) -> None:
    secrets = Secrets({"key": "s3cr3t"})
    text = before + "s3cr3t" + after
    cut = min(cut, len(text))
    first = cut - secrets.held(text[:cut])
    assert "s3cr3t" not in secrets.hide(text[:first]) + secrets.hide(text[first:])


def test_a_secret_is_found_also_across_the_pieces_of_a_large_value() -> None:
    secrets = Secrets({"key": "hush hush", "pin": "1"})
    for cut in range(20):
        data = b"..." + b"hush hush" + b"........"
        search = Search(secrets)
        for piece in (data[:cut], b"", data[cut : cut + 2], memoryview(data)[cut + 2 :]):
            search.feed(piece)
        assert search.found == "key"
    search = Search(secrets)
    for piece in (b"hush", b" hus", b"1 h"):
        search.feed(piece)
    assert search.found == ""
