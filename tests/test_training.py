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
from conftest import ROOT, one_network, run_stage, stage

import blocks
from blocks import Images, Training, make_loader, make_prunable, set_subnet

# Runs a stage that kills itself: in the middle of its first checkpoint ("writing"), or some milliseconds after so many
# steps or subnets.
SUICIDE = """
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
    blocks.Training.update = counted(blocks.Training.update)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(moments, script, *args, cwd):
    """Starts a stage with --resume again and again, killed at each of `moments` in turn, and at last not at all."""
    for moment in moments:
        done = subprocess.run(
            [sys.executable, "-c", SUICIDE, str(moment), os.path.join(ROOT, script), *map(str, args), "--resume"],
            cwd=cwd, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT})
        assert done.returncode == -9, done.stdout + done.stderr
    assert "going on after" in run_stage(script, *args, "--resume", cwd=cwd).stdout


def rows(path, without=("images_per_s",)):
    with open(path, encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


def assert_same_bits(a, b):
    for key in a:
        if key.endswith("state_dict"):
            assert a[key].keys() == b[key].keys() and all(torch.equal(a[key][name], b[key][name]) for name in a[key])
        elif key not in ("holdout", "data_dir"):
            assert a[key] == b[key]


FIRST = ["--model", "test_convnext", "--img-size", 32, "--baseline-epochs", 2, "--epochs", 2, "--random-subnets", 1,
         "--batch-size", 16, "--workers", 1, "--ema", 0.9, "--mixup", 0.2, "--aa", "rand-m5-n1", "--reprob", 0.2]


def test_first_stage_resumes_to_the_same_bits(pictures, tmp_path):
    flags = [*FIRST, "--data-dir", pictures]
    run_stage("1_supernet.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    killed(["writing", 16], "1_supernet.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    a, b = (blocks.read(tmp_path / x / "net.pt") for x in "ab")
    assert_same_bits(a, b)
    assert rows(tmp_path / "a/net.csv") == rows(tmp_path / "b/net.csv") and len(rows(tmp_path / "a/net.csv")) == 4
    assert sorted(os.listdir(tmp_path / "b")) == ["net.csv", "net.pt"]


@one_network
def test_third_stage_resumes_to_the_same_bits(runs, tmp_path):
    flags = ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json", "--epochs", 5, "--workers", 1, "--amp",
             "--batch-size", 32, "--clip-grad", 0.5, "--warmup", 0.1]
    run_stage("3_progressive.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    killed([7, "writing"], "3_progressive.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    assert_same_bits(*(blocks.read(tmp_path / x / "net.pt") for x in "ab"))
    log = rows(tmp_path / "a/net.csv")
    assert log == rows(tmp_path / "b/net.csv") and [row["epoch"] for row in log] == list("12345")
    assert [float(row["mix"]) for row in log[2:]] == [1, 1, 1]


@one_network
def test_search_resumes_to_the_same_spec(runs, tmp_path):
    flags = ["--supernet", runs / "supernet.pt", "--prune", 1, 2, "--population", 2, "--generations", 2, "--workers", 0]
    run_stage("2_search.py", *flags, "--out", "a.json", cwd=tmp_path)
    killed(["writing", 6, 3], "2_search.py", *flags, "--out", "b.json", cwd=tmp_path)
    for name in ("-1.json", "-2.json", ".search.csv"):
        assert (tmp_path / f"a{name}").read_text() == (tmp_path / f"b{name}").read_text()


@one_network
def test_resume_wants_the_same_flags(runs, monkeypatch, tmp_path, capsys):
    flags = ["3_progressive.py", "--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json", "--workers", 0, "--out",
             tmp_path / "net.pt", "--epochs", 2]
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
    monkeypatch.setattr(blocks, "save", save)
    assert stage(monkeypatch, *flags, "--resume") is None and "going on after epoch 1" in capsys.readouterr().out
    assert stage(monkeypatch, *flags, "--resume") is None and "is finished" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["net.csv", "net.pt"]


def test_several_processes_train_and_search_as_one(pictures, tmp_path):
    """A ViT has no BN while nothing is pruned: half the batch in each of two processes is the same step."""
    def both(script, *args, batch=False, folders=("one", "two")):
        for folder in folders:
            command, size = {"one": ([sys.executable], 32), "two": ([
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], 16)}[folder]
            (tmp_path / folder).mkdir(exist_ok=True)
            done = subprocess.run(
                [*command, os.path.join(ROOT, script), *map(str, args), *(["--batch-size", str(size)] if batch else []),
                 "--workers", "0"], cwd=tmp_path / folder, capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("\nwrote runs/") == 1  # only the first process speaks

    def logs(name):
        return zip(*(rows(tmp_path / folder / "runs" / name) for folder in ("one", "two")), strict=True)

    both("1_supernet.py", "--model", "test_vit", "--data-dir", pictures, "--img-size", 32, "--baseline-epochs", 3, "--epochs", 0,
         batch=True)
    for one, two in logs("supernet.csv"):
        assert abs(float(one["train_loss"]) - float(two["train_loss"])) < 1e-4 and one["lr"] == two["lr"]
        assert abs(float(one["val_top1"]) - float(two["val_top1"])) < 2  # one of 60 images
    (tmp_path / "two/runs/supernet.pt").write_bytes((tmp_path / "one/runs/supernet.pt").read_bytes())
    both("2_search.py", "--population", 3, "--generations", 2)
    specs = [(tmp_path / folder / "runs/subnet.json").read_text() for folder in ("one", "two")]
    assert specs[0] == specs[1]
    for folder in ("one", "two"):
        (tmp_path / folder / "runs/subnet.json").write_text('{"format": 1, "model": "test_vit", "prune": []}')
    both("3_progressive.py", "--epochs", 3, "--warmup", 0.2, batch=True)
    for one, two in logs("subnet.csv"):
        assert abs(float(one["train_loss"]) - float(two["train_loss"])) < 1e-4
    # and with BN, mixed precision and the rest it runs
    (tmp_path / "two/runs/subnet.json").write_text(specs[0])
    both("3_progressive.py", "--epochs", 1, "--amp", "--ema", 0.9, "--mixup", 0.2, batch=True, folders=["two"])


@one_network
@pytest.mark.parametrize("script, text", [
    ("1_supernet.py", r"error: the loss is (nan|inf) at step \d+, lr \S*e\S+\. Try"),
    ("3_progressive.py", r"error: the loss is (nan|inf) at step \d+, λ \S+, lr \S*e\S+\. Try")])
def test_a_loss_that_is_not_finite_stops_the_run(runs, pictures, monkeypatch, tmp_path, script, text):
    flags = {"1_supernet.py": ["--model", "test_resnet", "--data-dir", pictures, "--img-size", 32],
             "3_progressive.py": ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json"]}[script]
    said = stage(monkeypatch, script, *flags, "--workers", 0, "--opt", "sgd", "--lr", 1e30, "--out", tmp_path / "net.pt")
    assert re.match(text, said) and "\n" not in said
    assert not os.path.exists(tmp_path / "net.pt")


@one_network
@pytest.mark.parametrize("flags", [["--amp", "float16", "--clip-grad", "inf"], ["--cutmix", "1", "--smoothing", "0.1"],
                                   ["--mixup", "0.5", "--batch-size", "15"], ["--aa", "nonsense"]])
def test_flags_of_the_training(runs, monkeypatch, tmp_path, flags):
    said = stage(monkeypatch, "3_progressive.py", "--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json",
                 "--epochs", 1, "--workers", 0, "--out", tmp_path / "net.pt", *flags)
    assert {"15": "error: --mixup and --cutmix need an even", "nonsense": "error: --aa nonsense"}.get(flags[-1], "None") in str(said)


def test_loader_processes_change_nothing(pictures, monkeypatch, tmp_path):
    weights = []
    for workers in (0, 1):
        out = tmp_path / f"{workers}.pt"
        assert stage(monkeypatch, "1_supernet.py", "--model", "test_resnet", "--data-dir", pictures, "--img-size", 32, "--workers", workers,
                     "--baseline-epochs", 2, "--epochs", 0, "--calibrate", 0, "--mixup", 0.2, "--reprob", 0.5, "--aa", "rand-m5-n1",
                     "--model-kwargs", "drop_rate=0.3", "--out", out) is None
        weights.append(blocks.read(out)["baseline_state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@one_network
def test_chance_depends_on_seed_epoch_and_image_alone(runs, monkeypatch):
    spec = blocks.read(runs / "supernet.pt")
    augment = argparse.Namespace(seed=3, aa="rand-m9-mstd0.5-inc1", reprob=0.0)

    def epoch(number, workers=0, cached=True):
        monkeypatch.setattr(Images, "in_memory", 2**31 if cached else 0)
        loader = make_loader(spec, "train", 16, "cpu", workers, augment=augment)
        assert (loader.dataset.cache is not None) == cached
        loader.sampler.set_epoch(number)
        return [torch.cat(parts) for parts in zip(*loader)]

    images, labels = epoch(1)
    for again in (epoch(1, workers=2), epoch(1, cached=False)):
        assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(labels, epoch(2)[1])
    plain = [torch.cat([image for image, _ in make_loader(spec, "val", 16, "cpu", share=share)]) for share in (True, False)]
    assert torch.equal(*plain)  # decoded once or each time


def test_averaged_weights_leave_out_the_mix_and_counters():
    args = blocks_args(ema=0.9)
    model = timm.create_model("test_convnext", num_classes=4)
    names = make_prunable(model)
    training = Training(model, args, steps=100)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    set_subnet(model, names, 0.5)
    for step in range(4):
        training.start(step)
        training.backward(model.train()(torch.randn(4, 3, 32, 32)).sum())
        training.update(step)
        decay = training.ema.get_decay(step)
        for name, value in model.state_dict().items():
            average[name] = average[name] * decay + value * (1 - decay) if value.is_floating_point() else value.clone()
    assert all(block.mix == 0 for block in blocks.prunable_blocks(training.result).values())
    for name, value in training.result.state_dict().items():
        torch.testing.assert_close(value, average[name])
    assert training.result.state_dict()["stages.0.blocks.0.pruned.1.num_batches_tracked"] == 4


def blocks_args(**flags):
    parser = argparse.ArgumentParser()
    blocks.add_training_flags(parser, lr=1e-3, warmup=0.1)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **flags})


@one_network
def test_fewer_images_than_processes(runs, monkeypatch):
    spec = blocks.read(runs / "supernet.pt")
    monkeypatch.setattr(blocks, "processes", lambda: (1, 8))
    for how in ({"limit": 4, "share": True}, {"limit": 4, "augment": blocks_args()}):
        with pytest.raises(blocks.UserError, match="train: only 4 images for 8 processes"):
            make_loader(spec, "train", 16, "cpu", **how)


def test_spoilt_weights_are_not_saved():
    training = Training(torch.nn.Linear(2, 2), blocks_args(), steps=2)
    training.end_epoch()
    training.model.weight.data[0, 0] = float("inf")
    with pytest.raises(blocks.UserError, match="weights are not finite"):
        training.end_epoch()


def test_learning_rate_rises_holds_and_falls():
    training = Training(torch.nn.Linear(2, 2), blocks_args(lr=1.0), steps=100, hold=0.5)
    rates = [training.start(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[5] == pytest.approx(0.55) and rates[10:51] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5) and rates[51:] == sorted(rates[51:], reverse=True) and rates[-1] < 0.01


@pytest.mark.parametrize("name, attention", [("test_resnet", False), ("mobilenetv2_035", False), ("test_convnext", False),
                                             ("test_vit", False), ("test_vit", True)])
def test_compiled_blocks_are_compiled_once_per_form(name, attention, monkeypatch):
    """λ changes with every step: a graph for 0, one for 1, one for all between. (Graphs are captured, no code is made.)"""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager"))
    torch._dynamo.reset()
    model = timm.create_model(name, num_classes=4, **({"img_size": 32} if name == "test_vit" else {}))
    names = make_prunable(model, attention=attention)
    other = timm.create_model(name, num_classes=4, **({"img_size": 32} if name == "test_vit" else {}))
    make_prunable(other, attention=attention)
    other.load_state_dict(model.state_dict())
    blocks.compile_blocks(model)
    images = torch.randn(2, 3, 32, 32)
    graphs = []
    for mix in (0, 0.1, 0.2, 0.5, 1, 0.3, 0.9, 0, 1):
        for net in (model, other):
            set_subnet(net, names, mix)
        torch.testing.assert_close(model.train()(images), other.train()(images), rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[4] == graphs[-1] > graphs[0] > 0, graphs
    assert graphs[1] == graphs[3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "float16"], ["--amp", "--compile"]])
@one_network
def test_on_a_gpu(runs, tmp_path, flags):
    flags = ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json", "--epochs", 4, "--device", "cuda", *flags]
    run_stage("3_progressive.py", *flags, "--out", "a/net.pt", cwd=tmp_path)
    killed([3, "writing"], "3_progressive.py", *flags, "--out", "b/net.pt", cwd=tmp_path)
    a, b = (rows(tmp_path / x / "net.csv") for x in "ab")
    assert [row["epoch"] for row in a] == [row["epoch"] for row in b]
    run_stage("4_merge.py", "--subnet", tmp_path / "b/net.pt", "--out", "merged.pt", "--device", "cuda", cwd=tmp_path)


def test_the_log_can_be_read_back(tmp_path):
    blocks.save_csv([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}], str(tmp_path / "log.csv"))
    assert rows(tmp_path / "log.csv") == [{"epoch": "1", "loss": "0.5"}, {"epoch": "2", "loss": "0.25"}]
    json.dumps(rows(tmp_path / "log.csv"))
