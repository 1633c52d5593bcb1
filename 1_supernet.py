"""Stage 1 of 4: trains a supernet, in which every prunable block works in its baseline and in its pruned form.

Reads a folder of images (or any map-style data set timm knows) and, if given, weights for the baseline.
Writes runs/supernet.pt: the supernet's weights, the baseline's own weights and top-1, and all that later stages need
to know: model, classes, image size, normalisation, where the images are, which of them are held back. Beside it,
runs/supernet.csv has a row per epoch, and while the stage runs, runs/supernet.pt.last is what --resume goes on from.

    python 1_supernet.py                                        # small drawn pictures, no download, about two minutes
    python 1_supernet.py --data-dir cifar10 --img-size 32 --model mobilenetv2_100 --baseline-epochs 30 --epochs 10
    python 1_supernet.py --data-dir imagenet --model convnext_tiny.fb_in1k --pretrained --epochs 20 --lr 1e-4
    python 1_supernet.py --data-dir cifar10 --model deit_tiny_patch16_224 --model-kwargs patch_size=4 img_size=32
    python 1_supernet.py --data-dir imagenet --model resnet34.tv_in1k --pretrained --epochs 0               # no training
    torchrun --nproc-per-node 8 1_supernet.py --data-dir imagenet --model resnet34.tv_in1k --pretrained --amp --workers 8

The baseline is trained first (--baseline-epochs) unless its weights are given. Then every pruned block is fitted to it in
closed form, on --calibrate training images: with --epochs 0, that is the supernet. Its epochs follow, by the sandwich rule:
each step runs the largest subnet (nothing pruned) on the labels, and the smallest (everything pruned) and some random ones
on the largest's output as soft labels; their gradients add up to one update.
"""
import argparse
import copy
import logging
import os
import random
import shutil

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.layers import to_2tuple
from timm.utils import ParseKwargs, random_seed

from blocks import (Epoch, Training, UserError, add_training_flags, at_least, check_writable, cost, create_model,
                    describe_run, evaluate, first_process_first, fit_blocks, fraction, label_loss, make_loader,
                    make_mixup, make_prunable, merge, open_dataset, pick_device, print_best, print_table, processes,
                    read_state, recalibrate, remove_state, run, save, save_csv, save_state, set_subnet)

parser = argparse.ArgumentParser(
    description="Stage 1 of 4: trains a supernet of baseline and pruned blocks.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
# model
parser.add_argument("--model", default="resnet18", help="a timm model name, e.g. mobilenetv2_100, convnext_tiny.fb_in1k")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="k=v",
                    help="arguments for timm.create_model, e.g. patch_size=4 img_size=32")
parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (downloads them)")
parser.add_argument("--checkpoint", metavar="FILE", help="start from weights in timm's own keys (.pth, .safetensors)")
# images
parser.add_argument("--data-dir", metavar="DIR", help="folder with train/CLASS/* and val/CLASS/* (None: data/shapes, drawn if absent)")
parser.add_argument("--dataset", default="", help="a timm data set instead of a folder: torch/cifar10, hfds/…")
parser.add_argument("--dataset-download", action="store_true", help="let the data set download itself into --data-dir")
parser.add_argument("--train-split", default="train", help="name of the split to train on")
parser.add_argument("--val-split", default="val", help="name of the split that top-1 is reported on, never chosen on")
parser.add_argument("--num-classes", type=at_least(2), help="number of classes, where the data set cannot tell")
parser.add_argument("--img-size", type=at_least(1), help="input height and width in pixels (None: the model's own; 32 for shapes)")
parser.add_argument("--scale", type=fraction, nargs=2, metavar=("MIN", "MAX"),
                    help="area of a random crop as share of the image (None: 0.08 1, below 128 px 0.8 1)")
# training
parser.add_argument("--baseline-epochs", type=at_least(0), help="epochs for the baseline (None: 10, or 0 with weights that fit)")
parser.add_argument("--epochs", type=at_least(0), default=4, help="epochs for the supernet, each some three times as long")
parser.add_argument("--random-subnets", type=at_least(0), default=2, help="random subnets per step, beside largest and smallest")
add_training_flags(parser, lr=1e-3, warmup=0.1)
parser.add_argument("--attention", action="store_true", help="let a ViT block's attention be pruned, too, as a choice of its own")
parser.add_argument("--out", default="runs/supernet.pt", metavar="FILE", help="the supernet's checkpoint")


def draw_shapes(root, train=2000, val=500, size=32):
    """Draws a 10-class image folder, once: five shapes, plain or striped, of any colours, size and place on a textured
    ground. No pixel tells the class by itself: a linear classifier gets 14 % right."""
    if os.path.isdir(root):
        return
    print(f"drawing {train + val} pictures into {root}")

    def polygon(corners):
        angles = np.arange(corners) * 2 * np.pi / corners
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    a = 1 / 3
    cross = [(a, a), (1, a), (1, -a), (a, -a), (a, -1), (-a, -1), (-a, -a), (-1, -a), (-1, a), (-a, a), (-a, 1), (a, 1)]
    shapes = {"cross": [cross], "disc": [polygon(24)], "ring": [polygon(24), polygon(24) * 0.6], "square": [polygon(4)],
              "triangle": [polygon(3)]}  # the outline, and what is cut out of it
    classes = [(shape, fill) for shape in shapes for fill in ("plain", "striped")]
    rng, zoom = np.random.default_rng(0), 4  # drawn large, then shrunk: smooth edges
    y, x = np.mgrid[:size, :size]

    def wave(low, high):  # in a random direction, `low` to `high` radians per pixel
        angle = rng.uniform(0, np.pi)
        return np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(low, high) + rng.uniform(0, 6))[..., None]

    temporary = f"{root}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            shape, fill = classes[index % len(classes)]
            colours = [rng.integers(0, 256, 3)]
            for _ in range(2):  # each differs from the one before in every channel
                colours.append((colours[-1] + rng.integers(80, 176, 3)) % 256)
            ground, ink, second = colours
            stripes = wave(1.2, 2.2) > 0 if fill == "striped" else True
            radius, angle = rng.uniform(0.3, 0.45) * size, rng.uniform(-0.35, 0.35)
            centre = rng.uniform(radius, size - radius, 2)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            mask = Image.new("L", (size * zoom, size * zoom))
            for points, value in zip(shapes[shape], (255, 0)):
                points = (np.array(points) @ turn * radius + centre) * zoom
                ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=value)
            mask = np.asarray(mask.resize((size, size), Image.Resampling.BOX), dtype=float)[..., None] / 255
            pixels = (ground + wave(0.1, 0.5) * rng.uniform(0, 25, 3)) * (1 - mask)
            pixels += np.where(stripes, ink, second) * mask + rng.normal(0, 10, (size, size, 3))
            folder = os.path.join(temporary, split, f"{fill} {shape}")
            os.makedirs(folder, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f"{index:04d}.png"))
    os.replace(temporary, root)


def describe_data(args):
    """The part of the checkpoint that later stages find the images by; the held-out tenth is drawn here, once."""
    spec = {"dataset": args.dataset, "data_dir": os.path.abspath(args.data_dir),
            "train_split": args.train_split, "val_split": args.val_split, "download": args.dataset_download,
            "seed": args.seed}
    train, val = open_dataset(spec, "train"), open_dataset(spec, "val")
    source = getattr(train, "reader", train)  # {class name: index}; torchvision's ImageNet has several names for a class
    numbers = getattr(source, "wnid_to_idx", None) or getattr(source, "class_to_idx", {})
    classes = sorted(numbers, key=numbers.get) or [str(i) for i in range(args.num_classes or 0)]
    if not classes:
        raise UserError("this data set does not tell its classes: give --num-classes")
    if args.num_classes not in (None, len(classes)):
        raise UserError(f"--num-classes {args.num_classes}, but the data has {len(classes)} classes")
    if len(classes) == 1:
        raise UserError(f"one class only ({classes[0]}): at least two are needed")
    if not args.dataset and (unknown := set(val.reader.class_to_idx) - set(classes)):
        raise UserError(f"{args.val_split} has classes that {args.train_split} lacks: {', '.join(sorted(unknown)[:5])}")
    if len(train) < 10:
        raise UserError(f"only {len(train)} training images: one in ten is held back, so at least ten are needed")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
    return {**spec, "classes": classes, "train_images": len(train), "holdout": order[:len(train) // 10].sort().values}


def build_baseline(args, num_classes):
    """The timm model with its first weights, the checkpoint's part that describes it, and whether the weights fit."""
    model_args = {**args.model_kwargs, "num_classes": num_classes}
    if args.img_size and hasattr(create_model(args.model, **model_args), "set_input_size"):
        model_args["img_size"] = args.img_size  # a ViT's size is fixed when it is built
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try to connect; one error is enough
    try:
        model = create_model(args.model, pretrained=args.pretrained, **model_args)
    except Exception as error:
        if isinstance(error, UserError) or not args.pretrained:
            raise
        raise UserError(f"cannot get timm's weights for {args.model} ({type(error).__name__}): check the network, or give"
                        " --checkpoint FILE") from error
    if args.checkpoint:
        try:
            timm.models.load_checkpoint(model, args.checkpoint)
        except FileNotFoundError as error:
            raise UserError(f"{args.checkpoint} does not exist") from error
        except Exception as error:
            raise UserError(f"{args.checkpoint} does not fit {args.model} with {num_classes} classes: "
                            + " ".join(str(error).split())[:200]) from error
    native = timm.data.resolve_model_data_config(model)
    size = to_2tuple(model_args.get("img_size") or args.img_size or native["input_size"][1:])
    spec = {"model": args.model, "model_args": model_args, "input_size": [3, *size],
            "scale": list(args.scale or ((0.8, 1.0) if max(size) < 128 else (0.08, 1.0))), "mean": list(native["mean"]),
            "std": list(native["std"]), "interpolation": native["interpolation"],
            # off its own resolution (CIFAR's 32 px, say) a model sees the whole picture
            "crop_pct": native["crop_pct"] if size == tuple(native["input_size"][1:]) else 1.0}
    try:
        cost(model, spec["input_size"])
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{args.model} does not take RGB images of {size[0]}x{size[1]} px: {str(error).splitlines()[0]}") from error
    return model, spec, bool(args.checkpoint) or args.pretrained and num_classes == model.pretrained_cfg["num_classes"]


def train(model, blocks, loader, epochs, args, report, log, keep=None, state=None):
    """Trains `model`: the baseline alone if `blocks` is empty, else all subnets by the sandwich rule. After every epoch
    there is a row for `log`, with what report(model) measures. Returns the trained model and its last report.

    epochs: a range, counted through the stage. keep(epoch, training, report) saves the state that `state` goes on from."""
    if not epochs:
        return model, report(model)
    training = Training(model, args, len(epochs) * len(loader))
    mixup = make_mixup(args, loader, model.num_classes)
    first, result = epochs.start, None
    if state:
        training.load_state_dict(state["training"])
        first, result = state["epoch"], state["result"]
    for epoch in range(first, epochs.stop):
        rng = random.Random(f"{args.seed}/{epoch}")
        phase, number = "supernet" if blocks else "baseline", epoch - epochs.start + 1
        progress = Epoch(f"{phase} {number}/{len(epochs)}", loader, args.seed, epoch)
        model.train()
        for step, (images, labels) in enumerate(loader, (number - 1) * len(loader)):
            lr = training.start(step)
            images, labels = mixup(images, labels)
            set_subnet(model, [])
            with training.autocast():
                logits = model(images)
                loss = label_loss(logits, labels, args.smoothing)
            training.backward(loss)
            if blocks:
                soft, subnets = logits.detach().float().softmax(-1), [blocks]
                for _ in range(args.random_subnets if len(blocks) > 1 else 0):
                    subnets.append(rng.sample(blocks, rng.randint(1, len(blocks) - 1)))
                for pruned in subnets:
                    set_subnet(model, pruned)
                    with training.autocast():
                        distance = F.cross_entropy(model(images), soft)
                    training.backward(distance)
            training.update(step)
            progress.update(loss, step=step + 1, lr=lr)
        speed = progress.finish()
        training.end_epoch()
        result = report(training.result)
        log.append({"phase": phase, "epoch": number, "lr": lr, "train_loss": speed["loss"], "val_top1": result["top1"],
                    "val_top1_smallest": result.get("top1_smallest", ""), "images_per_s": speed["images_per_s"]})
        if keep:
            keep(epoch + 1, training, result)
        print(f"{phase} {number}/{len(epochs)}  lr {lr:.2e}  loss {speed['loss']:.3f}  top-1 {result['top1']:.2f} %"
              + (f", smallest {result['top1_smallest']:.2f} %" if blocks else "")
              + f"  {speed['images_per_s']:.0f} img/s", flush=True)
    return training.result, result


def main():
    args = parser.parse_args()
    device = pick_device(args.device, args.compile)
    check_writable(args.out)
    random_seed(args.seed)
    shapes = args.data_dir is None and not args.dataset
    args.data_dir = args.data_dir or ("data/shapes" if shapes else "data")
    if shapes and "img_size" not in args.model_kwargs:
        args.img_size = args.img_size or 32
    with first_process_first():
        if shapes:
            draw_shapes(args.data_dir)
        spec = describe_data(args)
        model, model_spec, trained = build_baseline(args, len(spec["classes"]))
    spec.update(model_spec)
    make_prunable(copy.deepcopy(model), attention=args.attention)  # what cannot be pruned is told now, not after the training
    model.to(device, memory_format=torch.channels_last)  # depthwise convs train more than twice as fast
    flags = describe_run(args, "checkpoint", train_images=spec["train_images"], processes=processes()[1])
    state = read_state(args, flags)
    loader = make_loader(spec, "train", args.batch_size, device, args.workers, augment=args)
    val = make_loader(spec, "val", args.batch_size, device, args.workers, share=True)
    log = state["log"] if state else []
    baseline = baseline_state = None

    def keep(epoch, training, result):
        save_csv(log, os.path.splitext(args.out)[0] + ".csv")
        save_state(args, flags, epoch=epoch, log=log, result=result, baseline=baseline, baseline_state_dict=baseline_state,
                   training=training.state_dict())

    # Baseline
    epochs = args.baseline_epochs if args.baseline_epochs is not None else 0 if trained else 10
    print(f"{args.model}, {len(spec['classes'])} classes, {spec['train_images'] - len(spec['holdout'])} images to train on,"
          f" {len(spec['holdout'])} held back" + (f", going on after epoch {state['epoch']}" if state else ""))
    if state and state["baseline"]:
        baseline, baseline_state = state["baseline"], state["baseline_state_dict"]
        model.load_state_dict(baseline_state)
    else:
        model, result = train(
            model, [], loader, range(epochs), args, lambda model: evaluate(model, val, shared=True), log, keep, state)
        baseline = {**cost(model, spec["input_size"]), **result}
        baseline_state = {key: value.cpu().clone() for key, value in model.state_dict().items()}
        state = None

    # Supernet
    spec.update(end_act=False, attention=args.attention)  # stage 3 decides on end activations
    random_seed(args.seed)  # in all processes, and resumed or not, what is not fitted starts alike
    blocks = make_prunable(model, spec["end_act"], spec["attention"])
    if args.calibrate and not state:
        fit_blocks(model, [blocks], spec, args, device)
    calibration = [images for images, _ in make_loader(spec, "train", args.batch_size, device, limit=1024)]

    def report(model):  # each subnet with BN statistics of its own; the largest's stay
        top1 = []
        for pruned in (blocks, []):
            set_subnet(model, pruned)
            recalibrate(model, calibration)
            top1.append(evaluate(model, val, shared=True)["top1"])
        return {"top1": top1[1], "top1_smallest": top1[0]}

    model, result = train(model, blocks, loader, range(epochs, epochs + args.epochs), args, report, log, keep, state)
    save({**spec, "stage": "supernet", "flags": flags, "baseline": baseline, "supernet": result,
          "state_dict": model.cpu().state_dict(), "baseline_state_dict": baseline_state}, args.out)
    remove_state(args)

    set_subnet(model, blocks)
    smallest = cost(merge(model), spec["input_size"])
    for phase in ("baseline", "supernet"):
        print_best(phase, [row for row in log if row["phase"] == phase])
    print(f"\n{len(blocks)} prunable blocks: {' '.join(blocks)}\n")
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{top1:.2f}") for name, c, top1 in (
            ("baseline", baseline, baseline["top1"]), ("supernet, nothing pruned", baseline, result["top1"]),
            ("supernet, everything pruned and merged", smallest, result["top1_smallest"]))])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
