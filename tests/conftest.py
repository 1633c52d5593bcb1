"""What the tests share: how they run a stage, and what all four stages write for small networks."""

import csv
import fcntl
import importlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is imported later, and for its children


def pytest_addoption(parser):
    text = "also what takes minutes: timm's models of the families, or those of these names"
    parser.addoption("--run-slow", nargs="?", const="*", metavar="resnet*", help=text)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes share the tests where pytest-xdist is there, unless -n or --pdb is given."""
    wanted = getattr(config.option, "numprocesses", 0)  # None: not given
    if wanted is None and not config.option.usepdb and not hasattr(config, "workerinput"):
        config.option.numprocesses = 2
        config.option.dist = "worksteal"  # the tests are of very different lengths


@pytest.fixture(scope="session", autouse=True)
def quick():
    """One thread, and latencies that are measured in one round instead of nine."""
    import blocks
    import torch

    torch.set_num_threads(1)
    latencies = blocks.latencies
    blocks.latencies = lambda models, images, rounds=1: latencies(models, images, rounds)


# ---- running a stage -----------------------------------------------------------------------------


def stage(line, *more):
    """Runs a stage in this process, which saves the seconds that imports take. `line` is what a
    person types after `python`, `more` are further arguments; images are loaded in this process,
    too, unless --workers is among them. Returns what the stage exits with, None where it ends by
    itself."""
    arguments = [*shlex.split(line), *map(str, more)]
    if "--workers" not in arguments:
        arguments += ["--workers", "0"]
    before, sys.argv = sys.argv, arguments
    try:
        runpy.run_path(os.path.join(ROOT, sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


def stage_on_full_disk(line, full, monkeypatch):
    """As `stage`, with a disk that has no room for a path of which full(path) is true."""
    import blocks

    save = blocks.save

    def fails(content, path):
        if full(path):
            raise OSError("disk full")
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "save", fails)
        return stage(line)


def shell(line, cwd, **environment):
    """Runs `python LINE` in a process of its own; has .returncode, .stdout and .stderr."""
    environment = {**os.environ, "PYTHONPATH": ROOT, **environment}
    command = [sys.executable, *shlex.split(line)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


def load(path):
    """(network, checkpoint) of any stage's file."""
    import blocks

    checkpoint = blocks.read_checkpoint(path)
    return blocks.build(checkpoint), checkpoint


def write_spec(path, prune, model="test_resnet"):
    """A subnet spec as a person writes it."""
    path.write_text(json.dumps({"format": 1, "model": model, "prune": prune}))
    return path


def rows(path):
    """The rows of a CSV, without what differs from run to run."""
    with open(path, encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row in table:
        row.pop("images_per_s", None)
    return table


# ---- what is made once, for all processes of pytest-xdist ----------------------------------------


def made_once(tmp_path_factory, name, make):
    """The folder `name`, which make(folder) fills in the process that is first to want it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(f"{folder}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait here
        lock.seek(0)
        if not lock.read():
            make(folder)
            lock.write("made")
    return folder


@pytest.fixture(scope="session")
def supernet_script():
    return importlib.import_module("1_supernet")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, supernet_script):
    """A small folder of the pictures that stage 1 draws."""

    def draw(folder):
        supernet_script.draw_shapes(f"{folder}/shapes", train=200, val=60)

    return made_once(tmp_path_factory, "data", draw) / "shapes"


BUDGETS = {  # of one network of each family
    "test_resnet": "--prune 2",
    "mobilenetv2_035": "--macs 0.9",
    "test_convnext": "--params 0.8",
    "test_vit": "",
}


@pytest.fixture(scope="session", params=BUDGETS)
def runs(request, pictures, tmp_path_factory):
    """A folder with what all four stages write for one network of each family."""

    def run_all(folder):
        first = f"--model {request.param} --data-dir {pictures} --img-size 32 --baseline-epochs 2"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert stage(f"1_supernet.py {first} --epochs 1") is None
            few = f"--population 4 --generations 2 --calibrate 32 {BUDGETS[request.param]}"
            assert stage(f"2_search.py {few}") is None
            assert stage("3_progressive.py --epochs 2") is None
            assert stage("4_merge.py --batch-size 2") is None

    return made_once(tmp_path_factory, request.param, run_all) / "runs"


@pytest.fixture
def own_runs(runs, tmp_path, monkeypatch):
    """A copy of `runs` that a test may change, in the folder runs of the current one, where the
    stages look for their inputs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs, "runs")
    return tmp_path / "runs"


# Where one network is enough
one_network = pytest.mark.parametrize("runs", ["test_resnet"], indirect=True)
