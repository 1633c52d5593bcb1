"""Stage 4 of 4: merges the trained subnet into plain layers, proves that it is the same network, and times it.

Reads runs/subnet.pt. Writes runs/merged.pt (weights and spec, for `blocks.load`) and runs/merged.pt2 (torch.export with a
dynamic batch: runs in any Python with torch, without this repository and without timm).

    python 4_merge.py
    python 4_merge.py --batch-size 1

    program = torch.export.load("runs/merged.pt2").module()       # in a deployment
    logits = program(images)                                      # (B, 3, H, W), normalised as the spec in it says

Merging is done in float64. If merged and unmerged differ on the validation images, it exits with status 1 and writes
nothing. The table at the end times the file that was written, as it was read back.
"""
import argparse
import copy
import json

import torch

from blocks import (UserError, at_least, check_writable, cost, evaluate, latencies, load, load_baseline, make_loader,
                    make_prunable, merge, pick_device, print_table, read, replacing, restore, run, save)

parser = argparse.ArgumentParser(
    description="Stage 4 of 4: merges, checks, exports and times.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--subnet", default="runs/subnet.pt", metavar="FILE", help="stage 3's checkpoint")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
parser.add_argument("--batch-size", type=at_least(1), default=16, help="images per forward pass that is timed")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
parser.add_argument("--out", default="runs/merged.pt", metavar="FILE", help="the merged network; its export has a 2 behind the name")


@torch.no_grad()
def check(names, ours, theirs, batches, dtype, bound):
    """Prints how far two networks' logits are apart, computed in `dtype`; raises UserError where that is more than
    `bound` (times the logits' standard deviation)."""
    ours, theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
    error, equal, logits = 0.0, 0, []
    for images, _ in batches:
        a, b = ours(images.to(dtype)), theirs(images.to(dtype))
        error = max(error, (a - b).abs().max().item())
        equal += (a.argmax(1) == b.argmax(1)).sum().item()
        logits.append(a)
    logits = torch.cat(logits)
    bound *= logits.std().item()
    text = (f"{names}: max abs error {error:.1e} (bound {bound:.1e}), same top-1 on {equal} of {len(logits)} images")
    if not error <= bound:  # also where it is not a number
        raise UserError(f"{text}: they differ, nothing was written")
    print(text, flush=True)


def export(merged, spec, path):
    """Writes `merged` as a torch.export program for any batch size, with the spec as its extra file spec.json."""
    images = torch.zeros(2, *spec["input_size"])
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.6 cannot export attention without a maximum
    program = torch.export.export(merged, (images,), dynamic_shapes=({0: batch},), strict=False)
    about = {key: value for key, value in spec.items() if not isinstance(value, torch.Tensor)}
    torch.export.save(program, path, extra_files={"spec.json": json.dumps(about)})


def main():
    args = parser.parse_args()
    device = pick_device(args.device)
    check_writable(args.out)
    checkpoint = read(args.subnet, "subnet")
    checkpoint["data_dir"] = args.data_dir or checkpoint["data_dir"]
    model = restore(checkpoint)

    # Is it the same network? First the merge itself, then, on all images, the weights that will be written. Both computed
    # in float64: in float32 the unmerged network's own rounding errors can be larger than the merged one's.
    val, few = (make_loader(checkpoint, "val", 64, device, args.workers, limit=limit) for limit in (None, 64))
    merged = merge(copy.deepcopy(model).double())
    check("merged against unmerged", model.to(device), merged.to(device), few, torch.float64, 1e-10)
    merged.float()
    check("merged, in float32, against unmerged", model, merged, val, torch.float64, 1e-4)

    merged.cpu()
    spec = {key: value for key, value in checkpoint.items() if not key.endswith("state_dict")} | {"stage": "merged"}
    exported = args.out + "2"
    with replacing(exported) as temporary:
        export(merged, spec, temporary)
        program = torch.export.load(temporary).module()
        check(f"{exported} against merged", merged, program, [(x.cpu(), y) for x, y in few], torch.float32, 1e-4)
        save({**spec, "state_dict": merged.state_dict()}, args.out)

    # What it costs and what it is worth: the files as a user opens them
    merged, _ = load(args.out)
    baseline, folded = load_baseline(checkpoint), load_baseline(checkpoint)
    make_prunable(folded)
    folded = merge(folded)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in (
        ("baseline", baseline), ("baseline, BN folded", folded), ("merged", merged))}  # channels_last: faster for each
    images = torch.randn(args.batch_size, *spec["input_size"], device=device).to(memory_format=torch.channels_last)
    seconds = latencies(networks.values(), images)
    rows = []
    for (name, network), latency in zip(networks.items(), seconds):
        c = cost(network, spec["input_size"])
        rows.append((name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{latency * 1e3:.2f}",
                     f"{seconds[0] / latency:.2f}x", f"{evaluate(network, val)['top1']:.2f}"))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"\n{spec['model']} at {spec['input_size'][-1]} px, {len(spec['prune'])} blocks pruned;"
          f" latency of {args.batch_size} images on {device.type}{threads}, torch {torch.__version__}\n")
    print_table(("", "params (M)", "MACs (M)", "latency (ms)", "speed-up", "top-1 (%)"), rows)
    print(f"\nwrote {args.out} and {args.out}2")


if __name__ == "__main__":
    run(main)
