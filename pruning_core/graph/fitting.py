"""Changes the sizes that a cut model's modules keep as attributes until it does what the dense one did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.modules.instancenorm import _InstanceNorm

from pruning_core.graph.attributes import Attributes, upwards_from
from pruning_core.graph.beside import Beside, Run, demands, left
from pruning_core.graph.masked import MaskedRun
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import Step
from pruning_core.graph.tracing import GraphError
from pruning_core.graph.usual_names import usual

Change = tuple[str, str, Any]


class CannotFollowError(GraphError):
    """The model's code does not follow a cut at this step."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step = step


def fit(attributes: Attributes, beside: Beside) -> float:
    """Runs the cut model; while it stumbles over a size, changes the attribute that says it. How far its output is
    from the one that is wanted."""
    _follow_inputs(attributes, beside.trace)
    mark = attributes.mark()
    quick = Fit(attributes, beside, alike=True)
    try:
        return beside.accept(quick.run())
    except GraphError:
        if not quick.guessed:
            raise
    attributes.back_to(mark)
    return beside.accept(Fit(attributes, beside, alike=False).run())


def _follow_inputs(attributes: Attributes, trace: MaskedRun) -> None:
    """An instance norm without weights has nothing else to say how wide it is."""
    for step in trace.steps:
        module = attributes.modules[step.where]
        if step.name != "instance_norm" or not isinstance(module, _InstanceNorm) or list(module.buffers()):
            continue
        _, shadow = step.tensors[0]
        shape = left(shadow, trace.dead) if isinstance(shadow, Tensor) and module.weight is None else None
        if shape is not None and module.num_features == step.tensors[0][0][1]:
            attributes.set(step.where, "num_features", shape[1])


def follow_names(attributes: Attributes, beside: Beside, plan: Plan) -> None:
    """Sets sizes that no code reads. Where some does after all, and fails or gives something else, they stay."""
    wanted = list(usual(beside.model, plan, attributes.changed))
    every = {name for _, name, _ in wanted}
    for names in ([every] if wanted else []) + [{name} for name in sorted(every)]:
        mark = attributes.mark()
        for path, name, value in wanted:
            if name in names:
                attributes.set(path, name, value)
        if beside.holds():
            if names == every:
                return
        else:
            attributes.back_to(mark)


class Fit:
    """With ``alike``, what helps in one module is done at the same place of all others of its class too: a model of
    many equal blocks is run a few times and not once for each of them."""

    def __init__(self, attributes: Attributes, beside: Beside, *, alike: bool) -> None:
        self.attributes, self.beside, self.trace = attributes, beside, beside.trace
        self.guessed = False
        self._places: dict[int, tuple[Any, ...]] = {}
        self._at: dict[tuple[Any, ...], list[Step]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        for step in self.trace.steps if alike else []:
            place = (type(attributes.modules[step.where]), counts[step.where], step.name)
            counts[step.where] += 1
            self._places[id(step)] = place
            self._at[place].append(step)

    def run(self) -> Any:
        run = self.beside.run()
        while run.error is not None:
            step = self.trace.steps[min(run.at, len(self.trace.steps) - 1)]
            better = self._mended(step, run)
            if better is None:
                raise CannotFollowError(
                    step,
                    f"{step.where or 'the model'}: cannot follow the cut at its {step.name} "
                    f"({str(run.error).partition(chr(10))[0][:200]}); everything was put back as it was",
                ) from run.error
            run = better
        return run.output

    def _mended(self, step: Step, run: Run) -> Run | None:
        """The first change that lets the model come further."""
        for changes in self._changes(step, run.where):
            mark = self.attributes.mark()
            for path, name, value in changes:
                self.attributes.set(path, name, value)
            now = self.beside.run()
            if now.error is None or now.at > run.at:
                return now
            self.attributes.back_to(mark)
        return None

    def _changes(self, step: Step, stopped: str) -> Iterator[list[Change]]:
        """A number among the operation's arguments may stand in any module around it, another only in its own."""
        sizes = demands(step, self.trace.dead)
        for old in sizes:
            for place in dict.fromkeys((step.where, stopped)):
                for path, name in self.attributes.holders(place, old, upwards=old in step.numbers):
                    for which, value in enumerate(self.attributes.candidates(path, name, old, sizes)):
                        alike = self._alike(step, path, name, which)
                        if alike:
                            self.guessed = True
                            yield [(path, name, value), *alike]
                        yield [(path, name, value)]

    def _alike(self, step: Step, path: str, name: str, which: int) -> list[Change]:
        """The same attribute beside the same steps of other modules, where it holds a size that changes."""
        if path not in upwards_from(step.where):
            return []
        height = list(upwards_from(step.where)).index(path)
        found: dict[str, Change] = {}
        for other in self._at.get(self._places.get(id(step), ()), []):
            above = list(upwards_from(other.where))
            there = above[height] if height < len(above) else path
            sizes = demands(other, self.trace.dead) if there != path and there not in found else {}
            for old in sizes:
                if self.attributes.hold(there, name, old) and (not height or old in other.numbers):
                    found[there] = (there, name, self.attributes.candidates(there, name, old, sizes)[which])
                    break
        return list(found.values())
