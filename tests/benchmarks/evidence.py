"""Does progressive depth pruning beat direct pruning, and the fitted form the paper's? One
supernet's subnets, trained in several ways by stage 3.

    python tests/benchmarks/evidence.py --supernet runs/supernet.pt --out runs/evidence --seeds 0 \\
        1 2 --epochs 4 --lrs 3e-4 1e-3 3e-3 --transitions 0.25 0.5
    # only these
    python tests/benchmarks/evidence.py --rows "reparam, progressive" "reparam, no soft labels" \\
        --thirds 2

A third, two thirds and all of the prunable blocks, as stage 2 picks them, the same for all rows.
"from scratch" is stage 3 with a copy of the supernet whose baseline has new random weights, for
each seed, and so without soft labels. --lrs: each form, and the control, has the best of them on a
seed of its own, --tune-seed, with two thirds of the blocks pruned; --transitions: likewise, for the
paper's form. Flags that this script does not know go to every run of stage 3, but where they are
what the row is about. Runs that are in --out already are not repeated, one that was stopped goes
on: other flags need another --out.
"""

import argparse
import functools
import itertools
import math
import os
import random
import statistics
import subprocess
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import build, cost, create_model, latencies, merge, print_table  # noqa: E402
from blocks import prunable_blocks, read_checkpoint, save  # noqa: E402

SCRATCH = ["--form", "reparam", "--transition", "0", "--distill", "0"]
ROWS = {  # which blocks, and what is added to stage 3's flags
    "control": ("none", []),  # the baseline, trained on for as long and in the same way
    "reparam, direct": ("searched", ["--form", "reparam", "--transition", "0"]),
    "reparam, progressive": ("searched", ["--form", "reparam"]),
    "fitted, direct": ("searched", ["--form", "fitted", "--transition", "0"]),
    "fitted, progressive": ("searched", ["--form", "fitted"]),
    "from scratch": ("searched", SCRATCH),
    "reparam, random blocks": ("random", ["--form", "reparam"]),
    # ablations
    "reparam, no soft labels": ("searched", ["--form", "reparam", "--distill", "0"]),
    "reparam, end activation": ("searched", ["--form", "reparam", "--end-act"]),
    "reparam, no end activation": ("searched", ["--form", "reparam", "--no-end-act"]),
    "fitted, not fitted": ("searched", ["--form", "fitted", "--calibrate", "0"]),
    "fitted, end activation": ("searched", ["--form", "fitted", "--end-act"]),
    "fitted, no end activation": ("searched", ["--form", "fitted", "--no-end-act"]),
}
COMPARED = (
    ("reparam, progressive", "reparam, direct"),
    ("fitted, progressive", "fitted, direct"),
    ("reparam, progressive", "fitted, direct"),
    ("reparam, direct", "fitted, direct"),
)
parser = argparse.ArgumentParser(
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    allow_abbrev=False,  # stage 3's --transition is not --transitions
)
flag = parser.add_argument
flag("--supernet", default="runs/supernet.pt")
flag("--out", default="runs/evidence", help="folder for all files")
flag("--seeds", type=int, nargs="+", default=[0, 1, 2])
flag("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:7])
flag("--lrs", type=float, nargs="+", help="learning rates to choose from")
flag("--transitions", type=float, nargs="+", help="of the reparam form")
flag("--tune-seed", type=int, default=9)
sizes_help = (
    "sizes for all rows (None: two thirds for the last two of the default rows and for the"
    " ablations, all three for the others); 1.5: half"
)
flag("--thirds", type=float, nargs="+", choices=(1, 1.5, 2, 3), help=sizes_help)
flag("--latency-batch", type=int, default=16)
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def stage(script, *flags):
    command = [sys.executable, os.path.join(ROOT, script), *map(str, flags)]
    status = subprocess.run(command).returncode
    if status < 0:
        sys.exit(f"error: {script} was killed by signal {-status} (9: maybe memory ran out)")
    if status:
        sys.exit(status)  # the stage itself has said why


def spread(values):
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main():
    args, more = parser.parse_known_args()
    checkpoint = read_checkpoint(args.supernet, "supernet")
    input_size = checkpoint["data"]["input_size"]
    blocks = list(prunable_blocks(build(checkpoint)))
    all_thirds = sorted({1, 2, 3, *(args.thirds or ())})
    sizes = {third: round(len(blocks) * third / 3) for third in all_thirds}

    def path(name):
        return os.path.join(args.out, name.replace(" ", "_").replace(",", ""))

    def write(name, prune):
        save({"format": 1, "model": checkpoint["model"], "prune": prune}, path(name))

    if not all(os.path.exists(path(f"searched-{size}.json")) for size in sizes.values()):
        write(f"searched-{len(blocks)}.json", blocks)
        some = [size for size in sizes.values() if size < len(blocks)]
        inputs = ["--supernet", args.supernet, "--prune", *some, "--device", args.device]
        stage("2_search.py", *inputs, "--out", path("searched.json"))
    write("none-0.json", [])

    def untrained(seed):
        """The file of the supernet with another baseline, of random weights."""
        out = path(f"untrained-{seed}.pt")
        if not os.path.exists(out):  # a run that goes on wants the same file
            torch.manual_seed(seed)
            weights = create_model(checkpoint["model"], checkpoint["model_args"]).state_dict()
            save({**checkpoint, "baseline_state_dict": weights}, out)
        return out

    def train(row, size, seed, *flags):
        """The file of a subnet that stage 3 trains, and its top-1."""
        kind, of_row = ROWS[row]
        subnet = f"{kind}-{size}.json"
        if kind == "random":
            subnet = f"random-{size}-{seed}.json"
            write(subnet, random.Random(seed).sample(blocks, size))
        words = map(str, (row, size, seed, *flags))
        out = path("-".join(word.lstrip("-") for word in words) + ".pt")
        if not os.path.exists(out):
            print(f"\n{row}, {size} of {len(blocks)}, seed {seed} {flags}", flush=True)
            supernet = untrained(seed) if row == "from scratch" else args.supernet
            inputs = ["--supernet", supernet, "--subnet", path(subnet), "--seed", seed]
            outputs = ["--device", args.device, "--no-control", "--resume", "--out", out]
            stage("3_progressive.py", *inputs, *more, *flags, *of_row, *outputs)
        return out, read_checkpoint(out, "subnet")["subnet"]["top1"]

    @functools.cache
    def tuned(form):
        """The best flags for a form, or the control, on a seed of its own."""
        flags = []
        choices = (
            ("--lr", args.lrs, f"{form}, direct"),
            ("--transition", args.transitions, f"{form}, progressive"),
        )
        for name, values, row in choices:
            if values and (name == "--lr" or form == "reparam"):
                row, size = ("control", 0) if form == "control" else (row, sizes[2])
                scores = {}
                for value in values:
                    scores[value] = train(row, size, args.tune_seed, *flags, name, value)[1]
                flags += [name, max(scores, key=scores.get)]
                print(f"{form}: {name} {scores}", flush=True)
        return flags

    results, files = {}, {}  # (row, number of blocks) -> top-1, file for each seed
    chosen = {}  # form -> its flags
    for seed, third in itertools.product(args.seeds, all_thirds):
        for row in args.rows:
            form = row.split(",")[0].replace("from scratch", "reparam")
            thirds = args.thirds or ((1, 2, 3) if row in list(ROWS)[:5] else (2,))
            size = 0 if row == "control" else sizes[third]
            if third in thirds and not (row == "control" and third != thirds[0]):
                chosen[form] = tuned(form)
                out, top1 = train(row, size, seed, *chosen[form])
                results.setdefault((row, size), []).append(top1)
                files.setdefault((row, size), []).append(out)

    # Costs and latencies of the merged networks, in turns: of all seeds' where the blocks are
    # random, else of one, as the rows of a size differ in their weights only (and an end
    # activation)
    shared = {}
    for (row, size), of_seeds in files.items():
        if "random" not in row:
            files[row, size] = [shared.setdefault(size, of_seeds[0])] if size else []
    names = list(dict.fromkeys(itertools.chain(*files.values())))
    baseline = build(checkpoint, baseline=True)
    networks = [baseline, merge(baseline), *(merge(build(read_checkpoint(name))) for name in names)]
    costs = [cost(network, input_size) for network in networks]
    for network in networks:
        network.to(args.device, memory_format=torch.channels_last)
    images = torch.randn(args.latency_batch, *input_size, device=args.device)
    seconds = latencies(networks, images.to(memory_format=torch.channels_last))[:, 1]
    about = dict(zip(["baseline", "folded", *names], zip(costs, seconds)))

    print(
        f"\n{checkpoint['model']} at {input_size[-1]} px, baseline"
        f" {checkpoint['baseline']['top1']:.2f} %; seeds {args.seeds}, {' '.join(more)}, {chosen};"
        f" latency of {args.latency_batch} images on {args.device}, {torch.get_num_threads()}"
        f" threads, torch {torch.__version__}; baseline with BN folded {seconds[1] * 1e3:.2f} ms\n"
    )
    control, rows = results.get(("control", 0)), []
    for (row, size), top1 in results.items():
        these = [about[name] for name in files[row, size] or ["baseline"]]
        params, macs = (statistics.mean(c[key] for c, _ in these) for key in ("params", "macs"))
        time = statistics.mean(time for _, time in these)
        gain = spread([a - b for a, b in zip(top1, control)]) if control and size else ""
        speed_ups = (seconds[0] / time, seconds[1] / time, costs[0]["macs"] / macs)
        costs_of_row = (f"{params / 1e6:.3f}", f"{macs / 1e6:.1f}", f"{time * 1e3:.2f}")
        ratios = (f"{ratio:.2f}x" for ratio in speed_ups)
        rows.append((row, f"{size} of {len(blocks)}", spread(top1), gain, *costs_of_row, *ratios))
    header = ("", "pruned", "top-1 (%)", "minus control", "params (M)", "MACs (M)", "ms")
    print_table((*header, "speed-up", "of folded", "by MACs"), rows)
    for size, (better, worse) in itertools.product(sizes.values(), COMPARED):
        if (better, size) in results and (worse, size) in results:
            gains = [a - b for a, b in zip(results[better, size], results[worse, size])]
            error = ""
            if len(gains) > 1:
                error = f", standard error {statistics.stdev(gains) / math.sqrt(len(gains)):.2f}"
            names = f"{better} minus {worse}, {size} of {len(blocks)}"
            print(f"{names}: {statistics.mean(gains):+.2f}{error}")


if __name__ == "__main__":
    main()
