"""Conversions over several ranks: each is a process of its own; they meet in a folder, and find each other by it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest

from cellhpc.convert import convert, execute, plan_conversion, running
from cellhpc.convert.running import ConversionStopped
from cellhpc.convert.workers import cores, serve
from cellhpc.errors import UsageError, UserError
from cellhpc.hosts import MEETING, RANK, RANKS
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from tests.test_convert import contents, make_screen
from tests.waiting import wait_until

SETTINGS = ConvertSettings(shard_fields=1)
PROGRAM = Path(__file__).parent / "convert_program.py"


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    made = make_screen(tmp_path_factory.mktemp("raw"), plates=2, fields=30)
    made.fields.to_parquet(made.root / "fields.parquet")
    return made


@pytest.fixture(scope="module")
def whole(screen: Screen, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a conversion in one process makes of the screen."""
    store = tmp_path_factory.mktemp("whole") / "store"
    convert(plan_conversion(SETTINGS, screen, (16, 24), store), workers=1)
    return converted(store)


def converted(store: Path) -> dict[str, bytes]:
    """A store's files; the commit that other processes were started from may be another one by now."""
    return {
        name: re.sub(rb'"(commit|dirty)": [^,\n]*', b"", content) if name.endswith("plate.json") else content
        for name, content in contents(store).items()
    }


class Ranks:
    """The processes of one attempt."""

    def __init__(self, screen: Screen, store: Path, size: int, *places: list[str]) -> None:
        self.store, self.meeting = store, store.parent / f"meeting-{len(list(store.parent.glob('meeting-*')))}"
        self.meeting.mkdir(mode=0o700)
        self.processes = [
            subprocess.Popen(
                [*(places[rank] if places else []), sys.executable, PROGRAM, screen.root, store],
                env={
                    **os.environ,
                    "PYTHONPATH": str(PROGRAM.parents[1]),
                    "SLURM_CPUS_PER_TASK": "1",
                    RANK: str(rank),
                    RANKS: str(size),
                    MEETING: str(self.meeting),
                },
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                umask=0o002,
            )
            for rank in range(size)
        ]

    def markers(self) -> list[Path]:
        return list((self.store / "plates").glob("P?/000*.json"))

    def hold_back(self, rank: int) -> list[psutil.Process]:
        """Stop a rank's worker processes before they begin, so that it is the other ranks that do the work."""
        wait_until(lambda: bool(self.workers(rank)), 60)
        workers = self.workers(rank)
        for worker in workers:
            worker.suspend()
        return workers

    def workers(self, rank: int) -> list[psutil.Process]:
        return workers_of(self.processes[rank].pid)

    def end(self, rank: int, seconds: float = 120) -> tuple[int, str]:
        """Wait until a rank has ended: its code, and what it said."""
        _, said = self.processes[rank].communicate(timeout=seconds)
        return self.processes[rank].returncode, said

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for worker in workers_of(process.pid):
                    worker.kill()
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@contextlib.contextmanager
def started(screen: Screen, store: Path, size: int, *places: list[str]) -> Iterator[Ranks]:
    ranks = Ranks(screen, store, size, *places)
    try:
        yield ranks
    finally:
        ranks.kill()


def workers_of(process: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process).children(recursive=True)
        return [child for child in children if child.is_running() and "spawn_main" in " ".join(command(child))]
    return []


def command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses at which anything listens in the network namespaces of these processes, if it is theirs."""
    found = set()
    for process in processes:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


# The same store, whatever happens to its makers


def test_three_ranks_of_which_one_is_killed_make_the_same_store_and_open_nothing_to_others(
    screen: Screen, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with started(screen, tmp_path / "store", 3) as ranks:
        ranks.hold_back(0)
        wait_until(lambda: len(ranks.markers()) > 2, 120)
        for process in ranks.processes:
            process.send_signal(signal.SIGSTOP)  # hold everything still, to look at it
        everyone = [psutil.Process(process.pid) for process in ranks.processes]
        everyone += [worker for rank in range(3) for worker in ranks.workers(rank)]
        assert listening(everyone) == {"127.0.0.1"}
        for process in everyone:
            assert "PRIVATE KEY" not in " ".join(process.cmdline()) + str(process.environ())
        keys = [path for path in ranks.meeting.iterdir() if "PRIVATE KEY" in path.read_text()]
        assert keys
        assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}

        for worker in (*ranks.workers(1), everyone[1]):
            worker.kill()
        for process in (ranks.processes[0], ranks.processes[2]):
            process.send_signal(signal.SIGCONT)
        code, said = ranks.end(0)
        assert code == 0
        assert re.search(r"Converting: 60/60 fields .*, [12] of 3 ranks", said)
        assert ranks.end(2) == (0, "")
    assert converted(tmp_path / "store") == whole
    assert not any("KEY" in path.read_text() for path in ranks.meeting.iterdir())


def test_rank_0_is_killed_all_end_and_the_next_attempt_does_what_is_missing(
    screen: Screen, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with started(screen, tmp_path / "store", 2) as ranks:
        held = ranks.hold_back(0)
        wait_until(lambda: len(ranks.markers()) > 2, 120)
        ranks.processes[0].kill()
        orphans = held + ranks.workers(1)
        for worker in orphans:
            with contextlib.suppress(psutil.Error):
                worker.resume()
        code, said = ranks.end(1, 60)
        assert (code, "does not answer any more; rank 1 ends" in said) == (0, True)
        wait_until(lambda: not any(worker.is_running() for worker in orphans), 10)
    before = {path: path.stat().st_mtime_ns for path in ranks.markers()}
    assert 2 < len(before) < 60
    with started(screen, tmp_path / "store", 2) as ranks:
        assert ranks.end(0)[0] == 0
        assert ranks.end(1) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert converted(tmp_path / "store") == whole


# Over a network


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """Two network namespaces with names and addresses of their own; the words that start a program in each."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "nsenter", "unshare")):
        pytest.skip("two hosts in one machine need root, and the tools ip, nsenter and unshare")
    names = [f"cellhpc-{os.getpid()}-{number}" for number in (1, 2)]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        link = ["ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0"]
        subprocess.run([*link, "netns", names[1]], check=True)
        table = tmp_path / "hosts"
        table.write_text("127.0.0.1 localhost\n10.79.0.1 convert-n1\n10.79.0.2 convert-n2\n")
        places = []
        for number, name in enumerate(names, 1):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"10.79.0.{number}/24", "dev", "eth0"], check=True)
            for device in ("lo", "eth0"):
                subprocess.run([*inside, "link", "set", device, "up"], check=True)
            become = f'mount --bind {table} /etc/hosts && hostname convert-n{number} && exec "$@"'
            own = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", become, "sh"]
            places.append(["nsenter", f"--net=/run/netns/{name}", *own])
        yield places
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_two_hosts_listen_to_each_other_only_and_a_link_that_goes_dark_ends_the_one_and_not_the_conversion(
    screen: Screen, whole: dict[str, bytes], tmp_path: Path, hosts: list[list[str]]
) -> None:
    with started(screen, tmp_path / "store", 2, *hosts) as ranks:
        ranks.hold_back(0)
        wait_until(lambda: len(ranks.markers()) > 2, 120)
        tables = [Path(f"/proc/{process.pid}/net/{kind}") for process in ranks.processes for kind in ("tcp", "tcp6")]
        rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
        heard = {row[1].partition(":")[0] for row in rows if row[3] == "0A"}  # LISTEN; addresses in hexadecimal
        assert heard == {"0100007F", "01004F0A", "02004F0A"}  # 127.0.0.1, 10.79.0.1, 10.79.0.2

        subprocess.run([*hosts[0][:2], "ip", "link", "set", "eth0", "down"], check=True)
        code, said = ranks.end(1, 60)
        assert (code, "does not answer any more; rank 1 ends" in said) == (0, True)
        assert ranks.processes[0].poll() is None
        for worker in ranks.workers(0):
            worker.resume()
        assert ranks.end(0)[0] == 0
    assert converted(tmp_path / "store") == whole


# Stopped, and without an end


def test_a_stop_is_heard_while_no_worker_answers_and_what_is_done_stays_done(
    screen: Screen, whole: dict[str, bytes], tmp_path: Path
) -> None:
    plan = plan_conversion(SETTINGS, screen, (16, 24), tmp_path / "store")
    asked: list[float] = []

    def stop() -> bool:
        if not asked and len(list((tmp_path / "store/plates").glob("P?/000*.json"))) > 2:
            for worker in workers_of(os.getpid()):
                worker.suspend()
            asked.append(time.monotonic())
        return bool(asked) and time.monotonic() > asked[0] + 1

    with pytest.raises(ConversionStopped, match="type the same command again"):
        convert(plan, workers=2, stop=stop)
    assert time.monotonic() - asked[0] < 30
    assert not workers_of(os.getpid())
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "store/plates").glob("P?/000*.json")}
    assert 2 < len(done) < 60
    assert not plan.is_finished
    convert(plan, workers=1)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert converted(tmp_path / "store") == whole


def test_a_conversion_whose_workers_die_at_once_ends_with_a_message(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "IDLE_SECONDS", 4.0)
    plan, ended = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"), threading.Event()

    def kill() -> None:
        while not ended.wait(0.05):
            for worker in workers_of(os.getpid()):
                worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(UserError, match="No worker process could be kept alive for 4 s"):
            convert(plan, workers=2)
    finally:
        ended.set()
        killer.join()


def test_a_worker_that_dies_on_the_same_task_again_and_again_is_told(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "convert_shard", die)
    patience = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with patience, pytest.raises(UserError, match="A worker process died four times on the same task"):
        convert(plan_conversion(SETTINGS, screen, (16,), tmp_path / "store"), workers=1)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# Ranks that come to no work


def test_a_rank_that_comes_after_a_conversion_that_was_refused_ends_at_once(
    screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {RANK: "1", RANKS: "3", MEETING: str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    plan = plan_conversion(SETTINGS, screen, (16,), tmp_path / "store")
    with execute._locked(plan.store), pytest.raises(UsageError, match="another process converts"):
        convert(plan)
    serve(tmp_path, seconds=0.1)


def test_a_rank_that_waits_in_vain_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RANK, "1")
    with pytest.raises(UserError, match=f"rank 0 did not come to the meeting in {tmp_path} within 0 s"):
        serve(tmp_path, seconds=0.1)


def test_no_more_workers_than_cores_for_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    everything = cores()
    assert 1 <= everything <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4096")
    assert cores() == everything


def test_a_worker_starts_without_what_only_the_plan_needs() -> None:
    words = "import sys, cellhpc.convert.tasks; print({'pandas', 'pydantic', 'zarr'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout == "set()\n"
