"""Images per second of the training stages against a plain training loop on the same network,
loader and optimiser.

    # the drawn pictures; alternates, prints medians of ratios
    python tests/benchmarks/throughput.py
    python tests/benchmarks/throughput.py --model convnext_tiny --data-dir imagenette --img-size \\
        224 --device cuda --amp --batch-size 128

Stage 3 with nothing pruned (lam = 0), with everything pruned (lam = 1) or in transition does one
pass per step like the plain loop; stage 1 does a forward and backward pass for each of its subnets.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from blocks import compile_blocks, make_loader, make_prunable, train  # noqa: E402

first, third = importlib.import_module("1_supernet"), importlib.import_module("3_progressive")
PASSES = 4  # of a step of stage 1: the largest subnet, the smallest, two random ones
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flag = parser.add_argument
flag("--model", default="resnet18", help="a timm model name")
flag("--data-dir", default="data/shapes", help="folder with train/CLASS/* and val/CLASS/*")
flag("--img-size", default="32", help="input size in pixels")
flag("--batch-size", default="64", help="images per step")
flag("--workers", default="2", help="processes that load images")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda")
flag("--amp", action="store_true", help="bfloat16 in all of them")
flag("--compile", action="store_true", help="compiled blocks in all of them")
rounds_help = "epochs of each kind, in turn; one more goes before, uncounted"
flag("--rounds", type=int, default=5, help=rounds_help)


def plain_epoch(model, loader, args):
    """Images/s of what a script without this project would do: forward, backward, clipping,
    step."""
    fused = {"fused": True} if args.opt in ("adam", "adamw", "sgd") else {}
    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, **fused)
    if args.compile:
        compile_blocks(model)
    model.train()
    count, started = 0, time.time()
    for images, labels in loader:
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=args.amp):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        count += len(images)
    loss.item()  # waits for a GPU
    return count / (time.time() - started)


def images_per_s(log):
    """Of the steps of all rows together: while lam moves there are several in an epoch."""
    steps = [0, *(row["step"] for row in log)]
    weights = [end - start for start, end in itertools.pairwise(steps)]
    return statistics.harmonic_mean([row["images_per_s"] for row in log], weights)


def main():
    ours = parser.parse_args()
    shared = ["--batch-size", ours.batch_size, "--workers", ours.workers, "--device", ours.device]
    shared += ["--lr", "1e-3"] + ["--amp"] * ours.amp + ["--compile"] * ours.compile
    if ours.data_dir == "data/shapes":
        first.draw_shapes(ours.data_dir)
    flags = ["--model", ours.model, "--data-dir", ours.data_dir, "--img-size", ours.img_size]
    args = first.parser.parse_args(flags + shared)
    device = torch.device(args.device)
    data = first.describe_images(args)
    baseline, *_ = first.make_baseline(args, data)
    baseline.to(device, memory_format=torch.channels_last).eval()
    prunable = {form: copy.deepcopy(baseline) for form in ("reparam", "fitted")}
    names = [make_prunable(model, form) for form, model in prunable.items()][0]
    loader = make_loader(data, "train", args.batch_size, device, args.workers, augment=args)

    def supernet(form):
        model, log = copy.deepcopy(prunable[form]), []
        teacher = baseline if form == "reparam" else None
        step = first.sandwich(model, names, loader, range(1), args, teacher)
        with tempfile.TemporaryDirectory() as folder:
            args.out = os.path.join(folder, "net.pt")
            train(model, step, lambda _: {}, loader, args, "supernet", range(1), args.lr, log)
        return images_per_s(log)

    def progressive(form, prune, transition=0, distill=0):
        model, log = copy.deepcopy(prunable[form]), []
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--epochs", "1", "--transition", str(transition), "--distill", str(distill)]
            flags += ["--out", os.path.join(folder, "net.pt")]
            flags = third.parser.parse_args(flags + shared)
            third.train_subnet(model, baseline, prune, loader, lambda _: {}, flags, log)
        return images_per_s(log)

    kinds = {  # images/s, and the passes per step that count against it
        "plain loop": (lambda: plain_epoch(copy.deepcopy(baseline), loader, args), 1),
        "stage 3, lam = 0": (lambda: progressive("reparam", []), 1),
    }
    for form in prunable:
        kinds |= {
            f"{form}, lam between": (lambda form=form: progressive(form, names, 1), 1),
            f"{form}, lam = 1": (lambda form=form: progressive(form, names), 1),
            f"{form}, lam = 1, with soft labels": (
                lambda form=form: progressive(form, names, distill=0.5),
                1,
            ),
            f"{form}, stage 1, {PASSES} passes": (lambda form=form: supernet(form), PASSES),
        }
    speeds = {name: [] for name in kinds}
    with contextlib.redirect_stdout(sys.stderr):  # the stages' own lines
        for _ in range(ours.rounds + 1):
            for name, (measure, _) in kinds.items():
                speeds[name].append(measure())
    machine = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
    print(
        f"{ours.model} at {ours.img_size} px, {len(loader) * loader.loader.batch_size} images per"
        f" epoch, batch {loader.loader.batch_size}, {machine}, torch {torch.__version__}"
        f"{', bfloat16' * ours.amp}{', compiled' * ours.compile}"
    )
    plain_speeds = speeds["plain loop"][1:]
    for name, (_, passes) in kinds.items():
        counted = speeds[name][1:]
        ratios = [speed * passes / plain for speed, plain in zip(counted, plain_speeds)]
        print(
            f"{name:34} {statistics.median(counted):8.0f} img/s   x passes / plain loop:"
            f" {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
