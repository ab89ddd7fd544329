"""arXiv and corpus in object storage, on a server that speaks S3: the bytes that folders give, whole or not at all, and a sentence where the store says no."""
import hashlib, json, os, re, shutil, signal, subprocess, sys, threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from arxiv_study.corpus import elsewhere
from arxiv_study.corpus.elsewhere import arxiv_at, build_anywhere, fetch_corpus, lay_down, scratch_folder
from arxiv_study.corpus.ledger import check_conservation
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus, corpus_folder, open_ledger
from arxiv_study.settings import StudyError
from arxiv_study.storage import read_json
from test_engine import digests, wait_for

boto3, s3fs, _ = pytest.importorskip("boto3"), pytest.importorskip("s3fs"), pytest.importorskip("moto")
CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]
SECRET = "wJalrXUtnFEMI-not-a-real-key"
ARXIV, CORPUS = "s3://study/arxiv", "s3://study/corpora/first"


class Guard:
    "Moto's S3, which refuses who does not sign, writes down what was asked, and fails as `fault(method, path)` says: cut, busy, forbidden or flip; or calls what that gives."
    def __init__(self, app): self.app, self.asked, self.fault, self.lock = app, [], lambda method, path: None, threading.Lock()

    def __call__(self, environ, start):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.startswith("/moto-api"): return self.app(environ, start)
        with self.lock:
            self.asked.append((method, path))
            fault = self.fault(method, path)
        if callable(fault): fault()
        def refuse(status, code):
            start(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]
        if "HTTP_AUTHORIZATION" not in environ or fault == "forbidden": return refuse("403 Forbidden", "AccessDenied")
        if fault == "busy": return refuse("503 Slow Down", "SlowDown")
        def started(status, headers, *more): return start(status, [h for h in headers if fault != "flip" or not h[0].lower().startswith("x-amz-checksum")], *more)
        data = b"".join(self.app(environ, started))
        if fault == "flip": data = bytes([data[0] ^ 1]) + data[1:]
        return [data[:len(data)//2] if fault == "cut" else data]


@contextmanager
def serving():
    "Yields a server's address and its guard."
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    guard = Guard(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, guard, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}", guard
    finally:
        server.shutdown()
        thread.join(5)

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "A miniature of 60 papers in six tars."
    folder = tmp_path_factory.mktemp("arxiv")/"mini"
    write_miniature(folder, 60, 3, papers_per_tar=10)
    return folder

@pytest.fixture(scope="module")
def reference(mini, tmp_path_factory): return build_corpus(mini, tmp_path_factory.mktemp("one")/"corpus", workers=1)

@pytest.fixture
def store(mini, tmp_path, monkeypatch):
    "The miniature in a bucket, an account in the environment, and places of its own for what is fetched."
    (tmp_path/"tmp").mkdir()
    with serving() as (address, guard):
        for name, value in dict(AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID="AKIAEXAMPLE", AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true", AWS_MAX_ATTEMPTS="1",
                                AWS_SHARED_CREDENTIALS_FILE=str(tmp_path/"none"), AWS_CONFIG_FILE=str(tmp_path/"none"), HOME=str(tmp_path/"home"), TMPDIR=str(tmp_path/"tmp")).items(): monkeypatch.setenv(name, value)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path/"tmp"))
        monkeypatch.setattr(elsewhere, "BACKOFF_S", 0)
        urlopen(Request(f"{address}/moto-api/reset", method="POST")).close()  # moto's servers of a process share what they hold
        guard.client = boto3.client("s3", endpoint_url=address)
        guard.client.create_bucket(Bucket="study")
        for path in mini.rglob("*"):
            if path.is_file(): guard.client.put_object(Bucket="study", Key=f"arxiv/{path.relative_to(mini)}", Body=path.read_bytes())
        s3fs.S3FileSystem.clear_instance_cache()
        guard.asked.clear()
        yield guard
    s3fs.S3FileSystem.clear_instance_cache()

def objects(store, below):
    "Name and bytes of all objects."
    found = store.client.list_objects_v2(Bucket="study", Prefix=below.removeprefix("s3://study/") + "/").get("Contents", [])
    return {o["Key"].removeprefix(below.removeprefix("s3://study/") + "/"): store.client.get_object(Bucket="study", Key=o["Key"])["Body"].read() for o in found}

def sums_of(data): return {name: hashlib.sha256(d).hexdigest() for name, d in data.items() if name.endswith(".parquet")}

def nothing_left(tmp_path): return not list((tmp_path/"tmp").glob("arxiv-study-*/.*")) and not list((tmp_path/"work").glob("leaving/*"))

def command(tmp_path, *arguments, **more):
    "The command a user gives."
    return subprocess.Popen([*CLI, "corpus", "--workspace", tmp_path/"work", "--quiet", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **more)

def tars_asked(store): return [path for method, path in store.asked if method == "GET" and path.endswith(".tar")]


# Bytes

def test_a_corpus_from_a_bucket_into_a_bucket(mini, reference, store, tmp_path):
    "Two workers, each a process that finds the account by itself."
    build = command(tmp_path, "--arxiv", ARXIV, "--out", CORPUS, "--workers", 2)
    said = "".join(build.communicate(timeout=120))
    assert build.returncode == 0, said
    got = objects(store, CORPUS)
    assert sums_of(got) == digests(reference)
    assert set(got) - set(digests(reference)) == {"files.json", "manifest.json"}
    assert {name: told["sha256"] for name, told in json.loads(got["files.json"]).items()} == digests(reference)
    put = [path for method, path in store.asked if method == "PUT"]
    assert put[-1].endswith("/corpora/first/manifest.json") and put[0].endswith("/files.json")
    manifest, before = json.loads(got["manifest.json"]), read_json(reference/"manifest.json")
    assert [manifest[k] for k in ("fingerprint", "inputs", "counts")] == [before[k] for k in ("fingerprint", "inputs", "counts")] and manifest["arxiv"] == ARXIV
    assert len(tars_asked(store)) == 6 and nothing_left(tmp_path)
    for text in (said, *(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()), *(d.decode(errors="replace") for d in got.values())): assert SECRET not in text and "AKIAEXAMPLE" not in text

def test_a_corpus_comes_back_as_it_went(reference, store, tmp_path):
    lay_down(reference, CORPUS)
    back = fetch_corpus(CORPUS, tmp_path/"back")
    assert digests(back) == digests(reference) and (back/"manifest.json").read_bytes() == (reference/"manifest.json").read_bytes()
    name = next(iter(digests(reference)))
    store.client.put_object(Bucket="study", Key=f"corpora/first/{name}", Body=(reference/name).read_bytes()[:-1] + b"?")
    with pytest.raises(StudyError, match=f"{name} is not what was put there"): fetch_corpus(CORPUS, tmp_path/"again")
    assert not (tmp_path/"again").exists()

@pytest.mark.slow
@pytest.mark.peer
def test_workers_of_a_cluster_fetch_for_themselves(reference, store, tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed; the extra dask has it")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, protocol="tcp", silence_logs=60) as cluster:
        ledger = build_anywhere(ARXIV, tmp_path/"corpus", tmp_path/"work", engine=cluster.scheduler_address.replace("tcp", "dask"))
    assert digests(tmp_path/"corpus") == digests(reference) and len(ledger) == len(open_ledger(reference))
    assert len(tars_asked(store)) == 6 and nothing_left(tmp_path)

def test_the_snapshot_is_fetched_once(store, tmp_path):
    count = lambda: sum(method == "GET" and path.endswith("snapshot.json") for method, path in store.asked)
    first = arxiv_at(ARXIV)
    assert count() == 1
    assert arxiv_at(ARXIV) == first and count() == 1
    record = json.loads((first.folder/elsewhere.SNAPSHOT).read_text().splitlines()[0])
    store.client.put_object(Bucket="study", Key=f"arxiv/{elsewhere.SNAPSHOT}", Body=json.dumps(record).encode() + b"\n")
    arxiv_at(ARXIV)
    assert count() == 2 and len((first.folder/elsewhere.SNAPSHOT).read_text().splitlines()) == 1


# Bad lines and bad stores

@pytest.mark.parametrize("fault", ["cut", "busy"])
def test_a_bad_line(reference, store, tmp_path, fault):
    "Each object fails once on its way in and out, the first of either seven times: s3fs tries five times by itself."
    seen = Counter()
    def often(method, path):
        if method not in ("GET", "PUT") or not re.search(r"\.\w+$", path) or method == "PUT" and fault == "cut": return None
        seen[method, path] += 1
        return fault if seen[method, path] <= (7 if path == next(p for m, p in seen if m == method) else 1) else None
    store.fault = often
    build_anywhere(ARXIV, CORPUS, tmp_path/"work", workers=1)
    store.fault = lambda *_: None
    assert sums_of(objects(store, CORPUS)) == digests(reference) and nothing_left(tmp_path)
    assert len([p for _, p in seen if p.endswith(".tar")]) == 6 and max(seen.values()) >= 8

def test_a_tar_that_is_not_what_the_manifest_says(store, tmp_path):
    store.fault = lambda method, path: "flip" if method == "GET" and path.endswith(".tar") else None
    with pytest.raises(StudyError, match=r"s3://study/arxiv/src/arXiv_src_\d+_\d+\.tar has MD5 sum .* as arXiv_src_manifest.xml says"): build_anywhere(ARXIV, tmp_path/"corpus", tmp_path/"work", workers=1)
    assert not (tmp_path/"corpus").exists() and nothing_left(tmp_path)

def test_a_tar_that_goes_while_it_is_waited_for(store, tmp_path):
    found = arxiv_at(ARXIV)
    store.client.delete_object(Bucket="study", Key=f"arxiv/src/{found.sets[3].name}")
    with pytest.raises(StudyError, match=f"s3://study/arxiv/src has no {found.sets[3].name}"): build_corpus(found, tmp_path/"corpus", workers=1)

def test_a_tar_that_is_replaced_while_it_is_read(mini, store, tmp_path):
    found = arxiv_at(ARXIV)
    name, done = found.sets[2].name, []
    def replace():
        if not done: done.append(store.client.put_object(Bucket="study", Key=f"arxiv/src/{name}", Body=bytes(found.sets[2].n_bytes)))
    with pytest.raises(StudyError, match=f"{name} was replaced while it was read"):
        store.fault = lambda method, path: threading.Thread(target=replace).run if method == "GET" and path.endswith(name) and not done else None
        store.lock = threading.RLock()
        build_corpus(found, tmp_path/"corpus", workers=1)

def test_what_is_missing_is_named(store, tmp_path):
    for address, what in (("s3://study/nowhere", "has no arxiv-metadata-oai-snapshot.json"), ("s3://no-such-bucket/arxiv", "no-such-bucket/arxiv has no")):
        with pytest.raises(StudyError, match=what): build_anywhere(address, tmp_path/"corpus", tmp_path/"work")
    store.client.put_object(Bucket="study", Key="empty/arxiv-metadata-oai-snapshot.json", Body=b"{}\n")
    with pytest.raises(StudyError, match="has no src/arXiv_src_YYMM_NNN.tar"): build_anywhere("s3://study/empty", tmp_path/"corpus", tmp_path/"work")
    with pytest.raises(StudyError, match="is no corpus, it has no manifest.json"): fetch_corpus(ARXIV, tmp_path/"back")

def test_without_an_account(store, tmp_path):
    bare = {k: v for k, v in os.environ.items() if k not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for arguments in (("--arxiv", ARXIV, "--out", "corpus"), ("--arxiv", "absent", "--out", CORPUS)):
        if arguments[1] == "absent": (tmp_path/"absent").mkdir()
        build = command(tmp_path, *arguments, env=bare)
        said = build.communicate(timeout=120)[1]
        assert build.returncode == 1 and "refuses" in said and "AWS_PROFILE" in said and len(said.strip().splitlines()) == 1, said

def test_an_account_that_may_only_read(reference, mini, store, tmp_path):
    "What was built stays, and the same command needs only to lay it down."
    store.fault = lambda method, path: "forbidden" if method == "PUT" else None
    with pytest.raises(StudyError, match="refuses the writing of files.json"): build_anywhere(ARXIV, CORPUS, tmp_path/"work", workers=1)
    assert not objects(store, CORPUS) and len(list((tmp_path/"work"/"leaving").iterdir())) == 1
    store.fault, n = lambda *_: None, len(tars_asked(store))
    build_anywhere(ARXIV, CORPUS, tmp_path/"work", workers=1)
    assert sums_of(objects(store, CORPUS)) == digests(reference) and len(tars_asked(store)) == n and nothing_left(tmp_path)


# Kills

def test_an_upload_that_is_killed(reference, store, tmp_path):
    "No manifest, so no corpus; the second attempt puts what is missing."
    wants, process = [], []
    def fault(method, path):
        if method == "PUT" and "/corpora/" in path:
            wants.append(path)
            if len(wants) == 3: process[0].kill()
    store.fault = fault
    process.append(command(tmp_path, "--arxiv", ARXIV, "--out", CORPUS, "--workers", 1))
    process[0].communicate(timeout=120)
    assert process[0].returncode == -signal.SIGKILL
    there = objects(store, CORPUS)
    assert there and "manifest.json" not in there
    with pytest.raises(StudyError, match="is no corpus, it has no manifest.json"): fetch_corpus(CORPUS, tmp_path/"back")
    store.fault, n = lambda *_: None, len(store.asked)
    again = command(tmp_path, "--arxiv", ARXIV, "--out", CORPUS, "--workers", 1)
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0, said
    assert sums_of(objects(store, CORPUS)) == digests(reference) and nothing_left(tmp_path)
    put = {path.removeprefix("/study/corpora/first/") for method, path in store.asked[n:] if method == "PUT"}
    assert put == {*digests(reference), "manifest.json"} - set(there)

@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_fetches(reference, store, tmp_path):
    "Its half tar is cleared away by the next."
    killed = []
    def fault(method, path):
        if method == "GET" and path.endswith(".tar") and not killed: return kill
    def kill():
        import psutil
        workers = [c for c in psutil.Process(build.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        killed.extend(workers)
        for w in workers: w.kill()
    store.fault = fault
    build = command(tmp_path, "--arxiv", ARXIV, "--out", "corpus", "--workers", 2)
    said = build.communicate(timeout=120)[1]
    assert build.returncode == 0 and killed, said
    assert digests(tmp_path/"corpus") == digests(reference) and nothing_left(tmp_path)

def test_an_address_in_use_is_refused_before_the_work(reference, store, tmp_path):
    store.client.put_object(Bucket="study", Key="corpora/first/mine.txt", Body=b"x")
    with pytest.raises(StudyError, match="holds other objects, mine.txt first"): build_anywhere(ARXIV, CORPUS, tmp_path/"work")
    lay_down(reference, "s3://study/second")
    with pytest.raises(StudyError, match="holds a corpus already"): build_anywhere(ARXIV, "s3://study/second", tmp_path/"work")
    assert not tars_asked(store)

def test_only_the_corpus_reads_from_elsewhere(store, tmp_path):
    said = subprocess.run([*CLI, "study", "--arxiv", ARXIV], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert said.returncode == 2 and "only `arxiv-study corpus` reads from elsewhere" in said.stderr

def test_a_corpus_has_one_name_wherever_arxiv_lies(mini, store):
    assert corpus_folder("w", "baseline", CorpusConfig(), arxiv_at(ARXIV)) == corpus_folder("w", "baseline", CorpusConfig(), mini)
