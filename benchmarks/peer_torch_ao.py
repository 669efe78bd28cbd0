"""torch.ao's WeightNormSparsifier under the same loop: ``python -m benchmarks.peer_torch_ao '<case as JSON>'``.

It knows N:M alone, has no schedule over the steps (both updates cut to the target) and multiplies its masks, one float
per weight, in every forward pass, which this loop does not have: its hooks cost nothing here.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version

from torch import nn

from benchmarks.measure import Case, main


class Adapter:
    """The sparsifier behind the four hooks."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        from torch.ao.pruning import WeightNormSparsifier

        kept, of = (int(each) for each in case.pattern.split(":"))
        self.model, self.due, self.steps = model, {case.every, 2 * case.every}, 0
        self.sparsifier = WeightNormSparsifier(
            sparsity_level=1.0, sparse_block_shape=(1, of), zeros_per_block=of - kept
        )

    def on_train_begin(self) -> None:
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        self.sparsifier.prepare(self.model, [{"tensor_fqn": f"{name}.weight"} for name in names])

    def on_step_begin(self) -> None:
        pass

    def on_before_optimizer_step(self) -> None:
        pass

    def on_after_optimizer_step(self) -> None:
        self.steps += 1
        if self.steps in self.due:
            self.sparsifier.step()


def make_pruner(case: Case, model: nn.Module) -> Adapter:
    warnings.simplefilter("ignore")
    return Adapter(case, model)


def versions() -> dict[str, str]:
    return {"torch": version("torch")}


if __name__ == "__main__":
    main(make_pruner, versions)
