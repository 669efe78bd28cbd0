"""``save_pretrained_sparse``: a model's folder with packed weights, which plain ``from_pretrained`` reads."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pruning_core.checkpoint import METHOD, CheckpointError
from pruning_core.sparse_format.sparse_file import AUTO, Packing, read_safetensors, write_dense, write_state

CONFIG, WEIGHTS, INDEX, CARD = "config.json", "model.safetensors", "model.safetensors.index.json", "README.md"
OWN = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
"""The names that ``save_pretrained`` gives to weights and their index."""
CARD_MARK = "Its zeros are packed"
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
    """Like ``model.save_pretrained(folder)``, with packed weights; ``push_to_hub="user/name"`` uploads the folder.

    There are as many shards as of the dense model. Save the tokenizer to the same folder as usual.
    """
    packing, folder = Packing.of(codec, values, pattern), Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as dense:
        model.save_pretrained(dense, max_shard_size=max_shard_size)
        pack_folder(dense, folder, packing, push_to_hub)
    if push_to_hub is not None:
        upload(folder, push_to_hub)


def pack_folder(source: str | Path, folder: str | Path, packing: Packing, name: str | None = None) -> None:
    """Packs a folder that ``save_pretrained`` wrote; other files are copied. ``name`` is for the model card."""
    source, folder = Path(source), Path(folder)
    config, shards = read_folder(source)
    about = config.get("quantization_config") or {}
    if about and (about.get("quant_method") != METHOD or not about.get("slim") or about.get("packed")):
        raise CheckpointError(f"{source}: is packed or quantized already; give the folder it was made from")
    with made_beside(folder, source, shards) as made:
        for shard in shards:
            write_state(read_safetensors(source / shard), made / shard, packing)
        _write_json(made / CONFIG, {**config, "quantization_config": {"quant_method": METHOD, **_packed(about)}})
        if not (made / CARD).exists() and not (folder / CARD).exists():
            kind = (config.get("architectures") or ["AutoModel"])[0]
            sizes = {"dense": _size(source, shards), "packed": _size(made, shards)}
            card = CARD_TEXT.format(name=name or folder.name, kind=kind, **sizes)
            (made / CARD).write_text(card, encoding="utf-8")


def unpack_folder(source: str | Path, folder: str | Path) -> None:
    """Writes the dense folder of a packed one, without the card about packed weights."""
    source, folder = Path(source), Path(folder)
    config, shards = read_folder(source)
    about = config.pop("quantization_config", None) or {}
    if about.pop("quant_method", None) != METHOD or (about and not about.pop("packed", False)):
        raise CheckpointError(f"{source}: is not packed; give a folder that save_pretrained_sparse wrote")
    with made_beside(folder, source, shards) as made:
        for shard in shards:
            write_dense(source / shard, made / shard)
        _write_json(
            made / CONFIG, {**config, "quantization_config": {"quant_method": METHOD, **about}} if about else config
        )
        if (made / CARD).exists() and CARD_MARK in (made / CARD).read_text(encoding="utf-8", errors="replace"):
            (made / CARD).unlink()


@contextmanager
def made_beside(folder: Path, source: Path, shards: list[str]) -> Iterator[Path]:
    """A folder with everything of the source but its weights; what it holds at the end is moved to ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary)
        for path in source.iterdir():
            if path.is_file() and path.name not in shards:
                shutil.copy(path, made)
        yield made
        _move(made, folder)


def _packed(about: dict[str, Any]) -> dict[str, Any]:
    """A cut model goes on saying how it was cut."""
    return {"slim": about["slim"], "packed": True} if about else {}


def _size(folder: Path, shards: list[str]) -> int:
    return sum((folder / shard).stat().st_size for shard in shards)


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def read_folder(source: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's config and the names of its files of weights."""
    config, shards = _read_json(source, CONFIG), [WEIGHTS]
    if not (source / WEIGHTS).exists() and (source / INDEX).exists():
        names = _read_json(source, INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{source / INDEX}: names no weights; save the model with save_pretrained")
        for name in names.values():  # a name, not a path to somewhere else
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{source / INDEX}: names a file that cannot be, got {name!r:.80}")
        shards = sorted(set(names.values()))
    for shard in shards:
        if not (source / shard).is_file():
            raise CheckpointError(f"{source}: has no {shard}; save the model with save_pretrained")
    return config, shards


def _read_json(source: Path, name: str) -> dict[str, Any]:
    try:
        plain = json.loads((source / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{source}: has no {name}; give a folder that save_pretrained wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source / name}: cannot be read ({error})") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{source / name}: must hold an object, got {type(plain).__name__}")
    return plain


def _move(made: Path, folder: Path) -> None:
    """Everything is on the disk by now: what remains are renames. Weights of an older model do not stay beside it."""
    folder.mkdir(exist_ok=True)
    new = {path.name for path in made.iterdir()}
    for path in made.iterdir():
        path.replace(folder / path.name)
    for old in folder.iterdir():
        if old.name not in new and re.fullmatch(OWN, old.name):
            old.unlink()


def upload(folder: Path, repository: str) -> None:
    """Creates the repository on the hub where it is missing, and uploads the folder."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Packed by pruning_core",
        delete_patterns=["model.safetensors", "model-*-of-*.safetensors", INDEX],  # of another number of shards
    )
