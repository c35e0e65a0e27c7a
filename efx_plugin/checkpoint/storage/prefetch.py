"""A few threads that work ahead of their consumer."""

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = min(4, os.cpu_count() or 1)


def map_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in `WORKERS` threads, in order and at most `WORKERS` results ahead: memory stays bounded."""
    with ThreadPoolExecutor(WORKERS) as executor:
        pending: collections.deque[Future[R]] = collections.deque()
        try:
            for item in items:
                if len(pending) == WORKERS:
                    yield pending.popleft().result()
                pending.append(executor.submit(function, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
