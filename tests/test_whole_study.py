"""A study at smoke scale by the executor, killed at ten random moments, and run by run by plain papermill: the same results each time.

`python -m pytest tests/test_whole_study.py -m slow`; with PATIENT=1 all 24 runs instead of two, which takes about half an hour.
"""
import json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil
import pytest

from model_runs import series

ROOT = Path(__file__).parents[1]
# R10 has a corpus of its own, and R22's steps are counted by a clock
RUNS = [f"R{k:02d}" for k in range(1, 25)] if os.environ.get("PATIENT") else ["R10", "R22"]
OF_NUMBERS = ("outcome", "n_params", "tokens", "bytes", "steps", "flops", "train_loss", "heldout", "unigram_byte_bits", "branches", "spikes", "grad_norm", "noise", "padding_share", "samples")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def checkout(place, arxiv):
    "Run files and settings of their own, as in a fresh clone"
    shutil.copytree(ROOT/"runs", place/"runs", ignore=shutil.ignore_patterns("results"))
    (place/"settings.ini").write_text(f"[study]\narxiv = {arxiv}\nworkspace = work\nscale = smoke\n")
    return place

def study(place):
    return subprocess.Popen(["arxiv-study", "study", "--only", ",".join(RUNS)], cwd=place, stdout=subprocess.DEVNULL, stderr=open(place/"said", "a"), env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The study that nothing interrupts, and its seconds"
    from arxiv_study.corpus.miniature import write_miniature
    place = tmp_path_factory.mktemp("whole")
    write_miniature(place/"arxiv", 120, seed=0)
    began = time.monotonic()
    assert study(checkout(place, place/"arxiv")).wait() == 0, (place/"said").read_text()[-2000:]
    return place, time.monotonic() - began

def folder(place, id): return place/"work"/"runs"/"smoke"/id/"s0"

def numbers(place, id):
    "What a run computed, without what a clock said; of a run that ends by the clock, its steps alone"
    found, config = (json.loads((folder(place, id)/name).read_text()) for name in ("result.json", "config.json"))
    return dict(series=series(folder(place, id)), **({} if config["training"]["max_seconds"] else {k: found[k] for k in OF_NUMBERS}))

def same(a, b, id):
    "Equal, or equal as far as both came where the clock ended them"
    a, b = numbers(a, id), numbers(b, id)
    if len(a) == 1:
        n = min(len(a["series"]), len(b["series"]))
        assert n and a["series"][:n] == b["series"][:n], id
    else: assert a == b, id


def test_killed_at_ten_random_moments(whole, tmp_path):
    "The executor dies by SIGKILL, its children go by themselves, and the same command goes on"
    place, seconds = whole
    draw, kills = random.Random(0), 0
    checkout(tmp_path, place/"arxiv")
    for wait in [draw.uniform(3, seconds/4) for _ in range(10)]:
        job = study(tmp_path)
        try: job.wait(wait)
        except subprocess.TimeoutExpired:
            family = psutil.Process(job.pid).children(recursive=True)
            job.send_signal(signal.SIGKILL)
            job.wait()
            kills += 1
            assert not psutil.wait_procs(family, timeout=30)[1]
        else: break
    assert kills >= 5 and study(tmp_path).wait() == 0, (kills, (tmp_path/"said").read_text()[-2000:])
    for id in RUNS: same(place, tmp_path, id)


def test_each_run_by_plain_papermill(whole, tmp_path):
    "What a reader types from the README, in a workspace that has nothing yet"
    checkout(tmp_path, whole[0]/"arxiv")
    for id in RUNS:
        answer = subprocess.run([sys.executable, "-m", "papermill", "runs/run.ipynb", f"{id}.ipynb", "-f", f"runs/{id}.yaml", "-p", "scale", "smoke", "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True)
        assert answer.returncode == 0, f"{id}: {answer.stderr[-2000:]}"
        same(whole[0], tmp_path, id)
