"""Images: what is said when one can't be built, what a small one of the real definitions does, and the built one.

The built image is the one that the environment variable CELLHPC_IMAGE names; compiling Horovod for it takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from cellhpc.ranks import MEETING, RANK, RANKS

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "containers"
VARIANTS = ("cpu", "gpu")
CI = os.environ.get("CI") == "true"
SYSTEM = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
DEBIAN_12 = "ID=debian\n" in SYSTEM and 'VERSION_ID="12"' in SYSTEM


def run(
    *words: object, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
        timeout=540,
        check=False,
    )


def said(*words: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a command that must succeed, and return what it printed."""
    answer = run(*words, cwd=cwd, environment=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture(scope="session")
def apptainer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The machine's Apptainer; in CI it is installed where it is missing."""
    places = [os.environ["PATH"], "/opt/apptainer/usr/bin", str(Path.home() / ".local/apptainer/usr/bin")]
    found = shutil.which("apptainer", path=os.pathsep.join(places))
    if found:
        return found
    if not (CI and DEBIAN_12 and os.getuid() == 0):
        pytest.skip("there is no apptainer here: containers/install_apptainer.sh")
    prefix = tmp_path_factory.mktemp("apptainer")
    said(CONTAINERS / "install_apptainer.sh", prefix)
    return str(prefix / "usr/bin/apptainer")


@pytest.mark.parametrize(
    ("words", "base", "message"),
    [
        (("xpu",), "debootstrap", "there is no image 'xpu'. Allowed: cpu, gpu. Example: containers/build.sh cpu"),
        (("cpu", "/nowhere/x.sif"), "debootstrap", "the folder /nowhere does not exist. Make it, or name another"),
        (("cpu", "/etc"), "debootstrap", "/etc is a folder. Name a file: containers/build.sh cpu /etc/cellhpc-cpu.sif"),
        (("cpu",), "debian", "BASE=debian names no source. Example: BASE=docker://debian:12"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_code_2(words: tuple[str, ...], base: str, message: str) -> None:
    refused = run(CONTAINERS / "build.sh", *words, environment={"BASE": base})
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"containers/build.sh: {message}")
    assert refused.stderr.count("\n") == 1


def test_a_full_disk_is_told_before_the_build(apptainer: str) -> None:
    path = f"{Path(apptainer).parent}{os.pathsep}{os.environ['PATH']}"  # it may have been installed for the tests
    refused = run(CONTAINERS / "build.sh", "cpu", environment={"APPTAINER_TMPDIR": "/proc", "PATH": path})
    assert refused.returncode == 1
    assert "/proc has 0 GB free, and the build needs 8. Name another: APPTAINER_TMPDIR=FOLDER" in refused.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may lose capabilities")
def test_lost_capabilities_are_those_that_were_taken() -> None:
    script = CONTAINERS / "capabilities.sh"
    before = said(script, "lost").strip().split(",")
    setpriv = ("setpriv", "--bounding-set=-net_raw,-sys_nice", "--inh-caps=-all")
    lost = said(*setpriv, script, "lost").strip().split(",")
    held = said(*setpriv, script, "held").strip().split(",")
    assert {"CAP_NET_RAW", "CAP_SYS_NICE"} <= set(lost) <= {*before, "CAP_NET_RAW", "CAP_SYS_NICE"}
    assert not set(held) & set(lost)


@pytest.mark.skipif(not DEBIAN_12, reason="other distributions have a package of Apptainer, or none is known")
def test_the_installer_leaves_a_folder_of_something_else_alone(tmp_path: Path) -> None:
    if shutil.which("apptainer"):
        pytest.skip("Apptainer is on the PATH, so the installer has nothing to do")
    (tmp_path / "thesis.tex").touch()
    refused = run(CONTAINERS / "install_apptainer.sh", tmp_path)
    assert refused.returncode == 2
    assert f"{tmp_path} holds something else than Apptainer" in refused.stderr
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.skipif(not (CI and DEBIAN_12 and os.getuid() == 0), reason="fetches 20 MB from Debian: in CI, as root")
def test_the_installer_works_and_twice_does_no_harm(tmp_path: Path, small_image: dict[str, Path]) -> None:
    if shutil.which("apptainer"):
        pytest.skip("Apptainer is on the PATH, so the installer has nothing to do")
    said(CONTAINERS / "install_apptainer.sh", tmp_path / "here")
    installed = tmp_path / "here/usr/bin/apptainer"
    before = installed.stat()
    again = said(CONTAINERS / "install_apptainer.sh", tmp_path / "here")
    assert again.startswith("apptainer version ")
    assert installed.stat() == before
    assert said(installed, "run", small_image["cpu"], "hello") == "cellhpc was told: hello\n"


@pytest.fixture(scope="session")
def small_image(apptainer: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each real definition without what takes minutes (%post, %test), on a base that holds this machine's shell."""
    folder = tmp_path_factory.mktemp("small")
    base = folder / "base"
    libraries = re.findall(r"(/\S+) \(0x", said("ldd", "/bin/sh"))
    for file in ("/bin/sh", *libraries):
        (base / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, base / file[1:])
    for name in ("build", "dev", "etc", "opt/cellhpc/bin", "proc", "root", "sys", "tmp", "var/tmp"):
        (base / name).mkdir(parents=True, exist_ok=True)
    command = base / "opt/cellhpc/bin/cellhpc"
    command.write_text('#!/bin/sh\necho "cellhpc was told: $*"\n')
    command.chmod(0o755)
    lost = said(CONTAINERS / "capabilities.sh", "lost").strip()
    images = {}
    for variant in VARIANTS:
        text = (CONTAINERS / f"{variant}.def").read_text()
        for section in ("%post", "%test"):
            text = re.sub(rf"^{section}\n.*?(?=^%[a-z]+$)", "", text, flags=re.DOTALL | re.MULTILINE)
        definition = folder / f"{variant}.def"
        definition.write_text(text)
        values = {"BOOTSTRAP": "localimage", "FROM": base, "MIRROR": "none", "BUILD": definition}
        values |= {"VERSION": "7.8.9", "COMMIT": "0123abc-dirty"}
        arguments = [word for key, value in values.items() for word in ("--build-arg", f"{key}={value}")]
        images[variant] = folder / f"{variant}.sif"
        built = run(
            apptainer, "build", *arguments, images[variant], definition, environment={"APPTAINER_DROP_CAPS": lost}
        )
        if built.returncode and os.getuid() != 0:
            pytest.skip(f"this user may not build images here: {built.stderr.strip().splitlines()[-1]}")
        assert built.returncode == 0, built.stderr
    return images


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_shows_its_own_packages_and_commit(apptainer: str, small_image: dict[str, Path], variant: str) -> None:
    outside = {"PYTHONPATH": "/modules/numpy", "PYTHONHOME": "/modules/python", "VIRTUAL_ENV": "/home/me/venv"}
    inside = said(apptainer, "exec", small_image[variant], "/bin/sh", "-c", "export -p", environment=outside)
    assert "export CELLHPC_COMMIT='0123abc-dirty'" in inside
    assert "export PATH='/opt/cellhpc/bin:" in inside
    assert "export PYTHONNOUSERSITE='1'" in inside
    assert "export PYTHONSAFEPATH='1'" in inside
    assert [value for value in outside.values() if value in inside] == []  # unset or empty, Python does not mind which


@pytest.mark.parametrize("variant", VARIANTS)
def test_running_an_image_is_running_cellhpc(apptainer: str, small_image: dict[str, Path], variant: str) -> None:
    assert said(apptainer, "run", small_image[variant], "run", "a job.toml") == "cellhpc was told: run a job.toml\n"
    labels = json.loads(said(apptainer, "inspect", "--json", small_image[variant]))["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.title"] == f"cellhpc-{variant}"
    assert labels["org.opencontainers.image.version"] == "7.8.9"
    assert labels["org.opencontainers.image.revision"] == "0123abc-dirty"


@pytest.fixture(scope="session")
def image(apptainer: str) -> Path:
    """The image that CELLHPC_IMAGE names, built from this checkout."""
    path = os.environ.get("CELLHPC_IMAGE")
    if not path:
        pytest.skip("the environment variable CELLHPC_IMAGE names no image; build one: containers/build.sh cpu")
    return Path(path).absolute()


def test_the_image_passes_its_own_test(apptainer: str, image: Path) -> None:
    said(apptainer, "test", image)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert said(apptainer, "run", image, "--version") == f"cellhpc, version {version}\n"
    labels = json.loads(said(apptainer, "inspect", "--json", image))["data"]["attributes"]["labels"]
    assert labels["org.opencontainers.image.version"] == version
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["org.opencontainers.image.revision"])


def test_the_image_holds_what_is_locked(apptainer: str, image: Path) -> None:
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    versions = json.loads(said(apptainer, "exec", image, "/opt/cellhpc/bin/python", "-c", ask))
    inside = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in versions.items()}
    locked = {p["name"]: p["version"] for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    assert {name: version for name, version in inside.items() if locked.get(name) != version} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[;]", line)[0] for line in project["dependencies"]}
    assert {*required, "horovod", "keras"} <= set(inside)


def test_nothing_outside_replaces_the_image_s_code(apptainer: str, image: Path, tmp_path: Path) -> None:
    user = tmp_path / ".local/lib/python3.11/site-packages"
    for place in (tmp_path, user):
        (place / "cellhpc").mkdir(parents=True)
        (place / "cellhpc/__init__.py").write_text("raise RuntimeError('the wrong cellhpc')\n")
    ask = "import cellhpc; print(cellhpc.__file__)"
    python = ("exec", "--home", tmp_path, image, "/opt/cellhpc/bin/python")
    found = said(apptainer, *python, "-c", ask, cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)})
    assert found == "/opt/cellhpc/lib/python3.11/site-packages/cellhpc/__init__.py\n"


def test_the_image_keeps_nothing_of_the_machine_that_built_it(apptainer: str, image: Path) -> None:
    left = "ls -d /build /mnt/* /etc/apt/sources.list /root/.cache /usr/bin/g++ 2> /dev/null || true"
    assert said(apptainer, "exec", "--no-home", "--no-mount", "home,cwd,tmp", image, "sh", "-c", left) == ""


def test_two_ranks_inside_the_image_meet_and_agree(apptainer: str, image: Path, tmp_path: Path) -> None:
    """Each rank is a container of its own, as srun starts them; they share the host's network and a folder."""
    command = (apptainer, "exec", "--bind", f"{ROOT},{tmp_path}", image, "/opt/cellhpc/bin/python")
    ranks = [
        subprocess.Popen(
            [str(word) for word in (*command, ROOT / "tests/rank_program.py")],
            env={**os.environ, RANK: str(rank), RANKS: "2", MEETING: str(tmp_path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        answers = [json.loads(rank.communicate(timeout=300)[0].partition("SAW ")[2]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [answer["rank"] for answer in answers] == [0, 1]
    for answer in answers:
        assert answer["size"] == 2
        assert answer["broadcast"] == [1.0]
        assert answer["mean"][0] == [0.5]
        assert answer["equal"]


def test_a_submitit_job_of_this_python_runs_in_the_image(apptainer: str, image: Path, tmp_path: Path) -> None:
    """What Slurm starts: submitit's own entry, with a function that was written outside and a result read outside."""
    from submitit.core.utils import DelayedSubmission, JobPaths, pickle_load

    paths = JobPaths(tmp_path, "41")
    DelayedSubmission(divmod, 47, 5).dump(paths.submitted_pickle)
    said(
        apptainer,
        *("exec", "--bind", tmp_path, image, "/opt/cellhpc/bin/python", "-m", "submitit.core._submit", tmp_path),
        environment={
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": "41",
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_GLOBALID": "0",
            "SUBMITIT_LOCAL_LOCALID": "0",
            "SUBMITIT_LOCAL_NNODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_TIMEOUT_MIN": "1",
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
        },
    )
    assert pickle_load(paths.result_pickle) == ("success", divmod(47, 5))


def test_the_scripts_are_readable_by_the_shell_and_name_no_host_of_a_mirror() -> None:
    for script in CONTAINERS.glob("*.sh"):
        said("bash", "-n", script)
        assert os.access(script, os.X_OK)
    for file in CONTAINERS.iterdir():
        if file.suffix in (".sh", ".def"):
            hosts = re.findall(r"https?://([^/\s\"']+)", file.read_text())
            assert set(hosts) <= {"apptainer.org"}, file
