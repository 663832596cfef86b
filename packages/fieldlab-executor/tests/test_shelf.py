"""The shelf: what is made is found, what is used is kept, what is old or too much goes; ages are told, not waited."""

import os
import threading
import time
from pathlib import Path

import pytest
from fieldlab_common.errors import DefinitionError
from fieldlab_executor.shelf import SPARED, Bounds, Held, Shelf, Unavailable

DAY = 86400.0
NOW = time.time()  # the file system tells no other time of a use
WIDE = Bounds(age=30 * DAY, size=1 << 40)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def build(size: int = 0):
    def into(folder: Path) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "python").write_bytes(b"x" * size)
        (folder / "bin" / "python").chmod(0o755)

    return into


def put(shelf: Shelf, key: str, *, used: float = NOW, size: int = 0) -> Path:
    held = shelf.make(key, build(size), ["for a test"], seconds=1.0, waits=lambda: None)
    held.close()
    os.utime(held.folder.parent / f"{key}.lock", (used, used))
    return held.folder


def hold(shelf: Shelf, key: str) -> Held:
    held = shelf.find(key)
    assert held is not None
    return held


def test_what_was_not_used_for_long_goes_and_the_rest_stays(shelf: Shelf) -> None:
    old, young = put(shelf, "old", used=NOW - 31 * DAY), put(shelf, "young", used=NOW - 29 * DAY)
    assert shelf.evict(WIDE, NOW) == ["old"]
    assert (old.exists(), young.exists()) == (False, True)
    assert shelf.find("old") is None
    assert sorted(path.name for path in young.parent.iterdir()) == sorted([young.name, "young.json", "young.lock"])


def test_a_use_makes_it_young_again(shelf: Shelf) -> None:
    put(shelf, "one", used=NOW - 31 * DAY)
    hold(shelf, "one").close()
    assert shelf.evict(WIDE, NOW) == []


def test_the_least_recently_used_go_until_there_is_room(shelf: Shelf) -> None:
    for days in (2, 4, 3):
        put(shelf, f"used-{days}", used=NOW - days * DAY, size=1 << 20)
    assert shelf.evict(Bounds(age=30 * DAY, size=5 << 19), NOW) == ["used-4"]


def test_what_was_used_within_a_day_is_spared_by_a_lack_of_room(shelf: Shelf) -> None:
    put(shelf, "fresh", used=NOW - SPARED + 1, size=1 << 20)
    put(shelf, "stale", used=NOW - SPARED - 1, size=1 << 20)
    assert shelf.evict(Bounds(age=30 * DAY, size=1), NOW) == ["stale"]


def test_what_is_in_use_is_never_removed(shelf: Shelf) -> None:
    put(shelf, "used")
    held = hold(shelf, "used")
    os.utime(held.folder.parent / "used.lock", (0, 0))
    assert shelf.evict(Bounds(age=0.0, size=0), NOW) == []
    assert held.folder.exists()
    held.close()
    os.utime(held.folder.parent / "used.lock", (0, 0))
    assert shelf.evict(Bounds(age=0.0, size=0), NOW) == ["used"]


def test_what_a_builder_that_died_left_behind_is_not_used_and_goes(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "half.lock").touch()
    (tmp_path / "half-made" / "bin").mkdir(parents=True)
    assert shelf.find("half") is None
    assert shelf.evict(WIDE, NOW) == []
    assert list(tmp_path.iterdir()) == []


def test_one_whose_interpreter_is_gone_is_made_again(shelf: Shelf) -> None:
    first = put(shelf, "one")
    (first / "bin" / "python").unlink()
    assert shelf.find("one") is None
    assert put(shelf, "one") != first
    assert not first.exists()


def test_who_comes_while_it_is_made_waits_and_gets_the_same(shelf: Shelf) -> None:
    begun, go = threading.Event(), threading.Event()
    folders: list[Path] = []

    def slowly(folder: Path) -> None:
        begun.set()
        assert go.wait(60)
        build()(folder)

    def make() -> None:
        held = shelf.make("one", slowly, [], seconds=60.0, waits=go.set)
        folders.append(held.folder)
        held.close()

    first = threading.Thread(target=make)
    first.start()
    assert begun.wait(60)
    make()
    first.join(60)
    assert len(folders) == 2
    assert len(set(folders)) == 1


def test_who_waits_too_long_is_told_and_what_was_to_be_made_is_made(shelf: Shelf) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        begun.set()
        assert go.wait(60)
        build()(folder)

    first = threading.Thread(target=lambda: shelf.make("one", slowly, [], seconds=60.0, waits=lambda: None).close())
    first.start()
    assert begun.wait(60)
    with pytest.raises(Unavailable):
        shelf.make("one", build(), [], seconds=0.1, waits=lambda: None)
    go.set()
    first.join(60)

    def never(folder: Path) -> None:
        raise AssertionError("it was made already")

    shelf.make("one", never, [], seconds=60.0, waits=lambda: None).close()  # who gave up may still have the lock


def test_bounds_are_read_from_variables_and_checked() -> None:
    assert Bounds.of({}) == Bounds(age=30 * DAY, size=10 << 30)
    given = Bounds.of({"FIELDLAB_CACHE_AGE": "2d", "FIELDLAB_CACHE_SIZE": "1 GiB"})
    assert given == Bounds(age=2 * DAY, size=1 << 30)
    with pytest.raises(DefinitionError, match="'soon' is not a duration"):
        Bounds.of({"FIELDLAB_CACHE_AGE": "soon"})
