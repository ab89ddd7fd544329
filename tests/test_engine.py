"""The engine of the corpus: the same bytes on any engine and after any kill, and a row for each paper whatever happens to who works on it."""
import hashlib, io, json, os, random, shutil, signal, subprocess, sys, tarfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import psutil
import pytest

from arxiv_study.corpus import pipeline
from arxiv_study.corpus.ledger import check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, open_ledger, open_text
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json

SNAPSHOT = "arxiv-metadata-oai-snapshot.json"
PAPER = "\\documentclass{article}\n\\begin{document}\n" + "We show that every compact space is normal, and that the converse fails. " * 40 + "%s\n\\end{document}\n"


def digests(corpus):
    "All files of a corpus but the manifest, which tells times."
    return {str(p.relative_to(corpus)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(corpus.rglob("*.parquet"))}

def areas(folder): return sorted(folder.glob("corpus.working-*"))

def notes(folder):
    "The notes of tars that are done, and when they were written."
    return {p.name: p.stat().st_mtime_ns for a in areas(folder) for p in a.glob("parts/[0-9]*-done-*.json")} # whole ones: half-written ones begin with a dot and end in .part

def write_tar(path, payloads):
    "A bulk tar of (name, text) pairs, in this order."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, text in payloads:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))

def write_snapshot(arxiv, ids):
    record = lambda i: json.dumps({"id": i, "title": "T", "categories": "math.GN", "abstract": "word "*30, "versions": [{"created": "Fri, 01 Jan 2021 00:00:00 GMT"}]})
    (arxiv/SNAPSHOT).write_text("".join(record(i) + "\n" for i in ids))

@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    "A miniature arXiv in ten tars."
    folder = tmp_path_factory.mktemp("miniature")/"arxiv"
    write_miniature(folder, n_papers=120, seed=5, papers_per_tar=12)
    return folder

@pytest.fixture(scope="module")
def reference(miniature, tmp_path_factory): return build_corpus(miniature, tmp_path_factory.mktemp("one")/"corpus", workers=1)


# Any engine

def test_two_workers_write_the_same_bytes(miniature, reference, tmp_path):
    assert digests(build_corpus(miniature, tmp_path/"corpus", workers=2)) == digests(reference)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]

def test_any_executor_writes_the_same_bytes(miniature, reference, tmp_path):
    with ThreadPoolExecutor(3) as pool: assert digests(build_corpus(miniature, tmp_path/"corpus", engine=pool)) == digests(reference)

@pytest.fixture
def cluster():
    "A Dask cluster of two processes, and the engine that stands for it."
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; the extra dask has it")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=60) as cluster: yield cluster, cluster.scheduler_address.replace("tcp", "dask")

@pytest.mark.peer
def test_dask_writes_the_same_bytes(miniature, reference, tmp_path, cluster):
    assert digests(build_corpus(miniature, tmp_path/"corpus", engine=cluster[1])) == digests(reference)
    assert len(read_json(tmp_path/"corpus"/"manifest.json")["peak_mb_per_worker"]) == 2

@pytest.mark.peer
def test_a_cluster_without_workers_is_named(miniature, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; the extra dask has it")
    with distributed.LocalCluster(n_workers=0, dashboard_address=None, protocol="tcp", silence_logs=60) as empty:
        with pytest.raises(StudyError, match="has no workers"): build_corpus(miniature, tmp_path/"corpus", engine=empty.scheduler_address.replace("tcp", "dask"))

@pytest.mark.peer
def test_dask_loses_a_worker(miniature, reference, tmp_path, cluster):
    cluster, engine = cluster
    build = build_in_process(miniature, tmp_path/"corpus", engine)
    wait_for(lambda: notes(tmp_path))
    os.kill(next(iter(cluster.workers.values())).process.process.pid, signal.SIGKILL)
    assert build.communicate(timeout=120) and build.returncode == 0
    assert digests(tmp_path/"corpus") == digests(reference)

@pytest.mark.peer
def test_dask_loses_its_client(miniature, reference, tmp_path, cluster):
    build = build_in_process(miniature, tmp_path/"corpus", cluster[1])
    wait_for(lambda: notes(tmp_path))
    build.kill()
    build.communicate(timeout=60)
    done = notes(tmp_path)
    assert done and digests(build_corpus(miniature, tmp_path/"corpus", engine=cluster[1])) == digests(reference)


# Kills, at any moment

BUILD = """
import resource, sys
from arxiv_study.corpus.pipeline import build_corpus
from arxiv_study.settings import StudyError
arxiv, out, engine, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("begins", flush=True)
try: build_corpus(arxiv, out, **(dict(workers=int(engine)) if engine.isdigit() else dict(engine=engine)))
except StudyError as e: sys.exit(f"one line: {e}")
"""

def build_in_process(arxiv, out, engine, limit=0):
    "Start a build in a process group of its own; `engine` is a number of workers or an address."
    return subprocess.Popen([sys.executable, "-c", BUILD, str(arxiv), str(out), str(engine), str(limit)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

def group_is_alive(pgid):
    "Whether a process of the group still runs."
    try: os.killpg(pgid, 0)
    except ProcessLookupError: return False
    return True

def wait_for(condition, seconds=60):
    "Wait until something is so."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(.01)
    return found

def workers_of(pid):
    "The worker processes of a build."
    try: return [c for c in psutil.Process(pid).children() if "spawn_main" in " ".join(c.cmdline())]
    except psutil.NoSuchProcess: return []

def strike(build, kind, rng):
    "Kill the whole group, one worker or the parent; whether there was something to kill."
    if kind == "group": os.killpg(build.pid, signal.SIGKILL)
    if kind == "parent": build.kill()
    if kind == "worker":
        found = workers_of(build.pid)
        if not found: return False
        try: rng.choice(found).kill()
        except psutil.NoSuchProcess: return False
    return True

def campaign(arxiv, expected, folder, n_kills, seed):
    "Kill builds at random moments, each time going on in what is left; how many tars were found done, and how many builds ended."
    rng, out, resumed, ended, kills, spans = random.Random(seed), folder/"corpus", 0, 0, 0, 1.5
    while kills < n_kills:
        kind = ("group", "worker", "parent")[kills % 3]
        before = notes(folder)
        build = build_in_process(arxiv, out, 2 if kind == "worker" else rng.choice((1, 2)))
        assert build.stdout.readline() == "begins\n"
        if kind == "worker": wait_for(lambda: workers_of(build.pid) or build.poll() is not None)
        time.sleep(rng.uniform(0, spans))
        if build.poll() is None and strike(build, kind, rng): kills += 1
        errors = build.communicate(timeout=120)[1]
        wait_for(lambda: not group_is_alive(build.pid))
        after = notes(folder)
        assert all(after.get(name, when) == when for name, when in before.items()) # what was done is not done again
        resumed += len(before)
        if kind == "worker" or build.returncode == 0: assert build.returncode == 0, errors
        if out.exists():
            ended += 1
            assert digests(out) == expected
            shutil.rmtree(out)
    assert digests(build_corpus(arxiv, out, workers=2)) == expected
    assert [p.name for p in folder.iterdir()] == ["corpus"] or not areas(folder)
    return resumed, ended

def test_killed_three_times(miniature, reference, tmp_path): campaign(miniature, digests(reference), tmp_path, 3, seed=1)

@pytest.mark.slow
def test_killed_thirty_times(miniature, reference, tmp_path):
    resumed, ended = campaign(miniature, digests(reference), tmp_path, 30, seed=0)
    assert resumed > 10 and ended >= 10

@pytest.mark.parametrize("n_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupt_keeps_what_is_done(miniature, reference, tmp_path, n_workers):
    build = build_in_process(miniature, tmp_path/"corpus", n_workers)
    wait_for(lambda: notes(tmp_path))
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does: to the parent and to its workers
    build.communicate(timeout=60)
    wait_for(lambda: not group_is_alive(build.pid))
    if not (tmp_path/"corpus").exists():  # or the interrupt came too late
        assert build.returncode != 0 and len(areas(tmp_path)) == 1
        build_corpus(miniature, tmp_path/"corpus", workers=1)
    assert digests(tmp_path/"corpus") == digests(reference)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]

@pytest.mark.parametrize("n_workers,limit", [(1, 30_000), pytest.param(2, 4_000, marks=pytest.mark.slow)])
def test_a_full_disk(miniature, reference, tmp_path, n_workers, limit):
    build = build_in_process(miniature, tmp_path/"corpus", n_workers, limit)
    _, stderr = build.communicate(timeout=120)
    assert build.returncode == 1 and "one line: " in stderr and "File too large" in stderr and "Traceback" not in stderr
    assert bool(areas(tmp_path)) == bool(notes(tmp_path)) and not (tmp_path/"corpus").exists()
    assert digests(build_corpus(miniature, tmp_path/"corpus", workers=2)) == digests(reference)

@pytest.mark.slow
def test_work_of_another_configuration_is_not_taken_up(miniature, reference, tmp_path, capsys):
    build = build_in_process(miniature, tmp_path/"corpus", 1)
    wait_for(lambda: notes(tmp_path))
    build.kill()
    build.communicate(timeout=60)
    other = build_corpus(miniature, tmp_path/"corpus", CorpusConfig(macros="expand"), workers=2)
    assert "holds unfinished work by other settings" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"] and digests(other) != digests(reference)

def test_two_builders_of_one_folder(miniature, tmp_path):
    build = build_in_process(miniature, tmp_path/"corpus", 1)
    wait_for(lambda: areas(tmp_path))
    with pytest.raises(StudyError, match=f"is being built by process {build.pid} on "): build_corpus(miniature, tmp_path/"corpus", workers=1)
    assert build.communicate(timeout=60) and build.returncode == 0
    with pytest.raises(StudyError, match="exists already"): build_corpus(miniature, tmp_path/"corpus", workers=1)


# Papers and tars that are fatal

def deadly_task(task):
    "As `do_task`, in a process that is killed by one paper or by one tar."
    take = pipeline.take_paper
    def fatal(paper_id, *args):
        if paper_id == os.environ.get("FATAL_PAPER"): os.kill(os.getpid(), signal.SIGKILL)
        return take(paper_id, *args)
    if task.sources.name == os.environ.get("FATAL_TAR"):
        task.path("hand").write_text("\n")  # begun, with no paper in hand yet
        os.kill(os.getpid(), signal.SIGKILL)
    pipeline.take_paper = fatal
    try: return original_task(task)
    finally: pipeline.take_paper = take

original_task = pipeline.do_task

def rows_of(corpus): return {r["id"]: r for r in open_ledger(corpus).iter_rows(named=True)}

def test_a_fatal_paper_is_set_aside_alone(miniature, reference, tmp_path, monkeypatch, capsys):
    victim = open_text(reference).select("id").collect()["id"][3]
    monkeypatch.setattr(pipeline, "do_task", deadly_task)
    monkeypatch.setenv("FATAL_PAPER", victim)
    corpus = build_corpus(miniature, tmp_path/"corpus", workers=2)
    rows, before, manifest = rows_of(corpus), rows_of(reference), read_json(corpus/"manifest.json")
    assert rows[victim]["reason"] == "worker_lost" and rows.keys() == before.keys() and check_conservation(open_ledger(corpus)) == []
    assert [f["id"] for f in manifest["failures"]] == [victim] and manifest["set_aside"] == []
    assert {i for i in rows if rows[i]["reason"] != before[i]["reason"]} - set(manifest["counts"]["duplicates"]) <= {victim, *(i for i, to in read_json(reference/"manifest.json")["counts"]["duplicates"].items() if to == victim)}
    assert "1 papers could not be processed" in capsys.readouterr().err

@pytest.mark.slow
def test_a_fatal_tar_is_set_aside_with_its_papers(miniature, reference, tmp_path, monkeypatch, capsys):
    tar = sorted((miniature/"src").glob("*.tar"))[4]
    with tarfile.open(tar) as t: ids = {pipeline.paper_id(m.name) for m in t if m.isfile()}
    monkeypatch.setattr(pipeline, "do_task", deadly_task)
    monkeypatch.setenv("FATAL_TAR", tar.name)
    corpus = build_corpus(miniature, tmp_path/"corpus", workers=2)
    rows, before = rows_of(corpus), rows_of(reference)
    assert rows.keys() == before.keys() and check_conservation(open_ledger(corpus)) == []
    lost = {i for i, r in rows.items() if r["reason"] == "worker_lost"}
    assert lost and lost <= ids and all(rows[i]["stage"] == "metadata" for i in ids - lost)
    assert all(rows[i] == before[i] for i in rows if i not in ids and before[i]["stage"] != "duplicates" and rows[i]["stage"] != "duplicates")
    (told,) = read_json(corpus/"manifest.json")["set_aside"]
    assert told["sources"] == tar.name and told["n_papers"] == len(ids) and "ended 2 times" in told["why"]
    assert f"{tar.name} was set aside" in capsys.readouterr().err

def end_at_once(*args): os._exit(1)

def test_workers_that_cannot_begin_blame_no_tar(miniature, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "do_task", end_at_once)
    with pytest.raises(StudyError, match="worker processes end before they begin"): build_corpus(miniature, tmp_path/"corpus", workers=2)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("error", [MemoryError, RecursionError])
def test_an_error_costs_one_paper(miniature, reference, tmp_path, monkeypatch, error, capsys):
    victim, to_text = open_text(reference).select("id").collect()["id"][5], pipeline.to_text
    def fails(row, files, config, clock):
        if row.id == victim:
            with clock.stage("latex"): raise error("no more")
        return to_text(row, files, config, clock)
    monkeypatch.setattr(pipeline, "to_text", fails)
    corpus = build_corpus(miniature, tmp_path/"corpus", workers=1)
    rows, (failure,) = rows_of(corpus), read_json(corpus/"manifest.json")["failures"]
    assert rows[victim]["reason"] == "processing_failed" and rows.keys() == rows_of(reference).keys() and check_conservation(open_ledger(corpus)) == []
    assert failure["id"] == victim and failure["stage"] == "latex" and error.__name__ in failure["error"]
    assert f"1 papers could not be processed, {victim} first" in capsys.readouterr().err


# Papers that occur twice

def test_ids_that_occur_again_are_counted(tmp_path):
    arxiv, a, b, c = tmp_path/"arxiv", "2101.00001", "2101.00002", "2101.00003"
    name = lambda i: f"2101/{i}.gz"
    write_tar(arxiv/"src"/"arXiv_src_2101_001.tar", [(name(a), PAPER % "first"), (name(b), PAPER % "of the second"), (name(a), PAPER % "first, again")])
    write_tar(arxiv/"src"/"arXiv_src_2101_002.tar", [(name(c), PAPER % "something else entirely " * 3), (name(a), PAPER % "first, in another tar"), (name(b), PAPER % "second again")])
    write_snapshot(arxiv, [a, b, c])
    corpora = [build_corpus(arxiv, tmp_path/f"corpus{n}", CorpusConfig(near_duplicate_jaccard=1), workers=n) for n in (1, 2)]
    assert digests(corpora[0]) == digests(corpora[1])
    rows = rows_of(corpora[0])
    again = {i: {e["rule"]: e["n"] for e in r["repairs"]}.get("seen_again", 0) for i, r in rows.items()}
    assert again == {a: 2, b: 1, c: 0}
    assert len(PAPER % "first") == rows[a]["raw_bytes"] # the first of the first tar counts
    assert read_json(corpora[0]/"manifest.json")["counts"]["seen_again"] == 3


# Benchmarks

def test_quoted_benchmarks_are_dropped_and_listed(miniature, reference, tmp_path):
    victim, text = open_text(reference).select("id", "text").collect().row(7)
    quoted = " ".join(text[200:].split()[:80])
    (tmp_path/"questions.txt").write_text(f"Which of these is true of no paper that was ever written by anyone at all?\n{quoted}\n")
    config = CorpusConfig(benchmarks=(str(tmp_path/"questions.txt"),))
    corpora = [build_corpus(miniature, tmp_path/f"corpus{n}", config, workers=n) for n in (1, 2)]
    assert digests(corpora[0]) == digests(corpora[1])
    rows = rows_of(corpora[0])
    assert rows[victim]["reason"] == "benchmark_overlap" and check_conservation(open_ledger(corpora[0])) == []
    hits = pl.read_parquet(corpora[0]/"hits"/"part-000.parquet")
    assert victim in set(hits["id"]) and set(hits["benchmark"]) == {"questions.txt"}
    report = build_corpus(miniature, tmp_path/"corpus3", CorpusConfig(benchmarks=config.benchmarks, benchmark_policy="report"), workers=1)
    assert digests(report).items() >= digests(reference).items() and read_json(report/"manifest.json")["counts"]["hits"] == len(hits)
