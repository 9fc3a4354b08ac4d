"""Putting a synthetic screen on disk: one folder, many processes, complete or not there.

A folder belongs to one synthetic screen. `synth-unfinished.json` marks it while files are being made, `synth.json`
comes last; both carry the digest of the settings. Every file appears by a rename under its final name and depends on
the settings alone, so a screen that was interrupted goes on with the files that are missing.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import cv2

from cellhpc.errors import UsageError, UserError
from cellhpc.ledger import digest, read_json, write_json
from cellhpc.progress import progress
from cellhpc.sections import Settings

DRAWING = 1
"""Version of the drawing; a new one makes other pictures from the same settings."""
_AGAIN = "The same command goes on where it stopped; --workers makes fewer work at once."
FINISHED, UNFINISHED = "synth.json", "synth-unfinished.json"

Task = TypeVar("Task")
Made = TypeVar("Made", bound=Settings)


def write_screen(
    folder: Path,
    layout: str,
    settings: Made,
    facts: dict[str, Any],
    tables: dict[str, str],
    tasks: Sequence[Task],
    draw: Callable[[Path, Made, Task], int],
    workers: int | None,
) -> dict[str, Any]:
    """Make a screen's files in parallel, then its tables, then the mark that it is complete.

    Parameters
    ----------
    folder
        Where the screen goes: a new or empty folder, or one with the same screen, finished or not.
    layout, settings
        What is made; their digest names the screen.
    facts
        Counts for the summary; `fields` and `bytes` are needed.
    tables
        Contents of the text files by file name.
    tasks
        The wells.
    draw
        A module-level function that makes the files of one well and returns the number of its fields.
    workers
        Processes; None takes every core, 1 works in this process.

    Returns
    -------
    dict
        The facts, with `folder`, `layout`, `digest`, `made` (False when it was already there) and `seconds`.

    Raises
    ------
    UsageError
        The folder holds something else, the disk is too small, or `workers` is below 1.
    """
    if workers is not None and workers < 1:
        raise UsageError(
            f"synth: workers is {workers}; allowed are whole numbers from 1 on. Leave it out to use every core."
        )
    name = digest({"layout": layout, "settings": settings.model_dump(mode="json"), "drawing": DRAWING})
    summary = {"folder": str(folder), "layout": layout, "digest": name, "made": False, "seconds": 0.0, **facts}
    if _claim(folder, layout, name):
        return summary
    _require_room(folder, facts["bytes"])
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    mark = {"layout": layout, "digest": name, "drawing": DRAWING, "settings": settings.model_dump(mode="json"), **facts}
    write_json(folder / UNFINISHED, mark)
    with progress(f"synth {layout}", facts["fields"], "fields") as advance:
        try:
            for fields in _work(folder, settings, tasks, draw, workers or _cores()):
                advance(fields, "")
        except BrokenProcessPool:
            raise UserError(f"{folder}: a process that drew fields has died (out of memory?). {_AGAIN}") from None
        except OSError as fault:
            raise UserError(f"{folder}: can't be written: {fault.strerror}. {_AGAIN}") from None
    for file, text in tables.items():
        put_file(folder / file, text.encode())
    os.sync()  # once, rather than after each of thousands of files: the mark must not outlive them in a power cut
    write_json(folder / FINISHED, mark)
    (folder / UNFINISHED).unlink()
    return summary | {"made": True, "seconds": round(time.monotonic() - began, 1)}


def put_file(path: Path, contents: bytes) -> None:
    """Write a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(contents)
    temporary.replace(path)


def is_file(path: Path, size: int) -> bool:
    """Tell whether a file is there in its full size."""
    return path.exists() and path.stat().st_size == size


def encoded(save: Callable[[io.BytesIO], None]) -> bytes:
    """Bytes of what a picture library writes."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def _claim(folder: Path, layout: str, name: str) -> bool:
    """Tell whether the screen is finished in the folder; refuse a folder that holds anything else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file; a synthetic screen needs a folder. Give another path.")
    for marker in (FINISHED, UNFINISHED):
        if (folder / marker).exists():
            found = _mark(folder / marker)
            if found == f"{layout}, digest {name[:12]}":
                return marker == FINISHED
            raise UsageError(
                f"{folder}: holds another synthetic screen ({found}); these settings make {layout}, "
                f"digest {name[:12]}. Give another folder, or remove this one."
            )
    others = sorted(entry.name for entry in folder.iterdir())
    if others:
        shown = ", ".join(others[:3]) + (f", ... ({len(others)} in all)" if len(others) > 3 else "")
        raise UsageError(
            f"{folder}: is not empty and holds no synthetic screen (found: {shown}). Give a new or an empty folder."
        )
    return False


def _mark(path: Path) -> str:
    """Read what a marker says is in its folder."""
    try:
        document = read_json(path)
        return f"{document['layout']}, digest {document['digest'][:12]}"
    except (ValueError, LookupError, TypeError):
        return f"{path.name} can't be read"


def _require_room(folder: Path, needed: int) -> None:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    present = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(there).free
    if needed - present > 0.98 * free:
        raise UsageError(
            f"{folder}: the screen needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Give a folder on another "
            "disk, or make fewer or smaller fields (plate_sets, size_px, or the preset demo)."
        )


def _work(
    folder: Path, settings: Made, tasks: Sequence[Task], draw: Callable[[Path, Made, Task], int], workers: int
) -> Iterator[int]:
    """Fields of each finished task, in whichever order they end."""
    workers = min(workers, len(tasks))
    if workers == 1:
        yield from (draw(folder, settings, task) for task in tasks)
        return
    # Never forked from here: OpenCV's and the progress bar's threads do not survive that. A fork server has no threads,
    # and imports once for all; where there is none, each process is spawned.
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: BaseContext = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "cellhpc.synth"])
    else:
        context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting = list(reversed(tasks))
        running = {pool.submit(draw, folder, settings, waiting.pop()) for _ in range(min(4 * workers, len(waiting)))}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if waiting:
                        running.add(pool.submit(draw, folder, settings, waiting.pop()))
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears Ctrl-C and stops the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the first one is gone: killed, it can't tell its workers, and they would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
