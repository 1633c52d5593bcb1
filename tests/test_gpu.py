"""The script for whoever has a GPU, at toy size."""

import csv

from conftest import ROOT, shell


def test_the_script_for_whoever_has_a_gpu(tmp_path):
    """At toy size: each of its parts leaves a row in its CSV and a line in its table."""
    done = shell(f"{ROOT}/tests/benchmarks/on_gpu.py --tiny --out a/b.csv --work work", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "a/b.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert not any(row["failed"] for row in rows) and "out of time: nothing" in done.stdout
    counts = {part: sum(row["part"] == part for row in rows) for part in ("speed", "evidence")}
    assert counts == {"speed": 2 * 2 * 2 + 1, "evidence": 1 + 2 * 2}
    table = done.stdout.partition("out of time")[2]
    for part in ("speed", "tests", "stages", "evidence"):
        assert f"\n{part} " in table
