"""A baseline in seconds: features of a pre-trained network that is not trained any further, on 660 real fields.

MobileNet-0.25 with ImageNet weights on the fields of jobs/bbbc021_subset.toml, at 224 and at 128 pixels, as they are
and averaged over eight orientations; scored by logistic regression and by nearest neighbours. Nothing of it was chosen
on inner compounds: of logistic regression, the figures at 224 pixels were looked at for ten settings. With features
divided by one number, C = 1 and balanced labels, as here: 55 of 55 treatments, 545 fields, 48 of 49 with the batch out;
with each feature scaled to deviation 1: 54, 502, 47 (C = 1), 54, 509, 48 (C = 0.1) and 53, 512, 48 (C = 0.01).
Needs CELLHPC_DATA.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cellhpc.backbone import choose_source, start_tensorflow
from cellhpc.convert import convert, plan_conversion
from cellhpc.features import write_features
from cellhpc.profiles import baseline, render_baseline
from cellhpc.screens import read_screen
from cellhpc.settings import load_job

JOB = Path(__file__).parents[2] / "jobs" / "bbbc021_subset.toml"
SIDES_PX = (224, 128)


def main() -> None:
    job = load_job(JOB)
    start_tensorflow()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_conversion(job.convert, read_screen(job.screen), SIDES_PX, Path(folder) / "store")
        convert(plan)
        for side_px in SIDES_PX:
            for rotations in (False, True):
                source = choose_source(
                    plan.store, job.sweep.networks[0], job.sweep.weights[0], tile_px=side_px, rotations=rotations
                )
                began = time.perf_counter()
                features = write_features(source, Path(folder) / source.name)
                made = time.perf_counter()
                found = baseline(features.tiles, features.read())
                seconds = {"features": made - began, "baseline": time.perf_counter() - made}
                title = f"{source.name}: {seconds['features']:.1f} s with the network's start, {features.facts['images_per_s']:.0f} images/s; baseline {seconds['baseline']:.1f} s"  # noqa: E501
                Console(width=120).print(render_baseline(found, title))
                figures.append({"source": source.name, **features.facts, **found, "seconds": seconds})
    print(json.dumps({"features": figures}))


if __name__ == "__main__":
    main()
