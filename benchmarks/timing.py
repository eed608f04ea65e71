"""Times of several calls taken in turn, so that a machine whose speed drifts slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Wall-clock seconds of each run of one call."""

    seconds: tuple[float, ...]

    @property
    def median(self):
        return statistics.median(self.seconds)

    @property
    def low(self):
        return min(self.seconds)

    @property
    def high(self):
        return max(self.seconds)

    def scaled(self, factor):
        """Per token, say."""
        return Timing(tuple(factor * s for s in self.seconds))


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    turn_s: float = 0.2,
    most: int = 20,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, Timing]:
    """Times calls in rounds: in each, every call in turn, again and again until `turn_s` or `most` runs are spent.

    A call must have been run before (compiled, checked). Its jax arrays are waited for; anything else it must have
    waited for itself. `before` has what to do before each run of some of them; it must wait too, and is not timed.
    """
    before = before or {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.02)  # another library's threads stop spinning
            spent, runs = 0.0, 0
            while runs == 0 or (spent < turn_s and runs < most):
                if name in before:
                    before[name]()
                start = time.perf_counter()
                jax.block_until_ready(call())
                took = time.perf_counter() - start
                seconds[name].append(took)
                spent, runs = spent + took, runs + 1
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def in_batches(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]], *, batches: int, batch_s: float
) -> dict[str, Timing]:
    """Times calls that return before they are done: batches of `batch_s` of each in turn, waited for at their ends.

    A chip that is limited by its power runs a first, cold batch faster than any later one, so the first is not counted.

    Args:
      calls: by name, what to run and what waits for a result of it.
      batches: of each call.
      batch_s: of each batch, in seconds.
    """

    def batch(name: str, count: int) -> float:
        run, wait = calls[name]
        start = time.perf_counter()
        for _ in range(count):
            result = run()
        wait(result)
        return (time.perf_counter() - start) / count

    counts = {name: max(2, round(batch_s / min(batch(name, 2), batch(name, 3)))) for name in calls}
    for name in calls:
        batch(name, counts[name])
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(batches):
        for name in calls:
            seconds[name].append(batch(name, counts[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
