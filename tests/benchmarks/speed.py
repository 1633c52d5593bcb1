"""How much faster are the merged networks, and how much faster does arithmetic allow? Weights are
random: they do not matter.

    # the four networks, at 224 px
    python tests/benchmarks/speed.py
    # DepthShrinker's choices of blocks
    python tests/benchmarks/speed.py --models mobilenetv2_140 --specs tests/benchmarks/specs/*.json
    python tests/benchmarks/speed.py --device cuda --batch-sizes 1 128
    # all blocks at their first rung, at the second, …
    python tests/benchmarks/speed.py --ladder

A third, two thirds (drawn at random) and all of the prunable blocks, or those of --specs, each
against the baseline and against the baseline with its BN folded; medians of many short turns, in
one process.
"""

import argparse
import os
import random
import sys

import timm
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from blocks import (  # noqa: E402
    cost,
    latencies,
    make_prunable,
    merge,
    print_table,
    prunable_blocks,
    read_subnet,
    set_subnet,
)

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument(
    "--models",
    nargs="+",
    default=["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224"],
)
parser.add_argument(
    "--specs",
    nargs="+",
    metavar="FILE",
    default=[],
    help="subnets of --models, instead of the thirds",
)
parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
parser.add_argument("--img-size", type=int, default=224)
parser.add_argument(
    "--attention", action="store_true", help="attention counts as a prunable block, too (ViTs only)"
)
parser.add_argument("--ladder", action="store_true", help="all blocks, rung by rung")
parser.add_argument("--compile", action="store_true", help="torch.compile")
parser.add_argument("--seed", type=int, default=0, help="draws the blocks")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main():
    args = parser.parse_args()
    device = torch.device(args.device)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads"
    )
    print(
        f"{where}, torch {torch.__version__}, {args.img_size} px"
        f"{', compiled' if args.compile else ''}; speed-up over the baseline / over the"
        " baseline with its BN folded"
    )
    for name in args.models:
        rng = random.Random(args.seed)
        torch.manual_seed(0)
        model_args = read_subnet(args.specs[0]).get("model_args", {}) if args.specs else {}
        baseline, model = (timm.create_model(name, **model_args).eval() for _ in range(2))
        names = make_prunable(model, attention=args.attention)
        subnets = [
            (os.path.splitext(os.path.basename(path))[0], read_subnet(path, name)["prune"])
            for path in args.specs
        ] or [
            (f"{size} of {len(names)}", rng.sample(names, size))
            for size in (round(len(names) * third / 3) for third in (1, 2, 3))
        ]
        if args.ladder:
            ladders = {path: block.rungs for path, block in prunable_blocks(model).items()}
            subnets = [
                (
                    f"rung {level + 1}",
                    {path: rungs[min(level, len(rungs) - 1)] for path, rungs in ladders.items()},
                )
                for level in range(max(map(len, ladders.values())))
            ]
        networks = [baseline, merge(model)]
        for _, prune in subnets:
            set_subnet(model, prune)
            networks.append(merge(model))
        costs = [cost(network, (3, args.img_size, args.img_size)) for network in networks]
        networks = [network.to(device, memory_format=torch.channels_last) for network in networks]
        if args.compile:
            for network in networks:
                network.compile(dynamic=False)
        seconds = []
        for batch in args.batch_sizes:
            images = torch.randn(batch, 3, args.img_size, args.img_size, device=device)
            seconds.append(latencies(networks, images.to(memory_format=torch.channels_last))[:, 1])
        rows = [
            (
                label,
                f"{c['params'] / 1e6:.2f}",
                f"{c['macs'] / 1e6:.0f}",
                f"{costs[0]['macs'] / c['macs']:.2f}x",
                *(
                    text
                    for times in seconds
                    for text in (
                        f"{times[i] * 1e3:.2f}",
                        f"{times[0] / times[i]:.2f}x / {times[1] / times[i]:.2f}x",
                    )
                ),
            )
            for i, (label, c) in enumerate(
                zip(["baseline", "BN folded", *(label for label, _ in subnets)], costs)
            )
        ]
        print()
        print_table(
            (
                name,
                "params (M)",
                "MACs (M)",
                "by MACs",
                *(
                    text
                    for batch in args.batch_sizes
                    for text in (f"ms, batch {batch}", "speed-up")
                ),
            ),
            rows,
        )


if __name__ == "__main__":
    main()
