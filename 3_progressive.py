"""Stage 3 of 4: trains the chosen subnet while it moves from the baseline's form to the pruned.

Reads runs/supernet.pt and runs/subnet.json. Writes runs/subnet.pt: the subnet at lam = 1, ready to
be merged. Beside it, runs/subnet.csv has a row per epoch, and more while lam rises.

    python 3_progressive.py --control --plot     # beside the baseline, trained on for as long
    python 3_progressive.py --no-features        # labels, too, though stage 1 took weights

`lam`, the paper's λ, rises with every step over the first --transition of the steps, slowly near 1,
where a little more costs most. The baseline's outputs serve as soft labels; where stage 1 took
weights, they and the features before the pooling are all that is learned (--features).
"""
import argparse
import copy
import functools
import math
import os

import torch
import torch.nn.functional as F

from blocks import (BatchNorm, Parser, UserError, answers, at_least, atomic_write, bn_statistics,
                    build, cost, default_end_act, evaluate, finish, fit, insert_end_acts,
                    label_loss, make_loader, make_prunable, merge, not_fitted, outputs_of,
                    print_table, prunable_blocks, rank_and_world, read_checkpoint, read_subnet,
                    recalibrate, run, run_flags, save, set_subnet, spare_weights, start, train,
                    training_flags)

FEATURES = 5  # weight of the features' distance beside the cross entropy of the answers
HOLD = 0.5  # share of the steps at the full rate: it should not fall before lam is 1
parser = Parser(description="Stage 3 of 4: trains the subnet from lam = 0 to 1.")
flag, share = parser.add_argument, at_least(0, float, 1)
flag("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
flag("--subnet", default="runs/subnet.json", metavar="FILE", help="stage 2's spec, or your own")
flag("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
flag("--epochs", type=at_least(0), default=6, help="epochs; 0 prunes without training")
flag("--transition", type=share, metavar="R", help="share of the steps while lam goes from 0 to 1;"
     " 0 prunes directly (None: 0.25, of the fitted form 0.1, or with --features 0)")
flag("--distill", type=share, default=0.5, metavar="W", help="weight of the baseline's soft labels;"
     " with --features they are all that is learned of answers")
flag("--features", action=argparse.BooleanOptionalAction, default=None,
     help="learn the baseline's answers and its features before the pooling, and no labels; BN"
          " statistics stay but in pruned reparam blocks (None: where stage 1 took weights)")
flag("--form", choices=("reparam", "fitted"),
     help="of the pruned blocks (None: stage 1's; fitted with --features and with --epochs 0)")
flag("--control", action=argparse.BooleanOptionalAction, default=None,
     help="train the baseline for as long, too (None: only for the drawn pictures of stage 1)")
flag("--end-act", action=argparse.BooleanOptionalAction, help="insert an activation at the end of"
     " pruned blocks (None: if trained, and all of a CNN are pruned, or it is a reparam ConvNeXt)")
training_flags(parser, warmup=0.0)
run_flags(parser)
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
    for name in dict.fromkeys(row["network"] for row in log):
        rows = [row for row in log if row["network"] == name]
        steps, style = [row["step"] for row in rows], "-" if name == "subnet" else "--"
        if name == "subnet":
            above.plot(steps, [row["lam"] for row in rows], label="λ")
            peak = max(row["lr"] for row in rows) or 1
            above.plot(steps, [row["lr"] / peak for row in rows], label=f"rate / {peak:.1e}")
        middle.plot(steps, [row["train_loss"] for row in rows], style, label=f"{name}, training")
        ends = [(row["step"], row["val_top1"]) for row in rows if "val_top1" in row]
        below.plot(*zip(*ends), style, marker="o", label=name)
    below.axhline(baseline, color="grey", label="baseline, before")
    for axes, label in ((above, "λ, rate"), (middle, "loss"), (below, "val top-1 (%)")):
        axes.set_ylabel(label)
        axes.legend()
        axes.grid(alpha=0.3)
    below.set_xlabel("step")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def train_subnet(model, teacher, prune, loader, test, args, log, still=(), state=None, **kept):
    """Trains `model`, as `train` does, while the blocks `prune` (of the control none) go from lam 0
    to 1, on the teacher's answers and features, or on the labels and these answers."""
    lam, steps = 0.0, args.epochs * len(loader)

    def step(images, labels, number):
        nonlocal lam
        lam = lam_at(number, steps, args.transition) if prune else 0.0
        set_subnet(model, prune, lam)
        features, logits = outputs_of(model, images, args.amp)
        if args.features or args.distill:
            with torch.no_grad():
                wanted, soft = outputs_of(teacher, images, args.amp)
            soft = F.cross_entropy(logits, soft.softmax(-1))
        if args.features and features.shape != wanted.shape:
            raise UserError("--features needs all patches: give --no-features, not patch_drop_rate")
        if args.features:  # their mean squared distance, as a share of the wanted ones' variance
            loss = soft + FEATURES * (F.mse_loss(features, wanted) / wanted.var())
        else:
            loss = label_loss(logits, labels, args.smoothing)
            loss = (1 - args.distill) * loss + args.distill * soft if args.distill else loss
        loss.backward()
        return loss, {"lam": lam}

    def measure(network):  # maybe the average of the model's weights
        set_subnet(network, prune, lam)
        return test(network)

    tenth = max(1, round(args.transition * steps / 10))
    moving = {number for number in range(tenth - 1, steps, tenth)
              if prune and lam_at(number, steps, args.transition) < 1}
    name = "subnet" if prunable_blocks(model) else "control"
    return train(model, step, measure, loader, args, name, range(args.epochs), args.lr, log, HOLD,
                 moving, still, state, **kept)


def main():
    args, device, state = start(parser, "supernet", "subnet")
    checkpoint = read_checkpoint(args.supernet, "supernet")
    subnet = read_subnet(args.subnet, checkpoint["model"])
    data = {**checkpoint["data"], "data_dir": args.data_dir or checkpoint["data"]["data_dir"]}
    flags, teacher = checkpoint["flags"], build(checkpoint, baseline=True)  # flags: stage 1's
    model = copy.deepcopy(teacher)
    teacher.to(device, memory_format=torch.channels_last)
    if args.epochs == 0 and (args.control or args.plot):
        raise UserError("--control and --plot show a training: give --epochs, too")
    if args.features is None:
        args.features = bool(flags["checkpoint"] or flags["pretrained"])
    if args.features and args.control:
        raise UserError("--control: where features are learned, the baseline itself is the control:"
                        " leave it out, or give --no-features")
    form = args.form or ("fitted" if args.features or not args.epochs else flags["form"])
    if args.transition is None:
        args.transition = 0.25 if form == "reparam" else 0.0 if args.features else 0.1
    make_prunable(model, form, False, checkpoint["attention"])
    set_subnet(model, subnet["prune"])  # raises for an unknown block
    pruned = {name: block for name, block in prunable_blocks(model).items() if block.lam}
    prune = {name: block.rung for name, block in pruned.items()}
    if args.features and not prune:
        args.epochs = 0  # Adam would make steps of rounding errors
        print("nothing is pruned, so there is nothing to learn")
    end_act = args.epochs > 0 and default_end_act(model, form, prune)  # untrained they only harm
    end_act = end_act if args.end_act is None else args.end_act
    if end_act:
        insert_end_acts(model)
    spare_weights(args, flags, model, prune)
    model.to(device, memory_format=torch.channels_last)
    loader = make_loader(data, "train", args.batch_size, device, args.workers, augment=args)
    val = make_loader(data, "val", args.batch_size, device, args.workers, split=True)
    print(f"{checkpoint['model']}, {len(prune)} blocks pruned, {form} form, baseline top-1"
          f" {checkpoint['baseline']['top1']:.2f} %")
    fitted = [name for name, block in pruned.items() if block.rung in block.fitted]
    still = []
    if args.features and args.epochs:
        moving = {m for name in prune if name not in fitted for m in pruned[name].modules()}
        still = [m for m in model.modules() if isinstance(m, BatchNorm) and m not in moving]
        print(f"learning the baseline's answers and features at a rate of {args.lr:g}; what is in"
              " front of the first pruned block stays, and so do BN statistics")
    if form == "reparam" and fitted:
        print(f"of the fitted form: {' '.join(fitted)}")
    if args.control is None:  # who sees the drawn pictures sees that training alone helps there
        args.control = not (flags["data_dir"] or flags["dataset"] or args.features)
    test = functools.partial(evaluate, batches=val, split=True, logits=answers(teacher, val))
    log, control = (state["log"], state.get("control")) if state else ([], None)
    if args.control and args.epochs and not control:
        print("control: the baseline, trained for as long")
        unpruned = copy.deepcopy(teacher)
        spare_weights(args, flags, unpruned)
        _, control = train_subnet(unpruned, teacher, {}, loader, test, args, log, state=state)
        state = None
    if not state:
        if fitted and args.calibrate:
            fit(model, prune, make_loader(data, "train", args.batch_size, device, args.workers,
                                          args.calibrate, split=True))
        lam = lam_at(0, args.epochs * len(loader), args.transition)
        set_subnet(model, prune, lam)
        batches = make_loader(data, "train", args.batch_size, device, limit=1024)
        recalibrate(model, batches, not_fitted(model), bn_statistics(teacher, batches))
        result = test(model)
        print(f"at the start, with lam {lam:.3f}, top-1 {result['top1']:.2f} %, agreement"
              f" {result['agreement']:.2f} %")
    if args.epochs:
        model, result = train_subnet(model, teacher, prune, loader, test, args, log, still, state,
                                     control=control)
        if args.plot and rank_and_world()[0] == 0:
            plot(log, checkpoint["baseline"]["top1"], os.path.splitext(args.out)[0] + ".png")
    model.cpu().eval()
    save({**checkpoint, "stage": "subnet", "flags": vars(args), "prune": prune, "form": form,
          "end_act": end_act, "subnet": result, "control": control,
          "state_dict": model.state_dict()}, args.out)
    finish(args.out)
    merged = cost(merge(model), data["input_size"])
    print()
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)", "agree (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{r['top1']:.2f}",
         f"{r.get('agreement', 100):.2f}")
        for name, c, r in (("baseline", checkpoint["baseline"], checkpoint["baseline"]),
                           ("control: trained for as long", checkpoint["baseline"], control),
                           ("this subnet, once merged", merged, result)) if r])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
