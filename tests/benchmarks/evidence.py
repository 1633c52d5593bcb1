"""Does progressive depth pruning beat direct pruning? One supernet's subnets, trained in several
ways by stage 3.

    python tests/benchmarks/evidence.py --supernet runs/supernet.pt --out runs/evidence --seeds 0 \\
        1 2 --epochs 4 --lr 1e-3
    # only these
    python tests/benchmarks/evidence.py --rows progressive "no soft labels" --thirds 2

A third, two thirds and all of the prunable blocks, as stage 2 picks them. Flags that this script
does not know go to every run of stage 3, but where they are what the row is about. Runs that are in
--out already are not repeated, one that was stopped goes on: other flags need another --out.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import (
    build,
    cost,
    latencies,
    merge,
    print_table,  # noqa: E402
    prunable_blocks,
    read_checkpoint,
)

ROWS = {  # which blocks, and what is added to stage 3's flags
    "control": ("none", []),  # the baseline, trained on for as long and in the same way
    "direct": ("searched", ["--transition", "0"]),
    "progressive": ("searched", []),
    "from scratch": ("searched", ["--start", "random", "--transition", "0"]),
    "progressive, random blocks": ("random", []),
    # ablations
    "no soft labels": ("searched", ["--distill", "0"]),
    "not fitted": ("searched", ["--calibrate", "0"]),
    "not fitted, direct": ("searched", ["--calibrate", "0", "--transition", "0"]),
    "end activation": ("searched", ["--end-act"]),
    "no end activation": ("searched", ["--no-end-act"]),
}
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt")
parser.add_argument("--out", default="runs/evidence", help="folder for all files")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:5])
parser.add_argument(
    "--thirds",
    type=int,
    nargs="+",
    choices=(1, 2, 3),
    help="sizes for all rows (None: two thirds for the last"
    " two of the default rows and for the ablations, all three for the others)",
)
parser.add_argument("--latency-batch", type=int, default=16)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def stage(script, *flags):
    subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, flags)], check=True)


def main():
    args, more = parser.parse_known_args()
    checkpoint = read_checkpoint(args.supernet, "supernet")
    input_size = checkpoint["data"]["input_size"]
    blocks = list(prunable_blocks(build(checkpoint)))
    sizes = [round(len(blocks) * third / 3) for third in (1, 2, 3)]

    def path(name):
        return os.path.join(args.out, name.replace(" ", "_").replace(",", ""))

    def write(name, prune):
        with open(path(name), "w", encoding="utf-8") as file:
            json.dump({"format": 1, "model": checkpoint["model"], "prune": prune}, file)

    os.makedirs(args.out, exist_ok=True)
    searched = [path(f"searched-{size}.json") for size in sizes]
    if not all(map(os.path.exists, searched)):
        write(f"searched-{sizes[2]}.json", blocks)
        stage(
            "2_search.py",
            "--supernet",
            args.supernet,
            "--prune",
            *sizes[:2],
            "--device",
            args.device,
            "--out",
            path("searched.json"),
        )
    write("none-0.json", [])

    results = {}  # (row, number of blocks) -> top-1 for each seed
    for seed in args.seeds:
        for row in args.rows:
            kind, flags = ROWS[row]
            thirds = args.thirds or ((1, 2, 3) if row in list(ROWS)[:3] else (2,))
            for size in [0] if kind == "none" else [sizes[third - 1] for third in thirds]:
                chosen = f"{kind}-{size}-{seed}.json" if kind == "random" else f"{kind}-{size}.json"
                if kind == "random":
                    write(chosen, random.Random(seed).sample(blocks, size))
                out = path(f"{row}-{size}-{seed}.pt")
                if not os.path.exists(out):
                    print(f"\n{row}, {size} of {len(blocks)}, seed {seed}", flush=True)
                    stage(
                        "3_progressive.py",
                        "--supernet",
                        args.supernet,
                        "--subnet",
                        path(chosen),
                        "--seed",
                        seed,
                        "--device",
                        args.device,
                        *more,
                        *flags,
                        "--resume",
                        "--out",
                        out,
                    )
                results.setdefault((row, size), []).append(
                    read_checkpoint(out, "subnet")["subnet"]["top1"]
                )

    # Costs and latencies of the merged networks, in turns: of all seeds' where the blocks are
    # random, else of one, as the rows of a size differ in their weights only (and an end
    # activation)
    files, shared = {}, {}
    for row, size in results:
        of_seeds = [path(f"{row}-{size}-{seed}.pt") for seed in args.seeds]
        files[row, size] = (
            of_seeds if "random" in row else [shared.setdefault(size, of_seeds[0])] if size else []
        )
    baseline, names = (
        build(checkpoint, baseline=True),
        list(dict.fromkeys(itertools.chain(*files.values()))),
    )
    networks = [baseline, merge(baseline), *(merge(build(read_checkpoint(name))) for name in names)]
    costs = [cost(network, input_size) for network in networks]
    images = torch.randn(args.latency_batch, *input_size, device=args.device).to(
        memory_format=torch.channels_last
    )
    seconds = latencies(
        [network.to(args.device, memory_format=torch.channels_last) for network in networks], images
    )[:, 1]
    about = dict(zip(["baseline", "folded", *names], zip(costs, seconds)))

    def spread(values):
        return f"{statistics.mean(values):.2f}" + (
            f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        )

    print(
        f"\n{checkpoint['model']} at {input_size[-1]} px, baseline {checkpoint['baseline']['top1']:.2f} %; seeds {args.seeds},"
        f" {' '.join(more)}; latency of {args.latency_batch} images on {args.device}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; baseline with BN folded {seconds[1] * 1e3:.2f} ms\n"
    )
    rows = []
    for (row, size), top1 in results.items():
        these = [about[name] for name in files[row, size] or ["baseline"]]
        price = {key: statistics.mean(c[key] for c, _ in these) for key in costs[0]}
        time = statistics.mean(time for _, time in these)
        control = results.get(("control", 0))
        rows.append(
            (
                row,
                f"{size} of {len(blocks)}",
                spread(top1),
                spread([a - b for a, b in zip(top1, control)]) if control and size else "",
                f"{price['params'] / 1e6:.3f}",
                f"{price['macs'] / 1e6:.1f}",
                f"{time * 1e3:.2f}",
                f"{seconds[0] / time:.2f}x",
                f"{seconds[1] / time:.2f}x",
                f"{costs[0]['macs'] / price['macs']:.2f}x",
            )
        )
    print_table(
        (
            "",
            "pruned",
            "top-1 (%)",
            "minus control",
            "params (M)",
            "MACs (M)",
            "ms",
            "speed-up",
            "of folded",
            "by MACs",
        ),
        rows,
    )
    for size in sizes:
        pair = [results.get((row, size)) for row in ("progressive", "direct")]
        if all(pair):
            gains = [a - b for a, b in zip(*pair)]
            error = (
                f", standard error {statistics.stdev(gains) / math.sqrt(len(gains)):.2f}"
                if len(gains) > 1
                else ""
            )
            print(
                f"progressive minus direct, {size} of {len(blocks)}: {statistics.mean(gains):+.2f}{error}"
            )


if __name__ == "__main__":
    main()
