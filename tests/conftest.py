import importlib
import os
import runpy
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(2)


def run_stage(stage, *args, cwd=ROOT, check=True):
    """Runs a stage as a person does. With check=False the caller looks at .returncode, .stdout and .stderr."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, stage), *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, timeout=240)
    assert not check or done.returncode == 0, f"{stage} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def stage(monkeypatch, script, *args):
    """Runs a stage in this process; returns what it exits with, None where it ends by itself."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    try:
        runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="session")
def supernet_script():
    return importlib.import_module("1_supernet")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, supernet_script):
    """A small folder of the pictures that stage 1 draws."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    supernet_script.draw_shapes(str(root), train=200, val=60)
    return root


FAMILIES = {"test_resnet": ["--prune", "2"], "mobilenetv2_035": ["--macs", "0.9"], "test_convnext": ["--params", "0.8"],
            "test_vit": []}


@pytest.fixture(scope="session", params=FAMILIES)
def runs(request, pictures, tmp_path_factory):
    """A folder with what all four stages write for one network of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    first = run_stage("1_supernet.py", "--model", request.param, "--data-dir", pictures, "--img-size", 32, "--workers", 0,
                      "--baseline-epochs", 2, "--epochs", 1, "--random-subnets", 1, cwd=folder)
    run_stage("2_search.py", "--population", 4, "--generations", 2, "--workers", 0, *FAMILIES[request.param], cwd=folder)
    third = run_stage("3_progressive.py", "--epochs", 2, "--workers", 0, cwd=folder)
    fourth = run_stage("4_merge.py", "--batch-size", 2, "--workers", 0, cwd=folder)
    # into a file: one line per epoch, nothing drawn over
    assert sum(line.startswith(("baseline 1/2", "baseline 2/2", "supernet 1/1")) for line in first.stdout.splitlines()) == 3
    assert sum(line.startswith("progressive ") for line in third.stdout.splitlines()) == 2
    assert "\r" not in first.stdout + first.stderr + third.stdout + third.stderr
    assert [line.split("  ")[0].strip() for line in fourth.stdout.splitlines()[-5:-2]] == [
        "baseline", "baseline, BN folded", "merged"]
    return folder / "runs"


one_network = pytest.mark.parametrize("runs", ["test_resnet"], indirect=True)  # where one network is enough
