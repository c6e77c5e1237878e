"""Imports go down only, by the floors of docs/design.md, and importing torchdeq brings nothing that is optional."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "torchdeq").rglob("*.py"))
}
#: Modules and packages by floor; the longest name that fits decides.
FLOORS = {
    "torchdeq._state": 0,
    "torchdeq._replay": 0,
    "torchdeq._ritz": 0,
    "torchdeq._modes": 0,
    "torchdeq._buffers": 0,
    "torchdeq._weights": 0,
    "torchdeq._held": 0,
    "torchdeq._suggest": 0,
    "torchdeq._method": 0,
    "torchdeq.solution": 0,
    "torchdeq.solver": 1,
    "torchdeq.grad": 2,
    "torchdeq.deq": 3,
    "torchdeq.functional": 3,
    "torchdeq.implicit": 3,
    "torchdeq.export": 4,
    "torchdeq.norm": 4,
    "torchdeq.dropout": 4,
    "torchdeq.monotone": 4,
    "torchdeq.loss": 4,
    "torchdeq.diagnostics": 4,
    "torchdeq.solver.stat": 5,
    "torchdeq.solver.utils": 5,
    "torchdeq.core": 5,
    "torchdeq.cores": 5,
    "torchdeq.utils": 5,
    "torchdeq": 6,  # the package itself gathers the public names
    "torchdeq.zoo": 7,
    "torchdeq.cli": 7,
    "torchdeq.__main__": 7,
}
TRANSLATION = ("functional", "factory")  # torchdeq/*/functional.py and factory.py are on floor 5


def floor(module: str) -> int:
    """The floor of a module."""
    parts = module.split(".")
    if len(parts) > 2 and parts[-1] in TRANSLATION:
        return 5
    for length in range(len(parts), 1, -1):
        if (found := FLOORS.get(".".join(parts[:length]))) is not None:
            return found
    if module == "torchdeq":
        return FLOORS["torchdeq"]
    raise AssertionError(f"{module} has no floor: give it one here and in docs/design.md")


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of every import from torchdeq, wherever it stands, inside functions too."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torchdeq":
                    yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            if origin.partition(".")[0] == "torchdeq":
                for alias in node.names:
                    yield node.lineno, origin, alias.name


def defined_in(origin: str, name: str) -> str:
    """The module behind `from origin import name`, seen through what packages below the top re-export."""
    if f"{origin}.{name}" in MODULES:
        return f"{origin}.{name}"
    path = MODULES.get(origin)
    if path is None or path.name != "__init__.py" or origin == "torchdeq":
        return origin
    for _, source, exported in imports(path.read_text(encoding="utf-8"), origin, True):
        if exported == name and source != origin:
            return defined_in(source, name)
    return origin


def upward(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports in `source`, the text of `module`, that the floors forbid."""
    wrong = []
    level = floor(module)
    own = module if is_package else module.rpartition(".")[0]
    for line, origin, name in imports(source, module, is_package):
        target = defined_in(origin, name)
        if is_package and target.startswith(f"{module}."):
            continue  # a package re-exports from its own modules
        below = floor(target)
        if level == 4 and below >= 1 and own != target.rpartition(".")[0]:
            allowed = below <= (3 if module.startswith("torchdeq.diagnostics") else 1)
        elif level == 7:
            allowed = below == 7 or public(origin, name)
        else:
            allowed = below <= level
        if not allowed:
            wrong.append(f"line {line}: {module} (floor {level}) imports {name} of {target} (floor {below})")
    return wrong


def public(origin: str, name: str) -> bool:
    """Whether a module offers a name in its `__all__`; `import torchdeq` counts."""
    if not name:
        return "._" not in origin
    if f"{origin}.{name}" in MODULES:
        return not name.startswith("_")
    return name in getattr(importlib.import_module(origin), "__all__", ())


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module: str) -> None:
    path = MODULES[module]
    wrong = upward(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torchdeq.solver.new", "from torchdeq.grad.base import GradMethod"),
        ("torchdeq.solver.new", "def late():\n    from torchdeq import deq"),
        ("torchdeq.solver.new", "import torchdeq"),
        ("torchdeq.solver.new", "from ..grad import IFT"),
        ("torchdeq.solver.new", "from .functional import anderson_solver"),
        ("torchdeq.grad.new", "from torchdeq.solver import anderson_solver"),
        ("torchdeq.grad.new", "from torchdeq.solver import SolverStat"),
        ("torchdeq.deq", "from torchdeq.dropout import reset_dropout"),
        ("torchdeq.norm.new", "from torchdeq.grad import IFT"),
        ("torchdeq.norm.new", "from torchdeq.dropout import VariationalDropout"),
        ("torchdeq.diagnostics.new", "from torchdeq.core import get_deq"),
        ("torchdeq.core", "from torchdeq import DEQ"),
        ("torchdeq.cli.new", "from torchdeq._state import layout_of"),
        ("torchdeq.zoo.new", "from torchdeq.solver.base import checked_record"),
    ],
)
def test_an_upward_import_is_noticed(module: str, source: str) -> None:
    assert upward(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("torchdeq.solver.new", "from torchdeq._state import per_sample"),
        ("torchdeq.grad.new", "from torchdeq.solver import GMRES"),
        ("torchdeq.grad.factory", "from torchdeq.solver.stat import SolverStat"),
        ("torchdeq.norm.new", "from torchdeq.norm.other import helper"),
        ("torchdeq.diagnostics.new", "from torchdeq.deq import DEQ"),
        ("torchdeq.core", "from torchdeq.dropout import reset_dropout"),
        ("torchdeq.cli.new", "from torchdeq import DEQ, SOLVERS"),
        ("torchdeq.cli.new", "from torchdeq.diagnostics import spectral_radius"),
    ],
)
def test_a_downward_import_is_not(module: str, source: str) -> None:
    assert not upward(source, module)


def test_a_module_without_a_floor_is_noticed() -> None:
    with pytest.raises(AssertionError, match="has no floor"):
        floor("torchdeq.newcomer")


def test_importing_torchdeq_brings_nothing_optional() -> None:
    code = (
        "import sys, torch, optree; before = set(sys.modules); import torchdeq; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    brought = set(run.stdout.split())
    optional = {"numpy", "scipy", "sklearn", "tqdm", "matplotlib", "safetensors", "hypothesis", "pytest"}
    assert "torchdeq" in brought
    assert not brought & optional
