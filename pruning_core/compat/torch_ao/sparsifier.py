"""The interface of ``torch.ao.pruning``'s structured pruner: the user's ``update_mask`` writes row masks."""

from __future__ import annotations

import abc
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pruning_core.channels.example_inputs import Seen, example_for
from pruning_core.channels.folding import PadsZerosError, fold_constants
from pruning_core.channels.row_masks import Chosen, FakeStructuredSparsity, RowMask, choose
from pruning_core.compat.torch_ao import prune_functions
from pruning_core.compat.torch_ao.gates import align_gates
from pruning_core.graph import ChannelGraph, slim_
from pruning_core.graph.inputs import Inputs, as_inputs
from pruning_core.graph.trace.labels import Axis
from pruning_core.integrations.when_imported import when_imported
from pruning_core.registry import did_you_mean

Patterns = dict[tuple[Any, ...], Callable[..., None]]
SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NOT_SAVED = ("module", "module_fqn", "tensor_name")


def default_structured_pruning_patterns() -> Patterns:
    """An empty dict: no pattern is needed. Those with functions of ``prune_functions`` are accepted."""
    return {}


_get_default_structured_pruning_patterns = default_structured_pruning_patterns


class BaseStructuredSparsifier(abc.ABC):
    """Removes rows of weights that ``update_mask``, written by the user, has masked.

    ``prepare`` puts a mask on every configured weight, ``step`` calls ``update_mask`` for each, ``prune`` removes the
    masked rows and everything that goes with them. Between ``step`` and ``prune`` masked rows read as zero.

    ``defaults`` hold for every layer whose config does not say otherwise; what ``tensor_fqn`` and ``prune_bias`` do not
    use is handed to ``update_mask``. ``patterns`` may be given, as a dict, and is not needed: what goes with a row is
    found by running the model, so norms, residuals, depthwise layers, concatenations and flattenings need no pattern.

    With ``prune_bias`` (the default) bias entries of masked rows are zero as well, and the pruned model gives what the
    masked one gave, wherever zero stays zero on its way to the next layer (as through ReLU). Where it does not (a batch
    norm, a sigmoid), the pruned model is the one whose next layer reads zero there. With ``prune_bias=False`` masked
    rows keep their bias, and ``prune`` folds the constant that they give into the bias of the next layer (which gets a
    bias if it has none): exact in evaluation mode for any activation and norm; refused where it is no constant.

    Rows of several configured layers may have to go together (a residual sum). They go when all those masks agree.
    Otherwise they stay, as zeros, and one warning counts them. Layers that are not configured do not vote. The last
    layer's rows go like others, which shrinks the model's output; leave it out of the config to keep its shape.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None, patterns: Patterns | None = None) -> None:
        for name, value in (("defaults", defaults), ("patterns", patterns)):
            if value is not None and not isinstance(value, Mapping):
                raise ValueError(f"{name}: must be a dict, got {value!r}; leave it out if there is nothing to say")
        self.defaults: dict[str, Any] = dict(defaults or {})
        self.patterns: Patterns = default_structured_pruning_patterns() if patterns is None else dict(patterns)
        _check_patterns(self.patterns)
        self.state: dict[str, dict[str, Any]] = defaultdict(dict)
        self.enable_mask_update = True
        self.config: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.model: nn.Module | None = None
        self._masks: list[RowMask] = []
        self._seen: tuple[Seen, RemovableHandle] | None = None

    @abc.abstractmethod
    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """To override: sets rows to remove to False in ``getattr(module.parametrizations, tensor_name)[0].mask``."""

    # ---- the steps of pruning ---------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, config: Iterable[dict[str, Any]] | None = None) -> None:
        """Puts a mask on each tensor of the config; without one, on all Linear and Conv weights."""
        if self.groups:
            raise ValueError(
                f"prepare: masks are on already, got {len(self.groups)} tensors with one; "
                "call prune() or squash_mask() first"
            )
        if config is None:
            self.make_config_from_model(model)
        else:
            self.config = _checked_config(config)
        groups = [_group(model, {**copy.deepcopy(self.defaults), **each}) for each in self.config]
        _refuse_twice(groups)
        self.model, self.groups = model, groups
        for group in groups:
            self._masks.append(_row_mask(group))
        for mask in self._masks:
            mask.attach()
            self.state[mask.fqn]["mask"] = mask.mask
        seen = Seen()
        self._seen = (seen, model.register_forward_hook(seen, with_kwargs=True))

    def make_config_from_model(
        self, model: nn.Module, SUPPORTED_MODULES: Iterable[type[nn.Module]] = SUPPORTED
    ) -> None:
        """Sets ``config`` to the weights of all modules of these types."""
        kinds = tuple(SUPPORTED_MODULES)
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        self.config = [{"tensor_fqn": f"{name}.weight".lstrip(".")} for name in names]

    def step(self, use_path: bool = True) -> None:
        """Calls ``update_mask`` for every tensor, if ``enable_mask_update`` is set."""
        if not self.enable_mask_update:
            return
        with torch.no_grad():
            for group, mask in zip(self.groups, self._masks, strict=True):
                before = mask.mask
                self.update_mask(**group)
                if mask.mask is before:  # else it was replaced in the parametrization
                    mask.fake.mask = self.state[mask.fqn].get("mask", before)
                mask.check()
                self.state[mask.fqn]["mask"] = mask.mask

    def prune(self, example_inputs: Any = None, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> nn.Module:
        """Removes masked rows and the masks in place, and returns the model. Rolls back on any error.

        The example is what the model is traced with; without one it is made like the first input that the model took
        since ``prepare``, or guessed from its layers. Optimizer states lose the same rows.
        """
        model = self._prepared("prune")
        for mask in self._masks:
            mask.check()
        with ExitStack() as undo:
            self._bare(undo)
            align_gates(self._masks, undo)
            example = example_for(model, self._seen and self._seen[0]) if example_inputs is None else example_inputs
            chosen = self._cut(model, as_inputs(example), optimizer or (), undo)
            undo.pop_all()
        self._warn(chosen)
        self._forget()
        return model

    def squash_mask(
        self,
        params_to_keep: Iterable[str] | None = None,
        params_to_keep_per_layer: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        """Removes the masks; masked rows stay zero. Config entries to keep go to the module, as ``sparse_params``."""
        self._prepared("squash_mask")
        layers = params_to_keep_per_layer or {}
        kept = [[*(params_to_keep or ()), *layers.get(group["module_fqn"], ())] for group in self.groups]
        for group, names in zip(self.groups, kept, strict=True):
            for name in names:
                if name not in group:
                    raise ValueError(
                        f"{group['tensor_fqn']}: no such entry to keep, got {name!r}; name one of its config"
                    )
        with ExitStack() as undo:
            self._bare(undo)
            undo.pop_all()
        for group, names in zip(self.groups, kept, strict=True):
            if names:
                group["module"].sparse_params = {name: group[name] for name in names}
        self._forget()

    # ---- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``state``, with all that ``update_mask`` wrote there, and the configuration; modules are left out."""
        groups = [{key: value for key, value in group.items() if key not in NOT_SAVED} for group in self.groups]
        state = {mask.fqn: {**self.state[mask.fqn], "mask": mask.mask} for mask in self._masks}
        return {"state": copy.deepcopy(state), "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Loads masks and config entries; ``strict=False`` skips tensors that only one side has."""
        self._prepared("load_state_dict")
        if not isinstance(state_dict, Mapping) or not {"state", "groups"} <= state_dict.keys():
            raise ValueError(
                f"state_dict: must be one of a pruner, got {type(state_dict).__name__} without its entries; "
                "give what state_dict() gave"
            )
        state = state_dict["state"]
        mine = {mask.fqn: mask for mask in self._masks}
        if strict and mine.keys() != state.keys():
            raise ValueError(
                f"state_dict: is of other tensors, got {sorted(state.keys() ^ mine.keys())[:8]} on one side only; "
                "prepare with the same config"
            )
        for fqn in mine.keys() & state.keys():
            if state[fqn]["mask"].shape != mine[fqn].mask.shape:
                shapes = f"{tuple(state[fqn]['mask'].shape)} for {tuple(mine[fqn].mask.shape)}"
                raise ValueError(f"{fqn}: the state is of another model, got a mask {shapes}; load it into its own")
        saved = {group["tensor_fqn"]: group for group in state_dict["groups"]}
        for fqn in mine.keys() & saved.keys():
            if saved[fqn].get("prune_bias", True) != mine[fqn].prune_bias:
                raise ValueError(
                    f"{fqn}: the state is of another prune_bias, got {not mine[fqn].prune_bias}; prepare so"
                )
        for fqn in mine.keys() & state.keys():
            mine[fqn].mask.copy_(state[fqn]["mask"])
            self.state[fqn] = {**copy.deepcopy(dict(state[fqn])), "mask": mine[fqn].mask}
        for group in self.groups:
            group.update(copy.deepcopy(saved.get(group["tensor_fqn"], {})))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _prepared(self, what: str) -> nn.Module:
        if self.model is None:
            raise ValueError(f"{what}: there is no model with masks, got none; call prepare(model, config) first")
        return self.model

    def _bare(self, undo: ExitStack) -> None:
        """Masks off, masked rows zero; undone in the order in which the masks came."""
        for mask in reversed(self._masks):
            undo.callback(mask.attach)
            mask.detach()
        for mask in self._masks:
            mask.settle(undo)

    @staticmethod
    def _trace(model: nn.Module, example: Inputs) -> ChannelGraph:
        return ChannelGraph.trace(model, example, outputs_may_shrink=True)

    def _cut(self, model: nn.Module, example: Inputs, optimizer: Any, undo: ExitStack) -> Chosen:
        graph = self._trace(model, example)
        chosen = choose(graph, self._masks)
        kept: list[Axis] = []
        while chosen.with_constants:
            try:
                grown = fold_constants(model, graph.plan(chosen.with_constants), example, undo)
            except PadsZerosError as error:
                kept.append(error.axis)
                chosen.keep(graph, error.axis)
                continue
            if grown:
                graph = self._trace(model, example)  # it has biases that it did not have
                chosen = choose(graph, self._masks)
                for axis in kept:
                    chosen.keep(graph, axis)
            break
        if chosen.removed:
            slim_(model, graph.plan(chosen.removed), optimizer=optimizer)
        return chosen

    def _warn(self, chosen: Chosen) -> None:
        if chosen.padded:
            rows = "; ".join(f"{names} ({count})" for names, count in chosen.padded.items())
            warnings.warn(
                f"prune: {chosen.padded.total()} masked rows stay as zeros, since prune_bias=False keeps their bias "
                f"and a consumer pads zeros beside it: {rows}; set prune_bias=True to remove them",
                stacklevel=3,
            )
        if chosen.stay:
            most = "; ".join(f"{names} ({count})" for names, count in chosen.stay.most_common(4))
            warnings.warn(
                f"prune: masks of coupled rows disagree, got {chosen.stay.total()} masked rows that stay as zeros: "
                f"{most}; give coupled layers one mask or configure one of them",
                stacklevel=3,
            )
        elif not chosen.removed and not chosen.padded:
            warnings.warn(
                "prune: nothing was removed, got masks without a pruned row; set enable_mask_update and call step()",
                stacklevel=3,
            )

    def _forget(self) -> None:
        if self._seen is not None:
            self._seen[1].remove()
        self.model, self.groups, self._masks, self._seen = None, [], [], None
        self.state.clear()


def _check_patterns(patterns: Patterns) -> None:
    for pattern, function in patterns.items():
        theirs = str(getattr(function, "__module__", "")).startswith("torch.ao.")
        if not theirs and function not in vars(prune_functions).values():
            raise ValueError(
                f"patterns: functions of your own are not called, got {getattr(function, '__name__', function)!r} "
                f"for {pattern!r:.200}; what goes with a row is found by running the model, so leave the pattern out"
            )


def _row_mask(group: Mapping[str, Any]) -> RowMask:
    """The mask of one tensor, as its config has it: ``mask``, ``parametrization`` and ``prune_bias`` are optional."""
    fqn, mask = group["tensor_fqn"], group.get("mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"{fqn}: its mask must be a tensor, got {type(mask).__name__}; give a bool per row")
    kind = group.get("parametrization", FakeStructuredSparsity)
    return RowMask(fqn, group["module"], group["tensor_name"], group.get("prune_bias", True), mask, kind)


def _checked_config(config: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(config, list | tuple):
        raise ValueError(f"config: must be a list of dicts, got {config!r}; write [{{'tensor_fqn': ...}}]")
    for each in config:
        if not isinstance(each, dict) or not isinstance(each.get("tensor_fqn"), str):
            raise ValueError(f"config: each entry is a dict with a tensor_fqn, got {each!r}; name the tensor")
    return [dict(each) for each in config]


def _group(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """The entry of one tensor, with the module that holds it."""
    fqn = config["tensor_fqn"].lstrip(".")
    path, _, name = fqn.rpartition(".")
    known = dict(model.named_parameters(remove_duplicate=False))
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    if module is not None and parametrize.is_parametrized(module, name):
        raise ValueError(
            f"{fqn}: has a parametrization, got {type(module.parametrizations[name][0]).__name__}; remove it first"
        )
    if module is None or fqn not in known or not known[fqn].dim():
        raise ValueError(f"tensor_fqn: must name a parameter with rows, got {fqn!r}; {did_you_mean(fqn, known)}")
    found = {"module": module, "module_fqn": path, "tensor_name": name, "tensor_fqn": fqn}
    for key in NOT_SAVED:
        if key in config and config[key] is not found[key] and config[key] != found[key]:
            raise ValueError(f"{fqn}: its config contradicts its name, got {key}={config[key]!r}; leave {key} out")
    if not isinstance(config.get("prune_bias", True), bool):
        raise ValueError(f"{fqn}: prune_bias must be True or False, got {config['prune_bias']!r}; write one of them")
    return {**config, **found}


def _refuse_twice(groups: list[dict[str, Any]]) -> None:
    seen: dict[int, str] = {}
    for group in groups:
        fqn, tensor = group["tensor_fqn"], group["module"]._parameters[group["tensor_name"]]
        if id(tensor) in seen:
            raise ValueError(f"{fqn}: is configured twice, got {seen[id(tensor)]} before; name each tensor once")
        seen[id(tensor)] = fqn


def _register() -> None:
    """``torch.ao``'s own schedulers take what is an instance of its base class."""
    from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier

    BaseSparsifier.register(BaseStructuredSparsifier)  # type: ignore[type-abstract]


when_imported("torch.ao.pruning.sparsifier.base_sparsifier", _register)
