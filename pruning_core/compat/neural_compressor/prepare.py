"""The three ways in: ``prepare_compression``, ``prepare_pruning`` and ``Config(pruning=...)``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pruning_core import checkpoint
from pruning_core.compat.neural_compressor.pruning import Pruning, WeightPruningConfig


class Config:
    """Neural Compressor's configuration of everything, of which ``pruning`` is here; the rest must be None."""

    def __init__(self, *, pruning: Any = None, **others: Any) -> None:
        for name, value in others.items():
            if value is not None:
                raise ValueError(
                    f"{name}: is not here, got {type(value).__name__}; only pruning is, {_elsewhere(name)}"
                )
        self.pruning = None if pruning is None else WeightPruningConfig(pruning)


def _elsewhere(name: str) -> str:
    return "see docs/distillation.md" if name == "distillation" else "leave it out"


class CompressionManager:
    """``model`` with its pruner: ``callbacks`` are the hooks of ``Pruning``, ``conf.pruning`` the configuration."""

    def __init__(self, model: nn.Module, confs: Any) -> None:
        confs = confs if isinstance(confs, list | tuple) and not _is_list_of_options(confs) else [confs]
        if len(confs) != 1:
            names = ", ".join(type(each).__name__ for each in confs)
            raise ValueError(
                f"confs: must be one pruning configuration, got {names or 'an empty list'}; leave the others out"
            )
        self.model, self.callbacks = model, Pruning(confs[0])
        self.callbacks.model = model
        self.conf = Config(pruning=self.callbacks.config)

    def save(self, root: str | Path) -> None:
        """Writes the model's ``state_dict`` to ``best_model.pt`` in the folder ``root``."""
        Path(root).mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.model.state_dict(), Path(root) / "best_model.pt")


def _is_list_of_options(confs: list[Any] | tuple[Any, ...]) -> bool:
    return bool(confs) and all(isinstance(each, dict) for each in confs)


def prepare_compression(model: nn.Module, confs: Any) -> CompressionManager:
    """A manager whose ``callbacks`` the training loop calls.

    >>> manager = prepare_compression(model, WeightPruningConfig([{"pattern": "4x1"}], start_step=1, end_step=100))
    >>> manager.callbacks.on_train_begin()
    """
    return CompressionManager(model, confs)


def prepare_pruning(
    model: nn.Module,
    config: Any,
    optimizer: Any = None,
    dataloader: Any = None,
    loss_func: Any = None,
    framework: str = "pytorch",
    device: Any = None,
) -> Pruning:
    """A pruner driven by the optimizer's own step hooks; model and optimizer are not changed.

    What there needs a dataloader and no optimizer (``sparse_gpt``, ``retrain_free``) is not here.
    """
    if framework != "pytorch":
        raise ValueError(f"framework: must be 'pytorch', got {framework!r}")
    pruning = Pruning(config)
    if optimizer is None:
        raise ValueError("optimizer: pruning without training is not here, got None; pass the optimizer of the loop")
    return pruning.attach(model, optimizer)
