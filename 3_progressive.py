"""Stage 3 of 4: trains the chosen subnet while it moves from the baseline's structure to the pruned one.

Reads runs/supernet.pt and runs/subnet.json. Writes runs/subnet.pt: the subnet at λ = 1, ready to be merged.

    python 3_progressive.py
    python 3_progressive.py --epochs 30 --transition 0.5 --lr 5e-4
    python 3_progressive.py --transition 0                          # direct pruning, to compare with
    python 3_progressive.py --subnet my.json --supernet runs/supernet.pt

It starts from the baseline's own weights. λ of the pruned blocks rises with every step over the first --transition of the
steps, fast at first and slowly near 1, where a little more λ costs most; then it stays 1. The learning rate is held for
the first --hold of the steps, also where --transition is 0, and falls to 0 (cosine) after that: it should not fall before
λ is 1. The unpruned baseline's outputs serve as soft labels.
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, random_seed
from tqdm import tqdm

from blocks import (UserError, at_least, check_writable, cost, create_optimizer, evaluate, fraction, load_baseline,
                    make_loader, make_prunable, merge, pick_device, print_table, read, read_json, recalibrate, run,
                    save, set_subnet)

parser = argparse.ArgumentParser(
    description="Stage 3 of 4: trains the subnet from λ = 0 to λ = 1.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
parser.add_argument("--subnet", default="runs/subnet.json", metavar="FILE", help="stage 2's spec, or your own")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# training
parser.add_argument("--epochs", type=at_least(0), default=6, help="epochs; 0 prunes without training, BN recalibrated")
parser.add_argument("--transition", type=fraction, default=0.5, metavar="R",
                    help="share of the steps while λ goes from 0 to 1; 0 prunes directly")
parser.add_argument("--hold", type=fraction, default=0.5, metavar="R", help="share of the steps at the full learning rate")
parser.add_argument("--distill", type=fraction, default=0.5, metavar="W", help="weight, 0 to 1, of the baseline's soft labels")
parser.add_argument("--batch-size", type=at_least(1), default=64, help="images per step")
parser.add_argument("--lr", type=at_least(0, float), default=5e-4, help="learning rate")
parser.add_argument("--opt", default="adamw", help="a timm optimiser name")
parser.add_argument("--weight-decay", type=at_least(0, float), default=0.05, help="not applied to norms and biases")
parser.add_argument("--seed", type=int, default=0, help="of the batches")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
parser.add_argument("--out", default="runs/subnet.pt", metavar="FILE", help="the trained subnet's checkpoint")


def mix_at(step, steps, transition):
    """λ at a step, counted from 0 of `steps`: a quarter sine that is 1 from the end of the transition on."""
    ramp = transition * steps
    return 1.0 if step + 1 >= ramp else math.sin(math.pi / 2 * (step + 1) / ramp)


def main():
    args = parser.parse_args()
    device = pick_device(args.device)
    check_writable(args.out)
    random_seed(args.seed)
    spec, subnet = read(args.supernet, "supernet"), read_json(args.subnet)
    if subnet["model"] != spec["model"]:
        raise UserError(f"{args.subnet} is for {subnet['model']}, {args.supernet} holds {spec['model']}")
    spec["data_dir"] = args.data_dir or spec["data_dir"]
    spec["prune"], spec["end_act"] = subnet["prune"], subnet.get("end_act", spec["end_act"])

    teacher = load_baseline(spec, device).to(memory_format=torch.channels_last)
    model = load_baseline(spec)
    make_prunable(model, spec["end_act"])
    set_subnet(model, spec["prune"])  # an unknown block is told here
    model.to(device, memory_format=torch.channels_last)
    loader = make_loader(spec, "train", args.batch_size, device, args.workers, train=True)
    val = make_loader(spec, "val", args.batch_size, device, args.workers)
    steps = args.epochs * len(loader)
    hold = round(args.hold * steps)

    # The BatchNorms that take a LayerNorm's place need statistics before they are blended in.
    set_subnet(model, spec["prune"], mix_at(0, steps, args.transition))
    recalibrate(model, (images for images, _ in make_loader(spec, "train", args.batch_size, device, limit=1024)))
    result = evaluate(model, val)
    print(f"{spec['model']}, {len(spec['prune'])} blocks pruned, baseline top-1 {spec['baseline']['top1']:.2f} %,"
          f" at the start (λ = {mix_at(0, steps, args.transition):.3f}) {result['top1']:.2f} %")

    if steps:
        optimizer = create_optimizer(model, args)
        # timm's warm-up, from the full rate to the full rate, holds it
        scheduler = CosineLRScheduler(optimizer, max(1, steps - hold), warmup_t=hold, warmup_lr_init=args.lr,
                                      warmup_prefix=True, t_in_epochs=False)
    for epoch in range(args.epochs):
        model.train()
        losses, started, name = AverageMeter(), time.time(), f"progressive {epoch + 1}/{args.epochs}"
        bar = tqdm(desc=name, total=len(loader) * loader.loader.batch_size, unit="img", leave=False, disable=None)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            mix = mix_at(step, steps, args.transition)
            set_subnet(model, spec["prune"], mix)
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if args.distill:
                with torch.no_grad():
                    soft = teacher(images).softmax(-1)
                loss = (1 - args.distill) * loss + args.distill * F.cross_entropy(logits, soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step_update(step + 1)
            losses.update(loss.item(), len(images))
            bar.update(len(images))
            bar.set_postfix(loss=f"{losses.avg:.3f}", mix=f"{mix:.3f}", refresh=False)
        bar.close()
        speed = losses.count / (time.time() - started)
        result = evaluate(model, val)
        print(f"{name}  λ {mix:.3f}  lr {optimizer.param_groups[0]['lr']:.2e}  loss {losses.avg:.3f}"
              f"  top-1 {result['top1']:.2f} %  {speed:.0f} img/s", flush=True)

    model.cpu().eval()
    save({**spec, "stage": "subnet", "subnet": result, "state_dict": model.state_dict()}, args.out)
    print()
    merged = cost(merge(model), spec["input_size"])
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{r['top1']:.2f}") for name, c, r in (
            ("baseline", spec["baseline"], spec["baseline"]), ("this subnet, once merged", merged, result))])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
