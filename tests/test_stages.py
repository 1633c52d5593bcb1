"""The four stages, run from a shell as a person would, on small pictures and small networks of each
family."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from PIL import Image
from conftest import ROOT, load, one_network, run_stage, stage

import blocks
from blocks import UserError, cost, evaluate, make_loader


def validation(checkpoint):
    return list(make_loader(checkpoint["data"], "val", 16, torch.device("cpu")))


def test_checkpoints_hold_tensors_and_plain_values(runs):
    files = {"about.json": ""}
    torch.export.load(runs / "merged.pt2", extra_files=files)
    shipped = torch.load(runs / "merged.pt", weights_only=True)
    for about in (
        files["about.json"],
        str({key: shipped[key] for key in shipped.keys() - {"state_dict"}}),
    ):
        assert "/" not in about and shipped["model"] in about  # no folder of this machine
    for name, kind in (
        ("supernet.pt", "supernet"),
        ("subnet.pt", "subnet"),
        ("merged.pt", "merged"),
    ):
        checkpoint = torch.load(runs / name, weights_only=True)
        assert checkpoint["stage"] == kind and checkpoint["format"] == 5
    assert sorted(os.listdir(runs)) == [
        "merged.pt",
        "merged.pt2",
        "subnet.csv",
        "subnet.front",
        "subnet.json",
        "subnet.pt",
        "subnet.search.csv",
        "supernet.csv",
        "supernet.pt",
    ]


def test_spec_is_what_a_person_expects(runs):
    spec, supernet = (
        json.loads((runs / "subnet.json").read_text()),
        blocks.read_checkpoint(runs / "supernet.pt"),
    )
    assert set(spec) == {
        "format",
        "model",
        "model_args",
        "input_size",
        "prune",
        "baseline",
        "merged",
        "search",
        "flags",
    }
    assert set(spec["search"]) == {"loss", "top1", "generation", "evaluated", "optimum"}
    assert spec["input_size"] == [3, 32, 32]
    names = list(blocks.prunable_blocks(blocks.build(supernet)))
    assert list(spec["prune"]) == [name for name in names if name in spec["prune"]]  # in order
    merged, _ = load(runs / "merged.pt")
    assert spec["merged"] == cost(merged, spec["input_size"])
    assert spec["baseline"] == cost(blocks.build(supernet, baseline=True), spec["input_size"])
    kind = spec["model"]
    assert {
        "test_resnet": len(spec["prune"]) == 2,
        "test_vit": len(spec["prune"]) == 3,
        "mobilenetv2_035": spec["merged"]["macs"] <= 0.9 * spec["baseline"]["macs"],
        "test_convnext": spec["merged"]["params"] <= 0.8 * spec["baseline"]["params"],
    }[kind]


def test_merged_predicts_what_the_subnet_predicts(runs):
    (subnet, spec), (merged, merged_spec) = load(runs / "subnet.pt"), load(runs / "merged.pt")
    assert merged_spec["prune"] == spec["prune"]
    written = json.loads((runs / "subnet.json").read_text())["prune"]  # a list, or with rungs
    assert list(spec["prune"]) == list(written)
    if isinstance(written, dict):
        assert spec["prune"] == written
    assert not subnet.training and not merged.training
    with torch.no_grad():
        for images, _ in validation(
            spec
        ):  # of the subnet: a merged network does not know its images
            a, b = subnet(images), merged(images)
            assert torch.equal(a.argmax(1), b.argmax(1)) and (a - b).abs().max() <= 1e-4 * a.std()
    assert evaluate(merged, validation(spec))["top1"] == spec["subnet"]["top1"]


@pytest.mark.parametrize("runs", ["test_convnext", "test_vit"], indirect=True)
def test_pruning_without_training(runs, monkeypatch, tmp_path):
    """All blocks, in any order in the spec: the fit comes closer to the baseline's logits than
    leaving the blocks out, is the same each time and merges."""
    checkpoint = blocks.read_checkpoint(runs / "supernet.pt")
    names = list(blocks.prunable_blocks(blocks.build(checkpoint)))
    spec = {"format": 1, "model": checkpoint["model"], "prune": names[::-1]}
    (tmp_path / "some.json").write_text(json.dumps(spec))
    baseline, logits = blocks.build(checkpoint, baseline=True), {}
    for name, flags in (
        ("skips", ["--calibrate", 0]),
        ("fit", []),
        ("again", []),
        ("trained", ["--epochs", 1]),
    ):
        assert (
            stage(
                monkeypatch,
                "3_progressive.py",
                "--supernet",
                runs / "supernet.pt",
                "--subnet",
                tmp_path / "some.json",
                "--epochs",
                0,
                "--workers",
                0,
                *flags,
                "--out",
                tmp_path / f"{name}.pt",
            )
            is None
        )
        model, spec = load(tmp_path / f"{name}.pt")
        assert list(spec["prune"]) == names
        ends = [
            isinstance(block.end_act, torch.nn.Module)
            for block in blocks.prunable_blocks(model).values()
        ]
        assert ends == [name == "trained" and checkpoint["model"] == "test_convnext"] * len(names)
        with torch.no_grad():
            logits[name] = torch.cat(
                [model(images) - baseline(images) for images, _ in validation(checkpoint)]
            )
    assert logits["fit"].norm() < 0.9 * logits["skips"].norm() and torch.equal(
        logits["fit"], logits["again"]
    )
    assert (
        stage(
            monkeypatch,
            "4_merge.py",
            "--subnet",
            tmp_path / "fit.pt",
            "--workers",
            0,
            "--batch-size",
            2,
            "--out",
            tmp_path / "merged.pt",
        )
        is None
    )


@pytest.mark.parametrize("runs", ["test_vit"], indirect=True)
def test_attention_pruned_too(runs, monkeypatch, tmp_path, capsys):
    """--attention in stage 1 is all that it takes."""
    monkeypatch.chdir(tmp_path)
    checkpoint = blocks.read_checkpoint(runs / "supernet.pt")
    torch.save(checkpoint["baseline_state_dict"], "vit.pth")
    assert (
        stage(
            monkeypatch,
            "1_supernet.py",
            "--model",
            "test_vit",
            "--checkpoint",
            "vit.pth",
            "--img-size",
            32,
            "--attention",
            "--data-dir",
            checkpoint["data"]["data_dir"],
            "--epochs",
            0,
            "--workers",
            0,
        )
        is None
    )
    assert (
        stage(
            monkeypatch,
            "2_search.py",
            "--macs",
            0.9,
            "--population",
            4,
            "--generations",
            2,
            "--workers",
            0,
        )
        is None
    )
    (tmp_path / "runs/subnet.json").write_text(
        json.dumps(
            {
                "format": 1,
                "model": "test_vit",
                "prune": ["blocks.0.attn", "blocks.1", "blocks.1.attn"],
            }
        )
    )
    assert stage(monkeypatch, "3_progressive.py", "--epochs", 1, "--workers", 0) is None
    assert stage(monkeypatch, "4_merge.py", "--workers", 0, "--batch-size", 2) is None
    (subnet, spec), (merged, _) = load("runs/subnet.pt"), load("runs/merged.pt")
    assert list(spec["prune"]) == ["blocks.0.attn", "blocks.1.attn", "blocks.1"]
    images = validation(spec)[0][0]
    torch.testing.assert_close(merged(images), subnet(images), rtol=0, atol=1e-4)
    assert (
        stage(
            monkeypatch,
            "1_supernet.py",
            "--model",
            "test_resnet",
            "--data-dir",
            checkpoint["data"]["data_dir"],
            "--img-size",
            32,
            "--attention",
        )
        == "error: ResNet has no attention that could be pruned: leave out --attention"
    )


@one_network
def test_weights_to_start_from(runs, monkeypatch, tmp_path):
    """From scratch, and a spec that prunes nothing: the baseline trained on."""
    checkpoint = blocks.read_checkpoint(runs / "supernet.pt")
    names = list(blocks.prunable_blocks(blocks.build(checkpoint)))

    def start(out, prune, *flags):
        (tmp_path / "spec.json").write_text(
            json.dumps({"format": 1, "model": checkpoint["model"], "prune": prune})
        )
        assert (
            stage(
                monkeypatch,
                "3_progressive.py",
                "--supernet",
                runs / "supernet.pt",
                "--subnet",
                tmp_path / "spec.json",
                "--workers",
                0,
                *flags,
                "--out",
                tmp_path / out,
            )
            is None
        )
        return dict(load(tmp_path / out)[0].named_parameters())

    stem = next(iter(checkpoint["baseline_state_dict"]))
    chance = [
        start("random.pt", names, "--epochs", 0, "--start", "random", "--seed", seed)[stem]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(chance[0], chance[1]) and not torch.equal(chance[0], chance[2])
    assert not torch.equal(chance[0], checkpoint["baseline_state_dict"][stem])
    start("control.pt", [], "--epochs", 1)
    assert load(tmp_path / "control.pt")[1]["prune"] == {}
    assert (
        stage(
            monkeypatch,
            "4_merge.py",
            "--subnet",
            tmp_path / "control.pt",
            "--workers",
            0,
            "--batch-size",
            2,
            "--out",
            tmp_path / "merged.pt",
        )
        is None
    )


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
images, expected = torch.load(sys.argv[2], weights_only=True)
for batch in (images, images[:1]):
    bound = 1e-4 * expected.std().item()
    torch.testing.assert_close(program(batch), expected[: len(batch)], rtol=0, atol=bound)
print(json.loads(files["about.json"])["model"])
"""


def test_export_runs_without_this_repository(runs, tmp_path):
    merged, spec = load(runs / "merged.pt")
    images = torch.cat(
        [images for images, _ in validation(blocks.read_checkpoint(runs / "subnet.pt"))]
    )[:7]
    with torch.no_grad():
        torch.save((images, merged(images)), tmp_path / "io.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(runs / "merged.pt2"), str(tmp_path / "io.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == spec["model"]


@pytest.mark.parametrize("runs", ["test_convnext", "test_vit"], indirect=True)
def test_exports_that_normalise_and_a_table_as_a_file(runs, monkeypatch, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert (
        stage(
            monkeypatch,
            "4_merge.py",
            "--subnet",
            runs / "subnet.pt",
            "--out",
            tmp_path / "merged.pt",
            "--workers",
            0,
            "--batch-size",
            1,
            3,
            "--fold-normalization",
            "--onnx",
            "--json",
            tmp_path / "table.json",
        )
        is None
    )
    merged, spec = load(tmp_path / "merged.pt")
    files = {"about.json": ""}
    program = torch.export.load(tmp_path / "merged.pt2", extra_files=files).module()
    about = json.loads(files["about.json"])
    assert about["mean"] == [0, 0, 0] and about["std"] == [1, 1, 1] and spec["std"] != [1, 1, 1]
    session = onnxruntime.InferenceSession(tmp_path / "merged.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["about"]) == about
    mean, std = (torch.tensor(spec[key]).view(-1, 1, 1) for key in ("mean", "std"))
    for images in (torch.rand(5, *spec["input_size"]), torch.rand(1, *spec["input_size"])):
        with torch.no_grad():
            expected = merged((images - mean) / std)
        for logits in (
            program(images),
            torch.from_numpy(session.run(None, {"images": images.numpy()})[0]),
        ):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.std().item())
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["network"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 3) for name in ("baseline", "baseline, BN folded", "merged")
    ]
    assert all(row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] for row in rows)
    assert rows[1]["speed_up"] == 1 and (rows[0]["memory"] is None) == (
        not torch.cuda.is_available()
    )
    assert rows[2]["top1"] == blocks.read_checkpoint(runs / "subnet.pt")["subnet"]["top1"] and {
        key: rows[2][key] for key in ("params", "macs")
    } == cost(merged, spec["input_size"])


@one_network
def test_compile_without_a_compiler(runs, pictures, monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise RuntimeError(
            "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1"
        )

    monkeypatch.setattr(torch, "compile", fails)
    for script, flags in (
        ("1_supernet.py", ["--data-dir", pictures, "--img-size", 32]),
        (
            "3_progressive.py",
            ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json"],
        ),
        ("4_merge.py", ["--subnet", runs / "subnet.pt"]),
    ):
        said = stage(monkeypatch, script, *flags, "--compile", "--out", tmp_path / "out.pt")
        assert (
            said
            == "error: --compile does not work here: InvalidCxxCompiler:"
            " No working C++ compiler found"
        )
    assert os.listdir(tmp_path) == []


@one_network
def test_plots(runs, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    few = ["--supernet", runs / "supernet.pt", "--workers", 0]
    flags = ["--macs", 0.8, 0.6, "--population", 6, "--generations", 2]
    flags += ["--out", tmp_path / "a.json"]
    assert stage(monkeypatch, "2_search.py", *few, *flags, "--plot") is None
    flags = ["--epochs", 1, "--subnet", tmp_path / "a-0.6.json", "--out", tmp_path / "b.pt"]
    assert stage(monkeypatch, "3_progressive.py", *few, *flags, "--control", "--plot") is None
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert len(colours) > 50 and not list(tmp_path.glob("tmp.*"))
    assert blocks.read_checkpoint(tmp_path / "b.pt")["control"]["top1"] >= 0


@one_network
def test_a_plot_needs_one_more_package(runs, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "matplotlib" else find(name, *a),
    )
    for script in ("2_search.py", "3_progressive.py"):
        said = stage(monkeypatch, script, "--plot", "--out", tmp_path / "x.pt")
        assert said == "error: --plot needs one more package: pip install matplotlib"


def test_a_dry_run_needs_no_images(runs, monkeypatch, tmp_path, capsys):
    """It prints what the blocks cost and the ranges that budgets may be from, which are right."""
    flags = ["--supernet", runs / "supernet.pt", "--data-dir", tmp_path]
    flags += ["--out", tmp_path / "x.json"]
    assert stage(monkeypatch, "2_search.py", *flags, "--dry-run") is None
    printed = capsys.readouterr().out
    model, checkpoint = load(runs / "supernet.pt")
    ladders = {name: block.rungs for name, block in blocks.prunable_blocks(model).items()}
    assert all(name in printed for name in ladders) and not os.listdir(tmp_path)
    text = re.search(r"--prune 1 to (\d+), --params (\S+) to \S+, --macs (\S+) to 1.0000", printed)
    assert int(text[1]) == len(ladders)
    lowest = {name: rungs[-1] for name, rungs in ladders.items()}
    blocks.set_subnet(model, lowest)
    least = cost(blocks.merge(model), checkpoint["data"]["input_size"])
    for kind, share in (("params", text[2]), ("macs", text[3])):
        assert abs(least[kind] / checkpoint["baseline"][kind] - float(share)) < 1e-4
        said = stage(monkeypatch, "2_search.py", *flags, f"--{kind}", float(share) - 2e-3)
        assert said.startswith(f"error: --{kind} ") and share[:5] in said


@one_network
def test_onnx_needs_more_packages(runs, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if "onnx" in name else find(name, *more),
    )
    said = stage(
        monkeypatch,
        "4_merge.py",
        "--subnet",
        runs / "subnet.pt",
        "--out",
        tmp_path / "merged.pt",
        "--onnx",
    )
    assert (
        said == "error: --onnx needs more packages: pip install onnx onnxscript"
        and os.listdir(tmp_path) == []
    )


# ---- in this process: what needs no shell
# --------------------------------------------------------------------------


@one_network
def test_a_wrong_merge_writes_nothing(runs, monkeypatch, tmp_path):
    right = blocks.merge

    def wrong(model):
        merged = right(model)
        next(merged.parameters()).data.add_(1e-6)
        return merged

    monkeypatch.setattr(blocks, "merge", wrong)
    said = stage(
        monkeypatch,
        "4_merge.py",
        "--subnet",
        runs / "subnet.pt",
        "--out",
        tmp_path / "merged.pt",
        "--workers",
        0,
    )
    assert said.startswith("error: merged against unmerged: max abs error") and said.endswith(
        "nothing was written"
    )
    assert os.listdir(tmp_path) == []


@one_network
def test_search_is_reproducible_and_a_spec_can_be_written_by_hand(runs, monkeypatch, tmp_path):
    out = []
    for name in "ab":
        assert (
            stage(
                monkeypatch,
                "2_search.py",
                "--supernet",
                runs / "supernet.pt",
                "--population",
                3,
                "--generations",
                2,
                "--prune",
                1,
                "--workers",
                0,
                "--out",
                tmp_path / name,
            )
            is None
        )
        out.append({**json.loads((tmp_path / name).read_text()), "flags": None})  # --out among them
    assert out[0] == out[1]
    (tmp_path / "mine.json").write_text(
        '{"format": 1, "model": "test_resnet", "prune": ["layer4.0"]}'
    )
    for flags in (
        ["--epochs", 0],
        ["--epochs", 1, "--transition", 0, "--distill", 0, "--opt", "sgd"],
    ):
        assert (
            stage(
                monkeypatch,
                "3_progressive.py",
                "--supernet",
                runs / "supernet.pt",
                "--subnet",
                tmp_path / "mine.json",
                "--out",
                tmp_path / "mine.pt",
                "--workers",
                0,
                *flags,
            )
            is None
        )
        assert load(tmp_path / "mine.pt")[1]["prune"] == {"layer4.0": "dense"}


def test_weights_can_be_brought_along(pictures, monkeypatch, tmp_path):
    torch.manual_seed(3)
    theirs = timm.create_model("test_vit", num_classes=10, img_size=32).state_dict()
    torch.save(theirs, tmp_path / "vit.pth")
    assert (
        stage(
            monkeypatch,
            "1_supernet.py",
            "--model",
            "test_vit",
            "--checkpoint",
            tmp_path / "vit.pth",
            "--epochs",
            0,
            "--data-dir",
            pictures,
            "--img-size",
            32,
            "--workers",
            0,
            "--out",
            tmp_path / "supernet.pt",
        )
        is None
    )
    ours = blocks.read_checkpoint(tmp_path / "supernet.pt")["baseline_state_dict"]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_data_set_of_another_kind(pictures, monkeypatch, tmp_path):
    for script, flags in (
        (
            "1_supernet.py",
            [
                "--model",
                "test_resnet",
                "--dataset",
                "torch/image_folder",
                "--data-dir",
                pictures,
                "--img-size",
                32,
                "--baseline-epochs",
                0,
                "--epochs",
                0,
                "--out",
                tmp_path / "supernet.pt",
            ],
        ),
        (
            "2_search.py",
            [
                "--supernet",
                tmp_path / "supernet.pt",
                "--population",
                2,
                "--generations",
                1,
                "--out",
                tmp_path / "subnet.json",
            ],
        ),
    ):
        assert stage(monkeypatch, script, *flags, "--workers", 0) is None
    assert blocks.read_checkpoint(tmp_path / "supernet.pt")["data"]["classes"][0] == "plain cross"


def test_classes_with_several_names(pictures, monkeypatch, tmp_path):
    """As torchvision's ImageNet has them."""
    from torchvision.datasets import ImageFolder

    monkeypatch.setattr(ImageFolder, "wnid_to_idx", {f"n{i}": i for i in range(10)}, raising=False)
    assert (
        stage(
            monkeypatch,
            "1_supernet.py",
            "--model",
            "test_resnet",
            "--dataset",
            "torch/image_folder",
            "--data-dir",
            pictures,
            "--img-size",
            32,
            "--baseline-epochs",
            0,
            "--epochs",
            0,
            "--workers",
            0,
            "--out",
            tmp_path / "net.pt",
        )
        is None
    )
    assert blocks.read_checkpoint(tmp_path / "net.pt")["data"]["classes"] == [
        f"n{i}" for i in range(10)
    ]


def test_form_and_end_activation(pictures, monkeypatch, tmp_path, capsys):
    """The paper's form is trained, the fitted one prunes without training. As long as some
    inverted residual stays, there are no end activations unless asked for."""
    monkeypatch.chdir(tmp_path)
    assert (
        stage(
            monkeypatch,
            "1_supernet.py",
            "--model",
            "mnasnet_small",
            "--data-dir",
            pictures,
            "--img-size",
            32,
            "--workers",
            0,
            "--calibrate",
            0,
            "--baseline-epochs",
            0,
            "--epochs",
            0,
        )
        is None
    )
    names = list(blocks.prunable_blocks(load("runs/supernet.pt")[0]))[:-1]
    (tmp_path / "some.json").write_text(
        json.dumps({"format": 1, "model": "mnasnet_small", "prune": names})
    )
    flags = ["--subnet", "some.json", "--workers", 0, "--calibrate", 64]
    for form, epochs, end_act in (
        ("fitted", 1, False),
        (None, 1, False),
        (None, 1, True),
        (None, 0, False),
    ):
        more = ["--form", form] if form else []  # None: stage 1's, but only where it is trained
        more += ["--end-act"] * end_act
        assert stage(monkeypatch, "3_progressive.py", *flags, *more, "--epochs", epochs) is None
        model, checkpoint = load("runs/subnet.pt")
        assert checkpoint["form"] == ("reparam" if epochs and not form else "fitted")
        for block in map(model.get_submodule, names):
            assert block.lam == 1 and (block.end_act is None) == (not end_act)
            own = checkpoint["form"] == "reparam" and not block.own_obstacle(block)
            assert (block.pruned is None) == own
        said = "of the fitted form: " in capsys.readouterr().out
        assert said == (checkpoint["form"] == "reparam")  # squeeze-excite


def test_class_map_and_statistics_that_stay(
    pictures, supernet_script, monkeypatch, tmp_path, capsys
):
    """A network of more classes than the folders have keeps its head, and what pruning does not
    change: with nothing pruned all four stages report the baseline's top-1."""
    monkeypatch.chdir(tmp_path)
    folders = sorted(os.listdir(pictures / "train"))
    names = ["zebra", *folders[::-1], "aardvark"]
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=12).train()
    for _ in range(5):
        model(torch.randn(16, 3, 32, 32))  # BN statistics that no folder has
    torch.save(model.state_dict(), "weights.pth")
    flags = ["--model", "mobilenetv2_035", "--checkpoint", "weights.pth", "--data-dir", pictures]
    flags += ["--img-size", 32, "--epochs", 0, "--workers", 0, "--calibrate", 64]
    first = partial(stage, monkeypatch, "1_supernet.py", *flags)
    assert first("--class-map", "classes.txt") is None
    supernet, checkpoint = load("runs/supernet.pt")
    assert checkpoint["data"]["classes"] == names
    labels = blocks.make_loader(checkpoint["data"], "val", 60, torch.device("cpu"))
    assert set(next(iter(labels))[1].tolist()) == set(range(1, 11))
    right = checkpoint["baseline"]["top1"], checkpoint["baseline"]["loss"]
    assert (checkpoint["supernet"]["top1"]) == right[0]
    (tmp_path / "none.json").write_text(
        json.dumps({"format": 1, "model": "mobilenetv2_035", "prune": []})
    )
    capsys.readouterr()
    assert stage(monkeypatch, "2_search.py", "--score", "none.json", "--workers", 0) is None
    scored = capsys.readouterr().out.splitlines()
    assert scored[-1].split()[-2:] == scored[-3].split()[-2:]
    third = ["3_progressive.py", "--epochs", 0, "--workers", 0, "--calibrate", 64]
    assert stage(monkeypatch, *third, "--subnet", "none.json") is None
    checkpoint = load("runs/subnet.pt")[1]
    assert (checkpoint["subnet"]["top1"], checkpoint["subnet"]["loss"]) == right
    assert stage(monkeypatch, "4_merge.py", "--workers", 0, "--json", "table.json") is None
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["top1"] for row in rows} == {right[0]}

    prune = list(blocks.prunable_blocks(supernet))[::2]
    (tmp_path / "some.json").write_text(
        json.dumps({"format": 1, "model": "mobilenetv2_035", "prune": prune})
    )
    assert stage(monkeypatch, *third, "--subnet", "some.json") is None
    after = load("runs/subnet.pt")[1]["state_dict"]
    assert all(torch.equal(after[key], value) for key, value in model.state_dict().items())

    (tmp_path / "classes.txt").write_text("\n".join(names[:4]))
    assert "has folders that are not in classes.txt: " in first("--class-map", "classes.txt")
    (tmp_path / "classes.txt").write_text("a\na\n")
    assert "names a class twice" in first("--class-map", "classes.txt")
    assert "does not exist, and timm has none" in first("--class-map", "none.txt")
    assert "weights.pth is not a text file" in first("--class-map", "weights.pth")
    said = stage(monkeypatch, "1_supernet.py", "--class-map", "classes.txt")
    assert "is for the class folders of --data-dir" in said and not os.path.exists("data")


def test_schedule_of_lam():
    lam_at = importlib.import_module("3_progressive").lam_at
    lams = [lam_at(step, 100, 0.5) for step in range(100)]
    assert 0 < lams[0] < 0.1 and lams == sorted(lams) and lams[48] < 1 and lams[49:] == [1.0] * 51
    assert lam_at(0, 100, 0) == 1.0 and lam_at(99, 100, 1) == 1.0 and lam_at(0, 0, 0.5) == 1.0


def test_drawn_pictures_are_not_linear(supernet_script, tmp_path):
    supernet_script.draw_shapes(str(tmp_path / "shapes"))
    data = {
        "dataset": "",
        "data_dir": str(tmp_path / "shapes"),
        "download": False,
        "train_images": 2000,
        "seed": 0,
        "holdout": torch.arange(0),
        "input_size": [3, 32, 32],
        "scale": [1, 1],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    data["fingerprint"] = blocks.fingerprint(blocks.open_dataset(data, "train"))
    (x, y), (vx, vy) = (
        tuple(map(torch.cat, zip(*make_loader(data, part, 500, torch.device("cpu")))))
        for part in ("train", "val")
    )
    x, vx = (torch.cat([t.flatten(1), torch.ones(len(t), 1)], 1).double() for t in (x, vx))
    best = max(
        (
            (
                vx
                @ torch.linalg.solve(
                    x.T @ x + ridge * torch.eye(x.shape[1]).double(),
                    x.T @ torch.eye(10).double()[y],
                )
            ).argmax(1)
            == vy
        )
        .double()
        .mean()
        .item()
        for ridge in (10, 1000, 100000)
    )
    print(f"linear classifier: {best:.3f}")
    assert best < 0.2


def test_an_unfinished_file_does_not_replace_a_finished_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), blocks.replacing(path) as temporary:
        open(temporary, "w").write("new, half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ---- bad input
# --------------------------------------------------------------------------------------------------


def write_images(root, classes, corrupt=False):
    from PIL import Image

    for split in ("train", "val"):
        for name in classes:
            os.makedirs(root / split / name)
            for i in range(12):
                Image.effect_noise((32, 32), 50).convert("RGB").save(
                    root / split / name / f"{i}.png"
                )
    if corrupt:
        path = root / "train" / classes[0] / "3.png"
        path.write_bytes(path.read_bytes()[:200])
    return root


BAD_FIRST = {  # flags of stage 1, and what the error has to say
    "no data": (["--data-dir", "nowhere"], "nowhere/train"),
    "no images": (["--data-dir", "empty"], "images"),
    "one class": (["--data-dir", "single"], "one class only (a)"),
    "corrupt image": (["--data-dir", "corrupt"], "3.png"),
    "class only in val": (["--data-dir", "odd"], "val has classes that train lacks: c"),
    "unknown model": (["--model", "resnet43"], "timm cannot build resnet43"),
    "unknown weights": (["--model", "resnet18.foo"], "resnet18"),
    "grey images": (["--model-kwargs", "in_chans=1"], "does not classify RGB images"),
    "no prunable block": (["--model", "resnet50"], "has no prunable block"),
    "unknown model argument": (["--model-kwargs", "depht=3"], "depht"),
    "size that does not fit": (["--model", "test_vit", "--img-size", "33"], "33"),
    "no weights file": (["--checkpoint", "none.pth"], "none.pth does not exist"),
    "weights of another model": (
        ["--checkpoint", "other.pth"],
        "does not fit test_resnet with 10 classes; is it of another --model?",
    ),
    "not a checkpoint": (["--checkpoint", "text.txt"], "does not fit"),
    "unknown device": (["--device", "gpu"], "--device gpu"),
    "folder as output": (["--out", "single"], "cannot write single"),
    "code in the weights": (["--checkpoint", "evil.pth"], "does not fit test_resnet"),
    "weights that are not finite": (
        ["--checkpoint", "nan.pth"],
        "not all weights of nan.pth are finite",
    ),
    "no classifier": (["--model-kwargs", "features_only=True"], "does not classify"),
    "output is an input": (["--checkpoint", "out.pt"], "--out out.pt is an input, too"),
    "weights among the arguments": (
        ["--model-kwargs", "pretrained=True"],
        "pretrained among the arguments",
    ),
    "unknown data set": (["--dataset", "torch/nothing"], "nothing"),
}


@pytest.mark.parametrize("kind", BAD_FIRST)
def test_bad_input_to_the_first_stage(kind, pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "single", ["a"])
    write_images(tmp_path / "corrupt", ["a", "b"], corrupt=True)
    write_images(tmp_path / "odd", ["a", "b"])
    (tmp_path / "odd/val/b").rename(tmp_path / "odd/val/c")
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        os.makedirs(tmp_path / "empty" / folder)
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    torch.save(Evil(), "evil.pth")
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    weights["fc.bias"][3] = float("nan")
    torch.save(weights, "nan.pth")
    (tmp_path / "text.txt").write_text("no weights")
    (tmp_path / "out.pt").write_text("old")
    flags, text = BAD_FIRST[kind]
    defaults = [
        "--model",
        "test_resnet",
        "--data-dir",
        pictures,
        "--img-size",
        32,
        "--workers",
        0,
        "--baseline-epochs",
        1,
    ]
    said = stage(monkeypatch, "1_supernet.py", "--out", "out.pt", *defaults, *flags)
    assert (
        isinstance(said, str) and said.startswith("error: ") and text in said and "\n" not in said
    )
    assert (tmp_path / "out.pt").read_text() == "old" and not os.path.exists("evil")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


SPEC = {"format": 1, "model": "test_resnet", "prune": ["layer1.0"]}
BAD_LATER = {
    "no supernet": ("2_search.py", ["--supernet", "none.pt"], "none.pt does not exist"),
    "code in a supernet": (
        "2_search.py",
        ["--supernet", "evil.pt"],
        "evil.pt is damaged or is not a checkpoint",
    ),
    "weights of another file": (
        "2_search.py",
        ["--supernet", "args.pt"],
        "checkpoint_path among the arguments",
    ),
    "weights from elsewhere": (
        "2_search.py",
        ["--supernet", "args2.pt"],
        "pretrained_cfg among the arguments",
    ),
    "weights that are not finite": (
        "2_search.py",
        ["--supernet", "nan.pt"],
        "not all weights of this supernet are finite",
    ),
    "nested without end": ("3_progressive.py", ["--subnet", "deep.json"], "is not JSON like"),
    "output is the supernet": (
        "3_progressive.py",
        ["--supernet", "out"],
        "--out out is an input, too",
    ),
    "output is the subnet": ("4_merge.py", ["--subnet", "out"], "--out out is an input, too"),
    "table over the network": ("4_merge.py", ["--json", "out"], "must be different files"),
    "table over the export": ("4_merge.py", ["--json", "./out2"], "must be different files"),
    "swapped labels": ("2_search.py", ["--data-dir", "swapped"], "or other names or labels"),
    "truncated supernet": ("2_search.py", ["--supernet", "half.pt"], "half.pt is damaged"),
    "other stage's file": (
        "2_search.py",
        ["--supernet", "RUNS/subnet.pt"],
        "holds: subnet. This needs: supernet",
    ),
    "too many blocks": ("2_search.py", ["--prune", "4"], "1 to 3 blocks"),
    "no block": ("2_search.py", ["--prune", "0"], "1 to 3 blocks"),
    "budget too small": ("2_search.py", ["--macs", "0.1"], "merged subnets have 0."),
    "parameters too few": ("2_search.py", ["--params", "0.1"], "merged subnets have 0."),
    "data gone": ("2_search.py", ["--data-dir", "nowhere"], "nowhere/train"),
    "other data": ("2_search.py", ["--data-dir", "few"], "but 24, or"),
    "other classes": ("2_search.py", ["--data-dir", "other"], "looking for classes plain cross"),
    "no spec": ("3_progressive.py", ["--subnet", "none.json"], "none.json does not exist"),
    "not JSON": ("3_progressive.py", ["--subnet", "text.txt"], "is not JSON like"),
    "JSON of something else": ("3_progressive.py", ["--subnet", "list.json"], "is not JSON like"),
    "unknown block": (
        "3_progressive.py",
        ["--subnet", "block.json"],
        "no prunable block layer9.0; this model has layer1.0",
    ),
    "unknown rung": (
        "3_progressive.py",
        ["--subnet", "rung.json"],
        "layer1.0 cannot be pruned to separable; its rungs are dense, 1x1",
    ),
    "unknown rung to score": (
        "2_search.py",
        ["--score", "rung.json"],
        "layer1.0 cannot be pruned to separable; its rungs are dense, 1x1",
    ),
    "a rung that is no name": ("3_progressive.py", ["--subnet", "two.json"], "is not JSON like"),
    "other model": ("3_progressive.py", ["--subnet", "model.json"], "is for resnet18"),
    "spec of another model to score": ("2_search.py", ["--score", "model.json"], "is for resnet18"),
    "supernet of another version": (
        "2_search.py",
        ["--supernet", "old.pt"],
        "was written by another version of this project",
    ),
    "subnet of another version": (
        "4_merge.py",
        ["--subnet", "old.pt"],
        "was written by another version of this project",
    ),
    "no subnet": ("4_merge.py", ["--subnet", "none.pt"], "none.pt does not exist"),
    "supernet instead": (
        "4_merge.py",
        ["--subnet", "RUNS/supernet.pt"],
        "holds: supernet. This needs: subnet",
    ),
}


@one_network
@pytest.mark.parametrize("kind", BAD_LATER)
def test_bad_input_to_later_stages(kind, runs, monkeypatch, tmp_path):
    script, flags, text = BAD_LATER[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.pt").write_bytes((runs / "supernet.pt").read_bytes()[:100000])
    old = blocks.read_checkpoint(runs / f"{'subnet' if script[0] == '4' else 'supernet'}.pt")
    old["format"] = 1
    torch.save(old, tmp_path / "old.pt")
    (tmp_path / "text.txt").write_text("{no JSON")
    (tmp_path / "deep.json").write_text("[" * 200000)
    torch.save(Evil(), "evil.pt")
    supernet = blocks.read_checkpoint(runs / "supernet.pt")
    for name, more in (
        ("args.pt", {"checkpoint_path": "evil.pt"}),
        ("args2.pt", {"pretrained": True, "pretrained_cfg": {"file": "evil.pt"}}),
    ):
        torch.save({**supernet, "model_args": {**supernet["model_args"], **more}}, name)
    shutil.copytree(supernet["data"]["data_dir"], "swapped")
    os.rename("swapped/train/plain disc", "swapped/train/x")
    os.rename("swapped/train/plain ring", "swapped/train/plain disc")
    os.rename("swapped/train/x", "swapped/train/plain ring")
    next(iter(supernet["state_dict"].values()))[0] = float("nan")
    torch.save(supernet, "nan.pt")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "block.json").write_text(json.dumps({**SPEC, "prune": ["layer9.0"]}))
    (tmp_path / "rung.json").write_text(json.dumps({**SPEC, "prune": {"layer1.0": "separable"}}))
    (tmp_path / "two.json").write_text(json.dumps({**SPEC, "prune": {"layer1.0": 2}}))
    (tmp_path / "model.json").write_text(json.dumps({**SPEC, "model": "resnet18"}))
    write_images(tmp_path / "few", ["plain cross", "plain disc"])
    write_images(tmp_path / "other", ["a", "b"])
    (tmp_path / "out").write_text("old")
    defaults = {
        "2_search.py": ["--supernet", runs / "supernet.pt"],
        "4_merge.py": [],
        "3_progressive.py": ["--supernet", runs / "supernet.pt", "--subnet", runs / "subnet.json"],
    }[script]
    flags = [flag.replace("RUNS", str(runs)) for flag in flags]
    said = stage(monkeypatch, script, *defaults, *flags, "--workers", 0, "--out", "out")
    assert (
        isinstance(said, str) and said.startswith("error: ") and text in said and "\n" not in said
    )
    assert (tmp_path / "out").read_text() == "old" and not os.path.exists("evil")


def test_every_image_is_read_before_the_training(pictures, monkeypatch, tmp_path):
    """Also those that are held back, which only stage 2 uses."""
    shutil.copytree(pictures, tmp_path / "data")
    held = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20]
    path = timm.data.create_dataset("", tmp_path / "data/train").reader.samples[held[7]][0]
    with open(path, "r+b") as file:
        file.truncate(200)
    said = stage(
        monkeypatch,
        "1_supernet.py",
        "--model",
        "test_resnet",
        "--data-dir",
        tmp_path / "data",
        "--img-size",
        32,
        "--workers",
        0,
        "--baseline-epochs",
        0,
        "--epochs",
        0,
        "--out",
        tmp_path / "net.pt",
    )
    assert said.startswith(f"error: cannot read image {path}") and not os.path.exists(
        tmp_path / "net.pt"
    )


def test_grey_images_of_16_bits_keep_their_range(tmp_path):
    import numpy as np
    from PIL import Image

    os.makedirs(tmp_path / "a")
    pixels = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    image, label = blocks.read_image(timm.data.create_dataset("", tmp_path), 0)
    assert image.mode == "RGB" and label == 0
    assert abs(np.asarray(image)[..., 0] - pixels / 257).max() < 1


def test_two_first_runs_draw_the_same_pictures(supernet_script, monkeypatch, tmp_path):
    root, isdir = str(tmp_path / "shapes"), os.path.isdir
    for _ in range(2):
        supernet_script.draw_shapes(root, train=20, val=10)
        monkeypatch.setattr(
            os.path, "isdir", lambda path: path != root and isdir(path)
        )  # as if not seen
    monkeypatch.undo()
    assert (
        os.listdir(tmp_path) == ["shapes"]
        and len(list((tmp_path / "shapes").glob("*/*/*.png"))) == 30
    )


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
    assert check(
        "a against b", ours, lambda images: ours(images) + 1, batches, 1e-4, own=0.51
    ) == pytest.approx(1)


@one_network
def test_output_that_is_not_utf8(runs, tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    later = [
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
    ]
    for script, *flags in (["1_supernet.py", "--help"], ["2_search.py", "--help"], later):
        done = subprocess.run(
            [sys.executable, script, *map(str, flags)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_from_a_shell_an_error_is_one_line(tmp_path):
    write_images(tmp_path / "corrupt", ["a", "b"], corrupt=True)
    done = run_stage(
        "1_supernet.py",
        "--model",
        "test_resnet",
        "--data-dir",
        "corrupt",
        "--img-size",
        32,
        "--workers",
        2,
        cwd=tmp_path,
        check=False,
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: cannot read image ")
        and done.stderr.count("\n") == 1
    )
    assert "Traceback" not in done.stdout and os.listdir(tmp_path) == ["corrupt"]


def test_weights_that_cannot_be_downloaded(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = run_stage(
        "1_supernet.py",
        "--model",
        "test_resnet",
        "--pretrained",
        "--data-dir",
        pictures,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1 and "--checkpoint FILE" in done.stderr.splitlines()[-1]
    assert (
        done.stderr.startswith("error: cannot get timm's weights") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "script, flags",
    [
        ("2_search.py", ["--prune", "2", "--macs", "0.5"]),
        ("2_search.py", ["--macs", "1.5"]),
        ("3_progressive.py", ["--transition", "2"]),
        ("3_progressive.py", ["--batch-size", "0"]),
        ("1_supernet.py", ["--opt", "adamz"]),
        ("4_merge.py", ["--nonsense"]),
    ],
)
def test_bad_flags(script, flags, monkeypatch):
    assert stage(monkeypatch, script, *flags) == 2


def test_a_user_error_can_be_caught_in_a_notebook(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        blocks.read_checkpoint(tmp_path / "none.pt")
