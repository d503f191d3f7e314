"""Work in several threads: results in order, few under way, and an error that ends all."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from dsft.merge.workers import count_workers, run_in_order


def finish_late(number: int) -> int:
    time.sleep(0.01 if number % 3 == 0 else 0)
    return number


@pytest.mark.parametrize("num_workers", [1, 4])
def test_results_come_in_the_order_of_the_works(num_workers: int) -> None:
    works = (partial(finish_late, number) for number in range(50))
    assert list(run_in_order(works, num_workers)) == list(range(50))
    assert list(run_in_order(iter([]), num_workers)) == []


def test_works_run_in_as_many_threads_as_there_are_workers() -> None:
    together = threading.Barrier(4, timeout=10)
    assert sum(run_in_order((lambda: together.wait() >= 0 for _ in range(8)), 4)) == 8


def test_few_works_are_under_way() -> None:
    """Each holds a piece of a weight in memory."""
    num_taken = num_given = most = 0

    def take() -> Iterator[Callable[[], int]]:
        nonlocal num_taken, most
        for number in range(100):
            num_taken += 1
            most = max(most, num_taken - num_given)
            yield partial(finish_late, number)

    for _ in run_in_order(take(), 3):
        num_given += 1
    assert num_taken == num_given == 100
    assert most <= 2 * 3 + 2


def test_an_error_is_raised_in_its_place_and_ends_the_rest() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        if number == 5:
            raise FloatingPointError("in the sixth")
        done.append(number)
        return number

    results = run_in_order((partial(work, number) for number in range(1000)), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(FloatingPointError, match="in the sixth"):
        next(results)
    assert len(done) < 20


def test_pytorch_s_own_threads_come_back() -> None:
    before = torch.get_num_threads()
    inside = set(run_in_order((torch.get_num_threads for _ in range(4)), 2))
    assert inside == {1}
    assert torch.get_num_threads() == before
    results = run_in_order((partial(finish_late, number) for number in range(10)), 2)
    next(results)
    results.close()
    assert torch.get_num_threads() == before


def test_a_gpu_is_given_fewer_works_at_a_time() -> None:
    assert 1 <= count_workers("cuda") <= 4
    assert count_workers("cuda") <= count_workers("cpu") <= 8


SIGNALLED_WHILE_THREADS_START = """
import signal
from concurrent.futures import ThreadPoolExecutor
from dsft.merge.workers import run_in_order

submit = ThreadPoolExecutor.submit

def submit_and_signal(pool, *work):
    future = submit(pool, *work)
    signal.raise_signal(signal.SIGINT)
    return future

ThreadPoolExecutor.submit = submit_and_signal
try:
    list(run_in_order([str, str], 2))
except KeyboardInterrupt:
    print("stopped")
"""


def test_a_signal_while_the_threads_start_does_not_keep_the_process() -> None:
    """One thread would wait for another that is never started, and the interpreter for it."""
    command = [sys.executable, "-c", SIGNALLED_WHILE_THREADS_START]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr
