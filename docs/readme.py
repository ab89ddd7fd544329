"""README.md from nbs/index.ipynb: the same text, links turned to where the files are in the repository."""
import re
from pathlib import Path

from chapters import BuildError
from fastcore.nbio import read_nb

NOTE = "<!-- Made from nbs/index.ipynb by `python docs/build.py --readme`: edit the notebook. -->"


def readme_text(root:Path # repository
               )->str:
    "Markdown cells as they are, code cells fenced; `corpus/x.ipynb` becomes `nbs/corpus/x.ipynb`."
    parts = [NOTE]
    for cell in read_nb(root/"nbs"/"index.ipynb").cells:
        if not cell.source.strip() or "hide" in cell.directives: continue
        parts.append(repository_links(cell.source, root) if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
    return "\n\n".join(p.strip() for p in parts) + "\n"

def repository_links(text:str, root:Path)->str:
    "Links relative to nbs/ as links relative to the repository; one that leads nowhere is an error."
    def link(m):
        target = (root/"nbs"/m[2]).resolve()
        if not target.exists(): raise BuildError(f"nbs/index.ipynb links to {m[2]}, which does not exist.")
        return f"[{m[1]}]({target.relative_to(root.resolve()).as_posix()}{m[3] or ''})"
    return re.sub(r"\[([^\]\n]*)\]\(((?![a-z]+:)[^)\s#]+)(#[^)\s]*)?\)", link, text)

def write_readme(root:Path): (root/"README.md").write_text(readme_text(root), encoding="utf-8")

def check_readme(root:Path):
    readme = root/"README.md"
    if not readme.exists() or readme.read_text(encoding="utf-8") != readme_text(root):
        raise BuildError("README.md differs from nbs/index.ipynb: run `python docs/build.py --readme`.")
