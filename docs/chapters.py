"""From an nbdev notebook to a page of the site: add documentation cells, execute, keep what a reader wants to see.

nbdev's own `proc_nbs` executes every export a second time to render signatures. Here the documentation cells go
into the notebook before its one execution, so a page costs one kernel and shows what that kernel computed.
"""
import ast, base64, hashlib, html, json, os, re, sys, threading
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat
from fastcore.nbio import read_nb
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.process import NBProcessor
from nbdev.processors import add_show_docs, filter_stream_, hide_line, strip_ansi

EXPORTS, UNSEEN, UNRUN = {"export", "exports", "exporti"}, {"hide", "default_exp"}, {"notest", "slow"}
OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]


class BuildError(Exception):
    "One sentence that names the notebook or file and what is wrong with it."


@dataclass(frozen=True)
class Chapter:
    "One notebook and the page it becomes."
    source: Path # the notebook in the repository
    rel: Path # the same relative to the repository
    page: str # docname, such as corpus/metadata
    title: str
    subtitle: str
    module: str|None # corpus.metadata, or None where nothing is exported
    symbols: tuple # public names defined in exported cells, methods as Class.method


def page_name(path:Path # relative to nbs/ (or to the repository, for runs/)
             )->str:
    "`corpus/02_metadata.ipynb` → `corpus/metadata`: numbers order files, addresses outlive renumbering."
    return "/".join(re.sub(r"^\d+_", "", part) for part in path.with_suffix("").parts)

def exported(cell)->bool: return cell.cell_type == "code" and bool(EXPORTS & cell.directives.keys())

def defined_names(source:str # Python
                 )->list[str]:
    "Names of the functions, classes and `@patch` methods a cell defines."
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        owner = patched_class(node)
        found.append(f"{owner}.{node.name}" if owner else node.name)
    return found

def patched_class(node)->str|None: # the class that `@patch` gives this function to
    decorators = {getattr(d, "id", getattr(getattr(d, "func", None), "id", None)) for d in node.decorator_list}
    if not decorators & {"patch", "patch_to"}: return None
    first = node.args.args[0].annotation if node.args.args else None
    return getattr(first, "id", None)

def read_chapter(source:Path, # notebook
                 root:Path, # repository
                 nbs:Path # folder that page names start from
                )->Chapter:
    "Title, subtitle, module and symbols, read from the cells without running them."
    cells = read_nb(source).cells
    heading = next((c.source for c in cells if c.cell_type == "markdown" and c.source.startswith("# ")), "")
    if not heading: raise BuildError(f"{source.relative_to(root)} has no H1: a chapter starts with `# Title` and `> subtitle`.")
    lines = heading.splitlines()
    subtitle = next((l[1:].strip() for l in lines[1:3] if l.startswith(">")), "")
    module = next((c.directives["default_exp"] for c in cells if c.cell_type == "code" and "default_exp" in c.directives), None)
    names = [n for c in cells if exported(c) for n in defined_names(c.source)]
    public = tuple(n for n in names if not n.split(".")[-1].startswith("_"))
    return Chapter(source, source.relative_to(root), page_name(source.relative_to(nbs)), lines[0][2:].strip(), subtitle, module, public)


# ---- before execution ----

PARSING = threading.Lock() # CPython before 3.11.8 counts the depth of a syntax tree for all threads together, and fails when two parse at once

def with_documentation(chapter:Chapter)->nbformat.NotebookNode: # ready to execute
    "The notebook with a `show_doc` cell after each export, and tags that say what each cell is for the reader."
    nb = NBProcessor(chapter.source, procs=[add_show_docs], rm_directives=False, process=True).nb
    cells = [code_cell("from nbdev.showdoc import show_doc", "unseen")]
    for cell in nb.cells:
        if cell.cell_type != "code": cells.append(nbformat.v4.new_markdown_cell(cell.source))
        else: cells.append(code_cell(cell.source, *reader_tags(cell)))
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})

def code_cell(source:str, *tags:str): return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})

PARAMETERS = "parameters" # papermill's tag

def reader_tags(cell)->list[str]:
    "What nbdev's directives mean for the page: unseen, doc, exported; and for myst-nb: remove-input and the like."
    d = cell.directives
    if getattr(cell, "has_sd", False): return ["doc"]
    tags = ["unseen"] if UNSEEN & d.keys() else ["exported"] if EXPORTS & d.keys() else []
    if d.get("eval") == "false" or UNRUN & d.keys(): tags.append("skip-execution")
    if d.get("echo") == "false" or "hide_input" in d: tags.append("remove-input")
    if d.get("output") == "false" or "hide_output" in d: tags.append("remove-output")
    if "code-fold" in d: tags.append("hide-input")
    return tags + [PARAMETERS]*(PARAMETERS in (cell.get("metadata") or {}).get("tags", []))


# ---- execution ----

def execution_key(chapter:Chapter, root:Path)->str:
    "Changes when anything that a figure could depend on changes: notebook, library, run files, settings, packages, this builder."
    files = [chapter.source, Path(__file__), root/"settings.ini", *sorted((root/"arxiv_study").rglob("*.py")), *sorted((root/"runs").rglob("*.yaml"))]
    if is_run(chapter): files += [*sorted(p for p in (root/"runs"/"results").rglob("*") if p.is_file()), *finished_runs(chapter)]
    sha = hashlib.sha256("".join([sys.version, *(version(p) for p in ("torch", "plotly", "polars", "nbdev"))]).encode())
    for f in files:
        if f.exists(): sha.update(f.name.encode() + f.read_bytes())
    return sha.hexdigest()[:16]

def is_run(chapter:Chapter)->bool: return chapter.rel.parts[0] == "runs"

def finished_runs(chapter:Chapter)->list[Path]:
    "Results that the build found in the workspace."
    return sorted((chapter.source.parents[1]/"work"/"runs").rglob("result.json"))

def kept_scale(root:Path)->str|None:
    "The largest scale whose results are kept in the repository."
    return next((s for s in ("paper", "desk", "smoke") if (root/"runs"/"results"/s/"about.json").is_file()), None)

def reading_only(nb:nbformat.NotebookNode, scale:str|None=None # that is read; None: as settings.ini says
                )->nbformat.NotebookNode:
    "A family notebook executes what its workspace lacks; the site only reads."
    given = next((i + 1 for i, c in enumerate(nb.cells) if PARAMETERS in c.metadata.get("tags", [])), None)
    if scale and given: nb.cells.insert(given, code_cell(f"scale = {scale!r}", "unseen"))
    rule = "from arxiv_study.study.report import open_evidence\nopen_family = lambda family, namespace: open_evidence(namespace)[:2]"
    at = next((i + 1 for i, c in enumerate(nb.cells) if c.cell_type == "code" and "import" in c.source and "open_family" in c.source), None)
    if at: nb.cells.insert(at, code_cell(rule, "unseen"))
    return nb

NO_RUNS = """:::{note}
This site was built where no run had finished, so the figures are missing. `make study`, then `make docs`, puts them here.
:::"""

def without_runs(nb:nbformat.NotebookNode)->nbformat.NotebookNode:
    "The notebook as written, and why it has no outputs."
    nb.cells.insert(2, nbformat.v4.new_markdown_cell(NO_RUNS))
    return nb

def execute(chapter:Chapter, # what to run
            root:Path, # repository
            work:Path, # build folder with a copy of what notebooks read
            timeout_s:int # for one cell
           )->nbformat.NotebookNode:
    "The executed notebook, from the cache where nothing changed; a failure names notebook and cell."
    kept = work/"executed"/f"{chapter.page.replace('/', '.')}-{execution_key(chapter, root)}.ipynb"
    if kept.exists(): return nbformat.read(kept, as_version=4)
    with PARSING: nb = with_documentation(chapter)
    scale = None if finished_runs(chapter) else kept_scale(root)
    if is_run(chapter) and not (finished_runs(chapter) or scale): return without_runs(nb)
    if is_run(chapter): nb = reading_only(nb, scale)
    folder = work/"tree"/chapter.rel.parent
    client = NotebookClient(nb, timeout=timeout_s, resources={"metadata": {"path": str(folder)}},
                            skip_cells_with_tag="skip-execution", extra_arguments=["--log-level=ERROR"])
    try:
        if any(c.cell_type == "code" for c in nb.cells[1:]): client.execute(env=kernel_environment(root))
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        raise BuildError(failure(chapter, nb, e)) from None
    nb = nbformat.from_dict(json.loads(json.dumps(nb).replace(json.dumps(str(work/"tree"))[1:-1] + "/", "")))
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob(f"{chapter.page.replace('/', '.')}-*.ipynb"): old.unlink()
    part = kept.with_suffix(".part")
    nbformat.write(nb, part)
    part.rename(kept)
    return nb

def kernel_environment(root:Path)->dict:
    "Figures as data, this checkout's library, one thread a kernel because kernels run side by side."
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PLOTLY_RENDERER": "plotly_mimetype", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100",
            "POLARS_FMT_TABLE_HIDE_COLUMN_DATA_TYPES": "1", "POLARS_FMT_TABLE_HIDE_DATAFRAME_SHAPE_INFORMATION": "1"}

def failure(chapter:Chapter, nb, error)->str:
    "Notebook, cell number as JupyterLab counts them, the cell's first line and the error's last."
    cell, number = failed_cell(chapter, nb)
    reason = [l for l in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() if l.strip()][-1]
    line = next((l for l in cell.splitlines() if l.strip() and not l.startswith("#|")), "")
    return f"{chapter.rel}, cell {number} (`{line.strip()}`): {reason}"

def failed_cell(chapter:Chapter, nb)->tuple[str, int]:
    "The cell that stopped it: the one with an error, else the last that started; numbered in the notebook as written."
    bad = next((c for c in nb.cells if any(o.output_type == "error" for o in c.get("outputs", []))), None)
    if bad is None: bad = [c for c in nb.cells if c.cell_type == "code" and c.get("metadata", {}).get("execution")][-1]
    sources = [c.source for c in read_nb(chapter.source).cells]
    return bad.source, sources.index(bad.source) if bad.source in sources else -1


# ---- after execution: the reader's page ----

def page(chapter:Chapter, nb:nbformat.NotebookNode, links:"Links")->nbformat.NotebookNode:
    "The notebook that myst-nb renders: title block, prose with links, documentation, folded source, outputs."
    nb = NBProcessor(nb=read_nb_dict(nb), procs=[strip_ansi, hide_line, filter_stream_], rm_directives=True, process=True).nb
    cells, level, titled = [], 1, False
    for group in grouped(nb.cells):
        head = group[0]
        if head.cell_type == "markdown":
            text, titled = (title_block(head.source, chapter), True) if not titled and head.source.startswith("# ") else (head.source, titled)
            level = last_heading(text, level)
            cells.append(nbformat.v4.new_markdown_cell(links.rewrite(callouts(text), chapter)))
        else: cells += reader_cells(group, level, chapter, links)
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": nb.metadata.kernelspec, "mystnb": {"execution_mode": "off"}})

def read_nb_dict(nb): # nbformat's notebook as nbdev's
    from fastcore.nbio import dict2nb
    return dict2nb(json.loads(nbformat.writes(nb)))

def grouped(cells):
    "Lists of one cell, but an exported cell together with the documentation cells that follow it."
    groups = []
    for cell in cells:
        tags = cell.metadata.get("tags", []) if cell.cell_type == "code" else []
        if "unseen" in tags or not cell.source.strip(): continue
        if "doc" in tags and groups: groups[-1].append(cell)
        else: groups.append([cell])
    return groups

def reader_cells(group, level:int, chapter, links)->list:
    "An example cell as it is; an export as documentation followed by its folded source."
    cell, docs = group[0], group[1:]
    outputs = [reader_output(o) for o in cell.get("outputs", [])]
    tags = [t for t in cell.metadata.get("tags", []) if t not in ("exported", "skip-execution")]
    if "exported" not in cell.metadata.get("tags", []):
        if is_explore(chapter): return [shown(cell.source, outputs, [*tags, "hide-input"], "Code")]
        if all_imports(cell.source) and not outputs: return [shown(cell.source, [], [*tags, "hide-input"], "Imports")]
        return [shown(cell.source, outputs, tags)]
    if all_imports(cell.source): return []
    names = defined_names(cell.source) or assigned_names(cell.source)
    docs = sorted(docs, key=lambda c: cell.source.find(c.source[len("show_doc("):-1].split(".")[-1]))
    pages = [documentation(d, min(level + 1, 4), chapter, links) for d in docs]
    if not pages and worth_reading(cell.source, names): return [shown(cell.source, outputs, tags)]
    return pages + [shown(cell.source, outputs, [*tags, "hide-input"], f"Source of {', '.join(names) or 'this step'}")]

def is_explore(chapter)->bool: return chapter.page.startswith("explore/") # to be operated, so its code stays folded

def assigned_names(source:str)->list[str]:
    "Constants that a cell sets."
    targets = [t for n in ast.parse(source).body for t in (n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else [])]
    return [t.id for t in targets if isinstance(t, ast.Name)]

def worth_reading(source:str, names)->bool:
    "Public constants that fit a glance stay open; long tables and private names fold."
    return len(source.splitlines()) <= 12 and not all(n.startswith("_") for n in names)

def all_imports(source:str)->bool:
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body)

def shown(source, outputs, tags, summary=None):
    metadata = {"tags": tags}
    if summary: metadata["mystnb"] = {"code_prompt_show": summary, "code_prompt_hide": summary}
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata=metadata)

def documentation(cell, level:int, chapter, links):
    "`show_doc` output as prose: an anchor spelled like the name (MyST's own is in lower case and without dots), a heading, the signature."
    name = cell.source[len("show_doc("):-1]
    text = "".join(next(o["data"]["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})))
    body = re.split(r"^#{1,6} .*$", text, maxsplit=1, flags=re.M)[-1].strip()
    anchor = "" if re.fullmatch(r"[a-z][a-z0-9_]*", name) else f'<span class="anchor" id="{name}"></span>\n\n'
    head = f'{anchor}{"#" * level} `{name}`\n\n'
    return nbformat.v4.new_markdown_cell(head + links.rewrite(tidy_signature(body, name), chapter))

def tidy_signature(markdown:str, name:str)->str:
    "The docstring upright, `class` for what is called to make an object, no signature that says nothing, no addresses."
    fence = markdown.rfind("```")
    code, doc = (markdown[:fence + 3], markdown[fence + 3:].strip()) if fence >= 0 else ("", markdown)
    first, *rest = doc.split("\n", 1)
    if len(first) > 2 and first.startswith("*") and first.endswith("*") and not first.startswith("**"): first = first[1:-1]
    code = re.sub(r" at 0x[0-9a-f]+", "", code).replace("__main__.", "")
    code = "\n".join(map(short_annotations, code.split("\n")))
    if name[0].isupper() and "." not in name: code = re.sub(rf"^def {name}\(", f"class {name}(", code, flags=re.M)
    if re.search(r"\(\s*\*args, \*\*kw(d|arg)s\s*\)", code): code = ""
    return "\n\n".join(p for p in (code, "\n".join([first, *rest])) if p.strip())

LONGEST_DEFAULT = 60 # characters; a table of rules is read where it is defined

def short_annotations(line:str)->str:
    "A line of a signature without the modules of its types, and with long defaults by their class alone; its comment as it is."
    code, mark, comment = line.partition("#")
    code = re.sub(r"(?<=[:>\[|, ])(?:[a-z_]\w*\.)+(?=[A-Z])", "", code) # pathlib.Path and longer paths: the class says it
    code = re.sub(r":(NoneType|builtin_function_or_method|function)(?==|,|\))", "", code) # a type that fastcore took from the default
    return shorter_defaults(code) + mark + comment

def shorter_defaults(code:str)->str:
    "`=Rules(a=1, …)` as `=Rules(...)` where it is long."
    for m in reversed(list(re.finditer(r"(?<==)([A-Z]\w*|(?=[\[{(]))[(\[{]", code))):
        end = closing(code, m.end() - 1)
        if end - m.start() > LONGEST_DEFAULT: code = code[:m.end()] + "..." + code[end:]
    return code

def closing(code:str, at:int)->int: # where the bracket at `at` closes; the end where it does not
    "The place of the bracket that closes another."
    depth = 0
    for k in range(at, len(code)):
        depth += (code[k] in "([{") - (code[k] in ")]}")
        if depth == 0: return k
    return len(code)

def title_block(source:str, chapter:Chapter)->str:
    "H1, the subtitle as a lead paragraph, and where the chapter lives."
    head, *rest = source.split("\n")
    body = "\n".join(rest).lstrip("\n")
    if body.startswith(">"): body = body.split("\n", 1)[1] if "\n" in body else ""
    lead = f"\n\n{{.subtitle}}\n{chapter.subtitle}" if chapter.subtitle else ""
    where = f'<p class="chapter-where">Chapter <code>{chapter.rel}</code>' + (f', module <code>arxiv_study.{chapter.module}</code>' if chapter.module else "") + "</p>"
    return f"{head}{lead}\n\n{where if chapter.module else ''}\n\n{body}"

def last_heading(text:str, level:int)->int:
    "Level of the last heading outside code fences."
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    found = re.findall(r"^(#{1,6}) ", prose, flags=re.M)
    return len(found[-1]) if found else level

def callouts(text:str)->str:
    "Quarto's `::: {.callout-note}` in MyST's spelling."
    return re.sub(r"^:::\s*\{\.callout-(note|tip|warning|important|caution)[^}]*\}", r":::{\1}", text, flags=re.M)

NO_WIDGET = '<p class="no-widget">Here are controls, which need a kernel: open this notebook in JupyterLab, with <code>arxiv-study lab</code>.</p>'

def reader_output(output)->dict:
    "Plotly data become a figure that site.js draws; widgets need a kernel, so a sentence stands in their place."
    data = output.get("data")
    if not data: return nbformat.from_dict(output)
    if any("widget-view" in k for k in data): return nbformat.from_dict({**output, "data": {"text/html": NO_WIDGET}, "metadata": {}})
    if "application/vnd.plotly.v1+json" in data: data = {"text/html": figure(data["application/vnd.plotly.v1+json"])}
    data = {k: "".join(v) if isinstance(v, list) else v for k, v in data.items()}
    return nbformat.from_dict({**output, "data": data, "metadata": {}})

def figure(fig:dict)->str:
    "A figure with its alternative text, its data as JSON, and room for the table behind it."
    layout = dict(fig["layout"])
    colorway = ((layout.pop("template", None) or {}).get("layout") or {}).get("colorway")
    layout.setdefault("colorway", OKABE_ITO if not colorway or colorway[0] == "#636efa" else colorway)
    title = (layout.get("title") or {}).get("text", "") if isinstance(layout.get("title"), dict) else layout.get("title") or ""
    alt = (layout.get("meta") or {}).get("alt") or re.sub(r"<[^>]+>", " ", title) or "Figure"
    payload = json.dumps({"data": fig["data"], "layout": layout}, separators=(",", ":")).replace("</", "<\\/")
    height = int(layout.get("height") or 450)
    return (f'<figure class="plot" role="figure" aria-label="{html.escape(alt, quote=True)}">'
            f'<div class="plot-canvas" style="min-height:{height}px"><noscript>{html.escape(alt)}</noscript></div>'
            f'<script type="application/json" class="plot-json">{payload}</script>'
            f'<details class="plot-table"><summary>Table behind the figure</summary></details></figure>')


def is_plain_word(m)->bool: return m[1].isalpha() and m[1].islower() and not m[2] # `run` or `total`, which other rooms have too; `run()` is the function


class Links:
    "Turns `name` into a link to its documentation, and links between notebooks into links between pages."
    def __init__(self, chapters:list[Chapter], root:Path):
        self.root, self.pages = root, {c.rel.as_posix(): c for c in chapters}
        self.where = {}
        for c in chapters:
            for n in c.symbols: self.where.setdefault(n, []).append(c)

    def rewrite(self, text:str, chapter:Chapter)->str:
        "Outside code fences and headings only."
        parts = re.split(r"(^```.*?^```[^\n]*$|^#{1,6} [^\n]*$)", text, flags=re.M | re.S)
        return "".join(p if i % 2 else self.prose(p, chapter) for i, p in enumerate(parts))

    def prose(self, text, chapter):
        text = re.sub(r"(?<!\[)(?<!`)`([A-Za-z_][\w.]*)(\(\))?`(?![`\]])", lambda m: self.symbol(m, chapter), text)
        return re.sub(r"\[([^\]\n]*)\]\(([^)\s#:]+\.[a-z]+)(#[^)\s]*)?\)", lambda m: self.link(m, chapter), text)

    def symbol(self, m, chapter):
        found = self.where.get(m[1], [])
        found = [c for c in found if c is chapter] or found
        if len(found) != 1 or is_plain_word(m) and found[0].rel.parent != chapter.rel.parent: return m[0]
        page = "" if found[0] is chapter else relative(found[0].page, chapter.page) + ".html"
        return f'<a class="symbol" href="{page}#{m[1]}"><code>{m[1]}{m[2] or ""}</code></a>'

    def link(self, m, chapter):
        "To a page of the site; a file of the repository without a page keeps its text alone."
        label, target, anchor = m[1], m[2], m[3] or ""
        path = Path(os.path.normpath(chapter.rel.parent/target)).as_posix()
        if path in self.pages: return self.page_link(label, self.pages[path], anchor, chapter)
        if (self.root/path).exists(): return label
        raise BuildError(f"{chapter.rel} links to {target}, which does not exist.")

    def page_link(self, label, other, anchor, chapter):
        if anchor[1:] in other.symbols:
            return f'<a href="{relative(other.page, chapter.page)}.html{anchor}">{label.replace("`", "")}</a>'
        return f"[{label}]({relative(other.page, chapter.page)}.ipynb{anchor})"

def relative(page:str, from_page:str)->str: return os.path.relpath(page, os.path.dirname(from_page) or ".").replace(os.sep, "/")
