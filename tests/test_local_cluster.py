from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cellhpc.errors import UserError
from slurm.cluster import LocalCluster, down
from slurm.local.hosts import writers
from tests.slurm_cluster import INSTALL, job_facts, require_slurm, submit, wait_for, wait_for_job, wait_until_saved

ROOT = Path(__file__).parents[1]
BEATS = "while sleep 0.1; do echo $(hostname) >> {beats}; done"
"""A job that shows that it lives."""


def cluster_command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "slurm" / "cluster.py", *words]
    environment = {**os.environ, **environment}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)


def beat(file: Path) -> bool:
    """Tell whether a job that shows that it lives does so now."""
    size = file.stat().st_size
    with contextlib.suppress(TimeoutError):
        for _ in range(10):
            if file.stat().st_size > size:
                return True
            subprocess.run(["sleep", "0.1"], check=True)
    return False


def everything_of(cluster: LocalCluster) -> list[psutil.Process]:
    """All processes of a cluster: its supervisor, and those below it."""
    supervisor = psutil.Process(json.loads((cluster.folder / "cluster.json").read_text())["pid"])
    return [supervisor, *supervisor.children(recursive=True)]


def networks(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            found.add(str(Path(f"/proc/{process.pid}/ns/net").readlink()))
    return found


@contextlib.contextmanager
def nothing_left_of(cluster: LocalCluster) -> Iterator[None]:
    """Check that what a cluster has now in processes, networks, links and cgroups is gone when the block is left."""
    processes = everything_of(cluster)
    ours = networks([psutil.Process()])
    theirs = networks(processes) - ours
    link = f"slurm{json.loads((cluster.folder / 'cluster.json').read_text())['port']}"
    assert len(processes) > 5
    if not cluster.one_host:
        assert len(theirs) == 1 + len(cluster.nodes)
        assert link in psutil.net_if_addrs()
    yield
    alive = [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert not theirs & networks(list(psutil.process_iter()))
    assert link not in psutil.net_if_addrs()
    assert not [path for name in cluster.nodes for path in Path("/sys/fs/cgroup").glob(f"*/slurm_{name}")]
    assert not list(cluster.folder.glob("*.sock"))


# ---- one cluster, whole


def test_a_job_over_two_nodes_runs_on_two_hosts(whole_cluster: LocalCluster) -> None:
    said = whole_cluster.run("srun", "-N2", "-l", "sh", "-c", "echo $(hostname) $(hostname -i)", check=True).stdout
    words = dict(line.split(": ") for line in said.splitlines())
    assert words == {str(i): f"n{i + 1} {whole_cluster.addresses[f'n{i + 1}']}" for i in range(2)}


def test_jobs_reach_other_nodes_by_name_and_run_this_python(whole_cluster: LocalCluster) -> None:
    program = "import socket; print(socket.getaddrinfo('n3', 80)[0][4][0], len(__import__('cellhpc').__name__))"
    said = whole_cluster.run("srun", "-N1", sys.executable, "-c", program, check=True).stdout
    assert said.split() == [whole_cluster.addresses["n3"], "7"]


def test_no_daemon_can_be_reached_from_beyond_this_machine(whole_cluster: LocalCluster) -> None:
    processes = everything_of(whole_cluster)
    ours = networks([psutil.Process()])
    here = {process.pid for process in processes if networks([process]) == ours}
    listening = [seen for seen in psutil.net_connections("inet") if seen.status == psutil.CONN_LISTEN]
    assert not [seen for seen in listening if seen.pid in here]
    # the daemons that do listen are in networks that know no way out
    for name in whole_cluster.nodes:
        routes = whole_cluster.run("srun", "-w", name, "ip", "route", check=True).stdout.splitlines()
        subnet = whole_cluster.addresses[name].rpartition(".")[0]
        assert [route.split()[0] for route in routes] == [f"{subnet}.0/24"]


def test_secrets_are_the_owners_alone(whole_cluster: LocalCluster) -> None:
    for name in ("munge.key", "control.sock", "private"):
        assert (whole_cluster.folder / name).stat().st_mode & 0o077 == 0
    assert not [path for path in whole_cluster.folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o022]


# ---- faults


def test_a_power_cut_kills_the_node_and_its_job_runs_again_elsewhere(whole_cluster: LocalCluster) -> None:
    beats, runs = whole_cluster.folder / "beats", whole_cluster.folder / "runs"
    beats.unlink(missing_ok=True)
    script = f'echo "$(hostname) ${{SLURM_RESTART_COUNT:-0}}" >> {runs}; [ -n "$SLURM_RESTART_COUNT" ] || '
    job = submit(whole_cluster, script + BEATS.format(beats=beats), "--requeue")
    wait_for("the job lives", lambda: beats.exists() and beat(beats))
    first = job_facts(whole_cluster, job)["NodeList"]
    whole_cluster.kill_node(first)
    assert not beat(beats)
    facts = wait_for_job(whole_cluster, job, "COMPLETED")
    (one, no_restart), (other, restart) = (line.split() for line in runs.read_text().splitlines())
    assert (one, no_restart, restart, facts["Restarts"]) == (first, "0", "1", "1")
    assert other != first
    whole_cluster.start_node(first)
    assert whole_cluster.run("srun", "-w", first, "hostname", check=True).stdout.split() == [first]


def test_a_cut_link_separates_a_node_whose_job_goes_on(whole_cluster: LocalCluster) -> None:
    beats = whole_cluster.folder / "beats of n3"
    job = submit(whole_cluster, BEATS.format(beats=f"'{beats}'"), "-w", "n3")
    wait_for("the job lives", lambda: beats.exists() and beat(beats))
    whole_cluster.cut("n3")
    with pytest.raises(OSError, match=r"timed out|No route"):
        socket.create_connection((whole_cluster.addresses["n3"], 1), 2).close()
    assert beat(beats)
    whole_cluster.mend("n3")
    with pytest.raises(ConnectionRefusedError):  # n3 itself answers again
        socket.create_connection((whole_cluster.addresses["n3"], 1), 5).close()
    assert beat(beats)
    assert job_facts(whole_cluster, job)["JobState"] == "RUNNING"
    assert job_facts(whole_cluster, job)["Restarts"] == "0"


def test_a_killed_and_restarted_slurmctld_keeps_its_job(whole_cluster: LocalCluster) -> None:
    go = whole_cluster.folder / "go"
    job = submit(whole_cluster, f"until [ -e {go} ]; do sleep 0.1; done")
    wait_for_job(whole_cluster, job, "RUNNING")
    saved = whole_cluster.folder / "state" / "slurmctld" / f"hash.{int(job) % 10}" / f"job.{job}" / "script"
    assert saved.exists()
    wait_until_saved(whole_cluster)
    whole_cluster.kill_daemon("slurmctld")
    assert cluster_command("status", whole_cluster.folder).returncode == 1
    whole_cluster.start_daemon("slurmctld")
    assert job_facts(whole_cluster, job)["JobState"] == "RUNNING"
    go.touch()
    assert wait_for_job(whole_cluster, job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"


def test_a_job_of_the_high_partition_preempts_and_the_victim_is_warned_and_runs_again(
    whole_cluster: LocalCluster,
) -> None:
    told = whole_cluster.folder / "told"
    script = f'[ -n "$SLURM_RESTART_COUNT" ] && exit; trap "echo warned >> {told}" USR1; while :; do sleep 0.1; done'
    victim = submit(whole_cluster, script, "-N3", "--exclusive", "--signal=B:USR1@60", "--time=60")
    wait_for_job(whole_cluster, victim, "RUNNING")
    high = submit(whole_cluster, "true", "-p", "high", "-N3", "--exclusive")
    wait_for_job(whole_cluster, high, "COMPLETED")
    assert told.read_text() == "warned\n"
    assert wait_for_job(whole_cluster, victim, "COMPLETED")["Restarts"] == "1"


# ---- clusters that come and go


def test_two_clusters_side_by_side(whole_cluster: LocalCluster, tmp_path: Path) -> None:
    with LocalCluster(tmp_path / "c", nodes=1, gres="gpu:2", memory_limit=True, kill_wait=1) as other:
        assert other.addresses["n1"] != whole_cluster.addresses["n1"]
        assert other.run("sinfo", "-hNpdebug", "-o%N").stdout.split() == ["n1"]
        assert whole_cluster.run("sinfo", "-hNpdebug", "-o%N").stdout.split() == ["n1", "n2", "n3"]
        # pretended GPUs are shared out like real ones
        devices = other.run("srun", "--gres=gpu:1", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES", check=True).stdout
        assert devices.split() == ["0"]
        # a job that takes more memory than it asked for is ended
        program = "import time; memory = b'1' * 400_000_000; time.sleep(60)"
        greedy = other.run("srun", "--mem=100", sys.executable, "-c", program)
        assert greedy.returncode != 0
        assert "exceeded memory limit" in greedy.stderr
        with nothing_left_of(other):
            submit(other, BEATS.format(beats=tmp_path / "beats"))
            wait_for("the job lives", (tmp_path / "beats").exists)
            down(other.folder)
    assert whole_cluster.run("srun", "hostname", check=True).stdout.split() == ["n1"]


@pytest.mark.parametrize("one_host", [False, True])
def test_what_a_killed_supervisor_left_is_cleaned_and_a_cluster_starts_anew(tmp_path: Path, one_host: bool) -> None:
    require_slurm()
    folder, beats = tmp_path / "by another name" / "c", tmp_path / "beats"
    (tmp_path / "real").mkdir()
    (tmp_path / "by another name").symlink_to("real")
    with LocalCluster(folder, nodes=2, one_host=one_host) as wrecked:
        submit(wrecked, BEATS.format(beats=beats))
        wait_for("the job lives", beats.exists)
        with nothing_left_of(wrecked):
            everything_of(wrecked)[0].kill()
            everything_of(wrecked)[0].wait()
            with LocalCluster(folder, nodes=1) as again:
                assert not beat(beats)
                assert again.run("srun", "hostname", check=True).stdout.split() == ["n1"]
                assert "wrap" not in again.run("squeue", "-ho%j").stdout
        assert not down(wrecked.folder)


def test_a_cluster_ends_with_the_process_that_wanted_it(tmp_path: Path) -> None:
    require_slurm()
    program = f"""
import time
from slurm.cluster import LocalCluster
with LocalCluster({str(tmp_path / "c")!r}, nodes=1):
    print("up", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        left = psutil.Process(json.loads((tmp_path / "c" / "cluster.json").read_text())["pid"])
        owner.send_signal(signal.SIGKILL)
    wait_for("the cluster has ended", lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE, 20)
    assert not (tmp_path / "c" / "cluster.json").exists()


def test_an_ordinary_user_has_several_slurmd_on_one_host() -> None:
    require_slurm()
    python = shutil.which("python3.11", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no Python 3.11 that every user can run")
    folder = Path(tempfile.mkdtemp(prefix="cellhpc-"))
    try:
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "cellhpc").mkdir()
        for name in ("__init__.py", "errors.py"):  # all that it needs of the package
            shutil.copy(ROOT / "cellhpc" / name, folder / "cellhpc")
        subprocess.run(["chown", "-R", "nobody", folder], check=True)
        script = f"""
set -e
cluster() {{ {python} {folder}/slurm/cluster.py "$@"; }}
cluster up {folder}/c --nodes 2 > {folder}/said; eval "$(cat {folder}/said)"
srun -N2 sh -c 'echo $(id -un) $SLURMD_NODENAME'
cluster cut {folder}/c n2 2>&1 || true
sbatch --quiet -w n2 --wrap 'sleep 98765' -o /dev/null; until [ "$(squeue -ho%t)" = R ]; do sleep 0.1; done
ss -Htln | grep -c "127.0.0.1:$(sed -n s/SlurmctldPort=//p $SLURM_CONF)"
cluster node {folder}/c n2 kill; cluster status {folder}/c || true
cluster down {folder}/c
"""
        words = ["runuser", "-u", "nobody", "--", "env", "PATH=/usr/bin:/bin", "bash", "-c", script]
        done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert sorted(lines[:2]) == ["nobody n1", "nobody n2"]
        assert "share this machine's network" in lines[2]
        assert lines[3] == "1"
        assert any(line.split()[0] == "n2" and line.endswith("off") for line in lines)
        assert writers(f"{folder}/") == []
        assert not [seen for seen in psutil.process_iter(["cmdline"]) if "98765" in (seen.info["cmdline"] or [])]
    finally:
        shutil.rmtree(folder)


def test_accounts_are_kept_when_asked_for(tmp_path: Path) -> None:
    require_slurm(accounting=True)
    with LocalCluster(tmp_path / "c", nodes=1, accounting=True) as cluster:
        cluster.run("srun", "false")

        def accounted() -> bool:
            said = cluster.run("sacct", "-nXPo", "JobID,State,ExitCode", check=True).stdout
            return said == "1|FAILED|1:0\n"

        wait_for("sacct knows the job", accounted, 20)
        for name in ("slurmdbd.conf", "private"):
            assert (cluster.folder / name).stat().st_mode & 0o077 == 0


# ---- what a user is told


def test_a_folder_in_use_and_a_part_that_is_not_there(whole_cluster: LocalCluster) -> None:
    again = cluster_command("up", whole_cluster.folder)
    assert again.returncode == 1
    assert again.stderr.startswith(f"slurm/cluster.py: {whole_cluster.folder} is in use by a cluster. End it (")
    with pytest.raises(UserError, match="there is no n9 in this cluster; it has munged, slurmctld, n1, n2, n3"):
        whole_cluster.kill_node("n9")
    with pytest.raises(UserError, match="n1 runs already"):
        whole_cluster.start_node("n1")
    with pytest.raises(UserError, match="slurmctld has no link of its own"):
        whole_cluster.cut("slurmctld")
    status = cluster_command("status", whole_cluster.folder)
    assert status.returncode == 0
    assert f"export SLURM_CONF={whole_cluster.folder}/slurm.conf" in status.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--gres", "gpu"], 2, "--gres is 'gpu'; allowed is NAME:COUNT"),
        (["--nodes", "0"], 2, "--nodes is 0; allowed is 1 to 64"),
        (["--port", "80"], 2, "--port is 80; allowed is 1024 to"),
    ],
)
def test_wrong_settings(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    answer = cluster_command("up", tmp_path / "c", *words)
    assert (answer.returncode, said in answer.stderr) == (code, True), answer.stderr
    assert not (tmp_path / "c").exists()


def test_a_folder_with_other_files_and_one_that_is_no_cluster(tmp_path: Path) -> None:
    require_slurm(root=False)
    (tmp_path / "thesis.tex").touch()
    refused = cluster_command("up", tmp_path)
    assert (refused.returncode, "holds other files" in refused.stderr) == (2, True)
    refused = cluster_command("up", tmp_path / "a b")
    assert (refused.returncode, "its path may have letters" in refused.stderr) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert cluster_command("down", tmp_path / "c").stdout == f"no cluster was up in {tmp_path / 'c'}\n"
    refused = cluster_command("node", tmp_path / "c", "n1", "kill")
    assert (refused.returncode, refused.stderr) == (
        1,
        f"slurm/cluster.py: no cluster is up in {tmp_path / 'c'}. "
        f"Start one: python slurm/cluster.py up {tmp_path / 'c'}\n",
    )


def test_the_message_where_slurm_is_missing(tmp_path: Path) -> None:
    # no program is found, wherever this runs: it looks in PATH and the system's own folders, here of an empty root
    program = "import slurm.local.client as client; client._which = lambda program: None; print(client.why_not())"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("slurmctld, slurmd, munged")
    assert said.stdout.endswith("not found. Install Slurm, as root on Debian: slurm/install.sh\n")


def test_the_installer_is_quick_when_all_is_there_and_refuses_what_it_does_not_know() -> None:
    require_slurm()
    if not shutil.which("dpkg-query"):
        pytest.skip("not Debian")
    done = subprocess.run([INSTALL], capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout.startswith("all there: slurm-wlm ")
    wrong = subprocess.run([INSTALL, "--all"], capture_output=True, text=True, timeout=10, check=False)
    assert (wrong.returncode, wrong.stderr.strip()) == (
        2,
        "slurm/install.sh: --all is not known. Usage: slurm/install.sh [--accounting]",
    )
