"""One rank that makes its training graphs and tells how many bytes the all-reduces in each of them average."""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from cellhpc.ranks import joined
from cellhpc.recipe import TrainSettings
from cellhpc.train import Trainer
from tests import small

network, *given = sys.argv[1:]
data, _ = small.data()
seen = []
with joined() as ranks:
    for text in given:
        trainer = Trainer(network, data, TrainSettings.model_validate_json(text), ranks)
        found = {}
        for part, step in trainer._steps.items():
            operations = step.get_concrete_function().graph.get_operations()
            means = [one.inputs[0] for one in operations if one.type == "HorovodAllreduce"]
            found[part] = sum(mean.shape.num_elements() * mean.dtype.size for mean in means)
        seen.append(found)
print("SAW " + json.dumps(seen))
