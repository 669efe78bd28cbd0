"""``pruning-core slim FOLDER``: removes channels of a model that ``save_pretrained`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pruning_core.channels.slim import slim
from pruning_core.checkpoint import CheckpointError
from pruning_core.cli.packing import check_free
from pruning_core.integrations.transformers.folder import CARD, INDEX, made_beside, read_folder


def slim_folder(
    source: Path, out: Path | None, budget: dict[str, float], overwrite: bool, plot: str | None = None, **options: Any
) -> str:
    """The report, and where the cut model lies; everything but its weights and config is copied."""
    if source.is_file():
        raise CheckpointError(
            f"{source}: is a file; give a folder that save_pretrained wrote, or a YOLOv5 to apps/yolov5/slim.py"
        )
    out = out or source.with_name(f"{source.name}-slim")
    check_free(out, overwrite)
    config, shards = read_folder(source)
    model = _model(source, config)
    done = slim(model, budget, example_of(model), **options)
    with made_beside(out, source, shards) as made:
        for stale in (INDEX, CARD):  # of the dense model
            (made / stale).unlink(missing_ok=True)
        model.save_pretrained(made)
    if plot:
        done.report.plot(plot)
    kind = type(model).__name__
    first = "" if done.plan.configuration else " after `import pruning_core`; --uniform makes one that needs no import"
    return f"{done}\n{out}: {kind}.from_pretrained loads it{first}"


def _model(source: Path, config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or ["(none)"]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise CheckpointError(
            f"{source}: its config names no class of transformers, got {names[0]!r}; use slim_ instead"
        )
    return kind.from_pretrained(source).eval()


def example_of(model: Any) -> dict[str, torch.Tensor]:
    """Words or an image, by what the model says that it takes."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", 3), height, width).normal_()}
    if model.main_input_name == "input_ids":
        words = torch.arange(2 * 16).view(2, 16) % config.get_text_config().vocab_size
        more = {"decoder_input_ids": words[:, :8]} if config.is_encoder_decoder else {}
        return {"input_ids": words, **more}
    raise CheckpointError(
        f"{type(model).__name__}: takes {model.main_input_name}, for which no example is made here; use slim_ instead"
    )
