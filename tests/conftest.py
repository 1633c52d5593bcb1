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


def pytest_addoption(parser):
    parser.addoption(
        "--run-slow",
        action="store_true",
        help="also what takes minutes: every timm model of the families",
    )


def run_stage(stage, *args, cwd=ROOT, check=True):
    """Runs a stage as a person does. With check=False the caller looks at .returncode, .stdout and
    .stderr."""
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, stage), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not check or done.returncode == 0, (
        f"{stage} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
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


def load(path):
    """(network, checkpoint) of any stage's file."""
    import blocks

    checkpoint = blocks.read_checkpoint(path)
    return blocks.build(checkpoint), checkpoint


FAMILIES = {
    "test_resnet": ["--prune", "2"],
    "mobilenetv2_035": ["--macs", "0.9"],
    "test_convnext": ["--params", "0.8"],
    "test_vit": [],
}


STAGES = (
    ("1_supernet.py", ["--img-size", 32, "--baseline-epochs", 2, "--epochs", 1]),
    ("2_search.py", ["--population", 4, "--generations", 2]),
    ("3_progressive.py", ["--epochs", 2]),
    ("4_merge.py", ["--batch-size", 2]),
)


@pytest.fixture(scope="session", params=FAMILIES)
def runs(request, pictures, tmp_path_factory):
    """A folder with what all four stages write for one network of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    printed = {}
    for script, flags in STAGES:
        flags = [
            *flags,
            "--workers",
            0,
            *(
                {
                    "1": ["--model", request.param, "--data-dir", pictures],
                    "2": FAMILIES[request.param],
                }.get(script[0], [])
            ),
        ]
        if (
            request.param != "test_resnet"
        ):  # in this process, which saves the time that imports take
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert stage(patch, script, *flags) is None
            continue
        done = run_stage(script, *flags, cwd=folder)
        printed[script[0]] = done.stdout.splitlines()
        assert "\r" not in done.stdout + done.stderr  # into a file nothing is drawn over
    if printed:  # one line per epoch
        assert (
            sum(
                line.startswith(("baseline 1/2", "baseline 2/2", "supernet 1/1"))
                for line in printed["1"]
            )
            == 3
        )
        epochs = [line for line in printed["3"] if line.startswith("subnet ") and "top-1" in line]
        assert len(epochs) == 2
        assert [line.split("  ")[0].strip() for line in printed["4"][-5:-2]] == [
            "baseline",
            "baseline, BN folded",
            "merged",
        ]
    return folder / "runs"


one_network = pytest.mark.parametrize(
    "runs", ["test_resnet"], indirect=True
)  # where one network is enough
