from __future__ import annotations

from pathlib import Path

from cellhpc.memory import _of_groups, _of_slurm, allowed, held_bytes, memory_here, too_large, window_that_fits


def test_the_smallest_limit_of_all_groups_around_counts(tmp_path: Path) -> None:
    listed = tmp_path / "cgroup"
    listed.write_text("9:cpu,cpuacct:/x\n4:memory:/job/step\n0::/slice/job\n")
    for path, content in {
        "memory/job/step/memory.limit_in_bytes": "9223372036854771712",
        "memory/job/memory.limit_in_bytes": "4000",
        "memory/memory.limit_in_bytes": "9000",
        "slice/job/memory.max": "max",
        "slice/memory.max": "7000",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{content}\n")
    (tmp_path / "memory.max").write_text("1\n")  # of version 2, and around both
    assert sorted(_of_groups(listed, tmp_path)) == [1, 4000, 7000, 9000, 9223372036854771712]
    assert list(_of_groups(tmp_path / "none", tmp_path)) == []


def test_slurm_counts_in_mebibytes_for_a_node_or_a_core() -> None:
    assert _of_slurm({}) == []
    assert _of_slurm({"SLURM_MEM_PER_NODE": "4096"}) == [(4096 * 2**20, "the job")]
    assert _of_slurm({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "8"}) == [(800 * 2**20, "the job")]


def test_a_share_of_it_is_for_tiles_and_jobs_divide_it() -> None:
    size, _ = memory_here()
    assert allowed(None).bytes == 0.6 * size
    assert allowed(None, (10e9, "train.memory_gb"), jobs=2).bytes == 3e9
    assert allowed(None, (10e9, "x"), 2).why == "60% of the 10.0 GB of x, shared by 2 jobs"
    assert allowed(1.5, (10e9, "x")).bytes == 1.5e9


def test_what_does_not_fit_names_a_window_that_does() -> None:
    limit = allowed(None, (10e9, "x"))
    assert held_bytes(1000, 100, None) == held_bytes(1000, 100, 0) == 100_000
    assert held_bytes(1000, 100, 30) == held_bytes(30, 100, 4000) * 2 // 2 == 6000
    assert not too_large(6_000_000_000, 150_528, limit, None)
    said = too_large(6_000_000_001, 1_000_000, limit, None)
    assert said.startswith("The tiles take 6.00 GB on a host, and 6.00 GB are for them (60% of the 10.0 GB of x).")
    assert "--set train.window_tiles=2048, in a new study.folder with convert.store of this one; or" in said
    assert "train.window_tiles=2048; or" in too_large(6_000_000_001, 1_000_000, limit, 0, bound=False)
    assert window_that_fits(1_000_000, limit) == 2048  # 3,000 would fit
    assert window_that_fits(1, limit) == 8192
    assert window_that_fits(10**12, limit) == 1
    assert "take 4.00 GB in each of 2 ranks on a host" in too_large(4_000_000_000, 150_528, limit, None, copies=2)
