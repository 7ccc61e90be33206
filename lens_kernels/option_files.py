"""YAML files of options. Options become words of a command line, so that one parser checks both."""

from __future__ import annotations

import json
from typing import Any

import yaml

# The key under which the record of a run holds versions and hashes. It is no option.
MADE_WITH = "made_with"


def read_options(text: str) -> dict[str, list[str] | None]:
    """Return each option of a YAML text as words of a command line, or None for its default value.

    Raises:
        ValueError: The text is not YAML, is not a mapping, or has a key twice.
    """
    try:
        values = yaml.load(text, _UniqueLoader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected options as 'name: value', got a {type(values).__name__}")
    values.pop(MADE_WITH, None)
    return {str(key): as_words(value) for key, value in values.items()}


class _UniqueLoader(yaml.SafeLoader):
    """A YAML loader that refuses a key that occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def as_words(value: Any) -> list[str] | None:
    """Return a value as words of a command line."""
    if value is None:
        return None
    if isinstance(value, list):
        return [*map(_as_text, value)]
    return [_as_text(value)]


def _as_text(value: Any) -> str:
    if value is False:
        return "no"  # YAML reads the word "no" as False
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)
