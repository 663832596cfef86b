"""What the director is told of hosts behind SSH."""

from __future__ import annotations

import base64
import hmac
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest


def hosts_of(*hosts: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fl.SSH(hosts=list(hosts), host_keys=[]).options()["hosts"]
    return found


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("pi@10.0.0.7", "10.0.0.7", "pi", 22),
        ("pi@lab.example.org:2222", "lab.example.org", "pi", 2222),
        ("pi@[2001:db8::1]:2222", "2001:db8::1", "pi", 2222),
        ("pi@2001:db8::1", "2001:db8::1", "pi", 22),
    ],
)
def test_a_text_says_user_host_and_port(text: str, host: str, user: str, port: int) -> None:
    (found,) = hosts_of(text)
    assert (found["host"], found["user"], found["port"]) == (host, user, port)


def test_what_else_a_mapping_has_are_properties_of_the_node() -> None:
    (found,) = hosts_of({"name": "pi-7", "host": "10.0.0.7", "user": "pi", "site": "roof"})
    assert (found["name"], found["properties"]) == ("pi-7", {"site": "roof"})


@pytest.mark.parametrize("text", ["", "pi@", "pi@host:none", "pi@host:70000", {"user": "pi"}])
def test_what_is_no_host_is_refused_where_it_stands(text: Any) -> None:
    with pytest.raises(fl.DefinitionError, match="no host"):
        fl.SSH(hosts=[text])


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(fl.DefinitionError, match="takes a list"):
        fl.SSH(hosts="pi@10.0.0.7")


def test_the_key_is_read_and_never_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("PRIVATE")
    spec = fl.SSH(hosts=["pi@h"], key=str(path), passphrase="open sesame", host_keys=[])
    assert spec.options()["key"] == "PRIVATE"
    assert "sesame" not in repr(spec)
    with pytest.raises(fl.ConfigurationError, match="cannot be read"):
        fl.SSH(hosts=["pi@h"], key=str(tmp_path / "none"), host_keys=[]).options()


def hashed(name: str) -> str:
    salt = b"0123456789abcdef0123"
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(hmac.digest(salt, name.encode(), 'sha1')).decode()}"


def test_of_known_hosts_only_the_lines_about_the_hosts_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "other.example.org ssh-ed25519 A",
        "# a remark",
        "10.0.0.7,alias ssh-ed25519 B",
        "[10.0.0.8]:2222 ssh-ed25519 C",
        f"{hashed('10.0.0.9')} ssh-ed25519 D",
        f"{hashed('10.0.0.10')} ssh-ed25519 E",
        "*.lab,!bad.lab ssh-ed25519 F",
        "|1|broken",
    ]
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "known_hosts").write_text("\n".join(lines))
    monkeypatch.setenv("HOME", str(tmp_path))
    spec = fl.SSH(hosts=["pi@10.0.0.7", "pi@10.0.0.8:2222", "pi@10.0.0.9", "pi@good.lab", "pi@bad.lab"])
    assert [line.split()[-1] for line in spec.options()["host_keys"]] == ["B", "C", "D", "F"]
