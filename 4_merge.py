"""Stage 4 of 4: merges the trained subnet into plain layers, proves that it is the same, times it.

Reads runs/subnet.pt. Writes runs/merged.pt (for `blocks.build`), runs/merged.pt2 (torch.export) and
runs/merged.json (the table of the end, which times the file as read back). A merged network that
was trained further, {**checkpoint, "state_dict": …}, is exported with --subnet and another --out.

    python 4_merge.py --batch-size 1 16 --compile
    python 4_merge.py --fold-normalization --onnx             # takes RGB from 0 to 1; ONNX

Merging is done in float64. If merged and unmerged differ on the validation images, it exits with
status 1 and writes nothing.
"""
import contextlib
import importlib.util
import json
import os

import torch

from blocks import (Parser, UserError, answers, at_least, atomic_write, build, cost, evaluate,
                    latencies, make_loader, merge, print_table, read_checkpoint, run, run_flags,
                    save, start)

parser = Parser(description="Stage 4 of 4: merges, checks, exports and times.")
flag = parser.add_argument
flag("--subnet", default="runs/subnet.pt", metavar="FILE", help="stage 3's checkpoint")
flag("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
flag("--fold-normalization", action="store_true", help="the exports take RGB from 0 to 1")
flag("--onnx", action="store_true", help="write ONNX, too (pip install onnx onnxscript)")
flag("--batch-size", type=at_least(1), nargs="+", default=[16], help="images that are timed")
flag("--compile", action="store_true", help="time the networks with torch.compile, too")
run_flags(parser, resume=False)
flag("--out", default="runs/merged.pt", metavar="FILE",
     help="the merged network; its exports end in .pt2 and .onnx, the table in .json, instead")


@torch.no_grad()
def check(names, ours, theirs, batches, bound, rounding=0.0):
    """Prints and returns how far two networks' logits are apart. UserError where that is more than
    `bound` times their standard deviation, and than twice `rounding`, one network's own error."""
    dtype = next(ours.parameters()).dtype
    logits = [(ours(x), theirs(x)) for x in (images.to(dtype) for images, _ in batches)]
    a, b = map(torch.cat, zip(*logits))
    error, equal = (a - b).abs().max().item(), (a.argmax(1) == b.argmax(1)).sum()
    bound = max(bound * a.std().item(), 2 * rounding)  # two errors of that size may add up
    text = (f"{names}: max abs error {error:.1e} (bound {bound:.1e}), same top-1 on {equal} of"
            f" {len(a)} images")
    if not error <= bound:  # NaN, too
        raise UserError(f"{text}: they differ, nothing was written")
    print(text)
    return error


@torch.no_grad()
def write(args, paths, merged, about, batches, rounding):
    """Writes the network and its exports, once they were checked on `batches`, as `check` says."""
    network = merged.requires_grad_(False)  # a deployment does not train
    outside, mean, std = about, 0, 1  # exports take images * std + mean
    if args.fold_normalization:
        mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
        normalize = torch.nn.Conv2d(len(mean), len(mean), 1, groups=len(mean)).requires_grad_(False)
        normalize.weight.copy_(1 / std[:, None])
        normalize.bias.copy_((-mean / std).flatten())
        network = torch.nn.Sequential(normalize, network).eval()
        outside = {**about, "mean": [0.0] * len(mean), "std": [1.0] * len(mean)}
    images, outside = torch.zeros(2, *about["input_size"]), json.dumps(outside)
    batch = torch.export.Dim("batch", max=2**31 - 1)  # torch 2.6: attention needs a maximum
    export = torch.export.export(network, (images,), dynamic_shapes=({0: batch},), strict=False)

    with contextlib.ExitStack() as stack:
        # All are written, then all take their places: a kill hardly ever leaves two networks
        pt, pt2, *onnx = (stack.enter_context(atomic_write(path)) for path in paths)
        torch.export.save(export, pt2, extra_files={"about.json": outside})
        program = torch.export.load(pt2).module()
        check(f"{paths[1]} against merged", merged, lambda x: program(x * std + mean), batches,
              1e-4, rounding)
        if onnx:
            export = torch.onnx.export(export, dynamo=True, input_names=["images"],
                                       output_names=["logits"], verbose=False)
            export.model.metadata_props["about"] = outside
            export.save(onnx[0])
        if onnx and importlib.util.find_spec("onnxruntime"):
            import onnxruntime
            session = onnxruntime.InferenceSession(onnx[0], providers=["CPUExecutionProvider"])
            check(f"{paths[2]} against merged", merged, lambda x: torch.from_numpy(
                session.run(None, {"images": (x * std + mean).numpy()})[0]), batches, 1e-4,
                rounding)
        elif onnx:
            print(f"{paths[2]} was not checked: pip install onnxruntime")
        save({**about, "state_dict": merged.state_dict()}, pt)


def peak_memory(network, images):
    """Bytes on the GPU at the peak of a forward pass: weights, images, activations, workspace."""
    others = torch.cuda.memory_allocated(images.device) - images.nbytes - sum(
        tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    torch.cuda.reset_peak_memory_stats(images.device)
    with torch.inference_mode():
        network(images)
    return torch.cuda.max_memory_allocated(images.device) - others


def main():
    args, device, _ = start(parser, "subnet")
    cuda = device.type == "cuda"
    if args.onnx and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("--onnx needs more packages: pip install onnx onnxscript")
    stem, _ = os.path.splitext(args.out)
    paths, table = [args.out, stem + ".pt2", *[stem + ".onnx"] * args.onnx], stem + ".json"
    if len({*map(os.path.realpath, (args.subnet, table, *paths))}) < 2 + len(paths):
        raise UserError("--subnet, --out and what is written beside it must be different files")
    checkpoint = read_checkpoint(args.subnet, "subnet", "merged")
    if checkpoint["stage"] == "merged":  # and trained further: there is nothing to merge or compare
        about = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        images = torch.randn(64, *about["input_size"]).split(16)
        write(args, paths, build(checkpoint), about, [(batch, None) for batch in images], 0.0)
        print(f"wrote {', '.join(paths)}")
        return
    data = {**checkpoint["data"], "data_dir": args.data_dir or checkpoint["data"]["data_dir"]}
    model, baseline = build(checkpoint), build(checkpoint, baseline=True)

    # Is it the same network? First the merge itself, then, on all images, the weights that are
    # written: they may be as far off as the unmerged network in float32 is from itself.
    val, val_512, val_64 = (make_loader(data, "val", 64, device, args.workers, limit)
                            for limit in (None, 512, 64))
    torch.backends.cudnn.allow_tf32, tf32 = False, torch.backends.cudnn.allow_tf32
    model.double().to(device)
    merged, rounded = merge(model), build(checkpoint).to(device)
    check("merged against unmerged", model, merged, val_64, 1e-10)
    rounding = check("unmerged, in float32, against float64", model,
                     lambda images: rounded(images.float()).double(), val, 1e-2)
    merged.float()
    check("merged, in float32, against unmerged", model,
          lambda images: merged(images.float()).double(), val, 1e-4, rounding)

    # What travels with the network says nothing of this machine
    known = {**data, **checkpoint, "stage": "merged"}
    about = {key: known[key] for key in (
        "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "classes", "model",
        "model_args", "prune", "form", "end_act", "attention", "stage")}
    write(args, paths, merged.cpu(), about, [(x.cpu(), y.cpu()) for x, y in val_512], rounding)

    # What it costs and what it is worth: the file as a user opens it
    torch.backends.cudnn.allow_tf32 = tf32
    networks = {"baseline": baseline, "baseline, BN folded": merge(baseline),
                "merged": build(read_checkpoint(args.out))}
    facts, rows, wanted = [], [], answers(baseline.to(device), val)
    for name, network in networks.items():
        found = evaluate(network.to(device, memory_format=torch.channels_last), val, logits=wanted)
        facts.append({"network": name, **cost(network, data["input_size"]),
                      "top1": found["top1"], "agreement": found["agreement"]})
    for compiled in (False, True)[:1 + args.compile]:
        for network in networks.values() if compiled else ():
            network.compile(dynamic=False)  # as deployed: compiled for one batch size
        for batch in args.batch_size:
            images = torch.randn(batch, *data["input_size"], device=device)
            images = images.to(memory_format=torch.channels_last)
            seconds = latencies(networks.values(), images)
            for fact, network, (low, median, high) in zip(facts, networks.values(), seconds):
                memory = peak_memory(network, images) if cuda else None
                rows.append({**fact, "compiled": compiled, "batch": batch, "memory": memory,
                             "seconds": median, "quartiles": [low, high],
                             "images_per_s": batch / median, "speed_up": seconds[1, 1] / median})
    chip = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    print(f"\n{about['model']} at {'x'.join(map(str, about['input_size'][1:]))} px,"
          f" {len(about['prune'])} blocks pruned, on {chip}, torch {torch.__version__}\n")
    header = ("", "params (M)", "MACs (M)", "top-1 (%)", "agree (%)", "batch", "latency (ms)",
              "quartiles", "images/s", "speed-up", *["memory (MB)"] * cuda)
    lines = [
        (r["network"] + ", compiled" * r["compiled"], f"{r['params'] / 1e6:.3f}",
         f"{r['macs'] / 1e6:.1f}", f"{r['top1']:.2f}", f"{r['agreement']:.2f}", str(r["batch"]),
         f"{r['seconds'] * 1e3:.2f}", " - ".join(f"{s * 1e3:.2f}" for s in r["quartiles"]),
         f"{r['images_per_s']:.0f}", f"{r['speed_up']:.2f}x",
         *([f"{r['memory'] / 1e6:.1f}"] if cuda else [])) for r in rows]
    if control := checkpoint["control"]:
        lines.insert(0, ("control", *lines[0][1:3], f"{control['top1']:.2f}",
                         f"{control['agreement']:.2f}", *[""] * (len(header) - 5)))
    print_table(header, lines)
    if control:
        print("control: the baseline, trained for as long as this subnet")
    save({"model": about["model"], "prune": about["prune"], "device": chip, "control": control,
          "input_size": about["input_size"], "torch": torch.__version__, "rows": rows}, table)
    print(f"\nwrote {', '.join((*paths, table))}")


if __name__ == "__main__":
    run(main)
