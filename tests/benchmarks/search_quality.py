"""How good is the search? Needs a supernet with few enough blocks to score every subnet of a size.

    python tests/benchmarks/search_quality.py --supernet runs/supernet.pt --prune 6
    # the same, but among all rungs, of all subnets within a budget
    python tests/benchmarks/search_quality.py --supernet runs/supernet.pt --macs 0.5
    # and is its score the right one?
    python tests/benchmarks/search_quality.py --supernet runs/supernet.pt --train 12 --epochs 4
    # whose score is better?
    python tests/benchmarks/search_quality.py --supernet fitted.pt trained.pt --train 10 --any-size

The first two score all subnets within a budget and rank what the genetic search picks among them,
beside random search with as many evaluations. --train runs stage 3 on random subnets and compares
its top-1 with their scores in the supernet; flags that this script does not know go to stage 3.
"""

import argparse
import contextlib
import importlib
import io
import math
import os
import random
import statistics
import subprocess
import sys
import time

import torch
from latency import kendall

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import build, evaluate, make_loader, prunable_blocks  # noqa: E402
from blocks import read_checkpoint, recalibrate, save, set_subnet  # noqa: E402

stage2 = importlib.import_module("2_search")
parser = argparse.ArgumentParser(
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,  # stage 3's --seed is not --seeds
)
flag = parser.add_argument
supernet_help = "with --train, scores of all of them are compared"
flag("--supernet", nargs="+", default=["runs/supernet.pt"], help=supernet_help)
flag("--prune", type=int, default=6, help="blocks to prune")
flag("--macs", type=float, help="largest share of the MACs, instead of --prune")
flag("--images", type=int, default=2000, help="held-out images to score on")
flag("--population", type=int, default=16)
share_help = "largest share of the space that a search may score"
flag("--share", type=float, default=0.2, help=share_help)
flag("--seeds", type=int, default=5)
flag("--train", type=int, metavar="N", help="run stage 3 on N random subnets instead")
flag("--any-size", action="store_true", help="of any size instead of --prune")
flag("--epochs", default="4", help="of stage 3")
out_help = "folder for what stage 3 writes; goes on where it was stopped"
flag("--out", default="runs/ranking", help=out_help)


def search_quality(args, score, blocks, from_scratch, checkpoint):
    kind, value = ("macs", args.macs) if args.macs else ("prune", args.prune)
    input_size, baseline = checkpoint["data"]["input_size"], checkpoint["baseline"]
    unpruned, savings = stage2.block_savings(build(checkpoint), blocks, input_size)
    budget = stage2.make_budget(kind, value, blocks, baseline, unpruned, savings)
    sizes, fits, _, every = budget
    space = list(every())

    def macs(candidate):
        saved = (savings[name][gene]["macs"] for name, gene in zip(blocks, candidate))
        return unpruned["macs"] - sum(saved)

    started = time.time()
    table = {candidate: score(candidate) for candidate in space}
    speeds = [len(space) / (time.time() - started)]
    at_random = random.Random(0).sample(space, min(20, len(space)))
    evenly = space[:: max(1, len(space) // 20)]
    for function, some in ((score, at_random), (from_scratch, evenly)):
        started = time.time()
        for candidate in some:  # the same bits in any order
            assert function(candidate) == table[candidate]
        speeds.append(len(some) / (time.time() - started))
    print(
        f"{len(space)} subnets within --{kind} {value:g}, {len(blocks)} blocks; subnets/s: all,"
        f" sorted {speeds[0]:.2f}, at random {speeds[1]:.2f}; recalibrated and evaluated from"
        f" scratch, images read again, {speeds[2]:.2f}"
    )
    ranked = sorted(space, key=lambda c: (table[c]["loss"], macs(c), c))
    alone = 1 + sum(size - 1 for size in sizes)  # are scored before the first generation
    generations = max(1, int(args.share * len(space) - alone) // args.population)

    def known(candidate):
        return {**(table.get(candidate) or score(candidate)), "macs": macs(candidate)}

    print("seed  scored   rank of the search's pick   rank of random search's pick (mean of 100)")
    for seed in range(args.seeds):
        with contextlib.redirect_stdout(io.StringIO()):
            scores, exact = stage2.search(known, budget, args.population, generations, seed)
        assert not exact
        rank = ranked.index(next(filter(fits, stage2.ranked(scores)))) + 1
        rng, others = random.Random(seed), []
        for _ in range(100):
            others.append(min(map(ranked.index, rng.sample(space, len(scores)))) + 1)
        other = statistics.mean(others)
        print(
            f"{seed:4}  {len(scores):6}   {rank:4} (best {rank / len(space):.2%})   {other:.1f}"
            f" ({other / len(space):.2%})",
            flush=True,
        )
    best, worst = table[ranked[0]], table[ranked[-1]]
    print(
        f"loss from {best['loss']:.4f} to {worst['loss']:.4f}, top-1 of those {best['top1']:.2f}"
        f" and {worst['top1']:.2f} %"
    )


def ranking(args, scores, blocks, checkpoint):
    rng, rows = random.Random(0), []
    for i in range(args.train):
        size = rng.randint(1, len(blocks)) if args.any_size else args.prune
        prune = sorted(rng.sample(list(blocks), size), key=list(blocks).index)
        path = os.path.join(args.out, f"{'any' if args.any_size else size}-{i}")
        save({"format": 1, "model": checkpoint["model"], "prune": prune}, path + ".json")
        command = [sys.executable, os.path.join(ROOT, "3_progressive.py"), "--resume"]
        command += ["--supernet", args.supernet[0], "--subnet", path + ".json", "--no-control"]
        command += ["--epochs", args.epochs, "--workers", "1", *args.stage3, "--out", path + ".pt"]
        subprocess.run(command, check=True)
        top1 = read_checkpoint(path + ".pt")["subnet"]["top1"]
        results = [score(stage2.to_candidate(prune, blocks)) for score in scores]
        rows.append((top1, size, results))
        in_supernets = (f"loss {r['loss']:.4f}, top-1 {r['top1']:.2f} %" for r in results)
        print(
            f"{i:3}  {size:2} pruned   supernet: {'; '.join(in_supernets)}   after stage 3"
            f" {top1:.2f} %   {' '.join(prune)}",
            flush=True,
        )
    n, (trained, sizes, results) = len(rows), zip(*rows)
    print(
        f"Kendall's tau with top-1 after {args.epochs} epochs of stage 3, {n} subnets: of the"
        f" number of blocks kept {-kendall(sizes, trained):.2f} (standard deviation if there"
        f" were no relation: {math.sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))):.2f})"
    )
    for name, column in zip(args.supernet, zip(*results)):
        print(
            f"of {name}'s loss {-kendall([r['loss'] for r in column], trained):.2f},"
            f" of its top-1 {kendall([r['top1'] for r in column], trained):.2f}"
        )


def main():
    args, args.stage3 = parser.parse_known_args()
    if args.stage3 and not args.train:
        parser.error(f"unknown: {' '.join(args.stage3)}")
    checkpoint = read_checkpoint(args.supernet[0], "supernet")
    plain = build(checkpoint).to(memory_format=torch.channels_last)
    blocks = {name: block.rungs for name, block in prunable_blocks(plain).items()}
    trained = checkpoint["flags"]["epochs"] or not checkpoint["flags"]["calibrate"]

    def images(part, limit):  # as stage 2 does by default
        return list(make_loader(checkpoint["data"], part, 128, torch.device("cpu"), limit=limit))

    def calibration():
        return [batch for batch, _ in images("train", 512)] if trained else []

    def from_scratch(candidate):
        set_subnet(plain, stage2.to_prune(candidate, blocks))
        if trained:
            recalibrate(plain, calibration())
        return evaluate(plain, images("holdout", args.images))

    some, held_out = calibration(), images("holdout", args.images)
    scores = []
    for path in args.supernet:
        model = build(read_checkpoint(path)).to(memory_format=torch.channels_last)
        scores.append(stage2.make_score(model, blocks, some, held_out))
    if args.train:
        ranking(args, scores, blocks, checkpoint)
    else:
        search_quality(args, scores[0], blocks, from_scratch, checkpoint)


if __name__ == "__main__":
    main()
