import importlib
import os
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


@pytest.fixture(scope="session")
def supernet_script():
    return importlib.import_module("1_supernet")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory, supernet_script):
    """A small folder of the pictures that stage 1 draws."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    supernet_script.draw_shapes(str(root), train=200, val=60)
    return root
