"""What one process of a training job does: join the other ranks, and train the job's runs one after the other.

Started by an executor as ``python -m cellhpc.work STUDY JOB.json``, once for each rank.
"""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path

from cellhpc.errors import UserError
from cellhpc.folds import Folds, read_folds
from cellhpc.ledger import provenance, read_json
from cellhpc.networks import NO_TENSORFLOW
from cellhpc.ranks import Ranks, joined
from cellhpc.settings import parse_job
from cellhpc.study import StudyFolder
from cellhpc.sweep import TrainingJob
from cellhpc.tiles import Store
from cellhpc.train import RunFailed, Trainer, load_data, train_run


def work(study: StudyFolder, job_file: Path) -> None:
    """Train the runs of one job; every rank of the job calls it.

    Raises
    ------
    UserError
        Runs failed; names them. The others were trained.
    """
    provenance()  # before the first run: the checkout may change while this process works
    training_job = TrainingJob.from_json(read_json(job_file))
    _prepare_tensorflow(training_job.threads)
    with joined() as ranks:
        _train(study, training_job, ranks)


def _train(study: StudyFolder, training_job: TrainingJob, ranks: Ranks) -> None:
    job = parse_job(read_json(study.job), str(study.job))
    folds: Folds = read_folds(study.folds)
    store = Store.open(study.store(job))
    failed = []
    for tile_px, runs_of_size in groupby(training_job.runs, key=lambda run: run.tile_px):
        data = load_data(store, folds, tile_px)
        for network, runs in groupby(runs_of_size, key=lambda run: run.network):
            trainer = Trainer(network, data, job.train, ranks)
            for run in runs:
                said = f"{run.id}: done"
                try:
                    train_run(trainer, run, folds, study.runs)
                except RunFailed as fault:
                    said = f"{run.id}: {fault}"
                    failed.append(said)
                if ranks.rank == 0:
                    print(said, flush=True)
    if failed:
        raise UserError(f"{len(failed)} run(s) failed: " + " ".join(failed))


def _prepare_tensorflow(threads: int) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(NO_TENSORFLOW) from None
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    tf.config.experimental.enable_op_determinism()


def main() -> None:
    """Entry point of ``python -m cellhpc.work STUDY JOB.json``."""
    try:
        work(StudyFolder(Path(sys.argv[1])), Path(sys.argv[2]))
    except UserError as fault:
        sys.exit(f"cellhpc: {fault}")


if __name__ == "__main__":
    main()
