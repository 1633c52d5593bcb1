"""All that waits for a GPU, in one command of less than eight minutes: whoever is lent one runs it
first.

    python tests/benchmarks/on_gpu.py --images cifar10.tar --out runs/on_gpu.csv
    # everything at toy size, on any machine, so that nothing fails for the first time on the GPU
    python tests/benchmarks/on_gpu.py --tiny

speed: merged networks, all blocks and every other one at their first rung, random weights, over the
baseline with its BN folded: in float32 (convolutions in TF32, PyTorch's default), bfloat16 and
float16, eager and compiled, with the peak of the GPU's memory. It goes first, and alone. Compiling
takes minutes: that is done last, for all blocks only, as far as the part's time goes.
tests: the CUDA tests of the test suite.
stages: all four, for a network of each family, with --amp and, for two of them, --compile. Stage 3
is killed and resumed; stage 4 compares merged and unmerged in float64 and float32.
evidence: stage 3 from the same baselines, two thirds (as stage 2 picks them) and all of the blocks
pruned, paper's form, direct (--transition 0) against progressive; one seed more as long as there is
time. The last three parts run side by side: their seconds are no timings.

--images is a tar of train/CLASS/* and val/CLASS/*, or such a folder. Every result is a row of --out
as soon as it is there; beside it OUT.log has what the programs print, and OUT.files their files.
A second run with the same --out goes on: it repeats failed rows only. Exit status 1 if one failed.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import csv
import functools
import glob
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import traceback
from xml.etree import ElementTree

import timm
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from blocks import UserError, build, default_end_act, insert_end_acts, latencies  # noqa: E402
from blocks import make_prunable, merge, print_table, prunable_blocks  # noqa: E402
from blocks import read_checkpoint, save, set_subnet  # noqa: E402

first, second, fourth = map(importlib.import_module, ("1_supernet", "2_search", "4_merge"))
FULL = {
    "speed": ("resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224", "resnet50"),
    "pixels": 224,
    "batches": (32, 1, 256),
    "rounds": 3,
    "backend": "inductor",
    "tests": "",
    "stages": {  # a block's shapes are compiled one by one: where all blocks are alike it is quick
        "resnet18": "",
        "mobilenetv2_100": "",
        "convnext_atto": "--compile",
        "deit_tiny_patch16_224": "--compile --model-kwargs patch_size=4",
    },
    "flags": "--amp --batch-size 256 --workers 3",
    "epochs": (20, 8),  # of the baseline, of a subnet
    "search": "",
    "seeds": 99,
}
TINY = FULL | {
    "speed": ("test_resnet", "test_vit", "resnet14t"),
    "pixels": 32,
    "batches": (1, 2),
    "rounds": 1,
    "backend": "eager",  # graphs are captured, no code is made
    "tests": "-p no:xdist",
    "stages": {"test_resnet": ""},
    "flags": "--amp --batch-size 20 --workers 0",
    "epochs": (1, 3),
    "search": "--population 4 --generations 1",
    "seeds": 1,
}
UNTIL = {"speed": 0.37, "tests": 0.95, "stages": 0.95, "evidence": 0.97}  # shares of --minutes
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flag = parser.add_argument
flag("--images", help="a tar, or a folder (None: drawn pictures)")
flag("--out", default="runs/on_gpu.csv", help="the results")
flag("--minutes", type=float, default=7.5, help="all parts together")
flag("--parts", nargs="+", choices=UNTIL, default=list(UNTIL))
flag("--img-size", type=int, default=32, help="of the stages and the evidence")
flag("--tiny", action="store_true", help="toy size")
args = parser.parse_args()
plan, device = TINY if args.tiny else FULL, "cuda" if torch.cuda.is_available() else "cpu"
files, started = os.path.abspath(args.out + ".files"), time.time()
lock, log, left_out = threading.Lock(), [], collections.Counter()
KEYS = ("part", "network", "what", "column")


# ---- rows, and programs --------------------------------------------------------------------------


def seconds_left(part):
    return started + 60 * args.minutes * UNTIL[part] - time.time()


def write_log(text):
    with lock, open(args.out + ".log", "a", encoding="utf-8") as file:
        file.write(text + "\n")


def attempt(part, network, what, column, measure, again=False):
    """Makes a row of what measure() returns, a dict with "result", or of how it failed. Not where
    the row is there and did not fail, but `again`, nor where the part's time is over."""
    key = dict(zip(KEYS, (part, network, what, column)))
    old = [row for row in log if {k: row[k] for k in KEYS} == key]
    if old and not old[0]["failed"] and not again:
        return
    begin, row = time.time(), {"result": "FAILED", "failed": ""}
    try:
        if seconds_left(part) < 0:
            raise subprocess.TimeoutExpired(what, 0)
        row |= measure()
    except subprocess.TimeoutExpired:
        left_out[part] += 1
        return
    except Exception as error:
        write_log(traceback.format_exc())
        row["failed"] = (str(error).splitlines() or [repr(error)])[-1]
    with lock:
        log[:] = [other for other in log if other not in old]
        log.append(key | row | {"seconds": round(time.time() - begin, 1)})
        save(log, args.out)
    print(
        f"{time.time() - started:4.0f} s ", *key.values(), row["result"], row["failed"], flush=True
    )


def python(line, part, folder=ROOT):
    """What `python LINE` prints. RuntimeError where it fails, TimeoutExpired with the part's time."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    command, limit = [sys.executable, *shlex.split(line)], max(0.1, seconds_left(part))
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=limit)  # fmt: skip
    write_log(f"$ python {line}\n{done.stdout}{done.stderr}")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise RuntimeError(f"{shlex.split(line)[0]}: {lines[-1]}")
    return done.stdout


def kill(line, part, folder, path):
    """Starts `python LINE`, and kills it (SIGKILL) as soon as it has written `path`."""
    with subprocess.Popen([sys.executable, *shlex.split(line)], cwd=folder,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # fmt: skip
        while process.poll() is None and not os.path.exists(path) and seconds_left(part) > 0:
            time.sleep(0.01)
        process.kill()


# ---- the parts -----------------------------------------------------------------------------------


@functools.cache
def merged_networks(name):
    """{"folded", "half", "all"}: the baseline with its BN folded, every other block pruned, all."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    names, networks = make_prunable(model), {"folded": merge(model)}
    for label, prune in (("half", names[::2]), ("all", names)):
        if default_end_act(model, "reparam", prune):  # as stage 3 does
            insert_end_acts(model)
        set_subnet(model, prune)
        networks[label] = merge(model)
    return networks


def speed():
    def images(batch, dtype):
        shape = batch, 3, plan["pixels"], plan["pixels"]
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    def measure(name, precision, compiled, batch):
        dtype, row = PRECISIONS[precision], {}
        torch._dynamo.reset()
        try:
            networks = merged_networks(name)
        except UserError as error:
            return {"result": f"refused: {str(error).split(';')[0]}"}
        networks = {
            label: copy.deepcopy(network).to(dtype=dtype, memory_format=torch.channels_last)
            for label, network in networks.items()
            if not (compiled and label == "half")
        }
        for network in networks.values() if compiled else ():
            network.compile(dynamic=False, backend=plan["backend"])
        batch = images(batch, dtype)
        timed = latencies(networks.values(), batch, plan["rounds"])[:, 1].tolist()
        for (label, network), seconds in zip(networks.items(), timed):
            row |= {f"ms_{label}": 1e3 * seconds, f"speed_up_{label}": timed[0] / seconds}
            if device == "cuda":
                row[f"mb_{label}"] = fourth.peak_memory(network, batch) / 1e6
        text = [f"{row[f'speed_up_{label}']:.2f}x {label}" for label in list(networks)[1:]]
        memory = [f"{row['mb_folded']:.0f} to {row['mb_all']:.0f} MB"] if device == "cuda" else []
        return row | {"result": ", ".join([f"{1e3 * timed[0]:.2f} ms", *text, *memory])}

    def predicted(name):  # CUDA's events time the blocks
        model = timm.create_model(name).eval().to(device)
        make_prunable(model)
        blocks = {path: block.rungs for path, block in prunable_blocks(model).items()}
        batch = images(plan["batches"][0], torch.float32)
        table = second.measure_blocks(model, blocks, batch, count=8, rounds=plan["rounds"])
        return {"result": f"sums are off by {table['error']:.1%}", "error": table["error"]}

    for compiled in (False, True):
        cases = itertools.product(PRECISIONS, plan["batches"], plan["speed"])
        for precision, batch, name in cases:
            job = functools.partial(measure, name, precision, compiled, batch)
            what = f"{precision}, {'compiled' if compiled else 'eager'}"
            attempt("speed", name, what, f"batch {batch}", job)
        if not compiled:
            name = plan["speed"][0]
            attempt("speed", name, "stage 2's latencies", "", lambda: predicted(name))


def cuda_tests():
    def measure():
        report = f"{files}/tests.xml"
        with contextlib.suppress(RuntimeError):
            python(f"-m pytest tests -k on_a_gpu {plan['tests']} --junitxml={report}", "tests")
        counts = ElementTree.parse(report).getroot()[0].attrib
        total, skipped, *bad = (int(counts[k]) for k in ("tests", "skipped", "failures", "errors"))
        text = f"{total - skipped - sum(bad)} passed, {skipped} skipped"
        return {"result": text, "failed": f"{sum(bad)} failed" * any(bad)}

    attempt("tests", "", "CUDA tests", "", measure)


def stages_and_evidence(images, model):
    """All four stages, then seed after seed of stage 3, in a folder of their own."""
    folder, (of_baseline, of_subnet) = os.path.join(files, model), plan["epochs"]
    fast = f"{plan['flags']} {plan['stages'][model]}".partition(" --model-kwargs")[0]
    supernet = f"{folder}/runs/supernet.pt"

    def third(size, way, seed):
        out = f"runs/{size}-{way}-{seed}.pt"
        return out, (
            f"{ROOT}/3_progressive.py {fast} --epochs {of_subnet} --form reparam --seed {seed}"
            f" --no-control --subnet runs/{size}.json{' --transition 0' * (way == 'direct')}"
            f" --out {out} --resume"
        )

    def stages():
        run = functools.partial(python, part="stages", folder=folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(f"{folder}/runs")
        run(
            f"{ROOT}/1_supernet.py --model {model} --data-dir {shlex.quote(images)}"
            f" --img-size {args.img_size} --baseline-epochs {of_baseline} --epochs 1"
            f" --calibrate 512 {plan['flags']} {plan['stages'][model]}"
        )
        checkpoint = read_checkpoint(supernet)
        names = list(prunable_blocks(build(checkpoint)))
        everything = {"format": 1, "model": checkpoint["model"], "prune": names}
        save(everything, f"{folder}/runs/all.json")
        size = round(len(names) * 2 / 3)
        run(f"{ROOT}/2_search.py --prune {size} --out runs/two-thirds.json {plan['search']}")
        out, line = third("two-thirds", "progressive", 0)  # the first row of the evidence
        kill(line, "stages", folder, f"{folder}/{out}.last")
        resumed = re.search(r"going on after epoch (\d+)", run(line))
        compiled = "--compile" * ("--compile" in fast)
        said = run(f"{ROOT}/4_merge.py --subnet {out} --batch-size 1 32 {compiled}")
        errors = re.findall(r"against unmerged: max abs error (\S+)", said)
        assert resumed, "stage 3 had ended before it could be killed"
        text = f"resumed after epoch {resumed[1]}, merge off by {errors[0]}, float32 {errors[1]}"
        return {"result": text, "error_float64": errors[0], "error_float32": errors[1]}

    def baseline():
        top1 = read_checkpoint(supernet)["baseline"]["top1"]
        return {"result": f"{top1:.2f} %", "top1": top1}

    def evidence(size, way, seed):
        out, line = third(size, way, seed)
        python(line, "evidence", folder)
        top1 = read_checkpoint(f"{folder}/{out}")["subnet"]["top1"]
        return {"result": f"{top1:.2f} %", "top1": top1}

    if "stages" in args.parts:
        attempt("stages", model, f"all four {fast}", "", stages, not os.path.exists(supernet))
    if "evidence" not in args.parts:
        return
    attempt("evidence", model, "baseline", "", baseline)
    for seed in range(plan["seeds"]):
        for size, way in itertools.product(("two-thirds", "all"), ("progressive", "direct")):
            if seconds_left("evidence") > 0:
                job = functools.partial(evidence, size, way, seed)
                attempt("evidence", model, f"{size}, {way}", f"seed {seed}", job)


# ---- all of them ---------------------------------------------------------------------------------


def open_images():
    """The folder with train and val."""
    folder = args.images or f"{files}/images"
    if not args.images:
        first.draw_shapes(folder, *((200, 60) if args.tiny else ()))
    elif os.path.isfile(args.images):
        folder = f"{files}/images"
        with tarfile.open(args.images) as tar:
            tar.extractall(folder, filter="data")
    return os.path.dirname(os.path.abspath(glob.glob(f"{folder}/**/train", recursive=True)[0]))


def main():
    os.makedirs(files, exist_ok=True)
    if os.path.exists(args.out):
        with open(args.out, encoding="utf-8") as file:
            log.extend(csv.DictReader(file))
    images = open_images()
    if "speed" in args.parts:
        speed()
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        jobs = [functools.partial(stages_and_evidence, images, model) for model in plan["stages"]]
        for job in [cuda_tests] * ("tests" in args.parts) + jobs:
            pool.submit(job)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(
        f"\n{where}, torch {torch.__version__}, timm {timm.__version__}, {time.strftime('%Y-%m-%d')}"
        f"{', --tiny' * args.tiny}, {time.time() - started:.0f} s; left out for lack of time:"
        f" {', '.join(f'{count} of {part}' for part, count in left_out.items()) or 'nothing'}\n"
    )
    lines = {}
    for row in sorted(log, key=lambda row: list(UNTIL).index(row["part"])):
        cells = lines.setdefault((row["part"], row["network"], row["what"]), [])
        cells.append(": ".join(filter(None, (row["column"], row["result"], row["failed"][:60]))))
    width = max(map(len, lines.values()))
    print_table(
        ("part", "network", "what", "results", *[""] * (width - 1)),
        [(*key, *cells, *[""] * (width - len(cells))) for key, cells in lines.items()],
    )
    print(f"\nwrote {args.out}, {args.out}.log")
    sys.exit(any(row["failed"] for row in log))


if __name__ == "__main__":
    main()
