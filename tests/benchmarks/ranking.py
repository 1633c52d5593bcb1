"""By what subnets of a network with given weights should be ranked: the loss of a few labels, the
divergence (KL) from the unpruned network's answers, or how little the logits correlate with its
own? Kendall's tau of each with the top-1, agreement and KL that random subnets within a budget have
on the val images, fitted in turn, as they are and with BN statistics that moved.

    python 1_supernet.py --model ... --checkpoint ... --data-dir ... --epochs 0
    python tests/benchmarks/ranking.py --macs 0.9 --out ranking.csv

Goes on where a CSV of before ends.
"""

import argparse
import csv
import importlib
import os
import random
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from latency import kendall  # noqa: E402

import blocks  # noqa: E402

stage2 = importlib.import_module("2_search")
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt", help="of stage 1, with --epochs 0")
parser.add_argument("--macs", type=float, default=0.9, help="largest share of the baseline's")
parser.add_argument("--subnets", type=int, default=20)
parser.add_argument("--calibrate", type=int, default=300, help="training images to fit on")
parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 600], help="to score on")
parser.add_argument("--out", default="ranking.csv")


def main():
    args, device = parser.parse_args(), torch.device("cpu")
    checkpoint = blocks.read_checkpoint(args.supernet, "supernet")
    data = checkpoint["data"]

    def images(part, limit=None):
        return list(blocks.make_loader(data, part, 50, device, limit=limit))

    def network():
        return blocks.build(checkpoint).to(memory_format=torch.channels_last)

    model = network()
    rungs = {name: block.rungs for name, block in blocks.prunable_blocks(model).items()}
    unpruned, savings = stage2.block_savings(network(), rungs, data["input_size"])
    sizes, _, repair, _ = stage2.make_budget("macs", args.macs, rungs, unpruned, unpruned, savings)
    # The images held back come first: few, but nothing was fitted on them
    photos = {n: (images("holdout") + images("train", n))[: max(1, n // 50)] for n in args.images}
    photos = {**photos, "val": images("val")}
    answers = {n: blocks.answers(model, batches) for n, batches in photos.items()}

    def found(model, n):
        result = blocks.evaluate(model, photos[n], logits=answers[n])
        return {f"{key} on {n}": value for key, value in result.items()}

    statistics = blocks.bn_statistics(model, photos[args.images[0]])
    # What each gene costs by itself tells where a random subnet saves, as in the search
    alone = [[1e-3] * size for size in sizes]
    for i, name in enumerate(rungs):
        for gene, rung in enumerate(rungs[name], 1):
            blocks.set_subnet(model, {name: rung})
            n = args.images[0]
            alone[i][gene] = found(model, n)[f"distance on {n}"]
    rows, rng = [], random.Random(0)
    if os.path.exists(args.out):
        with open(args.out) as file:
            rows = list(csv.DictReader(file))
    for number in range(args.subnets):
        prune = stage2.to_prune(repair((0,) * len(sizes), rng, alone), rungs)
        if number < len(rows):
            continue
        row = {"prune": " ".join(f"{name}:{rung}" for name, rung in prune.items())}
        for way in ("alone", "in turn"):
            pruned, norms, first = network(), None, args.images[0]
            if way == "in turn":
                blocks.fit(pruned, prune, images("train", args.calibrate))
                norms = blocks.not_fitted(pruned)
            blocks.set_subnet(pruned, prune)
            for moved in ("", ", statistics moved"):
                if moved:
                    blocks.recalibrate(pruned, photos[first], norms, statistics)
                for n in args.images if way == "alone" else [first]:
                    row.update({f"{way}{moved}, {key}": v for key, v in found(pruned, n).items()})
                if way == "in turn":
                    row.update({key + moved: v for key, v in found(pruned, "val").items()})
        rows.append(row)
        blocks.save(rows, args.out)
        print(f"{number + 1:3}  {row['agreement on val, statistics moved']:.1f} %  {row['prune']}")
    for moved in ("", ", statistics moved"):
        goals = [
            [float(row[f"{key} on val{moved}"]) for row in rows]
            for key in ("top1", "agreement", "kl")
        ]
        print(
            f"mean of {len(rows)} subnets, fitted in turn{moved}: top-1, agreement, KL",
            *(f"{sum(goal) / len(goal):.2f}" for goal in goals),
        )
        for key in rows[0]:
            if "val" not in key and key.split(" on ")[0].endswith(("loss", "kl", "distance")):
                column = [float(row[key]) for row in rows]
                taus = [-kendall(column, goal) for goal in goals[:2]] + [kendall(column, goals[2])]
                print(f"{key:40}", *(f"{tau:5.2f}" for tau in taus))


if __name__ == "__main__":
    main()
