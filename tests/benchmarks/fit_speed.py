"""How long does the fit take, and how much memory, against the number of blocks?

    python tests/benchmarks/fit_speed.py --models tf_efficientnet_lite0 resnet34 --images 1024

Random weights and images, as stage 3 fits: block after block. Every row is a process of its own, so
that the peak of its memory (resident set, with the images) is its own, too.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

import timm
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import fit, make_prunable, print_table  # noqa: E402

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--models", nargs="+", default=["tf_efficientnet_lite0", "resnet34"])
parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="the first K")
parser.add_argument("--images", type=int, default=1024)
parser.add_argument("--img-size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)


def measure(args):
    """Prints the number of blocks, seconds of the fit and of a forward pass, and MiB."""
    model = timm.create_model(args.models[0]).eval()
    names = make_prunable(model, "fitted")[: args.blocks[0]]
    model.to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    shape = args.batch_size, 3, args.img_size, args.img_size
    batches = [
        torch.randn(shape).to(memory_format=torch.channels_last)
        for _ in range(args.images // args.batch_size)
    ]
    with torch.no_grad():
        model(batches[0])
        started = time.time()
        model(batches[0])
    forward = (time.time() - started) * len(batches)
    started = time.time()
    fit(model, names, batches)
    seconds = time.time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(len(names), f"{seconds:.1f}", f"{seconds / forward:.2f}", f"{peak:.0f}", sep=",")


def main():
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    rows = []
    for name in args.models:
        for number in args.blocks:
            flags = ["--models", name, "--blocks", str(number), "--images", str(args.images)]
            flags += ["--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
            command = [sys.executable, __file__, "--one", *flags]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            print(result.stdout, end="", flush=True)
            blocks, seconds, forwards, peak = result.stdout.split("\n")[-2].split(",")
            each = f"{float(seconds) / int(blocks):.1f}"
            rows.append((name, blocks, seconds, each, forwards, peak))
    print(f"{args.images} images at {args.img_size} px, {torch.get_num_threads()} threads")
    header = ("", "blocks", "seconds", "per block", "forward passes", "peak MiB")
    print_table(header, rows)


if __name__ == "__main__":
    main()
