"""Who is who among the processes of one attempt: rank, number of ranks, the folder where they meet, their addresses.

Each rank is a process that starts by itself (a local process, an srun task). The environment says who it is:
`CELLHPC_RANK`, `CELLHPC_RANKS` and `CELLHPC_MEETING`, a folder of this one attempt that all ranks can see and that only
their owner can read. What ranks have to tell each other before they are connected stands in files there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cellhpc.errors import UserError
from cellhpc.ledger import read_json

RANK, RANKS, MEETING = "CELLHPC_RANK", "CELLHPC_RANKS", "CELLHPC_MEETING"
PLACE = "CELLHPC_PLACE"
"""Number of this process among those that this host trains on at the same time; Slurm's tasks have it of Slurm."""
MEETING_SECONDS = 300.0
"""How long ranks wait for each other at the start; importing TensorFlow on a busy machine can take a minute."""


class NotMet(UserError):
    """A rank did not come to the meeting in time."""


def place_here() -> int:
    """Give the number of this process among those that train on its host: of several GPUs, it takes its own."""
    told = os.environ.get(PLACE) or os.environ.get("SLURM_LOCALID") or "0"
    return int(told) if told.isdecimal() else 0


def address_towards(host: str) -> str:
    """Return this host's address on the interface that leads to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname(host), 9))
        return str(probe.getsockname()[0])


def interface_towards(address: str) -> str:
    """Name the network interface that leads to an address; Gloo would else bind to what the host's name resolves to.

    Raises
    ------
    UserError
        No interface has the address that the route names.
    """
    own = address_towards(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    raise UserError(f"no network interface has the address {own}, which leads to rank 0 at {address}")


def wait_for(path: Path, who: str, now: Callable[[], float] = time.monotonic, seconds: float = MEETING_SECONDS) -> Any:
    """Wait for a document in the meeting folder and read it.

    Raises
    ------
    NotMet
        It did not come within these seconds.
    """
    deadline = now() + seconds
    while not path.exists():
        if now() > deadline:
            raise NotMet(
                f"{who} did not come to the meeting in {path.parent} within {seconds:.0f} s. See what it said in the "
                "other logs of this task; a slow file system may need another try: cellhpc resume STUDY"
            )
        time.sleep(0.05)
    return read_json(path)
