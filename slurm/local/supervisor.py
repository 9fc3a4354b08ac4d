"""The one process that starts the daemons of a local cluster, kills and restarts them when asked, and ends them all."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cellhpc.errors import UserError
from slurm.local.hosts import (
    Network,
    adopt_orphans,
    kill_writers,
    port_is_free,
    remove_link,
    spawn,
    subnet_is_free,
    wait_until,
)
from slurm.local.settings import FIRST_PORT, LAST_PORT, PORTS, Addresses, Settings, write_files

RECORD, SOCKET, LOCK = "cluster.json", "control.sock", "lock"
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld")
"""In the order of their start."""
OURS = ("state", "log", "private")
"""Folders of a cluster within its own."""
UP = "up"
"""What a supervisor says when the start is done; anything else is why it failed."""
_STDIN = 0


def client_environment(folder: Path) -> dict[str, str]:
    """Return this process's environment, with this cluster instead of another one or of a job of it."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_", "SRUN_"))}
    return {**ours, "SLURM_CONF": str(folder / "slurm.conf")}


def sweep(folder: Path) -> None:
    """Remove what a cluster whose supervisor is gone has left: processes, its link, its sockets."""
    record = folder / RECORD
    if record.exists():
        facts = json.loads(record.read_text())
        kill_writers(f"{folder}/log/")
        if facts["hosts"]:
            remove_link(_link(facts["port"]))
    for path in (record, *folder.glob("*.sock"), *folder.glob("*.sock.lock")):
        path.unlink(missing_ok=True)


def _link(port: int) -> str:
    return f"slurm{port}"


class Supervisor:
    """Starts and ends the daemons of a cluster in `folder`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.environment = client_environment(folder)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.cut: set[str] = set()
        self.network: Network | None = None
        self._stopping = False
        self._renamed: list[str] = []
        self._machine = socket.gethostname().partition(".")[0]
        self.addresses, self._claim = self._free_addresses()

    def _free_addresses(self) -> tuple[Addresses, socket.socket]:
        """Claim a block of ports, and with it a subnet, for as long as this process lives."""
        ports = [self.settings.port] if self.settings.port else range(FIRST_PORT, LAST_PORT + 1, PORTS)
        for port in ports:
            claim = socket.socket(socket.AF_UNIX)
            with contextlib.suppress(OSError):
                claim.bind(f"\0cellhpc-slurm-{port}")  # an abstract name: goes with the process
                addresses = self._one_host(port) if self.settings.one_host else Addresses.of_hosts(port)
                if addresses.subnet and subnet_is_free(addresses.subnet):
                    return addresses, claim
                if not addresses.subnet and all(map(port_is_free, addresses.needed(self.settings.names))):
                    return addresses, claim
            claim.close()
        tried = f"--port {self.settings.port}" if self.settings.port else f"the ports {FIRST_PORT} to {LAST_PORT}"
        raise UserError(f"another cluster, program or network has {tried}. Name other ports: --port N")

    def _one_host(self, port: int) -> Addresses:
        """Let the daemons listen on the loopback only.

        slurmd and slurmctld can be told to listen on the address of the host's name alone. Where a host name of their
        own may be made, that name is localhost; elsewhere it is this machine's, whatever its address is.
        """
        renamed = ["unshare", "--uts"]
        if os.geteuid() != 0:
            renamed += ["--user", "--map-current-user", "--keep-caps"]
        renamed += ["bash", "-c", 'hostname localhost; exec "$@"', "bash"]
        tried = subprocess.run([*renamed, "hostname"], capture_output=True, text=True, check=False)
        if tried.stdout.strip() == "localhost":
            self._renamed = renamed
            return Addresses(port, "", "localhost", "127.0.0.1")
        return Addresses(port, "", self._machine, socket.gethostbyname(self._machine))

    # ---- up

    def start(self) -> None:
        """Start all daemons and wait until every node is idle.

        Raises
        ------
        UserError
            A daemon could not be started: its last words, and where its log is.
        """
        names = self.settings.names
        facts = {
            "pid": os.getpid(),
            "hosts": bool(self.addresses.subnet),
            "port": self.addresses.port,
            "nodes": names,
            "address": self.addresses.machine,
            "addresses": {name: self.addresses.node(name) for name in names},
            "slurmd": {name: self.addresses.slurmd(name) for name in names},
        }
        (self.folder / RECORD).write_text(json.dumps(facts))
        for name in OURS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(mode=0o700 if name == "private" else 0o755)
        write_files(self.folder, self.settings, self.addresses, self._machine)
        if self.addresses.subnet:
            head, machine = self.addresses.head, self.addresses.machine
            log = self.folder / "log" / "network.out"
            self.network = Network(_link(self.addresses.port), head, machine, self.folder / "hosts", log)
        self.start_daemon("munged")
        if self.settings.accounting:
            self._make_database()
            self.start_daemon("slurmdbd")
        self.start_daemon("slurmctld")
        for name in names:
            self.start_node(name)
        self._wait("all nodes are idle", lambda: set(self._ask("sinfo", "-hNtidle", "-o%N").split()) == set(names), 60)

    def start_daemon(self, name: str) -> None:
        """Start munged, mariadbd, slurmdbd or slurmctld, and wait until it answers."""
        folder, private = self.folder, self.folder / "private"
        if name == "munged":
            files = [f"--{kind}-file={private / f'munge.{kind}'}" for kind in ("pid", "log", "seed")]
            # --force: the folders above may be closed to other users, who then can't use the cluster
            words = ["munged", "--foreground", "--force", f"--socket={folder / 'munge.sock'}", "--num-threads=4"]
            self._spawn(name, [*words, f"--key-file={folder / 'munge.key'}", *files])
            self._wait("munged answers", lambda: self._ask("munge", "-n", f"--socket={folder / 'munge.sock'}"))
        elif name == "mariadbd":
            self._spawn(name, [name, f"--defaults-file={folder / 'mariadb.cnf'}", f"--user={_account()}"])
            self._wait("mariadbd answers", lambda: self._sql("select 1"))
        elif name == "slurmdbd":
            self.environment["MYSQL_UNIX_PORT"] = str(private / "mariadb.sock")
            self._spawn(name, self._on_head([name, "-D"]))
            self._wait("slurmdbd answers", lambda: self._ask("sacctmgr", "-n", "list", "cluster"), 120)
            for kind in (["cluster", "local"], ["account", "local"], ["user", _account(), "Account=local"]):
                self._ask("sacctmgr", "-i", "add", *kind)
        else:
            self._spawn(name, self._on_head([name, "-D", "-f", folder / "daemons.conf"]))
            self._wait("slurmctld answers", lambda: "is UP" in self._ask("scontrol", "ping"))

    def _make_database(self) -> None:
        config, account = self.folder / "mariadb.cnf", _account()
        words = ["mariadb-install-db", f"--defaults-file={config}", "--skip-test-db", f"--user={account}"]
        log = self.folder / "log" / "mariadb-install-db.out"
        # no passwords: nobody else reaches its socket, which is in a private folder
        made = spawn([*words, "--auth-root-authentication-method=normal"], log, self.environment)
        if made.wait():
            raise UserError(f"mariadb-install-db failed: {_last_line(log)}\nIts log: {log}")
        self.start_daemon("mariadbd")
        self._sql(
            f"create database slurm; create or replace user '{account}'@localhost; "
            f"grant all on *.* to '{account}'@localhost with grant option"
        )

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, on a host of its own where nodes have one."""
        words = ["slurmd", "-D", "-f", self.folder / "daemons.conf", "-N", name]
        if self.network is None:
            self._spawn(name, [*self._renamed, *words])
            return
        log = self.folder / "log" / f"{name}.out"
        self.processes[name] = self.network.host(name, self.addresses.node(name), words, log, self.environment)
        self.cut.discard(name)

    def _spawn(self, name: str, words: list[Any]) -> None:
        self.processes[name] = spawn(words, self.folder / "log" / f"{name}.out", self.environment)

    def _on_head(self, words: list[Any]) -> list[Any]:
        if self.network is None:
            return [*self._renamed, *words]
        return self.network.on_head(self.addresses.host, words)

    def _wait(self, what: str, test: Callable[[], Any], seconds: float = 30.0) -> None:
        """Wait until something is there, or any daemon that it needs has ended."""
        needed = [name for name in self.processes if self._runs(name)]

        def passed() -> bool:
            for name in needed:
                if not self._runs(name):
                    code, log = self.processes[name].returncode, self.folder / "log" / f"{name}.out"
                    raise UserError(f"{name} ended with code {code}: {_last_line(log)}\nIts log: {log}")
            return bool(test())

        wait_until(what, passed, seconds)

    def _ask(self, *words: str) -> str:
        """Run a client command; returns what it printed, which is nothing if it failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=15, check=False)
            return done.stdout or "\n" if done.returncode == 0 else ""
        return ""

    def _sql(self, text: str) -> bool:
        words = ["mariadb", f"--defaults-file={self.folder / 'mariadb.cnf'}", "-u", "root", "-e", text]
        return subprocess.run(words, capture_output=True, env=self.environment, check=False).returncode == 0

    # ---- while it is up

    def serve(self, ready: Callable[[], None]) -> None:
        """Carry out what clients ask for on the control socket, until one asks for the end, or a signal does.

        `ready` is called as soon as they can ask.
        """
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            selector = stack.enter_context(selectors.DefaultSelector())
            waker, ended = stack.enter_context(_woken_by_signals())
            listener.bind(str(self.folder / SOCKET))
            (self.folder / SOCKET).chmod(0o600)
            listener.listen()
            selector.register(listener, selectors.EVENT_READ)
            selector.register(waker, selectors.EVENT_READ)
            if stat.S_ISFIFO(os.fstat(_STDIN).st_mode):
                selector.register(_STDIN, selectors.EVENT_READ)
            ready()
            while not ended and not self._stopping:
                sources = [key.fileobj for key, _ in selector.select()]
                if _STDIN in sources:
                    return
                if waker in sources:
                    waker.recv(4096)
                self._reap()
                if listener in sources:
                    with listener.accept()[0] as client, client.makefile("rw") as line:
                        self._answer(line)

    def _answer(self, line: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client has gone, or spoke nonsense
            action, name = json.loads(line.readline())
            try:
                answer = {"answer": self._act(action, name)}
            except UserError as fault:
                answer = {"error": str(fault)}
            line.write(json.dumps(answer) + "\n")
            line.flush()

    def _act(self, action: str, name: str) -> Any:
        if action == "stop":
            self._stopping = True
            return None
        if action == "status":
            pids = {name: process.pid if self._runs(name) else None for name, process in self.processes.items()}
            return {"processes": pids, "cut": sorted(self.cut)}
        if name not in self.processes:
            raise UserError(f"there is no {name} in this cluster; it has {', '.join(self.processes)}.")
        runs = self._runs(name)
        if action in ("cut", "mend"):
            self._set_link(name, action, runs)
        elif action == "kill" and runs:
            self.kill(name)
        elif action == "start" and not runs:
            (self.start_daemon if name in DAEMONS else self.start_node)(name)
        else:
            raise UserError(f"{name} {'runs already' if runs else 'does not run'}.")
        return None

    def _set_link(self, name: str, action: str, runs: bool) -> None:
        if name in DAEMONS:
            raise UserError(f"{name} has no link of its own; the nodes have: {', '.join(self.settings.names)}.")
        if self.network is None:
            raise UserError("the nodes share this machine's network (one host): there is no link to cut or mend.")
        if not runs:
            raise UserError(f"{name} is switched off. Start it first: python slurm/cluster.py node DIR {name} start")
        self.network.set_link(name, "down" if action == "cut" else "up")
        self.cut = self.cut | {name} if action == "cut" else self.cut - {name}

    def kill(self, name: str) -> None:
        """Kill a daemon, or all there is on a node as a power cut does: its peers hear nothing more."""
        if self.network is not None and name not in DAEMONS:
            self.network.unplug(name)
        self.processes[name].kill()
        self.processes[name].wait()
        self.cut.discard(name)
        if self.network is None:
            kill_writers(f"{self.folder}/log/{name}.", self._reap)

    def _runs(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def _reap(self) -> None:
        """Collect ended daemons and orphans."""
        for process in self.processes.values():
            process.poll()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    # ---- down

    def stop(self) -> None:
        """Cancel all jobs, switch the nodes off, then end the daemons in order."""
        if self._runs("slurmctld"):
            self._cancel_jobs()
        for name in self.settings.names:
            if self._runs(name):
                self.kill(name)
        for name in reversed(DAEMONS):
            if self._runs(name):
                self.processes[name].terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.processes[name].wait(20)
                self.processes[name].kill()
        if self.network is not None:
            self.network.close()
        kill_writers(f"{self.folder}/log/", self._reap)
        self._claim.close()
        sweep(self.folder)

    def _cancel_jobs(self) -> None:
        """Cancel all jobs, and give those on nodes that are on the time to end by themselves."""
        jobs = set(self._ask("squeue", "-ho%F").split())
        nodes = ",".join(name for name in self.settings.names if self._runs(name) and name not in self.cut)
        if jobs:
            self._ask("scancel", *jobs)
        if jobs and nodes:
            with contextlib.suppress(UserError):
                seconds = self.settings.kill_wait + 5.0
                wait_until("no job is left", lambda: not self._ask("squeue", "-ho%F", "-w", nodes).split(), seconds)


@contextlib.contextmanager
def _woken_by_signals() -> Iterator[tuple[socket.socket, list[int]]]:
    """Give a socket that can be read after each signal, and a list that is filled by those that ask for the end."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    ended: list[int] = []
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ended.append(number))
    try:
        yield reader, ended
    finally:
        signal.set_wakeup_fd(-1)


def _account() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def main() -> None:
    """Run a cluster: FOLDER, its settings as JSON, and a file descriptor that is told the outcome of the start.

    The standard input is the life line: where it is a pipe, its end is the cluster's.
    """
    folder, outcome = Path(sys.argv[1]), int(sys.argv[3])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was told to end"))
    adopt_orphans()
    supervisor = None
    try:
        supervisor = Supervisor(folder, Settings(**json.loads(sys.argv[2])))
        supervisor.start()
    except BaseException as fault:
        if supervisor is not None:
            supervisor.stop()
        _tell(outcome, str(fault))
        if not isinstance(fault, UserError):
            raise
        sys.exit(1)
    supervisor.serve(lambda: _tell(outcome, UP))
    supervisor.stop()


def _tell(outcome: int, words: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(outcome, words.encode())
    os.close(outcome)


if __name__ == "__main__":
    main()
