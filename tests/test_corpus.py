"""The corpus stage as a whole: real sources with labels, hostile archives, bad input."""
import gzip, hashlib, io, json, random, shutil, subprocess, sys, tarfile
from pathlib import Path

import pytest

from arxiv_study.corpus.archives import Limits, check_manifest, container_of, find_sources, read_source
from arxiv_study.corpus.ledger import REASONS, Reason, check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, corpus_folder, open_ledger, open_text
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json

SHARED = Path(__file__).parents[1].parent/"shared"/"arxiv"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample of real sources, ../shared/arxiv, is absent")
SNAPSHOT = "arxiv-metadata-oai-snapshot.json"
PAPER = b"\\documentclass{article}\n\\begin{document}\n" + b"We show that every compact space is normal, and that the converse fails. " * 40 + b"\n\\end{document}\n"


def digests(corpus):
    "All files of a corpus but the manifest, which tells times."
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(corpus.rglob("*.parquet"))}

def truth_of(arxiv): return {t["id"]: t for t in map(json.loads, (arxiv/"truth.jsonl").read_text().splitlines())}

def leftovers(folder): return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith(".") or ".working-" in p.name)

def tar_of(files, kinds={}):
    "A tar in memory; `kinds` gives the type of a member that is no plain file."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kinds.get(name, tarfile.REGTYPE)
            if name in kinds: member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()

def write_arxiv(folder, payloads, categories="math.GN"):
    "An arXiv folder without a manifest that holds these payloads."
    (folder/"src").mkdir(parents=True)
    ids = [f"2101.{i:05d}" for i in range(1, len(payloads)+1)]
    (folder/"src"/"arXiv_src_2101_001.tar").write_bytes(tar_of({f"2101/{i}.gz": p for i, p in zip(ids, payloads)}))
    record = lambda i: json.dumps({"id": i, "title": "T", "categories": categories, "abstract": "word "*30, "versions": [{"created": "Fri, 01 Jan 2021 00:00:00 GMT"}]})
    (folder/SNAPSHOT).write_text("".join(record(i) + "\n" for i in ids))
    return ids


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "A miniature arXiv in ten tars."
    folder = tmp_path_factory.mktemp("miniature")/"arxiv"
    write_miniature(folder, n_papers=200, seed=5, papers_per_tar=20)
    return folder

@pytest.fixture(scope="module")
def one_worker(miniature, tmp_path_factory): return build_corpus(miniature, tmp_path_factory.mktemp("one")/"corpus", workers=1)

@pytest.fixture(scope="module")
def real(tmp_path_factory): return build_corpus(SHARED, tmp_path_factory.mktemp("real")/"corpus", workers=2)


# Real sources

@needs_shared
def test_real_sources_agree_with_their_labels(real):
    truth, rows = truth_of(SHARED), {r["id"]: r for r in open_ledger(real).iter_rows(named=True)}
    early = {r.value for r, i in REASONS.items() if i.stage in ("metadata", "archive", "latex")}
    whys = {"no studied category": "no_studied_category", "withdrawn": "withdrawn", "zero bytes": "zero_bytes", "gzip stream ends early": "truncated",
            "binary payload, no TeX": "not_text", "category; contains the letters c, s only by accident": "no_studied_category"}
    for id, t in truth.items():
        row = rows[id]
        assert row["container"] == t["container"], id
        if t["fate"] == "source":
            assert row["reason"] not in early, (id, row["reason"])
            if t.get("main") and t["container"] == "tar-gz": assert row["main_file"] == t["main"], id
        else:
            assert row["reason"] == whys.get(t["why"], f"{t['container']}_only"), id

@needs_shared
def test_every_record_and_every_member_has_one_row(real):
    ledger = open_ledger(real)
    records = [json.loads(line)["id"] for line in (SHARED/SNAPSHOT).read_text().splitlines()]
    members = [id for s in find_sources(SHARED) for id, _ in s.sources()]
    assert len(members) == 327
    assert sorted(ledger["id"]) == sorted({*records, *members})
    assert check_conservation(ledger) == []
    counts = read_json(real/"manifest.json")["counts"]
    assert counts["papers"] == counts["kept"] + sum(counts["dropped"].values())

@needs_shared
def test_text_is_what_the_ledger_says(real):
    kept = open_ledger(real).filter(open_ledger(real)["fate"] == "kept")
    text = open_text(real).collect()
    assert text["id"].to_list() == kept["id"].to_list() == sorted(kept["id"])
    assert text["n_bytes"].to_list() == kept["text_bytes"].to_list() == [len(t.encode()) for t in text["text"]]
    assert set(text["domain"]) <= {"math", "cs", "physics", "stat"} and set(text["split"]) == {"train", "val", "test"}

@needs_shared
def test_groups_are_not_split(real):
    groups = dict(line.split(",") for line in (SHARED/"groups.csv").read_text().splitlines()[1:])
    by_group = {}
    for id, split in open_text(real).select("id", "split").collect().iter_rows(): by_group.setdefault(groups[id], set()).add(split)
    assert all(len(s) == 1 for s in by_group.values())

@needs_shared
@pytest.mark.slow
def test_real_sources_by_one_worker(real, tmp_path):
    assert digests(build_corpus(SHARED, tmp_path/"corpus", workers=1)) == digests(real)

# The miniature

def test_miniature_agrees_with_its_truth(miniature, one_worker):
    truth, ledger = truth_of(miniature), open_ledger(one_worker)
    assert sorted(ledger["id"]) == sorted(truth)
    wrong = [(r["id"], r["reason"], truth[r["id"]]["reason"]) for r in ledger.iter_rows(named=True) if r["reason"] != truth[r["id"]]["reason"]]
    assert wrong == []
    assert check_conservation(ledger) == []

@pytest.mark.parametrize("change", [dict(recipe="concatenate"), dict(recipe="released"), dict(archive_policy="strict", language_text="raw"), dict(macros="expand")], ids=str)
def test_no_variant_trains_on_held_out_papers(miniature, one_worker, change, tmp_path):
    ledger = open_ledger(variant := build_corpus(miniature, tmp_path/"corpus", CorpusConfig(**change), workers=1))
    assert check_conservation(ledger) == []
    splits, others = (dict(open_text(c).select("id", "split").collect().iter_rows()) for c in (one_worker, variant))
    assert len(others) > len(splits)/2 and all(splits[i] == s for i, s in others.items() if i in splits)

def test_corpora_are_named_by_what_they_are_made_from(miniature, tmp_path):
    base = corpus_folder(tmp_path, "baseline", CorpusConfig(), miniature)
    assert base == corpus_folder(tmp_path, "baseline", CorpusConfig(), miniature)
    assert base != corpus_folder(tmp_path, "baseline", CorpusConfig(macros="expand"), miniature)
    copy = shutil.copytree(miniature, tmp_path/"copy")
    with open(copy/SNAPSHOT, "a") as f: f.write('{"id": "2101.99999"}\n')
    assert base.name != corpus_folder(tmp_path, "baseline", CorpusConfig(), copy).name


# Hostile archives

@pytest.mark.parametrize("name", ["../x.tex", "/etc/x.tex", "a/../../x.tex", "..\\x.tex", "C:\\x.tex", "a\nb.tex", "x"*1500 + ".tex"])
def test_paths_that_lead_outside_are_refused(name):
    source = read_source(gzip.compress(tar_of({name: b"evil", "main.tex": PAPER})))
    assert list(source.files) == ["main.tex"] and sum(source.repairs.values()) == 1 and source.reason is None

@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_members_that_are_no_files_are_refused(kind):
    source = read_source(gzip.compress(tar_of({"x.tex": b"", "main.tex": PAPER}, {"x.tex": kind})))
    assert list(source.files) == ["main.tex"] and sum(source.repairs.values()) == 1

def peak_gib(code, *args):
    "Peak memory of a fresh process that runs `code`; ru_maxrss would begin with the memory of the process it was forked from."
    program = "import re, sys\n" + code + "\nprint(int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])/2**20)"
    return float(subprocess.run([sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, check=True).stdout.split()[-1])

@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
def test_bombs_are_stopped_in_bounded_memory(tmp_path):
    blank = gzip.compress(bytes(64 << 20), 1)
    (tmp_path/"nul").write_bytes(blank * 30)  # two gigabytes, in thirty streams
    (tmp_path/"tex").write_bytes(gzip.compress(PAPER * 12_000, 1))
    (tmp_path/"tar").write_bytes(gzip.compress(tar_of({"main.tex": PAPER, "fig.eps": bytes(80 << 20)}), 1))
    code = "from arxiv_study.corpus.archives import read_source\nprint(read_source(open(sys.argv[1], 'rb').read()).reason)"
    for name in ("nul", "tex", "tar"): assert peak_gib(code, tmp_path/name) < .5
    assert read_source((tmp_path/"tex").read_bytes()).reason == Reason.too_large
    assert read_source((tmp_path/"tar").read_bytes()).reason == Reason.too_large
    assert read_source(gzip.compress(tar_of({f"{i}.tex": b"" for i in range(99)})), Limits(max_members=50)).reason == Reason.too_large

def test_truncated_at_any_byte():
    whole = gzip.compress(tar_of({"main.tex": PAPER, "fig.eps": random.Random(0).randbytes(3000)}))
    for n in range(0, len(whole), 7):
        source = read_source(whole[:n])
        assert source.files == {} and source.reason in (Reason.zero_bytes, Reason.truncated, Reason.not_text), n

def mutated(rng, payload):
    "A payload with bits flipped, a piece cut out or put in elsewhere."
    data = bytearray(payload)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    a, b = sorted(rng.randrange(len(data)) for _ in "ab")
    if kind == 1: del data[a:b]
    if kind == 2: data[a:a] = data[a:b]
    return bytes(data[:rng.randrange(len(data))] if kind == 3 else data)

def test_mutated_archives_leave_one_row_each(tmp_path):
    rng = random.Random(0)
    files = {"main.tex": PAPER.replace(b"We show", b"\\input{b} We show", 1), "b.tex": "naïve \\newcommand{\\R}{\\mathbb R} $\\R$".encode("latin-1"), "fig.eps": bytes(99), "._b.tex": b"\0\5\x16\7"}
    plain = tar_of(files)
    healthy = [gzip.compress(plain), plain, gzip.compress(PAPER), PAPER]
    payloads = [gzip.compress(mutated(rng, plain)) if n % 3 == 0 else mutated(rng, rng.choice(healthy)) for n in range(300)]
    ids = write_arxiv(tmp_path/"arxiv", payloads)
    ledger = open_ledger(build_corpus(tmp_path/"arxiv", tmp_path/"corpus", workers=1))
    assert ledger["id"].to_list() == ids
    assert check_conservation(ledger) == []
    assert not (tmp_path/"x").exists() and leftovers(tmp_path) == []

def test_payloads_of_noise():
    rng = random.Random(1)
    for n in range(300):
        payload = rng.randbytes(rng.randrange(3000))
        for p in (payload, gzip.compress(payload), b"PK\3\4" + payload, b"\x1f\x8b\x08" + payload):
            assert container_of(p) and read_source(p).raw_bytes == len(p)


# Bad input

def refused(arxiv, tmp_path, *words, **options):
    "The one sentence a user gets; nothing may be left behind."
    out = tmp_path/"out"/"corpus"
    with pytest.raises(StudyError) as e: build_corpus(arxiv, out, **options)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert not out.exists() and (not out.parent.exists() or leftovers(out.parent) == [])

@pytest.fixture
def small(tmp_path):
    "An arXiv folder of three tars that a test may spoil."
    write_miniature(tmp_path/"arxiv", n_papers=30, seed=2, papers_per_tar=10)
    return tmp_path/"arxiv"

def test_no_such_folder(tmp_path): refused(tmp_path/"nowhere", tmp_path, "nowhere", "not a folder")

def test_a_folder_without_sources(tmp_path): refused(tmp_path, tmp_path, str(tmp_path), "no sources")

def test_an_empty_snapshot(small, tmp_path):
    (small/SNAPSHOT).write_bytes(b"")
    refused(small, tmp_path, SNAPSHOT, "empty")

def test_no_snapshot(small, tmp_path):
    (small/SNAPSHOT).unlink()
    refused(small, tmp_path, SNAPSHOT, "does not exist")

@pytest.mark.parametrize("line", ["not json", '{"id": 7}', '{"title": "no id"}', '{"id": "2101.1'])
def test_a_line_that_is_no_record(small, tmp_path, line):
    lines = (small/SNAPSHOT).read_text().splitlines()
    (small/SNAPSHOT).write_text("\n".join(lines[:4] + [line] + lines[4:]))
    refused(small, tmp_path, SNAPSHOT, "line 5")

@pytest.mark.parametrize("workers", [1, 2])
def test_a_manifest_that_disagrees_with_a_tar(small, tmp_path, workers):
    tar = sorted((small/"src").glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1  # same length, other sum
    tar.write_bytes(data)
    refused(small, tmp_path, tar.name, "MD5", "arXiv_src_manifest.xml", workers=workers)
    tar.write_bytes(data + b"\0"*512)
    refused(small, tmp_path, tar.name, "bytes", "arXiv_src_manifest.xml", workers=workers)
    with pytest.raises(StudyError): check_manifest(small)

def test_a_tar_the_manifest_does_not_list(small, tmp_path):
    shutil.copy(next((small/"src").glob("*.tar")), small/"src"/"arXiv_src_2012_001.tar")
    refused(small, tmp_path, "arXiv_src_2012_001.tar", "not listed")

def broken_header(data):
    "A tar whose third header is noise."
    with tarfile.open(fileobj=io.BytesIO(data)) as tar: at = tar.getmembers()[2].offset
    return data[:at] + b"\xff"*512 + data[at+512:]

@pytest.mark.parametrize("spoil", [lambda d: b"no tar" * 500, lambda d: d[:len(d)//2 + 100], lambda d: b"", broken_header])
def test_a_tar_that_cannot_be_read(small, tmp_path, spoil):
    (small/"src"/"arXiv_src_manifest.xml").unlink()
    tar = sorted((small/"src").glob("*.tar"))[0]
    tar.write_bytes(spoil(tar.read_bytes()))
    refused(small, tmp_path, tar.name, workers=1)

def test_a_manifest_that_is_no_xml(small, tmp_path):
    (small/"src"/"arXiv_src_manifest.xml").write_text("<arXivSRC><file>")
    refused(small, tmp_path, "arXiv_src_manifest.xml", "not a manifest")

def test_an_unknown_recipe(small, tmp_path): refused(small, tmp_path, "recipe", "flatten", config=CorpusConfig(recipe="flat"))

def test_an_output_that_exists(small, tmp_path):
    (tmp_path/"out"/"corpus").mkdir(parents=True)
    with pytest.raises(StudyError, match="exists already"): build_corpus(small, tmp_path/"out"/"corpus")

def test_groups_without_columns(small, tmp_path):
    (small/"groups.csv").write_text("paper;group\n")
    (small/"groups.csv").write_text("paper,tree\n2101.00001,a\n")
    refused(small, tmp_path, "groups.csv", "columns id and group", workers=1)
