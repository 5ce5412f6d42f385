"""The wheel has all that it needs: installed where nothing else of this repository is, its commands run."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import hf_prune
from tests.docs import stand_ins
from tests.docs.pages import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.xdist_group("release")]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with wheel and sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """A function that runs a command of an environment with the wheel, and of this one only with what it depends on."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=60)
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    wheel = next(built.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, timeout=120)
    # Files that name folders are not read in a folder that such a file names: no editable installation comes along.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_PRUNE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> str:
        command = [str(folder / "venv" / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    return run


def test_the_package_comes_from_the_wheel(run):
    where = run("python", "-c", "import hf_prune; print(hf_prune.__file__)")
    assert "clean" in where
    assert run("hf-prune", "--version").strip() == hf_prune.__version__
    assert "alps" in run("hf-prune", "list")


def test_everything_in_the_package_is_in_the_wheel(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = next(wheel.read(name).decode() for name in names if name.endswith("METADATA"))
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hf_prune").rglob("*") if p.is_file()}
    assert {name for name in package if "__pycache__" not in name} - names == set()
    assert "hf_prune/space/app.py" in names
    assert f"Version: {hf_prune.__version__}" in metadata


def test_the_source_has_what_the_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("Makefile", "constraints.txt", "mkdocs.yml", "docs/index.md", "examples/small_models.py", ".ci/run"):
        assert name in names
    assert "tests/docs/test_release.py" in names


def test_the_demo_runs_from_the_wheel(run, tmp_path):
    """All of it but the training, in the place of which a small model is put where the demo looks for its own."""
    stand_ins.small_distilbert().save_pretrained(tmp_path)
    stand_ins.tokenizer().save_pretrained(tmp_path)
    copy = f"lambda sources, train, folder, *_: shutil.copytree({str(tmp_path)!r}, folder, dirs_exist_ok=True)"
    prepare = f"import shutil; from hf_prune.cli.demo import assets; assets.train_model = {copy}; assets.prepare_demo()"
    run("python", "-c", prepare)
    text = run("hf-prune", "demo", "--out", "demo")
    assert "all files match their checksums" in text
    assert "best method, 80 %, packed" in text
    assert "Now on your model" in text


def test_declared_dependencies_are_those_that_are_here():
    """Versions of this environment lie within the declared ranges."""
    for text in importlib.metadata.requires("hf_prune") or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            assert requirement.name == "hf_prune" or requirement.specifier.contains(
                importlib.metadata.version(requirement.name)
            ), text


def test_files_of_the_public_host_are_valid():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
