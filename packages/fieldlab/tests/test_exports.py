"""What ``import fieldlab`` gives, and what it costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import fieldlab as fl
import pytest

HEAVY = ("httpx2", "rich", "fieldlab_executor", "cloudpickle", "asyncio", "ssl", "subprocess", "zipfile", "inspect")


def fresh(code: str) -> object:
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def test_every_exported_name_is_there_and_documented() -> None:
    for name in fl.__all__:
        assert getattr(fl, name) is not None
    assert sorted(fl.__all__) == sorted(set(fl.__all__))


def test_every_public_name_of_the_module_is_exported() -> None:
    assert set(fl._HOME) | {"map", "errors", "__version__"} == set(fl.__all__)


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(fl.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(fl.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        fl.nonsense  # noqa: B018


def test_importing_brings_in_nothing_heavy() -> None:
    code = "import json, sys; import fieldlab; print(json.dumps(sorted(sys.modules)))"
    assert not set(HEAVY) & {str(name) for name in fresh(code)}  # type: ignore[attr-defined]


def test_defining_and_planning_need_neither_http_nor_the_executor() -> None:
    code = (
        "import json, sys; import fieldlab as fl\n"
        "with fl.DAG('d') as dag: fl.shell('true')()\n"
        "assert fl.plan(dag); print(json.dumps(sorted(sys.modules)))"
    )
    assert not {"httpx2", "rich", "fieldlab_executor"} & {str(name) for name in fresh(code)}  # type: ignore[attr-defined]


def test_submodules_do_not_hide_exported_names() -> None:
    modules = {path.stem for path in Path(fl.__file__).parent.glob("*.py")}
    assert not modules & set(fl.__all__)
