"""The four stages, as a person runs them, on small pictures and small networks of each family."""

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, load, one_network, shell, stage, write_spec
from PIL import Image

import blocks
from blocks import UserError, cost, evaluate, make_loader

CPU = torch.device("cpu")


def validation(checkpoint):
    return list(make_loader(checkpoint["data"], "val", 16, CPU))


@one_network
def test_checkpoints_hold_tensors_and_plain_values(runs):
    files = {"about.json": ""}
    torch.export.load(runs / "merged.pt2", extra_files=files)
    shipped = torch.load(runs / "merged.pt", weights_only=True)
    plain = str({key: shipped[key] for key in shipped.keys() - {"state_dict"}})
    for about in (files["about.json"], plain):
        assert "/" not in about and shipped["model"] in about  # no folder of this machine
    for kind in ("supernet", "subnet", "merged"):
        checkpoint = torch.load(runs / f"{kind}.pt", weights_only=True)
        assert checkpoint["stage"] == kind and checkpoint["format"] == 6
    written = "merged.json merged.pt merged.pt2 subnet.csv subnet.front subnet.json subnet.pt"
    written += " subnet.search.csv supernet.csv supernet.pt"
    assert sorted(os.listdir(runs)) == written.split()


def test_spec_is_what_a_person_expects(runs):
    spec = json.loads((runs / "subnet.json").read_text())
    supernet = blocks.read_checkpoint(runs / "supernet.pt")
    keys = "format model model_args input_size prune baseline merged search flags"
    assert set(spec) == set(keys.split())
    assert set(spec["search"]) == {"loss", "top1", "generation", "evaluated", "optimum"}
    assert spec["input_size"] == [3, 32, 32]
    names = list(blocks.prunable_blocks(blocks.build(supernet)))
    assert list(spec["prune"]) == [name for name in names if name in spec["prune"]]  # in order
    merged, _ = load(runs / "merged.pt")
    assert spec["merged"] == cost(merged, spec["input_size"])
    assert spec["baseline"] == cost(blocks.build(supernet, baseline=True), spec["input_size"])
    share = {key: spec["merged"][key] / spec["baseline"][key] for key in ("macs", "params")}
    kept = {
        "test_resnet": len(spec["prune"]) == 2,
        "test_vit": len(spec["prune"]) == 3,
        "mobilenetv2_035": share["macs"] <= 0.9,
        "test_convnext": share["params"] <= 0.8,
    }
    assert kept[spec["model"]]


def test_merged_predicts_what_the_subnet_predicts(runs):
    (subnet, spec), (merged, merged_spec) = load(runs / "subnet.pt"), load(runs / "merged.pt")
    assert merged_spec["prune"] == spec["prune"]
    written = json.loads((runs / "subnet.json").read_text())["prune"]  # a list, or with rungs
    assert list(spec["prune"]) == list(written)
    if isinstance(written, dict):
        assert spec["prune"] == written
    assert not subnet.training and not merged.training
    images = validation(spec)  # of the subnet: a merged network does not know its images
    with torch.no_grad():
        for batch, _ in images:
            a, b = subnet(batch), merged(batch)
            assert torch.equal(a.argmax(1), b.argmax(1)) and (a - b).abs().max() <= 1e-4 * a.std()
    assert evaluate(merged, images)["top1"] == spec["subnet"]["top1"]


@pytest.mark.parametrize("runs", ["test_convnext", "test_vit"], indirect=True)
def test_pruning_without_training(own_runs):
    """All blocks, in any order in the spec: the fit comes closer to the baseline's logits than
    leaving the blocks out, is the same each time and merges."""
    checkpoint = blocks.read_checkpoint("runs/supernet.pt")
    names = list(blocks.prunable_blocks(blocks.build(checkpoint)))
    write_spec(own_runs / "subnet.json", names[::-1], checkpoint["model"])
    baseline, images = blocks.build(checkpoint, baseline=True), validation(checkpoint)

    def difference(flags):
        assert stage(f"3_progressive.py {flags}") is None
        model, subnet = load("runs/subnet.pt")
        assert list(subnet["prune"]) == names
        ends = [block.end_act is not None for block in blocks.prunable_blocks(model).values()]
        trained_convs = subnet["flags"]["epochs"] == 1 and checkpoint["model"] == "test_convnext"
        assert ends == [trained_convs] * len(names)
        with torch.no_grad():
            return torch.cat([model(batch) - baseline(batch) for batch, _ in images])

    difference("--epochs 1")
    skips, fit, again = (difference(f"--epochs 0 {flags}") for flags in ("--calibrate 0", "", ""))
    assert fit.norm() < 0.9 * skips.norm() and torch.equal(fit, again)
    assert stage("4_merge.py --batch-size 2") is None


@pytest.mark.parametrize("runs", ["test_vit"], indirect=True)
def test_attention_pruned_too(own_runs):
    """--attention in stage 1 is all that it takes."""
    checkpoint = blocks.read_checkpoint("runs/supernet.pt")
    torch.save(checkpoint["baseline_state_dict"], "vit.pth")
    first = f"1_supernet.py --data-dir {checkpoint['data']['data_dir']} --img-size 32 --attention"
    assert stage(f"{first} --model test_vit --checkpoint vit.pth --epochs 0") is None
    assert stage("2_search.py --macs 0.9 --population 4 --generations 2") is None
    write_spec(own_runs / "subnet.json", ["blocks.0.attn", "blocks.1", "blocks.1.attn"], "test_vit")
    assert stage("3_progressive.py --epochs 1") is None
    assert stage("4_merge.py --batch-size 2") is None
    (subnet, spec), (merged, _) = load("runs/subnet.pt"), load("runs/merged.pt")
    assert list(spec["prune"]) == ["blocks.0.attn", "blocks.1.attn", "blocks.1"]
    images = validation(spec)[0][0]
    torch.testing.assert_close(merged(images), subnet(images), rtol=0, atol=1e-4)
    said = stage(f"{first} --model test_resnet")
    assert said == "error: ResNet has no attention that could be pruned: leave out --attention"


@one_network
def test_a_spec_that_prunes_nothing(own_runs):
    """It is the baseline, trained on."""
    write_spec(own_runs / "subnet.json", [])
    assert stage("3_progressive.py --epochs 1") is None
    (model, subnet), supernet = load("runs/subnet.pt"), blocks.read_checkpoint("runs/supernet.pt")
    assert subnet["prune"] == {}
    for name, value in model.named_parameters():
        before = supernet["baseline_state_dict"].get(name)
        assert before is None or not torch.equal(value, before)
    assert stage("4_merge.py --batch-size 2") is None


def test_supernet_keeps_the_baseline_as_it_was(runs):
    checkpoint = blocks.read_checkpoint(runs / "supernet.pt")
    model = timm.create_model(checkpoint["model"], **checkpoint["model_args"])
    model.load_state_dict(checkpoint["baseline_state_dict"])  # strict: timm's own keys, no more
    measured = evaluate(model, validation(checkpoint))
    assert measured["top1"] == checkpoint["baseline"]["top1"]
    assert measured["loss"] == pytest.approx(checkpoint["baseline"]["loss"], rel=1e-4)
    data = checkpoint["data"]
    assert len(data["holdout"]) == 20 and data["train_images"] == 200 and len(data["classes"]) == 10


ALONE = """
import json, sys, torch
sys.modules["blocks"] = sys.modules["timm"] = None  # importing them would fail
files = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=files).module()
images, expected = torch.load("io.pt", weights_only=True)
for batch in (images, images[:1]):
    bound = 1e-4 * expected.std().item()
    torch.testing.assert_close(program(batch), expected[: len(batch)], rtol=0, atol=bound)
print(json.loads(files["about.json"])["model"])
"""


@pytest.mark.parametrize("runs", ["test_vit"], indirect=True)
def test_export_runs_without_this_repository(runs, tmp_path):
    merged, spec = load(runs / "merged.pt")
    subnet = blocks.read_checkpoint(runs / "subnet.pt")
    images = torch.cat([images for images, _ in validation(subnet)])[:7]
    with torch.no_grad():
        torch.save((images, merged(images)), tmp_path / "io.pt")
    done = shell(f"-I -c {shlex.quote(ALONE)} {runs}/merged.pt2", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == spec["model"]


@pytest.mark.parametrize("runs", ["test_vit"], indirect=True)
def test_exports_that_normalise_and_the_table_as_a_file(own_runs, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert stage("4_merge.py --batch-size 1 3 --fold-normalization --onnx") is None
    printed = capsys.readouterr().out.splitlines()
    merged, spec = load("runs/merged.pt")
    files = {"about.json": ""}
    program = torch.export.load("runs/merged.pt2", extra_files=files).module()
    about = json.loads(files["about.json"])
    assert about["mean"] == [0, 0, 0] and about["std"] == [1, 1, 1] and spec["std"] != [1, 1, 1]
    session = onnxruntime.InferenceSession("runs/merged.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["about"]) == about
    mean, std = (torch.tensor(spec[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for images in (torch.rand(5, *spec["input_size"]), torch.rand(1, *spec["input_size"])):
        with torch.no_grad():
            expected = merged((images - mean) / std)
        onnx = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        for logits in (program(images), onnx):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.std().item())

    table = json.loads((own_runs / "merged.json").read_text())
    assert table["model"] == spec["model"] and table["prune"] == spec["prune"]
    rows, networks = table["rows"], ("baseline", "baseline, BN folded", "merged")
    order = [(name, batch) for batch in (1, 3) for name in networks]
    assert [(row["network"], row["batch"]) for row in rows] == order
    assert [line.split("  ")[0] for line in printed[-8:-2]] == [name for name, _ in order]
    assert all(row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] for row in rows)
    assert rows[1]["speed_up"] == 1
    assert (rows[0]["memory"] is None) == (not torch.cuda.is_available())
    assert rows[2]["top1"] == blocks.read_checkpoint("runs/subnet.pt")["subnet"]["top1"]
    costs = {key: rows[2][key] for key in ("params", "macs")}
    assert costs == cost(merged, spec["input_size"])


@one_network
def test_compile_without_a_compiler(own_runs, pictures, monkeypatch):
    reason = "InvalidCxxCompiler: No working C++ compiler found"

    def fails(*args, **kwargs):
        raise RuntimeError(f"{reason}\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fails)
    first = f"1_supernet.py --data-dir {pictures} --img-size 32"
    for line in (first, "3_progressive.py", "4_merge.py"):
        said = stage(f"{line} --compile --out new/out.pt")
        assert said == f"error: --compile does not work here: {reason}"
    assert os.listdir() == ["runs"]


@one_network
def test_plots(own_runs):
    pytest.importorskip("matplotlib")
    search = "2_search.py --macs 0.8 0.6 --population 6 --generations 2"
    assert stage(f"{search} --out new/a.json --plot") is None
    third = "3_progressive.py --epochs 1 --subnet new/a-0.6.json"
    assert stage(f"{third} --out new/b.pt --control --plot") is None
    for name in ("a.search.png", "b.png"):
        with Image.open(f"new/{name}") as image:
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert len(colours) > 50
    assert not [name for name in os.listdir("new") if ".tmp" in name]
    assert blocks.read_checkpoint("new/b.pt")["control"]["top1"] >= 0


def without_packages(monkeypatch, text):
    """As if no package with `text` in its name were installed."""
    find = importlib.util.find_spec
    missing = lambda name, *more: None if text in name else find(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", missing)


@pytest.mark.parametrize("script", ["2_search.py", "3_progressive.py"])
def test_a_plot_needs_one_more_package(monkeypatch, script):
    without_packages(monkeypatch, "matplotlib")
    said = stage(f"{script} --plot")
    assert said == "error: --plot needs one more package: pip install matplotlib"


@one_network
def test_onnx_needs_more_packages(own_runs, monkeypatch):
    without_packages(monkeypatch, "onnx")
    said = stage("4_merge.py --onnx --out new/merged.pt")
    assert said == "error: --onnx needs more packages: pip install onnx onnxscript"
    assert os.listdir() == ["runs"]


@pytest.mark.parametrize("runs", ["test_resnet", "test_vit"], indirect=True)
def test_a_dry_run_needs_no_images(own_runs, capsys):
    """It prints what the blocks cost and the ranges that budgets may be from, which are right."""
    search = "2_search.py --data-dir nowhere --out new/x.json"
    assert stage(f"{search} --dry-run") is None
    printed = capsys.readouterr().out
    model, checkpoint = load("runs/supernet.pt")
    ladders = {name: block.rungs for name, block in blocks.prunable_blocks(model).items()}
    assert all(name in printed for name in ladders) and os.listdir() == ["runs"]
    text = re.search(r"--prune 1 to (\d+), --params (\S+) to \S+, --macs (\S+) to 1.0000", printed)
    assert int(text[1]) == len(ladders)
    blocks.set_subnet(model, {name: rungs[-1] for name, rungs in ladders.items()})
    least = cost(blocks.merge(model), checkpoint["data"]["input_size"])
    for kind, share in (("params", text[2]), ("macs", text[3])):
        assert abs(least[kind] / checkpoint["baseline"][kind] - float(share)) < 1e-4
        said = stage(f"{search} --{kind} {float(share) - 2e-3}")
        assert said.startswith(f"error: --{kind} ") and share[:5] in said


@one_network
def test_search_is_reproducible_and_a_spec_can_be_written_by_hand(own_runs):
    found = []
    for _ in range(2):
        assert stage("2_search.py --population 3 --generations 2 --prune 1 --out a.json") is None
        found.append(open("a.json").read())
    assert found[0] == found[1]
    write_spec(own_runs / "subnet.json", ["layer4.0"])
    for flags in ("--epochs 0", "--epochs 1 --transition 0 --distill 0 --opt sgd"):
        assert stage(f"3_progressive.py {flags}") is None
        assert load("runs/subnet.pt")[1]["prune"] == {"layer4.0": "dense"}


def test_weights_can_be_brought_along(pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=10, img_size=32).state_dict()
    torch.save(theirs, "vit.pth")
    first = "1_supernet.py --model test_vit --checkpoint vit.pth --epochs 0 --img-size 32"
    assert stage(f"{first} --data-dir {pictures}") is None
    ours = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("several_names", [False, True])
def test_a_data_set_of_another_kind(pictures, monkeypatch, tmp_path, several_names):
    """Also one whose classes have several names, as torchvision's ImageNet has them."""
    from torchvision.datasets import ImageFolder

    monkeypatch.chdir(tmp_path)
    if several_names:
        numbers = {f"n{i}": i for i in range(10)}
        monkeypatch.setattr(ImageFolder, "wnid_to_idx", numbers, raising=False)
    first = f"1_supernet.py --model test_resnet --dataset torch/image_folder --data-dir {pictures}"
    assert stage(f"{first} --img-size 32 --baseline-epochs 0 --epochs 0") is None
    classes = blocks.read_checkpoint("runs/supernet.pt")["data"]["classes"]
    if several_names:
        assert classes == list(numbers)
    else:
        assert classes == sorted(os.listdir(pictures / "train"))
        assert stage("2_search.py --population 2 --generations 1") is None


def test_form_and_end_activation(pictures, monkeypatch, tmp_path, capsys):
    """The paper's form is trained, the fitted one prunes without training. As long as some
    inverted residual stays, there are no end activations unless asked for."""
    monkeypatch.chdir(tmp_path)
    first = f"1_supernet.py --model mnasnet_small --data-dir {pictures} --img-size 32 --calibrate 0"
    assert stage(f"{first} --baseline-epochs 0 --epochs 0") is None
    names = list(blocks.prunable_blocks(load("runs/supernet.pt")[0]))[:-1]
    write_spec(tmp_path / "some.json", names, "mnasnet_small")
    for flags, form, end_act in (
        ("--form fitted --epochs 1", "fitted", False),
        ("--epochs 1", "reparam", False),  # stage 1's
        ("--epochs 1 --end-act", "reparam", True),
        ("--epochs 0", "fitted", False),
    ):
        assert stage(f"3_progressive.py --subnet some.json --calibrate 64 {flags}") is None
        model, checkpoint = load("runs/subnet.pt")
        assert checkpoint["form"] == form
        for block in map(model.get_submodule, names):
            assert block.lam == 1 and (block.end_act is None) == (not end_act)
            own_layers = form == "reparam" and not block.why_not_reparam(block)
            assert (block.rung in block.fitted) == (not own_layers)
        said = "of the fitted form: " in capsys.readouterr().out
        assert said == (form == "reparam")  # squeeze-excite


@pytest.fixture
def weights_of_more_classes(monkeypatch, tmp_path):
    """Of a network with BN statistics that no folder has."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=12).train()
    for _ in range(5):
        model(torch.randn(16, 3, 32, 32))
    torch.save(model.state_dict(), "weights.pth")
    return model.state_dict()


def test_class_map_and_statistics_that_stay(weights_of_more_classes, pictures, capsys, tmp_path):
    """A network of more classes than the folders have keeps its head, and what pruning does not
    change: with nothing pruned all four stages report the baseline's top-1. Else only statistics
    behind a pruned block move."""
    names = ["zebra", *sorted(os.listdir(pictures / "train"), reverse=True), "aardvark"]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    first = "1_supernet.py --model test_resnet --checkpoint weights.pth --class-map classes.txt"
    first += f" --data-dir {pictures} --img-size 32 --epochs 0 --calibrate 64"
    assert stage(first) is None
    supernet, checkpoint = load("runs/supernet.pt")
    assert checkpoint["data"]["classes"] == names
    _, labels = next(iter(make_loader(checkpoint["data"], "val", 60, CPU)))
    assert set(labels.tolist()) == set(range(1, 11))
    right = checkpoint["baseline"]["top1"], checkpoint["baseline"]["loss"]
    assert checkpoint["supernet"]["top1"] == right[0]
    write_spec(tmp_path / "none.json", [])
    capsys.readouterr()
    assert stage("2_search.py --score none.json") is None
    scored = capsys.readouterr().out.splitlines()
    assert scored[-1].split()[-2:] == scored[-3].split()[-2:]
    third = "3_progressive.py --epochs 0 --calibrate 64"
    assert stage(f"{third} --subnet none.json") is None
    checkpoint = load("runs/subnet.pt")[1]
    assert (checkpoint["subnet"]["top1"], checkpoint["subnet"]["loss"]) == right
    assert stage("4_merge.py") is None
    rows = json.loads((tmp_path / "runs/merged.json").read_text())["rows"]
    assert {row["top1"] for row in rows} == {right[0]}

    write_spec(tmp_path / "some.json", list(blocks.prunable_blocks(supernet))[::2])
    assert stage(f"{third} --subnet some.json") is None
    after = load("runs/subnet.pt")[1]["state_dict"]
    moved = {key for key, value in weights_of_more_classes.items() if (after[key] != value).any()}
    assert moved  # the statistics behind the first pruned block, and how often they were updated
    assert all(key.startswith("layer") and "running" in key or "num_ba" in key for key in moved)


def test_class_maps_that_do_not_fit(weights_of_more_classes, pictures, tmp_path):
    first = f"1_supernet.py --model test_resnet --data-dir {pictures} --class-map"
    (tmp_path / "few.txt").write_text("\n".join(sorted(os.listdir(pictures / "train"))[:4]))
    assert "train has classes that few.txt lacks: " in stage(f"{first} few.txt")
    (tmp_path / "twice.txt").write_text("a\na\n")
    assert "names a class twice" in stage(f"{first} twice.txt")
    assert "does not exist, and timm has none" in stage(f"{first} none.txt")
    assert "weights.pth is not a text file" in stage(f"{first} weights.pth")
    said = stage("1_supernet.py --class-map few.txt")
    assert "is for the class folders of --data-dir" in said and not os.path.exists("data")


def test_schedule_of_lam():
    lam_at = importlib.import_module("3_progressive").lam_at
    lams = [lam_at(step, 100, 0.5) for step in range(100)]
    assert 0 < lams[0] < 0.1 and lams == sorted(lams) and lams[48] < 1 and lams[49:] == [1.0] * 51
    assert lam_at(0, 100, 0) == 1.0 and lam_at(99, 100, 1) == 1.0 and lam_at(0, 0, 0.5) == 1.0


def test_drawn_pictures_are_not_linear(supernet_script, tmp_path):
    """The best of some linear classifiers, solved in closed form, gets less than 20 % right."""
    supernet_script.draw_shapes(str(tmp_path / "shapes"))

    def read(part):
        dataset = timm.data.create_dataset("", tmp_path / "shapes" / part)
        images, labels = zip(*(blocks.read_image(dataset, i) for i in range(len(dataset))))
        pixels = torch.tensor(np.stack(images)).flatten(1).double() / 127.5 - 1
        return torch.cat([pixels, torch.ones(len(pixels), 1)], 1), torch.tensor(labels)

    (x, y), (val_x, val_y) = read("train"), read("val")
    inner, val_inner = x @ x.T, val_x @ x.T  # smaller than x.T @ x

    def right(ridge):
        weights = torch.linalg.solve(inner + ridge * torch.eye(len(x)), torch.eye(10).double()[y])
        return ((val_inner @ weights).argmax(1) == val_y).double().mean().item()

    best = max(map(right, (10, 1000, 100000)))
    print(f"linear classifier: {best:.3f}")
    assert best < 0.2


def test_an_unfinished_file_does_not_replace_a_finished_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), blocks.atomic_write(path) as temporary:
        open(temporary, "w").write("new, half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ---- bad input -----------------------------------------------------------------------------------


def write_images(root, classes, corrupt=False):
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(12):
                image = Image.effect_noise((32, 32), 50).convert("RGB")
                image.save(root / split / name / f"{i}.png")
    if corrupt:
        path = root / "train" / classes[0] / "3.png"
        path.write_bytes(path.read_bytes()[:200])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


BAD_FIRST = {  # flags of stage 1, and what the error has to say
    "no data": ("--data-dir nowhere", "nowhere/train"),
    "no images": ("--data-dir empty", "images"),
    "one class": ("--data-dir single", "one class only (a)"),
    "corrupt image": ("--data-dir corrupt", "3.png"),
    "class only in val": ("--data-dir odd", "val has classes that train lacks: c"),
    "unknown model": ("--model resnet43", "timm cannot build resnet43"),
    "unknown weights": ("--model resnet18.foo", "resnet18"),
    "grey images": ("--model-kwargs in_chans=1", "the stages give a network RGB images only"),
    "no prunable block": ("--model regnetx_002", "has no prunable block"),
    "unknown model argument": ("--model-kwargs depht=3", "depht"),
    "other number of classes": ("--model-kwargs num_classes=7", "num_classes=7, but there are 10"),
    "size that does not fit": ("--model test_vit --img-size 33", "33"),
    "no weights file": ("--checkpoint none.pth", "none.pth does not exist"),
    "weights of another model": (
        "--checkpoint other.pth",
        "does not fit test_resnet with 10 classes; is it of another --model?",
    ),
    "not a checkpoint": ("--checkpoint text.txt", "does not fit"),
    "an optimiser's state": ("--checkpoint numbers.pth", "does not fit test_resnet"),
    "unknown device": ("--device gpu", "--device gpu"),
    "folder as output": ("--out single", "cannot write single"),
    "folder to come as output": ("--out new/", "cannot write new/"),
    "file as the output's folder": ("--out text.txt/net.pt", "cannot write text.txt/net.pt"),
    "code in the weights": ("--checkpoint evil.pth", "does not fit test_resnet"),
    "weights that are not finite": (
        "--checkpoint nan.pth",
        "not all weights of nan.pth are finite",
    ),
    "several feature maps": (
        "--model crossvit_9_240 --img-size 240",
        "features are not one tensor",
    ),
    "no classifier": ("--model-kwargs features_only=True", "does not classify"),
    "output is an input": ("--checkpoint out.pt", "--out out.pt is an input, too"),
    "weights among the arguments": (
        "--model-kwargs pretrained=True",
        "pretrained among the arguments",
    ),
    "unknown data set": ("--dataset torch/nothing", "nothing"),
    "a data set's class only in val": (
        "--dataset torch/image_folder --data-dir odd",
        "val has other classes than train",
    ),
}


@pytest.fixture(scope="module")
def bad_first(tmp_path_factory):
    """A folder with what BAD_FIRST names."""
    folder = tmp_path_factory.mktemp("bad")
    write_images(folder / "single", ["a"])
    write_images(folder / "corrupt", ["a", "b"], corrupt=True)
    write_images(folder / "odd", ["a", "b"])
    (folder / "odd/val/b").rename(folder / "odd/val/c")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (folder / "empty" / name).mkdir(parents=True)
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    torch.save(Evil(), folder / "evil.pth")
    torch.save({"state": {0: torch.zeros(1)}}, folder / "numbers.pth")
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    weights["fc.bias"][3] = float("nan")
    torch.save(weights, folder / "nan.pth")
    (folder / "text.txt").write_text("no weights")
    (folder / "out.pt").write_text("old")
    return folder


def assert_one_line(said, text):
    assert isinstance(said, str) and said.startswith("error: ") and text in said
    assert "\n" not in said


@pytest.mark.parametrize("kind", BAD_FIRST)
def test_bad_input_to_the_first_stage(kind, bad_first, pictures, monkeypatch):
    monkeypatch.chdir(bad_first)
    files, (flags, text) = sorted(os.listdir()), BAD_FIRST[kind]
    first = f"1_supernet.py --model test_resnet --data-dir {pictures} --img-size 32"
    assert_one_line(stage(f"{first} --baseline-epochs 1 --out out.pt {flags}"), text)
    assert open("out.pt").read() == "old" and sorted(os.listdir()) == files


BAD_LATER = {  # stage and flags, and what the error has to say
    "no supernet": ("2_search.py --supernet none.pt", "none.pt does not exist"),
    "code in a supernet": (
        "2_search.py --supernet evil.pt",
        "evil.pt is damaged or is not a checkpoint",
    ),
    "weights of another file": (
        "2_search.py --supernet args.pt",
        "checkpoint_path among the arguments",
    ),
    "weights from elsewhere": (
        "2_search.py --supernet args2.pt",
        "pretrained_cfg among the arguments",
    ),
    "weights that are not finite": (
        "2_search.py --supernet nan.pt",
        "not all weights of this supernet are finite",
    ),
    "nested without end": ("3_progressive.py --subnet deep.json", "is not JSON like"),
    "output is the supernet": ("3_progressive.py --supernet out", "--out out is an input, too"),
    "output is the subnet": ("4_merge.py --subnet out", "--out out is an input, too"),
    "table over the network": ("4_merge.py --out out.json", "must be different files"),
    "table over the subnet": (
        "4_merge.py --subnet out.json --out out.pt",
        "must be different files",
    ),
    "export over the subnet": ("4_merge.py --subnet ./out.pt2", "must be different files"),
    "export over the network": ("4_merge.py --out out.pt2", "must be different files"),
    "ONNX over the network": ("4_merge.py --onnx --out out.onnx", "must be different files"),
    "swapped labels": ("2_search.py --data-dir swapped", "or other names or labels"),
    "truncated supernet": ("2_search.py --supernet half.pt", "half.pt is damaged"),
    "other stage's file": (
        "2_search.py --supernet runs/subnet.pt",
        "holds: subnet. This needs: supernet",
    ),
    "too many blocks": ("2_search.py --prune 5", "1 to 4 blocks"),
    "no block": ("2_search.py --prune 0", "1 to 4 blocks"),
    "budget too small": ("2_search.py --macs 0.1", "merged subnets have 0."),
    "parameters too few": ("2_search.py --params 0.1", "merged subnets have 0."),
    "more than memory holds": (
        "2_search.py --latency 0.8 --latency-batch 100000000000",
        "memory is full: give a smaller batch size",
    ),
    "data gone": ("2_search.py --data-dir nowhere", "nowhere/train"),
    "other data": ("2_search.py --data-dir few", "but 24, or"),
    "other classes": ("2_search.py --data-dir other", "looking for classes plain cross"),
    "no spec": ("3_progressive.py --subnet none.json", "none.json does not exist"),
    "not JSON": ("3_progressive.py --subnet text.txt", "is not JSON like"),
    "JSON of something else": ("3_progressive.py --subnet list.json", "is not JSON like"),
    "unknown block": (
        "3_progressive.py --subnet block.json",
        "no prunable block layer9.0; this model has layer1.0",
    ),
    "unknown rung": (
        "3_progressive.py --subnet rung.json",
        "layer1.0 cannot be pruned to separable; its rungs are dense, 1x1",
    ),
    "unknown rung to score": (
        "2_search.py --score rung.json",
        "layer1.0 cannot be pruned to separable; its rungs are dense, 1x1",
    ),
    "a rung that is no name": ("3_progressive.py --subnet two.json", "is not JSON like"),
    "a block alone, in no list": ("3_progressive.py --subnet one.json", "is not JSON like"),
    "other model": ("3_progressive.py --subnet model.json", "is for resnet18"),
    "spec of another model to score": ("2_search.py --score model.json", "is for resnet18"),
    "supernet of another version": (
        "2_search.py --supernet old.pt",
        "was written by another version of this project",
    ),
    "subnet of another version": (
        "4_merge.py --subnet old.pt",
        "was written by another version of this project",
    ),
    "no subnet": ("4_merge.py --subnet none.pt", "none.pt does not exist"),
    "supernet instead": (
        "4_merge.py --subnet runs/supernet.pt",
        "holds: supernet. This needs: subnet",
    ),
}


@pytest.fixture(scope="module")
def bad_later(runs, tmp_path_factory):
    """A folder with what BAD_LATER names, and a copy of `runs`."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(runs, folder / "runs")
    (folder / "half.pt").write_bytes((runs / "supernet.pt").read_bytes()[:100000])
    supernet = blocks.read_checkpoint(runs / "supernet.pt")
    torch.save({**supernet, "format": 1}, folder / "old.pt")
    (folder / "text.txt").write_text("{no JSON")
    (folder / "deep.json").write_text("[" * 200000)
    torch.save(Evil(), folder / "evil.pt")
    elsewhere = {"pretrained": True, "pretrained_cfg": {"file": "evil.pt"}}
    for name, more in (("args.pt", {"checkpoint_path": "evil.pt"}), ("args2.pt", elsewhere)):
        model_args = {**supernet["model_args"], **more}
        torch.save({**supernet, "model_args": model_args}, folder / name)
    swapped = folder / "swapped/train"
    shutil.copytree(supernet["data"]["data_dir"], folder / "swapped")
    (swapped / "plain disc").rename(swapped / "x")
    (swapped / "plain ring").rename(swapped / "plain disc")
    (swapped / "x").rename(swapped / "plain ring")
    next(iter(supernet["state_dict"].values()))[0] = float("nan")
    torch.save(supernet, folder / "nan.pt")
    (folder / "list.json").write_text("[1]")
    write_spec(folder / "block.json", ["layer9.0"])
    write_spec(folder / "rung.json", {"layer1.0": "separable"})
    write_spec(folder / "two.json", {"layer1.0": 2})
    write_spec(folder / "one.json", "layer1.0")
    write_spec(folder / "model.json", ["layer1.0"], "resnet18")
    write_images(folder / "few", ["plain cross", "plain disc"])
    write_images(folder / "other", ["a", "b"])
    (folder / "out").write_text("old")
    return folder


@one_network
@pytest.mark.parametrize("kind", BAD_LATER)
def test_bad_input_to_later_stages(kind, bad_later, monkeypatch):
    monkeypatch.chdir(bad_later)
    files, (line, text) = sorted(os.listdir()), BAD_LATER[kind]
    script, *flags = shlex.split(line)
    assert_one_line(stage(f"{script} --out out", *flags), text)
    assert open("out").read() == "old" and sorted(os.listdir()) == files


def test_every_image_is_read_before_the_training(pictures, monkeypatch, tmp_path):
    """Also those that are held back, which only stage 2 uses."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "data")
    held = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20]
    path = timm.data.create_dataset("", "data/train").reader.samples[held[7]][0]
    os.truncate(path, 200)
    first = "1_supernet.py --model test_resnet --data-dir data --img-size 32"
    said = stage(f"{first} --baseline-epochs 0 --epochs 0")
    assert said.startswith(f"error: cannot read image {tmp_path / path}")
    assert os.listdir() == ["data"]


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    image, label = blocks.read_image(timm.data.create_dataset("", tmp_path), 0)
    assert image.mode == "RGB" and label == 0
    assert abs(np.asarray(image)[..., 0] - pixels / 257).max() < 1


def test_two_first_runs_draw_the_same_pictures(supernet_script, monkeypatch, tmp_path):
    root, isdir = str(tmp_path / "shapes"), os.path.isdir
    for _ in range(2):
        supernet_script.draw_shapes(root, train=20, val=10)
        unseen = lambda path: path != root and isdir(path)
        monkeypatch.setattr(os.path, "isdir", unseen)  # by the second run
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["shapes"]
    assert len(list((tmp_path / "shapes").glob("*/*/*.png"))) == 30


def test_a_full_disk_is_an_error_and_leaves_nothing(monkeypatch, tmp_path):
    def full(content, path):
        with open(path, "w") as file:
            file.write("half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*net.pt: unexpected pos"):
        blocks.save({"stage": "subnet"}, str(tmp_path / "net.pt"))
    assert os.listdir(tmp_path) == []


def test_the_check_of_a_merged_network():
    check = importlib.import_module("4_merge").check
    ours, batches = torch.nn.Linear(3, 2).double(), [(torch.randn(4, 3), None) for _ in range(3)]
    for value in (float("nan"), float("inf"), 1.0):
        calls = iter((0.0, value, 0.0))
        with pytest.raises(UserError, match="they differ, nothing was written"):
            check("a against b", ours, lambda images: ours(images) + next(calls), batches, 1e-4)
    error = check("a against b", ours, lambda images: ours(images) + 1, batches, 1e-4, 0.51)
    assert error == pytest.approx(1)


@pytest.mark.parametrize("script", ["1_supernet", "2_search", "3_progressive", "4_merge"])
def test_help_can_be_printed_anywhere(script, capsys):
    """Also on a terminal that is not UTF-8."""
    assert stage(f"{script}.py --help") == 0
    assert capsys.readouterr().out.isascii()


@one_network
def test_from_a_shell(own_runs, tmp_path):
    """A line per epoch, into a file nothing is drawn over, and the output need not be UTF-8."""
    done = shell(f"{ROOT}/3_progressive.py --epochs 2", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("subnet ") and "top-1" in line for line in lines) == 2


def test_from_a_shell_an_error_is_one_line(tmp_path):
    write_images(tmp_path / "corrupt", ["a", "b"], corrupt=True)
    flags = "--model test_resnet --data-dir corrupt --img-size 32 --workers 2"
    done = shell(f"{ROOT}/1_supernet.py {flags}", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: cannot read image ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout and os.listdir(tmp_path) == ["corrupt"]


def test_weights_that_cannot_be_downloaded(pictures, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = stage(f"1_supernet.py --model test_resnet --pretrained --data-dir {pictures}")
    assert_one_line(said, "error: cannot get timm's weights")
    assert said.endswith("--checkpoint FILE")
    assert not capsys.readouterr().err and not caplog.messages


@pytest.mark.parametrize(
    "line",
    [
        "2_search.py --prune 2 --macs 0.5",
        "2_search.py --macs 1.5",
        "3_progressive.py --transition 2",
        "3_progressive.py --batch-size 0",
        "1_supernet.py --opt adamz",
        "1_supernet.py --model-kwargs patch_size",
        "4_merge.py --nonsense",
    ],
)
def test_bad_flags(line):
    assert stage(line) == 2


def test_a_user_error_can_be_caught_in_a_notebook(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        blocks.read_checkpoint(tmp_path / "none.pt")
