"""Stage 3 of 4: trains the chosen subnet while it moves from the baseline's structure to the pruned one.

Reads runs/supernet.pt and runs/subnet.json. Writes runs/subnet.pt: the subnet at λ = 1, ready to be merged. Beside it,
runs/subnet.csv has a row per epoch, and while the stage runs, runs/subnet.pt.last is what --resume goes on from.

    python 3_progressive.py
    python 3_progressive.py --epochs 0                              # no training
    python 3_progressive.py --epochs 30 --lr 5e-4
    python 3_progressive.py --transition 0                          # direct pruning, to compare with
    python 3_progressive.py --transition 0 --start random           # from scratch, to compare with
    python 3_progressive.py --subnet my.json --supernet runs/supernet.pt
    torchrun --nproc-per-node 8 3_progressive.py --amp --workers 8

It starts from the baseline's own weights, and first fits the pruned blocks to it in closed form, on --calibrate training
images; --epochs 0 leaves it at that: pruning without training. λ of the pruned blocks rises with every step over the first
--transition of the steps, fast at first and slowly near 1, where a little more λ costs most; then it stays 1. The learning
rate is held for the first --hold of the steps, also where --transition is 0, and falls to 0 (cosine) after that: it should
not fall before λ is 1. The unpruned baseline's outputs serve as soft labels.
"""
import argparse
import copy
import math
import os

import torch
import torch.nn.functional as F
from timm.utils import random_seed

from blocks import (Epoch, Training, add_training_flags, at_least, check_writable, cost, create_model, describe_run,
                    evaluate, fit_blocks, fraction, label_loss, load_baseline, make_loader, make_mixup, make_prunable, merge,
                    obstacles, pick_device, print_best, print_table, processes, prunable_blocks, read, read_json, read_state,
                    recalibrate, remove_state, restore, run, save, save_csv, save_state, set_subnet)

parser = argparse.ArgumentParser(
    description="Stage 3 of 4: trains the subnet from λ = 0 to λ = 1.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
parser.add_argument("--subnet", default="runs/subnet.json", metavar="FILE", help="stage 2's spec, or your own")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# training
parser.add_argument("--epochs", type=at_least(0), default=6, help="epochs; 0 prunes without training")
parser.add_argument("--transition", type=fraction, default=0.1, metavar="R",
                    help="share of the steps while λ goes from 0 to 1; 0 prunes directly")
parser.add_argument("--hold", type=fraction, default=0.5, metavar="R", help="share of the steps at the full learning rate")
parser.add_argument("--start", default="baseline", choices=("baseline", "supernet", "random"),
                    help="weights to start from; random, with --transition 0, trains the pruned network from scratch")
parser.add_argument("--distill", type=fraction, default=0.5, metavar="W", help="weight, 0 to 1, of the baseline's soft labels")
parser.add_argument("--end-act", action=argparse.BooleanOptionalAction, default=None,
                    help="insert an activation at the end of pruned blocks that have none (None: in CNNs of which no block stays, if they are trained)")
add_training_flags(parser, lr=1e-3, warmup=0.0)
parser.add_argument("--out", default="runs/subnet.pt", metavar="FILE", help="the trained subnet's checkpoint")


def mix_at(step, steps, transition):
    """λ at a step, counted from 0 of `steps`: a quarter sine that is 1 from the end of the transition on."""
    ramp = transition * steps
    return 1.0 if step + 1 >= ramp else math.sin(math.pi / 2 * (step + 1) / ramp)


def train(model, teacher, prune, loader, args, report, log, keep=None, state=None):
    """Trains `model` while the blocks `prune` go from λ = 0 to λ = 1, on the labels and on the teacher's soft labels. After
    every epoch there is a row for `log`, with what report(model) measures. Returns the trained model and its last report.

    keep(epoch, training, report) saves the state that `state` goes on from."""
    steps, first, result = args.epochs * len(loader), 0, None
    training = Training(model, args, steps, args.hold)
    mixup = make_mixup(args, loader, model.num_classes)
    if state:
        training.load_state_dict(state["training"])
        first, result = state["epoch"], state["result"]
    for epoch in range(first, args.epochs):
        name = f"progressive {epoch + 1}/{args.epochs}"
        progress = Epoch(name, loader, args.seed, epoch)
        model.train()
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            lr, mix = training.start(step), mix_at(step, steps, args.transition)
            set_subnet(model, prune, mix)
            images, labels = mixup(images, labels)
            with training.autocast():
                logits = model(images)
                loss = label_loss(logits, labels, args.smoothing)
                if args.distill:
                    with torch.no_grad():
                        soft = teacher(images).float().softmax(-1)
                    loss = (1 - args.distill) * loss + args.distill * F.cross_entropy(logits, soft)
            training.backward(loss)
            training.update(step)
            progress.update(loss, step=step + 1, λ=mix, lr=lr)
        speed = progress.finish()
        training.end_epoch()
        set_subnet(training.result, prune, mix)
        result = report(training.result)
        log.append({"epoch": epoch + 1, "mix": mix, "lr": lr, "train_loss": speed["loss"], "val_top1": result["top1"],
                    "images_per_s": speed["images_per_s"]})
        if keep:
            keep(epoch + 1, training, result)
        print(f"{name}  λ {mix:.3f}  lr {lr:.2e}  loss {speed['loss']:.3f}  top-1 {result['top1']:.2f} %"
              f"  {speed['images_per_s']:.0f} img/s", flush=True)
    return training.result, result


def main():
    args = parser.parse_args()
    device = pick_device(args.device, args.compile)
    check_writable(args.out)
    random_seed(args.seed)
    spec = read(args.supernet, "supernet")
    subnet = read_json(args.subnet, spec["model"])
    flags = describe_run(args, "supernet", "subnet", processes=processes()[1])
    state = read_state(args, flags)
    spec["data_dir"] = args.data_dir or spec["data_dir"]
    teacher = load_baseline(spec, device).to(memory_format=torch.channels_last)
    model = create_model(spec["model"], **spec["model_args"]) if args.start == "random" else load_baseline(spec)
    whole = copy.deepcopy(model)
    everything = set(subnet["prune"]) == set(make_prunable(whole)) and not obstacles(whole)
    # What was only fitted is better off without it, and so is what is trained as long as some block is not linear
    spec["end_act"] = False if args.end_act is None and not (everything and args.epochs) else args.end_act
    make_prunable(model, spec["end_act"], spec.get("attention"))
    set_subnet(model, subnet["prune"])  # an unknown block is told here
    prune = spec["prune"] = [name for name in prunable_blocks(model) if name in subnet["prune"]]
    if args.start == "supernet":
        model = restore(spec)
    model.to(device, memory_format=torch.channels_last)
    loader = make_loader(spec, "train", args.batch_size, device, args.workers, augment=args)
    val = make_loader(spec, "val", args.batch_size, device, args.workers, share=True)
    log = state["log"] if state else []

    def report(model):
        return evaluate(model, val, shared=True)

    def keep(epoch, training, result):
        save_csv(log, os.path.splitext(args.out)[0] + ".csv")
        save_state(args, flags, epoch=epoch, log=log, result=result, training=training.state_dict())

    if state:
        print(f"{spec['model']}, {len(prune)} blocks pruned, going on after epoch {state['epoch']}")
    else:
        mix = mix_at(0, args.epochs * len(loader), args.transition)
        if args.calibrate and prune and args.start == "baseline":  # one after the other, each on the inputs that it will see
            fit_blocks(model, [[name] for name in prune], spec, args, device)
        set_subnet(model, prune, mix)
        recalibrate(model, (images for images, _ in make_loader(spec, "train", args.batch_size, device, limit=1024)))
        result = report(model)
        print(f"{spec['model']}, {len(prune)} blocks pruned, baseline top-1 {spec['baseline']['top1']:.2f} %,"
              f" at the start (λ = {mix:.3f}) {result['top1']:.2f} %")
    if args.epochs:
        model, result = train(model, teacher, prune, loader, args, report, log, keep, state)

    model.cpu().eval()
    save({**spec, "stage": "subnet", "flags": flags, "subnet": result, "state_dict": model.state_dict()}, args.out)
    remove_state(args)
    print_best("progressive", log)
    print()
    merged = cost(merge(model), spec["input_size"])
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{r['top1']:.2f}") for name, c, r in (
            ("baseline", spec["baseline"], spec["baseline"]), ("this subnet, once merged", merged, result))])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
