"""The corpus stage as a whole: real sources with labels, bad input."""
import hashlib, io, json, shutil, tarfile
from pathlib import Path

import pytest

from arxiv_study.corpus.archives import check_manifest, find_sources
from arxiv_study.corpus.ledger import REASONS, check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, corpus_folder, open_ledger, open_text
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json

SHARED = Path(__file__).parents[1].parent/"shared"/"arxiv"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the sample of real sources, ../shared/arxiv, is absent")
SNAPSHOT = "arxiv-metadata-oai-snapshot.json"


def digests(corpus):
    "All files of a corpus but the manifest, which tells times."
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(corpus.rglob("*.parquet"))}

def truth_of(arxiv): return {t["id"]: t for t in map(json.loads, (arxiv/"truth.jsonl").read_text().splitlines())}

def leftovers(folder): return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith("."))

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


# Bad input

def refused(arxiv, tmp_path, *words, **options):
    "The one sentence a user gets; nothing may be left behind but what was done of it."
    out = tmp_path/"out"/"corpus"
    with pytest.raises(StudyError) as e: build_corpus(arxiv, out, **options)
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)
    assert not out.exists() and (not out.parent.exists() or leftovers(out.parent) == [])
    assert all(list(area.glob("parts/*-done-*")) for area in out.parent.glob("corpus.working-*"))

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
