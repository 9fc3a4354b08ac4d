"""A conversion's jobs on Dask's workers: a few at a time with the scheduler, however many plates there are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc.convert.plan import FieldSource
from cellhpc.convert.workers import present, ranks
from cellhpc.errors import UserError
from cellhpc.ledger import replacing
from cellhpc.progress import progress

if TYPE_CHECKING:
    from distributed import Client

JOBS_PER_THREAD = 4
"""Tasks that are with the scheduler at a time, for each thread that is there to work."""
POLL_SECONDS = 0.5
IDLE_SECONDS = 180.0
"""How long there may be no worker at all before a conversion gives up; the last ones may just start anew."""
SILENT_SECONDS = 1800.0
"""How long workers may take before any of them ends a task, and the conversion gives up; a task takes seconds."""

Work = Callable[..., Any]
Stop = Callable[[], bool]


class ConversionStopped(UserError):
    """A stop was asked for; what is done stays done, and the same call does the rest.

    `done` counts the jobs that ended since the call began.
    """

    def __init__(self, done: int) -> None:
        super().__init__("The conversion was stopped. What is done stays done: type the same command again.")
        self.done = done


def run_jobs(
    client: Client, jobs: Iterator[tuple[Work, tuple[Any, ...], Any]], stop: Stop
) -> Iterator[tuple[Any, Any]]:
    """Run jobs, of which a few for each thread are with the scheduler at a time; yields (name, result) as they end."""
    # The client's loop fetches the results: a worker that falls silent over one must not keep us from the others.
    waiting: dict[Any, tuple[Any, Any]] = {}
    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    manned = heard = time.monotonic()
    done = 0
    while True:
        if stop():
            client.cancel([future for future, _ in waiting.values()], force=True)
            raise ConversionStopped(done)
        now, threads = time.monotonic(), present(client)[0]
        manned = now if threads else manned
        for function, arguments, name in itertools.islice(
            jobs, max(0, JOBS_PER_THREAD * max(1, threads) - len(waiting))
        ):
            future = client.submit(function, *arguments, pure=False)
            fetched = asyncio.run_coroutine_threadsafe(_fetch(future), client.loop.asyncio_loop)
            waiting[fetched] = future, name
            fetched.add_done_callback(ended.put)
        if not waiting:
            return
        try:
            fetched = ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            _give_up(now - manned, now - heard)
            continue
        heard = now
        future, name = waiting.pop(fetched)
        result = _result(fetched)
        future.release()
        done += 1
        yield name, result


def _give_up(unmanned_s: float, silent_s: float) -> None:
    """End a conversion that nobody works on, or of which nothing is heard any more."""
    again = "Type the same command again: what is done stays done."
    if unmanned_s > IDLE_SECONDS:
        raise UserError(
            f"No worker process could be kept alive for {IDLE_SECONDS:.0f} s: most likely for want of memory, or as "
            'a script that calls convert does so outside of if __name__ == "__main__", and each worker begins it anew. '
            f"{again}"
        )
    if silent_s > SILENT_SECONDS:
        raise UserError(
            f"No worker has ended a task for {SILENT_SECONDS:.0f} s; the raw pictures or the store may lie on a file "
            f"system that does not answer. {again}"
        )


async def _fetch(future: Any) -> Any:
    return await future


def _result(fetched: Any) -> Any:
    from distributed.scheduler import KilledWorker

    try:
        return fetched.result()
    except KilledWorker:
        raise UserError(
            "A worker process died four times on the same task, most likely for want of memory. "
            "Give them more memory and type the same command: what is done stays done. Or begin a new study.folder "
            "with a smaller convert.shard_fields."
        ) from None


@contextlib.contextmanager
def reported(client: Client, path: Path) -> Iterator[None]:
    """Write Dask's report of what its processes do in the block, a page that needs nothing else, if it ends well."""
    from distributed import performance_report

    with client.as_current():
        report = performance_report(mode="inline")
        report.__enter__()
        yield
        with replacing(path) as temporary:
            report.filename = str(temporary)
            report.__exit__(None, None, None)


@contextlib.contextmanager
def reading(
    title: str, sources: list[FieldSource], client: Client
) -> Iterator[Callable[[Iterable[FieldSource]], None]]:
    """Show the progress over fields, with the megabytes of raw files read in a second; nothing if there are none."""
    if not sources:
        yield lambda _: None
        return
    began, read = time.monotonic(), 0
    with progress(title, len(sources), "fields") as advance:

        def note(done: Iterable[FieldSource]) -> None:
            nonlocal read
            done = list(done)
            read += sum(source.bytes for source in done)
            speed = f"{read / 1e6 / max(time.monotonic() - began, 1e-3):,.0f} MB/s"
            advance(len(done), f"{speed}, {present(client)[1]} of {ranks()} ranks" if ranks() > 1 else speed)

        yield note
