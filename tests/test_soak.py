"""The soak in small: what a build must survive, and that the soak would notice if it did not."""
import json, random
import numpy as np
import polars as pl
import pytest
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import build_corpus
from benchmarks.soak import against_reference, against_truth, damaged, digests, growth, is_flat, memory_told, notes, slope, soak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_builds_survive_every_fault(tmp_path):
    told, memory = soak(tmp_path, papers=240, minutes=1, seed=2, papers_per_tar=12)
    assert told["wrong"] == [] and told["builds"] >= 1 and told["faults"]["worker"] >= 1
    assert sum(told["faults"].values()) >= 5 and told["tars_not_done_again"] > 0
    assert set(memory["role"]) == {"builder", "worker"}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    write_miniature(folder/"arxiv", 60, seed=4, papers_per_tar=20)
    build_corpus(folder/"arxiv", folder/"builds"/"corpus", workers=1)
    return folder

def test_a_corpus_as_planted_has_nothing_wrong(miniature):
    assert against_truth(miniature/"arxiv", miniature/"builds"/"corpus") == []
    assert against_reference(miniature/"builds", digests(miniature/"builds"/"corpus")) == []

def test_a_paper_that_is_lost_or_there_twice_or_dropped_is_noticed(miniature, tmp_path):
    (ledger,) = (miniature/"builds"/"corpus"/"ledger").iterdir()
    rows, out = pl.read_parquet(ledger), tmp_path/"corpus"/"ledger"
    out.mkdir(parents=True)
    rows[1:].write_parquet(out/"part-000.parquet")
    assert against_truth(miniature/"arxiv", tmp_path/"corpus") == ["59 rows for 60 papers", f"{rows['id'][0]}: {rows['reason'][0]} was planted, the ledger says nothing"]
    pl.concat([rows, rows[:1]]).write_parquet(out/"part-000.parquet")
    assert against_truth(miniature/"arxiv", tmp_path/"corpus") [0] == "61 rows for 60 papers"
    kept = rows.filter(fate="kept").row(0, named=True)["id"]
    rows.with_columns(reason=pl.when(id=kept).then(pl.lit("no_source").cast(rows.schema["reason"])).otherwise("reason")).write_parquet(out/"part-000.parquet")
    assert against_truth(miniature/"arxiv", tmp_path/"corpus")[0] == f"{kept}: None was planted, the ledger says no_source"

def test_what_is_left_over_and_what_differs_is_noticed(miniature):
    builds = miniature/"builds"
    expected, path = digests(builds/"corpus"), builds/"corpus"/"text"/".part-000.parquet.7-abc.part"
    path.touch()
    (builds/"corpus.working-1").mkdir()
    assert against_reference(builds, expected) == ["corpus.working-1 is left over", f"{path.name} is left over"]
    assert against_reference(builds, expected, is_tidy=False) == [f"{path.name} is left over"]
    path.unlink(), (builds/"corpus.working-1").rmdir()
    assert against_reference(builds, expected | {"text/part-000.parquet": ""}) == ["the corpus differs from that of an uninterrupted build"]
    manifest = builds/"corpus"/"manifest.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(whole) | {"set_aside": [{"sources": "a tar"}]}))
    assert against_reference(builds, expected) == ["the manifest lists set_aside"]
    manifest.write_text(whole)

def test_damage_is_mended(tmp_path):
    (tar := tmp_path/"a.tar").write_bytes(whole := bytes(range(256)))
    for kind in ("truncated tar", "flipped byte"):
        mend = damaged(tar, kind, random.Random(0))
        now = tar.read_bytes()
        assert whole.startswith(now) and now != whole if kind == "truncated tar" else sum(a != b for a, b in zip(now, whole, strict=True)) == 1
        mend()
        assert tar.read_bytes() == whole

def test_a_note_that_is_half_written_does_not_count(tmp_path):
    (parts := tmp_path/"corpus.working-1"/"parts").mkdir(parents=True)
    for name in ("000001-done-0000.json", ".000002-done-0000.json.7-abc.part", "000002-text-0000.parquet"): (parts/name).touch()
    assert list(notes(tmp_path)) == ["000001-done-0000.json"]

def memory_of(mb_a_minute, growth_a_build):
    "Two workers that begin at 100 and 300 MB, load for half a minute and then grow; a builder that grows from build to build."
    seconds = np.arange(0, 240.)
    workers = [pl.DataFrame(dict(s=seconds, build=1 + (seconds >= 120), role="worker", pid=pid, mb=level + np.minimum(seconds, 30) + np.maximum(seconds - 30, 0)*mb_a_minute/60)) for pid, level in ((7, 100), (8, 300))]
    builder = pl.DataFrame(dict(s=seconds, build=1 + (seconds >= 120), role="builder", pid=6, mb=np.where(seconds >= 120, 100*(1 + growth_a_build), 100)*np.where(seconds%120 == 100, 1, .5)))
    return pl.concat([*workers, builder])

def test_memory_that_grows_is_noticed():
    memory = memory_of(2, .25)
    assert slope(memory.filter(role="worker")) == pytest.approx(2) and growth(memory.filter(role="builder")) == .25
    assert slope(memory.filter(pl.col("s") < 20)) is None # nobody is old
    flat = lambda *a: is_flat(dict(memory=memory_told(memory_of(*a))))
    assert flat(.5, .05) and not flat(2, .05) and not flat(.5, .25)
