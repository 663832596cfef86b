"""What is shared among steps to make them cheap, and what must be each one's own all the same."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
from fieldlab_common.deployment import Need, On
from fieldlab_executor import ahead
from fieldlab_executor.learned import Learned

from .hub import CTX, Bench, Executor, Hub

cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are forked ahead on Linux")

Run = Callable[..., Hub]
Launch = Callable[..., Executor]


def after(name: str) -> tuple[Need, ...]:
    return (Need(step=name, on=On.ALWAYS),)


def write_and_say_where(name: str) -> str:
    Path(name).write_text(name)
    return os.getcwd()


def chain(bench: Bench, count: int, function: Callable[..., object], *args: object) -> list[str]:
    names = [f"s-{number}" for number in range(count)]
    for before, name in zip(["", *names], names, strict=False):
        bench.step(name, function, *args, needs=after(before) if before else ())
    return names


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_files_stays_its_steps_own_and_is_found_by_the_steps_name(launch: Launch) -> None:
    bench = Bench()
    names = chain(bench, 3, write_and_say_where, "kept.txt")
    executor = launch(bench)
    assert executor.wait() == 0
    folders = [executor.hub.value(name) for name in names]
    assert len(set(folders)) == 3
    for name, folder in zip(names, folders, strict=True):
        assert os.path.realpath(executor.folder / "steps" / f"{name}.0-1") == os.path.realpath(folder)
        assert Path(folder, "kept.txt").read_text() == "kept.txt"


def test_every_step_finds_its_folder_empty_also_one_that_another_had_before(run: Run) -> None:
    bench = Bench()

    def look() -> tuple[str, list[str]]:
        return os.getcwd(), os.listdir(".")

    names = chain(bench, 4, look)
    hub = run(bench)
    found = [hub.value(name) for name in names]
    assert [left for _, left in found] == [[]] * 4
    assert len({folder for folder, _ in found}) < 4


def test_steps_that_run_at_the_same_time_have_folders_of_their_own(run: Run) -> None:
    bench = Bench()

    def meet(ctx) -> str:
        ctx.barrier("there", parties=3, timeout=50)
        return os.getcwd()

    for number in range(3):
        bench.step(f"s-{number}", meet, CTX)
    hub = run(bench)
    assert len({hub.value(f"s-{number}") for number in range(3)}) == 3


def test_a_folder_that_a_step_replaced_is_lent_to_nobody(run: Run, tmp_path: Path) -> None:
    bench = Bench()

    def replace(elsewhere: str) -> str:
        here = os.getcwd()
        os.rmdir(here)
        os.symlink(elsewhere, here)
        return here

    bench.step("one", replace, str(tmp_path))
    bench.step("two", os.getcwd, needs=after("one"))
    hub = run(bench)
    assert hub.value("two") not in (hub.value("one"), str(tmp_path))


# --- modules ----------------------------------------------------------------------------------------------------------


def test_what_steps_import_of_the_standard_library_is_soon_there_before_they_run(run: Run) -> None:
    bench = Bench()

    def look() -> bool:
        found = "colorsys" in sys.modules
        import colorsys

        return found and bool(colorsys)

    names = chain(bench, 8, look)
    hub = run(bench)
    found = [hub.value(name) for name in names]
    assert found[0] is False
    assert found[-1] is True


def test_a_module_of_a_few_steps_among_many_is_not_learned() -> None:
    learned = Learned()
    assert all(not learned.heard(["ssl"] if number in (40, 80) else None) for number in range(100))
    assert [name for _ in range(20) for name in learned.heard(["ssl"])] == ["ssl"]


def test_a_module_is_learned_once() -> None:
    learned = Learned()
    assert [learned.heard(["json", 3, "x" * 1000]) for _ in range(4)] == [[], ["json"], [], []]


def test_only_modules_of_the_standard_library_and_of_fieldlab_are_told() -> None:
    told = ahead.imported(frozenset())
    assert {"json", "fieldlab_executor.ahead", "_thread"} <= set(told)
    assert not {"pytest", "cloudpickle", "multiprocessing", "__main__", __name__} & set(told)
