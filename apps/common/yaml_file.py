"""A user's yaml file: a mapping, or one line about what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from apps.common.errors import BadInput
from pruning_core.checkpoint import write_atomically


def read_yaml(path: str, *, option: str, missing: str, expected: str, example: str) -> dict[str, Any]:
    """``missing``: what to do when there is no file; ``expected``: what it must hold; ``example``: where to see one."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{option}: no such file, got {path!r}; {missing}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"{option}: not a yaml file ({' '.join(str(error).split())}), got {path!r}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{option}: must hold {expected}, got {path!r}; {example}")
    return content


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))
