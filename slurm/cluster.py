"""A real Slurm cluster on one Debian machine, in one folder, for trying and for tests.

    python slurm/cluster.py up DIR              three nodes; prints the line that lets Slurm's commands find them
    python slurm/cluster.py status DIR          its daemons and nodes
    python slurm/cluster.py node DIR n2 kill    a power cut; `start` switches the node on again
    python slurm/cluster.py cut DIR n2          pull n2's network cable; `mend` plugs it in again
    python slurm/cluster.py daemon DIR slurmctld kill     and `start`
    python slurm/cluster.py down DIR            end all of it

`slurm/install.sh` installs what it needs. Any Python 3.11 can run it. For root every node is a host of its own, with
its own name, address and processes; for others, or with --one-host, several slurmd share this machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cellhpc.errors import UsageError, UserError
from slurm.local.hosts import wait_until, why_no_namespaces
from slurm.local.settings import Settings
from slurm.local.supervisor import LOCK, RECORD, SOCKET, client_environment, sweep

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "slurm/install.sh"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "scontrol", "sinfo", "sbatch", "srun", "ip", "nsenter", "unshare")
_ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb", "sacctmgr")
_UP_SECONDS = 240.0
_USABLE = ("idle", "mixed", "allocated", "completing")
_LONGEST_PATH = 80
"""Linux allows 107 letters for the path of a socket; the longest name in a cluster's folder takes 25."""


class LocalCluster:
    r"""A Slurm cluster on this machine, up for the length of a `with` block.

    It also ends when the process that entered the block is killed. Slurm's commands, and programs that use them, find
    it by the environment `env`.

    Parameters
    ----------
    folder
        Where everything of the cluster lives; new, empty, or of a cluster that is down.
    **settings
        As `slurm.local.settings.Settings` documents: nodes, cpus, memory_mb, accounting, gres, port,
        max_array_size, one_host, kill_wait, grace, slurmd_timeout, memory_limit.

    Raises
    ------
    UserError
        It can't run here, the folder is in use, or a daemon did not start.

    Examples
    --------
    >>> with LocalCluster(tmp_path, nodes=2) as cluster:  # doctest: +SKIP
    ...     cluster.run("srun", "-N2", "hostname").stdout
    'n1\nn2\n'
    """

    def __init__(self, folder: Path | str, **settings: Any) -> None:
        self.folder = Path(folder).absolute()
        self.settings = Settings(**settings)
        self._lifeline: int | None = None

    def __enter__(self) -> LocalCluster:
        read_end, self._lifeline = os.pipe()
        try:
            facts = up(self.folder, self.settings, lifeline=read_end)
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(read_end)
        self.nodes: list[str] = facts["nodes"]
        self.addresses: dict[str, str] = facts["addresses"]
        self.machine_address: str = facts["address"]
        self.one_host: bool = not facts["hosts"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        down(self.folder)
        if self._lifeline is not None:
            os.close(self._lifeline)

    @staticmethod
    def can_run(accounting: bool = False) -> str | None:
        """Say in a sentence why no cluster can run on this machine; None if one can."""
        if platform.system() != "Linux":
            return f"Slurm's daemons run on Linux; this is {platform.system()}."
        missing = [name for name in _PROGRAMS + _ACCOUNTING_PROGRAMS * accounting if not _which(name)]
        if missing:
            option = " --accounting" if accounting else ""
            return f"{', '.join(missing)} not found. Install Slurm, as root on Debian: {INSTALL}{option}"
        return None

    @property
    def env(self) -> dict[str, str]:
        """Environment in which Slurm's commands find this cluster."""
        return client_environment(self.folder)

    def run(self, *words: object, timeout: float = 120.0, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment, on this machine."""
        command = list(map(str, words))
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=check)

    def kill_node(self, name: str) -> None:
        """Cut a node's power: all its processes die at once, and its peers hear nothing more."""
        ask(self.folder, "kill", name)

    def start_node(self, name: str) -> None:
        """Switch a node on and wait until Slurm can use it."""
        start_node(self.folder, name)

    def cut(self, name: str) -> None:
        """Cut a node's network link; its processes go on."""
        ask(self.folder, "cut", name)

    def mend(self, name: str) -> None:
        """Mend a node's network link."""
        ask(self.folder, "mend", name)

    def kill_daemon(self, name: str) -> None:
        """Kill slurmctld, slurmdbd, mariadbd or munged by SIGKILL."""
        ask(self.folder, "kill", name)

    def start_daemon(self, name: str) -> None:
        """Start a killed daemon and wait until it answers."""
        ask(self.folder, "start", name)

    def processes(self) -> dict[str, int | None]:
        """Process id of each daemon and of each node's first process; None for one that is dead."""
        pids: dict[str, int | None] = ask(self.folder, "status")["processes"]
        return pids

    def heal(self) -> None:
        """Start what was killed, mend what was cut, cancel all jobs, and wait until every node is idle."""
        status = ask(self.folder, "status")
        for name, pid in status["processes"].items():
            if pid is None:
                ask(self.folder, "start", name)
        for name in status["cut"]:
            self.mend(name)
        self.run("scancel", *set(self.run("squeue", "-ho%F").stdout.split()), timeout=30)
        wait_until("every node is idle", lambda: set(node_states(self.folder).values()) == {"idle"}, 90)

    def node_state(self, name: str) -> str:
        """Slurm's word for a node's state, such as idle, mixed, idle* (no answer) or down*."""
        return node_states(self.folder).get(name, "unknown")


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
    if reason := LocalCluster.can_run(settings.accounting):
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
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL if lifeline is None else lifeline,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(tells, lock),  # the supervisor holds the lock as long as it lives
            )
        os.close(tells)
    with open(told) as outcome:  # noqa: PTH123
        said = outcome.read()
    if said != "up":
        supervisor.wait()
        raise UserError(f"the cluster did not start: {said or 'its supervisor died'}\nIts logs: {folder}/log")
    _SUPERVISORS[folder] = supervisor
    return _facts(folder)


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
    with contextlib.suppress(OSError, UserError):
        ask(folder, "stop")
    supervisor = _SUPERVISORS.pop(folder, None)
    if supervisor is not None:
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
    address, port = _facts(folder)["slurmd"][name]

    def usable() -> bool:  # Slurm may not yet have seen that the node was off
        with contextlib.suppress(OSError), socket.create_connection((address, port), 5):
            return node_states(folder).get(name) in _USABLE
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


_SUPERVISORS: dict[Path, subprocess.Popen[bytes]] = {}
"""The supervisors that this process started: it has to collect them."""


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return facts


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


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
def _locked(folder: Path) -> Any:
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


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.add_argument("folder", metavar="DIR", type=lambda text: Path(text).absolute())
        return added

    start = command("up", "Start a cluster whose every file is in DIR.")
    helps = {
        "nodes": "nodes n1, n2, ...",
        "cpus": "CPUs that each node claims",
        "memory_mb": "memory that each node claims, MB",
        "accounting": "keep accounts, so that sacct answers (slurmdbd, MariaDB)",
        "gres": "pretended devices of each node, such as gpu:2",
        "port": "first of the 100 ports it may use; 0: a free one",
        "max_array_size": "Slurm's MaxArraySize",
        "one_host": "several slurmd on this machine's own network, also for root",
        "kill_wait": "seconds from SIGTERM to SIGKILL",
        "grace": "seconds from the warning to the end of a preempted job",
        "slurmd_timeout": "seconds until a node that is silent is taken for lost",
        "memory_limit": "end jobs that use more memory than they asked for",
    }
    for field in dataclasses.fields(Settings):
        option, default = f"--{field.name.replace('_', '-')}", field.default
        if isinstance(default, bool):
            start.add_argument(option, action="store_true", help=helps[field.name])
        else:
            shown = f" (default {default})" if default else ""
            start.add_argument(option, type=type(default), default=default, help=helps[field.name] + shown)
    command("down", "End the cluster in DIR.")
    command("status", "Say what runs; the exit code is 0 if all of it does.")
    for name, about in (("node", "Cut a node's power, or switch it on."), ("daemon", "Kill a daemon, or start it.")):
        added = command(name, about)
        added.add_argument("name", metavar="n2" if name == "node" else "slurmctld")
        added.add_argument("action", choices=["kill", "start"])
    for name, about in (("cut", "Cut a node's network link."), ("mend", "Mend a node's network link.")):
        command(name, about).add_argument("name", metavar="n2")
    return parser


def _started(folder: Path, facts: dict[str, Any], settings: Settings, seconds: float) -> str:
    """Say what is up; shell comments and one export, so that `eval "$(... up DIR)"` works too."""
    kind = "each a host of its own" if facts["hosts"] else f"all on this host, ports from {facts['port']}"
    lines = [f"# up in {seconds:.1f} s: {settings.nodes} node(s) of {settings.cpus} CPUs, {kind}"]
    lines += [f"#   {name} {address}" for name, address in facts["addresses"].items() if facts["hosts"]]
    if not facts["hosts"] and not facts["address"].startswith("127."):
        lines.append(
            f"# its daemons listen on {facts['address']}, not on the loopback alone (no user namespaces here): other "
            "machines may reach their ports, which only munge's key guards"
        )
    lines += [f"export SLURM_CONF={folder}/slurm.conf", f"# to end it: python slurm/cluster.py down {folder}"]
    return "\n".join(lines)


def _status(folder: Path) -> int:
    """Print each daemon and node; 0 if all are there."""
    status, facts, states = ask(folder, "status"), _facts(folder), node_states(folder)
    troubled = 0
    for name, pid in status["processes"].items():
        node = name in facts["addresses"]
        state = ("off" if node else "ended") if pid is None else states.get(name, "unknown") if node else "runs"
        state += ", link cut" if name in status["cut"] else ""
        troubled += state not in ("runs", *_USABLE)
        place = facts["addresses"][name] if node else ""
        print(f"{name:<10} {place:<15} {'-' if pid is None else pid:>8}  {state}")
    print(f"export SLURM_CONF={folder}/slurm.conf")
    return int(troubled > 0)


def main() -> int:
    """Entry point: a user's mistake is one message and an exit code, never a traceback."""
    words = vars(_parser().parse_args())
    command, folder = words.pop("command"), words.pop("folder")
    try:
        if command == "up":
            began, settings = time.monotonic(), Settings(**words)
            facts = up(folder, settings)
            print(_started(folder, facts, settings, time.monotonic() - began))
        elif command == "down":
            print(f"ended the cluster in {folder}" if down(folder) else f"no cluster was up in {folder}")
        elif command == "status":
            return _status(folder)
        elif command == "node" and words["action"] == "start":
            start_node(folder, words["name"])
        else:
            ask(folder, words.get("action", command), words["name"])
    except UserError as fault:
        print(f"slurm/cluster.py: {fault}", file=sys.stderr)
        return fault.exit_code
    except OSError as fault:
        print(f"slurm/cluster.py: {fault.filename or 'a file'}: {fault.strerror or fault}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
