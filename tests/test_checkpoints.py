"""Kills, damage and full disks: what a resumed run has is what the uninterrupted one had."""
import os, random, subprocess, sys, time
import pytest
from arxiv_study.model.launch import launch, start_ranks
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json
from model_runs import asked, data, ranks_alive, series


def kill_at(config, folder, step, ranks=2):
    "Start a run and kill all ranks outright as soon as a step is logged"
    processes = start_ranks(config, folder, ranks, resume=False)
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        if metrics.is_file() and metrics.read_bytes().count(b'"loss"') > step: break
        time.sleep(0.002)
    for p in processes: p.kill()
    for p in processes: p.wait()


def test_resume_after_a_kill_is_bit_identical(data, tmp_path):
    "Killed at a random step of trunk or branch, twice, and resumed: the same series to the last bit"
    recipe = dict(steps=24, branch_tokens=[10 * 256], checkpoint_every=3)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, rng = asked(data, tmp_path / "killed", **recipe), random.Random(os.environ.get("KILL_SEED", "1"))
    kill_at(config, tmp_path / "killed", rng.randrange(4, 24))
    assert read_json(tmp_path / "killed" / "status.json")["state"] == "running"
    result = launch(config, tmp_path / "killed", ranks=2, resume=True)
    assert series(tmp_path / "killed") == series(tmp_path / "whole")
    expected = read_json(tmp_path / "whole" / "result.json")
    for key in ("heldout", "branches", "train_loss", "grad_norm", "tokens", "samples"): assert result[key] == expected[key], key


def die(config, folder, resume, rng, inside):
    "Run, and kill all ranks outright a moment after the first new step, or while a checkpoint is being written; whether it was"
    processes = start_ranks(config, folder, 2, resume)
    metrics, size, until = folder / "metrics.jsonl", 0, time.monotonic() + 120
    while time.monotonic() < until and all(p.poll() is None for p in processes):
        now = metrics.stat().st_size if metrics.is_file() else 0
        if now > size and size and not inside: break
        if inside and list((folder / "checkpoints").glob(".*.part/*")): break
        size = now or 1
        time.sleep(0.001)
    if not inside: time.sleep(rng.uniform(0, 0.1))
    for p in processes: p.kill()
    for p in processes: p.wait()
    return bool(list((folder / "checkpoints").glob(".*.part/*")))


@pytest.mark.slow
def test_twenty_kills_change_nothing(data, tmp_path):
    "One run killed outright twenty times, every third time inside a checkpoint write: its series and its result are the uninterrupted run's to the last bit"
    recipe, rng = dict(steps=160, branch_tokens=[60 * 256], checkpoint_every=2), random.Random(os.environ.get("KILL_SEED", "1"))
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder, inside = asked(data, tmp_path / "killed", **recipe), tmp_path / "killed", 0
    for k in range(20):
        inside += die(config, folder, k > 0, rng, inside=k % 3 == 2)
        assert read_json(folder / "status.json")["state"] == "running", k  # it was killed before its end
    result, expected = launch(config, folder, ranks=2, resume=True), read_json(tmp_path / "whole" / "result.json")
    assert inside >= 3
    assert series(folder) == series(tmp_path / "whole")
    for key in ("heldout", "branches", "train_loss", "grad_norm", "tokens", "samples"): assert result[key] == expected[key], key
    assert not list((folder / "checkpoints").glob(".*.part"))


LIMITED = """
import resource, sys
from pathlib import Path
from arxiv_study.model.launch import launch
from arxiv_study.settings import StudyError
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # a file that outgrows it cannot be written, as on a full disk
try: launch(Path(sys.argv[1]), Path(sys.argv[2]), 2, resume=True)
except StudyError as e: sys.exit(str(e))
"""

def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(data, tmp_path):
    "The run fails with a sentence, leaves no process, and goes on from the checkpoint before when there is space again"
    recipe = dict(steps=12, checkpoint_every=3)
    launch(asked(data, tmp_path / "whole", **recipe), tmp_path / "whole", ranks=2)
    config, folder = asked(data, tmp_path / "full", **recipe), tmp_path / "full"
    kill_at(config, folder, 5)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(config), str(folder)], capture_output=True, text=True, timeout=120)
    status = read_json(folder / "status.json")
    assert done.returncode == 1 and status["state"] == "failed" and ranks_alive(folder) == []
    assert "could not be written" in status["reason"] and "--resume" in status["reason"], status
    launch(config, folder, ranks=2, resume=True)
    assert series(folder) == series(tmp_path / "whole")


def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(data, tmp_path):
    from arxiv_study.model.configuration import read_run
    from arxiv_study.model.train import prepare_folder
    config, folder = asked(data, tmp_path / "run", steps=9, checkpoint_every=3), tmp_path / "run"
    launch(config, folder, ranks=1)
    before, result = series(folder), read_json(folder / "result.json")
    newest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().split()[-1]
    victim = next(newest.rglob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10])
    assert launch(config, folder, ranks=1, resume=True)["heldout"] == result["heldout"]
    assert series(folder) == before
    assert "is missing or is not what was written" in (folder / "rank-0.log").read_text()
    with pytest.raises(StudyError, match="another training"):
        prepare_folder(read_run(asked(data, folder, steps=10, checkpoint_every=3)), folder, resume=True)
