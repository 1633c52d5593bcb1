"""How well stage 2's table predicts latency: random subnets, predicted and timed as merged
networks.

    python tests/benchmarks/latency.py                   # four networks, 224 px, batch 1 and 16
    python tests/benchmarks/latency.py --models resnet18 --batch-sizes 8 --device cuda
"""

import argparse
import importlib
import os
import random
import statistics
import sys

import timm
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from blocks import latencies, make_prunable, prunable_blocks  # noqa: E402

stage2 = importlib.import_module("2_search")
MODELS = ["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224"]
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--models", nargs="+", default=MODELS)
parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
parser.add_argument("--subnets", type=int, default=20)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def kendall(a, b):
    """Kendall's tau of two lists without ties: (concordant - discordant) / all pairs."""
    points = list(zip(a, b))
    pairs = [(x - u) * (y - v) for i, (x, y) in enumerate(points) for u, v in points[:i]]
    return sum((p > 0) - (p < 0) for p in pairs) / len(pairs)


def spearman(a, b):
    """Spearman's rank correlation of two lists without ties."""

    def ranks(values):
        return [float(sorted(values).index(value)) for value in values]

    return statistics.correlation(ranks(a), ranks(b))


def main():
    args = parser.parse_args()
    device = torch.device(args.device)
    print(
        f"{args.subnets} random subnets each, {device.type}, {torch.get_num_threads()} threads,"
        f" torch {torch.__version__}; share of the latency of the baseline with its BN folded"
    )
    for name in args.models:
        for batch in args.batch_sizes:
            torch.manual_seed(0)
            model, rng = timm.create_model(name), random.Random(1)
            make_prunable(model)
            blocks = {path: block.rungs for path, block in prunable_blocks(model).items()}
            images = torch.randn(batch, 3, 224, 224, device=device)
            images = images.to(memory_format=torch.channels_last)
            _, savings = stage2.block_savings(model, blocks, images.shape[1:])
            table = stage2.measure_blocks(model, blocks, savings, images)

            def predicted(subnet):
                genes = zip(blocks, stage2.to_candidate(subnet, blocks))
                return table["baseline"] - sum(table["savings"][path][gene] for path, gene in genes)

            subnets = []
            while len(subnets) < args.subnets:
                some = rng.sample(list(blocks), rng.randint(1, len(blocks)))
                subnets.append({path: rng.choice(blocks[path]) for path in some})
            # three networks at a time, in turn with the baseline: the machine's mood changes over
            # minutes
            timed, share = [], [predicted(subnet) / predicted({}) for subnet in subnets]
            for i in range(0, len(subnets), 3):
                some = [{}, *subnets[i : i + 3]]
                networks = [stage2.merged_on(model, subnet, device) for subnet in some]
                seconds = latencies(networks, images)[:, 1]
                timed += [t / seconds[0] for t in seconds[1:]]
            errors = [abs(p / t - 1) for p, t in zip(share, timed)]
            print(
                f"{name:24} batch {batch:3}   baseline {predicted({}) * 1e3:7.1f} ms"
                f"   shares {min(timed):.2f} to {max(timed):.2f}"
                f"   error: median {statistics.median(errors):.1%}, worst {max(errors):.1%}"
                f"   rank correlation {spearman(share, timed):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
