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
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cellhpc.errors import UserError
from slurm.local.client import USABLE, ask, down, node_states, record, start_node, up, why_not
from slurm.local.hosts import wait_until
from slurm.local.settings import Settings
from slurm.local.supervisor import client_environment


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
        self.folder = Path(folder).resolve()  # as Linux names the files that its daemons write
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
        return why_not(accounting)

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


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python slurm/cluster.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.add_argument("folder", metavar="DIR", type=lambda text: Path(text).resolve())
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
    status, facts, states = ask(folder, "status"), record(folder), node_states(folder)
    troubled = 0
    for name, pid in status["processes"].items():
        node = name in facts["addresses"]
        state = ("off" if node else "ended") if pid is None else states.get(name, "unknown") if node else "runs"
        state += ", link cut" if name in status["cut"] else ""
        troubled += state not in ("runs", *USABLE)
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
