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
from blocks import cost, latencies, make_prunable, merge, print_table  # noqa: E402
from blocks import prunable_blocks, read_subnet, set_subnet  # noqa: E402

MODELS = ["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224"]
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flag = parser.add_argument
flag("--models", nargs="+", default=MODELS)
specs_help = "subnets of --models, instead of the thirds"
flag("--specs", nargs="+", metavar="FILE", default=[], help=specs_help)
flag("--batch-sizes", type=int, nargs="+", default=[1, 16])
flag("--img-size", type=int, default=224)
attention_help = "attention counts as a prunable block, too (ViTs only)"
flag("--attention", action="store_true", help=attention_help)
flag("--ladder", action="store_true", help="all blocks, rung by rung")
flag("--compile", action="store_true", help="torch.compile")
flag("--seed", type=int, default=0, help="draws the blocks")
flag("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def choose_subnets(args, name, model):
    """{label: what to prune} for a model."""
    ladders = {path: block.rungs for path, block in prunable_blocks(model).items()}
    subnets = {}
    if args.ladder:
        for level in range(max(map(len, ladders.values()))):
            subnets[f"rung {level + 1}"] = {
                path: rungs[min(level, len(rungs) - 1)] for path, rungs in ladders.items()
            }
    elif args.specs:
        for path in args.specs:
            label = os.path.splitext(os.path.basename(path))[0]
            subnets[label] = read_subnet(path, name)["prune"]
    else:
        rng = random.Random(args.seed)
        for third in (1, 2, 3):
            size = round(len(ladders) * third / 3)
            subnets[f"{size} of {len(ladders)}"] = rng.sample(list(ladders), size)
    return subnets


def main():
    args = parser.parse_args()
    device = torch.device(args.device)
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(
        f"{where}, torch {torch.__version__}, {args.img_size} px{', compiled' * args.compile};"
        " speed-up over the baseline / over the baseline with its BN folded"
    )
    for name in args.models:
        torch.manual_seed(0)
        model_args = read_subnet(args.specs[0]).get("model_args", {}) if args.specs else {}
        baseline, model = (timm.create_model(name, **model_args).eval() for _ in range(2))
        make_prunable(model, attention=args.attention)
        networks = {"baseline": baseline, "BN folded": merge(model)}
        for label, prune in choose_subnets(args, name, model).items():
            set_subnet(model, prune)
            networks[label] = merge(model)
        size = 3, args.img_size, args.img_size
        costs = [cost(network, size) for network in networks.values()]
        for network in networks.values():
            network.to(device, memory_format=torch.channels_last)
            if args.compile:
                network.compile(dynamic=False)
        header = [name, "params (M)", "MACs (M)", "by MACs"]
        rows = []
        for label, c in zip(networks, costs):
            params, macs = f"{c['params'] / 1e6:.2f}", f"{c['macs'] / 1e6:.0f}"
            rows.append([label, params, macs, f"{costs[0]['macs'] / c['macs']:.2f}x"])
        for batch in args.batch_sizes:
            images = torch.randn(batch, *size, device=device)
            images = images.to(memory_format=torch.channels_last)
            seconds = latencies(networks.values(), images)[:, 1]
            header += [f"ms, batch {batch}", "speed-up"]
            for row, s in zip(rows, seconds):
                row += [f"{s * 1e3:.2f}", f"{seconds[0] / s:.2f}x / {seconds[1] / s:.2f}x"]
        print()
        print_table(header, rows)


if __name__ == "__main__":
    main()
