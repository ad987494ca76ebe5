"""The limits of CONTRIBUTING.md, so that they hold without anybody remembering them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import agentlightning as agl

ROOT = Path(agl.__file__).parent
MAX_LINES = 450
MAX_FUNCTION_LINES = 50
MAX_DEPTH = 2
MAX_FILES = 260
MAX_TOTAL_LINES = 51_500
"""What the package has today, rounded up: only a feature may raise it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def lines_of(module: str) -> int:
    return FILES[module].read_text(encoding="utf-8").count("\n")


def rooms() -> dict[str, int]:
    """Lines of each package."""
    found: dict[str, int] = defaultdict(int)
    for module, path in FILES.items():
        found[str(path.parent.relative_to(ROOT))] += lines_of(module)
    return found


def test_the_whole_is_small() -> None:
    assert len(FILES) <= MAX_FILES
    assert sum(map(lines_of, FILES)) <= MAX_TOTAL_LINES


def test_no_room_is_more_than_a_fifth() -> None:
    found = rooms()
    largest = max(found, key=found.__getitem__)
    assert found[largest] * 5 <= sum(found.values()), largest


def test_packages_are_two_folders_deep_at_most() -> None:
    assert [room for room in rooms() if len(Path(room).parts) > MAX_DEPTH] == []


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_short(module: str) -> None:
    assert lines_of(module) <= MAX_LINES


def functions(node: ast.AST) -> Iterator[Function]:
    for each in ast.walk(node):
        if isinstance(each, Function):
            yield each


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short(module: str) -> None:
    """Not counting the docstring, which a long signature of a public interface needs."""
    for function in functions(tree_of(module)):
        first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
        signature = function.body[0].lineno - function.lineno
        assert (function.end_lineno or 0) - first.lineno + 1 + signature <= MAX_FUNCTION_LINES, function.name


# --- Imports ---------------------------------------------------------------------------------------------


def imports_of(module: str) -> set[str]:
    """The modules of this package that it imports: at its top, for type checkers, and inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                whole if (whole := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & FILES.keys()) - {module}


def test_no_import_goes_in_a_circle() -> None:
    graph = {module: imports_of(module) for module in FILES if module != "agentlightning"}
    left = dict(graph)
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    assert sorted(left) == [], "these modules import each other, or what does"


def test_only_packages_list_their_names() -> None:
    inner = [module for module, path in FILES.items() if path.name != "__init__.py"]
    assert [module for module in inner if "__all__" in names_assigned(tree_of(module))] == []


def names_assigned(tree: ast.Module) -> set[str]:
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return {target.id for target in targets if isinstance(target, ast.Name)}


# --- Names and docstrings --------------------------------------------------------------------------------


def public_classes(module: str) -> list[ast.ClassDef]:
    return [node for node in tree_of(module).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def test_a_public_class_name_stands_for_one_thing() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in FILES:
        for node in public_classes(module):
            homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", FILES)
def test_what_is_public_has_a_docstring(module: str) -> None:
    tree = tree_of(module)
    if lines_of(module):
        assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, Function) and is_public(node):
            assert ast.get_docstring(node), node.name
    for owner in public_classes(module):
        assert ast.get_docstring(owner), owner.name
        known = overridden(module, owner)
        for node in owner.body:
            if isinstance(node, Function) and is_public(node) and node.name not in known:
                assert ast.get_docstring(node), f"{owner.name}.{node.name}"


def is_public(function: Function) -> bool:
    decorators = {ast.unparse(each) for each in function.decorator_list}
    return not function.name.startswith("_") and not decorators & {"overload", "override"}


def overridden(module: str, owner: ast.ClassDef) -> set[str]:
    """Methods that a base class declares: its docstring is theirs."""
    from importlib import import_module

    bases = getattr(import_module(module), owner.name).__mro__[1:]
    return {name for base in bases for name in vars(base)}


@pytest.mark.parametrize("module", FILES)
def test_nothing_draws_from_the_generator_of_the_users_program(module: str) -> None:
    """Who seeds ``random`` expects the same numbers each time, whatever else runs in the process."""
    drawn = [
        node.attr
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr not in ("Random", "SystemRandom")
    ]
    assert drawn == []
