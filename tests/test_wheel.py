"""The wheel holds what a user needs and nothing else, and runs where the repository is out of sight."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
POOLS = ROOT / "adamerge" / "demo" / "pools"
SDIST = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"


def python(*arguments, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        **{"cwd": cwd, "capture_output": True, "text": True},
        env={**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **environment},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def wheel_of(source, folder):
    python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Built from a copy of the repository, as a build leaves things behind; and by way of a source distribution."""
    home = tmp_path_factory.mktemp("wheels")
    for name in ("copy", "direct", "sdist"):
        (home / name).mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, home / "copy")
    for name in ("adamerge", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, home / "copy" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    name = python("-c", SDIST, home / "sdist", cwd=home / "copy").split()[-1]
    return {
        "direct": wheel_of(home / "copy", home / "direct"),
        "sdist": wheel_of(home / "sdist" / name, home / "sdist"),
    }


@pytest.mark.parametrize("way", ["direct", "sdist"])
def test_the_wheel_holds_package_configurations_and_licence(wheels, way):
    names = {name for name in ZipFile(wheels[way]).namelist() if not name.endswith("/")}
    beside = {name for name in names if ".dist-info/" in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adamerge").rglob("*.py")}
    configs = {f"adamerge/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.*")}
    pools = {path.relative_to(ROOT).as_posix() for path in POOLS.rglob("*") if path.is_file()}
    assert names - beside == modules | configs | pools | {"adamerge/native.c", "adamerge/demo/words.yaml"}
    assert {"LICENSE", "NOTICE"} <= {name.rpartition("licenses/")[2] for name in beside}
    assert any(name.endswith("entry_points.txt") for name in beside)


def test_the_wheel_runs_from_an_empty_directory_on_two_processes(wheels, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheels["direct"], cwd=tmp_path)
    seen = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    where = python("-c", "import adamerge; print(adamerge.__file__)", cwd=empty, **seen)
    assert Path(where.strip()) == site / "adamerge" / "__init__.py"
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    short = ["--trainer.max_steps=2", "--run.baselines=false"]
    out = python("-m", "adamerge.fit", "--config", "configs/digits.yaml", *short, *two, cwd=empty, **seen)
    assert out.count(f"configs/digits.yaml is not here; taking the one that comes with adamerge, {site}") == 1
    assert "on 2 ranks" in out
    assert "Run directory: runs/digits/" in out
    assert [path.name for path in empty.iterdir()] == ["runs"]
