"""Top-1 of pruned networks that were not trained: a third, two thirds and all blocks, fitted in
closed form or left out.

    python tests/benchmarks/training_free.py --supernet runs/supernet.pt
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import build, prunable_blocks, read_checkpoint, save  # noqa: E402

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
supernet_help = "only its baseline and its data are used"
parser.add_argument("--supernet", default="runs/supernet.pt", help=supernet_help)
parser.add_argument("--subnets", type=int, default=3, help="random subnets of each size")
parser.add_argument("--calibrate", nargs="+", default=["0", "1024", "4096"])


def top1_of(supernet, model, prune, calibrate):
    """Of the subnet, as stage 3 makes it without training."""
    with tempfile.TemporaryDirectory() as folder:
        spec, out = os.path.join(folder, "subnet.json"), os.path.join(folder, "subnet.pt")
        save({"format": 1, "model": model, "prune": prune}, spec)
        command = [sys.executable, os.path.join(ROOT, "3_progressive.py"), "--supernet", supernet]
        command += ["--subnet", spec, "--epochs", "0", "--workers", "0", "--calibrate", calibrate]
        subprocess.run([*command, "--out", out], check=True, stdout=subprocess.DEVNULL)
        return read_checkpoint(out)["subnet"]["top1"]


def main():
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.supernet, "supernet")
    model, blocks = checkpoint["model"], list(prunable_blocks(build(checkpoint)))
    print(f"{model}, baseline top-1 {checkpoint['baseline']['top1']:.2f} %; top-1 without training")
    for third in (1, 2, 3):
        size = round(len(blocks) * third / 3)
        for images in args.calibrate:
            top1, started = [], time.time()
            for seed in range(args.subnets if third < 3 else 1):
                prune = random.Random(seed).sample(blocks, size)
                top1.append(top1_of(args.supernet, model, prune, images))
            how = f"fitted on {images} images" if images != "0" else "only their skips left"
            print(
                f"{size:3} of {len(blocks)} pruned, {how}:"
                f" {' '.join(f'{value:.2f}' for value in top1)} %,"
                f" mean {sum(top1) / len(top1):.2f} %;"
                f" {(time.time() - started) / len(top1):.0f} s each, start and evaluation included",
                flush=True,
            )


if __name__ == "__main__":
    main()
