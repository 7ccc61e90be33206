"""An extension of griffe: docstrings as the API page shows them."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Documents dataclass fields by their help texts, and removes the marks of literal blocks."""

    def on_attribute(
        self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **_: Any
    ) -> None:
        """Take the docstring of a field from the second argument of ``option(default, text)``."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "option":
            text = ast.parse(str(value.arguments[1]), mode="eval").body
            attr.docstring = griffe.Docstring(_text(text, attr, loader), parent=attr)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write ``:`` for the ``::`` that introduces a literal block."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("::\n", ":\n")


def _text(node: ast.AST, attr: griffe.Attribute, loader: griffe.GriffeLoader) -> str:
    """Return the string of a literal. In f-strings, module-level constants have their values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        names = {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)}
        objects = {name: loader.modules_collection[attr.resolve(name)] for name in names}
        values = {name: ast.literal_eval(str(x.value)) for name, x in objects.items()}
        return str(eval(ast.unparse(node.value), {}, values))
    return "".join(_text(part, attr, loader) for part in ast.iter_child_nodes(node))
