"""Runs that are killed, shared out, averaged, or that go wrong."""

import argparse
import copy
import json
import os
import re
import shlex
import shutil
import signal

import pytest
import timm
import torch
from conftest import ROOT, load, one_network, rows, shell, stage, stage_on_full_disk, write_spec

import blocks
from blocks import make_loader, make_prunable, set_subnet

CPU = torch.device("cpu")

# Runs a stage that kills itself: "writing 2", in the middle of its second checkpoint, or "step 9",
# some milliseconds after so many steps, or scored subnets.
KILLED = """
import os, random, runpy, signal, sys, threading
import torch, blocks
what, number, *sys.argv = sys.argv[1:]
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(function, then):
    def wrapper(*args):
        global calls
        calls += 1
        if calls == int(number):
            then(*args)
        return function(*args)
    return wrapper

def half(content, path):
    save(content, path)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def soon(*args):
    threading.Timer(random.uniform(0, 0.03), die).start()

save = torch.save
if what == "writing":
    torch.save = counted(torch.save, half)
else:
    blocks.recalibrate = counted(blocks.recalibrate, soon)
    blocks.all_reduce_mean = counted(blocks.all_reduce_mean, soon)  # once per step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def killed(line, *moments):
    """Runs a stage with --resume again and again, killed at each of `moments` in turn, and at last
    not at all."""
    for moment in moments:
        done = shell(f"-c {shlex.quote(KILLED)} {moment} {ROOT}/{line} --resume", os.getcwd())
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert stage(f"{line} --resume") is None


def assert_same_bits(a, b):
    for key in a.keys() - {"data", "flags"}:
        if key.endswith("state_dict"):
            assert a[key].keys() == b[key].keys()
            assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])
        else:
            assert a[key] == b[key]


def test_first_stage_resumes_to_the_same_bits(pictures, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    line = f"1_supernet.py --model test_convnext --img-size 32 --data-dir {pictures} --epochs 2"
    line += " --baseline-epochs 2 --batch-size 16 --ema 0.9 --mixup 0.2 --aa rand-m5-n1"
    line += " --reprob 0.2 --workers 1"
    assert stage(f"{line} --out a/net.pt") is None
    said = capsys.readouterr()
    assert not said.err and "\r" not in said.out
    epochs = re.findall(r"^(baseline|supernet) (\d/2)  .*top-1", said.out, re.MULTILINE)
    assert epochs == [(name, of) for name in ("baseline", "supernet") for of in ("1/2", "2/2")]
    killed(f"{line} --out b/net.pt", "writing 4")  # after the supernet's first epoch
    assert "going on after epoch 1 of the supernet" in capsys.readouterr().out
    assert_same_bits(*(blocks.read_checkpoint(f"{x}/net.pt") for x in "ab"))
    assert rows("a/net.csv") == rows("b/net.csv") and len(rows("a/net.csv")) == 4
    assert sorted(os.listdir("b")) == ["net.csv", "net.pt"]


@one_network
def test_third_stage_resumes_to_the_same_bits(own_runs, capsys):
    line = "3_progressive.py --epochs 5 --workers 1 --amp --batch-size 32 --clip-grad 0.5"
    line += " --warmup 0.1"
    assert stage(f"{line} --control --out a/net.pt") is None
    # in the control's second epoch, then while the subnet's second one is written
    killed(f"{line} --control --out b/net.pt", "step 10", "writing 6")
    assert "going on after epoch 1 of the subnet" in capsys.readouterr().out
    a, b = (blocks.read_checkpoint(f"{x}/net.pt") for x in "ab")
    assert_same_bits(a, b)
    log = rows("a/net.csv")
    assert log == rows("b/net.csv")
    epochs = [row for row in log if row["val_top1"]]
    assert [row["network"] for row in epochs] == ["control"] * 5 + ["subnet"] * 5
    assert [row["epoch"] for row in epochs] == list("1234512345")
    assert [float(row["lam"]) for row in epochs[:5] + epochs[7:]] == [0] * 5 + [1] * 3
    assert a["control"]["top1"] == float(epochs[4]["val_top1"])
    moves = [float(row["lam"]) for row in log if row["network"] == "subnet"]
    assert len([lam for lam in moves if 0 < lam < 1]) > 4 and moves == sorted(moves)
    # the control changes nothing else
    assert stage(f"{line} --no-control --out c/net.pt") is None
    assert_same_bits(blocks.read_checkpoint("c/net.pt"), {**a, "control": None})


@one_network
def test_search_resumes_to_the_same_spec(own_runs, capsys):
    line = "2_search.py --prune 1 2 --population 2 --generations 2"
    assert stage(f"{line} --out a.json") is None
    killed(f"{line} --out b.json", "step 8")
    assert "going on after generation" in capsys.readouterr().out
    assert open("a.search.csv").read() == open("b.search.csv").read()
    for name in ("-1.json", "-2.json", ".front/1.json"):
        a, b = (json.load(open(f"{x}{name}")) for x in "ab")
        assert a.pop("flags") != b.pop("flags") and a == b  # --out and --resume


@one_network
def test_a_search_is_finished_once_its_front_is_written(own_runs, monkeypatch):
    line = "2_search.py --prune 1 --population 2 --generations 2 --out a.json"
    said = stage_on_full_disk(line, lambda path: path.endswith("a.front/1.json"), monkeypatch)
    assert said == "error: disk full"
    assert stage(f"{line} --resume") is None and os.path.exists("a.front/1.json")


def test_only_files_of_ones_own_are_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("r[1]", "r1"):
        os.mkdir(folder)
        for name in ("a.pt", "a.pt.last", "a.pt.tmp7.pt", "a.pt.last.tmp7.last"):
            open(f"{folder}/{name}", "w").close()
    blocks.finish("r[1]/a.pt")
    assert os.listdir("r[1]") == ["a.pt"] and len(os.listdir("r1")) == 4


@one_network
def test_resume_wants_the_same_flags(own_runs, monkeypatch, capsys):
    line = "3_progressive.py --out new/net.pt"
    said = stage_on_full_disk(f"{line} --epochs 2 --resume", os.path.exists, monkeypatch)
    assert said == "error: disk full"  # after the first epoch was kept
    assert "there is no new/net.pt.last to go on from" in capsys.readouterr().out
    assert sorted(os.listdir("new")) == ["net.csv", "net.pt.last"]
    said = stage(f"{line} --epochs 2 --resume --lr 1")
    assert said.startswith("error: ") and "other flags: lr 0.001, now 1.0. " in said
    assert stage(f"{line} --resume --calibrate 7").startswith("error: ")
    assert stage(f"{line} --resume") is None
    assert "going on after epoch 1" in capsys.readouterr().out
    assert stage(f"{line} --epochs 2 --resume") is None
    assert "is finished" in capsys.readouterr().out
    assert blocks.read_checkpoint("new/net.pt")["flags"]["device"] == "cpu"
    said = stage(f"{line} --resume --epochs 3")
    assert said.startswith("error: ") and "other flags: epochs 2, now 3. " in said
    write_spec(own_runs / "subnet.json", ["layer1.0"])
    said = stage(f"{line} --resume")
    assert said.startswith("error: ") and "other flags: content of runs/subnet.json " in said
    assert sorted(os.listdir("new")) == ["net.csv", "net.pt"]


def test_several_processes_train_and_search_as_one(pictures, monkeypatch, tmp_path):
    """A ViT has no BN while nothing is pruned: half the batch in each of two processes is the same
    step."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node 2 {ROOT}/"

    def both(line, one="", two=""):
        assert stage(f"{line} {one}") is None
        done = shell(f"{torchrun}{line} --workers 0 {two}", tmp_path / "two")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\nwrote runs/") == 1  # only the first process speaks

    def train(line):
        both(line, "--batch-size 32", "--batch-size 16")
        log = {"1": "supernet.csv", "3": "subnet.csv"}[line[0]]
        for one, two in zip(rows(f"runs/{log}"), rows(f"../two/runs/{log}"), strict=True):
            assert abs(float(one["train_loss"]) - float(two["train_loss"])) < 1e-4
            assert one["lr"] == two["lr"]
            if one["val_top1"]:  # one of 60 images
                assert abs(float(one["val_top1"]) - float(two["val_top1"])) < 2

    first = f"1_supernet.py --model test_vit --data-dir {pictures} --img-size 32"
    train(f"{first} --baseline-epochs 3 --epochs 0")
    (tmp_path / "two/runs/supernet.pt").write_bytes(open("runs/supernet.pt", "rb").read())
    both("2_search.py --population 3 --generations 2")
    a, b = (json.load(open(tmp_path / x / "runs/subnet.json")) for x in ("one", "two"))
    assert a.pop("flags") != b.pop("flags") and a == b
    for folder in ("one", "two"):
        write_spec(tmp_path / folder / "runs/subnet.json", [], "test_vit")
    train("3_progressive.py --epochs 3 --warmup 0.2")


@one_network
@pytest.mark.parametrize("script", ["1_supernet.py", "3_progressive.py"])
def test_a_loss_that_is_not_finite_stops_the_run(own_runs, pictures, script):
    flags = f"--model test_resnet --data-dir {pictures} --img-size 32" if script[0] == "1" else ""
    said = stage(f"{script} {flags} --opt sgd --lr 1e30 --out new/net.pt")
    assert re.match(r"error: the loss is (nan|inf) at step \d+, lr \S*e\S+\. Try", said)
    assert "\n" not in said and not os.path.exists("new/net.pt")


@one_network
@pytest.mark.parametrize("script", ["1_supernet.py", "3_progressive.py"])
def test_spoilt_weights_are_not_saved(own_runs, pictures, script):
    """One step per epoch, which ends well before its update spoils the weights."""
    flags, network = "--epochs 1", "subnet"
    if script[0] == "1":
        flags = f"--model test_resnet --data-dir {pictures} --img-size 32 --baseline-epochs 1"
        network = "baseline"
    said = stage(f"{script} {flags} --opt sgd --lr 1e40 --batch-size 180 --out new/net.pt")
    assert said.startswith(f"error: not all weights of {network} 1/1 are finite. Try")
    assert os.listdir() == ["runs"]


@one_network
@pytest.mark.parametrize(
    "flags, said",
    [
        ("--amp --clip-grad inf", None),
        ("--cutmix 1 --smoothing 0.1", None),
        (
            "--mixup 0.5 --batch-size 15",
            "error: --mixup and --cutmix need an even number of images a step, not 15",
        ),
        ("--aa nonsense", "error: --aa nonsense"),
        ("--opt bnbadam", "error: --opt bnbadam does not work here: "),  # needs bitsandbytes
        ("--opt adahessian", 2),  # argparse's exit status: its steps need another kind of gradient
        ("--seed 2147483647", None),
        ("--seed 2147483648", 2),  # NumPy takes 32 bits
    ],
)
def test_flags_of_the_training(own_runs, flags, said):
    end = stage(f"3_progressive.py --epochs 1 {flags}")
    assert end.startswith(said) if isinstance(said, str) else end == said


def test_a_run_goes_on_with_the_same_images_only(pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "data")
    line = "1_supernet.py --model test_resnet --img-size 32 --data-dir data --baseline-epochs 3"
    assert shell(f"-c {shlex.quote(KILLED)} writing 3 {ROOT}/{line}", os.getcwd()).returncode
    folder = "data/train/plain disc"
    shutil.copy(f"{folder}/{os.listdir(folder)[0]}", f"{folder}/another.png")
    files, said = os.listdir("runs"), stage(f"{line} --resume")
    assert said.startswith("error: ") and "data does not hold the train images that stage 1" in said
    assert "\n" not in said and os.listdir("runs") == files


def test_a_run_goes_on_with_the_answers_that_it_has(pictures, monkeypatch, tmp_path, capsys):
    """The given weights are not asked again for what takes the place of labels."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        os.makedirs(f"data/{part}")
        for path in (pictures / part).glob("*/*"):
            shutil.copy(path, f"data/{part}/{path.parent.name} {path.name}")
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), "mine.pth")
    line = "1_supernet.py --model test_resnet --img-size 32 --data-dir data --checkpoint mine.pth"
    line += " --model-kwargs num_classes=10 --epochs 2"
    assert shell(f"-c {shlex.quote(KILLED)} writing 2 {ROOT}/{line}", os.getcwd()).returncode
    had = blocks.read_checkpoint("runs/supernet.pt.last")["data"]["answers"]
    assert stage(f"{line} --resume") is None
    assert "have no labels" not in capsys.readouterr().out
    has = blocks.read_checkpoint("runs/supernet.pt")["data"]["answers"]
    assert had.keys() == has.keys() == {"train", "val"}
    assert all(torch.equal(had[part], has[part]) for part in had)


def test_loader_processes_change_nothing(pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = f"1_supernet.py --model test_resnet --data-dir {pictures} --img-size 32 --epochs 0"
    line += " --baseline-epochs 2 --calibrate 0 --mixup 0.2 --reprob 0.5 --aa rand-m5-n1"
    weights = []
    for workers in (0, 1):
        assert stage(f"{line} --workers {workers} --model-kwargs drop_rate=0.3") is None
        weights.append(blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@one_network
def test_chance_depends_on_seed_epoch_and_image_alone(runs):
    data = blocks.read_checkpoint(runs / "supernet.pt")["data"]
    augment = argparse.Namespace(seed=3, aa="rand-m9-mstd0.5-inc1", reprob=0.0)

    def epoch(number, workers=0):
        loader = make_loader(data, "train", 16, CPU, workers, augment=augment)
        loader.sampler.set_epoch(number)
        return [torch.cat(parts) for parts in zip(*loader)]

    images, labels = epoch(1)
    again = epoch(1, workers=2)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(labels, epoch(2)[1])


@one_network
def test_averaged_weights_leave_out_lam_and_counters(own_runs, monkeypatch):
    """Against an average that is made here, of what every step left."""
    mean, update = {}, timm.utils.ModelEmaV3.update

    def recorded(ema, model, step):
        if not mean:
            mean.update({name: value.clone() for name, value in ema.module.state_dict().items()})
        decay = ema.get_decay(step)
        for name, value in model.state_dict().items():
            floats = value.is_floating_point()
            mean[name] = decay * mean[name] + (1 - decay) * value if floats else value.clone()
        update(ema, model, step)
        lams = {block.lam for block in blocks.prunable_blocks(ema.module).values()}
        assert len(lams) == 2  # as at the start

    monkeypatch.setattr(timm.utils.ModelEmaV3, "update", recorded)
    assert stage("3_progressive.py --epochs 1 --batch-size 16 --ema 0.9") is None
    model, checkpoint = load("runs/subnet.pt")
    assert not any("lam" in name for name in checkpoint["state_dict"])
    for name, block in blocks.prunable_blocks(model).items():
        assert (block.lam == 1) == (name in checkpoint["prune"])
    for name, value in checkpoint["state_dict"].items():
        torch.testing.assert_close(value, mean[name])
    counters = [name for name in checkpoint["state_dict"] if "num_batches" in name]
    assert any(checkpoint["state_dict"][name] > 11 for name in counters)


@one_network
def test_fewer_images_than_processes(runs, monkeypatch):
    data = blocks.read_checkpoint(runs / "supernet.pt")["data"]
    monkeypatch.setattr(blocks, "rank_and_world", lambda: (1, 8))
    for how in ({"split": True}, {"augment": argparse.Namespace(seed=0, aa=None, reprob=0.0)}):
        with pytest.raises(blocks.UserError, match="train: only 4 images for 8 processes"):
            make_loader(data, "train", 16, CPU, limit=4, **how)


@one_network
def test_learning_rate_rises_holds_and_falls(own_runs):
    """One step per epoch: the log has the rate of each."""
    line = "3_progressive.py --batch-size 180 --epochs 12 --lr 0.1 --warmup 0.17 --opt sgd"
    assert stage(f"{line} --calibrate 0") is None
    rates = [float(row["lr"]) for row in rows("runs/subnet.csv")]
    assert rates[:2] == pytest.approx([0.01, 0.055]) and rates[2:7] == [0.1] * 5
    assert rates[9] == pytest.approx(0.05) and rates[-1] < 0.01
    assert rates[7:] == sorted(rates[7:], reverse=True)


def captured_sizes(monkeypatch):
    """Has torch.compile capture graphs and make no code of them. Returns a list of the shapes of
    what goes into them."""
    compile_module, sizes = torch.nn.Module.compile, []

    def capture(graph, inputs):
        values = (node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder"))
        sizes.extend(value.shape for value in values if torch.is_tensor(value))
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend=capture)
    )
    torch._dynamo.reset()
    return sizes


NETWORKS = ("test_resnet", "mobilenetv2_035", "test_convnext", "test_vit")


@pytest.mark.parametrize("form", ["reparam", "fitted"])
@pytest.mark.parametrize("name, attention", [*((n, False) for n in NETWORKS), ("test_vit", True)])
def test_compiled_blocks_are_compiled_once_per_form(name, attention, form, monkeypatch):
    """lam changes with every step: a graph for 0, one for 1, one for all between. Of unknown sizes
    is at most the batch: strides of others torch may fail to sort. (Graphs are captured, no code is
    made.)"""
    sizes = captured_sizes(monkeypatch)

    def build():
        more = {"test_vit": {"img_size": 32}, "test_convnext": {"depths": (1, 1, 1, 1)}}
        model = timm.create_model(name, num_classes=4, **more.get(name, {}))
        if name == "mobilenetv2_035":  # all other blocks are like these
            model.blocks = model.blocks[:2]
            model.conv_head = torch.nn.Conv2d(8, model.num_features, 1)
        return model, make_prunable(model, form, attention=attention)

    (model, names), (other, _) = build(), build()
    other.load_state_dict(model.state_dict())
    blocks.compile_blocks(model)
    images = torch.randn(2, 3, 32, 32)
    graphs = []
    for lam in (0, 0.1, 0.2, 0.5, 1, 0.3, 0.9, 0, 1):
        for net in (model, other):
            set_subnet(net, names, lam)
        ours, theirs = model.train()(images), other.train()(images)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[4] == graphs[-1] > graphs[0] > 0, graphs
    assert graphs[1] == graphs[3]
    assert sizes and {type(size) for shape in sizes for size in shape[1:]} == {int}


def test_compiled_blocks_can_be_fitted(monkeypatch):
    """As after stage 1 has trained a baseline with --compile. The fit itself, which looks into each
    block, is not compiled: that took minutes."""
    sizes, images = captured_sizes(monkeypatch), torch.randn(6, 3, 32, 32)
    plain = timm.create_model("test_resnet", num_classes=4).eval()
    compiled = copy.deepcopy(plain)
    blocks.compile_blocks(compiled)
    compiled(images)
    captured = len(sizes)
    for model in (plain, compiled):
        torch.manual_seed(0)
        blocks.fit(model, make_prunable(model, "fitted"), images.split(2))
    assert len(sizes) == captured > 0
    found = compiled.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in plain.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", ["", "--amp", "--amp --compile"])
@one_network
def test_on_a_gpu(own_runs, flags):
    line = f"3_progressive.py --epochs 4 --device cuda {flags}"
    assert stage(f"{line} --out a/net.pt") is None
    killed(f"{line} --out b/net.pt", "step 5", "writing 2")
    a, b = (rows(f"{x}/net.csv") for x in "ab")
    assert [row["epoch"] for row in a] == [row["epoch"] for row in b]
    assert stage("4_merge.py --subnet b/net.pt --out merged.pt --device cuda") is None


def test_the_log_can_be_read_back(tmp_path):
    path = str(tmp_path / "log.csv")
    blocks.save([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "top1": 3}], path)
    expected = [{"epoch": "1", "loss": "0.5", "top1": ""}]
    assert rows(path) == [*expected, {"epoch": "2", "loss": "0.25", "top1": "3"}]
