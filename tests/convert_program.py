"""A program that a test starts once for each rank of a conversion: rank 0 converts, the others work for it.

python convert_program.py RAW STORE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

from cellhpc.convert import convert, plan_conversion
from cellhpc.convert.workers import serve
from cellhpc.hosts import MEETING, RANK
from cellhpc.screens import Screen
from cellhpc.settings import ConvertSettings

if __name__ == "__main__":
    raw, store = map(Path, sys.argv[1:])
    if os.environ[RANK] == "0":
        screen = Screen(pd.read_parquet(raw / "fields.parquet"), ("dna", "tubulin", "actin"), raw)
        convert(plan_conversion(ConvertSettings(shard_fields=1), screen, (16, 24), store), workers=1)
    else:
        serve(Path(os.environ[MEETING]))
