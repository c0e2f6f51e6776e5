"""Work shared out over processes of this machine, each with one thread of linear algebra.

Products of matrices made by several threads are rounded otherwise, so with one each a result does not depend on how
many processes there are. A signal stops handing out, and what is in hand is finished. A worker ends with its driver,
however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from storage.base.console import INTERRUPTS, stop_on_signals
from storage.base.errors import UserError

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")

ENDING = "stopping when what is in hand is finished; Ctrl-C again stops at once"
LOOK_S = 0.2  # how often signals are looked for
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(
    work: Callable[[Job, Item], Result], job: Job, items: Sequence[Item], n_workers: int
) -> Iterator[Result]:
    """`work(job, item)` of each item, as they are done; `n_workers` processes, 0 for the cores. All of it pickles.

    Raises what the work raises, KeyboardInterrupt after a signal, and UserError when a worker was killed.
    """
    if not items:
        return
    left = iter(items)
    context = get_context("forkserver")  # workers of later calls need not import anything
    context.set_forkserver_preload([__name__, work.__module__])
    n = min(n_workers or len(os.sched_getaffinity(0)), len(items))
    with (
        one_blas_thread(),
        stop_on_signals(*INTERRUPTS, answer=ENDING) as stop,
        ProcessPoolExecutor(n, mp_context=context, initializer=_start_worker, initargs=(work, job)) as pool,
    ):
        running: set[Future[Result]] = set()
        try:
            while stop.signal is None or running:
                while stop.signal is None and len(running) <= n and (item := next(left, None)) is not None:
                    running.add(_submit(pool, item))  # one more than there are workers, so that none waits
                if not running:
                    break
                done, running = wait(running, LOOK_S, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                if stop.signal is not None:
                    running = {future for future in running if not future.cancel()}
        except BrokenProcessPool:
            time.sleep(LOOK_S)
            if stop.signal is not None:  # it went to the workers, too
                raise KeyboardInterrupt from None
            raise UserError(
                "a worker was killed, perhaps for want of memory; what was finished is kept: run the same command "
                "again, with fewer --workers"
            ) from None
        finally:
            for future in running:
                future.cancel()
        if stop.signal is not None:
            raise KeyboardInterrupt


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Processes that start here use one thread each for products of matrices, which decides how these are rounded."""
    before = {name: os.environ.get(name) for name in BLAS_THREADS}
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    """A worker that starts here inherits the mask: a Ctrl-C in the terminal, which all are sent, is the driver's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return pool.submit(_work, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_of_worker: tuple[Callable[[Any, Any], Any], Any]  # its work and job


def _start_worker(work: Callable[[Any, Any], Any], job: Any) -> None:
    """A worker ends with the driver, however that ends: it would wait for ever on a pipe that it holds itself."""
    global _of_worker
    _of_worker = work, job
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    driver = parent_process()
    assert driver is not None
    driver.join()
    os._exit(1)


def _work(item: Any) -> Any:
    work, job = _of_worker
    return work(job, item)
