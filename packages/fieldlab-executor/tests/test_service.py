"""An agent that runs from every boot on."""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
from fieldlab_common.errors import ConfigurationError
from fieldlab_executor import service


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state"), "XDG_CONFIG_HOME": str(tmp_path / "config"), "USER": "pi"}


def commands(folder: Path, code: int) -> None:
    folder.mkdir()
    for name in ("systemctl", "loginctl"):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/said\necho no bus >&2\nexit {code}\n')
        (folder / name).chmod(0o755)


def test_the_unit_runs_a_copy_of_the_executor_that_stays(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path / "bin", 0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "fieldlab.pyz").write_bytes(b"the executor")
    lines = list(service.install(tmp_path / "fieldlab.pyz", environ))
    kept = tmp_path / "state" / "fieldlab" / "fieldlab.pyz"
    assert kept.read_bytes() == b"the executor"
    unit = configparser.ConfigParser(strict=False)
    unit.read(tmp_path / "config" / "systemd" / "user" / service.UNIT)
    assert unit["Service"]["ExecStart"].endswith(f'"{kept}" agent')
    assert (unit["Service"]["Restart"], unit["Service"]["KillMode"]) == ("always", "process")
    assert (tmp_path / "bin" / "said").read_text().splitlines() == [
        "systemctl --user daemon-reload",
        f"systemctl --user enable --now {service.UNIT}",
        "loginctl enable-linger pi",
    ]
    assert all("done" in line or line.startswith("Wrote") for line in lines)


def test_what_could_not_be_done_is_said_with_what_to_ask_for(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(tmp_path / "bin", 1)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    lines = list(service.install(tmp_path / "nothing", environ))
    assert lines[-1].endswith("did not work (no bus). Ask for: sudo loginctl enable-linger pi")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "did not work" in list(service.install(tmp_path / "nothing", environ))[-1]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "config").write_text("a file")
    with pytest.raises(ConfigurationError, match="cannot be installed"):
        list(service.install(tmp_path / "nothing", environ))
