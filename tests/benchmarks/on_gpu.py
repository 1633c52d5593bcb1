"""All that waits for a GPU, in one command of less than eight minutes: whoever is lent one runs it
first.

    python tests/benchmarks/on_gpu.py --images cifar10.tar.gz
    # all of it at toy size, on any machine, so that nothing fails for the first time on the GPU
    python tests/benchmarks/on_gpu.py --tiny --out runs/tiny.csv --work runs/tiny

speed: merged networks of random weights, all blocks at their first rung and every other one, over
the baseline with its BN folded; float32 (convs in TF32, as PyTorch does), bfloat16 and float16,
eager and compiled, with the GPU's peak memory. It runs first, and alone. Compiling takes minutes:
that is last, for all blocks only, as far as the part's time goes.
tests: those of the test suite that need a GPU.
stages: all four, for a network of each family, with --amp, for two of them --compile; stage 3 is
killed and resumed, stage 4 compares merged with unmerged, in float64 and float32.
evidence: from the same baselines, stage 3 with two thirds of the blocks pruned (as stage 2 picks
them) and with all, paper's form, progressive against direct (--transition 0), seed after seed as
long as there is time. The last three parts run side by side: their seconds are no timings.

Every result is a row of --out as soon as it is there; OUT.log has what the programs print. The same
command again repeats only rows that failed; other flags need another --out and --work. Ends with a
table, and with exit status 1 if anything failed.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import csv
import functools
import glob
import importlib
import io
import itertools
import os
import re
import runpy
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


class Full:
    models = "resnet34 mobilenetv2_100 convnext_tiny deit_tiny_patch16_224 resnet50".split()
    pixels, batches, rounds, backend = 224, (32, 1, 256), 3, "inductor"
    tests = "tests"
    stages = {"resnet18": "", "mobilenetv2_100": "", "convnext_atto": ""}  # and stage 1's flags
    stages["deit_tiny_patch16_224"] = "--model-kwargs patch_size=4"
    compiled = "convnext_atto deit_tiny_patch16_224"  # blocks of one shape each: it is quick
    flags, search = "--amp --batch-size 256 --workers 3", ""
    epochs, seeds = (16, 6), 99  # of the baseline, of a subnet
    precisions = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Tiny:
    models = "test_resnet regnetx_002".split()  # the second has no prunable block
    pixels, batches, rounds, backend = 32, (1, 2), 1, "eager"  # graphs are captured, not compiled
    tests = "tests/test_training.py -p no:xdist"
    stages, compiled = {"test_resnet": ""}, ""
    flags, search = "--amp --batch-size 20 --workers 0", "--population 4 --generations 1"
    epochs, seeds = (1, 3), 1
    precisions = {"fp16": torch.float16}


UNTIL = {"speed": 0.37, "tests": 0.95, "stages": 0.95, "evidence": 0.97}  # shares of --minutes
LAYOUT = {"memory_format": torch.channels_last}
parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
flag = parser.add_argument
flag("--images", help="a tar or folder with train/CLASS/* and val/CLASS/* (None: drawn pictures)")
flag("--img-size", type=int, default=32, help="of the stages and the evidence")
flag("--out", type=os.path.abspath, default="runs/on_gpu.csv", help="the results")
flag("--work", type=os.path.abspath, default="runs/on_gpu", help="folder for all other files")
flag("--minutes", type=float, default=7.5, help="all parts together")
flag("--parts", nargs="+", choices=UNTIL, default=list(UNTIL))
flag("--tiny", action="store_true", help="toy size")
args, started, lock, log, late = parser.parse_args(), time.time(), threading.Lock(), [], []
plan, device = Tiny if args.tiny else Full, "cuda" if torch.cuda.is_available() else "cpu"


# ---- rows, and programs --------------------------------------------------------------------------


def seconds_left(part):
    return max(0, started + 60 * args.minutes * UNTIL[part] - time.time())


def write_log(text):
    with lock, open(args.out + ".log", "a", encoding="utf-8") as file:
        file.write(f"{time.time() - started:.0f} s: {text}\n")


def attempt(part, network, what, case, measure, again=False):
    """A row of what measure() returns, a dict with "result", or of how it failed. Rows that are
    there stay, but failed ones, and `again`. False where it failed, or the part's time is over."""
    key = {"part": part, "network": network, "what": what, "case": case}
    old = [row for row in log if key.items() <= row.items()]
    if old and not old[0]["failed"] and not again:
        return True
    begin, row = time.time(), {"result": "FAILED", "failed": ""}
    try:
        if not seconds_left(part):
            raise subprocess.TimeoutExpired(what, 0)
        row |= measure()
    except subprocess.TimeoutExpired:
        late.append(part)
        return False
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
    return not row["failed"]


def python(line, part, folder=ROOT):
    """What `python LINE` prints. RuntimeError where it fails, TimeoutExpired with the part's time.
    Tiny stages run in this process, which saves the seconds that imports take."""
    write_log(f"$ python {line}")
    words, said = shlex.split(line), io.StringIO()
    if args.tiny and folder != ROOT:
        os.chdir(folder)
        sys.argv = words
        with contextlib.redirect_stdout(said):
            try:
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise RuntimeError(end.code) from end
        return said.getvalue()
    environment = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *words], timeout=seconds_left(part), **options)
    write_log(f"ended: {line}\n{done.stdout}{done.stderr}")
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {(done.stderr or done.stdout or '?').splitlines()[-1]}")
    return done.stdout


def kill(line, part, folder, path):
    """Starts `python LINE`, and kills it (SIGKILL) as soon as it has written `path`."""
    options = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, *shlex.split(line)], **options) as process:
        while process.poll() is None and not os.path.exists(path) and seconds_left(part):
            time.sleep(0.01)
        process.kill()


# ---- the parts -----------------------------------------------------------------------------------


def random_images(batch):
    images = torch.randn(batch, 3, plan.pixels, plan.pixels, device=device)
    return images.to(**LAYOUT)


@functools.cache
def merged_networks(name):
    """{"folded", "half", "all"}: the baseline with its BN folded, every other block pruned, all. Or
    why the network is refused."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    try:
        names, networks = make_prunable(model), {"folded": merge(model)}
    except UserError as error:
        return str(error).split(";")[0]
    for label, prune in (("half", names[::2]), ("all", names)):
        if default_end_act(model, "reparam", prune):  # as stage 3 does
            insert_end_acts(model)
        set_subnet(model, prune)
        networks[label] = merge(model)
    return networks


def time_networks(name, precision, compiled, batch):
    networks, dtype, row = merged_networks(name), plan.precisions[precision], {}
    if isinstance(networks, str):
        return {"result": f"refused: {networks}"}
    labels = ("folded", "all") if compiled else ("folded", "half", "all")
    networks = {label: copy.deepcopy(networks[label]).to(dtype).to(**LAYOUT) for label in labels}
    torch._dynamo.reset()
    for network in networks.values() if compiled else ():
        network.compile(dynamic=False, backend=plan.backend)
    images = random_images(batch).to(dtype)
    medians = latencies(networks.values(), images, plan.rounds)[:, 1].tolist()
    for (label, network), seconds in zip(networks.items(), medians):
        row |= {f"ms_{label}": 1e3 * seconds, f"speed_up_{label}": medians[0] / seconds}
        if device == "cuda":
            row[f"mb_{label}"] = fourth.peak_memory(network, images) / 1e6
    text = [f"{row[f'speed_up_{label}']:.2f}x {label}" for label in labels[1:]]
    text += [f"{row['mb_folded']:.0f} to {row['mb_all']:.0f} MB"] if device == "cuda" else []
    return row | {"result": ", ".join([f"{row['ms_folded']:.2f} ms", *text])}


def time_blocks(name):
    """As stage 2 does for --latency, with CUDA's events."""
    model = timm.create_model(name).eval().to(device)
    make_prunable(model)
    blocks = {path: block.rungs for path, block in prunable_blocks(model).items()}
    images = random_images(plan.batches[0])
    _, savings = second.block_savings(model, blocks, images.shape[1:])
    table = second.measure_blocks(model, blocks, savings, images, 8, plan.rounds)
    return {"result": f"their sums are off by {table['error']:.1%}", "error": table["error"]}


def speed():
    for compiled in (False, True):
        cases = itertools.product(plan.precisions, plan.batches, plan.models)
        for precision, batch, name in cases:
            what = f"{precision}, {'compiled' if compiled else 'eager'}"
            job = functools.partial(time_networks, name, precision, compiled, batch)
            attempt("speed", name, what, f"batch {batch}", job)
        if not compiled:
            name = plan.models[0]
            job = functools.partial(time_blocks, name)
            attempt("speed", name, "times of blocks", "", job)
    merged_networks.cache_clear()


def tests():
    def run():
        report = f"{args.work}/tests-{started:.0f}.xml"
        with contextlib.suppress(RuntimeError):  # the report says it all
            python(f"-m pytest {plan.tests} -k on_a_gpu --junitxml={shlex.quote(report)}", "tests")
        counts = ElementTree.parse(report).getroot()[0].attrib
        total, skipped, *bad = (int(counts[k]) for k in ("tests", "skipped", "failures", "errors"))
        text = f"{total - skipped - sum(bad)} passed, {skipped} skipped"
        return {"result": text, "failed": f"{sum(bad)} failed" * any(bad)}

    attempt("tests", "", "those for a GPU", "", run)


def stages_and_evidence(images, model):
    """In a folder of their own: the first row of the evidence is stage 3's run."""
    folder = os.path.join(args.work, model)
    supernet, compiled = f"{folder}/runs/supernet.pt", " --compile" * (model in plan.compiled)
    flags = f"{plan.flags}{compiled}"

    def third(size, way, seed):
        out = f"runs/{size}-{way}-{seed}.pt".replace(" ", "-")
        return out, (
            f"{ROOT}/3_progressive.py {flags} --epochs {plan.epochs[1]} --form reparam --no-control"
            f" --seed {seed} --subnet runs/{size.replace(' ', '-')}.json --out {out} --resume"
            f"{' --transition 0' * (way == 'direct')}"
        )

    def four():
        run = functools.partial(python, part="stages", folder=folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        of_images = f"--data-dir {shlex.quote(images)} --img-size {args.img_size} --calibrate 512"
        epochs = f"--baseline-epochs {plan.epochs[0]} --epochs 1"
        line = f"{flags} --model {model} {of_images} {epochs} {plan.stages[model]}"
        run(f"{ROOT}/1_supernet.py {line}")
        blocks = list(prunable_blocks(build(read_checkpoint(supernet))))
        save({"format": 1, "model": model, "prune": blocks}, f"{folder}/runs/all.json")
        line = f"--prune {round(len(blocks) * 2 / 3)} --out runs/two-thirds.json {plan.search}"
        run(f"{ROOT}/2_search.py {line}")
        out, line = third("two thirds", "progressive", 0)
        kill(line, "stages", folder, f"{folder}/{out}.last")
        resumed = re.search(r"going on after epoch \d+", run(line))
        said = run(f"{ROOT}/4_merge.py --subnet {out} --batch-size 1 32{compiled}")
        errors = re.findall(r"against unmerged: max abs error (\S+)", said)
        text = f"float64 error {errors[0]}, float32 {errors[1]}"
        return {"result": text, "failed": "" if resumed else "stage 3 ended before it was killed"}

    def top1(path, of, line=None):
        if line:
            python(line, "evidence", folder)
        value = read_checkpoint(path)[of]["top1"]
        return {"result": f"{value:.2f} %", "top1": value}

    if "stages" in args.parts:
        attempt("stages", model, f"all four{compiled}", "", four, not os.path.exists(supernet))
    if "evidence" not in args.parts:
        return
    if not os.path.exists(supernet):
        late.append("evidence")
        return
    attempt("evidence", model, "baseline", "", functools.partial(top1, supernet, "baseline"), True)
    ways = ("two thirds", "all"), ("progressive", "direct")
    for seed, size, way in itertools.product(range(plan.seeds), *ways):
        out, line = third(size, way, seed)
        job = functools.partial(top1, f"{folder}/{out}", "subnet", line)
        if not attempt("evidence", model, f"{size}, {way}", f"seed {seed}", job):
            return


# ---- all of them ---------------------------------------------------------------------------------


def open_images():
    """The folder with train and val."""
    folder = args.images or f"{args.work}/images"
    if not args.images:
        first.draw_shapes(folder, *((200, 60) if args.tiny else ()))
    elif os.path.isfile(args.images):
        folder = f"{args.work}/images"
        with tarfile.open(args.images) as tar:
            tar.extractall(folder, filter="data")
    found = glob.glob(f"{folder}/**/train", recursive=True)
    return (
        os.path.dirname(os.path.abspath(found[0])) if found else sys.exit(f"no train in {folder}")
    )


def main():
    os.makedirs(args.work, exist_ok=True)
    os.makedirs(os.path.dirname(args.out), exist_ok=True)
    if os.path.exists(args.out):
        with open(args.out, encoding="utf-8") as file:
            log.extend(csv.DictReader(file))
    jobs = [tests] * ("tests" in args.parts)
    if {"stages", "evidence"} & set(args.parts):
        images = open_images()
        jobs += [functools.partial(stages_and_evidence, images, model) for model in plan.stages]
    if "speed" in args.parts:
        speed()
    with concurrent.futures.ThreadPoolExecutor(1 if args.tiny else 5) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    date = time.strftime("%Y-%m-%d")
    print(
        f"\n{where}, torch {torch.__version__}, timm {timm.__version__}, {date}"
        f"{', --tiny' * args.tiny}, {time.time() - started:.0f} s; out of time:"
        f" {', '.join(f'{part} {late.count(part)}' for part in sorted({*late})) or 'nothing'}\n"
    )
    lines = {}
    for row in sorted(log, key=lambda row: list(UNTIL).index(row["part"])):
        cell = ": ".join(filter(None, (row["case"], row["result"], row["failed"][:60])))
        lines.setdefault((row["part"], row["network"], row["what"]), []).append(cell)
    columns = max(map(len, lines.values()), default=0)
    rows = [(*key, *cells, *[""] * (columns - len(cells))) for key, cells in lines.items()]
    print_table(("part", "network", "what", "results", *[""] * (columns - 1)), rows)
    sys.exit(any(row["failed"] for row in log))


if __name__ == "__main__":
    main()
