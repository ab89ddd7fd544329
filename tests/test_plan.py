"""The planner against published rows and measured memory."""
import csv
from pathlib import Path
import pytest

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"


def test_published_mfu():
    "135 A100 rows of llm-foundry's table, to 0.05 points"
    table = REFERENCE / "llm_foundry_throughput.csv"
    if not table.is_file(): pytest.skip(f"{table.name} is not beside this repository")
    shapes = {"125m": (12, 768), "350m": (24, 1024), "760m": (24, 1536), "1b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168)}
    from arxiv_study.model.plan import mfu
    rows = [r for r in csv.DictReader(table.open()) if "a100" in r["GPU"].lower() and r["Model"] in shapes]
    for r in rows:
        layers, width = shapes[r["Model"]]
        ours = 100 * mfu(int(r["NumParams"]), layers, width, int(r["SeqLen (T)"]), float(r["Throughput (T/s/GPU)"]), 312e12)
        assert ours == pytest.approx(float(r["MFU"]), abs=0.05), r
    assert len(rows) == 135
