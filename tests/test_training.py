"""Runs that are killed, shared out, averaged, or that go wrong."""

import argparse
import csv
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, load, one_network, run_stage, stage

import blocks
from blocks import make_loader, make_prunable, set_subnet

# Runs a stage that kills itself: in the middle of its first checkpoint ("writing"), or some
# milliseconds after so many steps or subnets.
KILLED = """
import os, random, runpy, signal, sys, threading
import torch, blocks
when, sys.argv = sys.argv[1], sys.argv[2:]
def die(): os.kill(os.getpid(), signal.SIGKILL)
if when == "writing":
    save = torch.save
    def half(content, path):
        save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        die()
    torch.save = half
else:
    calls = 0
    def counted(function):
        def wrapper(*args):
            global calls
            calls += 1
            if calls == int(when):
                threading.Timer(random.uniform(0, 0.03), die).start()
            return function(*args)
        return wrapper
    blocks.recalibrate = counted(blocks.recalibrate)
    blocks.average = counted(blocks.average)  # once per step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(moments, script, *args, cwd):
    """Starts a stage with --resume again and again, killed at each of `moments` in turn, and at
    last not at all."""
    for moment in moments:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                KILLED,
                str(moment),
                os.path.join(ROOT, script),
                *map(str, args),
                "--resume",
            ],
            cwd=cwd,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )
        assert done.returncode == -9, done.stdout + done.stderr
    assert "going on after" in run_stage(script, *args, "--resume", cwd=cwd).stdout


def rows(path, without=("images_per_s",)):
    with open(path, encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if key not in without}
            for row in csv.DictReader(file)
        ]


def assert_same_bits(a, b):
    for key in a.keys() - {"data", "flags"}:
        if key.endswith("state_dict"):
            assert a[key].keys() == b[key].keys() and all(
                torch.equal(a[key][name], b[key][name]) for name in a[key]
            )
        else:
            assert a[key] == b[key]


FIRST = [
    "--model",
    "test_convnext",
    "--img-size",
    32,
    "--baseline-epochs",
    2,
    "--epochs",
    2,
    "--batch-size",
    16,
    "--workers",
    1,
    "--ema",
    0.9,
    "--mixup",
    0.2,
    "--aa",
    "rand-m5-n1",
    "--reprob",
    0.2,
]


def test_first_stage_resumes_to_the_same_bits(pictures, tmp_path):
    flags = [*FIRST, "--data-dir", pictures]
    run_stage("1_supernet.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    killed(["writing", 16], "1_supernet.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    a, b = (blocks.read_checkpoint(tmp_path / x / "net.pt") for x in "ab")
    assert_same_bits(a, b)
    assert (
        rows(tmp_path / "a/net.csv") == rows(tmp_path / "b/net.csv")
        and len(rows(tmp_path / "a/net.csv")) == 4
    )
    assert sorted(os.listdir(tmp_path / "b")) == ["net.csv", "net.pt"]


@one_network
def test_third_stage_resumes_to_the_same_bits(runs, tmp_path):
    flags = [
        "--supernet",
        runs / "supernet.pt",
        "--subnet",
        runs / "subnet.json",
        "--epochs",
        5,
        "--workers",
        1,
        "--amp",
        "--batch-size",
        32,
        "--clip-grad",
        0.5,
        "--warmup",
        0.1,
        "--control",
    ]
    run_stage("3_progressive.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    # in the control's second epoch, in the subnet's first or second, while it writes
    killed([10, 45, "writing"], "3_progressive.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    a, b = (blocks.read_checkpoint(tmp_path / x / "net.pt") for x in "ab")
    assert_same_bits(a, b)
    log = rows(tmp_path / "a/net.csv")
    assert log == rows(tmp_path / "b/net.csv")
    epochs = [row for row in log if row["val_top1"]]
    assert [row["network"] for row in epochs] == ["control"] * 5 + ["subnet"] * 5
    assert [row["epoch"] for row in epochs] == list("1234512345")
    assert [float(row["lam"]) for row in epochs[:5] + epochs[7:]] == [0] * 5 + [1] * 3
    assert a["control"]["top1"] == float(epochs[4]["val_top1"])
    moves = [float(row["lam"]) for row in log if row["network"] == "subnet"]
    assert len([lam for lam in moves if 0 < lam < 1]) > 4 and moves == sorted(moves)
    # the control changes nothing else
    run_stage("3_progressive.py", *flags[:-1], "--no-control", "--out", "c/net.pt", cwd=tmp_path)
    c = blocks.read_checkpoint(tmp_path / "c/net.pt")
    assert_same_bits(c, {**a, "control": None})


@one_network
def test_search_resumes_to_the_same_spec(runs, tmp_path):
    flags = [
        "--supernet",
        runs / "supernet.pt",
        "--prune",
        1,
        2,
        "--population",
        2,
        "--generations",
        2,
        "--workers",
        0,
    ]
    run_stage("2_search.py", *flags, "--out", "a.json", cwd=tmp_path)
    killed(["writing", 6, 3], "2_search.py", *flags, "--out", "b.json", cwd=tmp_path)
    assert (tmp_path / "a.search.csv").read_text() == (tmp_path / "b.search.csv").read_text()
    for name in ("-1.json", "-2.json", ".front/1.json"):
        a, b = (json.loads((tmp_path / f"{x}{name}").read_text()) for x in "ab")
        assert a.pop("flags") != b.pop("flags") and a == b  # --out and --resume


@one_network
def test_resume_wants_the_same_flags(runs, monkeypatch, tmp_path, capsys):
    flags = [
        "3_progressive.py",
        "--supernet",
        runs / "supernet.pt",
        "--subnet",
        runs / "subnet.json",
        "--workers",
        0,
        "--out",
        tmp_path / "net.pt",
        "--epochs",
        2,
    ]
    save = blocks.save

    def fails(checkpoint, path):  # after the first epoch was kept
        if os.path.exists(path):
            raise OSError("disk full")
        save(checkpoint, path)

    monkeypatch.setattr(blocks, "save", fails)
    assert stage(monkeypatch, *flags) == "error: disk full"
    assert sorted(os.listdir(tmp_path)) == ["net.csv", "net.pt.last"]
    said = stage(monkeypatch, *flags, "--resume", "--lr", 1)
    assert said.startswith("error: ") and "other flags: lr 0.001, now 1.0. " in said
    assert stage(monkeypatch, *flags[:-2], "--resume", "--calibrate", 7).startswith("error: ")
    monkeypatch.setattr(blocks, "save", save)
    assert (
        stage(monkeypatch, *flags, "--resume") is None
        and "going on after epoch 1" in capsys.readouterr().out
    )
    assert (
        stage(monkeypatch, *flags, "--resume") is None and "is finished" in capsys.readouterr().out
    )
    assert blocks.read_checkpoint(tmp_path / "net.pt")["flags"]["device"] == "cpu"
    said = stage(monkeypatch, *flags, "--resume", "--epochs", 3)
    assert said.startswith("error: ") and "other flags: epochs 2, now 3. " in said
    assert sorted(os.listdir(tmp_path)) == ["net.csv", "net.pt"]


def test_several_processes_train_and_search_as_one(pictures, tmp_path):
    """A ViT has no BN while nothing is pruned: half the batch in each of two processes is the same
    step."""

    def both(script, *args, batch=False, folders=("one", "two")):
        for folder in folders:
            command, size = {
                "one": ([sys.executable], 32),
                "two": (
                    [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        "--standalone",
                        "--nproc-per-node",
                        "2",
                    ],
                    16,
                ),
            }[folder]
            (tmp_path / folder).mkdir(exist_ok=True)
            done = subprocess.run(
                [
                    *command,
                    os.path.join(ROOT, script),
                    *map(str, args),
                    *(["--batch-size", str(size)] if batch else []),
                    "--workers",
                    "0",
                ],
                cwd=tmp_path / folder,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("\nwrote runs/") == 1  # only the first process speaks

    def logs(name):
        return zip(
            *(rows(tmp_path / folder / "runs" / name) for folder in ("one", "two")), strict=True
        )

    both(
        "1_supernet.py",
        "--model",
        "test_vit",
        "--data-dir",
        pictures,
        "--img-size",
        32,
        "--baseline-epochs",
        3,
        "--epochs",
        0,
        batch=True,
    )
    for one, two in logs("supernet.csv"):
        assert (
            abs(float(one["train_loss"]) - float(two["train_loss"])) < 1e-4
            and one["lr"] == two["lr"]
        )
        assert abs(float(one["val_top1"]) - float(two["val_top1"])) < 2  # one of 60 images
    (tmp_path / "two/runs/supernet.pt").write_bytes(
        (tmp_path / "one/runs/supernet.pt").read_bytes()
    )
    both("2_search.py", "--population", 3, "--generations", 2)
    specs = [
        json.loads((tmp_path / folder / "runs/subnet.json").read_text())
        for folder in ("one", "two")
    ]
    assert specs[0].pop("flags") != specs[1].pop("flags") and specs[0] == specs[1]
    for folder in ("one", "two"):
        (tmp_path / folder / "runs/subnet.json").write_text(
            '{"format": 1, "model": "test_vit", "prune": []}'
        )
    both("3_progressive.py", "--epochs", 3, "--warmup", 0.2, batch=True)
    for one, two in logs("subnet.csv"):
        assert abs(float(one["train_loss"]) - float(two["train_loss"])) < 1e-4
    # and with BN, mixed precision and the rest it runs
    (tmp_path / "two/runs/subnet.json").write_text(json.dumps(specs[0]))
    both(
        "3_progressive.py",
        "--epochs",
        1,
        "--amp",
        "--ema",
        0.9,
        "--mixup",
        0.2,
        batch=True,
        folders=["two"],
    )


@one_network
@pytest.mark.parametrize(
    "script, text",
    [
        ("1_supernet.py", r"error: the loss is (nan|inf) at step \d+, lr \S*e\S+\. Try"),
        (
            "3_progressive.py",
            r"error: the loss is (nan|inf) at step \d+, lam \S+, lr \S*e\S+\. Try",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    runs, pictures, monkeypatch, tmp_path, script, text
):
    flags = {
        "1_supernet.py": ["--model", "test_resnet", "--data-dir", pictures, "--img-size", 32],
        "3_progressive.py": ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json"],
    }[script]
    said = stage(
        monkeypatch,
        script,
        *flags,
        "--workers",
        0,
        "--opt",
        "sgd",
        "--lr",
        1e30,
        "--out",
        tmp_path / "net.pt",
    )
    assert re.match(text, said) and "\n" not in said
    assert not os.path.exists(tmp_path / "net.pt")


@one_network
@pytest.mark.parametrize(
    "flags",
    [
        ["--amp", "--clip-grad", "inf"],
        ["--cutmix", "1", "--smoothing", "0.1"],
        ["--mixup", "0.5", "--batch-size", "15"],
        ["--aa", "nonsense"],
    ],
)
def test_flags_of_the_training(runs, monkeypatch, tmp_path, flags):
    said = stage(
        monkeypatch,
        "3_progressive.py",
        "--supernet",
        runs / "supernet.pt",
        "--subnet",
        runs / "subnet.json",
        "--epochs",
        1,
        "--workers",
        0,
        "--out",
        tmp_path / "net.pt",
        *flags,
    )
    assert {
        "15": "error: --mixup and --cutmix need an even",
        "nonsense": "error: --aa nonsense",
    }.get(flags[-1], "None") in str(said)


def test_loader_processes_change_nothing(pictures, monkeypatch, tmp_path):
    weights = []
    for workers in (0, 1):
        out = tmp_path / f"{workers}.pt"
        assert (
            stage(
                monkeypatch,
                "1_supernet.py",
                "--model",
                "test_resnet",
                "--data-dir",
                pictures,
                "--img-size",
                32,
                "--workers",
                workers,
                "--baseline-epochs",
                2,
                "--epochs",
                0,
                "--calibrate",
                0,
                "--mixup",
                0.2,
                "--reprob",
                0.5,
                "--aa",
                "rand-m5-n1",
                "--model-kwargs",
                "drop_rate=0.3",
                "--out",
                out,
            )
            is None
        )
        weights.append(blocks.read_checkpoint(out)["baseline_state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@one_network
def test_chance_depends_on_seed_epoch_and_image_alone(runs):
    data = blocks.read_checkpoint(runs / "supernet.pt")["data"]
    augment = argparse.Namespace(seed=3, aa="rand-m9-mstd0.5-inc1", reprob=0.0)

    def epoch(number, workers=0):
        loader = make_loader(data, "train", 16, torch.device("cpu"), workers, augment=augment)
        loader.sampler.set_epoch(number)
        return [torch.cat(parts) for parts in zip(*loader)]

    images, labels = epoch(1)
    again = epoch(1, workers=2)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(labels, epoch(2)[1])


@one_network
def test_averaged_weights_leave_out_lam_and_counters(runs, monkeypatch, tmp_path):
    """Against an average that is made here, of what every step left."""
    seen, update = [], timm.utils.ModelEmaV3.update

    def recorded(ema, model, step):
        if not seen:
            seen.append({name: value.clone() for name, value in ema.module.state_dict().items()})
        decay = ema.get_decay(step)
        for name, value in model.state_dict().items():
            old = seen[0][name]
            seen[0][name] = (
                old * decay + value * (1 - decay) if value.is_floating_point() else value.clone()
            )
        update(ema, model, step)
        assert (
            len({block.lam for block in blocks.prunable_blocks(ema.module).values()}) == 2
        )  # as at the start

    monkeypatch.setattr(timm.utils.ModelEmaV3, "update", recorded)
    assert (
        stage(
            monkeypatch,
            "3_progressive.py",
            "--supernet",
            runs / "supernet.pt",
            "--subnet",
            runs / "subnet.json",
            "--epochs",
            1,
            "--batch-size",
            16,
            "--workers",
            0,
            "--ema",
            0.9,
            "--out",
            tmp_path / "net.pt",
        )
        is None
    )
    model, checkpoint = load(tmp_path / "net.pt")
    assert not any("lam" in name for name in checkpoint["state_dict"])
    assert all(
        (block.lam == 1) == (name in checkpoint["prune"])
        for name, block in blocks.prunable_blocks(model).items()
    )
    for name, value in checkpoint["state_dict"].items():
        torch.testing.assert_close(value, seen[0][name])
    assert any(
        value.item() > 11
        for name, value in checkpoint["state_dict"].items()
        if "num_batches" in name
    )


@one_network
def test_fewer_images_than_processes(runs, monkeypatch):
    data = blocks.read_checkpoint(runs / "supernet.pt")["data"]
    monkeypatch.setattr(blocks, "processes", lambda: (1, 8))
    for how in ({"split": True}, {"augment": argparse.Namespace(seed=0, aa=None, reprob=0.0)}):
        with pytest.raises(blocks.UserError, match="train: only 4 images for 8 processes"):
            make_loader(data, "train", 16, torch.device("cpu"), limit=4, **how)


@one_network
@pytest.mark.parametrize("script", ["1_supernet.py", "3_progressive.py"])
def test_spoilt_weights_are_not_saved(runs, pictures, monkeypatch, tmp_path, script):
    """One step per epoch, which ends well before its update spoils the weights."""
    flags = {
        "1_supernet.py": [
            "--model",
            "test_resnet",
            "--data-dir",
            pictures,
            "--img-size",
            32,
            "--baseline-epochs",
            1,
        ],
        "3_progressive.py": [
            "--supernet",
            runs / "supernet.pt",
            "--subnet",
            runs / "subnet.json",
            "--epochs",
            1,
        ],
    }[script]
    said = stage(
        monkeypatch,
        script,
        *flags,
        "--workers",
        0,
        "--opt",
        "sgd",
        "--lr",
        "1e40",
        "--batch-size",
        180,
        "--out",
        tmp_path / "net.pt",
    )
    assert (
        re.match(r"error: not all weights of (baseline|subnet) 1/1 are finite\. Try", said)
        and os.listdir(tmp_path) == []
    )


@one_network
def test_learning_rate_rises_holds_and_falls(runs, monkeypatch, tmp_path):
    """One step per epoch: the log has the rate of each."""
    assert (
        stage(
            monkeypatch,
            "3_progressive.py",
            "--supernet",
            runs / "supernet.pt",
            "--subnet",
            runs / "subnet.json",
            "--workers",
            0,
            "--calibrate",
            0,
            "--batch-size",
            180,
            "--epochs",
            20,
            "--lr",
            0.1,
            "--warmup",
            0.1,
            "--hold",
            0.5,
            "--opt",
            "sgd",
            "--out",
            tmp_path / "net.pt",
        )
        is None
    )
    rates = [float(row["lr"]) for row in rows(tmp_path / "net.csv")]
    assert (
        rates[0] == pytest.approx(0.01)
        and rates[1] == pytest.approx(0.055)
        and rates[2:11] == [0.1] * 9
    )
    assert (
        rates[15] == pytest.approx(0.05)
        and rates[11:] == sorted(rates[11:], reverse=True)
        and rates[-1] < 0.01
    )


@pytest.mark.parametrize("form", ["reparam", "fitted"])
@pytest.mark.parametrize(
    "name, attention",
    [
        ("test_resnet", False),
        ("mobilenetv2_035", False),
        ("test_convnext", False),
        ("test_vit", False),
        ("test_vit", True),
    ],
)
def test_compiled_blocks_are_compiled_once_per_form(name, attention, form, monkeypatch):
    """lam changes with every step: a graph for 0, one for 1, one for all between. (Graphs are
    captured, no code is made.)"""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager")
    )
    torch._dynamo.reset()
    model = timm.create_model(
        name, num_classes=4, **({"img_size": 32} if name == "test_vit" else {})
    )
    names = make_prunable(model, form, attention=attention)
    other = timm.create_model(
        name, num_classes=4, **({"img_size": 32} if name == "test_vit" else {})
    )
    make_prunable(other, form, attention=attention)
    other.load_state_dict(model.state_dict())
    blocks.compile_blocks(model)
    images = torch.randn(2, 3, 32, 32)
    graphs = []
    for lam in (0, 0.1, 0.2, 0.5, 1, 0.3, 0.9, 0, 1):
        for net in (model, other):
            set_subnet(net, names, lam)
        torch.testing.assert_close(
            model.train()(images), other.train()(images), rtol=1e-4, atol=1e-4
        )
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[4] == graphs[-1] > graphs[0] > 0, graphs
    assert graphs[1] == graphs[3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "--compile"]])
@one_network
def test_on_a_gpu(runs, tmp_path, flags):
    flags = [
        "--supernet",
        runs / "supernet.pt",
        "--subnet",
        runs / "subnet.json",
        "--epochs",
        4,
        "--device",
        "cuda",
        *flags,
    ]
    run_stage("3_progressive.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    killed([3, "writing"], "3_progressive.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    a, b = (rows(tmp_path / x / "net.csv") for x in "ab")
    assert [row["epoch"] for row in a] == [row["epoch"] for row in b]
    run_stage(
        "4_merge.py",
        "--subnet",
        tmp_path / "b/net.pt",
        "--out",
        "merged.pt",
        "--device",
        "cuda",
        cwd=tmp_path,
    )


def test_the_log_can_be_read_back(tmp_path):
    blocks.save_csv(
        [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}], str(tmp_path / "log.csv")
    )
    assert rows(tmp_path / "log.csv") == [
        {"epoch": "1", "loss": "0.5"},
        {"epoch": "2", "loss": "0.25"},
    ]
    json.dumps(rows(tmp_path / "log.csv"))
