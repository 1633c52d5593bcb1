"""Stage 4 of 4: merges the trained subnet into plain layers, proves that it is the same network, and times it.

Reads runs/subnet.pt. Writes runs/merged.pt (weights and spec, for `blocks.load`) and runs/merged.pt2 (torch.export with a
dynamic batch: runs in any Python with torch, without this repository and without timm), with --onnx runs/merged.onnx too.

    python 4_merge.py
    python 4_merge.py --batch-size 1 16 --compile --json runs/merged.json
    python 4_merge.py --fold-normalization --onnx                 # takes RGB from 0 to 1; ONNX for other runtimes

    program = torch.export.load("runs/merged.pt2").module()       # in a deployment
    logits = program(images)                                      # (B, 3, H, W), normalised as the spec in it says

Merging is done in float64. If merged and unmerged differ on the validation images, it exits with status 1 and writes
nothing. The table at the end times the file that was written, as it was read back.
"""
import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import os

import torch
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blocks import (UserError, at_least, check_writable, cost, evaluate, latencies, load, load_baseline, make_loader,
                    merge, pick_device, print_table, read, replacing, restore, run, save)

parser = argparse.ArgumentParser(
    description="Stage 4 of 4: merges, checks, exports and times.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--subnet", default="runs/subnet.pt", metavar="FILE", help="stage 3's checkpoint")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
parser.add_argument("--fold-normalization", action="store_true",
                    help="the exports take RGB from 0 to 1 and normalise by themselves")
parser.add_argument("--onnx", action="store_true", help="write an ONNX file as well (pip install onnx onnxscript)")
parser.add_argument("--batch-size", type=at_least(1), nargs="+", default=[16], help="images per forward pass that is timed")
parser.add_argument("--compile", action="store_true", help="time the networks with torch.compile, too")
parser.add_argument("--json", metavar="FILE", help="write the table into a file")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
parser.add_argument("--out", default="runs/merged.pt", metavar="FILE",
                    help="the merged network; its export has a 2 behind the name, .onnx instead of the ending")


@torch.no_grad()
def check(names, ours, theirs, batches, bound):
    """Prints how far the logits of two networks are apart, computed in the dtype of `ours`; raises UserError where that is
    more than `bound` (times the logits' standard deviation)."""
    error, equal, logits = 0.0, 0, []
    for images, _ in batches:
        images = images.to(next(ours.parameters()).dtype)
        a, b = ours(images), theirs(images)
        error = max(error, (a - b).abs().max().item())
        equal += (a.argmax(1) == b.argmax(1)).sum().item()
        logits.append(a)
    logits = torch.cat(logits)
    bound *= logits.std().item()
    text = (f"{names}: max abs error {error:.1e} (bound {bound:.1e}), same top-1 on {equal} of {len(logits)} images")
    if not error <= bound:  # also where it is not a number
        raise UserError(f"{text}: they differ, nothing was written")
    print(text, flush=True)


def onnx_session(path):
    """onnxruntime's session for the ONNX file `path`, None where that is not installed."""
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def export(network, spec, path, onnx=None):
    """Writes `network` as a torch.export program for any batch size, with the spec as its extra file spec.json, and into
    the file `onnx`."""
    images = torch.zeros(2, *spec["input_size"])
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.6 cannot export attention without a maximum
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False)
    about = json.dumps({key: value for key, value in spec.items() if not isinstance(value, torch.Tensor)})
    torch.export.save(program, path, extra_files={"spec.json": about})
    if onnx:
        program = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False)
        program.model.metadata_props["spec"] = about
        program.save(onnx)


def with_normalization(network, spec):
    """`network` behind (images - mean) / std, and the spec of that: mean 0, std 1."""
    normalize = nn.BatchNorm2d(len(spec["mean"]), eps=0, affine=False)
    normalize.running_mean, normalize.running_var = torch.tensor(spec["mean"]), torch.tensor(spec["std"]) ** 2
    return nn.Sequential(normalize, network).eval(), {**spec, "mean": [0.0] * len(spec["mean"]), "std": [1.0] * len(spec["mean"])}


class Alive(TorchDispatchMode):
    """Keeps count of the bytes that are alive in tensors, weights among them, while it is active: `peak`."""

    def __init__(self, weights):
        super().__init__()
        self.peak, self.alive = 0, {}
        self.add(weights)

    def add(self, tensors):
        for storage in (tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)):
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result


@torch.no_grad()
def peak_memory(network, shape):
    """Bytes of weights and activations that are alive at once in a forward pass of images of `shape`. Counted on the meta
    device; what kernels need besides comes on top."""
    network = copy.deepcopy(network).to("meta")
    with Alive(itertools.chain(network.parameters(), network.buffers())) as alive:
        network(torch.empty(shape, device="meta"))
    return alive.peak


def main():
    args = parser.parse_args()
    device = pick_device(args.device, args.compile)
    for path in filter(None, (args.out, args.json)):
        check_writable(path)
    if args.onnx and (missing := [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]):
        raise UserError(f"--onnx needs more packages: pip install {' '.join(missing)}")
    checkpoint = read(args.subnet, "subnet")
    checkpoint["data_dir"] = args.data_dir or checkpoint["data_dir"]
    model = restore(checkpoint)

    # Is it the same network? First the merge itself, then, on all images, the weights that will be written. Both computed
    # in float64: in float32 the unmerged network's own rounding errors can be larger than the merged one's.
    val, some, few = (make_loader(checkpoint, "val", 64, device, args.workers, limit=limit) for limit in (None, 512, 64))
    model.double().to(device)
    merged = merge(model)
    check("merged against unmerged", model, merged, few, 1e-10)
    merged.float()
    check("merged, in float32, against unmerged", model, copy.deepcopy(merged).double(), val, 1e-4)

    merged.cpu()
    spec = {key: value for key, value in checkpoint.items() if not key.endswith("state_dict")} | {"stage": "merged"}
    network, about = with_normalization(merged, spec) if args.fold_normalization else (merged, spec)
    mean, std = (torch.tensor(spec[key]).view(-1, 1, 1) for key in ("mean", "std"))

    def for_export(images):
        return images * std + mean if args.fold_normalization else images

    some = [(images.cpu(), labels) for images, labels in some]
    onnx = os.path.splitext(args.out)[0] + ".onnx" if args.onnx else None
    with replacing(args.out + "2") as temporary, replacing(onnx) if onnx else contextlib.nullcontext() as temporary_onnx:
        export(network, about, temporary, temporary_onnx)
        program = torch.export.load(temporary).module()
        check(f"{args.out}2 against merged", merged, lambda images: program(for_export(images)), some, 1e-4)
        if onnx:
            session = onnx_session(temporary_onnx)
            if session:
                check(f"{onnx} against merged", merged, lambda images: torch.from_numpy(
                    session.run(None, {"images": for_export(images).numpy()})[0]), some, 1e-4)
            else:
                print(f"{onnx} was not checked: pip install onnxruntime")
        save({**spec, "state_dict": merged.state_dict()}, args.out)

    # What it costs and what it is worth: the files as a user opens them
    merged, _ = load(args.out)
    baseline = load_baseline(checkpoint)
    networks = {name: network.to(device, memory_format=torch.channels_last) for name, network in (
        ("baseline", baseline), ("baseline, BN folded", merge(baseline)), ("merged", merged))}  # channels_last: faster for each
    about = [{"network": name, **cost(network, spec["input_size"]), "top1": evaluate(network, val)["top1"]}
             for name, network in networks.items()]
    memory = {batch: [peak_memory(network, (batch, *spec["input_size"])) for network in networks.values()]
              for batch in args.batch_size}
    rows = []
    for compiled in (False, True)[:1 + args.compile]:
        for network in networks.values() if compiled else ():
            network.compile(dynamic=False)  # as it would be deployed: a batch size, a compilation
        for batch in args.batch_size:
            images = torch.randn(batch, *spec["input_size"], device=device).to(memory_format=torch.channels_last)
            seconds = latencies(networks.values(), images)
            for row, peak, (low, median, high) in zip(about, memory[batch], seconds.tolist()):
                rows.append({**row, "compiled": compiled, "batch": batch, "memory": peak, "seconds": median,
                             "quartiles": [low, high], "images_per_s": batch / median, "speed_up": seconds[0, 1] / median})
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"\n{spec['model']} at {spec['input_size'][-1]} px, {len(spec['prune'])} blocks pruned; on {where}, torch"
          f" {torch.__version__}\n")
    print_table(("", "params (M)", "MACs (M)", "top-1 (%)", "batch", "memory (MB)", "latency (ms)", "quartiles", "images/s",
                 "speed-up"), [
        (r["network"] + ", compiled" * r["compiled"], f"{r['params'] / 1e6:.3f}", f"{r['macs'] / 1e6:.1f}", f"{r['top1']:.2f}",
         str(r["batch"]), f"{r['memory'] / 1e6:.1f}", f"{r['seconds'] * 1e3:.2f}",
         " - ".join(f"{s * 1e3:.2f}" for s in r["quartiles"]), f"{r['images_per_s']:.0f}", f"{r['speed_up']:.2f}x") for r in rows])
    if args.json:
        with replacing(args.json) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"model": spec["model"], "prune": spec["prune"], "input_size": spec["input_size"], "device": where,
                       "torch": torch.__version__, "rows": rows}, file, indent=1)
    print("\nwrote " + ", ".join(filter(None, (args.out, args.out + "2", onnx, args.json))))


if __name__ == "__main__":
    run(main)
