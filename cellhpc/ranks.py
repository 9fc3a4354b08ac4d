"""The seam to Horovod: one process or many, the same verbs.

Each rank is a process that starts by itself (a local process, an srun task); there is no mpirun and no ssh. The
environment says who it is: `CELLHPC_RANK`, `CELLHPC_RANKS` and `CELLHPC_MEETING`, a folder of this one attempt that all
ranks can see. There every rank leaves its host's name; rank 0 then starts Horovod's rendezvous on the interface that
leads to the others and leaves its address. With one rank Horovod is never imported.

When a rank dies or can't be reached, the operations that the others wait in raise `RankLost`, at the latest after
`SILENCE_SECONDS` and the time of the work before them. Such a process can't use Horovod again: end it (`os._exit`, as
Horovod would wait for the lost rank), and start all ranks anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cellhpc.errors import UserError
from cellhpc.hosts import MEETING, RANK, RANKS, address_towards, interface_towards, wait_for
from cellhpc.ledger import write_json

BUCKET_BYTES = 16 * 2**20
CYCLE_MS = 0.5
"""How often Horovod's thread asks the other ranks what is ready, where Gloo's step back; elsewhere Horovod says, 1 ms.
HOROVOD_CYCLE_TIME in the environment overrides both."""
EPOLL = {"x86_64": {"232", "281", "441"}, "aarch64": {"22", "441"}}
"""Linux's numbers of the calls in which a thread waits for news of sockets: epoll_wait, epoll_pwait, epoll_pwait2."""
LOOKS, LOOK_SECONDS = 100, 0.002
"""How often, and after how long each time, `_step_back` looks what threads wait for."""
SILENCE_SECONDS = 30
"""How long Horovod waits for a rank that says nothing; HOROVOD_GLOO_TIMEOUT_SECONDS in the environment overrides it."""


class RankLost(UserError):
    """Another rank has died or can't be reached: this process must end, all ranks start anew."""


class Ranks(Protocol):
    """The processes that train one run together."""

    rank: int
    size: int

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Set these tf.Variables on all ranks to their values on rank 0."""

    def mean(self, tensors: Sequence[Any], fp16: bool = False) -> list[Any]:
        """Mean over the ranks of each tensor; works inside a tf.function, and has a gradient.

        All ranks call it with the same shapes. With `fp16`, what travels is rounded to 16-bit numbers.
        """

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Concatenate each rank's rows (n_rank, ...) in the order of the ranks, on all ranks."""

    def equal(self, arrays: Sequence[np.ndarray]) -> bool:
        """Tell whether these arrays are bit for bit the same on all ranks."""

    def collective(self) -> contextlib.AbstractContextManager[None]:
        """Around a call that uses these verbs inside a tf.function: a lost rank raises `RankLost`."""


class OneRank:
    """A run in one process: every verb is what it is for a single rank."""

    rank = 0
    size = 1

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Do nothing: the values are rank 0's."""

    def mean(self, tensors: Sequence[Any], fp16: bool = False) -> list[Any]:
        """Return the tensors: nothing travels."""
        return list(tensors)

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows."""
        return rows

    def equal(self, arrays: Sequence[np.ndarray]) -> bool:
        """Return True."""
        return True

    def collective(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()


class HorovodRanks:
    """A run in several processes, joined by Horovod."""

    def __init__(self, horovod: Any) -> None:
        self._horovod = horovod
        self.rank: int = horovod.rank()
        self.size: int = horovod.size()
        self.lost = False

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Raise `RankLost` for Horovod's errors within."""
        import tensorflow as tf

        try:
            yield
        except tf.errors.OpError as fault:
            if "orovod" not in str(fault):
                raise
            self.lost = True
            who = f"rank {self.rank} lost another of the {self.size} ranks, which died or can't be reached"
            raise RankLost(f"{who}: {_reason(fault)}.") from None

    def broadcast(self, variables: Sequence[Any]) -> None:
        """Set these tf.Variables on all ranks to their values on rank 0."""
        with self.collective():
            self._horovod.broadcast_variables(list(variables), root_rank=0)

    def mean(self, tensors: Sequence[Any], fp16: bool = False) -> list[Any]:
        """Mean over the ranks of each tensor.

        Tensors travel together in buckets: a hundred small ones, each announced to all ranks, would cost more than a
        small network's step. Buckets of `BUCKET_BYTES` can leave while later gradients are still being computed.
        """
        import tensorflow as tf

        means: list[Any] = []
        compression = self._horovod.Compression.fp16 if fp16 else self._horovod.Compression.none
        for bucket in _buckets(tensors):
            flat = tf.concat([tf.reshape(tensor, (-1,)) for tensor in bucket], 0)
            with self.collective():
                mean = self._horovod.allreduce(flat, op=self._horovod.Average, compression=compression)
            parts = tf.split(mean, [tensor.shape.num_elements() for tensor in bucket])
            means += [tf.reshape(part, tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
        return means

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Concatenate each rank's rows in the order of the ranks."""
        with self.collective():
            return np.asarray(self._horovod.allgather(rows))

    def equal(self, arrays: Sequence[np.ndarray]) -> bool:
        """Compare SHA-256 digests of the arrays' bytes over the ranks."""
        checksum = hashlib.sha256()
        for array in arrays:
            checksum.update(np.ascontiguousarray(array).tobytes())
        digests = self.gather(np.frombuffer(checksum.digest(), np.uint8)[None])
        return bool((digests == digests[0]).all())


def _reason(fault: Exception) -> str:
    """Take what Horovod said, its first sentence, out of TensorFlow's error."""
    said = [line.strip() for line in str(fault).splitlines()]
    frame = ("Graph execution error", "Detected at node", "File ", "[[")
    lines = [re.sub(r"^\{\{.*?\}\} ", "", line) for line in said if line and not line.startswith(frame)]
    return lines[0].partition(". ")[0] if lines else type(fault).__name__


def _buckets(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """Divide tensors of known shape, in their order, into buckets of one type and of about `BUCKET_BYTES`."""
    bucket: list[Any] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size >= BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.shape.num_elements() * tensor.dtype.size
    if bucket:
        yield bucket


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Join the ranks that the environment names; without it, this process is the only rank.

    Raises
    ------
    UserError
        Horovod is not installed, or the other ranks did not come within `hosts.MEETING_SECONDS`.
    """
    size = int(os.environ.get(RANKS, "1"))
    if size == 1:
        yield OneRank()
        return
    try:
        import horovod.tensorflow as horovod
    except ImportError:
        raise UserError(
            f"{size} ranks need Horovod, which is not installed here. Install the extra horovod as the README shows, "
            "or use one rank: --set sweep.ranks=1"
        ) from None
    with _meeting(int(os.environ[RANK]), size, Path(os.environ[MEETING])):
        others = _threads()
        horovod.init()
        if _has_one_core():
            _step_back(_threads() - others)
        ranks = HorovodRanks(horovod)
        ranks.gather(np.zeros(1))  # all have come: until then some may still ask the rendezvous
    try:
        yield ranks
    finally:
        if not ranks.lost:
            horovod.shutdown()


def _has_one_core() -> bool:
    """Tell whether this rank has one core, and the system tells what its threads wait for."""
    one = hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1
    return one and platform.machine() in EPOLL and bool(_call_of(threading.get_native_id()))


def _threads() -> set[int]:
    """List this process's threads by their ids; none where the system (macOS) doesn't tell them."""
    tasks = Path("/proc/self/task")
    return {int(task.name) for task in tasks.iterdir()} if tasks.exists() else set()


def _call_of(thread: int) -> str:
    """Give the number of the system call that a thread is in, or "running"; empty if the system doesn't tell."""
    try:
        return Path(f"/proc/self/task/{thread}/syscall").read_text().split()[0]
    except OSError:
        return ""


def _step_back(threads: Collection[int]) -> None:
    """Give way: of these threads, those that wait for news of sockets are to run behind all others.

    Gloo's do so (`Loop::run`). While Horovod's thread holds the lock of a socket that has news, they ask for them again
    and again (`Pair::handleEvents` only tries the lock). Where a rank has one core, they keep it from the very thread
    that would free the lock, until the scheduler's next tick, some milliseconds later: longer than the gradients of a
    small network travel. A thread that steps back is interrupted at once.
    """
    waiting: set[int] = set()
    for _ in range(LOOKS):
        waiting |= {thread for thread in threads if _call_of(thread) in EPOLL[platform.machine()]}
        time.sleep(LOOK_SECONDS)
    for thread in waiting:
        with contextlib.suppress(OSError):  # it has ended, or may not be changed: slower, not wrong
            os.setpriority(os.PRIO_PROCESS, thread, 19)


@contextlib.contextmanager
def _meeting(rank: int, size: int, folder: Path) -> Iterator[None]:
    """Tell Horovod in the environment who is who; on rank 0, serve its rendezvous for as long as the start needs."""
    write_json(folder / f"rank-{rank}.json", {"host": socket.gethostname()})
    server = None
    if rank == 0:
        hosts = [wait_for(folder / f"rank-{other}.json", f"rank {other}")["host"] for other in range(size)]
        server, document = _serve(hosts)
        write_json(folder / "rendezvous.json", document)
    meeting = wait_for(folder / "rendezvous.json", "rank 0")
    slot = meeting["slots"][rank]
    os.environ.update(
        {f"HOROVOD_{key.upper()}": str(value) for key, value in slot.items()},
        HOROVOD_GLOO_RENDEZVOUS_ADDR=meeting["address"],
        HOROVOD_GLOO_RENDEZVOUS_PORT=str(meeting["port"]),
        HOROVOD_CONTROLLER="gloo",
        HOROVOD_CPU_OPERATIONS="gloo",
        HOROVOD_FUSION_THRESHOLD="0",  # buckets that Horovod joins as they come are summed in an order of chance
        HOROVOD_GLOO_IFACE=interface_towards(meeting["address"]),
    )
    if _has_one_core():
        os.environ.setdefault("HOROVOD_CYCLE_TIME", str(CYCLE_MS))
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(SILENCE_SECONDS))
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()


def _serve(hosts: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Start Horovod's rendezvous for ranks on these hosts, and describe it: address, port and each rank's place."""
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    places = _slots(hosts)
    others = [host for host in hosts if host != hosts[0]]
    address = address_towards(others[0]) if others else "127.0.0.1"
    # The server knows no passwords: it listens on the job's own interface only, and only until all ranks have started.
    server = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.init(_allocation(places))
    return server, {"address": address, "port": server.server_address[1], "slots": places}


def _slots(hosts: Sequence[str]) -> list[dict[str, Any]]:
    """Horovod's numbers for each rank: its place on its host (local) and among the hosts (cross)."""
    order = list(dict.fromkeys(hosts))
    local = [list(hosts[:rank]).count(host) for rank, host in enumerate(hosts)]
    slots = []
    for rank, host in enumerate(hosts):
        peers = [order.index(hosts[other]) for other in range(len(hosts)) if local[other] == local[rank]]
        slots.append(
            {
                "hostname": host,
                "rank": rank,
                "size": len(hosts),
                "local_rank": local[rank],
                "local_size": list(hosts).count(host),
                "cross_rank": sorted(peers).index(order.index(host)),
                "cross_size": len(peers),
            }
        )
    return slots


def _allocation(slots: Sequence[dict[str, Any]]) -> list[Any]:
    from horovod.runner.common.util.hosts import SlotInfo

    return [SlotInfo(**slot) for slot in slots]
