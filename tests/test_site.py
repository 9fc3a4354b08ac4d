from __future__ import annotations

from pathlib import Path

import pytest

from cellhpc.errors import UsageError
from cellhpc.site import load_site, parse_site

EXAMPLES = sorted((Path(__file__).parents[1] / "slurm").glob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_site_file(example: Path) -> None:
    assert load_site(example).train.throttle >= 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_line_that_an_example_leaves_out_would_be_allowed(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "someone")
    lines = example.read_text().splitlines()
    optional = [
        line[2:] if line.startswith("# ") and (" = " in line or line.startswith("# [")) else line for line in lines
    ]
    path = tmp_path / "site.toml"
    path.write_text("\n".join(line for line in optional if "cellhpc doctor" not in line))
    load_site(path)


def test_there_are_examples_for_a_cpu_cluster_a_gpu_cluster_and_the_local_one() -> None:
    assert [path.name for path in EXAMPLES] == ["cpu.toml", "gpu.toml", "local.toml"]


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("00:30:00", 30), ("01:00:30", 61), ("1-00:00:00", 1440), ("2-12", 3600), ("90:00", 90), (45, 45),
        ("0-00:05", 5),
    ],
)  # fmt: skip
def test_time_limits_are_written_as_slurm_writes_them(limit: object, minutes: int) -> None:
    assert parse_site({"train": {"time": limit}}, "site.toml").train.time == minutes


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"slurm": {"acount": "x"}},
            "site.toml: slurm.acount: unknown key. Valid here: account, partition, qos, constraint, reservation, "
            "exclude, options, mail_user, mail_type, modules, setup, python, share.",
        ),
        (
            {"trian": {}},
            "site.toml: trian: unknown section. Valid here: slurm, convert, train, aggregate, container, scratch, "
            "measured.",
        ),
        ({"train": {"time": "soon"}}, "site.toml: train.time: found 'soon'. a time limit is written"),
        ({"train": {"time": 1, "signal_seconds": 60}}, "train.signal_seconds is 60, not shorter than the limit"),
        ({"train": {"nodes": 0}}, "site.toml: train.nodes: found 0. Input should be greater than or equal to 1."),
        ({"measured": {"images_per_s": {"ResNet50": 0}}}, "site.toml: measured.images_per_s.ResNet50: found 0. Input"),
        ({"measured": {"images_per_s": "fast"}}, "site.toml: measured.images_per_s: found 'fast'. Input should be"),
        ({"container": {}}, "site.toml: container.image: missing. The image (.sif)"),
        ({"slurm": {"account": "${NOT_SET_HERE}"}}, "the environment variable NOT_SET_HERE is not set"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(document: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_site(document, "site.toml")
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_stage_may_differ_from_what_holds_for_all() -> None:
    site = parse_site({"slurm": {"partition": "cpu", "qos": "q"}, "train": {"partition": "gpu"}}, "site.toml")
    assert site.stage("train").partition == "gpu"
    assert site.stage("convert").partition is None  # `[slurm]` says it
    assert site.slurm.partition == "cpu"


def test_a_measured_speed_is_a_number_for_all_networks_or_one_for_each() -> None:
    for given, known in ((40, {"any": 40.0}), ({"ResNet50": 250, "any": 30.5}, {"ResNet50": 250.0, "any": 30.5})):
        site = parse_site({"measured": {"images_per_s": given}}, "site.toml")
        assert site.measured.images_per_s == known
        assert parse_site(site.model_dump(mode="json"), "site.json") == site  # as a submitted study keeps it
