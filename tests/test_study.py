"""The study room against published numbers, a whole run by papermill as a user types it, kills, and failures that must not stop a study."""
import csv, json, os, shutil, signal, subprocess, sys, time
from dataclasses import fields, replace
from pathlib import Path
import numpy as np
import psutil
import pytest
from arxiv_study.settings import Settings, StudyError, load_settings
from arxiv_study.study.runs import BASELINES, RunConfig, effective, read_run, read_runs

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent/"shared"/"reference"/"scaling"/"epoch"/"svg_extracted_data.csv"
RUNS = read_runs(ROOT/"runs")

# Scaling against the published points

@pytest.mark.skipif(not REFERENCE.is_file(), reason="the published points of the Chinchilla figure are not here (../shared/reference)")
def test_reproduces_the_published_fit(tmp_path):
    from arxiv_study.study.scaling import fit_points
    rows = sorted(csv.DictReader(open(REFERENCE)), key=lambda r: float(r["loss"]))[:-5]
    table = tmp_path/"points.csv"
    table.write_text("n_params,flops,loss\n" + "".join(f"{r['Model Size']},{r['Training FLOP']},{r['loss']}\n" for r in rows))
    fit = fit_points(table, n_draws=20)
    expected = dict(A=477.83, B=2143.42, E=1.81722, alpha=.34731, beta=.36717, objective=.0010182740)
    for name, value in expected.items(): assert fit[name] == pytest.approx(value, rel=2e-5), name
    assert fit["n_points"] == 240 and fit["identified"] and fit["intervals"]["alpha"][0] < fit["alpha"] < fit["intervals"]["alpha"][1]

# Run files

def test_the_run_files_have_exactly_five_keys():
    import yaml
    for path in sorted((ROOT/"runs").glob("R*.yaml")): assert list(yaml.safe_load(path.read_text())) == ["id", "family", "question", "base", "change"]
    assert len(RUNS) == 24

@pytest.mark.parametrize("scale", BASELINES)
def test_effective_configurations_fit_the_rooms(scale):
    "Every name that a run hands on is a field of the room that takes it."
    from arxiv_study.corpus.pipeline import CorpusConfig
    from arxiv_study.study.executor import TRAINING_NAMES
    from arxiv_study.model.configuration import TrainingConfig
    from arxiv_study.tokens.tokenizer import TokenizerConfig
    names = lambda c: {f.name for f in fields(c)}
    assert set(TRAINING_NAMES) <= names(TrainingConfig)
    for run in RUNS.values():
        config = effective(run, Settings(scale=scale), RUNS)
        assert set(config.corpus) <= names(CorpusConfig) and set(config.tokenizer) <= names(TokenizerConfig)

def test_sizes_are_the_presets():
    from arxiv_study.model.configuration import PRESETS
    for scale in ("smoke", "desk"):
        for id, size in (("R02", "s"), ("R03", "m"), ("R04", "l")):
            preset = PRESETS[f"{scale}-{size}"]
            assert effective(RUNS[id], Settings(scale=scale), RUNS).model["d_model"] == preset.d_model

@pytest.mark.parametrize("old, new, words", [("lr_multiplier", "lr_multiplyer", ["R07.yaml:6", "training.lr_multiplier"]), ("base:", "bsae:", ["R07.yaml:4", "'base'"]),
    ("family: data", "family: dta", ["R07.yaml:2", "'data'"]), (": 8", ": -8", ["R07.yaml:6", "from 0"]), ("R01", "[", ["R07.yaml", "YAML"])])
def test_a_bad_run_file_names_line_and_nearest(tmp_path, old, new, words):
    path = tmp_path/"R07.yaml"
    path.write_text((ROOT/"runs"/"R07.yaml").read_text().replace(old, new))
    with pytest.raises(StudyError) as e: read_run(path)
    assert e.value.code == 2 and all(w in str(e.value) for w in words), str(e.value)

# Whole runs: one small workspace for all

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A checkout's run files with a smaller smoke scale, on a miniature."
    from arxiv_study.corpus.miniature import write_miniature
    place = tmp_path_factory.mktemp("study")
    write_miniature(place/"arxiv", 120, seed=0)
    (place/"settings.ini").write_text(f"[study]\narxiv = arxiv\nworkspace = work\nscale = smoke\n")
    shutil.copytree(ROOT/"runs", place/"runs", ignore=shutil.ignore_patterns("results"))
    return place

def papermill(place, *arguments, **options):
    return subprocess.run([sys.executable, "-m", "papermill", "runs/run.ipynb", "out.ipynb", *arguments, "--no-progress-bar"], cwd=place, capture_output=True, text=True, timeout=300, **options)

def short_run(place, id="X1", **change):
    "A run of four steps as a parameters file."
    import yaml
    run = dict(id=id, family="optimisation", question="Does a short run work?", base="R03", change={"training.tokens": 8192, "model.size": "xs"} | change)
    (place/f"{id}.yaml").write_text(yaml.safe_dump(run))
    return place/f"{id}.yaml"

def test_papermill_by_hand(here):
    answer = papermill(here, "-f", str(short_run(here)), "-p", "scale", "smoke")
    assert answer.returncode == 0, answer.stderr[-3000:]
    folder = here/"work"/"runs"/"smoke"/"X1"/"s0"
    status, config = json.loads((folder/"status.json").read_text()), json.loads((folder/"config.json").read_text())
    assert status["state"] == "done" and config["training"]["steps"] == 4 and config["model"]["d_model"] == 8
    text = (here/"out.ipynb").read_text()
    assert "reached" in text and "bits per byte" in text and "injected-parameters" in text

def test_unknown_parameters_are_refused(here):
    answer = papermill(here, "-f", str(short_run(here)), "-p", "learning_rate", "3")
    assert answer.returncode != 0 and "unknown parameter 'learning_rate'" in answer.stderr

def test_a_failed_run_leaves_its_page_and_the_study_goes_on(here, monkeypatch):
    "R02 and R17 are shortened; R17 first asks for papers of a year that has not come."
    from arxiv_study.study.executor import execute_study
    cheap = "  training.tokens: 8192\n"
    (here/"runs"/"R02.yaml").write_text((ROOT/"runs"/"R02.yaml").read_text() + cheap)
    (here/"runs"/"R17.yaml").write_text((ROOT/"runs"/"R17.yaml").read_text() + cheap + "  corpus.min_year: 2090\n")
    monkeypatch.chdir(here)
    settings = load_settings()
    with pytest.raises(StudyError, match="R17"): execute_study(settings, only=("R02", "R17"))
    state = lambda id: json.loads((here/"work"/"runs"/"smoke"/id/"s0"/"status.json").read_text())
    assert state("R02")["state"] == "done" and state("R17")["state"] == "failed" and state("R17")["reason"]
    # a second call skips what is done; --failed repeats the other, mended
    before = (here/"work"/"runs"/"smoke"/"R02"/"s0"/"result.json").stat().st_mtime_ns
    (here/"runs"/"R17.yaml").write_text((ROOT/"runs"/"R17.yaml").read_text() + cheap)
    execute_study(settings, only=("R02", "R17"), failed=True)
    assert state("R17")["state"] == "done" and (here/"work"/"runs"/"smoke"/"R02"/"s0"/"result.json").stat().st_mtime_ns == before

def test_interrupt_stops_everything(here):
    "SIGINT to the executor while a run trains: no process is left, the status says so, and the next call runs it."
    program = "from arxiv_study.settings import load_settings\nfrom arxiv_study.study.executor import execute_study\ntry: execute_study(load_settings(), only=('R03',))\nexcept KeyboardInterrupt: raise SystemExit(130)"
    job = subprocess.Popen([sys.executable, "-c", program], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, family, until = here/"work"/"runs"/"smoke"/"R03"/"s0"/"metrics.jsonl", {}, time.monotonic()+180
    while not (metrics.is_file() and metrics.stat().st_size) and job.poll() is None and time.monotonic() < until: time.sleep(.1)
    assert metrics.is_file(), job.communicate(timeout=5)[0]
    family = psutil.Process(job.pid).children(recursive=True)
    assert len(family) >= 4, family    # papermill, kernel, two ranks
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=60)
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert job.returncode == 130 and not alive, alive
    assert json.loads((metrics.parent/"status.json").read_text())["state"] == "failed"

def test_killed_executor_leaves_no_process(here):
    "SIGKILL cannot be caught: papermill, kernel and ranks must notice by themselves."
    program = "from arxiv_study.settings import load_settings\nfrom arxiv_study.study.executor import execute_study\nexecute_study(load_settings(), only=('R03',))"
    job = subprocess.Popen([sys.executable, "-c", program], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, until = here/"work"/"runs"/"smoke"/"R03"/"s0"/"metrics.jsonl", time.monotonic()+180
    time.sleep(3)
    while not (metrics.is_file() and metrics.stat().st_size) and job.poll() is None and time.monotonic() < until: time.sleep(.1)
    family = psutil.Process(job.pid).children(recursive=True)
    job.kill()
    job.wait()
    assert family and not psutil.wait_procs(family, timeout=30)[1]

def test_report_of_what_is_there(here, monkeypatch):
    from arxiv_study.study.executor import execute_study
    from arxiv_study.study.report import write_report
    monkeypatch.chdir(here)
    (here/"runs"/"R02.yaml").write_text((ROOT/"runs"/"R02.yaml").read_text() + "  training.tokens: 8192\n")
    execute_study(load_settings(), only=("R02",))    # skipped where an earlier test has done it
    from plotly.offline import get_plotlyjs
    text = write_report(here/"work", "smoke", load_settings()).read_text().replace(get_plotlyjs(), "PLOTLY")
    assert "cannot tell at this scale" in text and "smoke" in text and "PLOTLY" in text and "Plotly.newPlot" in text
    assert 'src="http' not in text and 'href="http' not in text

def test_imports_load_no_torch():
    "Kernels and the executor start without PyTorch."
    program = "import sys, arxiv_study.study.notebook, arxiv_study.study.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
