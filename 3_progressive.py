"""Stage 3 of 4: trains the chosen subnet while it moves from the baseline's form to the pruned.

Reads runs/supernet.pt and runs/subnet.json. Writes runs/subnet.pt: the subnet at lam = 1, ready to
be merged. Beside it, runs/subnet.csv has a row per epoch, and more while lam rises, with --plot
runs/subnet.png shows them, and while the stage runs, runs/subnet.pt.last is what --resume goes on
from.

    python 3_progressive.py
    python 3_progressive.py --epochs 0                           # no training
    python 3_progressive.py --epochs 30 --lr 5e-4
    python 3_progressive.py --control --plot     # beside the baseline, trained on for as long
    python 3_progressive.py --transition 0                       # direct pruning, to compare with
    python 3_progressive.py --transition 0 --start random        # random weights, to compare with
    python 3_progressive.py --subnet my.json --supernet runs/supernet.pt
    torchrun --nproc-per-node 8 3_progressive.py --amp --workers 8

It starts from the baseline's own weights. `lam`, the paper's λ, of the pruned blocks rises with
every step over the first --transition of the steps, fast at first and slowly near 1, where a little
more costs most; after that it stays 1. The learning rate is held for the first --hold of the steps
and falls to 0 by a cosine after that: it should not fall before lam is 1. The unpruned baseline's
outputs serve as soft labels. With --epochs 0, and with --form fitted before anything else, the
pruned blocks are fitted to the baseline in closed form, on --calibrate training images.
"""
import argparse
import copy
import itertools
import math
import os
import time

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, distribute_bn, random_seed

from blocks import (UserError, at_least, average, build, check_finite, compile_blocks, cost,
                    create_model, evaluate, finish, fit, make_loader, make_prunable, merge,
                    obstacles, print_table, processes, progress_bar, prunable_blocks,
                    read_checkpoint, read_subnet, recalibrate, replacing, run, save, save_csv,
                    set_subnet, start)

parser = argparse.ArgumentParser(description="Stage 3 of 4: trains the subnet from lam = 0 to 1.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flag, positive, share = parser.add_argument, at_least(0, float), at_least(0, float, 1)
flag("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
flag("--subnet", default="runs/subnet.json", metavar="FILE", help="stage 2's spec, or your own")
flag("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# training
flag("--epochs", type=at_least(0), default=6, help="epochs; 0 prunes without training")
flag("--transition", type=share, metavar="R", help="share of the steps while lam goes from 0 to 1;"
     " 0 prunes directly (None: 0.25, of the fitted form 0.1)")
flag("--hold", type=share, default=0.5, metavar="R", help="share of the steps at the full rate")
flag("--start", default="baseline", choices=("baseline", "random"), help="weights to start from")
flag("--distill", type=share, default=0.5, metavar="W", help="weight of the baseline's soft labels")
flag("--form", choices=("reparam", "fitted"),
     help="of the pruned blocks (None: stage 1's; fitted with --epochs 0)")
flag("--control", action=argparse.BooleanOptionalAction, default=None,
     help="train the unpruned baseline for as long, too, to compare with (None: for the drawn"
          " pictures of stage 1 only)")
flag("--end-act", action=argparse.BooleanOptionalAction, default=None,
     help="insert an activation at the end of pruned blocks that have none (None: if trained, in"
          " a CNN of which all blocks are pruned, and in any ConvNeXt of the reparam form)")
flag("--calibrate", type=at_least(0), default=4096, metavar="N",
     help="training images to fit the pruned blocks on; 0: each starts as its skip alone")
flag("--batch-size", type=at_least(2), default=64, help="images per step and process")
flag("--lr", type=positive, default=1e-3, help="peak learning rate; falls to 0 by a cosine")
flag("--warmup", type=share, default=0.0, metavar="R", help="share of the steps before the peak")
flag("--opt", default="adamw", choices=list_optimizers(), metavar="NAME", help="a timm optimiser")
flag("--weight-decay", type=positive, default=0.05, help="not for norms and biases")
flag("--clip-grad", type=positive, default=1.0, metavar="NORM", help="largest norm; inf: any")
flag("--ema", type=share, metavar="DECAY", help="take a moving average of the weights: 0.9999")
flag("--mixup", type=positive, default=0.0, metavar="ALPHA", help="mixup, e.g. 0.8")
flag("--cutmix", type=positive, default=0.0, metavar="ALPHA", help="cutmix, e.g. 1.0")
flag("--smoothing", type=share, default=0.0, help="label smoothing, e.g. 0.1")
flag("--aa", metavar="POLICY", help="augmentation in timm's notation: rand-m9-mstd0.5-inc1")
flag("--reprob", type=share, default=0.0, help="probability of random erasing, e.g. 0.25")
flag("--amp", action="store_true", help="mixed precision (bfloat16)")
flag("--compile", action="store_true", help="torch.compile each block: slow to start, faster later")
flag("--seed", type=at_least(0), default=0, help="of all random numbers")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
flag("--workers", type=at_least(0), default=min(2, torch.get_num_threads()), help="to load images")
flag("--resume", action="store_true", help="go on from OUT.last, if it is there, with its flags")
flag("--plot", action="store_true", help="draw the training, too (pip install matplotlib)")
flag("--out", default="runs/subnet.pt", metavar="FILE", help="the trained subnet's checkpoint")


def lam_at(step, steps, transition):
    """lam at a step, counted from 0 of `steps`: a quarter sine, 1 after the transition."""
    ramp = transition * steps
    return 1.0 if step + 1 >= ramp else math.sin(math.pi / 2 * (step + 1) / ramp)


def plot(log, baseline, path):
    """Draws lam, the learning rate, the loss and top-1 of a training's log over its steps."""
    from matplotlib.figure import Figure
    figure = Figure((7, 7), layout="constrained")
    above, middle, below = figure.subplots(3, sharex=True)
    for name, rows in itertools.groupby(log, key=lambda row: row["network"]):
        rows = list(rows)
        steps, style = [row["step"] for row in rows], "-" if name == "subnet" else "--"
        if name == "subnet":
            above.plot(steps, [row["lam"] for row in rows], label="λ")
            peak = max(row["lr"] for row in rows)
            above.plot(steps, [row["lr"] / peak for row in rows], label=f"rate / {peak:.1e}")
        middle.plot(steps, [row["train_loss"] for row in rows], style, label=f"{name}, training")
        ends = [(row["step"], row["val_top1"]) for row in rows if row["val_top1"] is not None]
        below.plot(*zip(*ends), style, marker="o", label=name)
    below.axhline(baseline, color="grey", label="baseline, before")
    for axes, label in ((above, "λ, rate"), (middle, "loss"), (below, "val top-1 (%)")):
        axes.set_ylabel(label)
        axes.legend()
        axes.grid(alpha=0.3)
    below.set_xlabel("step")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def train(model, teacher, prune, loader, val, args, log, control=None, state=None):
    """Trains `model` while the blocks `prune` (none: it is the control) go from lam = 0 to 1, on
    the labels and the teacher's soft labels. Adds rows to `log`. After every epoch it saves what
    `state` goes on from. Returns the trained model and its top-1 and loss on `val`."""
    device, (rank, world), steps = loader.device, processes(), args.epochs * len(loader)
    fused = {"fused": True} if args.opt in ("adam", "adamw", "sgd") else {}  # faster, on CPUs, too
    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, **fused)
    warmup = round(args.warmup * steps)
    hold = max(warmup, round(args.hold * steps))
    scheduler = CosineLRScheduler(
        optimizer, max(1, steps - hold), warmup_t=warmup, warmup_lr_init=args.lr / 10,
        warmup_prefix=True, t_in_epochs=False)
    mixup = None
    if args.mixup or args.cutmix:
        if loader.loader.batch_size % 2:
            raise UserError("--mixup and --cutmix need an even --batch-size")
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing,
                      num_classes=model.num_classes)
    smoothing = 0 if mixup else args.smoothing
    ema = ModelEmaV3(model, args.ema, use_warmup=True) if args.ema else None
    best = ema.module if ema else model  # the one that counts
    parts, first, result = [model, best, optimizer], 0, None
    if state:
        first, result = state["epoch"], state["result"]
        for part, saved in zip(parts, state["parts"]):
            part.load_state_dict(saved)
    if args.compile:
        compile_blocks(model)
    every = max(1, round(args.transition * steps / 10))  # rows and lines while lam moves
    losses, started = AverageMeter(), 0

    def means():
        """Training loss and images/s, over all processes, since the call before."""
        nonlocal started
        loss = torch.tensor(losses.avg, dtype=torch.float64, device=device)
        average([loss])
        speed = losses.count * loader.loader.batch_size * world / (time.time() - started)
        losses.reset()
        started = time.time()
        return {"train_loss": loss.item(), "images_per_s": round(speed, 1)}

    def write(row, top1):
        log.append({**row, "val_top1": top1})
        save_csv(log, os.path.splitext(args.out)[0] + ".csv")
        print(f"{row['network']} {row['epoch']}/{args.epochs}  step {row['step']}/{steps}  lam"
              f" {row['lam']:.3f}  lr {row['lr']:.2e}  loss {row['train_loss']:.3f}"
              + (f"  top-1 {top1:.2f} %" if top1 is not None else "")
              + f"  {row['images_per_s']:.0f} img/s")

    for epoch in range(first, args.epochs):
        random_seed(1000 * args.seed + epoch, rank)  # nothing depends on what came before
        loader.sampler.set_epoch(epoch)
        row = {"network": "subnet" if prune else "control", "epoch": epoch + 1}
        name = f"{row['network']} {epoch + 1}/{args.epochs}"
        bar = progress_bar(loader, name, rounds=args.epochs - epoch if epoch == first else 0)
        started = time.time()
        model.train()
        for step, (images, labels) in enumerate(bar, epoch * len(loader)):
            lam = lam_at(step, steps, args.transition) if prune else 0.0
            set_subnet(model, prune, lam)
            scheduler.step_update(min(step, warmup) + max(0, step - hold))
            lr = optimizer.param_groups[0]["lr"]
            images, labels = mixup(images, labels) if mixup else (images, labels)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                logits = model(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
                if args.distill:
                    with torch.no_grad():
                        soft = teacher(images).float().softmax(-1)
                    loss = (1 - args.distill) * loss + args.distill * F.cross_entropy(logits, soft)
            loss.backward()
            average([weight.grad for weight in model.parameters() if weight.grad is not None])
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update(model, step)
            losses.update(loss.item())
            if not math.isfinite(losses.val):
                raise UserError(f"the loss is {losses.val} at step {step + 1}, lam {lam:g}, lr"
                                f" {lr:g}. Try a lower --lr; --resume takes the epoch before")
            bar.set_postfix(lam=f"{lam:.3f}", loss=f"{losses.avg:.3f}", refresh=False)
            row.update(step=step + 1, lam=lam, lr=lr)
            if 0 < lam < 1 and (step + 1) % every == 0 and (step + 1) % len(loader):
                write({**row, **means()}, None)
        row.update(means())
        if world > 1:  # each process has BN statistics of its own images
            distribute_bn(model, world, reduce=True)
            distribute_bn(best, world, reduce=True)
        check_finite(model, name, ". Try a lower --lr; --resume takes the epoch before")
        set_subnet(best, prune, lam)
        result = evaluate(best, val, split=True)
        write(row, result["top1"])
        save({"stage": "unfinished run", "flags": vars(args), "epoch": epoch + 1, "log": log,
              "control": control, "result": result,
              "parts": [part.state_dict() for part in parts]}, args.out + ".last")
    return best, result


def main():
    args, device, state = start(parser, "supernet", "subnet")
    random_seed(args.seed)
    checkpoint = read_checkpoint(args.supernet, "supernet")
    subnet = read_subnet(args.subnet, checkpoint["model"])
    data = {**checkpoint["data"], "data_dir": args.data_dir or checkpoint["data"]["data_dir"]}
    teacher = build(checkpoint, baseline=True)
    model = copy.deepcopy(teacher)
    teacher.to(device, memory_format=torch.channels_last)
    if args.start == "random":
        model = create_model(checkpoint["model"], checkpoint["model_args"])
    form = args.form or (checkpoint["flags"]["form"] if args.epochs else "fitted")
    if args.transition is None:
        args.transition = 0.25 if form == "reparam" else 0.1
    # Without training end activations only harm. In the fitted form, and in inverted residuals, so
    # they do as long as some block stays
    whole = copy.deepcopy(model)
    everything = set(subnet["prune"]) == set(make_prunable(whole)) and not obstacles(whole)
    end_act = args.end_act
    if end_act is None:
        defaults = {block.end_act_default for block in prunable_blocks(whole).values()}
        some = everything or (form == "reparam" and True in defaults)
        end_act = bool(args.epochs and some and False not in defaults)
    make_prunable(model, form, end_act, checkpoint["attention"])
    set_subnet(model, subnet["prune"])  # raises for an unknown block
    prune = {name: block.rung for name, block in prunable_blocks(model).items()
             if name in subnet["prune"]}
    model.to(device, memory_format=torch.channels_last)
    loader = make_loader(data, "train", args.batch_size, device, args.workers, augment=args)
    val = make_loader(data, "val", args.batch_size, device, args.workers, split=True)
    print(f"{checkpoint['model']}, {len(prune)} blocks pruned, {form} form, baseline top-1"
          f" {checkpoint['baseline']['top1']:.2f} %")
    fitted = [name for name, block in prunable_blocks(model).items()
              if name in prune and block.pruned]
    if form == "reparam" and fitted:
        print(f"of the fitted form: {' '.join(fitted)}")
    if args.control is None:  # who sees the drawn pictures sees that training alone helps there
        flags = checkpoint["flags"]
        args.control = not flags["data_dir"] and not flags["dataset"]
    log, control = (state["log"], state["control"]) if state else ([], None)
    if state:
        print(f"going on after epoch {state['epoch']} of the {log[-1]['network']}")
    if args.control and args.epochs and not control:
        print("control: the baseline, trained for as long")
        _, control = train(copy.deepcopy(teacher), teacher, {}, loader, val, args, log, None, state)
        state = None
    if not state:
        ready = fitted if args.calibrate and args.start == "baseline" else []
        if ready:
            few = make_loader(data, "train", args.batch_size, device, args.workers,
                              limit=args.calibrate, split=True)
            fit(model, {name: prune[name] for name in ready}, (images for images, _ in few))
        lam = lam_at(0, args.epochs * len(loader), args.transition)
        set_subnet(model, prune, lam)
        few = make_loader(data, "train", args.batch_size, device, limit=1024)
        new = {norm for name, block in prunable_blocks(model).items() for norm in block.modules()
               if name in prune and name not in ready}
        recalibrate(model, (images for images, _ in few), new)  # all others are right as they are
        result = evaluate(model, val, split=True)
        print(f"at the start, with lam {lam:.3f}, top-1 {result['top1']:.2f} %")
    if args.epochs:
        model, result = train(model, teacher, prune, loader, val, args, log, control, state)
        if args.plot and processes()[0] == 0:
            plot(log, checkpoint["baseline"]["top1"], os.path.splitext(args.out)[0] + ".png")
    model.cpu().eval()
    save({**checkpoint, "stage": "subnet", "flags": vars(args), "prune": prune, "form": form,
          "end_act": end_act, "subnet": result, "control": control,
          "state_dict": model.state_dict()}, args.out)
    finish(args.out)
    merged = cost(merge(model), data["input_size"])
    print()
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{r['top1']:.2f}")
        for name, c, r in (("baseline", checkpoint["baseline"], checkpoint["baseline"]),
                           ("control: trained for as long", checkpoint["baseline"], control),
                           ("this subnet, once merged", merged, result)) if r])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
