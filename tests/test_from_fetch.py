"""A new user's two commands: math.AG fetched from servers that speak arXiv's protocols, then the whole study at smoke scale on what came.

`python -m pytest tests/test_from_fetch.py -m slow` trains the baseline; with PATIENT=1 all 24 runs, which takes about ten minutes."""
import json, os, re, shlex, subprocess, sys
from pathlib import Path
import pytest
import check_study
from arxiv_servers import Arxiv, read_folder, serving
from arxiv_study.corpus.fetch import SNAPSHOT
from arxiv_study.corpus.miniature import write_miniature
from test_fetch import ini

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]
FETCH = "fetch data --category math.AG --max 200 --licence cc" # as the README has it
MOST = 200
ONLY = {} if os.environ.get("PATIENT") else dict(ARGS="--only R03")


def cross_listed(r):
    "Every studied paper also in math.AG, where real ones of its neighbours are cross-listed."
    cats = r["categories"].split()
    return r if "math.AG" in cats else dict(r, categories=" ".join([*cats, "math.AG"]))

@pytest.fixture(scope="module")
def server_side(tmp_path_factory):
    "What the server has: more papers under Creative Commons than are asked for. Records, payloads and the truth by id."
    folder = tmp_path_factory.mktemp("arxiv")/"mini"
    write_miniature(folder, 600, seed=5)
    records, payloads = read_folder(folder)
    truth = {t["id"]: t for t in map(json.loads, (folder/"truth.jsonl").read_text(encoding="utf-8").splitlines())}
    return [cross_listed(r) for r in records], payloads, truth

def made_by(target, **variables):
    "The command that `make` runs, without the installation before it."
    said = subprocess.run(["make", "--no-print-directory", "-n", "-o", "install", target, *(f"{k}={v}" for k, v in variables.items())], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(said.strip().splitlines()[-1])
    assert Path(program).name == "arxiv-study", said
    return [*CLI, *arguments]

def fetch(server_side, place, command=FETCH):
    "The first command, in a folder of its own."
    records, payloads, _ = server_side
    with serving(Arxiv(records, payloads, page=50)) as address:
        settings = ini(place, address)
        return subprocess.run([*CLI, *command.split(), "--json", "--settings", settings], cwd=place, capture_output=True, text=True, timeout=600)

def fate_of(t, have):
    "What the ledger has to say of a paper: stage and reason, or nothing where it is kept."
    match t["reason"] if t["fate"] == "dropped" else None:
        case None: return None
        case "zero_bytes": return "archive", "no_source" # an answer without a byte is a failure, asked for again and in the end passed over
        case "no_studied_category": return None # until it was cross-listed here
        case "exact_duplicate" | "near_duplicate" if t["duplicate_of"] not in have: return None
        case reason: return t["stage"], reason

def agrees(ledger, truth, have):
    "Each fetched paper has one row, with the fate that the miniature planted, and the main file."
    rows = {r["id"]: r for r in ledger.to_dicts()}
    assert set(rows) == have and ledger.height == len(have)
    for id, r in rows.items():
        assert (None if r["fate"] == "kept" else (r["stage"], r["reason"])) == fate_of(truth[id], have), (r, truth[id])
        if r["fate"] == "kept" and truth[id]["container"] == "tar-gz" and truth[id]["main"]: assert r["main_file"] == truth[id]["main"], (r, truth[id])
        assert "creativecommons.org" in r["license"] and "math.AG" in r["categories"]


def test_the_readme_says_the_same():
    "What is tested is what is written: both commands, with one folder."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    said, folder = re.search(r"^arxiv-study (fetch (\S+) .*)$", text, re.M).groups()
    assert said.replace(folder, "data") == FETCH and re.search(rf"^make study ARXIV={re.escape(folder)}\b", text, re.M)


@pytest.mark.slow
def test_too_few_to_study(server_side, tmp_path):
    "One sentence after some seconds, and no run begun: all of three papers are held out."
    said = fetch(server_side, tmp_path, FETCH.replace("200", "3"))
    assert said.returncode == 0, said.stderr
    made = subprocess.run(made_by("study", ARXIV=tmp_path/"data", WORKSPACE=tmp_path/"work"), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert made.returncode == 1 and "Traceback" not in made.stderr
    assert re.fullmatch(r"arxiv-study: \S+ has no paper in the training split; give more papers, at least eight that are kept", made.stderr.strip().splitlines()[-1])
    assert not list(tmp_path.glob("work/runs/*/R*"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fetch_then_study(server_side, tmp_path):
    "A study on 200 fetched papers; the ledger agrees with the truth, bytes are conserved, the baseline has learned."
    said = fetch(server_side, tmp_path)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)[0]["asked"] == MOST
    data, work = tmp_path/"data", tmp_path/"work"
    made = subprocess.run(made_by("study", ARXIV=data, WORKSPACE=work, **ONLY), cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert made.returncode == 0, made.stderr[-4000:]
    have = {json.loads(line)["id"] for line in (data/SNAPSHOT).read_text(encoding="utf-8").splitlines()}
    assert len(have) == MOST
    ledger = check_study.baseline_ledger(work)
    agrees(ledger, server_side[2], have)
    check_study.check_conservation(ledger)
    check_study.check_runs(work, ["R03"] if ONLY else check_study.ALL)
