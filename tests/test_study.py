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

@pytest.mark.slow
def test_bootstrap_intervals_cover():
    "Percentile intervals of alpha cover what was planted, with 60 points and with the dozen of a small study, where the profile alone would be too sure."
    from arxiv_study.study.scaling import ScalingLaw, bootstrap_intervals, fit_law, profile_interval
    law = ScalingLaw(40, 200, .8, .34, .37, 0.)
    few = np.array([(n, d) for n in (60e3, 300e3, 900e3, 2.2e6) for d in (.5e6, 1e6, 2e6)])
    many = 10**np.random.default_rng(0).uniform([5, 6], [9, 9], (60, 2))
    covered = dict(few=0, many=0, profile_of_few=0)
    for seed in range(24):
        for name, places, noise in (("few", few, .005), ("many", many, .003)):
            loss = law.loss(*places.T)*np.exp(noise*np.random.default_rng(seed).standard_normal(len(places)))
            points = np.column_stack([places, loss])
            fit = fit_law(points, 6)
            low, high = bootstrap_intervals(points, fit, 40, seed=seed)["alpha"]
            covered[name] += low < .34 < high
            if name == "few": covered["profile_of_few"] += np.subtract(*profile_interval(points, fit)[::-1]) < high-low
    assert covered["few"] >= 19 and covered["many"] >= 19, covered     # P(X <= 18) is 0.2 % if the coverage is 95 %
    assert covered["profile_of_few"] >= 12, covered                    # narrower than the bootstrap in most studies: both are asked

# The rules that pass verdicts, by simulation

JUDGED = {"m": "R03 R09 R10 R11 R12 R13 R14 R15 R16 R17 R18 R19 R20".split(), "xs": "R01 R06 R07 R08".split()}
PAIRED_SD = .028     # of a difference of two runs with one seed, measured at desk scale

def simulated_study(rng, seeds, effects={}):
    "Judged contrasts of a study whose effects are known; `seeds` is a number, or a function of the run."
    import polars as pl
    from arxiv_study.study.statistics import judge_contrasts
    rows = []
    for size, runs in JUDGED.items():
        common = .03*rng.standard_normal(5)
        for run in runs:
            n = seeds(run) if callable(seeds) else seeds
            rows += [(run, s, size, 2+effects.get(run, 0.)+common[s]+PAIRED_SD/2**.5*rng.standard_normal()) for s in range(n)]
    return judge_contrasts(pl.DataFrame(rows, schema=["run", "seed", "size", "bits_per_byte"], orient="row"))

def within(n, p, sds=3): return sds*(p*(1-p)/n)**.5

@pytest.mark.parametrize("seeds", ["3", "5", "as designed"])
def test_nine_contrasts_err_in_five_studies_of_a_hundred(seeds):
    "Where nothing differs, some interval of the nine excludes 0 in at most 5 % of studies, and a claim is supported in fewer."
    from arxiv_study.study.runs import n_seeds
    from arxiv_study.study.statistics import SUPPORTED
    rng, n = np.random.default_rng(6), 400
    studies = [simulated_study(rng, n_seeds if seeds == "as designed" else int(seeds)) for _ in range(n)]
    excluded = np.mean([any(j.low > 0 or j.high < 0 for j in study) for study in studies])
    supported = np.mean([any(j.verdict == SUPPORTED for j in study) for study in studies])
    assert excluded <= .05 + within(n, .05) and supported <= excluded, (excluded, supported)

@pytest.mark.parametrize("seeds, effect, power", [(3, .07, .86), (5, .05, .84)])
def test_power_is_what_the_design_states(seeds, effect, power):
    "An effect is seen (interval above 0) as often as stated. Supported needs the estimate to reach 0.05, too: an effect of just that size is a coin's flip."
    from arxiv_study.study.statistics import CANNOT_TELL, SUPPORTED
    rng, n = np.random.default_rng(7), 400
    found = [next(j for j in simulated_study(rng, seeds, {"R15": effect}) if j.contrast.run == "R15") for _ in range(n)]
    seen, supported = np.mean([j.low > 0 for j in found]), np.mean([j.verdict == SUPPORTED for j in found])
    assert abs(seen-power) < within(n, power)+.02, seen
    assert supported > .7 if effect > .05 else abs(supported-.5) < within(n, .5), supported
    assert {j.verdict for j in simulated_study(rng, 1, {"R15": effect})} == {CANNOT_TELL}      # one seed shows no noise

@pytest.mark.parametrize("n_seeds", [3, 5])
def test_the_noise_rule_rarely_calls_equal_gradients_noisier(n_seeds):
    "Student's interval over the log ratios of a few seeds: equal noise is called noisier in at most 2.5 %, twice the noise is mostly found with five seeds."
    from arxiv_study.study.convergence import noise_verdict
    from arxiv_study.study.statistics import SUPPORTED, mean_interval
    rng, n = np.random.default_rng(8), 2000
    called = lambda ratio: np.mean([noise_verdict(*np.exp(mean_interval(np.log(ratio)+.25*rng.standard_normal(n_seeds)))) == SUPPORTED for _ in range(n)])
    assert called(1.) <= .025 + within(n, .025)
    assert n_seeds == 3 or called(2.) > .9

def estimates_of_noise(run, seed, factor, worse, rng, every):
    "What 976 steps at desk scale leave: warm-up and decay of the rate, a signal that scatters by 0.62 as measured at smoke scale, noise that doubles a bit."
    import polars as pl
    from arxiv_study.study.convergence import NOISE
    step = np.arange(0, 976, every)
    left, n = (976-step)/195, len(step)
    loss = 2.2+worse+2.5*np.exp(-step/60)+1.2*(step/30+1)**-.6-.1*np.clip(1-left, 0, 1)
    variance = factor*2000*2**(4-loss)*np.exp(.25*rng.standard_normal(n))
    return pl.DataFrame(dict(run=[run]*n, seed=[seed]*n, step=step, bits_per_byte=loss, lr=np.minimum(1, np.minimum((step+1)/49, left)), variance=variance, signal=1+.62*rng.standard_normal(n), bytes_per_token=[2.5]*n), schema=NOISE)

@pytest.mark.parametrize("worse, enough", [(.1, .95), (.3, .75)])
def test_noisier_gradients_are_found_with_the_estimates_of_a_desk_run(worse, enough):
    "Five seeds; R15 learns as R03 does, 0.1 or 0.3 bits per byte higher. An estimate each tenth step would not do: two runs share few losses."
    import polars as pl
    from arxiv_study.study.convergence import noise_ratio
    from arxiv_study.study.statistics import CANNOT_TELL, SUPPORTED
    def verdicts(factor, every, n=40):
        rng = np.random.default_rng(9)
        return [noise_ratio(pl.concat([estimates_of_noise(run, s, f, w, rng, every) for s in range(5) for run, f, w in (("R15", factor, worse), ("R03", 1., 0.))]), "R15", "R03").verdict for _ in range(n)]
    every = BASELINES["desk"]["training"]["noise_every"]
    assert verdicts(1.5, every).count(SUPPORTED) >= enough*40
    assert verdicts(1., every).count(SUPPORTED) <= 2
    assert worse < .3 or set(verdicts(1.5, 10, 5)) == {CANNOT_TELL}

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
    assert json.loads((metrics.parent/"status.json").read_text())["state"] in ("failed", "stopped")   # stopped: the ranks had time to save

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
