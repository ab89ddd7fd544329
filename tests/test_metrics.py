"""What a step's numbers mean: published utilisation, and trackers read back by their own readers."""
import csv, json
from pathlib import Path
import pytest
from arxiv_study.model.configuration import PRESETS, flops_per_token, n_parameters
from arxiv_study.model.launch import launch
from arxiv_study.model.metrics import METRICS, hardware_flops_per_token, mfu
from arxiv_study.storage import read_jsonl
from model_runs import asked, data

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"


def published():
    table = REFERENCE / "llm_foundry_throughput.csv"
    if not table.is_file(): pytest.skip(f"{table.name} is not beside this repository")
    return list(csv.DictReader(table.open()))


def test_published_mfu_by_the_schemas_formula():
    shapes = {"125m": (12, 768), "350m": (24, 1024), "760m": (24, 1536), "1b": (24, 2048), "3b": (32, 2560), "7b": (32, 4096), "13b": (40, 5120), "30b": (48, 7168)}
    rows = [r for r in published() if "a100" in r["GPU"].lower() and r["Model"] in shapes]
    for r in rows:
        ours = 100 * mfu(int(r["NumParams"]), *shapes[r["Model"]], int(r["SeqLen (T)"]), float(r["Throughput (T/s/GPU)"]), 312e12)
        assert ours == pytest.approx(float(r["MFU"]), abs=0.05), r
    assert len(rows) == 135


def test_published_hfu_is_four_thirds_where_all_is_computed_again():
    "The table counts a whole second forward, output layer included; ours leaves out what is not run again"
    rows = [r for r in published() if r["Activation Checkpointing"] == "True"]
    assert rows and all(float(r["HFU"]) == pytest.approx(float(r["MFU"]) * 4 / 3, abs=0.05) for r in rows)
    c = PRESETS["paper"]
    again = hardware_flops_per_token(c, 768, "full") / flops_per_token(c, 768)
    left_out = 2 * (n_parameters(c) - c.n_layers * (4 * c.d_model**2 + 3 * c.d_model * c.d_ffn + 2 * c.d_model)) / flops_per_token(c, 768)
    assert again == pytest.approx(4 / 3 - left_out, abs=1e-6)


def test_every_name_of_a_step_is_in_the_schema(data, tmp_path):
    launch(asked(data, tmp_path / "run", steps=3, checkpoint_every=1), tmp_path / "run", ranks=2)
    steps = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    assert all(set(r) <= {m.name for m in METRICS} | {"segment"} for r in steps)
    for r in steps:
        assert r["mfu"] < r["hfu"] < 1.5  # full recomputation; a noisy machine may beat the peak it was measured at
        assert r["tokens_per_s"] * r["step_s"] == pytest.approx(2 * 2 * 64, rel=1e-3)
        assert sum(r[k] for k in ("wait_s", "forward_s", "backward_s", "communication_s", "optimizer_s")) <= r["step_s"] * 1.001
    assert steps[1]["checkpoint_s"] > 0


@pytest.mark.peer
def test_tensorboard_reads_what_was_logged(data, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed; the extra tracking has it")
    path = asked(data, tmp_path / "run", steps=3)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(trackers=["tensorboard"])))
    launch(path, tmp_path / "run", ranks=1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    truth = [r["loss"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "event" not in r]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(k, pytest.approx(v, rel=1e-6)) for k, v in enumerate(truth)]
