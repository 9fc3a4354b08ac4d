"""What `cellhpc doctor` asks on a node: each rank of its small job leaves its answer beside the job's logs.

An answer is written anew before every step that could end the process, with the name of the step in it: what a node
could not survive is known too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import pwd
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cellhpc.hosts import RANK, RANKS
from cellhpc.ledger import read_json, write_json
from cellhpc.submission import CHECKPOINTED, mark_attempt_done, rank_of_slurm

TOKEN = "token"  # noqa: S105
"""File of the work folder, written where the command is typed and read by every rank."""
SCONTROL = "scontrol"
"""File of an attempt: what the node's own `scontrol --version` says; a container has none."""
PACKAGES = ("tensorflow", "keras", "horovod", "numpy", "zarr", "dask", "submitit")
_NAMES_OF = {"tensorflow": ("tensorflow", "tensorflow-cpu")}
_TRIAL_BYTES = 2**20
OTHERS_SECONDS = 120.0
"""How long a rank that can't join the others lets them go on."""


def facts() -> dict[str, Any]:
    """Tell what has to be the same on both sides: Python, packages, the user."""
    return {
        "host": platform.node(),
        "python": platform.python_version(),
        "cellhpc": _version("cellhpc") or "not installed",
        "sources": _sources(),
        "packages": {package: version for package in PACKAGES if (version := _version(package))},
        "uid": os.getuid(),
        "user": _user(os.getuid()),
    }


def carry_out(submission: str, task: str, trains: bool) -> None:
    """Be one rank of a doctor's job that Slurm started; `trains` asks for all that a training needs too.

    With `trains`, the first start of the job ends as a training does at its time limit: the job is queued again, and
    its second start only says that it came.
    """
    folder = Path(submission)
    attempt = rank_of_slurm(folder, task)
    rank, size = int(os.environ[RANK]), int(os.environ[RANKS])
    if any((folder / task).glob(f"*/{CHECKPOINTED}")):
        if rank == 0:
            mark_attempt_done(attempt, 0)
        return
    answer = _Answer(attempt / f"answer-{rank}.json", rank=rank)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, answer.stop)
    answer.add("facts", facts)
    answer.add("folder", lambda: _folder(folder, attempt / f"note-{rank}"))
    answer.add("scratch", _scratch)
    answer.add("cellhpc's own modules", _modules)
    if trains:
        answer.add("TensorFlow", _tensorflow)
        answer.add("Horovod", _horovod)
        if size > 1 and answer.well("TensorFlow", "Horovod"):
            answer.add("rendezvous", functools.partial(_rendezvous, rank, size))
    answer.finish()
    if trains and size > 1 and not answer.well("rendezvous"):
        _wait_for_others(attempt, size)
        os._exit(1)  # those that wait for this rank end with it, and Horovod can't be used again
    if rank == 0 and trains and _can_requeue(attempt):
        (attempt / CHECKPOINTED).touch()
    elif rank == 0:
        mark_attempt_done(attempt, 0)


class _Answer:
    """What a rank has found so far, on disk."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self.told: dict[str, Any] = {"rank": rank, "host": platform.node(), "time": time.time(), "doing": "start"}
        self.told["finished"] = False

    def add(self, step: str, look: Callable[[], dict[str, Any]]) -> None:
        """Take a step; whatever goes wrong in it is its answer."""
        self.told["doing"] = step
        write_json(self.path, self.told)
        try:
            self.told[step] = look()
        except Exception as fault:
            self.told[step] = {"error": f"{type(fault).__name__}: {fault}"}

    def well(self, *steps: str) -> bool:
        """Tell whether all of these steps were taken and went well."""
        return all("error" not in self.told.get(step, {"error": "not taken"}) for step in steps)

    def finish(self) -> None:
        """Leave the whole answer."""
        self.told |= {"doing": "", "finished": True}
        write_json(self.path, self.told)

    def stop(self, number: int, _: Any) -> None:
        """End at a signal, and say at which step."""
        print(f"cellhpc: {signal.Signals(number).name} while it looked at: {self.told['doing']}", flush=True)
        os._exit(1)


def _folder(folder: Path, note: Path) -> dict[str, Any]:
    """Read what the other side wrote, and write as a job's own programs do."""
    token = folder / TOKEN
    note.write_text("written on a node\n")
    return {"token": token.read_text(), "owner": token.stat().st_uid, "mode": note.stat().st_mode & 0o777}


def _scratch() -> dict[str, Any]:
    """Write and read a file in the folder for temporary files."""
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir())
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(os.urandom(_TRIAL_BYTES))
        file.flush()
    return {"folder": str(folder), "free_gb": shutil.disk_usage(folder).free / 1e9}


def _modules() -> dict[str, Any]:
    """Import what every stage imports."""
    import cellhpc.work

    return {"module": cellhpc.work.__name__}


def _tensorflow() -> dict[str, Any]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    devices = []
    for device in tf.config.list_physical_devices():
        details = tf.config.experimental.get_device_details(device) if device.device_type == "GPU" else {}
        devices.append(details.get("device_name", device.device_type))
        with contextlib.suppress(RuntimeError, ValueError):
            tf.config.experimental.set_memory_growth(device, True)
    return {"version": tf.__version__, "devices": devices, "cuda": tf.test.is_built_with_cuda()}


def _horovod() -> dict[str, Any]:
    import horovod.tensorflow as horovod

    built = {"gloo": horovod.gloo_built(), "nccl": horovod.nccl_built(), "mpi": horovod.mpi_built()}
    return {"version": metadata.version("horovod"), "built": [name for name, there in built.items() if there]}


def _rendezvous(rank: int, size: int) -> dict[str, Any]:
    """Join the ranks as a training does, and take the mean of their numbers."""
    import tensorflow as tf

    from cellhpc.ranks import joined

    with joined() as ranks:
        (mean,) = ranks.mean([tf.constant([float(rank)])])
    return {
        "mean": float(mean[0]),
        "expected": (size - 1) / 2,
        "ranks": size,
        "interface": os.environ["HOROVOD_GLOO_IFACE"],
        "address": os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
    }


def _wait_for_others(attempt: Path, size: int) -> None:
    """Let the other ranks find what they can: srun ends them with this one."""
    deadline = time.monotonic() + OTHERS_SECONDS
    while time.monotonic() < deadline:
        answers = [read_json(path) for path in attempt.glob("answer-*.json")]
        if sum(answer["doing"] in ("", "rendezvous") for answer in answers) == size:
            return
        time.sleep(0.5)


def _can_requeue(attempt: Path) -> bool:
    """Tell whether the node has scontrol: without it, the batch script could not queue the job again."""
    with contextlib.suppress(FileNotFoundError):
        return (attempt / SCONTROL).read_text().startswith("slurm")
    return False


def _version(package: str) -> str | None:
    for name in _NAMES_OF.get(package, (package,)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _sources() -> str:
    """Digest of cellhpc's files: two commits may have one version."""
    digest = hashlib.sha256()
    for path in _files(Path(__file__).parent):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from _files(path)
        elif path.is_file():
            yield path


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
