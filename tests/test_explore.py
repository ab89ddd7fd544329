"""The notebooks under nbs/explore: each runs by itself, says something without a kernel, takes the reader's own folder, and in JupyterLab does what its widgets say."""
import json, os, re, shutil
from pathlib import Path

import nbformat
import pytest
from chromium import chromium, find_chromium, watched_page
from lab import CELLS, NOTEBOOK, Lab
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

EXPLORE = Path(__file__).parents[1]/"nbs"/"explore"
NAMES = sorted(p.stem for p in EXPLORE.glob("*.ipynb") if p.stem != "index")


def run(name:str, folder:Path, **parameters)->nbformat.NotebookNode:
    "A notebook executed top to bottom, with other values after its parameters, as papermill would put them."
    nb = nbformat.read(EXPLORE/f"{name}.ipynb", as_version=4)
    at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
    for key in parameters: assert re.search(rf"^{key} = ", nb.cells[at].source, flags=re.M), f"{name} has no parameter {key}"
    if parameters: nb.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(f"{k} = {v!r}" for k, v in parameters.items())))
    client = NotebookClient(nb, timeout=300, resources={"metadata": {"path": str(folder)}}, extra_arguments=["--log-level=ERROR"])
    try: client.execute()
    except CellExecutionError as e: nb.failure = e
    return nb

def outputs(nb, kind:str)->list:
    "The data of a kind, of all outputs."
    return [o.data[kind] for c in nb.cells for o in c.get("outputs", []) if kind in o.get("data", {})]

def stderr(nb)->str: return "".join(o.text for c in nb.cells for o in c.get("outputs", []) if o.get("name") == "stderr")

def titles(nb)->list: return [f["layout"]["title"]["text"] for f in outputs(nb, "application/vnd.plotly.v1+json")]


def test_they_are_the_seven_of_the_plan():
    assert NAMES == sorted(["one_paper", "yield", "tokenizer_bench", "batches", "watch", "ask", "plan"])

@pytest.mark.parametrize("name", NAMES)
def test_runs_by_itself_and_says_something_without_a_kernel(name, tmp_path):
    nb = run(name, tmp_path)
    assert "failure" not in nb, nb.failure
    assert stderr(nb) == ""
    assert outputs(nb, "application/vnd.jupyter.widget-view+json"), "there is no widget"
    figures, words = outputs(nb, "application/vnd.plotly.v1+json"), [h for h in outputs(nb, "text/html") if re.search(r"<(table|pre)\b", h)]
    assert figures or name == "one_paper"
    assert words
    for f in figures: assert f["layout"]["title"]["text"] and f["layout"]["meta"]["alt"].endswith("."), "a figure has a title and an alternative text"
    assert list(tmp_path.iterdir()) == [], "it left something behind"

@pytest.mark.parametrize("name, wrong, sentence", [
    ("yield", dict(corpus="nowhere"), r"nowhere.*"),
    ("batches", dict(tokens="nowhere"), r"nowhere.*"),
    ("ask", dict(run="nowhere"), r"nowhere has no model.safetensors: the run has not finished"),
    ("watch", dict(runs="nowhere"), r"there is no metrics.jsonl in nowhere or below it; name the folder that runs are written to"),
    ("one_paper", dict(arxiv="nowhere"), r"nowhere is not a folder; give an arXiv folder.*"),
    ("tokenizer_bench", dict(vocabularies=["nowhere"]), r"nowhere does not exist; give a SentencePiece model.*")])
def test_a_wrong_folder_is_a_sentence(name, wrong, sentence, tmp_path):
    nb = run(name, tmp_path, **wrong)
    assert "failure" in nb
    assert "Traceback" not in stderr(nb) and not [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert re.fullmatch(sentence, stderr(nb).strip(), flags=re.S) and "\n" not in stderr(nb).strip()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "What a reader might have: an arXiv folder with a corpus and tokens, other than the notebooks' own."
    from arxiv_study.study.widgets import miniature_study
    folder = tmp_path_factory.mktemp("own")
    corpus, tokens = miniature_study(folder, 25, vocab_size=400)
    return dict(arxiv=folder/"arxiv", corpus=corpus, tokens=tokens)

def test_yield_of_an_own_corpus(own, tmp_path):
    truth = [json.loads(line) for line in (own["arxiv"]/"truth.jsonl").read_text().splitlines()]
    nb = run("yield", tmp_path, corpus=str(own["corpus"]), tokens=str(own["tokens"]))
    kept = sum(t["reason"] is None for t in truth) # as planted
    assert "failure" not in nb, nb.get("failure")
    assert titles(nb)[0].startswith(f"{kept} of {len(truth)} papers become text")

def test_batches_of_own_tokens(own, tmp_path):
    nb = run("batches", tmp_path, tokens=str(own["tokens"]))
    described = json.loads((own["tokens"]/"shards.json").read_text())
    assert "failure" not in nb, nb.get("failure")
    said = "".join(o.text for c in nb.cells for o in c.get("outputs", []) if o.get("name") == "stdout")
    assert f"{described['train_tokens']:,} tokens" in said

def test_a_paper_of_an_own_folder(own, tmp_path):
    wanted = [json.loads(line) for line in (own["arxiv"]/"truth.jsonl").read_text().splitlines()]
    one = next(t for t in wanted[3:] if t["reason"] is None)
    nb = run("one_paper", tmp_path, arxiv=str(own["arxiv"]), paper=one["id"], tokenizer=str(own["tokens"]))
    assert "failure" not in nb, nb.get("failure")
    row = next(h for h in outputs(nb, "text/html") if "primary category" in h)
    assert f">{one['id']}<" in row and ">kept<" in row

def test_planted_runs_are_compared_where_both_have_been(tmp_path):
    "Two series written by hand: at the last step of the shorter one the longer is at 2.5."
    runs = tmp_path/"runs"
    for name, losses in (("a", [4., 3.5, 3., 2.5, 1., .5]), ("b", [4., 3.9, 3.8, 3.7])):
        (runs/"smoke"/name/"s0").mkdir(parents=True)
        lines = [dict(step=i, tokens=1000*(i + 1), loss=x, bits_per_byte=x, step_s=.5, tokens_per_s=2000.) for i, x in enumerate(losses)]
        (runs/"smoke"/name/"s0"/"metrics.jsonl").write_text("".join(json.dumps(l) + "\n" for l in lines))
    nb = run("watch", tmp_path, runs=str(runs))
    assert "failure" not in nb, nb.get("failure")
    figure = outputs(nb, "application/vnd.plotly.v1+json")[0]
    assert [t["x"] for t in figure["data"]] == [[1000*(i + 1) for i in range(n)] for n in (6, 4)]
    assert figure["layout"]["title"]["text"] == "After 4,000 tokens, smoke/a/s0 is lowest with 3.25, smoke/b/s0 highest with 3.85" # means over the last five steps: (4+3.5+3+2.5)/4 and (4+3.9+3.8+3.7)/4


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "One JupyterLab on copies of the notebooks."
    folder = tmp_path_factory.mktemp("lab")
    for name in NAMES: shutil.copy2(EXPLORE/f"{name}.ipynb", folder)
    with Lab(folder, tmp_path_factory.mktemp("log")/"lab.log") as found: yield found

@pytest.fixture(scope="module")
def page():
    with chromium() as b: yield watched_page(b, 1300, 1000)

@pytest.fixture(scope="module")
def shots(tmp_path_factory)->Path:
    "Where screenshots go, for a person to look at: SCREENSHOTS, or a folder of pytest's."
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder

CHANGED = "['input', 'change'].forEach(kind => e.dispatchEvent(new Event(kind, {bubbles: true})))"
def click(words): return f"[...document.querySelectorAll('.jp-OutputArea button')].find(b => b.textContent.trim().startsWith({words!r})).click()"
def choose(number, option): return f"(e => {{ e.selectedIndex = {option}; {CHANGED} }})([...document.querySelectorAll('.jp-OutputArea .widget-dropdown select')][{number}])"
def fill(selector, text): return f"(e => {{ e.value = {text!r}; {CHANGED} }})(document.querySelector({selector!r}))"
def title_has(words): return f"[...document.querySelectorAll('.js-plotly-plot .gtitle, .js-plotly-plot .xtitle')].some(t => t.textContent.includes({words!r}))"
def page_has(words): return f"[...document.querySelectorAll('.jp-OutputArea-output')].some(o => o.textContent.includes({words!r}))"

OPERATED = { # what is done, and what must then be seen that was not there before
    "yield": (click("few letters"), title_has("130 of 150 papers become text")),
    "batches": (choose(2, 1), title_has(", rank 1: 4 rows hold")),
    "ask": (fill(".jp-OutputArea textarea", "Let us") + ";" + click("continue"), page_has("tokens: done, 24 in")),
    "one_paper": (fill(".jp-OutputArea input[list]", "0704.0003"), "[...document.querySelectorAll('td')].some(c => c.textContent === '0704.0003')"),
    "tokenizer_bench": (click("a table"), page_has("tabular")),
    "plan": (choose(0, 4), page_has("2,719,910,400")),
    "watch": (click("seconds"), title_has("time in steps, s")),
}

@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine")
class TestInJupyterLab:
    @pytest.mark.parametrize("name", NAMES)
    def test_all_cells_run_and_a_widget_has_its_effect(self, name, lab, page, shots):
        page.watch.clear()
        lab.open(page, f"{name}.ipynb")
        assert lab.run_all(page) == []
        do, seen = OPERATED[name]
        page.wait_for_function("document.querySelectorAll('.jp-OutputArea .jupyter-widgets').length")
        assert not page.evaluate(f"!!({seen})"), "seen before anything was done"
        self.shoot(page, shots/f"{name}-before.png")
        page.evaluate(f"{do}, 1" if ";" not in do else f"(() => {{ {do}; return 1 }})()")
        page.wait_for_function(seen, timeout=90_000)
        self.shoot(page, shots/f"{name}-after.png")
        if name == "watch": self.hover_and_train(page, shots)
        assert [c for c in page.watch.complaints if not re.search("ERR_ABORTED|beforeunload", c)] == [] # a page that is left gives up its requests, and may not ask whether to save
        assert [r for r in page.watch.requests if r.startswith("http") and not r.startswith(lab.url)] == []
        page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll().then(() => 1)")

    def shoot(self, page, path:Path):
        "The first widgets and what is below them."
        page.evaluate("document.querySelector('.jp-OutputArea .jupyter-widgets').scrollIntoView({block: 'start'}), 1")
        page.evaluate("new Promise(done => setTimeout(done, 1500))")
        page.screenshot(path=path)

    def hover_and_train(self, page, shots):
        "Values are shown under the pointer; a run is started, followed and stopped."
        page.evaluate("document.querySelector('.js-plotly-plot').scrollIntoView({block: 'center'}), 1")
        page.evaluate("new Promise(done => setTimeout(done, 1000))")
        x, y = page.evaluate("(r => [r.x + r.width/2, r.y + r.height/2])(document.querySelector('.js-plotly-plot .nsewdrag').getBoundingClientRect())")
        for dx in (0, 3): page.mouse.move(x + dx, y)
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .hoverlayer text').length")
        page.evaluate(f"{click('start a run')}, 1")
        page.wait_for_function("[...document.querySelectorAll('.legendtext')].some(t => t.textContent === 'live-2')", timeout=120_000) # it has steps, and was drawn
        self.shoot(page, shots/"watch-live.png")
        stop = "[...document.querySelectorAll('.jp-OutputArea button')].filter(b => b.textContent.trim() === 'stop').pop()"
        page.evaluate(f"{stop}.click(), 1")
        page.wait_for_function(f"{stop}.disabled", timeout=120_000)
        page.wait_for_function("[...document.querySelectorAll('.widget-label')].some(l => l.textContent === 'stopped')", timeout=20_000)


def test_on_the_site_a_sentence_stands_for_widgets_and_figures_stay(tmp_path):
    import test_site
    root = tmp_path/"repository"
    (root/"nbs"/"explore").mkdir(parents=True)
    for name in ("settings.ini", "pyproject.toml", "nbs/index.ipynb", "nbs/explore/index.ipynb", "nbs/explore/plan.ipynb"): shutil.copy2(EXPLORE.parents[1]/name, root/name)
    for name in NAMES: # what the index links to has to be there; the other pages need not be made
        if name != "plan": shutil.copy2(EXPLORE/f"{name}.ipynb", root/"nbs"/"explore")
    (root/"nbs"/"study").mkdir()
    shutil.copy2(EXPLORE.parent/"study"/"14_widgets.ipynb", root/"nbs"/"study")
    built = test_site.build(root, "--only", "nbs/index.ipynb,nbs/explore/index.ipynb,plan")
    assert built.returncode == 0, built.stdout + built.stderr
    page = test_site.read(root/"_site", "explore/plan.html")
    assert page.count("which need a kernel") == 1 and "Dropdown(" not in page
    assert page.count('class="plot-json"') == 3 and "days</b>" in page
    assert re.search(r'<a class="[^"]*" href="plan.html">\s*Plan a run', test_site.read(root/"_site", "explore/index.html")), "it is listed in the sidebar"
