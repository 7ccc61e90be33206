"""An extension of griffe: docstrings and defaults as the API page shows them."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Documents dataclass fields by their help texts, and shows the values of defaults."""

    def on_attribute(
        self, *, attr: griffe.Attribute, loader: griffe.GriffeLoader, **_: Any
    ) -> None:
        """Take value and docstring of a field from ``option(default, text)``."""
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option":
            default, text = call.arguments[:2]
            attr.docstring = griffe.Docstring(_text(text, attr, loader), parent=attr)
            attr.value = _value(default, loader)

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Show ``0.5`` for a default such as ``LossOptions.beta``."""
        for parameter in func.parameters:
            parameter.default = _value(parameter.default, loader)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write ``:`` for the ``::`` that introduces a literal block."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("::\n", ":\n")


def _value(default: Any, loader: griffe.GriffeLoader) -> Any:
    """Return the value of a class attribute of this package, or else ``default``."""
    owner, _, name = getattr(default, "canonical_path", "").rpartition(".")
    if not isinstance(default, griffe.ExprAttribute) or not owner.startswith("lens_kernels."):
        return default
    return loader.modules_collection[owner].all_members[name].value


def _text(text: Any, attr: griffe.Attribute, loader: griffe.GriffeLoader) -> str:
    """Return the string of a literal. In f-strings, module-level constants have their values."""

    def part(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if not isinstance(node, ast.FormattedValue):
            return "".join(map(part, ast.iter_child_nodes(node)))
        names = {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)}
        objects = {name: loader.modules_collection[attr.resolve(name)] for name in names}
        values = {name: ast.literal_eval(str(x.value)) for name, x in objects.items()}
        return str(eval(ast.unparse(node.value), {}, values))

    return part(ast.parse(str(text), mode="eval").body)
