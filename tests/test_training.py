"""How runs end: dead ranks, stopped launchers, divergence; and what is left behind."""
import os, signal, subprocess, sys, time
import pytest
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json
from model_runs import asked, data, rank_of, ranks_alive


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
    assert status["state"] == "failed" and "interrupted" in status["reason"], status


def test_divergence_is_a_result(data, tmp_path):
    result = launch(asked(data, tmp_path / "run", steps=30, lr_multiplier=1e5, clip=None, warmup_fraction=0), tmp_path / "run", ranks=2)
    assert result["outcome"] == "diverged" and result["reason"]
    assert read_json(tmp_path / "run" / "status.json") == dict(state="done", outcome="diverged", reason=result["reason"])
