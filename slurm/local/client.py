"""What can be asked of a local cluster from outside: to come up, to go down, and to suffer a fault."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cellhpc.errors import UsageError, UserError
from slurm.local.hosts import wait_until, why_no_namespaces
from slurm.local.settings import Settings
from slurm.local.supervisor import LOCK, RECORD, SOCKET, UP, client_environment, sweep

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "slurm/install.sh"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "scontrol", "sinfo", "sbatch", "srun", "ip", "nsenter", "unshare")
_ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacctmgr")
USABLE = ("idle", "mixed", "allocated", "completing")
"""Slurm's words for nodes that take jobs, or will as soon as they have ended one."""
_UP_SECONDS = 240.0
_LONGEST_PATH = 80
"""Linux allows 107 letters for the path of a socket; the longest name in a cluster's folder takes 25."""
_SUPERVISORS: dict[Path, subprocess.Popen[bytes]] = {}
"""The supervisors that this process started: it has to collect them."""


def why_not(accounting: bool = False) -> str | None:
    """Say in a sentence why no cluster can run on this machine; None if one can."""
    if platform.system() != "Linux":
        return f"Slurm's daemons run on Linux; this is {platform.system()}."
    missing = [name for name in _PROGRAMS + _ACCOUNTING_PROGRAMS * accounting if not _which(name)]
    if missing:
        option = " --accounting" if accounting else ""
        return f"{', '.join(missing)} not found. Install Slurm, as root on Debian: {INSTALL}{option}"
    return None


def up(folder: Path, settings: Settings, lifeline: int | None = None) -> dict[str, Any]:
    """Start a cluster and wait until its nodes are idle.

    Parameters
    ----------
    folder
        Where it lives. What a killed one has left there is cleaned first.
    settings
        What it is to be.
    lifeline
        File descriptor of a pipe: the cluster ends when its other end is closed.

    Returns
    -------
    dict
        `nodes`, `addresses` (of each node), `address` (of this machine on their network), `hosts` (whether nodes are
        hosts of their own), `port`, `pid` (of the supervisor).

    Raises
    ------
    UsageError
        The folder's name or content does not allow it.
    UserError
        It can't run here, the folder is in use, or a daemon did not start.
    """
    if reason := why_not(settings.accounting):
        raise UserError(reason)
    if os.geteuid() == 0 and not settings.one_host and (reason := why_no_namespaces()):
        raise UserError(
            f"this machine does not let root make hosts of namespaces ({reason}). "
            "Several slurmd on one host: --one-host"
        )
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        if lock is None:
            raise UserError(f"{folder} is in use by a cluster. End it (python slurm/cluster.py down {folder}), or name another folder.")  # fmt: skip  # noqa: E501
        sweep(folder)
        folder.chmod(0o755)  # Slurm's commands of other users read slurm.conf and reach munge's socket
        words = dataclasses.asdict(dataclasses.replace(settings, one_host=settings.one_host or os.geteuid() != 0))
        told, tells = os.pipe()
        with (folder / "supervisor.log").open("wb") as log:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "slurm.local.supervisor", str(folder), json.dumps(words), str(tells)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": _path()},
                stdin=subprocess.DEVNULL if lifeline is None else lifeline,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(tells, lock),  # the supervisor holds the lock as long as it lives
            )
        os.close(tells)
    try:
        with open(told) as outcome:  # noqa: PTH123
            said = outcome.read()
    except BaseException:
        supervisor.terminate()
        raise
    if said != UP:
        supervisor.wait()
        raise UserError(f"the cluster did not start: {said or 'its supervisor died'}\nIts logs: {folder}/log")
    _SUPERVISORS[folder] = supervisor
    return record(folder)


def down(folder: Path) -> bool:
    """End a cluster, or clean up after one whose supervisor was killed.

    Returns
    -------
    bool
        False if nothing of a cluster was there.
    """
    if not (folder / LOCK).exists():
        return False
    left = (folder / RECORD).exists()
    try:
        ask(folder, "stop")
    except (OSError, UserError):  # it still starts, or has been killed
        with _locked(folder) as lock, contextlib.suppress(OSError):
            if lock is None:
                os.kill(record(folder)["pid"], signal.SIGTERM)
    supervisor = _SUPERVISORS.pop(folder, None)
    if supervisor is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            supervisor.wait(_UP_SECONDS)

    def swept() -> bool:
        with _locked(folder) as lock:
            if lock is not None:
                sweep(folder)
            return lock is not None

    wait_until("the cluster's supervisor has ended", swept, _UP_SECONDS)
    return left


def start_node(folder: Path, name: str) -> None:
    """Switch a node on and wait until Slurm can use it."""
    ask(folder, "start", name)
    address, port = record(folder)["slurmd"][name]

    def usable() -> bool:  # Slurm may not yet have seen that the node was off
        with contextlib.suppress(OSError), socket.create_connection((address, port), 5):
            return node_states(folder).get(name) in USABLE
        return False

    wait_until(f"{name} is usable", usable, 60)


def ask(folder: Path, action: str, name: str = "") -> Any:
    """Have a cluster's supervisor carry out an action: kill, start, cut, mend, status or stop.

    Raises
    ------
    UserError
        No cluster is up in the folder, or the action is not possible; the message says why.
    """
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(folder / SOCKET))
        except OSError as fault:
            if isinstance(fault, PermissionError):
                raise UserError(f"the cluster in {folder} is another user's.") from None
            raise UserError(f"no cluster is up in {folder}. Start one: python slurm/cluster.py up {folder}") from None
        with client.makefile("rw") as line:
            line.write(json.dumps([action, name]) + "\n")
            line.flush()
            answer = json.loads(line.readline() or '{"error": "the cluster ended meanwhile."}')
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["answer"]


def node_states(folder: Path) -> dict[str, str]:
    """Ask Slurm for the state of each node; empty if slurmctld does not answer."""
    words = ["sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T"]
    environment = client_environment(folder)
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=15, check=False)
        return dict(line.split() for line in done.stdout.splitlines())
    return {}


def record(folder: Path) -> dict[str, Any]:
    """Read what a cluster that is up has written of itself; as `up` returns it."""
    facts: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return facts


def _which(program: str) -> str | None:
    return shutil.which(program, path=_path())


def _path() -> str:
    """Where programs are looked for: an ordinary user's PATH often lacks the daemons' folders."""
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


def _check_folder(folder: Path) -> None:
    """Refuse a folder that can't hold a cluster."""
    if not re.fullmatch(r"[\w./+@-]+", str(folder)) or len(str(folder)) > _LONGEST_PATH:
        raise UsageError(
            f"a cluster's folder can't be {folder}: its path may have letters, digits and ./+@-_ only (Slurm reads it "
            f"in a file), at most {_LONGEST_PATH} of them (it holds sockets). Name another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder.")
    if folder.exists() and not (folder / LOCK).exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} holds other files. Name a new or empty folder, or that of a cluster that is down.")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int | None]:
    """Take the folder's lock and give its file descriptor; None if a supervisor holds it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock
    finally:
        os.close(lock)
