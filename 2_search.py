"""Stage 2 of 4: searches the supernet for the blocks to prune, with a genetic algorithm.

Reads runs/supernet.pt. Writes runs/subnet.json, which can as well be written or edited by hand: "prune" lists the
blocks to prune by their module path, all else is for the record. While it runs, runs/subnet.json.last is what --resume
goes on from.

    python 2_search.py                     # half of the prunable blocks
    python 2_search.py --prune 6           # six of them (the paper's P6)
    python 2_search.py --macs 0.6          # merged network of at most 60 % of the baseline's multiply-accumulates
    python 2_search.py --params 0.5        # … of at most half of its parameters
    torchrun --nproc-per-node 8 2_search.py --workers 8        # the candidates are shared out

Budgets hold for the merged network. A candidate's score is its loss on training images that stage 1 held back, after its
BN statistics were recalibrated, always from scratch and on the same images: no score depends on what was scored before.
"""
import argparse
import json
import random
import time

import torch
import torch.distributed as dist

from blocks import (UserError, at_least, build, check_writable, cost, describe_run, evaluate, fraction, make_loader, merge,
                    pick_device, print_table, processes, progress_bar, prunable_blocks, read, read_state, recalibrate,
                    remove_state, replacing, run, save, set_subnet)

parser = argparse.ArgumentParser(
    description="Stage 2 of 4: searches for the blocks to prune.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--supernet", default="runs/supernet.pt", metavar="FILE", help="stage 1's checkpoint")
parser.add_argument("--data-dir", metavar="DIR", help="where the images are (None: where stage 1 found them)")
# budget: at most one; the default is half of the prunable blocks
budget = parser.add_mutually_exclusive_group()
budget.add_argument("--prune", type=int, metavar="K", help="number of blocks to prune (None: half of them)")
budget.add_argument("--macs", type=fraction, metavar="R", help="largest share, 0 to 1, of the baseline's MACs")
budget.add_argument("--params", type=fraction, metavar="R", help="largest share, 0 to 1, of the baseline's parameters")
# search
parser.add_argument("--population", type=at_least(2), default=16, help="candidates per generation")
parser.add_argument("--generations", type=at_least(1), default=6, help="generations")
parser.add_argument("--calibrate", type=at_least(1), default=512, metavar="N", help="training images for the BN statistics")
parser.add_argument("--images", type=at_least(1), default=2000, metavar="N", help="at most this many held-out images to score on")
parser.add_argument("--batch-size", type=at_least(1), default=128, help="images per forward pass")
parser.add_argument("--seed", type=at_least(0), default=0, help="of the search")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images")
parser.add_argument("--resume", action="store_true", help="go on from OUT.last, which every generation renews, if it is there")
parser.add_argument("--out", default="runs/subnet.json", metavar="FILE", help="the subnet spec")


def block_savings(model, blocks, input_size):
    """Costs of the merged network with nothing pruned, and what pruning each block takes off it (costs add up exactly)."""
    def merged_cost(pruned):
        set_subnet(model, pruned)
        return cost(merge(model), input_size)

    model = model.to("meta")
    whole = merged_cost([])
    one = {name: merged_cost([name]) for name in blocks}
    return whole, {name: {key: whole[key] - one[name][key] for key in whole} for name in blocks}


def make_repair(args, blocks, baseline, whole, savings):
    """repair(candidate, rng) makes a set of blocks keep to the budget by as few random changes as needed; it never has to
    give up, because a budget that nothing can meet is an error here, with the range that can be reached."""
    if args.macs is None and args.params is None:
        k = len(blocks) // 2 if args.prune is None else args.prune
        if not 1 <= k <= len(blocks):
            raise UserError(f"--prune {k}: this model has 1 to {len(blocks)} blocks to prune")

        def repair(candidate, rng):
            candidate = set(candidate)
            while len(candidate) != k:
                if len(candidate) > k:
                    candidate.remove(rng.choice(sorted(candidate)))
                else:
                    candidate.add(rng.choice(sorted(set(blocks) - candidate)))
            return frozenset(candidate)
        return repair

    key, share = ("macs", args.macs) if args.macs is not None else ("params", args.params)
    saving = {name: savings[name][key] for name in blocks}  # below 0 for some: a dense 5x5 has few MACs at stride 2
    cheapest, dearest = (whole[key] - sum(f(0, value) for value in saving.values()) for f in (max, min))
    if cheapest > share * baseline[key]:
        raise UserError(f"--{key} {share:g}: the cheapest subnet has {cheapest / baseline[key]:.4f} of the baseline's"
                        f" {key}, the dearest {dearest / baseline[key]:.4f}")

    def repair(candidate, rng):
        candidate = set(candidate)
        while whole[key] - sum(saving[name] for name in candidate) > share * baseline[key]:
            candidate ^= {rng.choice([name for name in blocks if (saving[name] > 0) != (name in candidate)])}
        return frozenset(candidate)
    return repair


def share_out(work, items):
    """[work(item) for item in items]; under torchrun each process does its part and gets all the results."""
    rank, world = processes()
    mine = [work(item) for item in items[rank::world]]
    if world == 1:
        return mine
    parts = [None] * world
    dist.all_gather_object(parts, mine)
    return [parts[i % world][i // world] for i in range(len(items))]


def search(score, repair, blocks, population, generations, seed, scores=None, first=0, keep=None):
    """Genetic search for the set of blocks with the lowest loss. Returns {candidate: {"loss", "top1"}}, all scored.

    keep(generation, scores) saves what `first` and `scores` go on from."""
    scores = scores or {}
    bar = progress_bar(desc="search", total=population * generations, initial=population * first, unit="subnet")

    def work(candidate):
        bar.update(processes()[1])
        return score(candidate)

    for generation in range(first, generations):
        rng = random.Random(f"{seed}/{generation}")
        started, fresh = time.time(), set()
        parents = sorted(scores, key=lambda c: scores[c]["loss"])[:max(2, population // 4)]
        for _ in range(20 * population):  # few new ones are left where the space is small
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
        fresh = sorted(fresh, key=sorted)
        scores.update(zip(fresh, share_out(work, fresh)))
        best = min(scores.values(), key=lambda s: s["loss"])
        bar.set_postfix(loss=f"{best['loss']:.3f}", refresh=False)
        if keep:
            keep(generation + 1, scores)
        print(f"generation {generation + 1}/{generations}  scored {len(scores)}  best loss {best['loss']:.4f}"
              f"  top-1 {best['top1']:.2f} %  {len(fresh) / (time.time() - started):.2f} subnets/s", flush=True)
        if not fresh:
            break
    bar.close()
    return scores


def main():
    args = parser.parse_args()
    device = pick_device(args.device)
    check_writable(args.out)
    spec = read(args.supernet, "supernet")
    flags = describe_run(args, "supernet")
    state = read_state(args, flags)
    spec["data_dir"] = args.data_dir or spec["data_dir"]
    model = build(spec)
    blocks = list(prunable_blocks(model))
    whole, savings = block_savings(build(spec), blocks, spec["input_size"])
    repair = make_repair(args, blocks, spec["baseline"], whole, savings)

    model.load_state_dict(spec["state_dict"])
    model.to(device, memory_format=torch.channels_last)
    calibration = [images for images, _ in make_loader(
        spec, "train", args.batch_size, device, args.workers, limit=args.calibrate)]
    held_out = list(make_loader(spec, "holdout", args.batch_size, device, args.workers, limit=args.images))

    def score(candidate):
        set_subnet(model, candidate)
        recalibrate(model, calibration)
        return evaluate(model, held_out)

    def keep(generation, scores):
        save({"stage": "unfinished run", "flags": flags, "generation": generation,
              "scores": [(sorted(candidate), result) for candidate, result in scores.items()]}, args.out + ".last")

    first, scores = 0, {}
    if state:
        first, scores = state["generation"], {frozenset(candidate): result for candidate, result in state["scores"]}
        print(f"going on after generation {first}")
    scores = search(score, repair, blocks, args.population, args.generations, args.seed, scores, first, keep)
    best = min(scores, key=lambda c: (scores[c]["loss"], sorted(c)))
    merged = {key: whole[key] - sum(savings[name][key] for name in best) for key in whole}
    prune = [name for name in blocks if name in best]
    if processes()[0] == 0:
        with replacing(args.out) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump({"format": 1, "model": spec["model"], "model_args": spec["model_args"],
                       "input_size": spec["input_size"], "prune": prune, "end_act": spec["end_act"],
                       "baseline": {key: spec["baseline"][key] for key in merged}, "merged": merged,
                       "search": {**scores[best], "evaluated": len(scores), "seed": args.seed}, "flags": flags},
                      file, indent=1)
    remove_state(args)

    print(f"\nprune {len(prune)} of {len(blocks)} blocks: {' '.join(prune)}\n")
    rows = [("baseline", spec["baseline"], ""), ("nothing pruned, BN folded", whole, score([])),
            ("this subnet, merged", merged, scores[best]),
            ("everything pruned, merged", {k: whole[k] - sum(s[k] for s in savings.values()) for k in whole}, score(blocks))]
    print_table(("", "params (M)", "MACs (M)", "held-out loss", "held-out top-1 (%)"), [
        (name, f"{c['params'] / 1e6:.3f}", f"{c['macs'] / 1e6:.1f}", f"{s['loss']:.4f}" if s else "",
         f"{s['top1']:.2f}" if s else "") for name, c, s in rows])
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
