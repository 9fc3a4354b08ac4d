"""What a local cluster is to be, and the files that tell Slurm so."""

from __future__ import annotations

import os
import pwd
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from cellhpc.errors import UsageError

HEAD = "head"
"""The host of slurmctld and slurmdbd where every node is a host of its own."""
MOST_NODES = 64
FIRST_PORT, LAST_PORT, PORTS = 17000, 29900, 100
"""Each cluster has a block of ports of its own, and with it a subnet."""
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
"""Slurm wants a device file behind each GPU, and no two alike. These are on every machine, and nothing opens them."""


@dataclass(frozen=True)
class Settings:
    """What a local cluster is to be.

    Parameters
    ----------
    nodes, cpus, memory_mb
        Nodes n1, n2, ..., and what each claims to have; more than the machine has is allowed.
    accounting
        Keep accounts in slurmdbd, so that `sacct` answers.
    gres
        Pretended devices of each node, NAME:COUNT, such as gpu:2; jobs see CUDA_VISIBLE_DEVICES.
    port
        First of a block of 100 ports, which also chooses the subnet 198.18.N.0/24; 0 takes a free one.
    max_array_size
        Slurm's MaxArraySize.
    one_host
        Several slurmd on this machine's own network, also where root could make every node a host of its own.
    kill_wait, grace, slurmd_timeout
        Seconds: from SIGTERM to SIGKILL at a time limit or scancel; from the warning to the end of a job that is
        preempted; from a node's last sign of life until its jobs are given to others.
    memory_limit
        End the jobs that use more memory than they asked for; looked at every second.

    Raises
    ------
    UsageError
        A value is not allowed.
    """

    nodes: int = 3
    cpus: int = 2
    memory_mb: int = 6000
    accounting: bool = False
    gres: str = ""
    port: int = 0
    max_array_size: int = 1001
    one_host: bool = False
    kill_wait: int = 5
    grace: int = 10
    slurmd_timeout: int = 10
    memory_limit: bool = False

    def __post_init__(self) -> None:
        ports = 65535 - PORTS
        bounds = {"nodes": (1, MOST_NODES), "cpus": (1, 1024), "memory_mb": (1, 10**7), "kill_wait": (1, 3600)}
        bounds |= {"max_array_size": (2, 4_000_001), "grace": (0, 3600), "slurmd_timeout": (2, 3600)}
        for name, (least, most) in bounds.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; allowed is {least} to {most}.")
        if self.port and not 1024 <= self.port <= ports:
            raise UsageError(f"--port is {self.port}; allowed is 1024 to {ports}, or 0 for a free one.")
        if self.gres and not (re.fullmatch(r"[a-z]\w*:[1-9]", self.gres) and self.devices <= len(_DEVICES)):
            raise UsageError(
                f"--gres is {self.gres!r}; allowed is NAME:COUNT with 1 to {len(_DEVICES)}, such as gpu:2."
            )

    @property
    def names(self) -> list[str]:
        """The nodes' names."""
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    @property
    def devices(self) -> int:
        """How many pretended devices a node has."""
        return int(self.gres.partition(":")[2] or 0)


@dataclass(frozen=True)
class Addresses:
    """Where the daemons of one cluster are.

    Parameters
    ----------
    port
        First port of the cluster's block.
    subnet
        The first three numbers of the cluster's addresses; empty if all is on one host.
    host
        Name of the host of slurmctld and slurmdbd, as they see it.
    here
        Address of the one host, if all is on one.
    """

    port: int
    subnet: str = ""
    host: str = HEAD
    here: str = "127.0.0.1"

    @classmethod
    def of_hosts(cls, port: int) -> Addresses:
        """Return the addresses of a cluster whose nodes are hosts of their own, in a subnet reserved for tests."""
        return cls(port, f"198.18.{port // PORTS % 256}")  # RFC 2544: no network outside has these

    @property
    def head(self) -> str:
        """Address of slurmctld and slurmdbd."""
        return f"{self.subnet}.254" if self.subnet else self.here

    @property
    def machine(self) -> str:
        """Address of this machine on the cluster's network."""
        return f"{self.subnet}.253" if self.subnet else self.here

    def node(self, name: str) -> str:
        """Address of a node."""
        return f"{self.subnet}.{name[1:]}" if self.subnet else self.here

    def slurmd(self, name: str) -> tuple[str, int]:
        """Address and port of a node's slurmd."""
        return self.node(name), self.port + (1 if self.subnet else 10 + int(name[1:]))

    def needed(self, names: list[str]) -> list[int]:
        """List the ports that the daemons listen on."""
        return [self.port, self.port + 2, *(self.slurmd(name)[1] for name in names)]


def write_files(folder: Path, settings: Settings, addresses: Addresses, machine: str) -> None:
    """Write slurm.conf and the files beside it; `machine` is this machine's name."""
    account = pwd.getpwuid(os.geteuid()).pw_name
    facts = {"folder": folder, "account": account, "head": addresses.head, "host": addresses.host}
    facts |= {"port": addresses.port, "slurmd_port": addresses.port + 1, "database_port": addresses.port + 2}
    facts |= {"per_cpu": max(1, settings.memory_mb // settings.cpus)}
    facts |= {"message_timeout": max(3, min(10, settings.slurmd_timeout))}
    facts = {**vars(settings), **facts}
    parts = [_SLURM.format(**facts)]
    if settings.memory_limit:
        parts.append("JobAcctGatherFrequency=task=1\nJobAcctGatherParams=OverMemoryKill\n")
    if settings.accounting:
        parts.append(_ACCOUNTING.format(**facts))
        _write_secret(folder / "slurmdbd.conf", _SLURMDBD.format(**facts))
        (folder / "mariadb.cnf").write_text(_MARIADB.format(**facts))
    if settings.gres:
        kind = settings.gres.partition(":")[0]
        parts.append(f"GresTypes={kind}\n")
        flags = " Flags=nvidia_gpu_env" if kind == "gpu" else ""
        devices = [f"Name={kind} File=/dev/{device}{flags}\n" for device in _DEVICES[: settings.devices]]
        (folder / "gres.conf").write_text("".join(devices))
    for name in settings.names:
        place = f"NodeAddr={addresses.node(name)}"
        if not addresses.subnet:
            place += f" NodeHostname={addresses.host} Port={addresses.slurmd(name)[1]}"
        claims = f"CPUs={settings.cpus} Sockets=1 CoresPerSocket={settings.cpus} RealMemory={settings.memory_mb}"
        gres = f" Gres={settings.gres}" if settings.gres else ""
        parts.append(f"NodeName={name} {place} {claims}{gres} State=UNKNOWN\n")
    parts.append(_PARTITIONS.format(**facts))
    (folder / "slurm.conf").write_text("".join(parts))
    # Without this file slurmd asks the machine's cgroup tree what it is, and gives up where there is none.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    # The daemons read a file of their own: on one host, theirs must not listen on all of the machine's addresses.
    bound = "" if addresses.subnet else "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
    (folder / "daemons.conf").write_text(f"include {folder}/slurm.conf\n{bound}")
    hosts = [f"127.0.0.1 localhost\n{addresses.head} {HEAD}\n{addresses.machine} {machine}\n"]
    hosts += [f"{addresses.node(name)} {name}\n" for name in settings.names]
    (folder / "hosts").write_text("".join(hosts))
    _write_secret(folder / "munge.key", os.urandom(128))


def _write_secret(path: Path, content: str | bytes) -> None:
    """Write a new file that only its owner can read."""
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, stat.S_IRUSR | stat.S_IWUSR)
    with os.fdopen(handle, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


_SLURM = """\
ClusterName=local
SlurmctldHost={host}({head})
SlurmUser={account}
SlurmdUser={account}
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its old credential has expired: 120 s by default
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmdPort={slurmd_port}
StateSaveLocation={folder}/state/slurmctld
SlurmdSpoolDir={folder}/state/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
PropagateResourceLimits=NONE
# a node that was lost comes back by itself, and its jobs run again elsewhere
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout}
BatchStartTimeout=20
# a node is lost after about 3 of these, whatever SlurmdTimeout is
MessageTimeout={message_timeout}
KillWait={kill_wait}
MinJobAge=300
MaxArraySize={max_array_size}
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU={per_cpu}
# nodes may claim more than the machine has
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
"""
_PARTITIONS = """\
PartitionName=debug Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={grace}
PartitionName=high Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
_ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={head}
AccountingStoragePort={database_port}
AccountingStoragePass=socket={folder}/munge.sock
"""
_SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
DbdHost={host}
DbdAddr={head}
DbdPort={database_port}
SlurmUser={account}
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={account}
StorageLoc=slurm
PidFile={folder}/state/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
DebugLevel=info
"""
_MARIADB = """\
[mariadbd]
datadir={folder}/private/mariadb
socket={folder}/private/mariadb.sock
pid-file={folder}/private/mariadb.pid
log-error={folder}/log/mariadbd.log
skip-networking
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
innodb_flush_log_at_trx_commit=0
innodb_lock_wait_timeout=900
performance_schema=OFF
[client]
socket={folder}/private/mariadb.sock
"""
