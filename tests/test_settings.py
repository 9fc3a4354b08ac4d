from __future__ import annotations

from pathlib import Path

import pytest

from cellhpc.errors import UsageError
from cellhpc.settings import Job, load_job

MINIMAL = """
[study]
name = "s"
folder = "study"
[screen]
layout = "bbbc021"
path = "raw"
"""


def job_file(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_a_minimal_job_has_the_papers_defaults_and_absolute_paths(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path))
    assert job.study.folder == Path.cwd() / "study"
    assert job.convert.preprocessing == "kensert2019"
    assert job.sweep.networks == ("ResNet50",)
    with pytest.raises(Exception, match="frozen"):
        job.study.name = "other"


def test_every_job_file_that_we_ship_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLHPC_DATA", "data")
    monkeypatch.setenv("BBBC021", "data")
    files = sorted((Path(__file__).parents[1] / "jobs").glob("*.toml"))
    assert len(files) >= 4
    assert all(load_job(path).study.name for path in files)


def test_overrides_replace_settings(tmp_path: Path) -> None:
    overrides = ["train.epochs=3", 'sweep.networks=["VGG16"]', "study.name=bare-word", "screen.taxol=all"]
    job = load_job(job_file(tmp_path), overrides)
    assert (job.train.epochs, job.sweep.networks, job.study.name) == (3, ("VGG16",), "bare-word")
    assert job.screen.model_dump()["taxol"] == "all"


def test_variables_of_the_environment_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATES", "/data/plates")
    text = MINIMAL.replace('"raw"', '"${PLATES}/week1"') + '[sweep]\nweights = ["xavier", "${PLATES}/w.h5"]\n'
    job = load_job(job_file(tmp_path, text))
    assert job.screen.path == Path("/data/plates/week1")
    assert job.sweep.weights == ("xavier", "/data/plates/w.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[study]", "[study]\nfoldr = 1"), r"job.toml: study.foldr: unknown key. Valid here: name, folder."),
        (
            ("[screen]", "[trian]\nepochs = 1\n[screen]"),
            r"job.toml: trian: unknown section. Valid here: study, screen, ",
        ),
        (("bbbc021", "bbbc22"), r"layout is 'bbbc22'. Allowed: 'bbbc021', 'bbbc014', 'manifest'."),
        (('layout = "bbbc021"', ""), r"layout is 'nothing'. Allowed: 'bbbc021'"),
        (
            ('path = "raw"', 'path = "raw"\ntaxol = "some"'),
            r"screen.taxol: found 'some'. Input should be 'kensert2019' or",
        ),
        (
            ('path = "raw"', 'path = "raw"\ntxol = "all"'),
            r"screen.txol: unknown key. Valid here: path, tables, .*taxol",
        ),
        (('path = "raw"', ""), r"screen.path: missing. Folder of the pictures."),
        (('"raw"', '"${ABSENT_HERE}/raw"'), r"environment variable ABSENT_HERE is not set; type: export ABSENT_HERE="),
        (
            ("[screen]", "[train]\nepochs = 0\n[screen]"),
            r"train.epochs: found 0. Input should be greater than or equal to 1",
        ),
        (
            ("[screen]", "[train]\nbatch_size = 9\n[sweep]\nranks = 2\n[screen]"),
            r"train.batch_size 9 can't be shared equally by sweep.ranks 2; choose a multiple",
        ),
        (
            ("[screen]", '[folds]\nunknown = true\nalso = "batch"\n[screen]'),
            r"folds: unknown and also exclude each other: without the batches of all that a fold then holds out",
        ),
        (
            ("[screen]", "[folds]\nunknown = true\n[search]\nepochs = [1, 2]\n[screen]"),
            r"search and folds.unknown exclude each other: .*choose without folds.unknown",
        ),
        (("[screen]", "[sweep]\nseeds = [1, 1]\n[screen]"), r"sweep: seeds names a value twice"),
        (("[screen]", "[screen"), r"job.toml: not a TOML file"),
    ],
)
def test_a_wrong_job_file_is_one_clear_sentence(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as fault:
        load_job(job_file(tmp_path, MINIMAL.replace(*change)))
    assert "pydantic" not in str(fault.value)


def test_every_fault_of_a_job_file_is_told_at_once(tmp_path: Path) -> None:
    text = MINIMAL + "[train]\nepochs = 0\nlearning_rate = -1\n"
    with pytest.raises(UsageError) as fault:
        load_job(job_file(tmp_path, text))
    assert len(str(fault.value).splitlines()) == 2


@pytest.mark.parametrize("override", ["train.epochs", "epochs=3", "=3"])
def test_an_override_needs_a_section_a_key_and_a_value(tmp_path: Path, override: str) -> None:
    with pytest.raises(UsageError, match=r"--set .*expected .*for instance --set train.epochs=5"):
        load_job(job_file(tmp_path), [override])


def test_a_job_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent.toml: no such job file. Examples lie in jobs/"):
        load_job(tmp_path / "absent.toml")


def test_every_setting_is_documented() -> None:
    undocumented = []

    def visit(model: type) -> None:
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            sections = [kind for kind in kinds if hasattr(kind, "model_fields")]
            for section in sections:
                visit(section)
            if not sections and not field.description and name != "layout":
                undocumented.append(f"{model.__name__}.{name}")

    visit(Job)
    assert undocumented == []
