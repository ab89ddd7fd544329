"""What the chapter on macros can't show: LaTeX itself as the judge, random sources, hostile sources, a real sample, a peer."""
import itertools, os, random, re, shutil, string, subprocess, time
from collections import Counter
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from arxiv_study.corpus.latex import LatexRules, extract
from arxiv_study.corpus.macros import expand_macros
from arxiv_study.corpus.scan import n_bytes
from test_latex import needs_real, real

def expand(text, start=0):
    "(the text with its macros expanded, repairs), with the books checked"
    repairs, removed, added = Counter(), Counter(), Counter()
    new = expand_macros(text, start, [], repairs, removed, added)
    assert n_bytes(text) + added.total() == n_bytes(new) + removed.total()
    return new, repairs

def body_of(definitions, body): return expand(definitions + body, len(definitions))[0][len(definitions):]

# ---- worked by hand, after the TeXbook (chapter 20), usrguide and xspace's manual ----

WORKED = [
    (r"\def\cs AB#1#2C$#3\$ {#3{ab#1}#1 c}", r"\cs AB {\Look}C${And\$ }{look}\$ 5.", r"{And\$ }{look}{ab\Look}\Look c5."), # page 203, its ## left out; a space after \Look vanishes as there
    (r"\def\pair(#1,#2){\langle#1|#2\rangle}", r"\pair(\pair(a,b),c)", r"\langle\langle a|b\rangle|c\rangle"), # the first comma ends the first argument, and what is left is read again: right by luck, in TeX too
    (r"\def\pair(#1,#2){\langle#1|#2\rangle}", r"\pair({f(a,b)},c)", r"\langle f(a,b)|c\rangle"),
    (r"\def\R{\mathbb{R}}", r"$x^\R_\R\frac\R\R\sqrt\R 2^{\R}$", r"$x^{\mathbb{R}}_{\mathbb{R}}\frac{\mathbb{R}}{\mathbb{R}}\sqrt{\mathbb{R}}2^{\mathbb{R}}$"),
    (r"\def\x{b}\def\a{\alpha}", r"\alpha\x\a\x\a c\a\\\x", r"\alpha b\alpha b\alpha c\alpha\\b"),
    (r"\newcommand{\f}[2][{]}]{(#1;#2)}", r"\f{x}\f[a{]}b]{y} \f [c] z", r"(];x)(a{]}b;y) (c;z)"),
    (r"\NewDocumentCommand\f{s o O{d} m}{\IfBooleanTF{#1}{S}{N}\IfNoValueTF{#2}{-}{#2}#3#4}", r"\f{x} \f*[a[b]]{x} \f [a] [c] x", r"N-dx Sa[b]dx Nacx"),
    (r"\newcommand{\mk}[2]{\newcommand{#1}[1]{#2_{##1}}}\newcommand{\q}[1]{wrong}", r"{\mk{\q}{X}\q{i}} \q{i}", r"{\newcommand{\q}[1]{X_{#1}}X_{i}} wrong"),
    (r"\def\a{1}", r"{\def\a{2}\a{\a}}\a\begingroup\def\a{3}\a\endgroup\a\begin{x}\gdef\a{4}\a\end{x}\a", r"{\def\a{2}2{2}}1\begingroup\def\a{3}3\endgroup1\begin{x}\gdef\a{4}4\end{x}4"),
    (r"\def\a{1}\let\b\a\def\a{2}\let\c=\gamma", r"\a\b\c", r"21\gamma"),
    (r"\let\old\phi\renewcommand{\phi}{\varphi}", r"\old\phi", r"\old\varphi"), # the old \phi has no other name
    (r"\newcommand{\ie}{i.e.\xspace}", r"\ie the \ie, {\ie} \ie\ \ie{} \ie~a", r"i.e. the i.e., {i.e.} i.e.\ i.e.{} i.e.~a"),
    (r"\newcommand{\R}{\ensuremath{\mathbb{R}}}", r"On \R, $x\in\R$, \[\R\text{ or \R}\]", r"On \ensuremath{\mathbb{R}}, $x\in\mathbb{R}$, \[\mathbb{R}\text{ or \ensuremath{\mathbb{R}}}\]"),
    (r"\DeclareMathOperator{\im}{im}\DeclarePairedDelimiter\abs{\lvert}{\rvert}", r"\im f\abs{x}\abs*{y}\abs[\big]z", r"\operatorname{im}f\lvert x\rvert\left\lvert y\right\rvert\big\lvert z\big\rvert"),
    (r"\newcommand{\x}{X}\newenvironment{e}[1]{\renewcommand{\x}{#1}}{}", r"\begin{e}{Y}\x\end{e}", r"\begin{e}{Y}X\end{e}"), # environments are left
    (r"\renewcommand{\section}[1]{\textbf{#1}}\def\p{\ifmmode a\else b\fi}\def\x{X}", r"\section{\x}\p\x", r"\section{X}\p X"),
    (r"\def\x{X}", r"\\x \verb|\x|\begin{verbatim}\x\end{verbatim}\x\xx", r"\\x \verb|\x|\begin{verbatim}\x\end{verbatim}X\xx"),
]

@pytest.mark.parametrize("definitions, body, expected", WORKED, ids=[d[:30] for d, *_ in WORKED])
def test_worked_by_hand(definitions, body, expected): assert body_of(definitions, body) == expected

def test_reasons_are_counted():
    got = expand(r"\def\p{\ifx a}\def\m#1{#1}\def\l{\l x}\def\e{E}\p\l\e\e\m", 47)[1]
    assert got == Counter(macros_expanded=2, macros_left=3, macros_left_program=1, macros_left_arguments=1, macros_left_bound=1)

# ---- LaTeX itself ----

NAMES = [c * 2 for c in "abcdefgh"]
FILLERS = ["x", "y", "q.", ";", ",", r"\alpha ", r"\beta ", r"\, ", r"\!", " ", "{z}", "{x y}", "1", "(", ")", "-", "*", "[u]"]

class Document:
    "Random definitions, groups and uses: as we read them, and as LaTeX is asked to print what the uses expand to"
    def __init__(self, seed):
        self.rng, self.known, self.ours, self.tex, self.everywhere = random.Random(seed), {}, [], [], set()
        closers = []
        for _ in range(14):
            if self.rng.random() < .5: self.define()
            elif self.rng.random() < .3: self.open(closers)
            elif closers and self.rng.random() < .4: self.close(closers)
            if self.known: self.probe()
            self.both("\n")
        while closers: self.close(closers)

    def both(self, text): self.ours.append(text); self.tex.append(text)

    def open(self, closers):
        opener, closer = self.rng.choice([("{", "}"), (r"\begingroup ", r"\endgroup "), (r"\begin{center}", r"\end{center}"), (r"\bgroup ", r"\egroup ")])
        self.ours.append(opener); self.tex.append(r"\begingroup ")
        closers.append((closer, dict(self.known)))

    def close(self, closers):
        closer, known = closers.pop()
        self.ours.append(closer); self.tex.append(r"\endgroup ")
        self.known = known | {n: self.known[n] for n in self.everywhere}

    def probe(self):
        text = self.text(list(self.known))
        self.ours.append(f"<|{text}|>"); self.tex.append("\\probe{%s}" % text)

    def text(self, names, depth=0, params=0):
        "Fillers, uses of some macros, parameters"
        out = ""
        for _ in range(self.rng.randint(0, 4)):
            kind = self.rng.random()
            piece = self.use(self.rng.choice(names), names, depth + 1) if kind < .35 and names and depth < 3 else f"#{self.rng.randint(1, params)}" if kind < .6 and params else self.rng.choice(FILLERS)
            out += (" " if re.search(r"\\[a-z]+$", out) and piece[0].isalpha() else "") + piece
        return out + (" " if re.search(r"\\[a-z]+$", out) else "")

    def use(self, name, names, depth):
        "A use with its arguments"
        choose, out = self.rng.choice, "\\" + name
        for kind in self.known[name]:
            if kind == "token":
                arg = self.text(names, depth).strip() if self.rng.random() < .4 else choose(["x", "yy", r"\alpha", "{a}b", ""])
                out += "{%s}" % arg if self.rng.random() < .8 else " x"
            elif kind == "star": out += choose(["*", ""])
            elif kind == "optional": out += choose(["[r]", "[{r]s}]", "[]", "[t u]", ""])
            else:
                before, delimiter = kind
                out += ("" if before else choose([" x", " yz", "{x.;}", "{,)}", r"\alpha", " {a}b", "{:}"])) + (" " if re.search(r"\\[a-z]+$", out) and before else "") + delimiter
        return out + (choose(["{}", " ", ".", "-"]) if out[-1].isalpha() else "")

    def define(self):
        i = self.rng.randrange(len(NAMES))
        later = [n for n in NAMES[i + 1:] if n in self.known] # bodies use later names only: nothing recurs
        choose, kind = self.rng.choice, self.rng.random()
        if kind < .15 and later: self.let(NAMES[i], choose(later))
        elif kind < .6: self.define_tex(NAMES[i], later)
        else: self.define_latex(NAMES[i], later)

    def let(self, name, other):
        self.both(rf"\let\{name}{self.rng.choice(['', '=', ' = '])}\{other} ")
        self.known[name] = self.known[other]

    def define_tex(self, name, later):
        choose = self.rng.choice
        kinds = ([(True, choose("(-"))] if self.rng.random() < .3 else []) + [choose(["token", "token", (False, choose([".", ";", ")", ",", ":x", r"\!"]))]) for _ in range(self.rng.randint(0, 3))]
        before, params = "".join(k[1] for k in kinds if k[0] is True), [k for k in kinds if k[0] is not True]
        text = before + "".join(f"#{n}" + ("" if k == "token" else k[1]) for n, k in enumerate(params, 1))
        body = self.text(later, params=len(params)) + (f"\\{choose(later)} " if later and self.rng.random() < .2 else "") # takes its arguments from what follows
        command = choose(["def", "def", "gdef", r"global\def", r"long\def", "def" if kinds else "edef"])
        self.both(rf"\{command}\{name}{text}{{{body}}}")
        self.known[name] = kinds
        if command[0] == "g": self.everywhere.add(name)

    def define_latex(self, name, later):
        r"`\newcommand` and document commands; LaTeX gets all as document commands, which expand where \edef asks"
        choose, latex = self.rng.choice, self.rng.random() < .5
        n, default = self.rng.randint(0, 3), choose(["d", "", r"\alpha "])
        spec = ["O"] * (n > 1 and choose([True, False])) if latex else [choose("mmOos") for _ in range(n)]
        spec += ["m"] * (n - len(spec)) if latex else ["m"] * bool(spec) # an expandable one must end with m
        body = self.text(later)
        for k, s in enumerate(spec, 1):
            body += choose({"s": [r"\IfBooleanTF{#%d}{Y}{N}", r"\IfBooleanF #%d{n}"], "o": [r"\IfNoValueTF{#%d}{none}{<1>}", r"\IfNoValueT{#%d}{v}"]}.get(s, ["#%d", "(#%d)", r"\alpha#%d", "#%dx"])) % k
        written = "".join("O{%s}" % default if s == "O" else s for s in spec)
        self.tex.append(rf"\DeclareExpandableDocumentCommand\{name}{{{written}}}{{{body}}}")
        if latex: self.ours.append(choose([r"\newcommand{\%s}", r"\renewcommand*\%s", r"\DeclareRobustCommand{\%s}"]) % name + (f"[{n}]" if n else "") + (f"[{default}]" if "O" in spec else "") + "{%s}" % body)
        else: self.ours.append(rf"\{choose(['New', 'Renew', 'Declare'])}DocumentCommand{{\{name}}}{{{written}}}{{{body}}}")
        self.known[name] = [{"m": "token", "s": "star"}.get(s, "optional") for s in spec]

PRELUDE = r"\makeatletter\let\alpha=\relax\let\beta=\relax\let\,=\relax\let\!=\relax\def\probe#1{\edef\r{#1}\immediate\write16{<|\meaning\r|>}}" "\n"

def judged(documents, folder):
    "What LaTeX makes of each probe of each document, None where it finds an error; a document LaTeX loses its way in is missing"
    texts = ("\\begingroup\\immediate\\write16{DOC%d}\n%s\n\\immediate\\write16{DONE}\\endgroup\n" % (i, "".join(d.tex)) for i, d in enumerate(documents))
    (folder / "t.tex").write_text(PRELUDE + "".join(texts) + "\\@@end\n")
    env = os.environ | dict(TEXINPUTS=".:", max_print_line="1000000") # lines of the log are not broken
    log = subprocess.run(["latex", "-interaction=nonstopmode", "t.tex"], cwd=folder, env=env, capture_output=True, text=True, timeout=120).stdout
    parts = re.split(r"DOC(\d+)\n", log)
    for i, part in zip(map(int, parts[1::2]), parts[2::2]):
        pieces = re.split(r"<\|(.*?)\|>", part, flags=re.S)
        if "DONE" in part: yield documents[i], [None if "\n!" in before else re.sub(r"\A(?:\\\w+ ?)?macro:->", "", found) for before, found in zip(pieces[::2], pieces[1::2])]

def tokens(text): return [t if re.match(r"\\\W", t) else t.strip() or " " for t in re.findall(r"\\[a-zA-Z]+\s*|\\\W|\s+|.", text.strip().replace("##", "#"), re.S)]

@pytest.mark.peer
@pytest.mark.skipif(not shutil.which("latex"), reason="no latex on the path: the comparison with TeX itself is left out")
def test_expands_as_latex_does(tmp_path):
    compared, wrong = 0, []
    for seed in range(5):
        for d, wanted in judged([Document(f"{seed}-{i}") for i in range(100)], tmp_path):
            got = re.findall(r"<\|(.*?)\|>", expand("".join(d.ours))[0], re.S)
            if len(got) != len(wanted): continue # an error swallowed a probe
            pairs = [(w, g) for w, g in zip(wanted, got) if w is not None]
            compared += len(pairs)
            wrong += ["".join(d.ours) + f"\nLaTeX: {w!r}\nours:  {g!r}" for w, g in pairs if tokens(w) != tokens(g)]
    print(compared, len(wrong))
    assert compared > 3000 and len(wrong) <= compared / 500, "\n\n".join(wrong[:5])

# ---- any source ----

HEAP = [r"\def\a", r"\def\b#1.#2", r"\gdef\a", r"\edef\b", r"\let\a\b", r"\let\b=", r"\newcommand{\a}", r"\renewcommand\b[2][x]", r"\providecommand{\c}[1]", r"\NewDocumentCommand\c{som}", r"\DeclareMathOperator*\c",
        r"\global", "{", "}", "{", "}", "[", "]", "#1", "##1", "#2", r"\a", r"\b", r"\c", r"\a{x}", r"\b[y]{z}", ".", "*", " ", "\n", "\n\n", "x", "é", "^", r"\frac", "$", "\\\\", r"\xspace", r"\ensuremath{x}",
        r"\begingroup", r"\endgroup", r"\begin{verbatim}", r"\end{verbatim}", r"\verb|", "|", r"\IfBooleanTF{#1}{x}{y}", r"\newenvironment{e}", r"\alpha", r"\if", "@", r"\0", r"\def\0"]
heaps = st.lists(st.sampled_from(HEAP), max_size=50).map("".join)

@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(heaps, heaps)
def test_any_heap_keeps_its_books(head, body):
    e = extract({"m.tex": "\\documentclass{a}" + head + "\\begin{document}" + body}, LatexRules(macros="expand"))
    assert e.tex_bytes + sum(e.added.values()) == n_bytes(e.text) + sum(e.removed.values())
    expand(head + body, len(head))

@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(heaps, heaps)
def test_what_is_expanded_stays(head, body):
    text = r"\def\a{A}\newcommand\b[2][d]{(#1|#2)}\newcommand{\c}[1]{<#1\a>}" + head
    once, repairs = expand(text + body, len(text))
    if repairs["macros_left"] or re.search(r"def|let|ommand|perator", body): return
    assert expand(once, len(text))[0] == once

TOWER = "".join(r"\def\%s{\%s\%s}" % (a, b, b) for a, b in itertools.pairwise(string.ascii_lowercase))
MANY = "".join(r"\newcommand{\%s}[1]{<#1>}" % "".join(p) for p in itertools.islice(itertools.product(string.ascii_lowercase, repeat=3), 5000))
HOSTILE = [("", r"\a"), (r"\def\a{\a x}", r"\a "), (r"\def\a{\b}\def\b{\a}", r"\a\b"), (r"\def\a#1{#1}", "{"), ("", r"\def\a{"), (r"\def\a#1{#1}", "#"), (r"\def\a#1{#1}", r"\a{"), (TOWER, r"\a "), (TOWER, r"\m "),
           (MANY, r"\aaa{x}\abc{\aaf{y}}"), ("", r"\def\a{x}\a"), ("", r"{\def\a{x}\a}"), ("", r"{\def\a{x}\a"), (r"\def\a#1.{#1}", r"\a{}x"), (r"\newcommand\a[2][d]{#1#2}", r"\a[x"), (r"\def\a#1{#1#1}", r"\a\a "),
           ("", r"\let\a\b\let\b\a\a"), (r"\def\a{x}", r"\begin{a}"), ("", r"\begingroup\def\a{x}\a"), (r"\def\a#1#2{#1#2}", r"\a{\a{x}{y}}{\a xy}"), (r"\def\a{x}", "\\"), ("", r"\newenvironment{a}{"),
           (r"\def\a#1{#1#1}", r"\a{\a{\a{\a{\a{\a{x}}}}}}"), (TOWER, r"\edef\q{\a}"), (r"\newcommand\a{\ensuremath{x}\xspace}", r"\a ")]

def seconds(definitions, unit, n):
    start = time.process_time()
    text = definitions + unit * (n // len(unit))
    new, _ = expand(text, len(definitions))
    assert len(new) < 6 * len(text) + 200_000
    return time.process_time() - start

@pytest.mark.parametrize("definitions, unit", HOSTILE, ids=[f"{d[:20]} {u}" for d, u in HOSTILE])
def test_time_is_linear(definitions, unit):
    short, long = (min(seconds(definitions, unit, n) for _ in range(2)) for n in (20_000, 80_000))
    assert long < 10 * max(short, .01) # linear: 4, quadratic: 16

@pytest.mark.slow
@pytest.mark.parametrize("definitions, unit", [h for h in HOSTILE if h[1] in ("{", "#", r"\a", r"\def\a{", r"\a ")], ids=lambda x: x[:20])
def test_ten_megabytes(definitions, unit): assert seconds(definitions, unit, 10_000_000) < 120

# ---- the sample, and a peer ----

@needs_real
def test_real_sources(real):
    total = Counter()
    for row, files in real:
        e = extract(files, LatexRules(macros="expand"))
        assert e.tex_bytes + sum(e.added.values()) == n_bytes(e.text) + sum(e.removed.values()), row["id"]
        total.update(e.repairs)
    print({k: n for k, n in total.items() if k.startswith("macros")})
    assert total["macros_expanded"] > 20 * total["macros_left"] > 0
    assert total["macros_left"] == sum(total["macros_left_" + why] for why in ("program", "arguments", "bound"))

@pytest.mark.peer
def test_agrees_with_a_peer_where_it_agrees_with_tex():
    peer = pytest.importorskip("arxiv_to_prompt", reason="arxiv-to-prompt is not installed (extra bench)").expand_macros
    definitions = r"\newcommand{\R}{\mathbb{R}}\newcommand{\nm}[2][2]{\left\|#2\right\|_{#1}}\providecommand{\pr}[2]{(#1,#2)}\DeclareMathOperator{\im}{im}\def\eps{\varepsilon}"
    rng = random.Random(7)
    pieces = [r"\R.", r"\nm{x}", r"\nm[p]{y}", r"\pr{a}{b}", r"\im(f)", r"\eps-", r"\pr{\R}{\nm{\eps}}", "$x$ ", "word ", r"\alpha+", r"{\R}"]
    for _ in range(300):
        body = "".join(rng.choices(pieces, k=8))
        assert body_of(definitions, body) == peer(definitions + body)

@pytest.mark.peer
def test_the_peer_still_does_what_the_chapter_says():
    peer = pytest.importorskip("arxiv_to_prompt", reason="arxiv-to-prompt is not installed (extra bench)").expand_macros
    assert peer(r"\newcommand{\R}{\mathbb{R}}$\frac\R2$") == r"$\frac\mathbb{R}2$"
    assert peer(r"\newcommand{\vc}[1]{\vec#1}$\vc{x}$") == r"$\vecx$"
    assert peer(r"\newcommand{\x}[2]{(#1|#2)}\x{#2}{b}") == "(b|b)"
    assert peer(r"\newcommand{\a}{A}\a {\renewcommand{\a}{B}\a} \a") == "B {B} B"
    assert r"\let\reflect\ensuremath{\ocircle}" in peer("\\newcommand{\\modal}{\\ensuremath{\\ocircle}}\n\\let\\reflect\\modal\n\\def\\reflect(#1){x}")
