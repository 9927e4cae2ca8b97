"""Many workers, simulated: units run in this process, one by one, in the order in which those workers would end them.

Time is a number that goes by as units end, so that asynchronous meta-training can be repeated, and a learner be tried
with more workers than there are processors.
"""

import heapq
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from lopt.meta.executors import Kept, Serial, keeping

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class Simulated(Serial):
    """Runs units as ``workers`` would that take ``seconds`` for them; each keeps what it keeps to itself.

    Args:
        workers: how many.
        seconds: that a worker, by its number, takes for a unit, by its index.
        clock: by which the time of whoever uses the results counts, too, such as ``time.process_time``: meanwhile
            workers that have ended a unit wait for the next. By default it takes no time.

    Attributes:
        now: simulated seconds up to now.
        waited: of these, how many workers have waited, all together.
        spent: of these, how many by ``clock``.

    Example:
        >>> executor = Simulated(2, lambda worker, index: [1.0, 2.5][worker])
        >>> [index for index, _ in executor.stream(pow, 3, range(5))], executor.now
        ([0, 2, 1, 3, 4], 5.0)
    """

    def __init__(
        self, workers: int, seconds: Callable[[int, int], float], clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected a positive number, got {workers}")
        self.now = self.waited = self.spent = 0.0
        self._seconds, self._clock = seconds, clock
        self._kept = [Kept(f"simulated {number}") for number in range(workers)]

    def flow(self, function: Callable[[S, T], R], units: Iterator[tuple[S, T]]) -> Generator[tuple[int, R], None, None]:
        """See :class:`lopt.meta.executors.Executor`."""
        ends: list[tuple[float, int, int, S, T]] = []  # when which worker ends which unit
        index = 0
        idle = [(self.now, worker) for worker in range(len(self._kept))]
        mark = self._clock()
        while True:
            for since, worker in idle:
                unit = next(units, None)
                now = self._clock()
                self.now, self.spent, mark = self.now + now - mark, self.spent + now - mark, now
                if unit is not None:
                    self.waited += self.now - since
                    heapq.heappush(ends, (self.now + self._seconds(worker, index), index, worker, *unit))
                    index += 1
            if not ends:
                return
            end, number, worker, shared, item = heapq.heappop(ends)
            self.now, idle = max(self.now, end), [(end, worker)]
            with keeping(self._kept[worker]):
                result = function(shared, item)
            mark = self._clock()
            yield number, result
