"""YAML as text: every scalar stays a string, so that the type of its field decides what it means.

Plain YAML turns `1e-4` into a string, `010` into 8 and `off` into False. Nothing is built but str, list and dict.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adaptkit.errors import UsageError

MAX_RECIPE_BYTES = 1 << 18  # takes a second or two to read


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with every scalar left as text. Raises `UsageError`."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; this is not a recipe")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path}: cannot be read as a recipe, which is a YAML file; check the path") from None
    tree = parse_yaml(text, str(path))
    if tree in (None, ""):
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values")
    return tree


class _TextLoader(yaml.BaseLoader):
    """Scalars stay text; duplicate keys and aliases (the means of YAML bombs) are errors."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError("keys must be plain words")
            if key_node.value in seen:
                raise yaml.YAMLError(f"{key_node.value} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        text = super().construct_scalar(node)
        try:
            text.encode("utf-8", "surrogateescape")  # as `recipe.yaml` is written: file names need not be UTF-8
        except UnicodeEncodeError:
            raise yaml.YAMLError("half of a surrogate pair is no character") from None
        return text


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> str, list or dict. Raises `UsageError` with `where` in front."""
    try:
        return yaml.load(text, Loader=_TextLoader)  # a BaseLoader: builds only str, list, dict
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UsageError(f"{where}: not valid YAML ({_reason(error)}); mend it") from None


def _reason(error: Exception) -> str:
    """`line 3: ...`: what PyYAML says in four lines with drawings."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = " ".join(str(problem or error).split())[:160]
    return f"line {mark.line + 1}: {text}" if mark else text
