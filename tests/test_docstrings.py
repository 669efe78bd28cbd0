"""Every public function, class and method says what it does."""

import ast
import inspect

import pytest

import pruning_core as pc
from tests.support import ROOT

FILES = sorted((ROOT / "pruning_core").rglob("*.py"))
DEFINITIONS = ast.FunctionDef | ast.ClassDef
PLAIN = {"ABC", "abc.ABC", "NamedTuple", "Protocol", "ValueError", "dict"}
"""Bases that document nothing for a class."""


def undocumented(source):
    """Public definitions of a module or a class without a docstring, as ``Class.method``.

    A method that overrides one of a class in the same file, or of an imported one, has the docstring of that one.
    """
    found = []

    def visit(body, prefix, inherits):
        for node in body:
            if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None and not (inherits and isinstance(node, ast.FunctionDef)):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.", any(ast.unparse(base) not in PLAIN for base in node.bases))

    visit(ast.parse(source).body, "", False)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_and_its_definitions(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), path
    assert undocumented(source) == []


PUBLIC = [name for name in pc.__all__ if inspect.isroutine(getattr(pc, name)) or inspect.isclass(getattr(pc, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names(name):
    found = getattr(pc, name)
    first = (inspect.getdoc(found) or "").partition("\n")[0]
    assert first and len(first) <= 120 and first.endswith((".", ":")), first
    for member, value in vars(found).items() if inspect.isclass(found) else ():
        if not member.startswith("_") and inspect.isroutine(value):
            assert inspect.getdoc(getattr(found, member)), f"{name}.{member}"


def test_the_search_can_fail():
    source = """
class A:
    '''a.'''
    def f(self): ...
    def _g(self): ...
class B(A):
    '''b.'''
    def f(self): ...
def h(): ...
"""
    assert undocumented(source) == ["A.f", "h"]
