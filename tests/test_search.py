"""Stage 2: budgets, scores, latencies."""

import csv
import importlib
import itertools
import json
import math
import os
import random

import pytest
import timm
import torch
from conftest import one_network, stage, stage_on_full_disk

import blocks
from blocks import (
    UserError,
    cost,
    evaluate,
    fit,
    make_prunable,
    merge,
    prunable_blocks,
    recalibrate,
    set_subnet,
)

search_script = importlib.import_module("2_search")
NAMES = {name: ("dense", "skip") if name in "bd" else ("dense",) for name in "abcdef"}
SAVINGS = {  # of each gene: the block as it is, and its rungs
    name: [
        {"macs": 10 * gene + i * (gene > 0), "params": value * gene}
        for gene in range(len(NAMES[name]) + 1)
    ]
    for i, (name, value) in enumerate(zip(NAMES, (12, -9, 7, 0, 8, 5)))
}
ALL = list(itertools.product(*(range(len(rungs) + 1) for rungs in NAMES.values())))
WHOLE = {"macs": 100, "params": 100}


def budget_of(kind, value):
    return search_script.make_budget(kind, value, NAMES, WHOLE, WHOLE, SAVINGS)


@pytest.mark.parametrize(
    "kind, value",
    [("prune", 3), *(("params", r) for r in (0.7, 0.68, 1.0)), *(("macs", r) for r in (0.5, 0.25))],
)
def test_budgets(kind, value):
    sizes, fits, repair, every = budget_of(kind, value)
    assert sizes == ([2] * 6 if kind == "prune" else [2, 3, 2, 3, 2, 2])

    def right(candidate):
        if kind == "prune":
            return max(candidate) < 2 and sum(candidate) == value
        saved = sum(SAVINGS[name][gene][kind] for name, gene in zip(NAMES, candidate))
        return WHOLE[kind] - saved <= value * WHOLE[kind]

    candidates = [c for c in ALL if kind != "prune" or max(c) < 2]
    fitting = [c for c in candidates if right(c)]
    assert [c for c in candidates if fits(c)] == list(every()) == fitting
    rng = random.Random(0)
    loss_alone = [[0, 1, 0.5], [0, 0, 0], [0, -1, 2], *[[0, math.nan, 1]] * 3]
    for candidate in rng.choices(candidates, k=200):
        assert right(repair(candidate, rng, loss_alone))
    for candidate in fitting:
        assert repair(candidate, rng, loss_alone) == candidate


def test_a_budget_that_nothing_meets():
    why = "merged subnets have 0.6800 to 1.1800 of the baseline's params"
    with pytest.raises(UserError, match=why):
        budget_of("params", 0.67)


@pytest.mark.parametrize(
    "name",
    ["resnet34", "mobilenetv2_100", "convnext_tiny", "deit_tiny_patch16_224", "mobilevit_xxs"],
)
def test_savings_of_blocks_add_up(name):
    """To those of the merged network; and each rung saves more than the one before."""
    size = (3, 224, 224)
    with torch.device("meta"):
        model = timm.create_model(name)
    make_prunable(model, attention=name.startswith(("deit", "mobilevit")))
    rungs = {path: block.rungs for path, block in prunable_blocks(model).items()}
    unpruned, savings = search_script.block_savings(model, rungs, size)
    rng = random.Random(0)
    some = tuple(rng.randrange(len(of_block) + 1) for of_block in rungs.values())
    for candidate in ((0,) * len(rungs), (1,) * len(rungs), some):
        set_subnet(model, search_script.to_prune(candidate, rungs))
        merged = cost(merge(model), size)
        for key in ("params", "macs"):
            saved = (savings[path][gene][key] for path, gene in zip(rungs, candidate))
            assert unpruned[key] - sum(saved) == merged[key]
    for of_block, key in itertools.product(savings.values(), ("params", "macs")):
        saved = [one[key] for one in of_block]
        assert saved[0] == 0 and saved == sorted(set(saved))


def made_up(candidate):
    """Losses for NAMES with interactions between neighbours."""
    alone = sum(c * (i + 1) for i, c in enumerate(candidate))
    together = sum(a and b for a, b in zip(candidate, candidate[1:]))
    return {"loss": alone + 3 * together, "top1": 0.0, "macs": -sum(candidate)}


def test_a_small_space_is_scored_completely(capsys):
    budget = budget_of("prune", 3)
    scores, exact = search_script.search(made_up, budget, 6, 4, 0)
    best = (1, 0, 1, 0, 1, 0)
    assert exact and len(scores) == 20 and min(scores, key=lambda c: scores[c]["loss"]) == best
    assert "20 subnets keep to the budget: scoring all of them" in capsys.readouterr().out
    scores, exact = search_script.search(made_up, budget, 4, 3, 0)
    assert not exact and len(scores) == 7 + 12  # nothing, each block alone, then three generations
    assert all(sum(c) == (3 if scores[c]["generation"] else sum(c) and 1) for c in scores)
    scores = {c: made_up(c) for c in ALL if max(c) < 2 and sum(c) < 4}
    front = search_script.pareto(scores, "macs")
    assert front == [(0,) * 6, (1, 0, 0, 0, 0, 0), (1, 0, 1, 0, 0, 0), best]


def test_a_ladder_is_searched_completely():
    """All 144 candidates of a budget that everything meets, and what is written for one of them."""
    scores, exact = search_script.search(made_up, budget_of("macs", 1.0), 20, 8, 0)
    assert exact and set(scores) == set(ALL)
    candidate, first_rungs = (1, 2, 0, 0, 0, 1), (1, 0, 0, 0, 0, 1)
    prune = {"a": "dense", "b": "skip", "f": "dense"}
    assert search_script.to_prune(candidate, NAMES) == prune
    for spec, expected in ((prune, candidate), (["f", "a"], first_rungs), ([], (0,) * 6)):
        assert search_script.to_candidate(spec, NAMES) == expected


def test_a_block_that_breaks_the_network_is_left_alone():
    """A loss that is NaN counts as a large one, not as none."""

    def score(candidate):
        return made_up(candidate) | ({"loss": math.nan} if candidate[0] else {})

    scores, exact = search_script.search(score, budget_of("prune", 3), 3, 2, 0)
    assert not exact and not any(c[0] for c in scores if scores[c]["generation"] == 1)


@pytest.mark.parametrize("seed", range(5))
def test_children_are_screened_by_what_their_genes_do_alone(seed):
    """Where losses add up, the first eight of 924 subnets are the best six and two others."""
    names = {f"{i}": ("dense",) for i in range(12)}
    budget = search_script.make_budget("prune", 6, names, WHOLE, WHOLE, None)

    def score(candidate):
        return {"loss": 20.0 + sum(i * c for i, c in enumerate(candidate)), "macs": 0, "top1": 0}

    scores, exact = search_script.search(score, budget, 8, 1, seed)
    losses = sorted(score(candidate)["loss"] for candidate in budget[3]())
    first = sorted(s["loss"] for s in scores.values() if s["generation"] == 1)
    assert not exact and len(losses) == 924 and len(first) == 8
    assert first[:6] == losses[:6] and first[6:] != losses[6:8]


def test_a_search_goes_on_from_every_state_that_it_kept():
    """With the same scores, and without falling back to an earlier state."""
    budget = budget_of("prune", 3)
    states = []

    def keep(generation, scores):
        states.append((generation, dict(scores)))

    complete, exact = search_script.search(made_up, budget, 3, 4, 0, keep=keep)
    assert not exact and [generation for generation, _ in states] == [0, 1, 2, 3, 4]
    for first, known in list(states):
        states.clear()
        again, _ = search_script.search(made_up, budget, 3, 4, 0, "macs", known, first, keep)
        assert again == complete
        assert [generation for generation, _ in states] == list(range(first + 1, 5))


def test_of_equal_losses_the_cheaper_subnet_wins():
    def score(candidate):  # all alike, and the alphabet's last ones are the cheapest
        return {"loss": 1.0, "top1": 50.0, "macs": -sum(i * c for i, c in enumerate(candidate))}

    scores, _ = search_script.search(score, budget_of("prune", 2), 6, 4, 0)
    first, last = (1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1)
    assert search_script.ranked(scores)[0] == last == search_script.pareto(scores, "macs")[0]
    scores[first]["loss"] = float("nan")
    assert search_script.ranked(scores)[-1] == first


@pytest.mark.parametrize(
    "name, form, attention, max_bytes",
    [
        ("test_resnet", "reparam", False, 2**31),
        ("test_resnet", "fitted", False, 20_000),  # some fit
        ("mobilenetv2_035", "reparam", False, 1),  # none
        ("mobilenetv2_035", "fitted", False, 2**31),
        ("test_convnext", "reparam", False, 2**31),
        ("test_convnext", "fitted", False, 2**31),
        ("test_vit", "reparam", False, 2**31),
        ("test_vit", "reparam", True, 2**31),
        ("test_vit", "fitted", True, 20_000),
    ],
)
def test_scores_are_the_same_bits_in_any_order(name, form, attention, max_bytes):
    torch.manual_seed(0)
    size = {"img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=4, **size)
    names = make_prunable(model, form, attention=attention)
    fit(model, names, [torch.randn(8, 3, 32, 32)], in_turn=False)
    rungs = {name: block.rungs for name, block in prunable_blocks(model).items()}
    calibration = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    held_out = [(torch.randn(4, 3, 32, 32), torch.randint(4, (4,))) for _ in range(2)]
    rng = random.Random(0)
    candidates = [tuple(rng.randrange(len(r) + 1) for r in rungs.values()) for _ in range(8)]
    candidates += candidates[-2:] + 2 * [(0,) * len(names)] + [(1,) * len(names)]

    def from_scratch(candidate):
        set_subnet(model, search_script.to_prune(candidate, rungs))
        recalibrate(model, calibration, unpruned=unpruned)
        return search_script.ranking(evaluate(model, held_out, logits=logits))

    logits = unpruned = None
    if form == "fitted":
        logits = blocks.answers(model, held_out)
        unpruned = blocks.bn_statistics(model, calibration)
    right = {candidate: from_scratch(candidate) for candidate in candidates}
    score = search_script.make_score(
        model, rungs, calibration, held_out, unpruned, logits, max_bytes
    )
    for order in (candidates, candidates[::-1], sorted(candidates)):
        for candidate in order:
            assert score(candidate) == right[candidate]


def test_blocks_that_are_the_same_do_not_run_again():
    model, calls = timm.create_model("test_convnext", num_classes=4), []
    names = make_prunable(model)
    rungs = {name: block.rungs for name, block in prunable_blocks(model).items()}
    for name, block in prunable_blocks(model).items():  # pruned or not, it begins with this conv
        block.conv_dw.register_forward_hook(lambda *_, name=name: calls.append(name))
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    score = search_script.make_score(model, rungs, [images], [(images, labels)])
    rest = [0] * (len(names) - 3)
    score((1, 1, 0, *rest))
    calls.clear()
    score((1, 1, 1, *rest))
    assert calls == 2 * names[2:]  # to recalibrate, and to score


@one_network
def test_several_sizes_and_specs_of_ones_own(runs, tmp_path, capsys):
    search = f"2_search.py --supernet {runs}/supernet.pt"
    (tmp_path / "net.front").mkdir()
    for name in ("77.json", "3.pt"):  # of a search before; what stage 3 made of one of its specs
        (tmp_path / "net.front" / name).touch()
    assert stage(f"{search} --prune 1 2 3 --out {tmp_path}/net.json") is None
    (tmp_path / "net.front/3.pt").unlink()
    specs = [json.loads((tmp_path / f"net-{k}.json").read_text()) for k in (1, 2, 3)]
    assert [len(spec["prune"]) for spec in specs] == [1, 2, 3]
    assert all(spec["search"]["optimum"] for spec in specs)
    with open(tmp_path / "net.search.csv", encoding="utf-8") as file:
        table = {row["prune"]: row for row in csv.DictReader(file)}
    columns = {"prune", "blocks", "loss", "top1", "generation", "params", "macs"}
    assert len(table) == 14 and all(set(row) == columns for row in table.values())
    assert int(table[" ".join(specs[1]["prune"])]["macs"]) == specs[1]["merged"]["macs"]
    said = capsys.readouterr().out
    assert "only 20 held-out images: one of them is 5.0 points of top-1" in said
    rows = [line.split() for line in said.split("best trade-offs of macs")[1].splitlines()[2:]]
    assert sorted(row[0] for row in rows) == sorted(map(str, (tmp_path / "net.front").iterdir()))
    for path, _, macs, loss, _ in rows:  # each can go to stage 3 as it is
        with open(path, encoding="utf-8") as file:
            front = json.load(file)
        assert f"{front['merged']['macs'] / 1e6:.1f}" == macs
        assert f"{front['search']['loss']:.4f}" == loss
        assert " ".join(front["prune"]) in table
    assert stage(f"{search} --prune 1 --score {rows[0][0]}") == 2  # of argparse: one or the other
    assert stage(f"{search} --score {tmp_path}/net-2.json") is None
    assert f"{specs[1]['search']['loss']:.4f}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name, attention", [("test_resnet", False), ("test_vit", True)])
def test_latencies_of_blocks(name, attention):
    model = timm.create_model(name, **({"img_size": 32} if attention else {}))
    make_prunable(model, attention=attention)
    rungs = {name: block.rungs for name, block in prunable_blocks(model).items()}
    images = torch.randn(2, 3, 32, 32)
    _, savings = search_script.block_savings(model, rungs, images.shape[1:])
    table = search_script.measure_blocks(model, rungs, savings, images, count=2, rounds=1)
    assert list(table["savings"]) == list(rungs) and table["baseline"] > 0
    assert table["error"] >= 0 and table["spread"] >= 0
    for name, saved in table["savings"].items():
        assert saved[0] == 0 and len(saved) == len(rungs[name]) + 1


def test_latencies_are_those_of_a_processor(monkeypatch, tmp_path):
    """The table's key names its model: another machine's table is measured again."""
    measured = {"baseline": 1.0, "savings": {}, "error": 0.01, "spread": 0.01}
    monkeypatch.setattr(search_script, "measure_blocks", lambda *_: measured)
    about, path = dict.fromkeys(("model", "model_args", "form")), str(tmp_path / "latency.json")
    for name in ("One CPU", "Other CPU"):
        monkeypatch.setattr(search_script.platform, "processor", lambda name=name: name)
        made = search_script.latency_table(path, about, None, {}, {}, torch.zeros(2, 3, 32, 32))
        assert made["device"] == name


@pytest.mark.parametrize("runs", ["mobilenetv2_035"], indirect=True)
def test_latency_is_measured_once(runs, monkeypatch, tmp_path, capsys):
    """And kept, but not where the machine was too busy. (The times are made up: so no busy machine
    fails this test.)"""
    checkpoint, path = blocks.read_checkpoint(runs / "supernet.pt"), tmp_path / "latency.json"
    names = {n: b.rungs for n, b in prunable_blocks(blocks.build(checkpoint)).items()}
    errors = iter([0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.5, 0.5, 0.01, 0.5, 0.5, 0.5])

    def measure(*_):
        savings = {name: [0.04 * (i > 0) for i in range(5)] for name in names}
        return {"baseline": 1.0, "savings": savings, "error": next(errors), "spread": 0.01}

    def table():
        images = torch.zeros(2, 3, 32, 32)
        made = search_script.latency_table(str(path), checkpoint, None, names, {}, images)
        return made, capsys.readouterr().out

    monkeypatch.setattr(search_script, "measure_blocks", measure)
    first, said = table()
    assert "latencies of the blocks: measured" in said and json.loads(path.read_text()) == first
    without = {key: value for key, value in first.items() if key != "savings"}
    others = {**first, "threads": 77}, {**first, "form": "fitted"}, without, [1]
    for other in (*map(json.dumps, others), "{no JSON"):
        path.write_text(other)
        assert "measured" in table()[1] and "from" in table()[1] and table()[0] == first
    os.remove(path)
    assert table()[1].count("measured") == 3 and path.exists()  # the third time was good
    os.remove(path)
    assert "too busy" in table()[1] and not path.exists()

    made_up = torch.tensor([[0.1, 1.0], [0.1, 0.9]]).double().numpy()
    monkeypatch.setattr(blocks, "latencies", lambda *_: made_up)
    path.write_text(json.dumps(first))
    search = (
        f"2_search.py --supernet {runs}/supernet.pt --latency-batch 2 --population 3"
        f" --generations 1 --out {tmp_path}/net.json"
    )
    assert stage(f"{search} --latency 0.8") is None
    said = capsys.readouterr().out
    assert "latencies of the blocks: from" in said and "that is more than --latency 0.8" in said
    found = json.loads((tmp_path / "net.json").read_text())
    assert found["merged"]["latency"] <= 0.8 and len(found["prune"]) >= 5
    assert found["search"]["timed_latency"] == {"baseline": 1, "merged": pytest.approx(0.9)}
    error = stage(f"{search} --latency 0.01")
    assert error.startswith("error: --latency 0.01: merged subnets have ")

    line = f"{search} --latency 0.9"
    said = stage_on_full_disk(line, lambda path: path.endswith("net.json"), monkeypatch)
    assert said == "error: disk full"
    os.remove(path)  # what was scored goes by the latencies of its own time
    assert stage(f"{search} --resume") is None
    assert "latencies of the blocks" not in capsys.readouterr().out.split("going on")[1]
