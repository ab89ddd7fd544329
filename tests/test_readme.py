"""Every command that the README shows is run: here, as it stands but for folders; or by .ci/run, whose line is named."""
import os, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", (ROOT/"README.md").read_text(encoding="utf-8"), re.S) for line in block.splitlines() if line.strip()]
IN_CI = {"make study": "make study ARXIV=", "make study ARXIV=/data/arxiv": "make study ARXIV=", "make study WORKSPACE=/scratch/study": "WORKSPACE=", "make test": "make test\n", "make docs": "make docs\n"}
DATA, SCRATCH = "/data/arxiv", "/scratch/study"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A checkout's run files beside a miniature arXiv."
    from arxiv_study.corpus.miniature import write_miniature
    place = tmp_path_factory.mktemp("readme")
    write_miniature(place/"arxiv", 120, seed=0)
    (place/"settings.ini").write_text("[study]\narxiv = arxiv\n")
    shutil.copytree(ROOT/"runs", place/"runs", ignore=shutil.ignore_patterns("results"))
    return place

def types(line:str, place:Path, *more, cwd:Path|None=None, timeout:float=300)->str: # stdout
    "A line as a reader types it, with folders of the test for the README's."
    words = [w.replace(DATA, str(place/"arxiv")).replace(SCRATCH, str(place/"work")) for w in shlex.split(line)]
    bin = str(Path(sys.executable).parent)
    done = subprocess.run([*words, *map(str, more)], cwd=cwd or place, capture_output=True, text=True, timeout=timeout, env=os.environ | dict(PATH=f"{bin}:{os.environ['PATH']}"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def plans_the_desk_scale(place, line):
    "What would be run, which is told before anything is."
    said = types(line, place, f"WORKSPACE={place}/work", "ARGS=--dry-run", cwd=ROOT)
    assert "R24" in said and not (place/"work").exists()

def fetches(place, line):
    "From a server that answers as arXiv does, whose address is a setting."
    from arxiv_servers import Arxiv, read_folder, serving
    own = place/"fetching"
    own.mkdir()
    with serving(Arxiv(*read_folder(place/"arxiv"))) as address:
        (own/"settings.ini").write_text(f"[study]\n[fetch]\noai = {address}/oai\neprints = {address}/e-print\nwait_s = 0\nbackoff_s = 0\n")
        types(line.replace(DATA, str(own/"arxiv")), place, cwd=own)
    assert (own/"arxiv"/"arxiv-metadata-oai-snapshot.json").is_file()

def plans(place, line): assert "1,360,103,424" in types(line, place)

def shows_the_paper_run(place, line):
    "Two A100 would train it: what is run is its configuration."
    assert "35584" in types(line, place, "--dry-run").replace(",", "")

def runs_as_a_notebook(place, line):
    types(line, place, "--no-progress-bar")
    assert "bits per byte" in (place/"R07.ipynb").read_text()

def runs(place, line): assert "R07" in types(line, place) + (place/"work/runs/smoke/R07/s0/result.json").read_text()

def helps(place, line): assert "study" in types(line, place) and "plan" in types(line, place)

HERE = {"make study ARXIV=/data/arxiv SCALE=desk": plans_the_desk_scale, "arxiv-study fetch /data/arxiv --category math.AG --max 200 --licence cc": fetches,
        "arxiv-study plan --scale paper --gpus 2 --gpu a100-80gb": plans, "arxiv-study run R03 --scale paper --arxiv /data/arxiv": shows_the_paper_run,
        "papermill runs/run.ipynb R07.ipynb -f runs/R07.yaml -p scale smoke": runs_as_a_notebook, "arxiv-study run R07 --scale smoke": runs, "arxiv-study --help": helps}
SLOW = (runs_as_a_notebook, runs)


def test_each_command_is_run_somewhere():
    assert set(SHOWN) == {*IN_CI, *HERE}

@pytest.mark.parametrize("line, in_ci", IN_CI.items())
def test_ci_runs_it(line, in_ci):
    assert in_ci in (ROOT/".ci"/"run").read_text(encoding="utf-8")

@pytest.mark.parametrize("line", [pytest.param(line, marks=pytest.mark.slow) if does in SLOW else line for line, does in HERE.items()])
def test_it_does_what_it_says(line, place):
    HERE[line](place, line)
