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
import importlib
import json
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
from blocks import (
    build,
    evaluate,
    make_loader,
    prunable_blocks,
    read_checkpoint,  # noqa: E402
    recalibrate,
    set_subnet,
)

stage2 = importlib.import_module("2_search")
parser = argparse.ArgumentParser(
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,  # stage 3's --seed is not --seeds
)
parser.add_argument(
    "--supernet",
    nargs="+",
    default=["runs/supernet.pt"],
    help="with --train, scores of all of them are compared",
)
parser.add_argument("--prune", type=int, default=6, help="blocks to prune")
parser.add_argument("--macs", type=float, help="largest share of the MACs, instead of --prune")
parser.add_argument("--images", type=int, default=2000, help="held-out images to score on")
parser.add_argument("--population", type=int, default=16)
parser.add_argument(
    "--share", type=float, default=0.2, help="largest share of the space that a search may score"
)
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument(
    "--train", type=int, metavar="N", help="run stage 3 on N random subnets instead"
)
parser.add_argument("--any-size", action="store_true", help="of any size instead of --prune")
parser.add_argument("--epochs", default="4", help="of stage 3")
parser.add_argument(
    "--out",
    default="runs/ranking",
    help="folder for what stage 3 writes; goes on where it was stopped",
)


def search_quality(args, score, blocks, from_scratch, checkpoint):
    kind, value = ("macs", args.macs) if args.macs else ("prune", args.prune)
    whole, savings = stage2.block_savings(
        build(checkpoint), blocks, checkpoint["data"]["input_size"]
    )
    budget = stage2.make_budget(kind, value, blocks, checkpoint["baseline"], whole, savings)
    space = list(budget[3]())

    def price(candidate):
        return whole["macs"] - sum(savings[n][g]["macs"] for n, g in zip(blocks, candidate))
    started = time.time()
    table = {candidate: score(candidate) for candidate in space}
    speeds = [len(space) / (time.time() - started)]
    for function, some in (
        (score, random.Random(0).sample(space, 20)),
        (from_scratch, space[:: len(space) // 20]),
    ):
        started = time.time()
        assert all(
            function(candidate) == table[candidate] for candidate in some
        )  # the same bits in any order
        speeds.append(len(some) / (time.time() - started))
    print(
        f"{len(space)} subnets within --{kind} {value:g}, {len(blocks)} blocks; subnets/s: all,"
        f" sorted {speeds[0]:.2f}, at random {speeds[1]:.2f}; recalibrated and evaluated from"
        f" scratch, images read again, {speeds[2]:.2f}"
    )
    ranked = sorted(space, key=lambda c: (table[c]["loss"], price(c), c))
    alone = 1 + sum(size - 1 for size in budget[0])  # are scored before the first generation
    generations = max(1, int(args.share * len(space) - alone) // args.population)
    print("seed  scored   rank of the search's pick   rank of random search's pick (mean of 100)")
    for seed in range(args.seeds):
        silence, sys.stdout = sys.stdout, open(os.devnull, "w", encoding="utf-8")
        scores, exact = stage2.search(
            lambda c: {**(table.get(c) or score(c)), "macs": price(c)},
            budget,
            args.population,
            generations,
            seed,
        )
        sys.stdout = silence
        assert not exact
        rank = ranked.index(next(filter(budget[1], stage2.ranked(scores)))) + 1
        rng = random.Random(seed)
        others = statistics.mean(
            min(map(ranked.index, rng.sample(space, len(scores)))) + 1 for _ in range(100)
        )
        print(
            f"{seed:4}  {len(scores):6}   {rank:4} (best {rank / len(space):.2%})   {others:.1f}"
            f" ({others / len(space):.2%})",
            flush=True,
        )
    best, worst = table[ranked[0]], table[ranked[-1]]
    print(
        f"loss from {best['loss']:.4f} to {worst['loss']:.4f}, top-1 of those {best['top1']:.2f}"
        f" and {worst['top1']:.2f} %"
    )


def ranking(args, scores, blocks, checkpoint):
    rng, rows = random.Random(0), []
    os.makedirs(args.out, exist_ok=True)
    for i in range(args.train):
        size = rng.randint(1, len(blocks)) if args.any_size else args.prune
        prune = sorted(rng.sample(list(blocks), size), key=list(blocks).index)
        path = os.path.join(args.out, f"{'any' if args.any_size else size}-{i}")
        with open(path + ".json", "w", encoding="utf-8") as file:
            json.dump({"format": 1, "model": checkpoint["model"], "prune": prune}, file)
        subprocess.run(
            [
                sys.executable,
                os.path.join(ROOT, "3_progressive.py"),
                "--supernet",
                args.supernet[0],
                "--subnet",
                path + ".json",
                "--epochs",
                args.epochs,
                "--workers",
                "1",
                "--resume",
                *args.stage3,
                "--out",
                path + ".pt",
            ],
            check=True,
        )
        top1, results = (
            read_checkpoint(path + ".pt")["subnet"]["top1"],
            [score(stage2.genes(prune, blocks)) for score in scores],
        )
        rows.append((top1, size, results))
        print(
            f"{i:3}  {size:2} pruned   supernet: "
            + "; ".join(f"loss {r['loss']:.4f}, top-1 {r['top1']:.2f} %" for r in results)
            + f"   after stage 3 {top1:.2f} %   {' '.join(prune)}",
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

    def images(part, limit):  # as stage 2 does by default
        return list(make_loader(checkpoint["data"], part, 128, torch.device("cpu"), limit=limit))

    def from_scratch(candidate):
        set_subnet(plain, stage2.named(candidate, blocks))
        if calibration:
            recalibrate(plain, [batch for batch, _ in images("train", 512)])
        return evaluate(plain, images("holdout", args.images))

    trained = checkpoint["flags"]["epochs"] or not checkpoint["flags"]["calibrate"]
    calibration = [batch for batch, _ in images("train", 512)] if trained else []
    held_out = images("holdout", args.images)
    scores = [
        stage2.make_score(
            build(read_checkpoint(path)).to(memory_format=torch.channels_last),
            blocks,
            calibration,
            held_out,
        )
        for path in args.supernet
    ]
    if args.train:
        ranking(args, scores, blocks, checkpoint)
    else:
        search_quality(args, scores[0], blocks, from_scratch, checkpoint)


if __name__ == "__main__":
    main()
