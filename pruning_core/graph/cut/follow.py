"""Updates attributes of a cut model that hold sizes, until it computes what the masked model does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.modules.instancenorm import _InstanceNorm

from pruning_core.graph.cut.attributes import Attributes, upwards_from
from pruning_core.graph.cut.compare import CutModel, Outcome, demands
from pruning_core.graph.cut.reference import MaskedRun
from pruning_core.graph.cut.usual_names import usual
from pruning_core.graph.errors import CannotFollowError, GraphError
from pruning_core.graph.inputs import untouched
from pruning_core.graph.plan import Plan
from pruning_core.graph.trace.labels import left
from pruning_core.graph.trace.recorder import Operation

Change = tuple[str, str, Any]
AHEAD = 20
"""How many operations on to look for a size that changes."""


def follow(attributes: Attributes, cut: CutModel) -> float:
    """Runs the cut model, changes the attribute behind each wrong size, and repeats until the run agrees.

    Returns the relative difference between its output and the masked model's.
    """
    _follow_inputs(attributes, cut.trace)
    mark = attributes.mark()
    quick = Follower(attributes, cut, alike=True)
    try:
        return cut.accept(quick.run())
    except GraphError:
        if not quick.guessed:
            raise
    attributes.back_to(mark)
    return cut.accept(Follower(attributes, cut, alike=False).run())


def _follow_inputs(attributes: Attributes, trace: MaskedRun) -> None:
    """Sets the width of instance norms without weights, from their inputs."""
    for operation in trace.operations:
        module = attributes.modules[operation.where]
        if operation.name != "instance_norm" or not isinstance(module, _InstanceNorm) or list(module.buffers()):
            continue
        _, shadow = operation.tensors[0]
        shape = left(shadow, trace.dead) if isinstance(shadow, Tensor) and module.weight is None else None
        if shape is not None and module.num_features == operation.tensors[0][0][1]:
            attributes.set(operation.where, "num_features", shape[1])


def follow_usual_names(attributes: Attributes, cut: CutModel, plan: Plan) -> None:
    """Sets attributes that no code reads; reverted where the run then fails or differs."""
    with untouched(cut.model):
        wanted = list(usual(cut.model, plan, attributes.changed))
    every = {name for _, name, _ in wanted}
    for names in ([every] if wanted else []) + [{name} for name in sorted(every)]:
        mark = attributes.mark()
        for path, name, value in wanted:
            if name in names:
                attributes.set(path, name, value)
        if cut.holds():
            if names == every:
                return
        else:
            attributes.back_to(mark)


class Follower:
    """With ``alike``, what helps in one module is done at the same place of all others of its class too: a model of
    many equal blocks is run a few times and not once for each of them."""

    def __init__(self, attributes: Attributes, cut: CutModel, *, alike: bool) -> None:
        self.attributes, self.cut, self.trace = attributes, cut, cut.trace
        self.guessed = False
        self._places: dict[int, tuple[Any, ...]] = {}
        self._at: dict[tuple[Any, ...], list[Operation]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        for operation in self.trace.operations if alike else []:
            place = (type(attributes.modules[operation.where]), counts[operation.where], operation.name)
            counts[operation.where] += 1
            self._places[id(operation)] = place
            self._at[place].append(operation)

    def run(self) -> Any:
        """Runs and mends the cut model until it agrees; the accepted difference of its output."""
        run = self.cut.run()
        while run.error is not None:
            operation = self.trace.operations[min(run.at, len(self.trace.operations) - 1)]
            better = self._mended(operation, run)
            if better is None:
                raise CannotFollowError(
                    operation,
                    f"{operation.where or 'the model'}: cannot follow the cut at its {operation.name} "
                    f"({str(run.error).partition(chr(10))[0][:200]}); everything was put back as it was",
                ) from run.error
            run = better
        return run.output

    def _mended(self, operation: Operation, run: Outcome) -> Outcome | None:
        """Applies the first change that lets the run get further; whether there is one."""
        for changes in self._changes(operation, run.where):
            mark = self.attributes.mark()
            for path, name, value in changes:
                self.attributes.set(path, name, value)
            now = self.cut.run()
            if now.error is None or now.at > run.at:
                return now
            self.attributes.back_to(mark)
        return None

    def _changes(self, operation: Operation, stopped: str) -> Iterator[list[Change]]:
        """A number among the operation's arguments may stand in any module around it, another only in its own."""
        sizes = demands(operation, self.trace.dead) or self._next_demands(operation)
        for old in sizes:
            for place in dict.fromkeys((operation.where, stopped)):
                for path, name in self.attributes.holders(place, old, upwards=old in operation.numbers):
                    for which, value in enumerate(self.attributes.candidates(path, name, old, sizes)):
                        alike = self._alike(operation, path, name, which)
                        if alike:
                            self.guessed = True
                            yield [(path, name, value), *alike]
                        yield [(path, name, value)]
        yield from self._together(operation, sizes)

    def _together(self, operation: Operation, sizes: dict[int, int]) -> Iterator[list[Change]]:
        """The sizes of a ``split`` must sum to what there is: they change at once or not at all."""
        found: list[Change] = []
        for old in (each for each in sizes if each in operation.numbers):
            for path, name in self.attributes.holders(operation.where, old, upwards=True):
                found.append((path, name, self.attributes.candidates(path, name, old, sizes)[0]))
                break
        if len({name for _, name, _ in found}) > 1:
            alike = [self._alike(operation, path, name, 0) for path, name, _ in found]
            if any(alike):
                self.guessed = True
                yield [*found, *(change for changes in alike for change in changes)]
            yield found

    def _next_demands(self, operation: Operation) -> dict[int, int]:
        """A module may check its input before it computes anything: then the next operations say what changes."""
        at = next(i for i, each in enumerate(self.trace.operations) if each is operation)
        found = (demands(each, self.trace.dead) for each in self.trace.operations[at : at + AHEAD])
        return next((sizes for sizes in found if sizes), {})

    def _alike(self, operation: Operation, path: str, name: str, which: int) -> list[Change]:
        """The same attribute cut the same steps of other modules, where it holds a size that changes."""
        if path not in upwards_from(operation.where):
            return []
        height = list(upwards_from(operation.where)).index(path)
        found: dict[str, Change] = {}
        for other in self._at.get(self._places.get(id(operation), ()), []):
            above = list(upwards_from(other.where))
            there = above[height] if height < len(above) else path
            sizes = demands(other, self.trace.dead) if there != path and there not in found else {}
            for old in sizes:
                if self.attributes.hold(there, name, old) and (not height or old in other.numbers):
                    found[there] = (there, name, self.attributes.candidates(there, name, old, sizes)[which])
                    break
        return list(found.values())
