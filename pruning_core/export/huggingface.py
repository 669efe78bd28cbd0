"""``save_pretrained_sparse``: a model's folder with packed weights, which plain ``from_pretrained`` reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pruning_core.checkpoint import CheckpointError
from pruning_core.export.sparse_file import AUTO, Choice, write_dense, write_state

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
METHOD = {"quant_method": "pruning_core"}
CARD_TEXT = """---
library_name: transformers
tags: [pruning_core, sparse]
---

# {name}

A pruned model. Its zeros are packed: {packed:,} bytes in place of {dense:,}.

```python
import pruning_core  # teaches transformers to unpack
from transformers import {kind}

model = {kind}.from_pretrained("{name}")
```

Without `import pruning_core` transformers refuses to load it. Once loaded it is an ordinary dense model with zeros.
"""


def save_pretrained_sparse(
    model: Any,
    folder: str | Path,
    *,
    codec: str = "entropy",
    values: str = "fp32",
    pattern: str = AUTO,
    max_shard_size: str | int = "5GB",
    push_to_hub: str | None = None,
) -> None:
    """``model.save_pretrained(folder)`` with packed weights; ``push_to_hub="user/name"`` uploads the folder.

    Shards are as many as the dense model would have. Save the tokenizer beside it as usual.
    """
    choice, folder = Choice.of(codec, values, pattern), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as dense:
        model.save_pretrained(dense, max_shard_size=max_shard_size)
        pack_folder(dense, folder, choice)
    if push_to_hub is not None:
        upload(folder, push_to_hub)


def pack_folder(source: str | Path, folder: str | Path, choice: Choice) -> None:
    """The same for a folder that ``save_pretrained`` wrote: all other files are copied."""
    source, folder = Path(source), Path(folder)
    config, shards = _read(source)
    if config.get("quantization_config"):
        raise CheckpointError(f"{source}: is packed or quantized already; give the folder it was made from")
    with _made_beside(folder, source, shards) as made:
        for shard in shards:
            write_state(load_file(source / shard), made / shard, choice)
        _write_json(made / CONFIG, {**config, "quantization_config": METHOD})
        if not (made / CARD).exists() and not (folder / CARD).exists():
            kind = (config.get("architectures") or ["AutoModel"])[0]
            sizes = {"dense": _size(source, shards), "packed": _size(made, shards)}
            (made / CARD).write_text(CARD_TEXT.format(name=folder.name, kind=kind, **sizes))


def unpack_folder(source: str | Path, folder: str | Path) -> None:
    """The dense folder again."""
    source, folder = Path(source), Path(folder)
    config, shards = _read(source)
    if config.pop("quantization_config", None) != METHOD:
        raise CheckpointError(f"{source}: is not packed; give a folder that save_pretrained_sparse wrote")
    with _made_beside(folder, source, shards) as made:
        for shard in shards:
            write_dense(source / shard, made / shard)
        _write_json(made / CONFIG, config)


@contextmanager
def _made_beside(folder: Path, source: Path, shards: list[str]) -> Iterator[Path]:
    """A folder with everything of the source but its weights; what it holds at the end is moved to ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary)
        for path in source.iterdir():
            if path.is_file() and path.name not in shards:
                shutil.copy(path, made)
        yield made
        _move(made, folder)


def _size(folder: Path, shards: list[str]) -> int:
    return sum((folder / shard).stat().st_size for shard in shards)


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2) + "\n")


def _read(source: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's config and the names of its files of weights."""
    try:
        config = json.loads((source / CONFIG).read_text())
        index = source / INDEX
        if not (source / WEIGHTS).exists() and index.exists():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            shards = [WEIGHTS]
        missing = [shard for shard in (CONFIG, *shards) if not (source / shard).is_file()]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{source}: is not a model's folder ({error}); save it with save_pretrained") from None
    if missing:
        raise CheckpointError(f"{source}: has no {missing[0]}; save it with save_pretrained")
    return config, shards


def _move(made: Path, folder: Path) -> None:
    """Everything is on the disk by now: what remains are renames. Weights of an older model do not stay beside it."""
    folder.mkdir(exist_ok=True)
    new = {path.name for path in made.iterdir()}
    for path in made.iterdir():
        path.replace(folder / path.name)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX):
        if old.name not in new:
            old.unlink(missing_ok=True)


def upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Packed by pruning_core")
