"""Check a finished smoke study against an arXiv folder's truth: `python tests/check_study.py ARXIV WORKSPACE`.

Not a pytest module: it looks at what `make study` left behind, and `.ci/run` calls it after that.
"""
import json, sys
from pathlib import Path
import polars as pl

EARLY = ("metadata", "archive", "latex")
ALL = [f"R{k:02d}" for k in range(1, 25)]

def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def baseline_ledger(workspace):
    folders = sorted((workspace/"corpus").glob("baseline-*"))
    assert len(folders) == 1, f"expected one baseline corpus, found {folders}"
    return pl.read_parquet(sorted((folders[0]/"ledger").glob("*.parquet")))

def check_ledger(arxiv, ledger):
    truth = {t["id"]: t for t in read_lines(arxiv/"truth.jsonl")}
    records = {r["id"] for r in read_lines(arxiv/"arxiv-metadata-oai-snapshot.json")}
    rows = {r["id"]: r for r in ledger.to_dicts()}
    assert len(rows) == ledger.height, "a paper has two ledger rows"
    assert set(rows) == records | set(truth), "a paper is missing from the ledger, or stands in it without being seen"
    for id, t in truth.items():
        early = rows[id]["fate"] == "dropped" and rows[id]["stage"] in EARLY
        assert early == (t["fate"] == "dropped"), f"{id}: {rows[id]['stage']}/{rows[id]['reason']} against {t}"
        # A single gzipped file carries no name, so only archives can be compared by their main file.
        if t["fate"] == "source" and t["container"] == "tar-gz" and t.get("main"): assert rows[id]["main_file"] == t["main"], f"{id}: main file {rows[id]['main_file']} against {t['main']}"
    return len(truth), len(rows)

def check_conservation(ledger):
    total = lambda column: pl.col(column).list.eval(pl.element().struct.field("n")).list.sum().fill_null(0)
    broken = ledger.filter(pl.col("tex_bytes") + total("added") != pl.col("text_bytes") + total("removed"))
    assert broken.is_empty(), f"bytes are not conserved in {broken['id'].to_list()[:5]}"

def check_runs(workspace, runs=ALL):
    folders = sorted((workspace/"runs"/"smoke").glob("R*/s0"))
    assert [f.parent.name for f in folders] == runs, "not all runs are there"
    for f in folders:
        status, result = (json.loads((f/name).read_text()) for name in ("status.json", "result.json"))
        assert status["state"] == "done" and status["outcome"] in ("trained", "diverged"), f"{f}: {status}"
        assert (f/f"{f.parent.name}.ipynb").is_file(), f"{f} has no notebook"
        parts = sum(s for name, s in result["time"].items() if name not in ("total_s", "train_s"))
        assert parts <= 1.02*result["time"]["total_s"] + .1, f"{f}: the parts of the time are more than the whole, {result['time']}"
        if status["outcome"] == "trained": assert result["heldout"]["bits_per_byte"] < 8, f"{f}: worse than a coin"
    baseline = json.loads((workspace/"runs"/"smoke"/"R03"/"s0"/"result.json").read_text())
    assert baseline["heldout"]["bits_per_byte"] < baseline["unigram_byte_bits"], "the baseline did not learn more than byte frequencies"
    if runs == ALL: assert (workspace/"runs"/"smoke"/"report.html").stat().st_size > 100_000, "there is no report"
    return baseline

if __name__ == "__main__":
    arxiv, workspace = map(Path, sys.argv[1:3])
    ledger = baseline_ledger(workspace)
    members, papers = check_ledger(arxiv, ledger)
    check_conservation(ledger)
    baseline = check_runs(workspace)
    print(f"{members} members and {papers} papers have one ledger row each and agree with the truth; bytes are conserved; 24 runs are done; "
          f"R03 {baseline['heldout']['bits_per_byte']:.3f} bits per byte against {baseline['unigram_byte_bits']:.3f} of byte frequencies")
