"""The miniature arXiv as others read it: bytes that repeat, sums that agree, members that the standard library opens, truth that covers all."""
import gzip, hashlib, io, json, subprocess, sys, tarfile, zipfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from arxiv_study.corpus.ledger import REASONS, Reason
from arxiv_study.corpus.miniature import ODDITIES, TROUBLES, write_miniature
from arxiv_study.settings import StudyError

NOT_BY_DEFAULT = {Reason.before_year, Reason.licence, Reason.archive_oddity, Reason.benchmark_overlap, Reason.processing_failed, Reason.worker_lost, Reason.abstract_not_english}
NOT_PLANTED = {Reason.word_length, Reason.open_environments, Reason.boilerplate}  # signals of quality, tested with texts of their own

@pytest.fixture(scope="module")
def arxiv(tmp_path_factory):
    "The default miniature of 400 papers."
    folder = tmp_path_factory.mktemp("arxiv")/"mini"
    write_miniature(folder)
    return folder

@pytest.fixture(scope="module")
def truth(arxiv): return [json.loads(line) for line in open(arxiv/"truth.jsonl", encoding="utf-8")]

@pytest.fixture(scope="module")
def records(arxiv): return [json.loads(line) for line in open(arxiv/"arxiv-metadata-oai-snapshot.json", encoding="utf-8")]

def members(folder):
    "Name and payload of every member of every bulk tar."
    for path in sorted((folder/"src").glob("*.tar")):
        with tarfile.open(path) as tar:
            for m in tar:
                if m.isfile(): yield m.name, tar.extractfile(m).read()

def id_of(name):
    "2101.00001 or hep-th/9901001 of a member's name."
    stem = Path(name).stem
    return stem if stem[0].isdigit() else f"{stem[:-7]}/{stem[-7:]}"

def digest(folder):
    "Name and SHA-256 of every file of a folder."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}

def test_bytes_follow_from_the_seed(tmp_path):
    "Two processes with different hash seeds write the same bytes; another seed writes others."
    for name, seed, hash_seed in (("a", 3, "1"), ("b", 3, "2"), ("c", 4, "1")):
        code = f"from arxiv_study.corpus.miniature import write_miniature; write_miniature({str(tmp_path/name)!r}, 60, {seed})"
        subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": hash_seed}, cwd=Path(__file__).parents[1])
    assert digest(tmp_path/"a") == digest(tmp_path/"b")
    assert digest(tmp_path/"a") != digest(tmp_path/"c")

def test_manifest_agrees_with_the_tars(arxiv):
    "Size, MD5 of the tar, MD5 of the members' contents, first and last item, count."
    entries = ElementTree.parse(arxiv/"src"/"arXiv_src_manifest.xml").getroot().findall("file")
    assert [e.findtext("filename") for e in entries] == sorted(f"src/{p.name}" for p in (arxiv/"src").glob("*.tar"))
    for e in entries:
        path = arxiv/e.findtext("filename")
        with tarfile.open(path) as tar: inside = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
        stems = [Path(n).stem for n, _ in inside]
        assert int(e.findtext("size")) == path.stat().st_size
        assert e.findtext("md5sum") == hashlib.md5(path.read_bytes()).hexdigest()
        assert e.findtext("content_md5sum") == hashlib.md5(b"".join(p for _, p in inside)).hexdigest()
        assert (int(e.findtext("num_items")), e.findtext("first_item"), e.findtext("last_item")) == (len(inside), stems[0], stems[-1])
        assert path.name == f"arXiv_src_{e.findtext('yymm')}_{int(e.findtext('seq_num')):03d}.tar"
        assert all(n.startswith(e.findtext("yymm") + "/") for n, _ in inside)

def test_truth_names_every_paper_once(arxiv, truth, records):
    "One line for each id in the snapshot or the tars, 400 in all, and it says which of the two hold it."
    ids, known, inside = [t["id"] for t in truth], {r["id"] for r in records}, {id_of(n) for n, _ in members(arxiv)}
    assert len(ids) == len(set(ids)) == 400 and set(ids) == known | inside
    for t in truth:
        assert (t["reason"] == "no_metadata") == (t["id"] not in known)
        assert (t["container"] is None) == (t["id"] not in inside)

def test_every_reason_is_planted(truth):
    "Each reason of the default configuration occurs, with its stage; 12 to 15 % of the papers are troubled; every oddity occurs and is kept."
    planted = Counter(t["reason"] for t in truth if t["reason"])
    assert set(planted) == {r.value for r in REASONS if r not in NOT_BY_DEFAULT | NOT_PLANTED}
    assert min(planted.values()) >= 2
    assert 0.12 <= sum(planted.values())/len(truth) <= 0.15
    assert {t.get("planted") for t in truth} == {None, *TROUBLES, *ODDITIES}
    for t in truth:
        assert t["fate"] == ("dropped" if t["reason"] else "source")
        assert t["stage"] == (REASONS[Reason(t["reason"])].stage.value if t["reason"] else None)

def test_members_are_what_the_truth_says(arxiv, truth):
    "The standard library opens what is sound, and fails where it should."
    expected = {t["id"]: t for t in truth}
    for name, payload in members(arxiv):
        t = expected[id_of(name)]
        match t["container"]:
            case "tar-gz":
                with tarfile.open(fileobj=io.BytesIO(payload), mode="r:gz") as tar: names = tar.getnames()
                assert t["main"] is None or t["main"] in names or t["planted"] == "nested_archive" and names == ["paper.tar.gz", "fig1.eps"]
            case "zip":
                assert t["main"] in zipfile.ZipFile(io.BytesIO(payload)).namelist()
            case "compress": assert payload.startswith(b"\x1f\x9d")
            case "gz-tex": assert b"\\" in gzip.decompress(payload)
            case "pdf": assert name.endswith(".pdf") and payload.startswith(b"%PDF-") and payload.rstrip().endswith(b"%%EOF")
            case "postscript": assert gzip.decompress(payload).startswith(b"%!PS")
            case "html": assert b"<html>" in gzip.decompress(payload)
            case "dvi": assert gzip.decompress(payload).startswith(b"\xf7\x02")
            case "empty": assert payload == b""
            case "damaged":
                with pytest.raises(EOFError): gzip.decompress(payload)
            case "unknown": assert b"\\begin" not in gzip.decompress(payload)
            case other: pytest.fail(f"unexpected container {other}")

def test_pdf_has_a_sound_cross_reference_table(arxiv):
    "Every offset in the table points at its object."
    pdf = next(p for n, p in members(arxiv) if n.endswith(".pdf"))
    start = int(pdf.split(b"startxref\n")[1].split()[0])
    rows = pdf[start:].splitlines()[3:8]
    for number, row in enumerate(rows, 1): assert pdf[int(row[:10]):].startswith(b"%d 0 obj" % number)

def test_shares(truth, records):
    "All four domains are large enough for a split; ids are of all three kinds; some papers have several versions."
    domains = Counter(t["domain"] for t in truth if not t["reason"])
    assert set(domains) == {"math", "cs", "physics", "stat"} and min(domains.values()) >= 20
    kinds = Counter("old" if "/" in t["id"] else len(t["id"]) for t in truth)
    assert set(kinds) == {"old", 9, 10}
    assert sum(len(r["versions"]) > 1 for r in records) > 40
    assert 0.1 < sum(t["container"] == "gz-tex" for t in truth)/len(truth) < 0.3 # arXiv: 18 %

def test_text_is_long_and_of_variety(arxiv, truth):
    "At least 2.5 MB of TeX in papers to keep, and hardly a sentence twice."
    keep = {t["id"]: t for t in truth if not t["reason"]}
    sources, sentences = 0, Counter()
    for name, payload in members(arxiv):
        if id_of(name) not in keep or keep[id_of(name)]["container"] == "zip": continue
        data = gzip.decompress(payload)
        if keep[id_of(name)]["container"] == "tar-gz":
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                data = b"\n".join(tar.extractfile(m).read() for m in tar if m.isfile() and m.name.endswith(".tex"))
        sources += len(data)
        sentences.update(s for s in b" ".join(data.split()).split(b". ") if 40 < len(s) < 200)
    assert sources > 3e6
    assert len(sentences)/sum(sentences.values()) > 0.9

def test_duplicates_are_close_and_decoys_are_not(arxiv, truth):
    "Runs of five words: planted pairs share over 90 %, quotations under 40 %."
    sources = {id_of(n): p for n, p in members(arxiv)}
    def words(id):
        data = gzip.decompress(sources[id])
        if data[257:262] == b"ustar":
            with tarfile.open(fileobj=io.BytesIO(data)) as tar: data = b"\n".join(tar.extractfile(m).read() for m in tar if m.isfile() and m.name.endswith(".tex"))
        w = data.split()
        return {tuple(w[i:i + 5]) for i in range(len(w) - 4)}
    pairs = [(t, t.get("duplicate_of") or t.get("quotes")) for t in truth if t.get("duplicate_of") or t.get("quotes")]
    assert len(pairs) >= 8
    for t, other in pairs:
        a, b = words(t["id"]), words(other)
        jaccard = len(a & b)/len(a | b)
        if t["planted"] == "decoy": assert jaccard < 0.4
        elif t["planted"] == "near_duplicate": assert 0.9 < jaccard < 1
        else: assert jaccard == 1
        assert other < t["id"]

@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
def test_memory_does_not_grow_with_the_number_of_papers(tmp_path):
    "600 papers need at most 8 MB more than 60."
    # VmHWM, not ru_maxrss: that begins with the memory of the process it was forked from, so that pytest's own would hide the growth
    code = "import re, sys; from arxiv_study.corpus.miniature import write_miniature; write_miniature(sys.argv[1], int(sys.argv[2])); print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    peak = [int(subprocess.run([sys.executable, "-c", code, tmp_path/str(n), str(n)], check=True, capture_output=True, text=True).stdout) for n in (60, 600)]
    assert peak[1] - peak[0] < 8*1024

def test_corpus_pipeline_finds_the_truth(arxiv, truth, tmp_path):
    "Fate, stage, reason, container, main file and domain of every paper, and which paper each copy repeats."
    from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, open_ledger
    build_corpus(arxiv, tmp_path/"corpus", CorpusConfig(), workers=2)
    ledger = {r["id"]: r for r in open_ledger(tmp_path/"corpus").to_dicts()}
    assert len(ledger) == len(truth)
    for t in truth:
        row = ledger[t["id"]]
        found = {k: row[k] for k in ("reason", "container", "domain")} | {"main": row["main_file"], "stage": row["stage"] if row["reason"] else None}
        assert found == {k: t[k] for k in found}, t
    copies = json.loads((tmp_path/"corpus"/"manifest.json").read_text())["counts"]["duplicates"]
    assert copies == {t["id"]: t["duplicate_of"] for t in truth if "duplicate_of" in t}

@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 25])
def test_small_numbers(tmp_path, n):
    "Any number of papers works, and each has one line of truth."
    write_miniature(tmp_path/"mini", n)
    assert len((tmp_path/"mini"/"truth.jsonl").read_text().splitlines()) == n

def test_refusals(tmp_path):
    "An existing folder is not touched, and nonsense numbers are refused; nothing is left behind."
    (tmp_path/"there").mkdir()
    for out, n, per_tar, word in (("there", 5, None, "exists"), ("new", 0, None, "0 papers"), ("new", 5, 0, "0 papers"), ("new", 5, 10_000, "10000 papers")):
        with pytest.raises(StudyError, match=word): write_miniature(tmp_path/out, n, papers_per_tar=per_tar)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
