"""The house: README's table names every module, and each imports only from those that stand before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent


def house(readme: str) -> list[str]:
    """The modules that README's table names, from the ground up."""
    section = readme.split("\n## The house\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def modules(package: Path) -> dict[str, list[Path]]:
    """The modules of a package, each with its files: its own, or all of its folder."""
    files = {path.stem: [path] for path in package.glob("*.py") if path.stem != "__init__"}
    return files | {path.parent.name: sorted(path.parent.rglob("*.py")) for path in package.glob("*/__init__.py")}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All that is in a tree, but for what only a type checker sees."""
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield child
        yield from statements(child)


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """The line of each import from a package, and the module of it that is meant; "" for a relative one."""
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, ""
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith(f"{package}."))


def problems(readme: str, package: Path) -> list[str]:
    """What of a package is not as README's table says."""
    told, there = house(readme), modules(package)
    found = [f"{name}: named twice" for name in sorted(set(told)) if told.count(name) > 1]
    found += [f"{name}: README's table lacks it" for name in sorted(set(there) - set(told))]
    found += [f"{name}: README's table names it, and it is not there" for name in sorted(set(told) - set(there))]
    height = {name: place for place, name in enumerate(told)}
    for name in set(told) & set(there):
        for path in there[name]:
            for line, other in imported(path.read_text(encoding="utf-8"), package.name):
                where = f"{path.relative_to(package)}:{line}"
                if not other:
                    found.append(f"{where}: a relative import; name the module in full")
                elif height.get(other, -1) > height[name]:
                    found.append(f"{where}: {name} imports {other}, which stands further down")
    return sorted(found)


def test_the_table_is_true_of_all_modules() -> None:
    assert problems((HOME / "README.md").read_text(encoding="utf-8"), HOME / "cellhpc") == []


TABLE = """
## The house

| module | what |
|---|---|
| `ground`, `first` | below |
| `rooms` | above; not `first` |

## Else
| `attic` | no module |
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that is as `TABLE` says."""
    (tmp_path / "made/rooms").mkdir(parents=True)
    (tmp_path / "made/__init__.py").write_text("from made.rooms import door")
    (tmp_path / "made/ground.py").write_text("import os\nimport maderia.rooms")
    (tmp_path / "made/first.py").write_text("import made.ground")
    (tmp_path / "made/rooms/__init__.py").write_text("from made import first\nfrom made.rooms.door import key")
    (tmp_path / "made/rooms/door.py").write_text("from made.ground import key")
    return tmp_path / "made"


def test_a_package_that_is_as_the_table_says(package: Path) -> None:
    assert problems(TABLE, package) == []


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("first.py", "from made.rooms import door", "first.py:1: first imports rooms, which stands further down"),
        ("first.py", "from made import ground, rooms", "first.py:1: first imports rooms, which stands further down"),
        ("ground.py", "import made.rooms.door", "ground.py:1: ground imports rooms, which stands further down"),
        (
            "ground.py",
            "def f():\n    import made.first",
            "ground.py:2: ground imports first, which stands further down",
        ),
        (
            "ground.py",
            "if TYPE_CHECKING:\n    import made.first\nelse:\n    import made.rooms",
            "ground.py:4: ground imports rooms, which stands further down",
        ),
        ("rooms/door.py", "from . import key", "rooms/door.py:1: a relative import; name the module in full"),
        ("attic.py", "", "attic: README's table lacks it"),
        ("attic/__init__.py", "", "attic: README's table lacks it"),
    ],
)
def test_what_is_wrong_is_named(file: str, source: str, problem: str, package: Path) -> None:
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(source)
    assert problems(TABLE, package) == [problem]


def test_a_module_that_went_away_is_named(package: Path) -> None:
    (package / "first.py").unlink()
    assert problems(TABLE, package) == ["first: README's table names it, and it is not there"]
