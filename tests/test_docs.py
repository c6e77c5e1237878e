"""The documentation is true: its code runs and prints what it says, and it leaves no public name out."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import itertools
import linecache
import os
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torchdeq.core import CORES
from torchdeq.grad import GRADS
from torchdeq.solution import Status
from torchdeq.solver import SOLVERS
from torchdeq.utils.options import OPTIONS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

PACKAGES = ["", ".solver", ".grad", ".core", ".norm", ".dropout", ".utils", ".diagnostics", ".loss"]
PUBLIC = [
    f"torchdeq{package}.{name}"
    for package in PACKAGES
    for name in importlib.import_module(f"torchdeq{package}").__all__
]
REGISTRIES = {"SOLVERS", "GRADS"}

SCIENTIFIC = re.compile(r"(?<![\w.])\d(?:\.\d+)?e[-+]\d\d(?!\w)")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
SKIP = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python: its code, the line it begins on, and what it must print."""

    code: str
    line: int
    prints: str | None


def blocks(text: str) -> Iterator[Block]:
    """The Python blocks of a page. A `text` block that follows one, with nothing in between, is its output."""
    fences = list(FENCE.finditer(text))
    for this, after in itertools.zip_longest(fences, fences[1:]):
        if this["language"] not in ("python", "py", "pycon") or SKIP.search(text[: this.start()]):
            continue
        assert this["language"] == "python", f"write ```python, not ```{this['language']}: only that is run"
        shown = None
        if after and after["language"] == "text" and not text[this.end() : after.start()].strip():
            shown = textwrap.dedent(after["body"])
        yield Block(textwrap.dedent(this["body"]), text[: this.start("body")].count("\n"), shown)


def same_output(shown: str, printed: str) -> bool:
    """Whether a page shows what its code printed. `...` stands for anything, as in a doctest.

    A number in scientific notation need only be right to a factor of three: these are residuals and errors,
    whose digits depend on the machine.
    """
    ours, theirs = SCIENTIFIC.findall(shown), SCIENTIFIC.findall(printed)
    if len(ours) == len(theirs) and all(
        1 / 3 < float(a) / float(b) < 3 for a, b in zip(ours, theirs, strict=True)
    ):
        shown, printed = SCIENTIFIC.sub("#", shown), SCIENTIFIC.sub("#", printed)
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)


@pytest.fixture
def _registries() -> Iterator[None]:
    """What a page registers is forgotten after it."""
    before = [(table, dict(table)) for table in (SOLVERS, GRADS, CORES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_on_the_page_runs_and_prints_what_is_shown(page: Path) -> None:
    torch.manual_seed(0)
    module = types.ModuleType(f"code on the page {page.name}")
    sys.modules[module.__name__] = module  # a dataclass looks up the module it is defined in
    text = page.read_text(encoding="utf-8")
    linecache.cache[str(page)] = (len(text), None, text.splitlines(keepends=True), str(page))
    try:
        for block in blocks(text):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(
                    compile("\n" * block.line + block.code, str(page), "exec", dont_inherit=True),
                    vars(module),
                )
            if block.prints is not None:
                assert same_output(block.prints, printed.getvalue()), (
                    f"{page.relative_to(ROOT)}, line {block.line}: the page shows\n{block.prints}\nbut the code "
                    f"printed\n{printed.getvalue()}"
                )
        for example in doctest.DocTestFinder().find(module):
            assert doctest.DocTestRunner().run(example).failed == 0, f"the docstring of {example.name}"
    finally:
        del sys.modules[module.__name__]


def test_blocks_are_found_with_their_output_and_skipped_with_a_reason() -> None:
    page = textwrap.dedent(
        """
        ```python
        print(1)
        ```

        ```text
        1
        ```
        <!-- not run: needs a GPU -->
        ```python
        boom
        ```
        ```bash
        ls
        ```
            ```python
            x = 2
            ```
        """
    )
    assert list(blocks(page)) == [Block("print(1)\n", 2, "1\n"), Block("x = 2\n", 16, None)]


def test_shown_numbers_must_be_about_right() -> None:
    assert same_output("residual 1.00e-05, nfe=7\n", "residual 2.13e-05, nfe=7\n")
    assert not same_output("residual 1.00e-05, nfe=7\n", "residual 1.00e-04, nfe=7\n")
    assert not same_output("residual 1.00e-05, nfe=7\n", "residual 1.00e-05, nfe=8\n")
    assert same_output("Solution(...)\n", "Solution(4 of 4 converged)\n")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name: str) -> None:
    package, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(package), attribute)
    if attribute in REGISTRIES:
        return
    own = vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert own, f"{name} has no docstring of its own"
    assert ">>>" in own, f"the docstring of {name} has no example"


@pytest.mark.parametrize("name", sorted({name.rpartition(".")[2] for name in PUBLIC}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert re.search(rf"^::: torchdeq[\w.]*\.{name}$", reference, re.M), f"docs/api/ has no entry for {name}"


def test_the_table_of_options_is_that_of_the_library() -> None:
    page = (ROOT / "docs" / "api" / "compat.md").read_text(encoding="utf-8")
    rows = [f"| `{o.name}` | `{o.default!r}` | {o.help} |" for o in OPTIONS]
    shown = [line for line in page.splitlines() if re.match(r"\| `\w+` \| `", line)]
    assert shown == rows


def test_the_design_names_every_module_and_every_status() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = design[design.index("torchdeq/\n") : design.index("## Floors")]
    modules = [
        path for folder in ("", "solver", "grad") for path in (ROOT / "torchdeq" / folder).glob("*.py")
    ]
    missing = [path.stem for path in modules if not re.search(rf"\b{path.stem}\b", tree)]
    assert not missing
    for status in Status:
        assert f"| {status.value} | `{status.name}` |" in design


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
