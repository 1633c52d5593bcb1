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
from conftest import one_network, stage

import blocks
from blocks import UserError, evaluate, fit, make_prunable, prunable_blocks, recalibrate, set_subnet

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


@pytest.mark.parametrize(
    "kind, value",
    [
        ("prune", 3),
        ("macs", 0.5),
        ("params", 0.7),
        ("params", 0.68),
        ("params", 1.0),
        ("macs", 0.25),
    ],
)
def test_budgets(kind, value):
    budget = search_script.make_budget(kind, value, NAMES, WHOLE, WHOLE, SAVINGS)
    sizes, fits, repair, every = budget
    assert sizes == [2] * 6 if kind == "prune" else sizes == [2, 3, 2, 3, 2, 2]
    candidates = [c for c in ALL if kind != "prune" or max(c) < 2]
    right = {
        c
        for c in candidates
        if (
            sum(c) == value
            if kind == "prune"
            else WHOLE[kind] - sum(SAVINGS[name][gene][kind] for name, gene in zip(NAMES, c))
            <= value * WHOLE[kind]
        )
    }
    assert {c for c in candidates if fits(c)} == right
    assert list(every()) == sorted(right)
    rng, harm = random.Random(0), [[0, 1, 0.5], [0, 0, 0], [0, -1, 2], *[[0, math.nan, 1]] * 3]
    for candidate in rng.choices(candidates, k=200):
        assert repair(candidate, rng, harm) in right
    for candidate in right:
        assert repair(candidate, rng, harm) == candidate


def test_a_budget_that_nothing_meets():
    with pytest.raises(
        UserError, match="merged subnets have 0.6800 to 1.1800 of the baseline's params"
    ):
        search_script.make_budget("params", 0.67, NAMES, WHOLE, WHOLE, SAVINGS)


def made_up(candidate):
    """Losses for NAMES with interactions between neighbours."""
    return {
        "loss": sum(c * (i + 1) for i, c in enumerate(candidate))
        + 3 * sum(a and b for a, b in zip(candidate, candidate[1:])),
        "top1": 0.0,
        "macs": -sum(candidate),
    }


def test_a_small_space_is_scored_completely(capsys):
    budget = search_script.make_budget("prune", 3, NAMES, WHOLE, WHOLE, SAVINGS)
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
    budget = search_script.make_budget("macs", 1.0, NAMES, WHOLE, WHOLE, SAVINGS)
    scores, exact = search_script.search(made_up, budget, 20, 8, 0)
    assert exact and set(scores) == set(ALL)
    candidate = (1, 2, 0, 0, 0, 1)
    prune = {"a": "dense", "b": "skip", "f": "dense"}
    assert search_script.prune_entry(candidate, NAMES) == prune
    assert search_script.prune_entry((1, 0, 0, 0, 0, 1), NAMES) == ["a", "f"]
    for spec, genes in ((prune, candidate), (["f", "a"], (1, 0, 0, 0, 0, 1)), ([], (0,) * 6)):
        assert search_script.genes(spec, NAMES) == genes


def test_a_block_that_breaks_the_network_is_left_alone():
    """A loss that is NaN counts as a large one, not as none."""
    def score(candidate):
        made = made_up(candidate)
        return {**made, "loss": math.nan if candidate[0] else made["loss"]}

    budget = search_script.make_budget("prune", 3, NAMES, WHOLE, WHOLE, SAVINGS)
    scores, exact = search_script.search(score, budget, 3, 2, 0)
    assert not exact and not any(c[0] for c in scores if scores[c]["generation"] == 1)


def test_a_search_goes_on_from_every_state_that_it_kept():
    """With the same scores, and without falling back to an earlier state."""
    budget = search_script.make_budget("prune", 3, NAMES, WHOLE, WHOLE, SAVINGS)
    states = []

    def keep(generation, scores):
        states.append((generation, dict(scores)))

    whole, exact = search_script.search(made_up, budget, 3, 4, 0, keep=keep)
    assert not exact and [generation for generation, _ in states] == [0, 1, 2, 3, 4]
    for first, known in list(states):
        states.clear()
        again, _ = search_script.search(made_up, budget, 3, 4, 0, "macs", known, first, keep)
        assert again == whole
        assert [generation for generation, _ in states] == list(range(first + 1, 5))


def test_of_equal_losses_the_cheaper_subnet_wins(capsys):
    def score(candidate):  # all alike, and the alphabet's last ones are the cheapest
        return {"loss": 1.0, "top1": 50.0, "macs": -sum(i * c for i, c in enumerate(candidate))}

    budget = search_script.make_budget("prune", 2, NAMES, WHOLE, WHOLE, SAVINGS)
    scores, _ = search_script.search(score, budget, 6, 4, 0)
    first, last = (1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1)
    assert search_script.ranked(scores)[0] == last == search_script.pareto(scores, "macs")[0]
    scores[first]["loss"] = float("nan")
    assert search_script.ranked(scores)[-1] == first


@pytest.mark.parametrize("form", ["reparam", "fitted"])
@pytest.mark.parametrize("fits_in_memory", [True, False])
@pytest.mark.parametrize(
    "name, attention",
    [
        ("test_resnet", False),
        ("mobilenetv2_035", False),
        ("test_convnext", False),
        ("test_vit", False),
        ("test_vit", True),
    ],
)
def test_scores_are_the_same_bits_in_any_order(name, attention, fits_in_memory, form):
    torch.manual_seed(0)
    model = timm.create_model(
        name, num_classes=4, **({"img_size": 32} if name == "test_vit" else {})
    )
    names = make_prunable(model, form, attention=attention)
    fit(model, names, [torch.randn(8, 3, 32, 32)], in_turn=False)
    rungs = {name: block.rungs for name, block in prunable_blocks(model).items()}
    calibration = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    held_out = [(torch.randn(4, 3, 32, 32), torch.randint(4, (4,))) for _ in range(2)]
    rng = random.Random(0)
    candidates = [tuple(rng.randrange(len(r) + 1) for r in rungs.values()) for _ in range(8)]
    candidates += candidates[-2:] + 2 * [(0,) * len(names)] + [(1,) * len(names)]

    def from_scratch(candidate):
        set_subnet(model, search_script.named(candidate, rungs))
        recalibrate(model, calibration)
        return evaluate(model, held_out)

    right = {c: from_scratch(c) for c in candidates}
    room = 2**31 if fits_in_memory else 1
    score = search_script.make_score(model, rungs, calibration, held_out, room)
    for order in (candidates, candidates[::-1], sorted(candidates)):
        for candidate in order:
            assert score(candidate) == right[candidate]


def test_blocks_that_are_the_same_do_not_run_again():
    model = timm.create_model("test_convnext", num_classes=4)
    names = make_prunable(model, "fitted")
    rungs, calls = {name: block.rungs for name, block in prunable_blocks(model).items()}, []
    for name, block in prunable_blocks(model).items():
        for conv in (block.conv_dw, block.pruned[0]):  # of one form each
            conv.register_forward_hook(lambda *_, name=name: calls.append(name))
    images = torch.randn(4, 3, 32, 32)
    score = search_script.make_score(
        model, rungs, [images], [(images, torch.zeros(4, dtype=torch.long))]
    )
    rest = [0] * (len(names) - 3)
    score((1, 1, 0, *rest))
    calls.clear()
    score((1, 1, 1, *rest))
    assert calls == 2 * names[2:]


@one_network
def test_several_sizes_and_specs_of_ones_own(runs, monkeypatch, tmp_path, capsys):
    flags = ["--supernet", runs / "supernet.pt", "--workers", 0]
    assert (
        stage(
            monkeypatch, "2_search.py", *flags, "--prune", 1, 2, 3, "--out", tmp_path / "net.json"
        )
        is None
    )
    specs = [json.loads((tmp_path / f"net-{k}.json").read_text()) for k in (1, 2, 3)]
    assert [len(spec["prune"]) for spec in specs] == [1, 2, 3] and all(
        spec["search"]["optimum"] for spec in specs
    )
    with open(tmp_path / "net.search.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 7 and set(table[0]) == {
        "prune",
        "blocks",
        "loss",
        "top1",
        "generation",
        "params",
        "macs",
    }
    assert {row["prune"]: int(row["macs"]) for row in table}[" ".join(specs[1]["prune"])] == specs[
        1
    ]["merged"]["macs"]
    said = capsys.readouterr().out
    assert "only 20 held-out images: one of them is 5.0 points of top-1" in said
    rows = [line.split() for line in said.split("best trade-offs of macs")[1].splitlines()[2:]]
    assert sorted(row[0] for row in rows) == sorted(map(str, (tmp_path / "net.front").iterdir()))
    for path, _, macs, loss, _ in rows:  # each can go to stage 3 as it is
        front = json.loads(open(path).read())
        assert (
            f"{front['merged']['macs'] / 1e6:.1f}" == macs
            and f"{front['search']['loss']:.4f}" == loss
        )
        assert " ".join(front["prune"]) in {row["prune"] for row in table}
    assert stage(monkeypatch, "2_search.py", *flags, "--prune", 1, "--score", rows[0][0]) == 2
    assert stage(monkeypatch, "2_search.py", *flags, "--score", tmp_path / "net-2.json") is None
    assert f"{specs[1]['search']['loss']:.4f}" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("name, attention", [("test_resnet", False), ("test_vit", True)])
def test_latencies_of_blocks(name, attention):
    model = timm.create_model(name, **({"img_size": 32} if attention else {}))
    make_prunable(model, attention=attention)
    rungs = {name: block.rungs for name, block in prunable_blocks(model).items()}
    images = torch.randn(2, 3, 32, 32)
    table = search_script.measure_blocks(model, rungs, images, count=2, rounds=1)
    assert list(table["savings"]) == list(rungs) and table["baseline"] > 0 and table["error"] >= 0
    for name, saved in table["savings"].items():
        assert saved[0] == 0 and len(saved) == len(rungs[name]) + 1


def test_latencies_are_those_of_a_processor(monkeypatch, tmp_path):
    """The table's key names its model: another machine's table is measured again."""
    monkeypatch.setattr(
        search_script,
        "measure_blocks",
        lambda *args: {"baseline": 1.0, "savings": {}, "error": 0.01},
    )
    about, path = {"model": "resnet18", "model_args": {}}, str(tmp_path / "latency.json")
    for name in ("One CPU", "Other CPU"):
        monkeypatch.setattr(search_script.platform, "processor", lambda name=name: name)
        made = search_script.latency_table(path, about, None, {}, torch.zeros(2, 3, 32, 32))
        assert made["device"] == name


@pytest.mark.parametrize("runs", ["mobilenetv2_035"], indirect=True)
def test_latency_is_measured_once(runs, monkeypatch, tmp_path, capsys):
    """And kept, but not where the machine was too busy. (The times are made up: so no busy machine
    fails this test.)"""
    checkpoint, path = blocks.read_checkpoint(runs / "supernet.pt"), tmp_path / "latency.json"
    names = {n: b.rungs for n, b in blocks.prunable_blocks(blocks.build(checkpoint)).items()}
    errors = iter([0.01, 0.01, 0.01, 0.01, 0.01, 0.5, 0.5, 0.01, 0.5, 0.5, 0.5])
    monkeypatch.setattr(
        search_script,
        "measure_blocks",
        lambda *args: {
            "baseline": 1.0,
            "savings": {name: [0.04 * (i > 0) for i in range(5)] for name in names},
            "error": next(errors),
        },
    )

    def table():
        made = search_script.latency_table(
            str(path), checkpoint, None, names, torch.zeros(2, 3, 32, 32)
        )
        return made, capsys.readouterr().out

    first, said = table()
    assert "latencies of the blocks: measured" in said and json.loads(path.read_text()) == first
    without = {key: value for key, value in first.items() if key != "savings"}
    for other in (json.dumps({**first, "threads": 77}), json.dumps(without), "[1]", "{no JSON"):
        path.write_text(other)
        assert "measured" in table()[1] and "from" in table()[1] and table()[0] == first
    os.remove(path)
    assert table()[1].count("measured") == 3 and path.exists()  # the third time was good
    os.remove(path)
    assert "too busy" in table()[1] and not path.exists()

    monkeypatch.setattr(
        blocks, "latencies", lambda *_: torch.tensor([[0.1, 1.0], [0.1, 0.9]]).double().numpy()
    )
    path.write_text(json.dumps(first))
    flags = [
        "--supernet",
        runs / "supernet.pt",
        "--workers",
        0,
        "--latency-batch",
        2,
        "--population",
        3,
        "--generations",
        1,
        "--out",
        tmp_path / "net.json",
    ]
    assert stage(monkeypatch, "2_search.py", *flags, "--latency", 0.8) is None
    said = capsys.readouterr().out
    assert "latencies of the blocks: from" in said and "that is more than --latency 0.8" in said
    found = json.loads((tmp_path / "net.json").read_text())
    assert found["merged"]["latency"] <= 0.8 and len(found["prune"]) >= 5
    assert found["search"]["timed_latency"] == {"baseline": 1, "merged": pytest.approx(0.9)}
    assert stage(monkeypatch, "2_search.py", *flags, "--latency", 0.01).startswith(
        "error: --latency 0.01: merged subnets have "
    )
