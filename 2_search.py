"""Stage 2 of 4: searches the supernet for the blocks to prune, with a genetic algorithm.

Reads runs/supernet.pt. Writes runs/subnet.json: "prune" is what counts, all else is for the record.
Beside it, subnet.front/ has a spec for each of the best trade-offs.

    python 2_search.py --prune 6           # six blocks (the paper's P6)
    python 2_search.py --prune 2 4 6       # a search for each: runs/subnet-2.json, …
    python 2_search.py --score my.json     # only scores subnets of your own
    python 2_search.py --dry-run --latency 1   # what each block costs, and what can be reached

Budgets hold for the merged network. Every block is first pruned alone, at each rung: what that
costs tells the genetic algorithm where to save. A score is the loss on the held-out training images
with BN statistics of its own; in an untrained supernet how little the logits correlate with the
unpruned network's, and there the best few are fitted in turn and scored again.
"""
import contextlib
import copy
import functools
import glob
import itertools
import json
import math
import os
import platform
import random
import statistics
import time

import numpy as np
import torch
import torch.nn as nn

from blocks import (Parser, UserError, answers, at_least, atomic_write, bn_statistics, build, cost,
                    evaluate, finish, fit, latencies, make_loader, merge, not_fitted, outermost,
                    print_table, progress_bar, prunable_blocks, rank_and_world, read_checkpoint,
                    read_subnet, recalibrate, run, run_flags, save, set_subnet, start)

parser = Parser(description="Stage 2 of 4: searches for the blocks to prune.")
flag, share = parser.add_argument, at_least(0, float, 1)
flag("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
flag("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# budget, of one kind: shares, 0 to 1, of what the baseline has
budget = parser.add_mutually_exclusive_group().add_argument
budget("--prune", type=int, nargs="+", metavar="K", help="number of blocks (None: half of them)")
budget("--macs", type=share, nargs="+", metavar="R", help="largest share of the MACs")
budget("--params", type=share, nargs="+", metavar="R", help="largest share of the parameters")
budget("--latency", type=share, nargs="+", metavar="R",
       help="largest share of the latency on --device, of the baseline with its BN folded")
budget("--score", nargs="+", metavar="FILE", help="score these specs instead of searching")
flag("--dry-run", action="store_true", help="only print what the blocks cost; needs no images")
flag("--latency-batch", type=at_least(1), default=16, metavar="B", help="images that are timed")
# search
flag("--population", type=at_least(2), default=16, help="candidates per generation")
flag("--generations", type=at_least(1), default=6, help="generations")
flag("--calibrate", type=at_least(2), default=512, metavar="N",
     help="images for BN statistics, or, in an untrained supernet, to fit the best few on")
flag("--images", type=at_least(1), default=2000, metavar="N", help="held-out images to score on")
flag("--batch-size", type=at_least(2), default=128, help="images per forward pass")
run_flags(parser)
flag("--plot", action="store_true", help="draw the search, too (pip install matplotlib)")
flag("--out", default="runs/subnet.json", metavar="FILE", help="the subnet spec")

REFITS = 16  # subnets of an untrained supernet that are fitted in turn before one is picked


# ---- what a subnet costs -------------------------------------------------------------------------

# A candidate is a tuple with a gene for each block, in running order: 0 where it stays, else the
# number of its rung, from 1. `blocks` is {module path: names of its rungs}.

def to_prune(candidate, blocks):
    """The candidate as set_subnet takes it: {module path: name of its rung}."""
    return {name: rungs[gene - 1] for gene, (name, rungs) in zip(candidate, blocks.items()) if gene}


def to_candidate(prune, blocks):
    """The candidate of a list of module paths, or a dict from them to rungs."""
    rungs = prune if isinstance(prune, dict) else {}
    return tuple(0 if name not in prune else 1 + of_block.index(rungs.get(name, of_block[0]))
                 for name, of_block in blocks.items())


def block_savings(model, blocks, input_size):
    """Costs of the merged network with nothing pruned, and what each gene saves: {block: [nothing,
    its first rung, …]}, each a dict. They add up exactly."""
    def merged_cost(prune, part, shape):  # MobileViT folds patches into the batch
        set_subnet(model, prune)
        return cost(merge(nn.Sequential(part)), shape[1:], shape[0])

    model = copy.deepcopy(model).to("meta").eval()
    unpruned, savings, inputs = merged_cost([], model, (1, *input_size)), {}, {}
    with nn.modules.module.register_module_forward_pre_hook(lambda m, x: inputs.update({m: x})):
        model(torch.empty(1, *input_size, device="meta"))
    modules = prunable_blocks(model)
    for name, rungs in progress_bar(blocks.items(), "costs", unit="block"):
        # An attention's cost is in the block around it, whose norm it takes along
        outer = modules[outermost(name, modules)]
        costs = [merged_cost(prune, outer, inputs[outer][0].shape)
                 for prune in ([], *({name: rung} for rung in rungs))]
        savings[name] = [{key: costs[0][key] - one[key] for key in one} for one in costs]
    return unpruned, savings


def merged_on(model, prune, device):
    set_subnet(model, prune)
    return merge(model).to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def measure_blocks(model, blocks, savings, images, count=16, rounds=9):
    """{"baseline": seconds, "savings": {block: [seconds of each gene]}, "error": …, "spread": …} of
    merged networks. Each block is timed between its real neighbours, in all its forms: in the
    network with nothing pruned, the one with everything at its first rung, and more, at least
    `count`, in which each form of a block is about as frequent as any other; they take short turns.
    (Timed alone, with its input still in the cache, a block came out up to a quarter wrong.)

    error: the median difference of sums and networks' times, as a share. spread: the largest one
    between blocks of equal `savings` (of `block_savings`), or the two halves, of the baseline."""
    cuda, rng = images.device.type == "cuda", random.Random(0)

    def stamp():
        if not cuda:
            return time.perf_counter()
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))

    forms = [1 + len(rungs) for rungs in blocks.values()]
    first, subnets = [0] * len(forms), []
    while len(subnets) < count:
        subnets += [tuple((a + i) % n for a, n in zip(first, forms)) for i in range(max(forms))]
        first = [rng.randrange(n) for n in forms]
    networks = [merged_on(model, to_prune(subnet, blocks), images.device) for subnet in subnets]
    totals = latencies(networks, images, rounds)[:, 1]
    spans = {}  # of each block: start and end of every run
    for network, name in itertools.product(networks, blocks):
        block = network.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: spans[name].append([stamp()]))
        block.register_forward_hook(lambda *_, name=name: spans[name][-1].append(stamp()))
    times = {(name, gene): [] for name, n in zip(blocks, forms) for gene in range(n)}
    turns = list(zip(subnets, networks, totals)) * rounds
    for subnet, network, total in progress_bar(turns, "latency", unit="subnet"):
        spans.update({name: [] for name in blocks})
        for _ in range(1 + max(2, round(0.1 / total))):  # the first run does not count
            network(images)
        if cuda:
            torch.cuda.synchronize()
        spent = {name: statistics.median(a.elapsed_time(b) / 1e3 if cuda else b - a
                                         for a, b in runs[1:]) for name, runs in spans.items()}
        for name, gene in zip(blocks, subnet):  # without its attention's, a choice of its own
            inner = sum(spent[other] for other in blocks if other.startswith(f"{name}."))
            times[name, gene].append(spent[name] - inner)
    # A smaller network keeps more of itself in the cache, so that all its parts are faster than in
    # a large one, and hooks cost time, too. A straight line from the blocks' sums to the networks'
    # totals (least squares of the relative errors) corrects both, and leaves the costs additive.
    halves = [{key: statistics.median(half(values)) for key, values in times.items()} for half in (
        lambda values: values[:(len(values) + 1) // 2], lambda values: values[len(values) // 2:])]
    times = {key: statistics.median(values) for key, values in times.items()}
    sums = np.array([sum(times[key] for key in zip(blocks, subnet)) for subnet in subnets])
    slope, rest = np.polyfit(sums, totals, 1, w=1 / totals).tolist()
    error = np.median(abs((slope * sums + rest) / totals - 1)).item()
    if not 0.5 < slope < 2 or rest < 0:  # a block's time that is all noise
        error = 1.0

    def saved(times):
        return {name: [slope * (times[name, 0] - times[name, gene]) for gene in range(n)]
                for name, n in zip(blocks, forms)}

    baseline, of_all = rest + slope * sums[0].item(), saved(times)
    pairs = [*zip(*(saved(half).values() for half in halves)), *(
        (of_all[a], of_all[b]) for a, b in itertools.combinations(blocks, 2)
        if savings[a] == savings[b])]
    spread = max(abs(x - y) for pair in pairs for x, y in zip(*pair)) / baseline
    return {"baseline": baseline, "savings": of_all, "error": error, "spread": spread}


def latency_table(path, checkpoint, model, blocks, savings, images):
    """measure_blocks' result, or what `path` has, if of the same kind; one for all processes."""
    device, tables = images.device, [None]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        if name in ("", platform.machine()):  # all that many a Linux knows
            name = next(line.split(": ")[1] for line in file if line.startswith("model name"))
    key = {"model": checkpoint["model"], "model_args": checkpoint["model_args"], "blocks": blocks,
           "input": list(images.shape), "torch": torch.__version__, "device": name,
           "form": checkpoint["form"], "threads": torch.get_num_threads()}
    if rank_and_world()[0] == 0:
        with contextlib.suppress(OSError, ValueError, AttributeError), open(path) as file:
            table = json.load(file)
            if {"baseline", "savings", "error", "spread"} <= table.keys() \
                    and json.loads(json.dumps(key)).items() <= table.items():
                tables = [table]
                print(f"latencies of the blocks: from {path}")
        good = bool(tables[0])
        for _ in range(0 if good else 3):
            tables = [{**key, **measure_blocks(model, blocks, savings, images)}]
            print("latencies of the blocks: measured; their sums differ from whole networks by"
                  f" {tables[0]['error']:.1%} (median), blocks that are alike by up to"
                  f" {tables[0]['spread']:.1%} of the baseline")
            if good := tables[0]["error"] < 0.1 and tables[0]["spread"] < 0.02:
                save(tables[0], path)
                break
        if not good:
            print("this machine is too busy to time networks: these latencies are not kept, and a"
                  " budget of --latency may not hold. Leave it alone meanwhile")
    if rank_and_world()[1] > 1:
        torch.distributed.broadcast_object_list(tables)
    return tables[0]


def reachable(kind, blocks, baseline, unpruned, savings):
    """The smallest and the largest share of the baseline's cost, rounded up: it can be met."""
    rows = [[one[kind] for one in savings[name]] for name in blocks]
    return [math.ceil(1e4 * (unpruned[kind] - sum(map(end, rows))) / baseline[kind]) / 1e4
            for end in (max, min)]


def print_blocks(blocks, baseline, unpruned, savings):
    """What each rung of each block costs, and the range of every budget."""
    rows = [("baseline, BN folded", "", *(f"{unpruned[k] / baseline[k]:.4f}" for k in unpruned))]
    for name, rungs in blocks.items():
        rows += [(name if rung == rungs[0] else "", rung,
                  *(f"{one[kind] / baseline[kind]:.4f}" for kind in unpruned))
                 for rung, one in zip(rungs, savings[name][1:])]
    print("shares of the baseline's costs, and what each rung saves of them (below 0: it adds)")
    print_table(("block", "rung", *unpruned), rows)
    ranges = {kind: reachable(kind, blocks, baseline, unpruned, savings) for kind in unpruned}
    print(f"budgets that can be met: --prune 1 to {len(blocks)}", *(
        f"--{kind} {low:.4f} to {high:.4f}" for kind, (low, high) in ranges.items()), sep=", ")


# ---- which subnets keep to a budget --------------------------------------------------------------

def make_budget(kind, value, blocks, baseline, unpruned, savings):
    """(sizes, fits, repair, every) for one budget. sizes: how many values each gene has;
    fits(candidate): does it keep to the budget? repair(candidate, rng, loss_alone) changes one
    until it does, by random steps on the ladders, most likely where loss_alone[block][gene] grows
    least; every() yields all that keep to it. UserError where none can: so `repair` finds one."""
    # Every budget asks for savings from `low` to `high`; pruning a block may also save less than 0
    if kind == "prune":  # as in the paper: of their first rung
        table, low, high = [[0, 1] for _ in blocks], value, value
        if not 1 <= value <= len(blocks):
            raise UserError(f"--prune {value}: this model has 1 to {len(blocks)} blocks to prune")
    else:
        table = [[one[kind] for one in savings[name]] for name in blocks]
        low, high = unpruned[kind] - value * baseline[kind], math.inf

    def saved(candidate):
        return sum(row[gene] for row, gene in zip(table, candidate))

    def fits(candidate):
        return low <= saved(candidate) <= high

    if sum(map(max, table)) < low:
        least, most = reachable(kind, blocks, baseline, unpruned, savings)
        raise UserError(f"--{kind} {value:g}: merged subnets have {least:.4f} to {most:.4f} of the"
                        f" baseline's {kind}")

    def repair(candidate, rng, loss_alone):
        candidate = list(candidate)
        while not fits(candidate):
            too_little, steps = saved(candidate) < low, []
            for i, (row, gene) in enumerate(zip(table, candidate)):
                for other in range(len(row)):
                    step = abs(row[other] - row[gene])
                    if row[other] > row[gene] if too_little else row[other] < row[gene]:
                        loss = max(abs(loss_alone[i][other] - loss_alone[i][gene]), 1e-3)
                        odds = step / loss if too_little else loss / step
                        steps.append((rng.expovariate(1) / odds ** 2, i, other))
            _, i, gene = min(steps)  # a random one, with chances in proportion to odds squared
            candidate[i] = gene
        return tuple(candidate)

    def every(chosen=()):  # goes only where the blocks that are left can still make it fit
        rest, so_far = table[len(chosen):], saved(chosen)
        if so_far + sum(map(max, rest)) >= low and so_far + sum(map(min, rest)) <= high:
            if not rest:
                yield chosen
            for gene in range(len(rest[0]) if rest else 0):
                yield from every((*chosen, gene))
    return [len(row) for row in table], fits, repair, every


# ---- scores --------------------------------------------------------------------------------------

def make_score(model, blocks, calibration, held_out, unpruned=None, logits=None, max_bytes=2**31):
    """score(candidate) -> {"loss", "top1"} on `held_out`, a list of (images, labels), with BN
    statistics of `calibration`, a list of images, or the `unpruned` network's, moved by what
    changes on them. The loss is that of the labels, or the distance to the unpruned `logits`.

    Blocks do not run again as long as all up to them are pruned as in the candidate before: their
    outputs are kept, up to `max_bytes`. Same bits, and faster where candidates are sorted."""
    modules = prunable_blocks(model)
    kept, before, same, batch = {}, (), 0, 0  # kept: {(block, number of the batch): its output}

    def remember(i, forward, x, **kwargs):
        nonlocal kept, max_bytes
        if i < same:
            return kept[i, batch]
        y = forward(x, **kwargs)
        if kept is not None:
            max_bytes -= y.nbytes if (i, batch) not in kept else 0
            kept[i, batch] = y
            kept = kept if max_bytes >= 0 else None
        return y

    def numbered(batches, start):
        nonlocal batch
        for batch, item in enumerate(batches, start):
            yield item

    for i, module in enumerate(modules.values()):
        module.forward = functools.partial(remember, i, module.forward)

    def score(candidate):
        nonlocal before, same
        alike = [a == b for a, b in zip(candidate, before)]
        same = [*alike, False].index(False) if kept else 0  # so many blocks need not run again
        before = candidate
        set_subnet(model, to_prune(candidate, blocks))
        if calibration:
            still = {norm for module in list(modules.values())[:same] for norm in module.modules()}
            recalibrate(model, numbered(calibration, 0), set(model.modules()) - still, unpruned)
        return ranking(evaluate(model, numbered(held_out, len(calibration)), logits=logits))
    return score


def ranking(result):
    """Of what `evaluate` found, what candidates are ranked by, as the loss, and top-1."""
    return {"loss": result.get("distance", result["loss"]), "top1": result["top1"]}


def score_all(score, candidates, generation, name, rounds):
    """{candidate: its score and `generation`}; under torchrun each process scores a part."""
    rank, world = rank_and_world()
    mine = candidates[len(candidates) * rank // world:len(candidates) * (rank + 1) // world]
    bar = progress_bar(mine, name, rounds, unit="subnet")
    parts = [{c: {**score(c), "generation": generation} for c in bar}] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, parts[0])
    return dict(itertools.chain(*(part.items() for part in parts)))


def ranked(scores, cost_key="macs"):
    """The candidates of `scores`, the best first: by loss, then by cost. NaN is the worst loss."""
    return sorted(scores, key=lambda c: (min(math.inf, scores[c]["loss"]), scores[c][cost_key], c))


def pareto(scores, cost_key):
    """The candidates that no other one beats in both cost and loss, the best first."""
    front = []
    for candidate in ranked(scores, cost_key):
        if not front or scores[candidate][cost_key] < scores[front[-1]][cost_key]:
            front.append(candidate)
    return front


def search(score, budget, population, generations, seed, cost_key="macs", scores=(), first=0,
           keep=lambda *_: None):
    """Genetic search for the candidate within `budget` with the lowest loss; exhaustive where no
    more subnets fit than population x generations. Returns {candidate: score(candidate)} of all
    that were scored, with their "generation", and whether that is all that fit. scores: what is
    known already. keep(generation, scores) saves what `first` goes on from."""
    scores = dict(scores)
    sizes, fits, repair, every = budget
    everything = list(itertools.islice(every(), population * generations + 1))
    if exact := len(everything) <= population * generations:
        generations = -(-len(everything) // population)
        print(f"{len(everything)} subnets keep to the budget: scoring all of them")
    else:  # first, what each gene does by itself: it tells what to prune where more has to go
        alone = [[tuple(gene if j == i else 0 for j in range(len(sizes))) for gene in range(size)]
                 for i, size in enumerate(sizes)]
        fresh = [c for c in dict.fromkeys(itertools.chain(*alone)) if c not in scores]
        scores.update(score_all(score, fresh, 0, "one by one", 1))
        loss_alone = [[min(1e9, scores[c]["loss"]) for c in genes] for genes in alone]  # NaN, too
        if fresh:  # else they are in `scores`, maybe with later ones: that state must stay
            keep(0, scores)
    for generation in range(first, generations):
        rng, began, fresh = random.Random(f"{seed}/{generation}"), time.perf_counter(), set()
        parents = list(filter(fits, ranked(scores, cost_key)))[:max(2, population // 4)]
        if exact:
            fresh = set(everything[population * generation:][:population]) - scores.keys()
        for _ in range(0 if exact else 40 * population):  # few are new where the space is small
            if len(fresh) == 8 * population:
                break
            child = [0] * len(sizes)
            if len(parents) > 1 and rng.random() > 0.1:
                child = list(map(rng.choice, zip(*rng.sample(parents, 2))))
                for i, size in enumerate(sizes):
                    if rng.random() < 1 / len(sizes):  # mutation
                        child[i] = (child[i] + rng.randrange(1, size)) % size
            if (child := repair(child, rng, loss_alone)) not in scores:
                fresh.add(child)
        if not exact:  # what promises most, by the losses of its genes alone, and a few at random
            fresh = sorted(fresh, key=lambda c: (sum(row[g] for row, g in zip(loss_alone, c)), c))
            few = min(population // 4, len(fresh[population:]))
            fresh = fresh[:population - few] + rng.sample(fresh[population - few:], few)
        # Sorted, those with the same first blocks are neighbours
        fresh, name = sorted(fresh), f"generation {generation + 1}/{generations}"
        rounds = generations - generation if generation == first else 0
        scores.update(score_all(score, fresh, generation + 1, name, rounds))
        keep(generation + 1, scores)
        best = scores[next(filter(fits, ranked(scores, cost_key)))]
        print(f"{name}  scored {len(scores)}  best loss {best['loss']:.4f}  top-1"
              f" {best['top1']:.2f} %  {len(fresh) / (time.perf_counter() - began):.2f} subnets/s")
    return scores, exact


def plot(scores, front, picks, baseline, cost_key, blocks, path):
    """Draws the loss of all subnets scored against their cost, and the blocks of the front's."""
    from matplotlib.figure import Figure
    figure = Figure((12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)

    def points(chosen):
        return zip(*((scores[c][cost_key] / baseline[cost_key], scores[c]["loss"]) for c in chosen))

    left.plot(*points(scores), ".", color="silver", label="scored")
    left.plot(*points(front), "o-", label="best trade-offs")
    left.plot(*points(picks), "*", markersize=15, label="picked")
    left.set(xlabel=f"{cost_key}, share of the baseline's", ylabel="held-out loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.grid(alpha=0.3, which="both")
    left.legend()
    for rung in dict.fromkeys(itertools.chain(*blocks.values())):
        x = [(i, j) for j, c in enumerate(front)
             for i, name in enumerate(blocks) if to_prune(c, blocks).get(name) == rung]
        right.scatter(*(zip(*x) if x else ((), ())), marker="s", label=rung)
    right.set_xticks(range(len(blocks)), blocks, rotation=90)
    right.set_yticks(range(len(front)), [f"{i}.json: {x:.2f}" for i, x in
                                         enumerate(next(points(front)), 1)])
    right.set(xlabel="block", ylabel=f"best trade-offs, by {cost_key}", xlim=(-1, len(blocks)))
    right.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def main():
    def budget_and_files(args):
        kind = next((key for key in ("macs", "params", "latency") if getattr(args, key)), "prune")
        values, (root, ending) = getattr(args, kind) or [], os.path.splitext(args.out)
        several = [f"{root}-{value:g}{ending}" for value in values]
        return kind, several if len(several) > 1 else [args.out]

    args, device, state = start(parser, "supernet", read=read_subnet,
                                last_output=lambda args: budget_and_files(args)[1][-1])
    if args.plot and (args.score or args.dry_run):
        raise UserError("--plot draws a search: leave out --score and --dry-run")
    kind, paths = budget_and_files(args)
    root, cost_key = os.path.splitext(args.out)[0], "macs" if kind == "prune" else kind
    checkpoint = read_checkpoint(args.supernet, "supernet")
    data = {**checkpoint["data"], "data_dir": args.data_dir or checkpoint["data"]["data_dir"]}
    model = build(checkpoint)
    blocks = {name: block.rungs for name, block in prunable_blocks(model).items()}
    unpruned, savings = block_savings(model, blocks, data["input_size"])
    images = torch.randn(args.latency_batch, *data["input_size"], device=device)
    images = images.to(memory_format=torch.channels_last)
    timed = None
    if args.latency:
        path = os.path.join(os.path.dirname(args.out), "latency.json")
        timed = state["timed"] if state else latency_table(path, checkpoint, model, blocks, savings,
                                                           images)
        unpruned["latency"] = timed["baseline"]
        for name in blocks:
            for one, seconds in zip(savings[name], timed["savings"][name]):
                one["latency"] = seconds
    baseline = {**unpruned, **{key: checkpoint["baseline"][key] for key in ("params", "macs")}}
    if args.dry_run:
        print_blocks(blocks, baseline, unpruned, savings)
        return
    values = getattr(args, kind) or [max(1, len(blocks) // 2)]
    budgets = [make_budget(kind, value, blocks, baseline, unpruned, savings) for value in values]
    specs = [(path, read_subnet(path, checkpoint["model"])["prune"]) for path in args.score or ()]
    for _, prune in specs:
        set_subnet(model, prune)  # raises for an unknown block or rung

    model.to(device, memory_format=torch.channels_last)
    calibration = make_loader(data, "train", args.batch_size, device, args.workers, args.calibrate)
    held_out = make_loader(data, "holdout", args.batch_size, device, args.workers, args.images)
    if (count := len(held_out.dataset)) < 200:
        print(f"only {count} held-out images: one of them is {100 / count:.1f} points of top-1")
    trained = checkpoint["flags"]["epochs"] > 0
    held_out, logits, unpruned_bn = list(held_out), None, None
    # What pruning changes a few photos tell, but one alone may end as one pixel
    calibration = [images for images, _ in (calibration if trained or count == 1 else held_out)]
    if not trained:  # the baseline's statistics and answers are worth more than few labels
        set_subnet(model, [])
        logits, unpruned_bn = answers(model, held_out), bn_statistics(model, calibration)
    score_alone = make_score(model, blocks, calibration, held_out, unpruned_bn, logits)

    def score(candidate):
        saved = [savings[name][gene] for name, gene in zip(blocks, candidate)]
        return {**score_alone(candidate),
                **{key: unpruned[key] - sum(one[key] for one in saved) for key in unpruned}}

    def fitted_in_turn(candidate):
        """The score of a subnet of an untrained supernet as stage 3 fits it."""
        copied, prune = build(checkpoint), to_prune(candidate, blocks)
        copied.to(device, memory_format=torch.channels_last)
        fit(copied, prune, make_loader(data, "train", args.batch_size, device, args.workers,
                                       args.calibrate, split=True))
        set_subnet(copied, prune)
        recalibrate(copied, calibration, not_fitted(copied), unpruned_bn)
        return ranking(evaluate(copied, held_out, logits=logits))

    def row(name, s):
        return (name, f"{s['params'] / 1e6:.3f}", f"{s['macs'] / 1e6:.1f}",
                *([f"{s['latency'] * 1e3:.2f}" if "loss" in s else ""] if args.latency else []),
                *((f"{s['loss']:.4f}", f"{s['top1']:.2f}") if "loss" in s else ("", "")))

    header = ("", "params (M)", "MACs (M)", *(["latency (ms)"] if args.latency else []),
              "held-out loss" if trained else "answers' distance", "held-out top-1 (%)")
    table = [row("baseline", baseline),
             row("nothing pruned, BN folded", score((0,) * len(blocks))),
             row("all blocks at their first rung, merged", score((1,) * len(blocks)))]
    if args.score:
        print_table(header, table + [row(path, score(to_candidate(prune, blocks)))
                                     for path, prune in specs])
        return

    def save_subnet(candidate, path, **notes):
        s, prune = scores[candidate], to_prune(candidate, blocks)
        found = {key: s[key] for key in ("loss", "top1", "generation")}
        save({"format": 1, "model": checkpoint["model"],
              "prune": prune if max(candidate) > 1 else list(prune),  # all of their first rung
              "model_args": checkpoint["model_args"], "input_size": data["input_size"],
              "baseline": baseline, "merged": {key: s[key] for key in unpruned},
              "search": {**found, **notes}, "flags": vars(args)}, path)

    def words(candidate):
        return " ".join(name if gene == 1 else f"{name}:{blocks[name][gene - 1]}"
                        for name, gene in zip(blocks, candidate) if gene)

    def keep(generation, scores):
        save([{"prune": words(c), "blocks": len(to_prune(c, blocks)), **s}
              for c, s in scores.items()], f"{root}.search.csv")
        save({"stage": "unfinished run", "flags": vars(args), "budget": number, "timed": timed,
              "generation": generation, "scores": list(scores.items())}, args.out + ".last")

    first_budget, first, scores = 0, 0, ()
    if state:
        first_budget, first, scores = state["budget"], state["generation"], state["scores"]
        print(f"going on after generation {first} of --{kind} {values[first_budget]:g}")
    for number in range(first_budget, len(values)):
        print(f"--{kind} {values[number]:g}")
        scores, exact = search(score, budgets[number], args.population, args.generations,
                               args.seed, cost_key, scores, first, keep)
        fitting, first = list(filter(budgets[number][1], ranked(scores, cost_key))), 0
        best, notes = fitting[0], {"evaluated": len(scores), "optimum": exact and trained}
        if not trained:
            refits = [fitted_in_turn(c) for c in progress_bar(fitting[:REFITS], "fit in turn", 1)]
            best, again = min(zip(fitting, refits), key=lambda x: min(math.inf, x[1]["loss"]))
            notes["fitted_in_turn"] = again
            print(f"of the best {len(refits)}, fitted in turn, number"
                  f" {fitting.index(best) + 1} is the best, with {again['loss']:.4f}")
        print(f"\nprune {len(to_prune(best, blocks))} of {len(blocks)} blocks: {words(best)}")
        equal = sum(scores[c]["loss"] == scores[best]["loss"] for c in fitting)
        if trained and equal > 1:
            print(f"{equal} subnets have this loss: this one costs least")
        if args.latency and rank_and_world()[0] == 0:
            seconds = latencies([merged_on(build(checkpoint), prune, device)
                                 for prune in ([], to_prune(best, blocks))], images)[:, 1]
            notes["timed_latency"] = dict(zip(("baseline", "merged"), seconds))
            print(f"latency: predicted {scores[best]['latency'] / unpruned['latency']:.3f} of the"
                  f" baseline's, the merged network itself {seconds[1] / seconds[0]:.3f}")
            if seconds[1] > 1.03 * values[number] * seconds[0]:  # not by noise alone
                print(f"that is more than --latency {values[number]:g}: ask for less; or, if other"
                      " programs were running, delete latency.json and search again")
        save_subnet(best, paths[number], **notes)
        print()
        print_table(header, table[:2] + [row("this subnet, merged", scores[best])] + table[2:])
        print(f"\nwrote {paths[number]}\n")
    front = pareto(scores, cost_key)
    if rank_and_world()[0] == 0:
        for path in glob.glob(f"{glob.escape(root)}.front/*.json"):
            os.remove(path)
        for i, candidate in enumerate(front, 1):
            save_subnet(candidate, f"{root}.front/{i}.json")
        if args.plot:
            picks = [to_candidate(read_subnet(path)["prune"], blocks) for path in paths]
            plot(scores, front, picks, baseline, cost_key, blocks, f"{root}.search.png")
        finish(args.out)
    print(f"best trade-offs of {cost_key} and loss of the {len(scores)} scored, each with its spec"
          f" (3_progressive.py --subnet FILE trains it); all are in {root}.search.csv")
    print_table(header, [row(f"{root}.front/{i}.json", scores[c]) for i, c in enumerate(front, 1)])


if __name__ == "__main__":
    run(main)
