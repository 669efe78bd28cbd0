"""Neural Compressor 2.6 under the same loop: ``python -m benchmarks.peer_neural_compressor '<case as JSON>'``.

Runs in an environment of its own (see ``benchmarks.engine``) and imports neither ``pruning_core`` nor anything else of
ours but the loop. What it takes to run it at all, and what is done in its favour:

* ``end_step`` above 0 and a fresh dict with its own ``excluded_op_names``: the defaults cannot be constructed, and the
  resolved values are written into the caller's dicts.
* It leaves the last ``nn.Linear`` of a model dense, found by name as a regular expression. A tiny head with a name like
  no other takes that place, so that the same layers are pruned on both sides.
* Logging is off. It logs a line per layer at every update; the counts behind those lines are still made.
"""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from typing import Any

from torch import nn

from benchmarks.measure import Case, main


def make_pruner(case: Case, model: nn.Module) -> Any:
    warnings.simplefilter("ignore")
    from neural_compressor.compression.pruner.pruning import PRUNINGS
    from neural_compressor.compression.pruner.utils import process_config
    from neural_compressor.training import WeightPruningConfig

    logging.disable(logging.CRITICAL)
    model.add_module("classifier_head", nn.Linear(8, 2))
    options = {**case.options, "op_names": [], "excluded_op_names": []}
    config = process_config(WeightPruningConfig([options]))
    pruning = PRUNINGS["basic_pruning"](config, model)
    expected = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) - 1
    assert [len(pruner.modules) for pruner in pruning.pruners] == [expected]
    return pruning


def versions() -> dict[str, str]:
    return {"torch": version("torch"), "neural-compressor": version("neural-compressor")}


if __name__ == "__main__":
    main(make_pruner, versions)
