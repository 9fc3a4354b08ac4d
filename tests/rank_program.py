"""A program that a test starts once for each rank: joins the others, uses each verb, and prints what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf

from cellhpc.ranks import _threads, joined

if "one core" in sys.argv:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

with joined() as ranks:
    variable = tf.Variable([float(ranks.rank + 1)])
    ranks.broadcast([variable])
    averaged = ranks.mean([tf.constant([float(ranks.rank)]), tf.constant([[1.0, 2.0]])])
    seen = {
        "rank": ranks.rank,
        "size": ranks.size,
        "broadcast": variable.numpy().tolist(),
        "mean": [tensor.numpy().tolist() for tensor in averaged],
        "mean_fp16": ranks.mean([tf.constant([1.0 + ranks.rank / 4096, 1e-9])], fp16=True)[0].numpy().tolist(),
        "gather": ranks.gather(np.full((ranks.rank + 1, 2), ranks.rank, np.float32)).tolist(),
        "equal": ranks.equal([np.ones(3)]),
        "unequal": ranks.equal([np.full(3, ranks.rank)]),
        "computes_at": os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
        "threads_at": sorted({os.getpriority(os.PRIO_PROCESS, thread) for thread in _threads()}),
    }
print("SAW " + json.dumps(seen))
