"""Work on pieces of weights in several threads, its results in order and few of them in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

_Result = TypeVar("_Result")

_MOST_WORKERS = {"cpu": 8, "cuda": 4}
"""More read and write no faster, and each holds pieces in memory; on a GPU they only bring them there."""


def count_workers(device_type: str) -> int:
    """Return how many threads work at a time."""
    return min(_MOST_WORKERS[device_type], len(os.sched_getaffinity(0)))


def run_in_order(works: Iterable[Callable[[], _Result]], num_workers: int) -> Iterator[_Result]:
    """Run works in threads and yield their results in the order of the works.

    Works are taken and results given in the caller's thread; at most two for each worker are under way, and none is
    after the end, however that comes.
    """
    pool = _make_pool(num_workers)
    waiting: deque[Future[_Result]] = deque()
    with _one_thread_each(num_workers):
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
    """Return the threads of this process; making them anew for each weight takes as long as the work."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="merge")


@contextmanager
def _one_thread_each(num_workers: int) -> Iterator[None]:
    """Keep PyTorch from dividing each small product over threads of its own, which wait longer than they compute."""
    num_threads = torch.get_num_threads()
    if num_workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
