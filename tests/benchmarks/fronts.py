"""Fronts of a network with given weights and few photos: what is kept at which latency.

    python tests/benchmarks/fronts.py --seeds 0 1 2 --model tf_efficientnet_lite0 \\
        --checkpoint tf_efficientnet_lite0.pth --data-dir imagenet1k
    python tests/benchmarks/fronts.py --speed ...   # the same, and times what was merged

All by default: stage 1 without training, the search, stage 3 without and with training; for each
seed, which draws the photos that are held back, and each budget. Flags that this script does not
know go to stage 1. "skip": PRACTISE's choice in our terms: whole blocks only, of all sets within
the budget the one of which the search lost least, summed over its blocks alone. What is in --out
already is not repeated, one that was stopped goes on: other flags need another --out. Ends with a
table; --out/fronts.csv has each run.
"""

import argparse
import csv
import importlib
import itertools
import os
import sys

import torch
from evidence import spread, stage

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from blocks import UserError, at_least, build, latencies, merge, print_table  # noqa: E402
from blocks import prunable_blocks, read_checkpoint, read_subnet, run, save  # noqa: E402

stage2 = importlib.import_module("2_search")
HOUR = ["--epochs", 48, "--mixup", 1, "--cutmix", 1, "--amp"]
WAYS = {  # which blocks, and flags of stage 3, of which the last --epochs counts
    "fitted": ("ladder", ["--epochs", 0]),
    "repaired": ("ladder", []),
    "an hour": ("ladder", HOUR),
    "skip": ("skip", ["--epochs", 0]),
    "skip, repaired": ("skip", []),
    "skip, an hour": ("skip", HOUR),
}
parser = argparse.ArgumentParser(
    formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
)
flag = parser.add_argument
flag("--out", default="runs/fronts", help="folder for all files")
flag("--seeds", type=at_least(0), nargs="+", default=[0])
budgets = {"nargs": "+", "default": [0.9, 0.83, 0.77, 0.71]}
flag("--latency", type=at_least(0, float, 1), **budgets, help="two or more")
flag("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:2])
flag("--epochs", type=at_least(0), default=16, help="of the repair")
flag("--speed", action="store_true", help="time the first seed's networks (on a quiet machine)")


def whole_blocks(checkpoint, path, share):
    """The blocks to leave out so that at most `share` of the latency is left, and the sum of what
    each costs the answers alone is smallest, by what the search of `path` (CSV) found."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    full = next(float(row["latency"]) for row in rows if not row["prune"])
    blocks, sets = prunable_blocks(build(checkpoint)), {(): {"loss": 0.0, "latency": full}}
    for row in rows:
        name, _, rung = row["prune"].partition(":")
        if row["generation"] == "0" and name and (rung or blocks[name].rungs[0]) == "skip":
            loss, more = float(row["loss"]), float(row["latency"]) - full
            for names, of in list(sets.items()):
                of = {"loss": of["loss"] + loss, "latency": of["latency"] + more}
                sets[(*names, name)] = of
            # What costs the answers more than another set, and is no faster, is no use
            sets = {names: sets[names] for names in stage2.pareto(sets, "latency")}
    for names, of in sets.items():  # the best first, the fastest last
        if of["latency"] <= share * full:
            return dict.fromkeys(names, "skip")
    raise UserError(f"without whole blocks {of['latency'] / full:.2f} of the latency are left")


def main():
    args, more = parser.parse_known_args()
    if len(args.latency) < 2:  # stage 2 names its files otherwise for one
        parser.error("--latency needs two budgets or more")

    def path(*words):
        return os.path.join(args.out, "-".join(map(str, words)).replace(",", "").replace(" ", "-"))

    def once(script, *flags, out):
        if not all(map(os.path.exists, out)):
            print(f"\n{script}: {' '.join(out)}", flush=True)
            stage(script, *flags, "--resume")

    rows, files = [], {}
    for seed in args.seeds:
        supernet, found = path("supernet", f"{seed}.pt"), path("found", seed)
        flags = ["--seed", seed, "--out", supernet]
        once("1_supernet.py", *more, "--epochs", 0, *flags, out=[supernet])
        checkpoint = read_checkpoint(supernet, "supernet")
        inputs = ["--supernet", supernet, "--seed", seed]
        specs = {share: f"{found}-{share:g}.json" for share in args.latency}
        flags = ["--latency", *specs, "--latency-batch", 1, "--out", f"{found}.json"]
        once("2_search.py", *inputs, *flags, out=specs.values())
        for share, way in itertools.product(specs, args.ways):
            kind, flags = WAYS[way]
            spec, out = specs[share], path(f"{share:g}", way, f"{seed}.pt")
            prune = read_subnet(spec)["prune"]
            if kind == "skip":
                prune = whole_blocks(checkpoint, f"{found}.search.csv", share)
                spec = path("skip", seed, f"{share:g}.json")
                save({"format": 1, "model": checkpoint["model"], "prune": prune}, spec)
            flags = ["--subnet", spec, "--epochs", args.epochs, *flags, "--out", out]
            once("3_progressive.py", *inputs, *flags, out=[out])
            result = read_checkpoint(out, "subnet")["subnet"]
            numbers = {key: result[key] for key in ("top1", "agreement", "kl")}
            about = {"seed": seed, "unpruned": checkpoint["baseline"]["top1"], "latency": share}
            rows.append({**about, "way": way, **numbers, "prune": prune})
            files.setdefault((share, kind), out)
            save(rows, path("fronts.csv"))

    table = []
    for share, way in itertools.product(args.latency, args.ways):
        these = [row for row in rows if (row["latency"], row["way"]) == (share, way)]
        numbers = (spread([row[key] for row in these]) for key in ("top1", "agreement", "kl"))
        table.append([f"{share:g}", way, *numbers])
    header = [checkpoint["model"], "", "top-1 (%)", "agree (%)", "KL"]
    if args.speed:
        baseline = build(checkpoint, baseline=True)
        networks = [merge(baseline), *(merge(build(read_checkpoint(f))) for f in files.values())]
        for batch in (1, 16):
            header.append(f"speed-up, batch {batch}")
            images = torch.randn(batch, *checkpoint["data"]["input_size"])
            images = images.to(memory_format=torch.channels_last)
            channels_last = [n.to(memory_format=torch.channels_last) for n in networks]
            seconds = dict(zip([None, *files], latencies(channels_last, images)[:, 1]))
            for row, (share, way) in zip(table, itertools.product(args.latency, args.ways)):
                row.append(f"{seconds[None] / seconds[share, WAYS[way][0]]:.2f}x")
    print(f"\nunpruned: {rows[0]['unpruned']:.2f} %; seeds {args.seeds}\n")
    print_table(header, table)


if __name__ == "__main__":
    run(main)
