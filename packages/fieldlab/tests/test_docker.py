"""What the director is told of a Docker engine."""

from __future__ import annotations

from pathlib import Path

import fieldlab as fl
import pytest


def test_what_was_not_given_is_left_to_the_connector() -> None:
    assert fl.Docker(nodes=2, memory="1 GiB").options() == {
        "engine": "unix:///var/run/docker.sock",
        "nodes": 2,
        "prefix": "docker",
        "properties": {},
        "slots": 1,
        "memory": 1024**3,
    }


def test_certificates_are_read_where_they_are_and_the_key_is_not_shown(tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("ca", "certificate", "key")}
    for name, path in paths.items():
        path.write_text(f"PEM of {name}")
    texts = {name: str(path) for name, path in paths.items()}
    spec = fl.Docker(engine="tcp://engine:2376", **texts)  # type: ignore[arg-type]
    options = spec.options()
    assert {name: options[name] for name in paths} == {name: f"PEM of {name}" for name in paths}
    assert str(paths["key"]) not in repr(spec)
    with pytest.raises(fl.ConfigurationError, match="cannot be read"):
        fl.Docker(engine="tcp://engine:2376", **{**texts, "key": str(tmp_path / "none")}).options()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"engine": "http://engine"}, "unix:///path or tcp://host:port"),
        ({"engine": "tcp://engine:2376"}, "takes ca, certificate and key"),
        ({"mounts": "/a:/b"}, "list of texts"),
        ({"memory": "much"}, "not a size"),
        ({"nodes": 0}, "1 to 1000"),
    ],
)
def test_what_cannot_be_is_refused_where_it_stands(given: dict[str, object], said: str) -> None:
    with pytest.raises(fl.DefinitionError, match=said):
        fl.Docker(**given)  # type: ignore[arg-type]
