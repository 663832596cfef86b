"""What travels with an experiment: code, arguments, files, and the user's own modules, each once and always alike."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fieldlab import modules
from fieldlab.ship import Blobs, pack, require_sound
from fieldlab_common.dag import DAG
from fieldlab_common.errors import DefinitionError, PlanError, UnsupportedError
from fieldlab_common.experiment import Experiment
from fieldlab_common.node import Node
from fieldlab_common.step import File
from fieldlab_common.task import task

Make = Callable[[dict[str, str]], None]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A folder of modules beside a script, importable while the test runs."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield make
    for name, module in list(sys.modules.items()):
        places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", ()))]
        if any(place.startswith(str(tmp_path)) for place in places):
            del sys.modules[name]


def names(data: bytes) -> list[str]:
    return [name for name in zipfile.ZipFile(io.BytesIO(data)).namelist() if not name.endswith("/")]


def test_what_is_installed_and_what_is_fieldlabs_own_stays() -> None:
    for name in (
        "json",
        "os.path",
        "pytest",
        "httpx2",
        "fieldlab",
        "fieldlab_common.task",
        "__main__",
        "no_such_module",
    ):
        assert not modules.is_own(name), name


def test_a_module_beside_the_script_is_the_users_own(project: Make) -> None:
    project({"helper_a.py": "X = 1"})
    assert modules.is_own("helper_a")


def test_what_modules_import_comes_along_without_being_imported(project: Make) -> None:
    project(
        {
            "probe_a.py": "import json\nimport helper_b\n\ndef go():\n    from pack_c.inner import thing\n",
            "helper_b.py": "raise SystemExit('must not run here')",
            "pack_c/__init__.py": "from . import sibling",
            "pack_c/inner.py": "from .deep.er import thing",
            "pack_c/sibling.py": "",
            "pack_c/deep/__init__.py": "",
            "pack_c/deep/er.py": "import unrelated_d",
            "unrelated_d.py": "",
            "unused_e.py": "",
        }
    )
    found = modules.needed(["probe_a"])
    assert {"probe_a", "helper_b", "pack_c", "pack_c.inner", "pack_c.deep.er", "unrelated_d"} <= set(found)
    assert "unused_e" not in found
    assert "helper_b" not in sys.modules


def test_a_package_brings_all_its_sources_and_nothing_else(project: Make) -> None:
    project({"pack_f/__init__.py": "", "pack_f/sub/late.py": "", "pack_f/.hidden/x.py": "", "pack_f/key.pem": "secret"})
    assert names(modules.bundle(["pack_f"])) == ["pack_f/__init__.py", "pack_f/sub/late.py"]


def test_a_module_in_folders_that_are_no_packages_loads_from_its_bundle(project: Make, tmp_path: Path) -> None:
    project({"space_k/inner_k/deep_k.py": "VALUE = 3"})
    path = tmp_path / "bundle"
    path.write_bytes(modules.bundle(modules.needed(["space_k.inner_k.deep_k"])))
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import space_k.inner_k.deep_k as m; print(m.VALUE)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert (run.stdout, run.stderr) == ("3\n", "")


def test_a_bundle_is_the_same_bytes_whenever_it_is_made(project: Make, tmp_path: Path) -> None:
    project({"same_g.py": "X = 1"})
    first = modules.bundle(["same_g"])
    (tmp_path / "same_g.py").touch()
    assert modules.bundle(["same_g"]) == first


def test_a_compiled_module_is_refused_with_advice(tmp_path: Path) -> None:
    made = types.ModuleType("compiled_h")
    made.__file__ = str(tmp_path / "compiled_h.so")
    sys.modules["compiled_h"] = made
    try:
        with pytest.raises(UnsupportedError, match="packages="):
            modules.bundle(["compiled_h"])
    finally:
        del sys.modules["compiled_h"]


@pytest.mark.parametrize(
    ("code", "package", "expected"),
    [
        ("import a.b", "", {"a.b"}),
        ("from a import b", "", {"a", "a.b"}),
        ("from . import x", "p.q", {"p.q", "p.q.x"}),
        ("from ..y import z", "p.q", {"p.y", "p.y.z"}),
        ("def f():\n def g():\n  import deep", "", {"deep"}),
    ],
)
def test_imports_are_read_from_code_without_running_it(code: str, package: str, expected: set[str]) -> None:
    assert modules.imports_of(compile(code, "x", "exec"), package) == expected


def test_an_import_inside_a_function_that_travels_by_value_is_seen(project: Make) -> None:
    project({"lazy_i.py": "VALUE = 3"})
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("def inner():\n    import lazy_i\n    return lazy_i.VALUE\n\ndef outer():\n    return inner()", namespace)
    blobs = Blobs()
    blobs.seal(namespace["outer"], "task")
    assert names(blobs.data[blobs.bundles()[0]]) == ["lazy_i.py"]


def test_a_module_that_code_names_is_seen_and_one_whose_name_is_part_of_a_word_is_not(project: Make) -> None:
    project({"named_j.py": "def go(): pass", "go.py": ""})
    import go  # type: ignore[import-not-found]  # noqa: F401
    import named_j  # type: ignore[import-not-found]

    blobs = Blobs()
    blobs.seal(named_j.go, "task")
    blobs.seal("gogogo", "text")
    assert names(blobs.data[blobs.bundles()[0]]) == ["go.py", "named_j.py"]  # "go" is also the function's name
    others = Blobs()
    others.seal("gogogo", "text")
    assert others.bundles() == ()


def test_equal_things_are_one_blob() -> None:
    blobs = Blobs()
    thing = [1, 2]
    assert blobs.seal(thing, "x") == blobs.seal(thing, "x") == blobs.seal([1, 2], "x")
    assert blobs.seal(((), {}), "x") == blobs.seal(((), {}), "y")


def test_a_file_is_named_by_its_content_and_read_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 40_000)
    blobs = Blobs()
    digest = blobs.seal_file(str(path))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert b"".join(blobs.chunks(digest, 5)) == path.read_bytes()[5:]
    with pytest.raises(DefinitionError, match="no-such-file"):
        blobs.seal_file("no-such-file")


@task
def double(x: int) -> int:
    return 2 * x


def experiment(dag: DAG, *nodes: str) -> Experiment:
    return Experiment("exp").map(dag, [Node.dummy(name) for name in nodes])


def test_nodes_that_resolve_alike_share_every_blob() -> None:
    with DAG("d") as dag:
        double(double(1))
    shipment = pack(experiment(dag, "a", "b", "c"))
    specs = shipment.request(if_exists="error", start=True).deployments
    assert len({spec.graph for spec in specs}) == 1
    assert set(specs[0].blobs) == set(shipment.blobs.data)


def test_the_same_experiment_is_packed_alike_again() -> None:
    def made() -> set[str]:
        with DAG("d") as dag:
            double(1)
        return set(pack(experiment(dag, "a")).blobs.data)

    assert made() == made()


def test_what_cannot_be_pickled_is_named_before_anything_is_sent() -> None:
    with open(__file__) as handle, DAG("d") as dag:
        double(handle)
    with pytest.raises(PlanError, match="TextIOWrapper") as caught:
        require_sound(pack(experiment(dag, "a")))
    assert len(caught.value.problems) == 1


def test_an_argument_that_is_a_file_travels_as_a_blob(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("hello")
    with DAG("d") as dag:
        double(File(str(path)))
    shipment = pack(experiment(dag, "a"))
    assert hashlib.sha256(b"hello").hexdigest() in shipment.resolution.deployments[0].graph.steps[0].files
