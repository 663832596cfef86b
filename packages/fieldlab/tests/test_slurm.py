"""What the director is told of a Slurm cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest


def test_the_login_host_goes_as_one_behind_ssh(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("PRIVATE")
    spec = fl.Slurm(folder="/home/ada", login="ada@login:2222", key=str(tmp_path / "key"), host_keys=["login ssh-x y"])
    options = spec.options()
    assert options["login"] == {"host": "login", "user": "ada", "port": 2222}
    assert (options["key"], options["host_keys"]) == ("PRIVATE", ["login ssh-x y"])
    assert str(tmp_path / "key") not in repr(spec)


def test_without_a_login_host_nothing_is_said_of_one() -> None:
    options = fl.Slurm(folder="/home/ada", partition="short", python="python3.12").options()
    assert not {"login", "key", "host_keys"} & options.keys()
    assert (options["partition"], options["python"], options["nodes"]) == ("short", ["python3.12"], "hosts")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folder": "~/fieldlab"}, "from / on"),
        ({"nodes": "racks"}, "'hosts' or 'partitions'"),
        ({"slots": 0}, "at least one"),
        ({"key": "~/.ssh/id"}, "no login="),
        ({"login": "ada@"}, "no host"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_stands(given: dict[str, Any], said: str) -> None:
    with pytest.raises(fl.DefinitionError, match=said):
        fl.Slurm(**{"folder": "/home/ada", **given})
