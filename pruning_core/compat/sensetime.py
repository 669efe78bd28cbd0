"""SenseTime's pytorch-pruner: ``Pruner(model, distributed).rebuild_model(...)`` and ``ckpt_helper``."""

from pruning_core.channels import files as ckpt_helper
from pruning_core.channels.pruner import Pruner

__all__ = ["Pruner", "ckpt_helper"]
