"""Which channels of stacks go, so that all blocks of one keep one width."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pruning_core.channels.options import GroupLimits
from pruning_core.channels.stacks import Removed, Stack, Stacks
from pruning_core.graph import GraphError

COARSE = 64
"""In so few steps a single one can be much."""
MOST_MORE = 64
"""So many steps beyond a budget are tried where a configuration refuses the numbers that meet it."""


class UniformRanking:
    """Steps of stacks in order of removal: the place of a step is the mean score of what it takes from each group."""

    def __init__(self, room: GroupLimits, scores: Mapping[int, float], stacks: Stacks, scope: str) -> None:
        self.room, self.stacks = room, stacks
        for name in stacks.held:
            if room.bounds(room.graph.groups[name])[0]:
                raise GraphError(f"limits: {name} must lose channels, which uniform cannot say: {stacks.held[name]}")
        self._channels: dict[str, list[int]] = {}
        self._allowed = [self._steps_of(stack) for stack in stacks.every]
        self._means = [self._mean_scores(stack, scores) for stack in stacks.every]
        self._places: list[np.ndarray] = []
        order = []
        for number, (stack, allowed) in enumerate(zip(stacks.every, self._allowed, strict=True)):
            share = (np.arange(stack.steps) + 0.5) / stack.steps
            self._places.append(share if scope == "local" else self._means[number])
            order += [(float(self._places[-1][step]), float(share[step]), number) for step in range(allowed[-1])]
        self._order = np.array([number for _, _, number in sorted(order)], dtype=int)

    def __len__(self) -> int:
        return len(self._order)

    def removed(self, count: int) -> Removed:
        """What the first ``count`` steps come to within limits: of each group its own lowest channels."""
        return self._of(self._taken(count))

    def chosen(self, fewest: Callable[[], int], fits: Callable[[Removed], bool]) -> tuple[Removed, dict[str, float]]:
        """The removals that meet a budget at the least loss, and the configuration that says them.

        One step of a stack can be much. What the others lost is then given back, the highest first; and the same budget
        is met without that step, if it can be: of both the one that loses less of all groups is taken.
        """
        best: tuple[float, list[int]] | None = None
        allowed = list(self._allowed)
        while True:
            try:
                count = fewest()
            except GraphError:
                if best is None:
                    raise
                break
            taken = self._taken(count)
            number = int(self._order[count - 1]) if count else -1
            whole = self._given_back(list(taken), fits)
            best = min(best or (math.inf, whole), (self._lost(whole), whole))
            fewer = [steps for steps in self._allowed[number] if steps < taken[number]] if count else []
            if whole == taken or not fewer or self.stacks.every[number].steps > COARSE:
                break
            self._allowed[number] = fewer
        self._allowed = allowed
        return self._said(best[1], fits)

    def _said(self, taken: list[int], fits: Callable[[Removed], bool]) -> tuple[Removed, dict[str, float]]:
        """Where the configuration refuses the numbers (a width that is no multiple of the heads), some steps more of
        one stack are tried; what they spare is given back to the others where it can be."""
        refused: GraphError | None = None
        for more in range(MOST_MORE):
            for number in range(len(taken)) if more else (0,):
                some = [steps + more if at == number else steps for at, steps in enumerate(taken)]
                if more and some[number] not in self._allowed[number]:
                    continue
                for tried in (self._given_back(list(some), fits, but=number), some) if more else (some,):
                    removed = self._of(tried)
                    try:
                        return removed, self.stacks.configuration(removed)
                    except GraphError as error:
                        refused = refused or error
        raise refused or GraphError("budget: no channel can be removed under uniform; plan without it")

    def why(self) -> str:
        """What keeps its width, for an error."""
        graph, reasons = self.room.graph, self.stacks.notes()
        for stack, allowed in zip(self.stacks.every, self._allowed, strict=True):
            free = [name for name in stack.groups if self.room.bounds(graph.groups[name])[1]]
            if free and allowed == [0]:
                stays = min(set(stack.groups) - set(free), default=stack.groups[0])
                reasons.append(f"uniform: {free[0]} keeps its width with {stays}, which must stay")
        return "".join(f"; {each}" for each in [*reasons, "give a larger budget or uniform=False"])

    def _taken(self, count: int) -> list[int]:
        counts = np.bincount(self._order[:count], minlength=len(self._allowed)).tolist()
        pairs = zip(counts, self._allowed, strict=True)
        return [max((each for each in allowed if each <= steps), default=allowed[0]) for steps, allowed in pairs]

    def _of(self, taken: Sequence[int]) -> Removed:
        pairs = zip(self.stacks.every, taken, strict=True)
        parts = [(name, steps, stack.steps) for stack, steps in pairs if steps for name in stack.groups]
        every = [(name, self._channels[name], steps, of) for name, steps, of in parts]
        return {name: sorted(some[: steps * len(some) // of]) for name, some, steps, of in every}

    def _lost(self, taken: Sequence[int]) -> float:
        """The share of its scores that each group loses, summed."""
        parts = zip(self.stacks.every, self._means, taken, strict=True)
        return sum(float(means[:steps].sum()) / stack.steps * len(stack.groups) for stack, means, steps in parts)

    def _given_back(self, taken: list[int], fits: Callable[[Removed], bool], but: int = -1) -> list[int]:
        last = {n: self._places[n][steps - 1] for n, steps in enumerate(taken) if steps and n != but}
        for number in sorted(last, key=lambda each: -last[each]):
            fewer = [steps for steps in self._allowed[number] if steps < taken[number]]

            def enough(steps: int, number: int = number) -> bool:
                return fits(self._of([*taken[:number], steps, *taken[number + 1 :]]))

            least = bisect.bisect_left(fewer, True, key=enough)
            taken[number] = [*fewer, taken[number]][least]
        return taken

    def _mean_scores(self, stack: Stack, scores: Mapping[int, float]) -> np.ndarray:
        means = np.zeros(stack.steps)
        for group in (self.room.graph.groups[name] for name in stack.groups):
            values = np.array([scores.get(unit, math.inf) for unit in group.members])
            channels = np.argsort(values, kind="stable")
            self._channels[group.name] = channels.tolist()
            means += values[channels].reshape(stack.steps, -1).mean(1) / len(stack.groups)
        return means

    def _steps_of(self, stack: Stack) -> list[int]:
        """How many steps the limits of all groups allow."""
        groups = {
            (len(group), self.room.rows(group), self.room.bounds(group)): group
            for group in (self.room.graph.groups[name] for name in stack.groups)
        }
        sizes = [(group, len(group) // stack.steps) for group in groups.values()]
        found = [
            n for n in range(stack.steps) if all(self.room.rounded(each, n * one) == n * one for each, one in sizes)
        ]
        if not found:
            raise GraphError(
                f"limits: the groups of one width have none in common, got {', '.join(stack.groups[:3])}; give limits "
                "that they share"
            )
        return found
