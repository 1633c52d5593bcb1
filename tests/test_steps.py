"""One step of a training, the sums of two processes and the bounds of the merge, each against a few
lines that compute it anew. The optimiser is plain SGD, so that an update tells the gradient."""

import argparse
import copy
import itertools
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, one_network, rows, shell, stage, write_spec

import blocks
from blocks import fit, make_loader, make_prunable, prunable_blocks, set_subnet

CPU = torch.device("cpu")
# A step per epoch; the first one of "momentum" has none yet
ONE_STEP = "--epochs 1 --batch-size 180 --opt momentum --weight-decay 0 --warmup 0"


def only_batch(checkpoint):
    """The images and labels of that step."""
    augment = argparse.Namespace(seed=0, aa=None, reprob=0.0)
    loader = make_loader(checkpoint["data"], "train", 180, CPU, augment=augment)
    loader.sampler.set_epoch(0)
    return next(iter(loader))


def in_training(model):
    """In the stages' memory format: in another one sums round otherwise, and flip a few ReLUs."""
    return model.train().to(memory_format=torch.channels_last)


def assert_update(model, after, step):
    """`after`, a state dict, is `model` minus `step` times its gradients."""
    before = {name: value for name, value in model.named_parameters() if value.grad is not None}
    update = torch.cat([(value - after[name]).flatten() for name, value in before.items()])
    wanted = torch.cat([step * value.grad.flatten() for value in before.values()])
    assert (update - wanted).norm() < 1e-3 * wanted.norm() and wanted.norm() > 0


@one_network
@pytest.mark.parametrize("clip", [float("inf"), 0, 0.01])
def test_a_step_of_the_third_stage(own_runs, clip):
    """On the labels, smoothed, and the baseline's soft labels, with weights that add up to 1, and
    clipped."""
    flags = f"--lr 0.5 --clip-grad {clip} --distill 0.3 --smoothing 0.1"
    assert stage(f"3_progressive.py {ONE_STEP} {flags}") is None
    after = blocks.read_checkpoint("runs/subnet.pt")
    supernet = blocks.read_checkpoint("runs/supernet.pt")
    model, teacher = (blocks.build(supernet, baseline=True) for _ in range(2))
    make_prunable(model, end_act=False)
    set_subnet(model, after["prune"])
    images, labels = only_batch(supernet)
    logits = in_training(model)(images)
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1)
    soft = F.cross_entropy(logits, teacher(images).softmax(1).detach())
    (0.7 * hard + 0.3 * soft).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert norm > 0.02
    assert_update(model, after["state_dict"], 0.5 * min(1, (clip or float("inf")) / norm.item()))


@one_network
@pytest.mark.parametrize("form", ["reparam", "fitted"])
def test_a_step_that_learns_features(own_runs, form):
    """Labels do not count. What is in front of the first pruned block stays, and once they have
    moved by what pruning changes, so do all BN statistics but those of pruned blocks' own
    layers."""
    model, supernet = load("runs/supernet.pt")
    names = list(prunable_blocks(model))[1:3]
    for name, value in supernet["baseline_state_dict"].items():
        if name.endswith(("bn2.weight", "bn3.weight")):  # after two epochs they are still near 0
            value.fill_(1)
    blocks.save(supernet, "runs/supernet.pt")
    spec = write_spec(own_runs / "two.json", names)
    flags = f"--features --lr 0.5 --clip-grad inf --transition 0 --form {form} --calibrate 64"
    assert stage(f"3_progressive.py {ONE_STEP} {flags} --subnet {spec}") is None
    after = blocks.read_checkpoint("runs/subnet.pt")
    teacher, model = (
        blocks.build(supernet, baseline=True).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    make_prunable(model, form, end_act=after["end_act"])
    model.to(memory_format=torch.channels_last)
    if form == "fitted":
        fit(model, names, make_loader(supernet["data"], "train", 180, CPU, limit=64))
    set_subnet(model, names)
    batches = make_loader(supernet["data"], "train", 180, CPU, limit=1024)
    blocks.recalibrate(
        model, batches, blocks.not_fitted(model), blocks.bn_statistics(teacher, batches)
    )
    pruned = [model.get_submodule(name) for name in names]
    own = {module for block in pruned for module in block.modules()} if form == "reparam" else {}
    for module in in_training(model).modules():
        if isinstance(module, blocks.BatchNorm) and module not in own:
            module.eval()
    images, _ = only_batch(supernet)
    with torch.no_grad():
        wanted, soft = teacher.forward_features(images), teacher(images).softmax(1)
    found = model.forward_features(images)
    loss = 5 * (found - wanted).square().mean() / wanted.var()
    (loss + F.cross_entropy(model.forward_head(found), soft)).backward()
    front = list(
        itertools.takewhile(lambda name: not name.startswith(names[0]), after["state_dict"])
    )
    for name, value in supernet["baseline_state_dict"].items():
        if name.endswith("num_batches_tracked"):
            continue
        if name in front:
            assert torch.equal(after["state_dict"][name], value), name
        elif "running" in name and (form == "fitted" or not name.startswith(tuple(names))):
            found = after["state_dict"][name]
            assert not torch.equal(found, value) or name.startswith(tuple(names))
            assert torch.equal(found, model.state_dict()[name]), name
    for name, weight in model.named_parameters():
        weight.grad = None if name in front else weight.grad
    assert_update(model, after["state_dict"], 0.5)


@one_network
@pytest.mark.parametrize("form", ["reparam", "fitted"])
def test_a_step_of_the_supernet(own_runs, pictures, monkeypatch, form):
    """The gradients of the largest subnet, the smallest and two random ones add up. In the paper's
    form the baseline gives the soft labels, also to the largest, and the rate is a fifth."""
    supernet = blocks.read_checkpoint("runs/supernet.pt")
    torch.save(supernet["baseline_state_dict"], "weights.pth")
    first = f"1_supernet.py --model test_resnet --data-dir {pictures} --img-size 32 --form {form}"
    first += " --checkpoint weights.pth --calibrate 64"
    if form == "fitted":
        assert stage(f"{first} --epochs 0") is None
        model = load("runs/supernet.pt")[0]
    else:
        model = blocks.build(supernet, baseline=True)
        make_prunable(model)
    names, subnets, outputs_of = list(prunable_blocks(model)), [], blocks.outputs_of

    def recorded(network, images, amp=False):  # of the baseline, too: it has no prunable blocks
        found = prunable_blocks(network).items()
        if sys._getframe(1).f_globals["__name__"] == "__main__":  # not when it is evaluated
            subnets.append([name for name, block in found if block.lam == 1])
        return outputs_of(network, images, amp)

    monkeypatch.setattr(blocks, "outputs_of", recorded)
    assert stage(f"{first} {ONE_STEP} --lr 0.5 --clip-grad inf") is None
    assert subnets[:-3] == ([[], []] if form == "reparam" else [[]]) and subnets[-3] == names
    assert all(0 < len(prune) < len(names) for prune in subnets[-2:])

    teacher = copy.deepcopy(model).eval()
    images, labels = only_batch(supernet)
    logits = in_training(model)(images)
    loss, soft = F.cross_entropy(logits, labels), logits.softmax(1).detach()
    if form == "reparam":
        soft = teacher(images).softmax(1).detach()
        loss = (loss + F.cross_entropy(logits, soft)) / 2
    loss.backward()
    for prune in subnets[-3:]:
        set_subnet(model, prune)
        F.cross_entropy(model(images), soft).backward()
    rate = 0.1 if form == "reparam" else 0.5
    (row,) = rows("runs/supernet.csv")
    assert float(row["lr"]) == pytest.approx(rate)
    assert_update(model, blocks.read_checkpoint("runs/supernet.pt")["state_dict"], rate)


# Runs a stage, and keeps each network that it evaluates, in each process
RECORDED = """
import os, runpy, sys
import torch, blocks

def recorded(network, *args, **kwargs):
    number = sum(name.startswith(os.environ["RANK"]) for name in os.listdir("seen"))
    torch.save(network.state_dict(), f"seen/{os.environ['RANK']}-{number}.pt")
    return evaluate(network, *args, **kwargs)

evaluate, blocks.evaluate = blocks.evaluate, recorded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@one_network
def test_two_processes_fit_and_average_as_one(own_runs, tmp_path):
    """The fit has the images of both, and the averaged weights have the BN statistics of both."""
    line = "3_progressive.py --form fitted --calibrate 64"
    assert stage(f"{line} --epochs 0 --batch-size 32") is None
    one = blocks.read_checkpoint("runs/subnet.pt")["state_dict"]
    (tmp_path / "recorded.py").write_text(RECORDED)
    (tmp_path / "seen").mkdir()
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node 2 recorded.py {ROOT}/"
    flags = "--epochs 1 --batch-size 16 --workers 0 --amp --ema 0.9 --mixup 0.2"
    done = shell(f"{torchrun}{line} {flags}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nwrote runs/") == 1  # only the first process speaks
    before, after = ([torch.load(f"seen/{rank}-{n}.pt") for rank in (0, 1)] for n in (0, 1))
    for name, wanted in one.items():
        assert torch.equal(before[0][name], before[1][name])
        assert torch.equal(after[0][name], after[1][name])
        if ".fitted." in name and wanted.is_floating_point():
            assert (before[0][name] - wanted).norm() <= 1e-3 * wanted.norm()
    moved = [name for name in one if not torch.equal(before[0][name], after[0][name])]
    assert any("running" in name for name in moved)


@one_network
@pytest.mark.parametrize(
    "what, bound",
    [
        ("merged against unmerged", 1e-10),
        ("merged, in float32, against unmerged", 1e-4),
        ("new/merged.pt2 against merged", 1e-4),
        ("new/merged.onnx against merged", 1e-4),
    ],
)
def test_a_network_that_is_off_is_refused(own_runs, monkeypatch, what, bound):
    """By three times what is allowed, which is a share of the logits' standard deviation."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, checkpoint = load("runs/subnet.pt")
    with torch.no_grad():
        logits = [model(images) for images, _ in make_loader(checkpoint["data"], "val", 64, CPU)]
    shift = 3 * bound * torch.cat(logits).std().item()

    def off(network):
        network.fc.bias.data += shift  # and so all logits are
        return network

    merge, export = blocks.merge, torch.export.export

    def merge_off_in_float32(model):
        merged = merge(model)
        to_float = merged.float
        merged.float = lambda: off(to_float())
        return merged

    def export_off(network, *args, **kwargs):
        return export(off(copy.deepcopy(network)), *args, **kwargs)

    class SessionOff(onnxruntime.InferenceSession):
        def run(self, *args):
            return [logits + shift for logits in super().run(*args)]

    mistakes = {
        "merged against unmerged": (blocks, "merge", lambda model: off(merge(model))),
        "merged, in float32, against unmerged": (blocks, "merge", merge_off_in_float32),
        "new/merged.pt2 against merged": (torch.export, "export", export_off),
        "new/merged.onnx against merged": (onnxruntime, "InferenceSession", SessionOff),
    }
    monkeypatch.setattr(*mistakes[what])
    said = stage("4_merge.py --out new/merged.pt --onnx")
    assert said is not None, "it was not refused"
    assert said.startswith(f"error: {what}: max abs error")
    assert said.endswith("they differ, nothing was written")
    assert not os.path.exists("new") or not os.listdir("new")
