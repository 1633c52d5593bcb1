"""Stage 2 of 4: searches the supernet for the blocks to prune, with a genetic algorithm.

Reads runs/supernet.pt. Writes runs/subnet.json, which can as well be written or edited by hand: "prune" lists the
blocks to prune by their module path, all else is for the record. Beside it, runs/subnet.search.csv has every subnet scored,
runs/latency.json the blocks' latencies, and while it runs, runs/subnet.json.last is what --resume goes on from.

    python 2_search.py                     # half of the prunable blocks
    python 2_search.py --prune 6           # six of them (the paper's P6)
    python 2_search.py --macs 0.6          # merged network of at most 60 % of the baseline's multiply-accumulates
    python 2_search.py --params 0.5        # … of at most half of its parameters
    python 2_search.py --latency 0.7 --latency-batch 1         # … of at most 70 % of its latency, measured on this machine
    python 2_search.py --prune 2 4 6       # one search for each: runs/subnet-2.json, runs/subnet-4.json, …
    python 2_search.py --score my.json     # only scores subnets of your own
    torchrun --nproc-per-node 8 2_search.py --workers 8        # the candidates are shared out

Budgets hold for the merged network. A candidate's score is its loss on training images that stage 1 held back, after its
BN statistics were recalibrated, always from scratch and on the same images: no score depends on what was scored before.
Where no more subnets keep to the budget than would be scored anyway, all of them are, and the best is the true optimum.
"""
import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import statistics
import time

import numpy as np
import torch
import torch.distributed as dist

from blocks import (BatchNorm, Images, UserError, at_least, build, check_writable, cost, describe_run, evaluate, fraction,
                    latencies, make_loader, merge, pick_device, print_table, processes, progress_bar, prunable_blocks, read,
                    read_json, read_state, recalibrate, remove_state, replacing, restore, run, save_csv, save_state, set_subnet)

parser = argparse.ArgumentParser(
    description="Stage 2 of 4: searches for the blocks to prune.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# budget: at most one kind; the default is half of the prunable blocks
budget = parser.add_mutually_exclusive_group()
budget.add_argument("--prune", type=int, nargs="+", metavar="K", help="number of blocks to prune (None: half of them)")
budget.add_argument("--macs", type=fraction, nargs="+", metavar="R", help="largest share, 0 to 1, of the baseline's MACs")
budget.add_argument("--params", type=fraction, nargs="+", metavar="R", help="largest share, 0 to 1, of the baseline's parameters")
budget.add_argument("--latency", type=fraction, nargs="+", metavar="R",
                    help="largest share, 0 to 1, of the latency of the baseline with its BN folded, on --device")
budget.add_argument("--score", nargs="+", metavar="FILE", help="score these specs instead of searching")
parser.add_argument("--latency-batch", type=at_least(1), default=16, metavar="B", help="images per forward pass that is timed")
# search
parser.add_argument("--population", type=at_least(2), default=16, help="candidates per generation")
parser.add_argument("--generations", type=at_least(1), default=6, help="generations")
parser.add_argument("--calibrate", type=at_least(2), default=512, metavar="N", help="training images for the BN statistics")
parser.add_argument("--images", type=at_least(1), default=2000, metavar="N", help="at most this many held-out images to score on")
parser.add_argument("--batch-size", type=at_least(2), default=128, help="images per forward pass")
parser.add_argument("--seed", type=at_least(0), default=0, help="of the search")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
parser.add_argument("--resume", action="store_true", help="go on from OUT.last, which every generation renews, if it is there")
parser.add_argument("--out", default="runs/subnet.json", metavar="FILE", help="the subnet spec")


# ---- what a subnet costs -------------------------------------------------------------------------------------------

def block_savings(model, blocks, input_size):
    """Costs of the merged network with nothing pruned, and what pruning each block takes off it (costs add up exactly)."""
    def merged_cost(pruned):
        set_subnet(model, pruned)
        return cost(merge(model), input_size)

    model = model.to("meta")
    whole = merged_cost([])
    one = {name: merged_cost([name]) for name in blocks}
    return whole, {name: {key: whole[key] - one[name][key] for key in whole} for name in blocks}


def merged_on(model, pruned, device):
    set_subnet(model, pruned)
    return merge(model).to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def measure_blocks(model, blocks, images, pairs=8, rounds=9):
    """Median seconds of each block, baseline and merged, and of all the rest, in merged networks on `images`.

    Each block is timed where it stands, behind and before what it really meets, in both its forms: in the network with
    nothing pruned, the one with everything pruned, and pairs of a random subnet and its complement. (Timed alone, with
    its input still in the cache, MobileNetV2's blocks came out up to a quarter wrong.) They take short turns."""
    cuda, rng = images.device.type == "cuda", random.Random(0)

    def stamp():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start, end):
        return start.elapsed_time(end) / 1e3 if cuda else end - start

    subnets = [set()] + [{name for name in blocks if rng.random() < 0.5} for _ in range(pairs - 1)]
    subnets += [set(blocks) - subnet for subnet in subnets]
    networks = [merged_on(model, subnet, images.device) for subnet in subnets]
    totals, spans = latencies(networks, images, rounds)[:, 1], {name: [] for name in blocks}  # start and end of every run
    for network, name in itertools.product(networks, blocks):
        module = network.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: spans[name].append([stamp()]))
        module.register_forward_hook(lambda *_, name=name: spans[name][-1].append(stamp()))
    times = {(name, pruned): [] for name in blocks for pruned in (False, True)}
    for subnet, network, total in progress_bar(list(zip(subnets, networks, totals)) * rounds, "latency", unit="subnet"):
        network(images)
        for runs in spans.values():
            runs.clear()
        for _ in range(max(2, round(0.1 / total))):
            network(images)
        if cuda:
            torch.cuda.synchronize()
        spent = {name: statistics.median(seconds(*run) for run in runs) for name, runs in spans.items()}
        for name in blocks:  # a block's own time: without its attention's, where that is chosen by itself
            inner = sum(spent[other] for other in blocks if other.startswith(f"{name}."))
            times[name, name in subnet].append(spent[name] - inner)
    # A smaller network keeps more of itself in the cache: all its parts are faster than in a large one, and hooks cost time
    # too. A straight line from the blocks' sums to the networks' totals (least squares of the relative errors) takes account
    # of both, and leaves the costs additive.
    times = {key: statistics.median(values) for key, values in times.items()}
    sums = np.array([sum(times[name, name in subnet] for name in blocks) for subnet in subnets])
    slope, rest = np.linalg.lstsq(np.stack([sums / totals, 1 / totals], 1), np.ones(len(subnets)), rcond=None)[0].tolist()
    return {"baseline": {name: slope * times[name, False] for name in blocks},
            "merged": {name: slope * times[name, True] for name in blocks}, "rest": rest}


def latency_table(path, spec, model, blocks, batch, device):
    """measure_blocks' result, from `path` where that was measured on the same device in the same way, else measured now.
    Under torchrun all processes get the first one's."""
    tables = [None]
    about = {"model": spec["model"], "model_args": spec["model_args"], "end_act": spec["end_act"], "blocks": blocks,
             "input": [batch, *spec["input_size"]], "dtype": "float32", "torch": torch.__version__,
             "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
             "threads": torch.get_num_threads()}
    if processes()[0] == 0:
        with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
            tables = [json.load(file)]
        if isinstance(tables[0], dict) and json.loads(json.dumps(about)).items() <= tables[0].items():
            print(f"latencies of the blocks from {path}")
        else:
            images = torch.randn(batch, *spec["input_size"], device=device).to(memory_format=torch.channels_last)
            tables = [{**about, **measure_blocks(model, blocks, images)}]
            save_json(tables[0], path)
            print(f"latencies of the blocks measured, kept in {path}")
    if processes()[1] > 1:
        dist.broadcast_object_list(tables)
    return tables[0]


def save_json(content, path):
    if processes()[0] == 0:
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)


# ---- which subnets keep to a budget ---------------------------------------------------------------------------------

def make_budget(kind, value, blocks, baseline, whole, savings):
    """(fits, repair, every) for one budget: fits(candidate) says whether a set of blocks keeps to it; repair(candidate,
    rng) makes it, by as few random changes as needed; every() yields all that fit. None of them ever has to give up: a
    budget that nothing can meet is an error here, with the range that can be reached."""
    if kind == "prune":
        if not 1 <= value <= len(blocks):
            raise UserError(f"--prune {value}: this model has 1 to {len(blocks)} blocks to prune")

        def fits(candidate):
            return len(candidate) == value

        def repair(candidate, rng):
            candidate = set(candidate)
            while len(candidate) != value:
                if len(candidate) > value:
                    candidate.remove(rng.choice(sorted(candidate)))
                else:
                    candidate.add(rng.choice(sorted(set(blocks) - candidate)))
            return frozenset(candidate)

        def every():
            return map(frozenset, itertools.combinations(blocks, value))
        return fits, repair, every

    saving = {name: savings[name][kind] for name in blocks}  # below 0 for some: a dense 5x5 has few MACs at stride 2
    cheapest, dearest = (whole[kind] - sum(f(0, saved) for saved in saving.values()) for f in (max, min))
    limit = value * baseline[kind]
    if cheapest > limit:
        raise UserError(f"--{kind} {value:g}: the cheapest subnet has {cheapest / baseline[kind]:.4f} of the baseline's"
                        f" {kind}, the dearest {dearest / baseline[kind]:.4f}")

    def fits(candidate):  # sums in running order: a set's own order is another one in every process
        return whole[kind] - sum(saving[name] for name in blocks if name in candidate) <= limit

    def repair(candidate, rng):
        candidate = set(candidate)
        while not fits(candidate):
            candidate ^= {rng.choice([name for name in blocks if (saving[name] > 0) != (name in candidate)])}
        return frozenset(candidate)

    def every(chosen=(), i=0):  # goes only where the blocks that are left can still save enough
        if fits((*chosen, *(name for name in blocks[i:] if saving[name] > 0))):
            if i == len(blocks):
                yield frozenset(chosen)
            else:
                yield from every(chosen, i + 1)
                yield from every((*chosen, blocks[i]), i + 1)
    return fits, repair, every


# ---- scores -----------------------------------------------------------------------------------------------------------

def make_score(model, blocks, calibration, held_out):
    """score(candidate) -> {"loss", "top1"} on `held_out`, a list of (images, labels), with BN statistics of `calibration`,
    a list of images.

    The first blocks that are as they were in the candidate before do not run again: what they gave is kept, if it fits in
    memory. It is the same, bit for bit, and faster where candidates come sorted by `running_order`."""
    modules = prunable_blocks(model)
    kept, room, before, same, batch = {}, Images.in_memory, None, 0, 0  # {(block, number of the batch): the block's output}

    def remember(i, forward, x, **kwargs):
        nonlocal kept, room
        if i < same:
            return kept[i, batch]
        y = forward(x, **kwargs)
        if kept is not None:
            room -= y.nbytes if (i, batch) not in kept else 0
            kept[i, batch] = y
            kept = kept if room >= 0 else None
        return y

    def numbered(batches, start):
        nonlocal batch
        for batch, item in enumerate(batches, start):
            yield item

    for i, module in enumerate(modules.values()):
        module.forward = functools.partial(remember, i, module.forward)

    def score(candidate):
        nonlocal before, same
        forms, same = [name in candidate for name in blocks], 0
        if kept is not None and before is not None:
            same = next((i for i, pair in enumerate(zip(forms, before)) if pair[0] != pair[1]), len(blocks))
        before = forms
        set_subnet(model, candidate)
        still = [m for module in list(modules.values())[:same] for m in module.modules() if isinstance(m, BatchNorm)]
        recalibrate(model, numbered(calibration, 0), still)
        return evaluate(model, numbered(held_out, len(calibration)))
    return score


def running_order(blocks):
    """A sort key that puts candidates with the same first blocks beside each other."""
    return lambda candidate: [name in candidate for name in blocks]


def share_out(work, items):
    """[work(item) for item in items]; under torchrun each process does a part of them and gets all the results."""
    rank, world = processes()
    mine = [work(item) for item in items[len(items) * rank // world:len(items) * (rank + 1) // world]]
    parts = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    return list(itertools.chain(*parts))


def search(score, budget, blocks, population, generations, seed, scores=None, first=0, keep=None):
    """Genetic search for the set of blocks within `budget` that has the lowest loss; exhaustive where no more subnets fit
    than population x generations. Returns {candidate: {"loss", "top1", "generation"}} with all that was scored, and whether
    that is all that fit.

    scores: what is known already, also from other budgets. keep(generation, scores) saves what `first` goes on from."""
    scores = {} if scores is None else scores
    fits, repair, every = budget
    everything = list(itertools.islice(every(), population * generations + 1))
    exact = len(everything) <= population * generations
    if exact:
        everything.sort(key=running_order(blocks))
        generations = -(-len(everything) // population)
        print(f"{len(everything)} subnets keep to the budget: scoring all of them")
    bar = progress_bar(desc="search", total=population * generations, initial=population * first, unit="subnet")

    def work(candidate):
        bar.update(processes()[1])
        return score(candidate)

    for generation in range(first, generations):
        rng = random.Random(f"{seed}/{generation}")
        started, fresh = time.time(), set()
        parents = sorted(filter(fits, scores), key=lambda c: (scores[c]["loss"], sorted(c)))[:max(2, population // 4)]
        if exact:
            fresh.update(c for c in everything[population * generation:population * (generation + 1)] if c not in scores)
        for _ in range(0 if exact else 20 * population):  # few new ones are left where the space is small
            if len(fresh) == population:
                break
            if len(parents) < 2 or rng.random() < 0.1:
                child = [name for name in blocks if rng.random() < 0.5]
            else:
                mother, father = rng.sample(parents, 2)
                child = {name for name in blocks if name in rng.choice((mother, father))}
                child ^= {name for name in blocks if rng.random() < 1 / len(blocks)}  # mutation: one flip on average
            child = repair(child, rng)
            if child not in scores:
                fresh.add(child)
        fresh = sorted(fresh, key=running_order(blocks))
        for child, result in zip(fresh, share_out(work, fresh)):
            scores[child] = {**result, "generation": generation + 1}
        best = min((scores[c] for c in scores if fits(c)), key=lambda s: s["loss"])
        bar.set_postfix(loss=f"{best['loss']:.3f}", refresh=False)
        if keep:
            keep(generation + 1, scores)
        print(f"generation {generation + 1}/{generations}  scored {len(scores)}  best loss {best['loss']:.4f}"
              f"  top-1 {best['top1']:.2f} %  {len(fresh) / (time.time() - started):.2f} subnets/s", flush=True)
    bar.close()
    return scores, exact


def pareto(scores, price):
    """The scored candidates that no other one beats in both price and loss, the dearest first."""
    front = []
    for candidate in sorted(scores, key=lambda c: (price(c), scores[c]["loss"])):
        if not front or scores[candidate]["loss"] < scores[front[-1]]["loss"]:
            front.append(candidate)
    return front[::-1]


def main():
    args = parser.parse_args()
    device = pick_device(args.device)
    check_writable(args.out)
    kind = next((kind for kind in ("macs", "params", "latency") if getattr(args, kind)), "prune")
    values, (root, ending) = getattr(args, kind), os.path.splitext(args.out)
    paths = [f"{root}-{value:g}{ending}" for value in values] if values and len(values) > 1 else [args.out]
    spec = read(args.supernet, "supernet")
    flags = describe_run(args, "supernet")
    state = None if args.score else read_state(args, flags, paths[-1])
    spec["data_dir"] = args.data_dir or spec["data_dir"]
    model = restore(spec)
    blocks = list(prunable_blocks(model))
    whole, savings = block_savings(build(spec), blocks, spec["input_size"])
    if args.latency:
        table = latency_table(os.path.join(os.path.dirname(args.out), "latency.json"), spec, model, blocks,
                              args.latency_batch, device)
        whole["latency"] = table["rest"] + sum(table["baseline"].values())
        for name in blocks:
            savings[name]["latency"] = table["baseline"][name] - table["merged"][name]
    baseline = {**whole, **{key: spec["baseline"][key] for key in ("params", "macs")}}
    values = values or [len(blocks) // 2]
    budgets = [make_budget(kind, value, blocks, baseline, whole, savings) for value in ([] if args.score else values)]
    specs = [(path, read_json(path, spec["model"])["prune"]) for path in args.score or ()]
    for _, prune in specs:
        set_subnet(model, prune)  # an unknown block is told here

    model.to(device, memory_format=torch.channels_last)
    calibration = [images for images, _ in make_loader(
        spec, "train", args.batch_size, device, args.workers, limit=args.calibrate)]
    held_out = list(make_loader(spec, "holdout", args.batch_size, device, args.workers, limit=args.images))
    score = make_score(model, blocks, calibration, held_out)

    def merged_cost(candidate):
        return {key: whole[key] - sum(savings[name][key] for name in blocks if name in candidate) for key in whole}

    def named(candidate):
        return " ".join(name for name in blocks if name in candidate)

    def row(name, c, s):
        return (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}",
                *([f"{c['latency'] * 1e3:.2f}"] if args.latency else []),
                *((f"{s['loss']:.4f}", f"{s['top1']:.2f}") if s else ("", "")))

    header = ("", "params (M)", "MACs (M)", *(["latency (ms)"] if args.latency else []), "held-out loss", "held-out top-1 (%)")
    ends = [row("baseline", baseline, None), row("nothing pruned, BN folded", whole, score([])),
            row("everything pruned, merged", merged_cost(blocks), score(blocks))]
    if args.score:
        print_table(header, ends + [row(path, merged_cost(prune), score(prune)) for path, prune in specs])
        return

    # Search
    first_budget, first, scores = 0, 0, {}
    if state:
        first_budget, first, scores = state["budget"], state["generation"], {frozenset(c): s for c, s in state["scores"]}
        print(f"going on after generation {first}" + (f" of --{kind} {values[first_budget]:g}" if len(values) > 1 else ""))
    for number in range(first_budget, len(values)):
        if len(values) > 1:
            print(f"--{kind} {values[number]:g}")

        def keep(generation, scores):
            save_csv([{"prune": named(c), "blocks": len(c), **s, **merged_cost(c)} for c, s in scores.items()],
                     f"{root}.search.csv")
            save_state(args, flags, budget=number, generation=generation,
                       scores=[(sorted(candidate), result) for candidate, result in scores.items()])

        scores, exact = search(
            score, budgets[number], blocks, args.population, args.generations, args.seed, scores, first, keep)
        first = 0
        ranked = sorted(scores, key=lambda c: (scores[c]["loss"], sorted(c)))
        best = next(filter(budgets[number][0], ranked))
        prune, merged = [name for name in blocks if name in best], merged_cost(best)
        result = {**scores[best], "evaluated": len(scores), "seed": args.seed, "optimum": exact, "best_of_each_size": {
            size: [{"prune": named(c), **scores[c]} for c in ranked if len(c) == size][:3]
            for size in sorted(set(map(len, ranked)))}}
        timed = ""
        if args.latency and processes()[0] == 0:
            images = torch.randn(args.latency_batch, *spec["input_size"], device=device).to(memory_format=torch.channels_last)
            seconds = latencies([merged_on(build(spec), subnet, device) for subnet in ([], prune)], images)[:, 1]
            result["timed_latency"] = dict(zip(("baseline", "merged"), seconds))
            timed = (f"\nlatency: predicted {merged['latency'] / whole['latency']:.3f} of the baseline's, the merged network"
                     f" itself {seconds[1] / seconds[0]:.3f}")
        save_json({"format": 1, "model": spec["model"], "model_args": spec["model_args"], "input_size": spec["input_size"],
                   "prune": prune, "baseline": baseline, "merged": merged,
                   "search": result, "flags": flags}, paths[number])
        print(f"\nprune {len(prune)} of {len(blocks)} blocks: {' '.join(prune)}"
              + ("\nthe best of all that keep to the budget" if exact else "") + timed + "\n")
        print_table(header, ends[:2] + [row("this subnet, merged", merged, scores[best])] + ends[2:])
        print(f"\nwrote {paths[number]}\n")
    remove_state(args)
    price = "macs" if kind == "prune" else kind
    front = pareto(scores, lambda c: merged_cost(c)[price])
    print(f"best trade-offs of {price} and loss among the {len(scores)} scored; all are in {root}.search.csv")
    print_table(header, [row(f"{len(c)} pruned", merged_cost(c), scores[c]) for c in front])


if __name__ == "__main__":
    run(main)
