"""What people bring: their own weights, classes, images and notebooks. Nothing goes wrong without a
word, and what does not work says so."""

import argparse
import csv
import importlib
import io
import json
import logging
import multiprocessing
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from conftest import load, one_network, stage, write_spec
from PIL import Image
from timm.models._efficientnet_blocks import InvertedResidual

import blocks
from blocks import UserError, fit, make_prunable, set_subnet

search_script = importlib.import_module("2_search")
QUICK = "--img-size 32 --epochs 0 --calibrate 16"


def weights_of(name, classes=10):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes).state_dict()


@pytest.fixture
def first(pictures, monkeypatch, tmp_path):
    """How stage 1 begins in an own folder, which has some pictures in the folder data."""
    monkeypatch.chdir(tmp_path)
    for part, count in (("train", 5), ("val", 2)):
        for name in os.listdir(pictures / part):
            os.makedirs(f"data/{part}/{name}")
            for path in sorted((pictures / part / name).iterdir())[:count]:
                shutil.copy(path, f"data/{part}/{name}")
    return "1_supernet.py --model test_resnet --data-dir data"


def write_images(folder, count):
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        Image.effect_noise((32, 32), 50).convert("RGB").save(f"{folder}/{i}.png")


def assert_error(said, *texts):
    assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, said
    for text in texts:
        assert text in said, said


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_given_weights_are_trained_at_a_rate_that_keeps_them(first, given, tmp_path, capsys):
    """By stages 1 and 3, which say so; what is trained here keeps the higher rate. Without labels,
    stage 3 has nothing to teach a network of which nothing is pruned."""
    torch.save(weights_of("test_resnet"), "mine.pth")
    few = "--img-size 32 --calibrate 16 --epochs 1 --baseline-epochs 1"
    assert stage(f"{first} {few} {'--checkpoint mine.pth' * given}") is None
    write_spec(tmp_path / "none.json", [])
    assert stage("3_progressive.py --subnet none.json --epochs 1") is None
    subnet = blocks.read_checkpoint("runs/subnet.pt")
    assert subnet["form"] == ("fitted" if given else "reparam")
    assert subnet["flags"]["transition"] == (0 if given else 0.25)
    assert subnet["flags"]["features"] == given and (subnet["subnet"]["agreement"] == 100) >= given
    given_weights = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]
    kept = all(torch.equal(subnet["state_dict"][k], v) for k, v in given_weights.items()
               if "num_batches" not in k)
    assert kept == given
    assert stage("3_progressive.py --subnet none.json --epochs 1 --no-features") is None
    said = "given weights: learning rate 0.0001, BN statistics that pruning does not change"
    assert capsys.readouterr().out.count(said) == 2 * given
    after = blocks.read_checkpoint("runs/subnet.pt")["state_dict"]["bn1.running_mean"]
    before = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]["bn1.running_mean"]
    moved = (after - before).abs().max()  # by one step on 180 images
    assert moved < 0.02 if given else moved > 0
    for kind in ("supernet", "subnet"):
        flags = blocks.read_checkpoint(f"runs/{kind}.pt")["flags"]
        assert flags["lr"] == (1e-4 if given else 1e-3)


def test_images_are_prepared_as_the_weights_want_them(first, capsys):
    """Whatever the size. Only small images for new weights are not cropped."""
    torch.save(weights_of("test_resnet"), "mine.pth")
    theirs = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    assert theirs["crop_pct"] < 1
    for flags, crop in (("--checkpoint mine.pth", theirs["crop_pct"]), ("--baseline-epochs 0", 1)):
        assert stage(f"{first} {QUICK} {flags}") is None
        data = blocks.read_checkpoint("runs/supernet.pt")["data"]
        assert data["crop_pct"] == crop and data["interpolation"] == theirs["interpolation"]
        assert f"images: 32x32 px, {crop:g} of a val image" in capsys.readouterr().out


def test_how_images_are_prepared_can_be_told_and_travels(first, tmp_path, capsys):
    flags = "--mean 0.5 0.4 0.3 --std 0.2 0.3 0.4 --interpolation bilinear --crop-pct 0.75"
    assert stage(f"{first} {QUICK} --baseline-epochs 0 {flags}") is None
    said = "0.75 of a val image (center), by bilinear; mean 0.5 0.4 0.3, std 0.2 0.3 0.4"
    assert said in capsys.readouterr().out
    write_spec(tmp_path / "one.json", ["layer1.0"])
    assert stage("3_progressive.py --subnet one.json --epochs 0 --calibrate 16") is None
    assert stage("4_merge.py --batch-size 1") is None
    files = {"about.json": ""}
    torch.export.load("runs/merged.pt2", extra_files=files)
    about = json.loads(files["about.json"])
    for found in (about, load("runs/subnet.pt")[1]["data"], load("runs/merged.pt")[1]):
        assert (*found["mean"], *found["std"]) == (0.5, 0.4, 0.3, 0.2, 0.3, 0.4)
        assert (found["interpolation"], found["crop_pct"]) == ("bilinear", 0.75)


def as_data_parallel(state):
    return {f"module.{key}": value for key, value in state.items()}


def as_backbone(state):
    return {f"backbone.{key}": v for key, v in state.items() if not key.startswith("fc.")}


def as_encoder(state):
    more = {"projector.weight": torch.zeros(3, 3)}
    return {"epoch": 3, "state_dict": {f"encoder.{key}": v for key, v in state.items()} | more}


WEIGHTS = {  # how they lie in a file, their number of classes, and whether the classifier is new
    "of more classes": (dict, 1000, True),
    "net": (lambda state: {"net": state, "acc": 93.1, "epoch": 7}, 10, False),
    "ema": (lambda state: {"optimizer": {"state": {}}, "ema": state}, 10, False),
    "model": (lambda state: {"model": state, "args": {"lr": 0.1}}, 10, False),
    "model, of more classes": (lambda state: {"model": state}, 12, True),
    "module": (as_data_parallel, 10, False),
    "backbone": (as_backbone, 10, True),
    "encoder": (as_encoder, 10, False),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_as_they_lie_around(kind, first, capsys):
    """All that fits is taken. A classifier of other classes is replaced, and trained then."""
    wrap, classes, new = WEIGHTS[kind]
    state = weights_of("test_resnet", classes)
    torch.save(wrap(state), "mine.pth")
    assert stage(f"{first} {QUICK} --baseline-epochs 0 --checkpoint mine.pth") is None
    ours = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]
    assert all(torch.equal(ours[key], state[key]) for key in ours if not key.startswith("fc."))
    assert ours["fc.weight"].shape[0] == 10
    assert torch.equal(ours["fc.weight"], state["fc.weight"]) == (not new)
    said = "a new classifier, for 10 classes: fc.weight, fc.bias"
    assert (said in capsys.readouterr().out) == new


def test_a_new_classifier_is_trained_at_the_rate_of_given_weights(first, capsys):
    torch.save(weights_of("test_resnet", classes=12), "mine.pth")
    assert stage(f"{first} {QUICK} --checkpoint mine.pth") is None
    said = capsys.readouterr().out
    assert "given weights: learning rate 0.0001" in said and "baseline 10/10" in said


def test_weights_that_do_not_fit_name_some_keys(first):
    torch.save(weights_of("test_vit"), "vit.pth")
    said = stage(f"{first} {QUICK} --checkpoint vit.pth")
    assert_error(said, "is it of another --model?", "blocks.0.attn.", "bn1.bias")


@one_network
def test_a_merged_network_that_was_trained_further(own_runs, capsys):
    """It is exported again, with its new weights. It is not pruned again."""
    network, checkpoint = load("runs/merged.pt")
    with torch.no_grad():
        network.fc.bias += 1
    torch.save({**checkpoint, "state_dict": network.state_dict()}, "further.pt")
    assert stage("4_merge.py --subnet further.pt --out new/merged.pth") is None
    assert sorted(os.listdir("new")) == ["merged.pt2", "merged.pth"]
    images = torch.randn(3, *checkpoint["input_size"])
    again, about = load("new/merged.pth")
    assert about["prune"] == checkpoint["prune"]
    files = {"about.json": ""}
    program = torch.export.load("new/merged.pt2", extra_files=files).module()
    assert json.loads(files["about.json"])["classes"] == checkpoint["classes"]
    for logits in (again(images), program(images)):
        torch.testing.assert_close(logits, network(images), rtol=0, atol=1e-4)

    data = blocks.read_checkpoint("runs/subnet.pt")["data"]["data_dir"]
    again = f"1_supernet.py --model test_resnet --data-dir {data} {QUICK}"
    said = stage(f"{again} --checkpoint further.pt")
    assert_error(said, "It is a merged network, which is not pruned again")
    said = stage("2_search.py --supernet runs/merged.pt --out new/a.json")
    assert_error(said, "holds: merged. This needs: supernet")


@one_network
def test_exports_need_no_gradient(own_runs):
    assert stage("4_merge.py --batch-size 1") is None
    program = torch.export.load("runs/merged.pt2").module()
    assert not program(torch.zeros(2, 3, 32, 32)).requires_grad


@one_network
def test_a_subnet_with_rounding_errors_of_its_own_is_refused(own_runs):
    """In float32 its logits are a fiftieth of their standard deviation off: merged and unmerged
    agree to that only."""
    model, checkpoint = load("runs/subnet.pt")
    logits = torch.cat([model(images) for images, _ in validation(checkpoint)])
    checkpoint["state_dict"]["fc.bias"] += 3e5 * logits.std().item()
    torch.save(checkpoint, "runs/subnet.pt")
    said = stage("4_merge.py --out new/merged.pt")
    assert_error(said, "unmerged, in float32, against float64", "nothing was written")
    assert not os.path.exists("new")


def validation(checkpoint):
    return blocks.make_loader(checkpoint["data"], "val", 64, torch.device("cpu"))


# ---- folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("flags", ["", "--class-map classes.txt"])
def test_folders_inside_class_folders_are_refused(first, part, flags):
    with open("classes.txt", "w") as file:
        file.write("\n".join(sorted(os.listdir("data/train"))))
    deeper = f"data/{part}/plain disc/batch2"
    write_images(deeper, 12)
    said = stage(f"{first} {QUICK} --baseline-epochs 0 {flags}")
    assert_error(said, deeper, "is a folder inside a class folder")


@pytest.mark.parametrize(
    "path, text",
    [
        ("data/train/0.png", "data/train/0.png is in no class folder"),
        ("data/train/.ipynb_checkpoints/0.png", "is a hidden folder, but would be a class"),
        ("data/val/plain disc/.ipynb_checkpoints/0.png", "is a folder inside a class folder"),
    ],
)
def test_what_is_no_class_does_not_become_one(first, path, text):
    write_images(os.path.dirname(path), 1)
    assert_error(stage(f"{first} {QUICK} --baseline-epochs 0"), text)


def test_images_of_all_common_kinds_are_seen(first):
    for i, ending in enumerate(("webp", "bmp", "tif", "TIFF", "JPEG")):
        Image.effect_noise((32, 32), 50).save(f"data/train/plain disc/{i}.{ending}")
    before = len(list(pathlib.Path("data/train").glob("*/*")))
    assert stage(f"{first} {QUICK} --baseline-epochs 0") is None
    assert blocks.read_checkpoint("runs/supernet.pt")["data"]["train_images"] == before


def test_images_of_floats_are_refused(first):
    """Nobody knows their range; Pillow would clip those from 0 to 1, and all would be black."""
    path = "data/train/plain disc/floats.tiff"
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(path)
    assert_error(stage(f"{first} {QUICK} --baseline-epochs 0"), "cannot read image", "floats.tiff")
    assert not os.path.exists("runs")


@pytest.mark.parametrize("seed", range(4))
def test_each_class_keeps_images_for_the_training(first, seed, capsys):
    """Also one with few. What is held back is still a tenth."""
    for name, count in (("alone", 1), ("pair", 2), ("many", 37)):
        write_images(f"few/train/{name}", count)
        write_images(f"few/val/{name}", 2)
    line = f"{first} {QUICK} --baseline-epochs 0 --seed {seed} --data-dir few"
    assert stage(line) is None
    assert "1 of 3 classes have one training image" in capsys.readouterr().out
    data = blocks.read_checkpoint("runs/supernet.pt")["data"]
    samples = blocks.samples_of(blocks.open_dataset(data, "train"))
    held = set(data["holdout"].tolist())
    assert len(held) == 4
    assert {label for i, (_, label) in enumerate(samples) if i not in held} == {0, 1, 2}


def test_images_are_squashed_where_weights_want_that(first):
    """As some of 336 and 384 px do; others take the middle."""
    for path in pathlib.Path("data/val").glob("*/*"):
        Image.effect_noise((64, 32), 50).save(path)
    assert stage(f"{first} {QUICK} --baseline-epochs 0") is None
    data = blocks.read_checkpoint("runs/supernet.pt")["data"]
    assert data["crop_mode"] == "center"
    cpu = torch.device("cpu")
    images, squashed = (
        next(iter(blocks.make_loader({**data, "crop_mode": mode}, "val", 8, cpu)))[0]
        for mode in ("center", "squash")
    )
    assert images.shape == squashed.shape and not torch.equal(images, squashed)


@pytest.mark.parametrize("part, count", [("train", 51), ("val", 21)])
def test_an_image_that_was_added_later(first, tmp_path, part, count):
    """It would shift labels that are answers, and the baseline's top-1 is of the others."""
    assert stage(f"{first} {QUICK} --baseline-epochs 0") is None
    write_images(f"data/{part}/plain disc", 1)
    write_spec(tmp_path / "one.json", ["layer1.0"])
    said = stage("3_progressive.py --subnet one.json --epochs 0")
    seen = f"{part} images that stage 1 saw, but {count}, or other"
    assert_error(said, seen, "run stage 1 again")


def test_labels_of_a_data_set_may_be_a_tensor():
    """As torchvision's MNIST has them."""
    dataset = argparse.Namespace(targets=torch.tensor([3, 1]))
    assert blocks.samples_of(dataset) == [3, 1]


def without_classes(part):
    """Moves the images of data/PART out of their class folders."""
    for path in list(pathlib.Path(f"data/{part}").glob("*/*")):
        path.rename(path.parents[1] / path.name)
    for folder in pathlib.Path(f"data/{part}").iterdir():
        if folder.is_dir():
            folder.rmdir()


@pytest.mark.parametrize("parts", [["train"], ["val"], ["train", "val"]])
def test_photos_without_labels(first, parts, tmp_path, capsys):
    """The given weights' answers take the place of the labels that are not there."""
    for part in parts:
        without_classes(part)
    torch.save(weights_of("test_resnet"), "mine.pth")
    kwargs = "--model-kwargs num_classes=10" * (len(parts) == 2)
    line = f"{first} --img-size 32 --epochs 1 --calibrate 16 --checkpoint mine.pth {kwargs}"
    assert stage(line) is None
    said = capsys.readouterr().out
    for part in ("train", "val"):
        text = f"the {part} images have no labels: the given weights' answers take their place"
        assert (text in said) == (part in parts)
    network, checkpoint = blocks.build(blocks.read_checkpoint("runs/supernet.pt"), True), None
    checkpoint = blocks.read_checkpoint("runs/supernet.pt")
    assert (checkpoint["baseline"]["top1"] == 100) == ("val" in parts)
    for part in ("train", "holdout", "val"):
        batches = blocks.make_loader(checkpoint["data"], part, 4, torch.device("cpu"))
        same = [(network(images).argmax(1) == labels).all() for images, labels in batches]
        assert all(same) == (part.replace("holdout", "train") in parts)
    assert stage("2_search.py --prune 2") is None
    assert stage("3_progressive.py --epochs 1") is None
    assert stage("4_merge.py --batch-size 1") is None
    found = json.loads((tmp_path / "runs/merged.json").read_text())["rows"][-1]
    assert (found["top1"] == found["agreement"]) == ("val" in parts)


def test_photos_without_labels_and_weights_of_other_classes(first, tmp_path):
    """--class-map tells how many; an editor on Windows begins it with a mark."""
    for part in ("train", "val"):
        without_classes(part)
    torch.save(weights_of("test_resnet", 3), "mine.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc", encoding="utf-8-sig")
    assert stage(f"{first} {QUICK} --checkpoint mine.pth --class-map names.txt") is None
    assert blocks.read_checkpoint("runs/supernet.pt")["data"]["classes"] == ["a", "b", "c"]


@pytest.mark.parametrize("flags", ["", "--checkpoint mine.pth --class-map names.txt"])
def test_photos_without_labels_need_weights_that_fit(first, flags):
    """A new network, or a new classifier, has no answers."""
    without_classes("train")
    torch.save(weights_of("test_resnet", 3), "mine.pth")
    with open("names.txt", "w") as file:
        file.write("\n".join(sorted(os.listdir("data/val"))))
    said = stage(f"{first} --img-size 32 {flags}")
    assert_error(said, "the train images are in no class folders: that needs weights of these")


def test_one_held_out_image_ranks_subnets(first):
    """At 32 px it ends as one pixel, over which a BN has no statistics."""
    for part in ("train", "val"):
        for name in sorted(os.listdir(f"data/{part}"))[2:]:
            shutil.rmtree(f"data/{part}/{name}")
    line = first.replace("test_resnet", "resnet18")
    assert stage(f"{line} {QUICK} --baseline-epochs 1") is None
    assert len(blocks.read_checkpoint("runs/supernet.pt")["data"]["holdout"]) == 1
    assert stage("2_search.py --prune 1") is None
    with open("runs/subnet.search.csv") as file:
        assert len({row["loss"] for row in csv.DictReader(file)}) > 1


def test_the_distance_is_to_the_unpruned_network(first, tmp_path, capsys):
    """Also where specs of one's own are scored: with nothing pruned the distance is 0."""
    weights = weights_of("test_resnet")
    for name in weights:
        if name.endswith(("bn2.weight", "bn3.weight")):  # timm's blocks begin as their skips
            weights[name].fill_(1)
    torch.save(weights, "mine.pth")
    assert stage(f"{first} {QUICK} --checkpoint mine.pth") is None
    write_spec(tmp_path / "one.json", ["layer1.0"])
    assert stage("2_search.py --score one.json") is None
    lines = capsys.readouterr().out.splitlines()
    unpruned, scored = (
        next(line for line in lines if line.startswith(name))
        for name in ("nothing pruned", "one.json")
    )
    assert unpruned.split()[-2] == "0.0000" and scored.split()[-2] != "0.0000"


def test_agreement_is_with_the_unpruned_network(own_runs):
    """And stands in the files of stages 3 and 4."""
    checkpoint = blocks.read_checkpoint("runs/subnet.pt")
    images = list(blocks.make_loader(checkpoint["data"], "val", 16, torch.device("cpu")))
    subnet, baseline = (blocks.build(checkpoint, which) for which in (False, True))
    with torch.no_grad():
        ours, theirs = (torch.cat([n(x) for x, _ in images]) for n in (subnet, baseline))
    same = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    kl = (theirs.softmax(1) * (theirs.log_softmax(1) - ours.log_softmax(1))).sum(1).mean().item()
    assert checkpoint["subnet"]["agreement"] == pytest.approx(same)
    assert checkpoint["subnet"]["kl"] == pytest.approx(kl, rel=1e-3)
    rows = json.loads((own_runs / "merged.json").read_text())["rows"]
    found = {row["network"]: row["agreement"] for row in rows}
    assert found == {"baseline": 100, "baseline, BN folded": 100, "merged": pytest.approx(same)}


# ---- models --------------------------------------------------------------------------------------


def test_features_of_a_network_that_drops_patches(first, tmp_path):
    model = "--model test_vit --model-kwargs img_size=32 patch_size=8 patch_drop_rate=0.5"
    whole = timm.create_model("test_vit", num_classes=10, img_size=32, patch_size=8)
    torch.save(whole.state_dict(), "mine.pth")
    assert stage(f"{first} {QUICK} {model} --checkpoint mine.pth") is None
    write_spec(tmp_path / "one.json", ["blocks.0"], "test_vit")
    said = stage("3_progressive.py --subnet one.json --epochs 1 --calibrate 16")
    assert_error(said, "--features needs all patches: give --no-features, not patch_drop_rate")


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ("in_chans=1", "in_chans=1: the stages give a network RGB images only"),
        ("features_only=True", "test_resnet does not classify RGB images"),
    ],
)
def test_models_that_do_not_take_rgb_or_give_no_logits(first, kwargs, text):
    said = stage(f"{first} {QUICK} --model-kwargs {kwargs}")
    assert_error(said, text)
    assert "has no attribute" not in said  # that is of the code, not of the model


@pytest.mark.parametrize(
    "name, reason",
    [
        ("regnety_002", "it is made of Bottleneck:"),
        ("swin_tiny_patch4_window7_224", "it is made of SwinTransformerBlock:"),
        ("vgg11", "VGG has no prunable block: use a timm model"),
    ],
)
def test_a_model_without_prunable_block_says_why(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError) as caught:
        make_prunable(model)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_s_weights_fit_timm_s_resnet(first, name):
    """A model of torchvision is refused, with a word of this way."""
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10)
    with pytest.raises(UserError, match="weights of torchvision's resnets fit timm's"):
        make_prunable(theirs)
    torch.save(theirs.state_dict(), "theirs.pth")
    first = first.replace("test_resnet", name)
    assert stage(f"{first} {QUICK} --calibrate 0 --checkpoint theirs.pth") is None
    checkpoint = blocks.read_checkpoint("runs/supernet.pt")
    for key, tensor in checkpoint["baseline_state_dict"].items():  # BN statistics, too
        assert torch.equal(checkpoint["state_dict"][key], tensor)
    ours = blocks.build(checkpoint, baseline=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs.eval()(images), rtol=0, atol=1e-4)


def test_the_authors_keys_of_convnext_are_converted(first):
    state, theirs = weights_of("test_convnext"), {}
    names = {
        r"stem": "downsample_layers.0",
        r"(stages.\d+).blocks": r"\1",
        r"stages.(\d+).downsample": r"downsample_layers.\1",
        r"conv_dw": "dwconv",
        r"mlp.fc(\d)": r"pwconv\1",
        r"head.norm": "norm",
        r"head.fc": "head",
    }
    for key, value in state.items():
        for ours, their in names.items():
            key = re.sub(ours, their, key)
        theirs[key] = value
    assert "stages.1.1.pwconv2.weight" in theirs
    torch.save({"model": theirs}, "mine.pth")
    first = first.replace("test_resnet", "test_convnext")
    assert stage(f"{first} {QUICK} --baseline-epochs 0 --checkpoint mine.pth") is None
    ours = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]
    assert ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in ours)


def test_a_vit_s_weights_fit_images_of_another_size(first):
    """Its positions are interpolated, as timm does it for weights of its own."""
    state = weights_of("test_vit")  # for 160 px
    torch.save(state, "mine.pth")
    first = first.replace("test_resnet", "test_vit")
    assert stage(f"{first} {QUICK} --img-size 32 --baseline-epochs 0 --checkpoint mine.pth") is None
    ours = blocks.read_checkpoint("runs/supernet.pt")["baseline_state_dict"]
    like = timm.layers.resample_abs_pos_embed(state["pos_embed"], [2, 2])
    assert torch.equal(ours.pop("pos_embed"), like)
    assert all(torch.equal(ours[key], state[key]) for key in ours)


# ---- the fit -------------------------------------------------------------------------------------

CONSTANT = {  # blocks, and the size of their images
    "inverted, 1x1": (lambda: InvertedResidual(8, 8, exp_ratio=3), 1),
    "inverted": (lambda: InvertedResidual(8, 8, exp_ratio=3), 9),
    "inverted, 5x5": (lambda: InvertedResidual(8, 12, exp_ratio=3, dw_kernel_size=5, stride=2), 9),
}


@pytest.mark.parametrize("kind", CONSTANT)
@torch.no_grad()
def test_channels_that_do_not_vary_tell_nothing(kind):
    """At every rung, beside channels that do: rounding errors do not become weights."""
    make, size = CONSTANT[kind]
    for value in (3.3, 30.7, 300.3, 1000.0, 1000.1, 7777.7):
        torch.manual_seed(0)
        model = nn.Sequential(make()).eval()
        make_prunable(model, "fitted", end_act=False)
        images = torch.randn(60, 8, size, size)
        images[:, :3] = value
        block, expected = model[0], model(images)
        fit(model, ["0"], images.split(15), in_turn=False)
        for rung in block.rungs:
            for key, weight in block.fitted[rung].state_dict().items():
                assert weight.isfinite().all(), (rung, key)
                if ".weight" in key and weight.ndim == 4:
                    assert weight.abs().max() < 1e3, (rung, key, weight.abs().max())
            set_subnet(model, {"0": rung})
            error = (model(images) - expected).square().mean()
            if rung != "skip":  # at least as good as the mean of the outputs
                assert error <= 1.01 * (expected - expected.mean((0, 2, 3), True)).square().mean()


def test_a_system_that_cannot_be_solved_is_an_error_of_the_user_s(monkeypatch):
    def singular(*_, **__):
        raise torch.linalg.LinAlgError("linalg.solve: the input matrix is singular")

    model = timm.create_model("test_resnet")
    names = make_prunable(model, "fitted")
    monkeypatch.setattr(torch.linalg, "solve", singular)
    for in_turn in (True, False):
        with pytest.raises(UserError, match="layer1.0 cannot be fitted.*: .*singular"):
            fit(model, names, [torch.randn(4, 3, 32, 32)], in_turn)


def test_what_is_not_finite_does_not_become_weights():
    model = timm.create_model("test_resnet")
    names = make_prunable(model, "fitted")
    images = torch.randn(4, 3, 32, 32)
    images[0, 0, 0, 0] = float("nan")
    for in_turn in (True, False):
        with pytest.raises(UserError, match="not finite"):
            fit(model, names, [images], in_turn)


@torch.no_grad()
def test_a_fit_takes_batches_with_labels_and_says_where_there_are_none():
    """As a notebook's loader gives them; the fit is the same."""
    fitted = []
    for labels in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet").train()
        names = make_prunable(model, "fitted")
        images = torch.randn(8, 3, 32, 32).split(4)
        fit(model, names, [(batch, torch.zeros(4)) for batch in images] if labels else images)
        assert not model.training
        fitted.append(model.state_dict())
    assert all(torch.equal(fitted[0][key], fitted[1][key]) for key in fitted[0])
    assert "eval mode" in " ".join(fit.__doc__.split())
    for in_turn in (True, False):
        with pytest.raises(UserError, match="the fit got no images"):
            fit(model, names, [], in_turn)


# ---- latencies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["none", "one of two blocks that are alike", "the second half"])
def test_a_latency_table_that_contradicts_itself(trouble, monkeypatch):
    """On a clock on which a conv takes as long as it has weights, unless there is trouble."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", channels=(64, 16, 24, 32))
    make_prunable(model)
    if trouble.startswith("one"):
        model.layer1[1].conv1.slower = 4  # it is of the same shapes as the one before
    found = {name: block.rungs for name, block in blocks.prunable_blocks(model).items()}
    clock, run, slower = [0.0], nn.Conv2d.forward, [1]

    def forward(conv, x):
        clock[0] += conv.weight.numel() * getattr(conv, "slower", 1) * slower[0] / 1e6
        return run(conv, x)

    def latencies(networks, images, rounds):
        seconds = []
        for network in networks:
            begin = clock[0]
            network(images)
            seconds.append(clock[0] - begin)
        return np.array([seconds] * 3).T

    def turns(items, *_, **__):
        items = list(items)
        for i, item in enumerate(items):
            slower[0] = 3 if i >= len(items) / 2 and trouble == "the second half" else 1
            yield item

    images = torch.zeros(1, 3, 32, 32)
    _, savings = search_script.block_savings(model, found, images.shape[1:])
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    monkeypatch.setattr(search_script.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(search_script, "latencies", latencies)
    monkeypatch.setattr(search_script, "progress_bar", turns)
    table = search_script.measure_blocks(model, found, savings, images, count=4, rounds=4)
    if trouble == "none":
        assert table["error"] < 1e-6 and table["spread"] < 1e-6
    else:
        assert table["spread"] > 0.02


def test_a_table_that_contradicts_itself_is_not_kept(monkeypatch, tmp_path, capsys):
    """Nor taken from an older file, that says nothing of it."""
    spreads = iter([0.2, 0.2, 0.2, 0.2, 0.001])

    def measured(*_):
        return {"baseline": 1.0, "savings": {}, "error": 0.01, "spread": next(spreads)}

    monkeypatch.setattr(search_script, "measure_blocks", measured)
    about = dict.fromkeys(("model", "model_args", "form"))
    path = tmp_path / "latency.json"

    def table():
        images = torch.zeros(2, 3, 32, 32)
        search_script.latency_table(str(path), about, None, {}, {}, images)
        return capsys.readouterr().out

    said = table()
    assert said.count("blocks that are alike by up to 20.0%") == 3 and "too busy" in said
    assert not path.exists()
    assert table().count("measured") == 2 and "from" in table()
    kept = json.loads(path.read_text())
    del kept["spread"]
    path.write_text(json.dumps(kept))
    spreads = iter([0.001])
    assert "measured" in table()


# ---- how the stages are called -------------------------------------------------------------------


@one_network
def test_two_runs_with_the_same_out(own_runs, monkeypatch, tmp_path):
    """The second stops; one that comes later does not."""
    write_spec(tmp_path / "none.json", [])
    second, build, said = "3_progressive.py --subnet none.json --epochs 0", blocks.build, []

    def meanwhile(*args, **kwargs):
        if not said:
            said.append("")  # the second, of a process of its own, comes here, too
            with multiprocessing.get_context("fork").Pool(1) as pool:
                said.append(pool.apply(stage, [f"{second} --out ./runs/../runs/subnet.pt"]))
        return build(*args, **kwargs)

    monkeypatch.setattr(blocks, "build", meanwhile)
    assert stage(second) is None
    assert_error(said[1], "another run writes", "at this moment: give another --out")
    assert stage(second) is None


@one_network
def test_in_a_notebook(own_runs, monkeypatch):
    """Its output cannot be reconfigured."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert stage("2_search.py --dry-run") is None
    assert "budgets that can be met" in sys.stdout.getvalue()


@one_network
@pytest.mark.parametrize(
    "line, text",
    [
        ("3_progressive.py --epochs 0 --control", "--control and --plot show a training"),
        ("3_progressive.py --epochs 0 --plot", "--control and --plot show a training"),
        ("2_search.py --score runs/subnet.json --plot", "--plot draws a search"),
        ("2_search.py --dry-run --plot", "--plot draws a search"),
    ],
)
def test_flags_without_effect_are_refused(own_runs, line, text):
    pytest.importorskip("matplotlib")
    assert_error(stage(line), text)


@one_network
def test_both_plots_are_kept_and_name_what_they_show(own_runs, monkeypatch):
    """Rungs, and the file of each row."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, savefig = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda *args, **more: (drawn.append(args[0]), savefig(*args, **more))
    )
    assert stage("2_search.py --macs 0.7 --population 6 --generations 2 --plot") is None
    rows = [label.get_text() for label in drawn[0].axes[1].get_yticklabels()]
    front = os.listdir("runs/subnet.front")
    assert sorted(row.split(":")[0] for row in rows) == sorted(front)
    rungs = {text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()}
    assert rungs == {"dense", "1x1", "skip"}
    before = open("runs/subnet.search.png", "rb").read()
    assert stage("3_progressive.py --epochs 1 --plot") is None
    assert os.path.exists("runs/subnet.png")
    assert open("runs/subnet.search.png", "rb").read() == before


@one_network
def test_one_epoch_is_no_reason_for_a_warning(own_runs, caplog, tmp_path):
    write_spec(tmp_path / "none.json", [])
    with caplog.at_level(logging.WARNING):
        assert stage("3_progressive.py --subnet none.json --epochs 1 --batch-size 128") is None
    assert not [message for message in caplog.messages if "Cosine" in message]
