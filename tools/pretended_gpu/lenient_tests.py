"""Tests whose assertions are evaluated and never fail, so that they go on to their last launch."""

import ast
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any

FOLDER = "tests"


class _Lenient(ast.NodeTransformer):
    """`assert x` becomes: try x."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        tried = ast.Try([ast.Expr(node.test)], [ast.ExceptHandler(None, None, [ast.Pass()])], [], [])
        return ast.fix_missing_locations(ast.copy_location(tried, node))


class _LenientLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        tree = _Lenient().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _LenientFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002
        if fullname.partition(".")[0] != FOLDER:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LenientLoader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """For all modules of tests that are imported from here on."""
    sys.meta_path.insert(0, _LenientFinder())
