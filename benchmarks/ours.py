"""Our side of the engine benchmark: ``python -m benchmarks.ours '<case as JSON>'``; see ``benchmarks.engine``.

Only the public hooks of ``Pruning`` are used. The score is Neural Compressor's ``S = 0.9 S + |w g|``; our default
``S + 0.9 |w g|`` has one pass less over the scores.
"""

from __future__ import annotations

from importlib.metadata import version

from torch import nn

from benchmarks.measure import Case, main
from pruning_core import Pruning


def make_pruner(case: Case, model: nn.Module) -> Pruning:
    pruner = Pruning([{**case.options, "momentum_decay": 0.9, "momentum_gain": 1.0}])
    pruner.model = model
    return pruner


def versions() -> dict[str, str]:
    return {"torch": version("torch")}


if __name__ == "__main__":
    main(make_pruner, versions)
