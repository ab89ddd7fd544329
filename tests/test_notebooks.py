"""Notebooks as they are committed: no outputs, no execution counts, and the tags that papermill needs."""
import json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*(ROOT/"nbs").rglob("*.ipynb"), *(ROOT/"runs").glob("*.ipynb")])
NOTEBOOKS = [p for p in NOTEBOOKS if ".ipynb_checkpoints" not in p.parts]

def code_cells(path): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_committed_without_outputs(path):
    dirty = [k for k, c in enumerate(code_cells(path)) if c["outputs"] or c["execution_count"]]
    assert not dirty, f"code cells {dirty} carry outputs: run `make clean-notebooks`"

@pytest.mark.parametrize("path", sorted((ROOT/"runs").glob("*.ipynb")), ids=lambda p: p.name)
def test_runs_keep_their_parameters_tag(path):
    tagged = [c for c in code_cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "papermill needs exactly one cell with the tag parameters"

def test_cleaning_keeps_the_tag(tmp_path):
    "nbdev-clean drops cell metadata unless the configuration allows it; papermill would then run the defaults without a word."
    (tmp_path/"pyproject.toml").write_text((ROOT/"pyproject.toml").read_text())
    (tmp_path/"nbs").mkdir()
    copy = tmp_path/"nbs"/"run.ipynb"
    copy.write_text((ROOT/"runs"/"run.ipynb").read_text())
    subprocess.run([Path(sys.executable).with_name("nbdev-clean"), "--fname", str(copy)], cwd=tmp_path, check=True)
    assert any("parameters" in c["metadata"].get("tags", []) for c in code_cells(copy))

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(path):
    "A chapter links to notebooks and files, which the site turns into pages; it has none of its own before it is built."
    words = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    targets = [t for t in re.findall(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)", words) if "://" not in t]
    lost = [t for t in targets if not (path.parent/t).exists()]
    assert not lost, f"{lost} do not exist: link to the notebook or file"
