"""What to change when Slurm refuses a job, or lets it wait."""

from __future__ import annotations

from collections.abc import Sequence

from cellhpc.errors import listing

HOPELESS = ("partitionnodelimit", "partitiontimelimit", "badconstraints", "invalidaccount", "invalidqos", "held")
"""Words of the reasons for which Slurm never starts a job by itself."""


def refusal(said: str, partitions: Sequence[str] = ()) -> str:
    """Say what to change when Slurm refuses a job with these words."""
    known = f" Partitions here: {listing(partitions)}." if partitions else ""
    for words, remedy in (
        ("partition", f"Correct `partition` in [slurm] or the stage's section.{known}"),
        ("account", "Correct `account` in [slurm] or the stage's section; `sacctmgr show assoc` lists yours."),
        ("qos", "Correct `qos` in [slurm] or the stage's section; `sacctmgr show qos` lists them."),
        ("feature", "Correct `constraint`; `sinfo -o '%R %f'` lists the nodes' features."),
        ("generic resource", "Correct `gres` or `gpus_per_task`; `sinfo -o '%R %G'` lists what nodes have."),
        ("reservation", "Correct `reservation`; `scontrol show reservation` lists them."),
        ("time limit", "Shorten `time`; `sinfo -o '%R %l'` lists the partitions' limits."),
        ("memory", "Lower `memory_gb`; `sinfo -o '%R %m'` lists the nodes' memory in MB."),
        ("node configuration", "Lower `nodes`, `cpus_per_task`, `memory_gb` or the GPUs of the stage, or name a "
         "partition that has so much: `sinfo -o '%R %D %c %m %G %T'` lists nodes, cores, memory, GPUs and states."),
        ("node count", "Lower `nodes`; `sinfo -o '%R %D'` lists how many there are."),
        ("unrecognized option", "Correct `options` in [slurm] or the stage's section: long names of sbatch."),
    ):  # fmt: skip
        if words in said.lower():
            return remedy
    return "Correct the site file; `cellhpc run JOB.toml --site SITE.toml --dry-run` shows the whole text of every job."


def why_waits(reason: str) -> str:
    """Say what to do about a job that Slurm lets wait for this reason."""
    for words, remedy in (
        ("DOWN, DRAINED", "No node of the partition can be used now: name another, or ask the administrators "
         "(`sinfo -R` says why)."),
        ("PartitionNodeLimit", "The partition has fewer nodes, or allows fewer: lower `nodes`, or name another."),
        ("PartitionTimeLimit", "The partition allows less time: shorten `time`, or name another."),
        ("Partition", "The partition takes no jobs now: name another."),
        ("ReqNodeNotAvail", "The nodes are down or reserved: look at `sinfo -R` and `scontrol show reservation`, or "
         "change `constraint`, `exclude` or the partition."),
        ("BadConstraints", "No node has what the stage asks for: change `constraint`, `gres` or `memory_gb`."),
        ("InvalidAccount", "Correct `account`."),
        ("QOS", "A limit of the qos is reached: wait for your other jobs, or name another `qos`."),
        ("Assoc", "A limit of the account is reached: wait for your other jobs, or name another `account`."),
        ("held", "Slurm holds the job: `scontrol show job` and the administrators know why."),
    ):  # fmt: skip
        if words.lower() in reason.lower():
            return remedy
    return "The cluster is busy: ask again later, or wait longer: --wait 3600."


def will_never_start(reason: str) -> bool:
    """Tell whether a job that waits for this reason waits for what does not come by itself."""
    return any(word in reason.lower() for word in HOPELESS)
