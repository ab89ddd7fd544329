"""What the chapters on LaTeX and normalisation can't show: any input, linear time, real sources, an independent parser."""
import gzip, io, json, re, tarfile, time
from pathlib import Path
import pytest
from hypothesis import example, HealthCheck, given, settings, strategies as st
from arxiv_study.corpus.duplicates import sketch
from arxiv_study.corpus.latex import LatexRules, Reader, extract
from arxiv_study.corpus.main_file import find_main
from arxiv_study.corpus.scan import n_bytes, split_formulas
from arxiv_study.corpus.ledger import Reason
from arxiv_study.corpus.normalize import NormalizeRules, normalize
from arxiv_study.corpus.quality import judge_text, language_of, prose_of

REAL = Path(__file__).parents[1].parent / "shared" / "arxiv"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="no ../shared/arxiv here: the test on real sources is left out")
RULES = [LatexRules(), LatexRules(macros="expand"), LatexRules(bibliography="keep", figures="keep", labels="keep"),
         LatexRules(citations="remove", references="remove", tables="remove", figures="remove"),
         LatexRules(preamble="keep", comments="keep", figures="keep", graphics="keep", tikz="keep", authors="keep", layout="keep"),
         LatexRules(tables="caption", acknowledgements="remove", appendix="remove"), LatexRules(recipe="concatenate"), LatexRules(recipe="released")]

PAPER = r"""\documentclass{article} % a class
\title{On {Rings}}\newcommand{\R}{\mathbb{R}}\def\n#1{\|#1\|}\DeclareMathOperator{\im}{im}\newif\ifdraft\drafttrue
\begin{document}\maketitle
100\% of $\R$ is \n{x}, see \url{http://a.b/c%20d} and \verb|%$| and \cite[p.~1]{k}.
\begin{verbatim}
% not a comment $
\end{verbatim}
\iffalse hidden \ifx a\b c\fi\else shown\fi \ifdraft a\else b\fi \InputIfFileExists{part}{yes}{no}
\input{part} \begin{figure}\includegraphics[w=1]{a}\caption{A {cap}.}\end{figure}
\[ a = b % c
\] $$x$$ \begin{align*} a &= \$ \\ b \end{align*} \label{l}
\begin{comment} no \end{comment}
\section*{Acknowledgements}\thanks{a \label{t}}\appendix\section{A}
\bibliography{b}
\end{document} after"""
TOKENS = [r"\begin{", r"\end{", "}", "{", "$", "$$", "\\", "\\\\", "%", "\n", "\n\n", r"\[", r"\]", r"\(", r"\iffalse", r"\fi", r"\else", r"\newif\ifa", r"\atrue", r"\ifa", r"\if0 ", r"\InputIfFileExists{part}", r"\appendix", r"\acks", r"\section*{Acknowledgements}", r"\input{part}", r"\input ", r"\def\a", "#1",
          r"\newcommand{\b}[2][x]", r"\a", r"\b", r"\verb|", "|", r"\url{", r"\caption{", r"\author{", "figure}", "document}", "verbatim}", "align}", r"\endinput", r"\bye", "é", "\x00", "\r", "ﬁ", " ", "\t", "x"]

def books(total, added, text, removed): return total + sum(added.values()) - len(text.encode()) - sum(removed.values())

def check(files):
    total = sum(len(t.encode()) for t in files.values())
    for rules in RULES:
        e = extract(files, rules)
        assert e.tex_bytes == total and books(total, e.added, e.text, e.removed) == 0
        assert all(n >= 0 for n in (*e.removed.values(), *e.added.values()))
        text, removed, added, _ = normalize(e.text)
        assert books(n_bytes(e.text), added, text, removed) == 0

@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.text(max_size=100))
def test_any_text_is_read_and_accounted_for(a, b): check({"main.tex": "\\documentclass{a}\\begin{document}" + a, "part.tex": b})

@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(TOKENS), max_size=60), st.lists(st.sampled_from(TOKENS), max_size=20), st.booleans())
def test_any_heap_of_latex_is_read_and_accounted_for(a, b, head):
    check({"main.tex": ("\\documentclass{a}\n\\begin{document}" if head else "") + "".join(a), "part.tex": "".join(b)})

@example([(321, 0, '\\input{part}')]) # an input within the second branch of \\iffalse
@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(PAPER)), st.integers(0, 12), st.sampled_from(TOKENS + [""])), max_size=8))
def test_mutated_paper(edits):
    text = PAPER
    for at, n, token in edits: text = text[:at] + token + text[at + n:]
    check({"main.tex": text, "part.tex": "A part.\\input{main}", "main.bbl": "\\begin{thebibliography}{1}\\end{thebibliography}"})

@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TOKENS + ["word ", "  ", "$a  b$", "$c\n  d$"]), max_size=60).map("".join))
def test_normalize_keeps_formulas(text):
    text = re.sub(r"[\x00\r]", "", text)
    once = normalize(text, NormalizeRules())[0]
    prose, held = split_formulas(text)
    assert "".join(p + h for p, h in zip(prose, held + [""])) == text
    pos = 0
    for h in held:
        pos = once.find(h, pos)
        assert pos >= 0
        pos += len(h)

WALLS = ["{", "}", "$", r"\begin{a}", "\\", "x", "$$", "$ ", r"\begin{figure}", r"\begin{figure}\caption{", r"\begin{equation}", r"\begin{verbatim}", r"\begin{comment}", r"\begin{abstract}", r"\\", "%", "%\n", " ", "\n",
         "\t ", " \n", r"\iffalse ", r"\iffalse\else ", r"\if0 ", r"\ifa ", r"\newif\ifa", r"\fi", r"\author{", r"\title{", r"\caption{", r"\label{", r"\url{", r"\input{", r"\input{a}", r"\input a ", r"\InputIfFileExists{a}{",
         r"\verb|", r"\lstinline[", r"\[", r"\(", r"\def\a{", r"\newcommand{\x}{", r"\x{", r"\x", r"\$", r"$\$", "[", r"\cite[", r"\includegraphics[", r"\end{document", r"\endinput ", r"\documentclass{", r"\appendix ",
         r"\section*{Acknowledgements}", "$a$$b$", "a % b\n"]
ENDS = ["", "\n\n" + r"\end{figure}\end{equation}\]\)$$\end{verbatim}\end{comment}\fi}]|"] # what was opened a million times is closed at last, after an empty line
ALL_RULES = LatexRules(acknowledgements="remove", appendix="remove", citations="remove", references="remove", tables="caption")

def through(wall, end, size, rules=ALL_RULES):
    "Seconds of the processor for a wall of one thing, through all that reads LaTeX"
    heap = wall * (size // len(wall))
    start = time.process_time()
    text, *_ = normalize(extract({"m.tex": "\\documentclass{a}\\newif\\ifa\\newcommand{\\x}[1]{#1}\n\\begin{document}\n" + heap + end, "part.tex": heap}, rules).text)
    judge_text(text)
    return time.process_time() - start

@pytest.mark.parametrize("end", ENDS, ids=["open", "closed"])
@pytest.mark.parametrize("wall", WALLS)
def test_time_is_linear_in_a_wall(wall, end):
    "Sixteen times as much takes sixteen times as long; quadratic time would be 256 times. Half a second is let pass: neighbours make noise"
    short, long = through(wall, end, 8_000), min(through(wall, end, 128_000) for _ in range(2))
    assert long < 0.5 or long < 48 * short, (short, long)

@pytest.mark.slow
@pytest.mark.parametrize("wall", ["{", "$", r"\begin{a}", "\\", "x", "word ", "%", r"\input{", r"\caption{", r"\iffalse ", r"\verb|", "[", r"\\"])
def test_ten_megabytes_of_one_thing(wall):
    assert through(wall, ENDS[1], 10_000_000, LatexRules()) < 60

def test_quality_and_sketch_take_any_wall():
    for wall in ("{", "$", r"\begin{a}", "\\", "x", "x ", "\n"):
        text = wall * (500_000 // len(wall))
        judge_text(text); sketch(text)

# ---- what TeX reads ----

BODY = "\\documentclass{article}\n\\begin{document}\n%s\n\\end{document}\n"

def text_of(body, rules=LatexRules(), head="", **files):
    main = (BODY % body).replace("\n\\begin{document}", head + "\n\\begin{document}")
    return extract({"main.tex": main} | {f"{k}.tex": v for k, v in files.items()}, rules).text.strip()

@pytest.mark.parametrize("body, text, files", [
    (r"a\input b c", "aBc", {"b": "B"}), (r"a\input{b}c", "aBc", {"b": "B"}), (r'\input "b"', "B", {"b": "B"}), (r"\include{b}", "B", {"b": "B"}),
    (r"\import{./}{b}\subimport{./}{b}", "BB", {"b": "B"}), (r"\subfile{b}", "B", {"b": BODY % "B"}), (r"\InputIfFileExists{b}{in}{out}", "inB", {"b": "B"}),
    (r"\InputIfFileExists{b}{in}{o{u}t}.", "o{u}t.", {}), (r"\IfFileExists{b}{in}{out}", "in", {"b": "B"}), (r"\IfFileExists{b.sty}{in}{out}", r"\IfFileExists{b.sty}{in}{out}", {}),
    (r"a % \input{b}", "a", {"b": "B"}), (r"\\input{b}", r"\\input{b}", {"b": "B"}), (r"\verb|\input{b}|", r"\verb|\input{b}|", {"b": "B"}), (r"\input{b}", "B", {"b": "B\n\\endinput\nC"}),
    (r"\input{b}", "bb", {"b": r"b\input{c}", "c": r"b\input{b}"}), # a cycle is cut
    (r"a\% b", r"a\% b", {}), (r"a\\% b", r"a\\", {}), (r"\url{a%20b}", r"\url{a%20b}", {}), (r"\verb+%+", r"\verb+%+", {}), (r"\lstinline|%|", r"\lstinline|%|", {}), (r"\mintinline{c}{a%b}", r"\mintinline{c}{a%b}", {}),
    ("\\iffalse a \\ifx\\b\\c d\\else e\\fi f\\fi g", "g", {}), ("\\iffalse a\\else b\\fi", "b", {}), ("\\iftrue a\\else b\\fi", "a", {}), ("\\if0 a\\fi b", "b", {}), ("$x \\iff y$ \\iffalse a\\fi", "$x \\iff y$", {}),
    ("\\begin{comment} % \n a\n\\end{comment}b", "b", {}), ("a\\end{document}b", "a", {})])
def test_what_tex_reads_stays(body, text, files): assert text_of(body, **files) == text

@pytest.mark.parametrize("head, text", [
    (r"\newif\ifdraft", "B"), (r"\newif\ifdraft\drafttrue", "A"), (r"\newif\ifdraft\drafttrue\draftfalse", "B"), (r"\newif\ifdraft % \drafttrue", "B"), (r"\let\ifdraft\iftrue", "A"),
    (r"\newif\ifdraft\newcommand{\d}{\drafttrue}", None), (r"\newif\ifdraft\ifx\a\b\drafttrue\fi", None), (r"\input{set}", "A"), (r"", None)])
def test_the_branch_that_an_author_chose(head, text):
    body = r"\ifdraft A\else B\fi"
    assert text_of(body, head=head, set=r"\newif\ifdraft\drafttrue") == (text or body)

@pytest.mark.parametrize("head", [r"\excludecomment{x}", r"\newenvironment{x}{\comment}{\endcomment}", r"\newenvironment{x}{\begin{comment}}{\end{comment}}", r"\NewEnviron{x}{}", r"\excludeversion{x}"])
def test_environments_that_a_paper_hides(head): assert text_of(r"a\begin{x} % \end{x}b", head=head) == "ab"

@pytest.mark.parametrize("rule, what, body", [
    ("preamble", "keep", None), ("comments", "keep", "a % b"), ("figures", "remove", r"\begin{figure}\includegraphics{a}\caption{A}\end{figure}"), ("figures", "keep", r"\begin{figure}\tikz a\caption{A}\end{figure}"),
    ("graphics", "keep", r"\includegraphics[width=1cm]{a}"), ("tikz", "keep", r"\begin{tikzpicture}a\end{tikzpicture}"), ("tables", "remove", r"\begin{table}a\end{table}"), ("bibliography", "keep", r"\begin{thebibliography}{1}a\end{thebibliography}"),
    ("labels", "keep", r"\label{a}"), ("citations", "remove", r"\citep[see][p.~1]{a}"), ("references", "remove", r"\eqref{a}"), ("acknowledgements", "remove", r"\section*{Acknowledgments}We thank"),
    ("acknowledgements", "remove", r"\begin{acknowledgements}We thank\end{acknowledgements}"), ("acknowledgements", "remove", r"\acknowledgments We thank"), ("appendix", "remove", r"\appendix\section{A}"),
    ("authors", "keep", r"\author{\IEEEauthorblockN{A {B}}\thanks{C}}"), ("layout", "keep", r"\newpage\vspace{1cm}")])
def test_each_policy_keeps_or_removes_to_the_byte(rule, what, body):
    files = {"main.tex": BODY % ("Before.\n" + (body or "") + "\n\\bibliography{b}")}
    default, other = extract(files, LatexRules()), extract(files, LatexRules(**{rule: what}))
    keeps, cuts = (other, default) if what == "keep" else (default, other)
    has_caption = "caption" in str(body) # which stays by default
    if not has_caption: assert cuts.removed[rule] - keeps.removed.get(rule, 0) >= (len("% b") if rule == "comments" else len(body or "\\begin{document}"))
    assert len(keeps.text) - len(cuts.text) == cuts.removed[rule] - keeps.removed.get(rule, 0)
    assert body is None or (body in keeps.text or has_caption) and body not in cuts.text

def test_a_document_that_never_ends_is_not_known_to_be_empty():
    head = "\\documentclass{a}\n\\begin{document}\n"
    assert extract({"a.tex": head}).reason is None and extract({"a.tex": head}).repairs["document_open"] == 1
    assert extract({"a.tex": head + "\\end{document}"}).reason == Reason.no_document_text

@pytest.mark.parametrize("files, main", [
    ({"00README.XXX": "b.tex toplevelfile", "a.tex": BODY % "A" * 9, "b.tex": BODY % "B"}, "b.tex"),
    ({"00README.json": '{"sources": [{"usage": "toplevel", "filename": "b.tex"}]}', "a.tex": BODY % "A" * 9, "b.tex": BODY % "B"}, "b.tex"),
    ({"00README.yaml": "sources:\n  - filename: a.tex\n    usage: include\n  - filename: b.tex\n    usage: toplevel\n", "a.tex": BODY % "A" * 9, "b.tex": BODY % "B"}, "b.tex"),
    ({"a.tex": "\\input amstex\nText.\n\\bye", "b.tex": "no mark"}, "a.tex"), ({"paper.txt": BODY % "A", "b.tex": "no mark"}, "paper.txt"), ({"paper": BODY % "A"}, "paper"), ({"p.latex": BODY % "A"}, "p.latex"),
    ({"top.tex": "\\input{head}\n\\begin{document}\\input{b}\\end{document}", "head.tex": "\\documentclass{article}", "b.tex": "B"}, "top.tex"),
    ({"paper.tex": BODY % ("word " * 99), "old/paper.tex": BODY % "word"}, "paper.tex"), ({"cover.tex": BODY % "Dear editor", "paper.tex": BODY % "\\input{b}", "b.tex": "word " * 99}, "paper.tex"),
    ({"a.tex": BODY.replace("class", "style") % "A"}, "a.tex"), ({"fig.tex": "\\documentclass{standalone}\\begin{document}\\end{document}" + "x" * 999, "a.tex": BODY % "A"}, "a.tex")])
def test_the_main_file_by_arxivs_rules(files, main): assert find_main(files)[0] == main

# ---- real sources ----

def papers():
    "(truth, files) of every source that the earlier stages keep, read by the standard library alone"
    truth = {r["id"]: r for r in map(json.loads, (REAL / "truth.jsonl").open())}
    for tar in sorted((REAL / "src").glob("*.tar")):
        with tarfile.open(tar) as bulk:
            for member in bulk:
                row = truth.get(Path(member.name).name.rsplit(".", 1)[0])
                if not member.isfile() or not row or row["fate"] != "source": continue
                data = gzip.decompress(bulk.extractfile(member).read())
                if row["container"] != "tar-gz": yield row, {"source.tex": decode(data)}; continue
                with tarfile.open(fileobj=io.BytesIO(data)) as inner:
                    yield row, {m.name: decode(inner.extractfile(m).read()) for m in inner if m.isfile() and ".." not in m.name}

def decode(data):
    try: return data.decode("utf-8")
    except UnicodeDecodeError: return data.decode("latin-1")

@pytest.fixture(scope="module")
def real(): return list(papers())

@needs_real
def test_main_file_is_the_true_one(real):
    stated = {"appledouble twins": "main.tex", "two documentclass files": "paper.tex", "circular input": "a.tex"}
    wrong = []
    for row, files in real:
        want = row.get("main") or stated.get(row.get("shape"))
        got, _ = find_main(files)
        if got is None or len(files) > 1 and want and got != want: wrong.append((row["id"], got, want))
    assert len(real) > 300 and not wrong

@pytest.fixture(scope="module")
def read(real): return {row["id"]: (e := extract(files), normalize(e.text)) for row, files in real}

@needs_real
def test_books_balance_on_real_sources(read):
    for i, (e, (text, removed, added, _)) in read.items():
        assert books(e.tex_bytes, e.added, e.text, e.removed) == 0, i
        assert books(n_bytes(e.text), added, text, removed) == 0, i

@needs_real
@pytest.mark.parametrize("rules", RULES[1:], ids=lambda r: f"{r.recipe}-{r.macros}-{r.bibliography}-{r.citations}")
def test_books_balance_by_other_rules(real, rules):
    for row, files in real[::5]:
        e = extract(files, rules)
        assert books(e.tex_bytes, e.added, e.text, e.removed) == 0, row["id"]

@needs_real
def test_formulas_of_real_sources_keep_every_byte(read):
    for i, (e, (text, *_)) in list(read.items())[::3]: assert split_formulas(text)[1] == split_formulas(e.text)[1], i

@needs_real
def test_at_most_one_english_paper_in_two_hundred_is_lost_to_language(read):
    other = {"9903.00036", "9903.00037", "9903.00038", "9903.00039", "9903.00040", "9903.00045", "9903.00046", "9903.00047", # German
             "9903.00008", "9903.00010", "9903.00011", "9903.00042"} # Italian; Latin filler text. 9906.00010, English and Latin filler, counts as lost
    said = {i: language_of(prose_of(text)) for i, (_, (text, *_)) in read.items()}
    lost = [i for i, language in said.items() if language not in ("en", "und") and i not in other]
    assert len(lost) <= 0.005 * (len(said) - len(other)), lost
    assert sorted(i for i in other if said[i] in ("en", "und")) == []

# ---- an independent parser ----

def by_pylatexenc(text):
    "(comments, verbatim passages) as pylatexenc's parser sees them"
    walker = pytest.importorskip("pylatexenc.latexwalker")
    comments, verbatim = [], []
    def visit(nodes):
        for n in nodes or ():
            if n is None: continue
            if n.isNodeType(walker.LatexCommentNode): comments.append(n.comment)
            elif n.isNodeType(walker.LatexEnvironmentNode) and n.environmentname == "verbatim": verbatim.append(n.latex_verbatim())
            elif n.isNodeType(walker.LatexMacroNode) and n.macroname == "verb": verbatim.append(n.latex_verbatim())
            else:
                visit(getattr(n, "nodelist", None))
                if getattr(n, "nodeargd", None): visit(n.nodeargd.argnlist)
    visit(walker.LatexWalker(text).get_latex_nodes()[0])
    return comments, verbatim

WELL_FORMED = st.lists(st.sampled_from(["some words ", r"100\% ", r"a\\", "% note\n", "text % tail\n", "\\begin{verbatim}\n% code $\n\\end{verbatim}\n", r"\verb|a%b| ", r"\verb!%! ", r"\textbf{bold} ",
                                        "$a_1$ ", "\\[ x \\]\n", r"\{ \} ", "\n\n", "  "]), max_size=25).map("".join)

@settings(max_examples=150, deadline=None)
@given(WELL_FORMED)
def test_comments_and_verbatim_agree_with_pylatexenc(text):
    comments, verbatim = by_pylatexenc(text)
    reader = Reader({"m.tex": text}, "m.tex")
    reader.read("m.tex")
    left = "".join(reader.pieces)
    assert by_pylatexenc(left) == ([], verbatim)
    assert bool(comments) == bool(reader.removed["comments"])
    assert reader.removed["comments"] >= sum(1 + len(c.encode()) for c in comments)

def formulas_of(text):
    "Formulas, as pylatexenc's parser sees them"
    walker = pytest.importorskip("pylatexenc.latexwalker")
    found = []
    def visit(nodes):
        for n in nodes or ():
            if n is None: continue
            if n.isNodeType(walker.LatexMathNode): found.append(n.latex_verbatim())
            elif n.isNodeType(walker.LatexEnvironmentNode) and n.environmentname != "verbatim": found.append(n.latex_verbatim())
            else: visit(getattr(n, "nodelist", None))
    visit(walker.LatexWalker(text).get_latex_nodes()[0])
    return found

@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["some words ", r"costs \$5 ", r"a\\ ", "$a_1$", "$b \\$ c$ ", "$x$$y$", "$$ c \n d $$", "\\[ x \\] ", "\\( y \\)", r"\verb|$| ", "\\begin{align}a &= \\$\\end{align}\n", r"\textbf{bold} ",
                                 "\\begin{verbatim}\n$ \\[\n\\end{verbatim}\n", "\n\n"]), max_size=25).map("".join))
def test_formulas_agree_with_pylatexenc(text):
    assert [h for h in split_formulas(text)[1] if not h.startswith(("\\verb", "\\begin{verbatim}"))] == formulas_of(text)

def test_reasons():
    assert extract({"a.tex": "no class"}).reason == Reason.no_main_file
    assert extract({}).reason == Reason.no_main_file
    assert extract({"a.tex": "\\documentclass{a}\\begin{document}\\maketitle\\end{document}"}).reason == Reason.no_document_text
