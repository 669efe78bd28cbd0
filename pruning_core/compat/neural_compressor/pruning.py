"""``Pruning`` and ``WeightPruningConfig`` with Neural Compressor's names, over those of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pruning_core.masks.config import WeightPruningConfig as _WeightPruningConfig
from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.pruning import Pruning as _Pruning
from pruning_core.patterns import NinM, parse_pattern
from pruning_core.selection import Selector, Target, family, split_key, targets_of, unwrap


class WeightPruningConfig(_WeightPruningConfig):
    """``WeightPruningConfig`` as Neural Compressor reads it: N of N:M are pruned, unknown options are warned about.

    An option that looks like a known one, misspelt, is an error here too.
    """

    written_for_neural_compressor: ClassVar[bool] = True

    @property
    def pruning_configs(self) -> list[dict[str, Any]]:
        """All options of each pruner, as Neural Compressor reads them."""
        return [_as_there(options) for options in self.pruners]


def _as_there(options: PrunerOptions) -> dict[str, Any]:
    """All options by name; N of N:M counts what is pruned, and no maximum lies above what the pattern allows."""
    pattern, most = options.parsed_pattern, options.max_sparsity_ratio_per_op
    if isinstance(pattern, NinM):
        spelled = f"{pattern.of - pattern.kept}:{pattern.of}"
        return {
            **options.model_dump(),
            "pattern": spelled,
            "max_sparsity_ratio_per_op": min(most, pattern.max_sparsity),
        }
    return options.model_dump()


class Pruner(NamedTuple):
    """One pruner: its options by name, and the weights that take part."""

    config: Mapping[str, Any]
    names: tuple[str, ...]


class Pruning(_Pruning):
    """``Pruning`` with the hooks and attributes of Neural Compressor 1.x and 2.x.

    ``callbacks_list``: what ``prepare_compression(...).callbacks`` holds there. ``conf``: the configuration.

    >>> prune = Pruning("pruning.yaml")
    >>> prune.update_config(start_step=0, end_step=1000)
    >>> prune.model = model
    >>> prune.on_train_begin()
    """

    def __init__(self, config: Any = None) -> None:
        config = getattr(config, "pruning", config)  # Config(pruning=...)
        super().__init__()
        self.config: WeightPruningConfig = WeightPruningConfig(config)

    @property
    def conf(self) -> WeightPruningConfig:
        """The configuration."""
        return self.config

    @property
    def callbacks_list(self) -> list[Pruning]:
        """This pruner."""
        return [self]

    @property
    def pruning_func(self) -> Callable[[nn.Module], Any] | None:
        """``train_func``, as it is called in 1.x."""
        return self.train_func

    @pruning_func.setter
    def pruning_func(self, function: Callable[[nn.Module], Any] | None) -> None:
        self.train_func = function

    def fit(self) -> nn.Module:
        """``pruner()``, as it is called in 1.x."""
        return self()

    def update_config(self, **options: Any) -> None:
        """``update_items_for_all_pruners``, as it is called in 2.x."""
        self.update_items_for_all_pruners(**options)

    def prepare(self) -> None:
        """Does nothing; ``on_train_begin`` prepares."""

    def on_train_begin(self, dataloader: Any = None, *, total_steps: int | None = None) -> None:
        """Selects the layers and builds their masks; ``dataloader`` is not used."""
        super().on_train_begin(total_steps=total_steps)

    def on_step_begin(self, local_step: int | None = None, *, batch_id: int | None = None) -> None:
        """Before the forward pass; both names are the count of ``pruning_core.Pruning.on_step_begin``."""
        super().on_step_begin(batch_id if local_step is None else local_step)

    def on_after_compute_loss(
        self, input: Any, student_output: Any, student_loss: Any, teacher_output: Any = None
    ) -> Any:
        """Returns ``student_loss``: a pruner does not change it."""
        return student_loss

    def on_before_eval(self) -> None:
        """Does nothing."""

    def on_after_eval(self) -> None:
        """Does nothing."""

    @property
    def pruners(self) -> tuple[Pruner, ...]:  # type: ignore[override]
        """One per pruner of the configuration; ``pruners[i].config["pattern"]``."""
        views = super().pruners
        if not views:  # before on_train_begin
            return tuple(Pruner(_as_there(options), ()) for options in self.config.pruners)
        return tuple(Pruner(_as_there(view.config), view.names) for view in views)

    def get_sparsity_ratio(self) -> tuple[float, float, float]:
        """``get_sparsity_ratio(self.pruners, self.model)``."""
        if self.model is None:
            raise RuntimeError("get_sparsity_ratio: no model; set prune.model = model first")
        return get_sparsity_ratio(self.pruners, self.model)


def get_sparsity_ratio(pruners: Iterable[Pruner], model: nn.Module) -> tuple[float, float, float]:
    """Three shares, counted from the weights that take part.

    Zeros over the weights of all convolutions and linear layers; zeros over all parameters; and weights in units that
    are zero as a whole, over the weights of all convolutions and linear layers.
    """
    model = unwrap(model)
    zeros, in_units = 0.0, 0.0
    for pruner in pruners:
        for target in _targets(model, pruner.names):
            weight = target.parameter.detach()
            zeros += int(weight.numel() - torch.count_nonzero(weight))
            in_units += weight.numel() * _cut_units(target, weight, pruner.config)
    layers = [each for name, module in model.named_modules() if family(module) for each in targets_of(name, module)]
    prunable = sum(target.parameter.numel() for target in layers) or 1
    everything = sum(parameter.numel() for parameter in model.parameters()) or 1
    return zeros / prunable, zeros / everything, in_units / prunable


def _targets(model: nn.Module, names: Iterable[str]) -> list[Target]:
    layers = {name: split_key(name)[0] for name in names}
    targets = (target for layer in set(layers.values()) for target in targets_of(layer, model.get_submodule(layer)))
    found = {target.name: target for target in targets}
    return [found[name] for name in layers]


def _cut_units(target: Target, weight: Tensor, config: Mapping[str, Any]) -> float:
    """The share of units that are cut; of N:M groups those that have lost N."""
    pattern = parse_pattern(config["pattern"])
    if isinstance(pattern, NinM):
        pattern = NinM(pattern.of - pattern.kept, pattern.of)
    view = target.layout.view((weight != 0).double())
    if pattern.unfit(tuple(view.shape)):
        return 0.0
    region = pattern.region(tuple(view.shape))
    kept = pattern.fold(view, region, "sum") != 0 if pattern.folds_linearly else pattern.alive(view, region)
    return 1 - float(kept.double().mean())


def parse_to_prune(config: Mapping[str, Any], model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, for the layers that the options of one pruner select."""
    excluded = [*config.get("excluded_op_names", ()), *config.get("extra_excluded_op_names", ())]
    types = config.get("pruning_op_types", ("Conv", "Linear"))
    targets, _ = Selector("", config.get("op_names", ()), excluded, types).select(unwrap(model))
    return {target.layer: target.module for target in targets}
