"""A conversion that is killed again and again, at random moments: in the end the store is the same, byte for byte.

``kills.py --kills 200 --seed 0`` kills -9 the command, one of its workers, or all of them, at a random time of the
conversion, and starts it again. Whenever a store is done, the next one is begun, until there were so many kills.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import pandas as pd
import psutil

from cellhpc.convert import convert, plan_conversion
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings
from tests.test_convert import CHANNELS, contents, make_screen

TARGETS = ("command", "a worker", "all")


def convert_here(raw: Path, store: Path) -> None:
    screen = Screen(pd.read_parquet(raw / "fields.parquet"), CHANNELS, raw)
    settings = ConvertSettings(shard_fields=1, illumination="median", preprocessing="percentile")
    convert(plan_conversion(settings, screen, (16, 24), store), workers=2)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return False


def kill(process: subprocess.Popen[bytes], target: str, draw: random.Random) -> str:
    """Kill -9 a part of a conversion; returns what was killed: all of it, where there is no worker yet."""
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if is_worker(child)]
    if target == "a worker" and workers:
        draw.choice(workers).kill()
    elif target == "command":
        process.kill()
    else:
        target = "all"
        os.killpg(process.pid, signal.SIGKILL)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        convert_here(*given.convert)
        return
    draw = random.Random(given.seed)
    killed: collections.Counter[str] = collections.Counter()
    stores = 0
    with tempfile.TemporaryDirectory() as temporary:
        top = Path(temporary)
        make_screen(top / "raw", plates=2, fields=60).fields.to_parquet(top / "raw/fields.parquet")
        began = time.monotonic()
        convert_here(top / "raw", top / "whole")
        whole, seconds = contents(top / "whole"), time.monotonic() - began
        print(f"undisturbed: {len(whole)} files in {seconds:.1f} s", flush=True)
        while sum(killed.values()) < given.kills:
            stores += 1
            store = top / f"store-{stores}"
            while True:
                words = [sys.executable, __file__, "--convert", str(top / "raw"), str(store)]
                process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.DEVNULL)
                try:
                    process.wait(timeout=draw.uniform(1.0, seconds))
                    break  # done, or it gave up, which the comparison below shows
                except subprocess.TimeoutExpired:
                    target = kill(process, draw.choice(TARGETS), draw)
                    killed[target] += 1
                if target == "a worker":  # the conversion goes on by itself
                    process.wait()
                    break
                process.wait()
            found = contents(store)
            if found != whole:
                differing = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
                sys.exit(f"kills: store {stores} differs in {', '.join(differing[:5])}")
            print(f"{stores:3} stores, {sum(killed.values()):3} kills: byte-identical", flush=True)
    print(
        json.dumps({"bench": "kills", "cores": os.cpu_count(), "seed": given.seed, "stores": stores, "kills": killed})
    )


if __name__ == "__main__":
    main()
