"""A Dask cluster of threads of this process, which starts at once, for tests that are not about processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distributed import Client, LocalCluster


@contextlib.contextmanager
def cluster(workers: int, dashboard: bool = False, profile: bool = False) -> Iterator[Client]:
    """Stand in for `cellhpc.convert.workers.cluster`."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=workers, processes=False, dashboard_address=None, protocol="inproc://"
        ) as here,
        Client(here) as client,
    ):
        yield client
