"""Reads a YAML mapping that may come from anywhere: bounded, without objects, without duplicate keys.

``!Pruner`` (a mapping in Neural Compressor's files) is the only tag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 30
MAX_NODES = 20_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _at(key_node, "a key must be plain text")
            if key_node.value in seen:
                raise _at(key_node, f"duplicate key {key_node.value!r}; keep one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _pruner(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _at(node, "!Pruner must be followed by options, as '!Pruner' and then 'pattern: 4x1' on the next line")
    return loader.construct_mapping(node, deep=True)


def _unknown(loader: _Loader, node: yaml.Node) -> Any:
    raise _at(node, f"unknown tag {node.tag!r}; the only tag is !Pruner")


_Loader.add_constructor("!Pruner", _pruner)
_Loader.add_constructor(None, _unknown)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError naming the file and the line for everything else."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES} bytes; this is not a pruning configuration")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path of the configuration") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text; check the path of the configuration") from error
    try:
        _check_size(path, text)
        loaded = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML ({error})") from error
    if loaded is None:
        raise ValueError(f"{path}: is empty; write at least 'target_sparsity: 0.8'")
    if not isinstance(loaded, dict):
        raise ValueError(
            f"{path}: must be a mapping of options, got {type(loaded).__name__}; see docs/configuration.md"
        )
    return loaded


def _check_size(path: Path, text: str) -> None:
    """Counts the parser's flat events, before anything nested is built."""
    depth = 0
    for nodes, event in enumerate(yaml.parse(text, _Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            raise _alias(event)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise ValueError(f"{path}: nested too deep or too long; this is not a pruning configuration")


def _alias(event: yaml.AliasEvent) -> yaml.MarkedYAMLError:
    problem = f"aliases are not read, got '*{event.anchor}'; write the options out, or put them in the global section"
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
