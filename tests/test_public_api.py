"""What snell_dist names is public: documented, typed, and there without a wait."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from typing import Any

import pytest
from conftest import ENVIRONMENT, ROOT

import snell_dist

REFERENCE = ROOT / "docs/reference/api.md"
NAMES = [name for name in snell_dist.__all__ if callable(getattr(snell_dist, name))]


def test_the_reference_has_every_public_name_and_no_other() -> None:
    documented = re.findall(
        r"^\.\. (?:autofunction|autoclass|py:data):: snell_dist\.(\w+)(?:\(\))?$", REFERENCE.read_text(), re.M
    )
    assert sorted(documented) == sorted(snell_dist.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_explained_and_typed(name: str) -> None:
    public = getattr(snell_dist, name)
    assert len((inspect.getdoc(public) or "").split()) > 5
    for said, function in _functions(public).items():
        assert inspect.getdoc(function) or said.endswith("__"), said
        hints = typing.get_type_hints(function, localns=_checked_names(function))
        asked = [p for p in inspect.signature(function).parameters if p != "self"]
        assert hints.keys() == {*asked, "return"}, said


def _functions(public: Any) -> dict[str, Any]:
    """A function, or the public methods and properties of a class that are its own."""
    if not inspect.isclass(public):
        return {public.__name__: public}
    own = {f"{public.__name__}.{name}": getattr(member, "fget", member) for name, member in vars(public).items()}
    made = dataclasses.is_dataclass(public)  # its __init__ and the like are made from the fields' types
    return {
        name: member
        for name, member in own.items()
        if inspect.isfunction(member) and not re.search(r"\._[^_]", name) and not (made and name.endswith("__"))
    }


def _checked_names(public: Any) -> dict[str, Any]:
    """What the module of a function imports for type checking alone."""
    module = sys.modules[public.__module__]
    names: dict[str, Any] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(ast.unparse(node.body), vars(module) | names, names)
    return names


def test_the_package_is_imported_at_once_and_without_torch() -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import snell_dist;"
        " print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
        for _ in range(5)
    ]
    assert all(line.split()[1] == "False" for line in said)
    assert min(float(line.split()[0]) for line in said) < 0.2
