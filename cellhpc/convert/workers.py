"""Dask's processes of a conversion: a scheduler on rank 0, and worker processes on every rank.

With one rank all listen on the loopback interface. With more, each started by itself (see `cellhpc.hosts`), rank 0
begins at once with its own workers. It lets the others in as they leave their hosts' names in the meeting folder, by a
second door on the interface that leads to them; there it leaves the address for each, with the key of this one attempt.
Whoever reaches a scheduler can run code in it: all processes speak TLS, and only who can read the folder gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellhpc.convert.plan import THREADS
from cellhpc.errors import DataError
from cellhpc.hosts import MEETING, MEETING_SECONDS, RANK, RANKS, address_towards, wait_for
from cellhpc.ledger import read_json, write_json

if TYPE_CHECKING:
    from distributed import Client, LocalCluster
    from distributed.security import Security

POLL_SECONDS = 0.5
START_SECONDS = 90.0
"""How long a worker process may take to start; importing on a busy file system can take a minute."""
RESTART_SECONDS = 20.0
"""How long its nanny may take to start a worker process that died anew, before the nanny is replaced too."""
LOST_SECONDS = 30.0
"""How long rank 0's scheduler may be silent before the other ranks end; as long as Dask waits for a dead connection."""
CLOSE_SECONDS = 15.0
"""How long the processes may take to end before they are killed."""

_SETTINGS: dict[str, Any] = {
    "distributed.nanny.pre-spawn-environ.DASK_LOGGING__DISTRIBUTED": "critical",
    # What the processes serve by HTTP (facts about tasks, metrics) has no password: nothing of it is served.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.profile.enabled": False,  # a hundred looks a second at what each worker does
    # Dask has memory given back to the system at once; getting it again took more time than all the arithmetic.
    **{f"distributed.nanny.pre-spawn-environ.MALLOC_{what}_THRESHOLD_": str(2**28) for what in ("TRIM", "MMAP")},
}


def cores() -> int:
    """Cores that this process may use: by affinity, by control group, and by what Slurm gave to the task."""
    from dask.system import CPU_COUNT

    return max(1, min(int(CPU_COUNT), int(os.environ.get("SLURM_CPUS_PER_TASK") or CPU_COUNT)))


@contextlib.contextmanager
def cluster(workers: int, dashboard: bool = False, profile: bool = False) -> Iterator[Client]:
    """Start a scheduler and this process's workers; they end with the block, or with this process.

    With several ranks in the environment, the other ranks' workers come when they are ready; the block doesn't wait.

    Parameters
    ----------
    workers
        Worker processes of this rank.
    dashboard
        Serve Dask's dashboard on the loopback interface.
    profile
        Look at what this rank's workers do all the time, for the dashboard or a report.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

    security = Security.temporary()
    settings = {key: value for key, value in _SETTINGS.items() if not (dashboard and "scheduler" in key)}
    settings["distributed.worker.profile.enabled"] = profile
    with dask.config.set(settings):
        here = LocalCluster(
            n_workers=0,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": dashboard},
            security=security,
            silence_logs=logging.CRITICAL,
        )
        crew = _Crew(here.scheduler_address, security, rank=0, size=workers)
        try:
            here.sync(crew.start)
            with Client(here, security=security, set_as_default=False) as client, _door(here, security):
                if dashboard:
                    print(f"Dask's dashboard: {client.dashboard_link}", file=sys.stderr)
                yield client
        finally:
            with contextlib.suppress(TimeoutError):
                here.sync(crew.end, callback_timeout=2 * CLOSE_SECONDS)
            crew.kill()
            with contextlib.suppress(TimeoutError):
                here.close(timeout=CLOSE_SECONDS)


def present(client: Client) -> tuple[int, int]:
    """Count the threads that are there to work, and the ranks that they belong to."""
    states = list(client.cluster.scheduler.workers.values())
    return sum(state.nthreads for state in states), len({str(state.name).split(".")[0] for state in states})


def ranks() -> int:
    """Count the ranks that the environment names."""
    return int(os.environ.get(RANKS, "1"))


def release() -> None:
    """On rank 0, tell the other ranks that there is nothing, or nothing more, to do; those still to come, too."""
    if ranks() > 1:
        for rank in range(1, ranks()):
            with contextlib.suppress(OSError):  # a disk that is full now: the others will notice that we are gone
                _tell(_answer(Path(os.environ[MEETING]), rank), {"ended": True})


def serve(meeting: Path, seconds: float = MEETING_SECONDS) -> None:
    """Work for rank 0 of a conversion, with as many processes as this rank has cores, until it has ended.

    Returns when rank 0 has ended the conversion, or, with a message, when its scheduler has been silent for
    `LOST_SECONDS`.

    Parameters
    ----------
    meeting
        Folder of this attempt that all ranks can see.
    seconds
        How long rank 0 may take to begin; it may have a whole screen to plan.

    Raises
    ------
    UserError
        Rank 0 did not come.
    """
    from distributed.security import Security

    rank = int(os.environ[RANK])
    answer = _answer(meeting, rank)
    write_json(meeting / f"rank-{rank}.json", {"host": socket.gethostname()})
    found = wait_for(answer, "rank 0", seconds=seconds)
    if "ended" in found:
        return
    key, certificate = found["key"], found["certificate"]
    keys = {f"tls_{role}_key": key for role in ("client", "scheduler", "worker")}
    certificates = {f"tls_{role}_cert": certificate for role in ("client", "scheduler", "worker")}
    security = Security(require_encryption=True, tls_ca_file=certificate, **keys, **certificates)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if not asyncio.run(_work(found["address"], security, rank, lambda: _has_ended(answer))):
        print(
            f"cellhpc: the scheduler of rank 0 at {found['address']} does not answer any more; rank {rank} ends. "
            "What is done stays done.",
            file=sys.stderr,
            flush=True,
        )


def _answer(meeting: Path, rank: int) -> Path:
    """Where rank 0 leaves what a rank needs to know."""
    return meeting / f"scheduler-{rank}.json"


def _has_ended(answer: Path) -> bool:
    try:
        return "ended" in read_json(answer)
    except (OSError, DataError):  # a shared file system has its moments
        return False


def _tell(path: Path, document: dict[str, Any]) -> None:
    """Write a document atomically that only its owner can read, whatever the umask: it may hold the key."""
    temporary = path.with_name(f".{path.name}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


async def _work(address: str, security: Security, rank: int, ended: Callable[[], bool]) -> bool:
    """Keep workers until the conversion has ended (True), or until its scheduler is lost (False)."""
    import dask
    from distributed.core import rpc

    with dask.config.set(_SETTINGS):
        crew = _Crew(address, security, rank, cores())
        await crew.start()
        scheduler = rpc(address, connection_args=security.get_connection_args("worker"), timeout=LOST_SECONDS / 3)
        answered = time.monotonic()
        try:
            while time.monotonic() - answered < LOST_SECONDS:
                if await asyncio.to_thread(ended):
                    return True
                try:
                    await asyncio.wait_for(scheduler.identity(n_workers=0), LOST_SECONDS / 3)
                    answered = time.monotonic()
                except (OSError, TimeoutError):
                    if await _is_refused(address):
                        break
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(POLL_SECONDS)
            return await asyncio.to_thread(ended)
        finally:
            await scheduler.close_rpc()
            await crew.end()
            crew.kill()


async def _is_refused(address: str) -> bool:
    """Tell whether a host says that nobody listens at an address: then the process that did has ended."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), LOST_SECONDS / 3)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


class _Crew:
    """The worker processes of one rank. A worker that dies is started anew by its nanny; a nanny that fails, by us."""

    def __init__(self, scheduler: str, security: Security, rank: int, size: int) -> None:
        self._scheduler, self._security, self._rank, self._size = scheduler, security, rank, size
        host = scheduler.rpartition("://")[2].rpartition(":")[0]
        self._host = host if host.startswith("127.") else address_towards(host)
        self._keepers: list[asyncio.Task[None]] = []
        self._processes: set[int] = set()

    async def start(self) -> None:
        """Begin to start the workers, without waiting for them."""
        self._keepers = [asyncio.create_task(self._keep(place)) for place in range(self._size)]

    async def end(self) -> None:
        """End all workers; a task that takes longer than a few seconds more is cut off, and has no marker."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.wait(self._keepers, timeout=CLOSE_SECONDS + 5)

    def kill(self) -> None:
        """Kill what did not end."""
        import psutil

        for child in psutil.Process().children():
            if child.pid in self._processes:
                with contextlib.suppress(psutil.Error):
                    child.send_signal(signal.SIGKILL)

    async def _keep(self, place: int) -> None:
        """Keep one worker alive, under a new name each time: the scheduler may not know yet that the last one died."""
        from distributed import Nanny

        for life in itertools.count():
            nanny = Nanny(
                self._scheduler,
                name=f"{self._rank}.{place}.{life}",
                nthreads=THREADS,
                host=self._host,
                dashboard=False,
                dashboard_address="127.0.0.1:0",
                memory_limit=0,  # a task's memory is bounded by its shard
                security=self._security,
                silence_logs=logging.CRITICAL,
                death_timeout=START_SECONDS,
            )
            try:
                with contextlib.suppress(Exception):  # a nanny that can't start, or that fails, is replaced
                    await nanny
                    await self._watch(nanny)
            finally:
                self._processes.add(nanny.pid)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(nanny.close(timeout=CLOSE_SECONDS / 3), CLOSE_SECONDS)
            await asyncio.sleep(min(1.0 + life, RESTART_SECONDS))

    async def _watch(self, nanny: Any) -> None:
        """Return when a nanny has ended, or has had no living worker for too long."""
        from distributed.core import Status

        alive = time.monotonic()
        while nanny.status == Status.running and time.monotonic() - alive < RESTART_SECONDS:
            if nanny.is_alive():
                alive = time.monotonic()
                self._processes.add(nanny.pid)
            await asyncio.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _door(here: LocalCluster, security: Security) -> Iterator[None]:
    """On rank 0 of several, let the others' workers in for as long as the block lasts."""
    if ranks() == 1:
        yield
        return
    meeting = Path(os.environ[MEETING])
    write_json(meeting / "rank-0.json", {"host": socket.gethostname()})
    tasks: list[asyncio.Task[None]] = []

    closed = threading.Event()

    async def begin() -> None:
        tasks.append(asyncio.create_task(_let_in(here.scheduler, security, meeting, closed)))

    async def end() -> None:
        await asyncio.wait(tasks)

    here.sync(begin)
    try:
        yield
    finally:
        closed.set()
        with contextlib.suppress(TimeoutError):
            here.sync(end, callback_timeout=CLOSE_SECONDS)
        release()


async def _let_in(scheduler: Any, security: Security, meeting: Path, closed: threading.Event) -> None:
    """Answer each rank that comes with the address that it can reach, and with the key."""
    secret = {"key": security.tls_scheduler_key, "certificate": security.tls_scheduler_cert}
    doors = {"127.0.0.1": scheduler.address}
    awaited = set(range(1, ranks()))
    while awaited and not closed.is_set():
        for rank in sorted(awaited):
            note = meeting / f"rank-{rank}.json"
            if not await asyncio.to_thread(note.exists):
                continue
            awaited.remove(rank)
            host = (await asyncio.to_thread(read_json, note))["host"]
            try:
                own = "127.0.0.1" if host == socket.gethostname() else await asyncio.to_thread(address_towards, host)
                if own not in doors:
                    await scheduler.listen(f"tls://{own}:0", **security.get_listen_args("scheduler"))
                    doors[own] = scheduler.listeners[-1].contact_address
            except OSError as fault:
                print(f"cellhpc: rank {rank} on {host} can't take part: {fault}", file=sys.stderr, flush=True)
                await asyncio.to_thread(_tell, _answer(meeting, rank), {"ended": True})
                continue
            await asyncio.to_thread(_tell, _answer(meeting, rank), {"address": doors[own], **secret})
        await asyncio.sleep(POLL_SECONDS)
