"""Reads a YAML mapping from an untrusted file: bounded size and depth, no objects, no aliases, no duplicate keys.

``!Pruner`` and ``!PrunerV2`` (mappings in Neural Compressor's files) are the only tags. Scalars are read as in YAML
1.2: an unquoted ``2:4`` is a string (in YAML 1.1 the number 124) and ``1e-4`` a number (in YAML 1.1 a string).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 30
MAX_NODES = 20_000

NUMBERS_AND_SUCH = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9_]{0,18})", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Implicit types of unquoted scalars: type -> (regular expression of the whole text, its first characters)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's table, filled below)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _at(key_node, "a key must be plain text")
            if key_node.value in seen:
                raise _at(key_node, f"duplicate key {key_node.value!r}; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _at(node: yaml.Node | yaml.Event, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _pruner(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        how = f"as '{node.tag}' and then 'pattern: 4x1' on the next line"
        raise _at(node, f"{node.tag} must be followed by options, {how}")
    return loader.construct_mapping(node, deep=True)


TAGS = ("!Pruner", "!PrunerV2")
for _tag in TAGS:
    _Loader.add_constructor(_tag, _pruner)
for _kind, (_text, _first) in NUMBERS_AND_SUCH.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_text})\\Z"), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError with file and line for anything else."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES} bytes; this is not a pruning configuration")
        text = content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path of the configuration") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text; check the path of the configuration") from error
    try:
        _check_size(path, text)
        loaded = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{path}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if loaded is None:
        raise ValueError(f"{path}: is empty; write at least 'target_sparsity: 0.8'")
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: must be a mapping of options, got {type(loaded).__name__}; see docs/configuration.md"
        )
    return loaded


def _check_size(path: Path, text: str) -> None:
    """Bounds depth and length on the parser's event stream, before any node is built."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, _Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            raise _at(event, f"aliases are not read, got '*{event.anchor}'; write the options out")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!", *TAGS):
            raise _at(event, f"unknown tag {tag[:80]!r}; known: {', '.join(TAGS)}")
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise ValueError(f"{path}: nested too deep or too long; this is not a pruning configuration")
