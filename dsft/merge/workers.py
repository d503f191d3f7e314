"""Work on pieces of weights in several threads, its results in order and few of them in memory."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

from dsft.core.signals import held_signals

_Result = TypeVar("_Result")

_MOST_WORKERS = {"cpu": 8, "cuda": 4}
"""More read and write no faster, and each holds pieces in memory; on a GPU they only bring them there."""


def count_workers(device_type: str) -> int:
    """Return how many threads work at a time."""
    return min(_MOST_WORKERS[device_type], len(os.sched_getaffinity(0)))


def run_in_order(works: Iterable[Callable[[], _Result]], num_workers: int) -> Generator[_Result, None, None]:
    """Run works in threads and yield their results in the order of the works.

    Works are taken and results given in the caller's thread; at most two for each worker are under way. Close it where
    it may not come to its end: none is under way after that.
    """
    pool = _make_pool(num_workers)
    waiting: deque[Future[_Result]] = deque()
    try:
        for work in works:
            waiting.append(pool.submit(work))
            if len(waiting) > 2 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


@cache
def _make_pool(num_workers: int) -> ThreadPoolExecutor:
    """Return the threads of this process; making them anew for each weight takes as long as the work.

    In each of them PyTorch has one thread: small products divided over more wait longer than they compute. The
    caller's own number stays.
    """
    num_threads = torch.get_num_threads()
    with held_signals():  # threads that wait for one that is never started would keep the process from ending
        pool = ThreadPoolExecutor(num_workers, "merge", _take_one_thread)
        all_are_there = Barrier(num_workers)
        wait([pool.submit(all_are_there.wait) for _ in range(num_workers)])
    torch.set_num_threads(num_threads)
    return pool


os.register_at_fork(after_in_child=_make_pool.cache_clear)  # threads stay with the process that made them


def _take_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number on its first use, and keeps it
