"""Many independent computations, on the cores of this machine or on a cluster: one way to outgrow
it.

Any `concurrent.futures.Executor` will do. The default is a process per core; `cluster(address)` is
one over a Dask cluster (extra `cluster`). Results come in the order of the items, whatever ran
where.
"""

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager

from cmjax.console import Progress
from cmjax.cores import usable_cores
from cmjax.interrupt import leave_to_parent

_ANSWERS_WITHIN_S = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """The processes that a sweep runs on."""

    workers: int | None = None
    """Processes of this machine (default: one per core)."""
    scheduler: str | None = None
    """Address of a Dask scheduler, to run on its cluster instead."""

    def executor(self) -> AbstractContextManager[Executor]:
        """As `executor_of` opens it."""
        return executor_of(self.scheduler, self.workers)


def run_all[Item, Result](
    function: Callable[[Item], Result],
    items: Sequence[Item],
    executor: Executor,
    progress: Progress | None = None,
) -> list[Result]:
    """`function` of every item.

    Args:
      function: importable by its name, as for any process pool. items: that can be pickled.
      executor: where it runs. progress: called as items are done.
    Raises: what a call raised, the first in the order of the items; the others are not waited for.
      OSError: a process was ended from outside.
    """
    futures = [executor.submit(function, item) for item in items]
    with _watched(futures):
        for done, _ in enumerate(as_completed(futures), 1):
            if progress is not None:
                progress(done, len(items), "")
        return [future.result() for future in futures]


def as_done[Item, Result](
    function: Callable[[Item], Result],
    items: Sequence[Item],
    executor: Executor,
    progress: Progress | None = None,
    *,
    seconds: float | None = None,
) -> Iterator[tuple[int, Result]]:
    """`function` of every item, each as it is done: for results that are written down on the way.

    Args:
      function, items, executor, progress: as of `run_all`.
      seconds: after so long no further item is begun; those that run are still waited for.
    Yields: the item's index and its result, in no order.
    Raises: what a call raised. OSError: a process was ended from outside.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(2) as executor:
    ...     sorted(as_done(abs, [-3, 2], executor))
    [(0, 3), (1, 2)]
    """
    ends_s = time.monotonic() + (math.inf if seconds is None else seconds)
    index = {executor.submit(function, item): at for at, item in enumerate(items)}
    with _watched(index):
        for done, future in enumerate(as_completed(index), 1):
            if time.monotonic() > ends_s:
                _cancel(index)
            if progress is not None:
                progress(done, len(items), "")
            if not future.cancelled():
                yield index[future], future.result()


@contextmanager
def _watched(futures: Iterable[Future]) -> Iterator[None]:
    """What is wrong ends what has not begun; a broken pool is said in words."""
    try:
        yield
    except BrokenExecutor as error:
        raise OSError(
            "a process that computes was ended (is memory full?); a script that starts processes "
            "must do so under `if __name__ == '__main__':`"
        ) from error
    except BaseException:
        _cancel(futures)
        raise


def _cancel(futures: Iterable[Future]) -> None:
    for future in futures:
        future.cancel()


@contextmanager
def executor_of(scheduler: str | None = None, workers: int | None = None) -> Iterator[Executor]:
    """An executor: a Dask cluster's where a scheduler is named, else processes of this machine.

    Args:
      scheduler: address of a running Dask scheduler, such as `tcp://host:8786`.
      workers: processes (default: one per core); a cluster has its own.
    Raises: ValueError: fewer than one worker; a scheduler that does not answer, or Dask is missing.
    """
    if scheduler is not None:
        with _cluster(scheduler) as found:
            yield found
        return
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    # JAX has threads, which a fork would leave in the middle of what they do.
    context = multiprocessing.get_context("spawn")
    count = workers or len(usable_cores())
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, mp_context=context, initializer=leave_to_parent) as pool:
        try:
            yield pool
        except BaseException:  # Ctrl-C, say: what runs is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


@contextmanager
def _cluster(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            f"scheduler {address}: a Dask cluster needs the extra: pip install 'cmjax[cluster]'"
        ) from None
    try:
        client = Client(address, timeout=_ANSWERS_WITHIN_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(
            f"scheduler {address}: nobody answers within {_ANSWERS_WITHIN_S} s "
            f"({type(error).__name__}); start one with `dask scheduler`"
        ) from None
    try:
        yield client.get_executor(pure=False)
    finally:
        client.close()
