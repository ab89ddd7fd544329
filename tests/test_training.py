"""How runs end: dead ranks, stopped launchers, divergence; and what is left behind."""
import os, signal, subprocess, sys, time
import pytest
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json, read_jsonl
from model_runs import asked, data, rank_of, ranks_alive, series


def test_a_dead_rank_fails_the_run_and_leaves_no_process(data, tmp_path):
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    def kill_one(record):
        if record.get("step") == 3: os.kill(next(p for p in ranks_alive(folder) if rank_of(p) == 1), signal.SIGKILL)
    with pytest.raises(StudyError, match="failed") as e: launch(config, folder, ranks=2, on_line=kill_one)
    assert read_json(folder / "status.json")["state"] == "failed"
    assert "rank" in str(e.value) and not (folder / "result.json").exists()
    assert ranks_alive(folder) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_launcher_leaves_no_process_and_says_why(data, tmp_path, number):
    config, folder = asked(data, tmp_path / "run", steps=100_000), tmp_path / "run"
    code = "import sys; from pathlib import Path; from arxiv_study.model.launch import launch; launch(Path(sys.argv[1]), Path(sys.argv[2]), 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code, str(config), str(folder)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not ((folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size): time.sleep(0.05)
    launcher.send_signal(number)
    launcher.communicate(timeout=60)
    until = time.monotonic() + 20
    while ranks_alive(folder) and time.monotonic() < until: time.sleep(0.1)
    assert ranks_alive(folder) == []
    status = read_json(folder / "status.json")
    assert status["state"] == "stopped" and "pre-empted by SIGTERM at step" in status["reason"], status
    assert any("event" in r and r["event"] == "preempted" for r in read_jsonl(folder / "metrics.jsonl"))


def test_divergence_is_a_result(data, tmp_path):
    result = launch(asked(data, tmp_path / "run", steps=30, lr_multiplier=1e5, clip=None, warmup_fraction=0), tmp_path / "run", ranks=2)
    assert result["outcome"] == "diverged" and result["reason"]
    assert read_json(tmp_path / "run" / "status.json") == dict(state="done", outcome="diverged", reason=result["reason"])


def test_a_preempted_run_goes_on_where_it_stopped(data, tmp_path):
    "SIGTERM to one rank of two: both save the same step and end with code 0; resumed, the series is the uninterrupted one"
    recipe = dict(steps=24, branch_tokens=[10 * 256])
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "run", **recipe), tmp_path / "run"
    def preempt(record):
        if record.get("step") == 4 and "event" not in record: os.kill(next(p for p in ranks_alive(folder) if rank_of(p) == 1), signal.SIGTERM)
    with pytest.raises(StudyError, match="pre-empted by SIGTERM at step .* launch it again with resume"): launch(config, folder, ranks=2, on_line=preempt, poll_s=0.005)
    assert read_json(folder / "status.json")["state"] == "stopped" and ranks_alive(folder) == []
    stopped_at = int(read_json(folder / "status.json")["reason"].split("step ")[1].split()[0])
    result = launch(config, folder, ranks=2, resume=True)
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl") if r.get("event") == "resumed"] == [stopped_at]
    assert series(folder) == series(tmp_path / "whole") and result["heldout"] == read_json(tmp_path / "whole" / "result.json")["heldout"]


POISONED = """
import os, sys
from pathlib import Path
from arxiv_study.model import train as t
from arxiv_study.model.configuration import read_run
factor, where, made = float(sys.argv[3]), sys.argv[4], t.summed_losses
def poisoned(engine, *batch):
    objective, nats = made(engine, *batch)
    if engine.global_steps != 3: return objective, nats
    return objective * factor, nats * factor if where == "loss" else nats
t.summed_losses = poisoned
t.train(read_run(Path(sys.argv[1])), Path(sys.argv[2]))
sys.stdout.flush(); os._exit(0)
"""

@pytest.mark.parametrize("value,where,zero_stage", [("nan", "loss", 2), ("inf", "gradient", 2), ("nan", "gradient", 0)])
def test_what_is_not_finite_changes_no_weight(data, tmp_path, value, where, zero_stage):
    "The fourth batch is poisoned: the run ends as diverged with the weights that three steps gave"
    from safetensors.torch import load_file
    import torch
    recipe = dict(steps=8, zero_stage=zero_stage, activation_checkpointing="none", schedule="cosine")
    config, folder = asked(data, tmp_path / "poisoned", **recipe), tmp_path / "poisoned"
    done = subprocess.run([sys.executable, "-c", POISONED, str(config), str(folder), value, where], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "status.json")["outcome"] == "diverged" and "of step 3 is" in read_json(folder / "result.json")["reason"]
    limited = asked(data, tmp_path / "three", **recipe)
    done = subprocess.run([sys.executable, "-c", THREE, str(limited), str(tmp_path / "three")], capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ours, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("poisoned", "three"))
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


THREE = """
import os, sys
from pathlib import Path
from arxiv_study.model import train as t
from arxiv_study.model.configuration import read_run
from arxiv_study.model.checkpoints import save_model
training = t.Training(read_run(Path(sys.argv[1])), Path(sys.argv[2]))
for step in range(3): training.train_step(step, t.rate_factor(step, training.plan[0], training.recipe, training.warmup, training.total))
save_model(training.engine.module, Path(sys.argv[2]))
sys.stdout.flush(); os._exit(0)
"""
