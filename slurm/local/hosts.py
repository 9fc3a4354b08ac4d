"""Processes that end with the one that started them, and hosts made of Linux namespaces on one machine.

A node that is a host of its own is a process with namespaces of its own for network, host name, mounts and processes;
the file system stays shared, as a cluster's home folders are. Nothing of it has a name outside: when its first process
dies, all its processes and its network link are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cellhpc.errors import UserError

_LIBC = ctypes.CDLL(None, use_errno=True)
_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER

NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
# The first process of a node. It waits for the word that its link is there, then starts the daemon and stays to
# collect orphans; when it is killed, all on the node is.
_BOOT = """\
set -e
hostname "$1"; mount --bind "$2" /etc/hosts
read -r _
ip link set lo up; ip address add "$3/24" dev eth0; ip link set eth0 up
shift 3
"$@" </dev/null & wait
"""
_RENAMED = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parents end."""
    _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)


def spawn(
    words: Sequence[object], log: Path, environment: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a daemon that is killed when this process ends, however that may be; its output goes to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(map(str, words)),
            stdin=stdin,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def why_no_namespaces() -> str | None:
    """Say why this user can't make hosts of namespaces; None if it works."""
    if os.geteuid() != 0:
        return "only root may make them"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() or "unshare failed" if tried.returncode else None


def wait_until(what: str, test: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a test is true.

    Raises
    ------
    UserError
        It was not within `seconds`; `what` says what was waited for.
    """
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            raise UserError(f"waited {seconds:.0f} s in vain until {what}.")
        time.sleep(0.03)


def writers(prefix: str) -> list[int]:
    """List the processes that have a file open for writing whose path begins so, and all their descendants.

    By the logs that they write the daemons of a cluster are known, and slurmstepd, which overwrites its environment
    and leaves its parent. A job's own processes are its descendants.
    """
    children: dict[int, list[int]] = {}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is another user's
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(process.name))
                if any(_writes(process, file, prefix) for file in (process / "fd").iterdir()):
                    found.append(int(process.name))
    every: list[int] = []
    while found:
        every.append(found.pop())
        found += children.get(every[-1], [])
    return [pid for pid in dict.fromkeys(every) if pid != os.getpid()]


def _writes(process: Path, file: Path, prefix: str) -> bool:
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile
        if str(file.readlink()).startswith(prefix):
            facts = (process / "fdinfo" / file.name).read_text().partition("flags:")[2].split()
            return int(facts[0], 8) & os.O_ACCMODE != os.O_RDONLY  # a pager is no daemon
    return False


def kill_writers(prefix: str, reap: Callable[[], None] = lambda: None) -> None:
    """Kill these processes until none is left, collecting those that are this process's children by `reap`."""

    def none_left() -> bool:
        reap()
        left = writers(prefix)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    wait_until("the processes of the cluster have ended", none_left)


class Network:
    """A switch with this machine and hosts on it, all in the subnet of one cluster.

    The switch has a network namespace of its own: rules of this machine's firewall for bridges don't reach it, and it
    vanishes with the process that holds it. No host has a route out of the subnet, so none can be reached from beyond
    this machine.

    Parameters
    ----------
    link
        Name of this machine's own link to the switch.
    head, machine
        Addresses of the switch's host, where the controller runs, and of this machine.
    hosts
        File to stand for /etc/hosts on each host.
    log
        File for what the process that holds the switch says.
    """

    def __init__(self, link: str, head: str, machine: str, hosts: Path, log: Path) -> None:
        self._hosts = hosts
        self._link = link
        self._holder = spawn(["unshare", "--net", "sleep", "infinity"], log, os.environ)
        self._switch = _network_of(self._holder)
        self._ip("link", "add", "switch", "type", "bridge")
        self._ip("address", "add", f"{head}/24", "dev", "switch")
        self._ip("link", "set", "switch", "up")
        self._ip("link", "set", "lo", "up")
        _ip("link", "add", link, "type", "veth", "peer", "name", "machine", "netns", str(self._holder.pid))
        self._ip("link", "set", "machine", "master", "switch", "up")
        _ip("address", "add", f"{machine}/24", "dev", link)
        _ip("link", "set", link, "up")

    def on_head(self, name: str, words: Sequence[object]) -> list[object]:
        """Return the words that run a command on the switch's host, under a host name."""
        into = ["nsenter", f"--net={self._switch}", "unshare", "--uts", "--mount"]
        return [*into, "bash", "-c", _RENAMED, "bash", name, self._hosts, *words]

    def host(
        self, name: str, address: str, words: Sequence[object], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a host whose only daemon is this command."""
        boot = [*NAMESPACES, "bash", "-c", _BOOT, "bash", name, self._hosts, address, *words]
        process = spawn(boot, log, environment, subprocess.PIPE)
        _network_of(process)
        self.unplug(name)  # of a host that ended by itself, if the kernel has not yet taken it away
        self._ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        self._ip("link", "set", name, "master", "switch", "up")
        assert process.stdin is not None  # noqa: S101
        process.stdin.write(b"\n")
        process.stdin.close()
        return process

    def unplug(self, name: str) -> None:
        """Take a host's link away: its peers hear nothing more, not even that its sockets are closed."""
        self._ip("link", "delete", name, check=False)

    def set_link(self, name: str, state: str) -> None:
        """Cut a host's link (down) or mend it (up)."""
        self._ip("link", "set", name, state)

    def close(self) -> None:
        """Remove the switch and this machine's link to it."""
        remove_link(self._link)
        self._holder.kill()
        self._holder.wait()

    def _ip(self, *words: str, check: bool = True) -> None:
        _run("nsenter", f"--net={self._switch}", "ip", *words, check=check)


def subnet_is_free(subnet: str) -> bool:
    """Tell whether this machine has no route into the subnet."""
    return not _run("ip", "-4", "route", "show", "root", f"{subnet}.0/24")


def port_is_free(port: int) -> bool:
    """Tell whether no program of this machine listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def remove_link(name: str) -> None:
    """Remove a link of this machine, if it is there."""
    if Path("/sys/class/net", name).exists():
        _ip("link", "delete", name, check=False)


def _network_of(process: subprocess.Popen[bytes]) -> str:
    """Return the path of a process's network namespace, once it has one of its own."""
    path, ours = Path(f"/proc/{process.pid}/ns/net"), Path("/proc/self/ns/net").readlink()
    wait_until("a host has its own network", lambda: process.poll() is not None or path.readlink() != ours)
    return str(path)


def _ip(*words: str, check: bool = True) -> None:
    _run("ip", *words, check=check)


def _run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode and check:
        raise UserError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
