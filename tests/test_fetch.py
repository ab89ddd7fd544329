"""arXiv fetched from servers that speak its protocols, on good days and bad ones: same bytes in the end, no faster than allowed, and nothing half-written."""
import json, os, shutil, signal, ssl, subprocess, sys, time
from pathlib import Path
import pytest
from arxiv_study.corpus import bulk, fetch
from arxiv_study.corpus.fetch import SNAPSHOT, Client, FetchConfig, GivenUp, Wanted, fetch_eprints, fetch_metadata
from arxiv_study.corpus.metadata import read_snapshot
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.settings import StudyError
from arxiv_servers import Arxiv, read_folder, serving, serving_s3

CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]
SHARED = Path(__file__).parents[2]/"shared"/"arxiv"
SECRET = "wJalrXUtnFEMI-not-a-real-key"

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "A miniature of 60 papers in six tars."
    folder = tmp_path_factory.mktemp("arxiv")/"mini"
    write_miniature(folder, 60, 0, papers_per_tar=10)
    return folder

@pytest.fixture(scope="module")
def stock(mini): return read_folder(mini)

class FakeClock:
    "A clock that only sleeping moves."
    def __init__(self): self.now, self.slept = 0., []
    def __call__(self): return self.now
    def sleep(self, s): self.now += s; self.slept.append(s)

def config_of(address, **more):
    return FetchConfig(**{**dict(oai=f"{address}/oai", eprints=f"{address}/e-print", wait_s=0., backoff_s=0.), **more})

def impatient(config):
    "A client that does not wait, whatever the server asks."
    return Client(config, sleep=lambda s: None)

def tree(folder):
    "All files but the fetch's own notes."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and ".fetch" not in p.parts}

def leftovers(folder): return [p.name for p in Path(folder).rglob("*") if p.name.endswith((".part", ".heaps", ".done"))]

def nth(faults): return lambda n, path: faults.get(n)

# Records

def test_all_records_come_as_the_server_has_them(stock, tmp_path):
    records, payloads = stock
    with serving(Arxiv(records, payloads)) as address: summary = fetch_metadata(tmp_path, config_of(address))
    got = [json.loads(line) for line in (tmp_path/SNAPSHOT).read_text().splitlines()]
    assert [r["id"] for r in got] == sorted(r["id"] for r in records) and summary["records"] == len(records)
    want = {r["id"]: r for r in records}
    for r in got:
        for name in ("submitter", "authors", "title", "comments", "journal-ref", "doi", "report-no", "categories", "license", "abstract", "update_date"): assert r[name] == want[r["id"]][name], (r["id"], name)
        assert [(v["version"], v["created"]) for v in r["versions"]] == [(v["version"], v["created"]) for v in want[r["id"]]["versions"]]
    assert [r.id for r in read_snapshot(tmp_path/SNAPSHOT)] == [r["id"] for r in got] and not leftovers(tmp_path)

def test_records_in_the_other_format(stock, tmp_path):
    records, payloads = stock
    with serving(Arxiv(records, payloads)) as address: fetch_metadata(tmp_path, config_of(address), prefix="arXiv")
    got, want = [json.loads(line) for line in (tmp_path/SNAPSHOT).read_text().splitlines()], {r["id"]: r for r in records}
    for r in got:
        assert [a[:2] for a in r["authors_parsed"]] == [a[:2] for a in want[r["id"]]["authors_parsed"]]
        assert r["versions"][0]["created"][:16] == time.strftime("%a, %d %b %Y", time.strptime(want[r["id"]]["versions"][0]["created"], "%a, %d %b %Y %H:%M:%S GMT"))

def test_sets_and_days(stock, tmp_path):
    records, payloads = stock
    days = sorted(r["update_date"] for r in records)
    start, until = days[10], days[-10]
    with serving(Arxiv(records, payloads)) as address:
        fetch_metadata(tmp_path/"a", config_of(address), set="math")
        fetch_metadata(tmp_path/"b", config_of(address), start=start, until=until)
    assert [r.id for r in read_snapshot(tmp_path/"a"/SNAPSHOT)] == sorted(r["id"] for r in records if any(c.partition(".")[0] == "math" for c in r["categories"].split()))
    assert [r.id for r in read_snapshot(tmp_path/"b"/SNAPSHOT)] == sorted(r["id"] for r in records if start <= r["update_date"] <= until)

def test_a_day_before_the_oldest_record(stock, tmp_path):
    "arXiv refuses a list from such a day; who asks for papers since 1991 means all."
    records, payloads = stock
    with serving(arxiv := Arxiv(records, payloads)) as address:
        fetch_metadata(tmp_path/"all", config_of(address))
        fetch_metadata(tmp_path/"since", config_of(address), start="1991-08-01")
        summary = fetch_eprints(tmp_path/"papers", Wanted(categories=("math.*",), start="1991-08-01", until="1999-12-31"), config_of(address))
    assert tree(tmp_path/"since") == tree(tmp_path/"all") and all("from=1991" not in path for path in arxiv.asked)
    want = [r for r in records if r["categories"].split()[0].startswith("math.") and r["versions"][0]["created"].split()[3] < "2000" and "withdrawn" not in (r["comments"] or "")]
    assert len(want) > 1 and {r["id"] for r in want} <= {r.id for r in read_snapshot(tmp_path/"papers"/SNAPSHOT)} and summary["asked"] >= len(want)

def test_some_days_hide_no_others(stock, tmp_path):
    "After a harvest of some days the next one brings what came before and after them."
    records, payloads = stock
    days = sorted(r["update_date"] for r in records)
    with serving(Arxiv(records, payloads)) as address:
        fetch_metadata(tmp_path, config_of(address), until=days[20])
        assert len(list(read_snapshot(tmp_path/SNAPSHOT))) < len(records)
        fetch_metadata(tmp_path, config_of(address), start=days[40])
        fetch_metadata(tmp_path, config_of(address))
    assert [r.id for r in read_snapshot(tmp_path/SNAPSHOT)] == sorted(r["id"] for r in records)

def test_days_the_wrong_way_round(stock, tmp_path):
    with serving(arxiv := Arxiv(*stock)) as address:
        for go in (lambda: fetch_metadata(tmp_path/"data", config_of(address), start="2024-02-01", until="2024-01-01"), lambda: fetch_eprints(tmp_path/"data", Wanted(start="2024-02-01", until="2024-01-01"), config_of(address))):
            with pytest.raises(StudyError, match="is later than"): go()
    assert not arxiv.asked and not (tmp_path/"data").exists()

def test_deleted_records_leave_the_snapshot(stock, tmp_path):
    records, payloads = stock
    gone = {records[3]["id"], records[40]["id"]}
    with serving(Arxiv(records, payloads, deleted=gone)) as address: fetch_metadata(tmp_path, config_of(address))
    assert {r.id for r in read_snapshot(tmp_path/SNAPSHOT)} == {r["id"] for r in records} - gone

@pytest.mark.parametrize("faults", [{2: "busy"}, {1: "reset", 3: "cut"}, {2: "robot"}, {4: "empty"}, {3: "expire"}, {5: "expire", 6: "busy"}, {3: "again"}, {2: "cut", 3: "cut", 4: "reset", 5: "busy"}], ids=str)
def test_bad_days_do_not_change_the_snapshot(stock, tmp_path, faults):
    records, payloads = stock
    with serving(Arxiv(records, payloads)) as address: fetch_metadata(tmp_path/"good", config_of(address))
    arxiv = Arxiv(records, payloads, fault=nth(faults))
    with serving(arxiv) as address:
        config = config_of(address)
        fetch_metadata(tmp_path/"bad", config, client=impatient(config))
    assert tree(tmp_path/"bad") == tree(tmp_path/"good") and len(arxiv.asked) > len(records)/arxiv.page

def test_a_server_that_goes_round_is_left(stock, tmp_path):
    records, payloads = stock
    with serving(arxiv := Arxiv(records, payloads, fault=lambda n, path: "again" if n > 3 else None)) as address:
        config = config_of(address)
        with pytest.raises(GivenUp, match="the same page came again"): fetch_metadata(tmp_path, config, client=impatient(config))
    assert len(arxiv.asked) == 3 + config.tries and not (tmp_path/SNAPSHOT).exists()

def test_an_update_asks_only_for_what_changed(stock, tmp_path):
    records, payloads = stock
    with serving(arxiv := Arxiv(records, payloads)) as address:
        fetch_metadata(tmp_path, config_of(address))
        first = len(arxiv.asked)
        arxiv.records = [dict(r, title="A new title", update_date="2026-11-27") if r["id"] == records[5]["id"] else r for r in records]
        fetch_metadata(tmp_path, config_of(address))
    assert len(arxiv.asked) == first + 1 and "from=2026-11-26" in arxiv.asked[-1]
    got = {r.id: r.title for r in read_snapshot(tmp_path/SNAPSHOT)}
    assert got[records[5]["id"]] == "A new title" and len(got) == len(records)

def test_entities_are_not_expanded(stock, tmp_path):
    with serving(Arxiv(*stock, fault=nth({1: "bomb"}))) as address:
        with pytest.raises(StudyError, match="document type"): fetch_metadata(tmp_path, config_of(address))

def test_damaged_pages_are_said_to_be_so(stock):
    "Whatever a server sends, the answer is one of our errors."
    import random
    from arxiv_study.corpus.fetch import OaiError, Page, Transient, parse_page
    page, rng, told = Arxiv(*stock).oai("verb=ListRecords&metadataPrefix=arXivRaw"), random.Random(0), 0
    for _ in range(600):
        broken = bytearray(page)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(broken))
            match rng.randrange(3):
                case 0: broken[at] = rng.randrange(256)
                case 1: del broken[at:at + rng.randrange(1, 400)]
                case 2: broken[at:at] = broken[(start := rng.randrange(len(broken))):start + rng.randrange(200)]
        try: assert isinstance(parse_page(bytes(broken)), Page)
        except (Transient, OaiError, StudyError): told += 1
    assert told > 100

# Manners

def test_no_faster_than_allowed(stock, tmp_path):
    clock, (records, payloads) = FakeClock(), stock
    arxiv = Arxiv(records, payloads, clock=clock, fault=nth({2: "busy", 9: "cut", 12: "reset"}))
    with serving(arxiv) as address:
        config = config_of(address, wait_s=3., backoff_s=5., contact="someone@example.org", eprints=f"{address}/moved")
        fetch_eprints(tmp_path, Wanted(categories=("math.*",), most=8), config, client=Client(config, clock, clock.sleep))
    gaps = [b - a for a, b in zip(arxiv.times, arxiv.times[1:])]
    assert min(gaps) >= 3 and arxiv.most_open == 1
    assert gaps[1] >= 7 # as the server asked
    moved = [path for path in arxiv.asked if "/moved/" in path]
    assert len(moved) >= 8 # each of them was a request, and so was where it led
    for headers in arxiv.headers: assert "arxiv-study" in headers["User-Agent"] and headers["From"] == "someone@example.org"

def test_a_long_wait_ends_the_command(stock, tmp_path):
    with serving(arxiv := Arxiv(*stock, fault=lambda n, path: "busy", retry_after="86400")) as address:
        with pytest.raises(GivenUp, match="left alone"): fetch_metadata(tmp_path, config_of(address))
    assert len(arxiv.asked) == 1

def test_a_closed_door_is_not_knocked_at_again(stock, tmp_path):
    with serving(arxiv := Arxiv(*stock, fault=lambda n, path: "forbidden" if "/e-print/" in path else None)) as address:
        with pytest.raises(StudyError, match="wait a day"): fetch_eprints(tmp_path, Wanted(most=5), config_of(address))
    assert sum("/e-print/" in path for path in arxiv.asked) == 1

def test_pages_instead_of_sources_end_the_command(stock, tmp_path):
    with serving(arxiv := Arxiv(*stock, fault=lambda n, path: "robot" if "/e-print/" in path else None)) as address:
        config = config_of(address, tries=2)
        with pytest.raises(StudyError, match="wait a day"): fetch_eprints(tmp_path, Wanted(most=9), config)
    assert sum("/e-print/" in path for path in arxiv.asked) == 3*2
    assert set(tree(tmp_path)) == {SNAPSHOT}

def test_two_fetches_do_not_run_at_once(stock, tmp_path):
    with serving(Arxiv(*stock)) as address, fetch.working_in(tmp_path):
        held = subprocess.run([sys.executable, "-c", f"from arxiv_study.corpus.fetch import *\nfetch_metadata({str(tmp_path)!r}, FetchConfig(oai='{address}/oai', wait_s=0))"], capture_output=True, text=True, timeout=120)
    assert held.returncode and "another fetch" in held.stderr

# E-prints

def wanted_of(stock, n=14):
    "Ids as a server lists them first, all of which have a source or none; those taken back left out."
    records = sorted(stock[0], key=lambda r: (r["update_date"], r["id"]))
    return [r["id"] for r in records if "withdrawn" not in (r["comments"] or "")][:n]

@pytest.fixture(scope="module")
def good(stock, tmp_path_factory):
    "An uninterrupted fetch by ids."
    folder = tmp_path_factory.mktemp("good")
    with serving(Arxiv(*stock)) as address: fetch_eprints(folder, Wanted(ids=tuple(wanted_of(stock))), config_of(address))
    return folder

def test_eprints_are_what_the_server_has(stock, good):
    records, payloads = stock
    got = {p.name: data for p, data in ((Path(n), d) for n, d in tree(good).items()) if p.suffix != ".json"}
    for paper in wanted_of(stock):
        stem = paper.replace("/", "")
        data = payloads.get(paper)
        if data is None: assert not any(n.startswith(stem) for n in got)
        elif data: assert got.pop(f"{stem}.pdf" if data[:4] == b"%PDF" else f"{stem}.gz") == data
    assert not got

FIRST = 15 # 14 records one by one, then e-prints

@pytest.mark.parametrize("fault", ["busy", "reset", "cut", "robot", "flip", "empty"])
def test_bad_days_do_not_change_the_eprints(stock, good, tmp_path, fault):
    faults = {2: "reset", FIRST + 1: fault, FIRST + 3: fault, (FIRST + 5 if fault == "flip" else FIRST + 4): fault} # the same flip twice in a row would be no flip
    with serving(arxiv := Arxiv(*stock, fault=nth(faults))) as address:
        config = config_of(address)
        fetch_eprints(tmp_path, Wanted(ids=tuple(wanted_of(stock))), config, client=impatient(config))
    assert tree(tmp_path) == tree(good) and not leftovers(tmp_path)
    assert len(arxiv.asked) > 2*len(wanted_of(stock))

def test_a_cut_that_only_the_announced_length_shows(tmp_path, stock):
    "A PDF has no checksum."
    paper = stock[0][0]["id"]
    pdf = b"%PDF-1.4\n" + bytes(range(256))*99
    with serving(arxiv := Arxiv(stock[0], {paper: pdf}, announced=True, fault=nth({2: "cut"}))) as address: fetch_eprints(tmp_path, Wanted(ids=(paper,)), config_of(address))
    assert pdf in tree(tmp_path).values() and len(arxiv.asked) == 3

def test_a_file_broken_at_the_server_is_kept_as_it_is(stock, tmp_path):
    "What is the same twice is not the line's fault: the corpus has a rule for it."
    records, payloads = stock
    paper = next(r["id"] for r in records if payloads.get(r["id"], b"")[:2] == b"\x1f\x8b")
    broken = payloads[paper][:-20]
    with serving(arxiv := Arxiv(records, {paper: broken})) as address: summary = fetch_eprints(tmp_path, Wanted(ids=(paper,)), config_of(address))
    assert summary["damaged"] == 1 and broken in tree(tmp_path).values() and len(arxiv.asked) == 3

def test_withdrawn_missing_and_too_long(stock, tmp_path):
    records, payloads = stock
    ids = wanted_of(stock, 5)
    held = {i: b"\x1f\x8b" + bytes(100) if i == ids[4] else payloads.get(i) or b"%PDF-1.4" for i in ids}
    faults = lambda n, path: {f"/e-print/{ids[2]}": "big", f"/e-print/{ids[3]}": "endless"}.get(path)
    with serving(arxiv := Arxiv(records, {k: v for k, v in held.items() if k != ids[1]}, withdrawn={ids[0]}, fault=faults)) as address:
        config = config_of(address, max_eprint_bytes=3_000_000)
        summary = fetch_eprints(tmp_path, Wanted(ids=tuple(ids)), config)
        again = fetch_eprints(tmp_path, Wanted(ids=tuple(ids)), config)
    assert (summary["withdrawn"], summary["not_found"], summary["too_large"], summary["damaged"]) == (1, 1, 2, 1)
    assert again["requests"] == 0 and not leftovers(tmp_path)

def test_dripping_bytes_are_not_waited_for(stock, tmp_path):
    with serving(Arxiv(*stock, fault=lambda n, path: "slow" if "/e-print/" in path else None)) as address:
        config = config_of(address, timeout_s=.3, tries=2)
        start = time.monotonic()
        with pytest.raises(GivenUp, match="too slow"): fetch_eprints(tmp_path, Wanted(ids=tuple(wanted_of(stock, 3))), config)
    assert time.monotonic() - start < 20 and set(tree(tmp_path)) == {SNAPSHOT} and not leftovers(tmp_path)

def test_one_paper_that_fails_does_not_keep_the_others(stock, good, tmp_path):
    ids = wanted_of(stock)
    bad = ids[3]
    with serving(arxiv := Arxiv(*stock, fault=lambda n, path: "busy" if path.endswith(bad) and "/e-print/" in path else None)) as address:
        config = config_of(address)
        summary = fetch_eprints(tmp_path, Wanted(ids=tuple(ids)), config, client=impatient(config))
        assert summary["failed"] == 1 and len(tree(good)) - len(tree(tmp_path)) <= 1
        arxiv.fault = lambda n, path: None
        fetch_eprints(tmp_path, Wanted(ids=tuple(ids)), config, client=impatient(config))
    assert tree(tmp_path) == tree(good)

def test_a_redirect_to_another_host_is_not_followed(stock, tmp_path):
    with serving(arxiv := Arxiv(*stock)) as address:
        with pytest.raises(StudyError, match="another server"): fetch_eprints(tmp_path, Wanted(ids=tuple(wanted_of(stock, 1))), config_of(address, eprints=f"{address}/away"))
    assert set(tree(tmp_path)) == {SNAPSHOT}

def test_a_certificate_that_nobody_vouches_for(stock, tmp_path):
    x509 = pytest.importorskip("cryptography.x509")
    from datetime import datetime, timedelta, timezone
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    cert = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1)).sign(key, hashes.SHA256())
    pem = tmp_path/"server.pem"
    pem.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + cert.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with serving(arxiv := Arxiv(*stock), context) as address:
        with pytest.raises(StudyError, match="cannot prove who it is"): fetch_metadata(tmp_path/"data", config_of(address))
    assert not arxiv.asked

def test_categories_licences_and_days_choose_the_papers(stock, tmp_path):
    records, payloads = stock
    order = sorted(records, key=lambda r: (r["update_date"], r["id"]))
    want = [r["id"] for r in order if any(c == "math.AG" or c.startswith("cs.") for c in r["categories"].split()) and "creativecommons" in (r["license"] or "")]
    with serving(Arxiv(records, payloads)) as address: summary = fetch_eprints(tmp_path, Wanted(categories=("math.AG", "cs.*"), licence="cc"), config_of(address))
    assert len(want) > 3 and summary["asked"] == len(want) and [r.id for r in read_snapshot(tmp_path/SNAPSHOT)] == sorted(want)
    for r in read_snapshot(tmp_path/SNAPSHOT): assert "creativecommons" in r.license

def test_papers_of_a_snapshot_that_is_there(mini, stock, tmp_path):
    shutil.copy(mini/SNAPSHOT, tmp_path)
    before = (tmp_path/SNAPSHOT).read_bytes()
    with serving(arxiv := Arxiv(*stock)) as address: summary = fetch_eprints(tmp_path, Wanted(categories=("math.*",), most=4), config_of(address))
    assert summary["asked"] == 4 and all("/e-print/" in path for path in arxiv.asked) and (tmp_path/SNAPSHOT).read_bytes() == before

def test_papers_of_a_snapshot_elsewhere(mini, stock, tmp_path):
    with serving(arxiv := Arxiv(*stock)) as address:
        config = config_of(address)
        fetch_eprints(tmp_path, Wanted(categories=("math.*",), most=4), config, snapshot=mini/SNAPSHOT)
        fetch_eprints(tmp_path, Wanted(categories=("cs.*",), most=4), config, snapshot=mini/SNAPSHOT)
    lines = set((mini/SNAPSHOT).read_bytes().splitlines())
    assert all("/e-print/" in path for path in arxiv.asked)
    assert 4 < len(got := (tmp_path/SNAPSHOT).read_bytes().splitlines()) <= 8 and set(got) <= lines # line for line as they were

# Interruptions

class Crash(BaseException): "As a kill, but seen from within."

def crash_at(monkeypatch, n):
    "The n-th rename does not happen, nor does anything after it."
    real, count = os.replace, [0]
    def replace(a, b):
        count[0] += 1
        if count[0] == n: raise Crash
        return real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    return count

@pytest.mark.parametrize("what", ["metadata", "eprints"])
def test_a_crash_at_any_rename_changes_nothing(stock, tmp_path, monkeypatch, what):
    def go(folder, address):
        config = config_of(address)
        if what == "metadata": fetch_metadata(folder, config)
        else: fetch_eprints(folder, Wanted(categories=("math.*",), most=4), config)
    with serving(Arxiv(*stock, page=20)) as address:
        count = crash_at(monkeypatch, 0)
        go(tmp_path/"good", address)
        n = count[0]
        assert n > 4
        for at in range(1, n + 1):
            crash_at(monkeypatch, at)
            with pytest.raises(Crash): go(tmp_path/str(at), address)
            monkeypatch.undo()
            go(tmp_path/str(at), address)
            assert tree(tmp_path/str(at)) == tree(tmp_path/"good"), at
            assert not leftovers(tmp_path/str(at))

def ini(folder, address, **more):
    path = folder/"settings.ini"
    path.write_text("[study]\n[fetch]\n" + "".join(f"{k} = {v}\n" for k, v in {**dict(oai=f"{address}/oai", eprints=f"{address}/e-print", wait_s=0, backoff_s=0), **more}.items()))
    return path

@pytest.mark.parametrize("what", ["metadata", "eprints"])
def test_a_crash_while_tidying_up(stock, tmp_path, monkeypatch, what):
    "Of the pages one is gone, the others are not: they must not be taken for the list."
    real = shutil.rmtree
    def rmtree(path, *more, **options):
        if ".fetch" in str(path): next(p for p in sorted(Path(path).rglob("page-*"))).unlink(); raise Crash
        return real(path, *more, **options)
    def go(address):
        if what == "metadata": fetch_metadata(tmp_path, config_of(address))
        else: fetch_eprints(tmp_path, Wanted(categories=("math.*",), most=4), config_of(address))
    with serving(arxiv := Arxiv(*stock)) as address:
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Crash): go(address)
        monkeypatch.undo()
        before, asked = tree(tmp_path)[SNAPSHOT], len(arxiv.asked)
        go(address)
        assert tree(tmp_path)[SNAPSHOT] == before and not leftovers(tmp_path)
        assert [path for path in arxiv.asked[asked:] if "oai" in path and "from=2026-11-26" not in path] == []

def test_an_update_of_the_same_day_after_a_crash(stock, tmp_path, monkeypatch):
    "The same request again: what a crash has left of its pages is not its answer."
    records, payloads = stock
    real = shutil.rmtree
    def rmtree(path, *more, **options):
        if ".fetch" in str(path): next(p for p in sorted(Path(path).rglob("page-*"))).unlink(); raise Crash
        return real(path, *more, **options)
    def changed(title): return [dict(r, title=title, update_date="2026-11-26") for r in records]
    with serving(arxiv := Arxiv(records, payloads)) as address:
        fetch_metadata(tmp_path, config_of(address))
        arxiv.records = changed("second")
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(Crash): fetch_metadata(tmp_path, config_of(address))
        monkeypatch.undo()
        arxiv.records = changed("third")
        fetch_metadata(tmp_path, config_of(address))
    assert {r.title for r in read_snapshot(tmp_path/SNAPSHOT)} == {"third"}

def test_killed_and_given_again(stock, tmp_path):
    "SIGKILL in the middle of an answer, again and again, each time a few requests later."
    (tmp_path/"killed").mkdir()
    arguments = ["--category", "math.*", "--category", "cs.*", "--max", "12", "--quiet"]
    process, deaths, died = [None], iter([2, 3, 4, 6]), 0
    kill_at = [0]
    def fault(n, path):
        kill_at[0] -= 1
        return (lambda: os.kill(process[0].pid, signal.SIGKILL)) if kill_at[0] == 0 else None
    with serving(arxiv := Arxiv(*stock, fault=fault)) as address:
        fetch_eprints(tmp_path/"good", Wanted(categories=("math.*", "cs.*"), most=12), config_of(address))
        good, once = tree(tmp_path/"good"), len(arxiv.asked)
        settings = ini(tmp_path, address)
        for _ in range(5):
            kill_at[0] = next(deaths, -1)
            process[0] = subprocess.Popen([*CLI, "fetch", tmp_path/"killed", *arguments, "--settings", settings], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            _, said = process[0].communicate(timeout=120)
            if process[0].returncode == 0: break
            assert process[0].returncode == -signal.SIGKILL, said
            died += 1
            seen = {n: d for n, d in tree(tmp_path/"killed").items() if not Path(n).name.startswith(".")}
            assert seen.items() <= good.items() # whatever has a name is whole
    assert died == 4 and process[0].returncode == 0
    assert tree(tmp_path/"killed") == good and not leftovers(tmp_path/"killed")
    assert len(arxiv.asked) - once == once + died # a kill costs one request, not all that went before

# Bulk tars

@pytest.fixture
def paid(mini, monkeypatch):
    "The miniature in a bucket whose readers pay."
    pytest.importorskip("moto")
    s3fs = pytest.importorskip("s3fs")
    faults = {}
    with serving_s3(mini, fault=lambda n, path: faults.get(n) or faults.get(Path(path).name)) as (address, bucket):
        for name, value in dict(AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID="AKIAEXAMPLE", AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true").items(): monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1") # our own tries are what is tested
        s3fs.S3FileSystem.clear_instance_cache()
        bucket.faults = faults
        yield bucket
    s3fs.S3FileSystem.clear_instance_cache()

def tars(folder): return {n: d for n, d in tree(folder).items() if n.endswith(".tar")}

def test_tars_from_a_bucket(mini, paid, tmp_path):
    bills = []
    def agree(bill): bills.append(bill); return True
    done = bulk.fetch_bulk(tmp_path, agree=agree)
    assert tars(tmp_path) == tars(mini) and done["fetched"] == 6 and paid.refused == 0
    size = sum(len(d) for d in tars(mini).values())
    assert bills[0]["to_fetch_gb"] == round(size/1e9, 6) and paid.sent == size + (mini/bulk.MANIFEST).stat().st_size
    again = bulk.fetch_bulk(tmp_path, agree=agree)
    assert again["fetched"] == 0 and len(bills) == 1 # nothing to pay for, nothing to ask
    from arxiv_study.corpus.archives import check_manifest
    check_manifest(tmp_path)

@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("fault", ["cut", "flip"])
def test_a_bad_line_to_the_bucket(mini, paid, tmp_path, fault, streams):
    first = {"arXiv_src_1505_001.tar": fault, "arXiv_src_1503_001.tar": fault} # the first time that each is asked for
    paid.fault = lambda n, path: first.pop(Path(path).name, None)
    bulk.fetch_bulk(tmp_path, FetchConfig(backoff_s=0., streams=streams))
    assert tars(tmp_path) == tars(mini) and not leftovers(tmp_path)
    assert paid.n == 1 + 6 + 2 # the manifest, the tars, and again what was bad of two of them

@pytest.mark.parametrize("streams", [2, 3, 6])
def test_tars_come_side_by_side(mini, paid, tmp_path, streams):
    "No GET of a tar is answered before so many are there: one stream less would wait for ever. The bytes, the bill and the requests are those of one stream."
    import threading
    bills, paid.together = [], threading.Barrier(streams, timeout=60)
    bulk.fetch_bulk(tmp_path/"many", FetchConfig(streams=streams), agree=lambda bill: bills.append(bill) or True)
    many, paid.together, paid.n, paid.sent = (paid.n, paid.sent), None, 0, 0
    assert paid.most_open == streams
    bulk.fetch_bulk(tmp_path/"one", FetchConfig(streams=1), agree=lambda bill: bills.append(bill) or True)
    assert tars(tmp_path/"many") == tars(tmp_path/"one") == tars(mini) and not leftovers(tmp_path)
    assert bills[0] == bills[1] and many == (paid.n, paid.sent) == (7, sum(map(len, tars(mini).values())) + (mini/bulk.MANIFEST).stat().st_size)

@pytest.mark.parametrize("streams", [1, 3])
def test_parts_of_several_tars_are_not_paid_for_twice(mini, paid, tmp_path, streams):
    "As a kill leaves them; one is longer than its tar, which no fetch of ours makes of it."
    (tmp_path/".fetch").mkdir()
    have = 0
    for k, (name, data) in enumerate(list(tars(mini).items())[:4]):
        (tmp_path/".fetch"/(Path(name).name + ".part")).write_bytes(data[:len(data)*k//4] if k else data + b"more")
        have += len(data)*k//4
    bulk.fetch_bulk(tmp_path, FetchConfig(streams=streams))
    assert tars(tmp_path) == tars(mini) and not leftovers(tmp_path)
    assert paid.sent == (mini/bulk.MANIFEST).stat().st_size + sum(map(len, tars(mini).values())) - have

@pytest.mark.parametrize("streams", [1, 3])
def test_one_tar_that_is_bad_ends_the_others(mini, paid, tmp_path, streams):
    "It is named, nothing more is begun, and what the others have got is not fetched again."
    bad, size = "arXiv_src_1504_001.tar", sum(map(len, tars(mini).values()))
    paid.faults[bad] = "flip"
    with pytest.raises(StudyError, match=f"{bad} has MD5 sum"): bulk.fetch_bulk(tmp_path, FetchConfig(backoff_s=0., streams=streams))
    if streams == 1: assert paid.n == 1 + 1 + 2 and not leftovers(tmp_path) # the manifest, the tar before it, and twice the bad one
    assert all(data == tars(mini)[name] for name, data in tars(tmp_path).items()) and f"src/{bad}" not in tars(tmp_path)
    have, paid.sent = sum(map(len, tars(tmp_path).values())), 0
    del paid.faults[bad]
    bulk.fetch_bulk(tmp_path, FetchConfig(streams=streams))
    assert tars(tmp_path) == tars(mini) and paid.sent == size - have + (mini/bulk.MANIFEST).stat().st_size

def test_killed_with_several_on_their_way(mini, paid, tmp_path):
    "SIGKILL when the fifth tar of three at once is asked for: two are there for good, and the kill costs no more than the three that were on their way."
    path, process, left = ini(tmp_path, "http://127.0.0.1:1", bulk="s3://arxiv", streams=3), [None], [5]
    def fault(n, path):
        left[0] -= path.endswith(".tar")
        if left[0] == 0: os.kill(process[0].pid, signal.SIGKILL)
    paid.fault = fault
    for code in (-signal.SIGKILL, 0):
        process[0] = subprocess.Popen([*CLI, "fetch", tmp_path/"data", "--bulk", "--yes", "--quiet", "--settings", path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _, said = process[0].communicate(timeout=120)
        assert process[0].returncode == code, said
        there = tars(tmp_path/"data")
        assert len(there) >= 2 and all(data == tars(mini)[name] for name, data in there.items())
        left[0] = -1
    assert there == tars(mini) and not leftovers(tmp_path/"data") and paid.n <= 2 + 6 + 3 # two manifests

def test_nothing_is_paid_for_unasked_or_twice(mini, paid, tmp_path):
    assert bulk.fetch_bulk(tmp_path, agree=lambda bill: False)["fetched"] == 0
    manifest = (mini/bulk.MANIFEST).stat().st_size
    assert paid.sent == manifest and not tars(tmp_path)
    name, data = list(tars(mini).items())[0]
    (tmp_path/".fetch"/(Path(name).name + ".part")).write_bytes(data[:len(data)//2]) # as a kill leaves it
    bulk.fetch_bulk(tmp_path)
    assert tars(tmp_path) == tars(mini) and paid.sent == 2*manifest + sum(map(len, tars(mini).values())) - len(data)//2

def test_who_may_not_read_the_bucket(paid, tmp_path, monkeypatch):
    import s3fs
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"): monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path/"none")); monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path/"none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StudyError, match="wants your Amazon account"): bulk.fetch_bulk(tmp_path/"data")

def test_a_damaged_bucket(mini, paid, tmp_path):
    paid.faults.update({n: "flip" for n in (2, 3)})
    with pytest.raises(StudyError, match="as its manifest says"): bulk.fetch_bulk(tmp_path, FetchConfig(backoff_s=0., streams=1))
    assert not tars(tmp_path) and not leftovers(tmp_path)

LOUD = "import logging; logging.basicConfig(level=logging.DEBUG)\n" # everything that any package has to say
CRASHING = "from arxiv_study.corpus import bulk\nbulk.is_there = lambda *about: 1/0\n" # an error that nobody foresaw, after the store was opened

@pytest.mark.parametrize("before, month, code", [("", "0704", 0), (LOUD, "0704", 0), (LOUD + CRASHING, "0704", 1), (LOUD, "1504", 1)], ids=["quiet", "loud", "loud crash", "loud refusal"])
def test_no_secret_is_written_or_said(paid, tmp_path, monkeypatch, before, month, code):
    "Neither the key nor the token of a session, in what is printed, logged or written; also where it goes wrong."
    token = "FwoGZXIvYXdzEXAMPLETOKEN"
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    path = ini(tmp_path, "http://127.0.0.1:1", bulk="s3://arxiv", tries=2)
    paid.faults["arXiv_src_1504_001.tar"] = "flip"
    said = subprocess.run([sys.executable, "-c", f"{before}from arxiv_study.cli import main\nmain()", "fetch", tmp_path/"data", "--bulk", "--yes", "--month", month, "--settings", path], capture_output=True, text=True, timeout=120)
    assert said.returncode == code and ("DEBUG" in said.stderr) == (LOUD in before), said.stderr[-2000:]
    assert ("ZeroDivisionError" in said.stderr) == (CRASHING in before)
    for secret in (SECRET, token):
        assert secret not in said.stdout + said.stderr
        for file in (tmp_path/"data").rglob("*"):
            if file.is_file(): assert secret.encode() not in file.read_bytes()

def test_the_account_comes_from_the_chain_alone(mini, paid, tmp_path):
    "fsspec's own settings would come before it."
    (tmp_path/"fsspec").mkdir()
    (tmp_path/"fsspec"/"s3.json").write_text(json.dumps({"s3": {"key": "AKIAFILE", "secret": "other"}}))
    program = f"from arxiv_study.corpus.bulk import fetch_bulk\nfetch_bulk({str(tmp_path/'data')!r}, months='0704', quiet=True)"
    for more in ({"FSSPEC_S3_KEY": "AKIAOTHER", "FSSPEC_S3_SECRET": "other"}, {"FSSPEC_S3": json.dumps({"anon": True})}, {"FSSPEC_CONFIG_DIR": str(tmp_path/"fsspec")}):
        said = subprocess.run([sys.executable, "-c", program], env=os.environ | more, capture_output=True, text=True, timeout=120)
        assert said.returncode == 0, said.stderr
    assert paid.keys == {"AKIAEXAMPLE"} and paid.refused == 0

def test_a_bill_wants_someone_to_agree(mini, tmp_path):
    path = ini(tmp_path, "http://127.0.0.1:1", bulk=mini)
    said = subprocess.run([*CLI, "fetch", tmp_path/"data", "--bulk", "--settings", path], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert said.returncode == 2 and "--yes" in said.stderr and "GB" in said.stderr and not tars(tmp_path/"data")

def test_tars_from_memory_and_by_month(mini, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for path in (mini/"src").iterdir(): memory.pipe_file(f"/mirror/src/{path.name}", path.read_bytes())
    try: bulk.fetch_bulk(tmp_path, FetchConfig(bulk="memory://mirror"), months="0704")
    finally: memory.rm("/mirror", recursive=True)
    assert {n for n in tars(tmp_path)} == {n for n in tars(mini) if "_0704_" in n} and len(tars(tmp_path)) == 2

def test_a_mirror_on_the_web(mini, tmp_path):
    "One that can send stretches of a file, and one that always sends all of it: what is cut from that would be the wrong stretch."
    pytest.importorskip("aiohttp")
    import functools, threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    handler = type("Quiet", (SimpleHTTPRequestHandler,), dict(log_message=lambda self, *about: None))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=mini))
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
    config = FetchConfig(bulk=f"http://127.0.0.1:{server.server_port}")
    try:
        bulk.fetch_bulk(tmp_path/"all", config) # the miniature's tars are one stretch each
        name, data = list(tars(mini).items())[0]
        (tmp_path/"rest"/".fetch").mkdir(parents=True)
        (tmp_path/"rest"/".fetch"/(Path(name).name + ".part")).write_bytes(data[:len(data)//2])
        with pytest.raises(StudyError, match="in stretches; choose another mirror"): bulk.fetch_bulk(tmp_path/"rest", config)
    finally: server.shutdown(); server.server_close()
    assert tars(tmp_path/"all") == tars(mini)

def test_a_manifest_that_leads_out_of_the_folder(mini, tmp_path):
    evil = tmp_path/"evil"
    shutil.copytree(mini/"src", evil/"src")
    text = (evil/bulk.MANIFEST).read_text()
    (evil/bulk.MANIFEST).write_text(text.replace("src/arXiv_src_0704_001.tar", "src/../../../escaped.tar"))
    with pytest.raises(StudyError, match="do not trust"): bulk.fetch_bulk(tmp_path/"data", FetchConfig(bulk=str(evil)))
    assert not list(tmp_path.glob("escaped*"))

def test_tars_and_single_eprints_do_not_mix(mini, stock, tmp_path):
    "Where there are tars the corpus stage reads nothing else."
    with serving(arxiv := Arxiv(*stock)) as address:
        bulk.fetch_bulk(tmp_path/"tars", FetchConfig(bulk=str(mini)), months="0704")
        with pytest.raises(StudyError, match="another folder"): fetch_eprints(tmp_path/"tars", Wanted(most=1), config_of(address))
        assert not arxiv.asked
        fetch_eprints(tmp_path/"single", Wanted(most=1), config_of(address))
        with pytest.raises(StudyError, match="another folder"): bulk.fetch_bulk(tmp_path/"single", FetchConfig(bulk=str(mini)))
    assert not tars(tmp_path/"single")

# All of it

def conserves(out, n):
    "The ledger has a row a paper and balances."
    import polars as pl
    from arxiv_study.corpus.ledger import check_conservation
    from arxiv_study.corpus.pipeline import open_ledger
    ledger = open_ledger(out)
    ledger = ledger.collect() if isinstance(ledger, pl.LazyFrame) else ledger
    check_conservation(ledger)
    assert ledger.height == n
    return ledger

def test_from_nothing_to_a_ledger(tmp_path):
    "The two commands of the documentation, against a server."
    write_miniature(tmp_path/"mini", 120, 3)
    records, payloads = read_folder(tmp_path/"mini")
    records = [dict(r, categories=f"{r['categories']} math.AG") if r["categories"].startswith("math.") and "math.AG" not in r["categories"] else r for r in records]
    truth = {t["id"]: t for t in map(json.loads, (tmp_path/"mini"/"truth.jsonl").read_text().splitlines())}
    want = {r["id"] for r in records if "math.AG" in r["categories"].split() and "creativecommons" in (r["license"] or "") and truth[r["id"]]["reason"] != "withdrawn"}
    assert len(want) >= 8
    with serving(Arxiv(records, payloads, page=50)) as address:
        path = ini(tmp_path, address)
        said = subprocess.run([*CLI, "fetch", tmp_path/"data", "--category", "math.AG", "--max", "200", "--licence", "cc", "--settings", path, "--json"], capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stderr
    summary = json.loads(said.stdout)[0]
    assert summary["asked"] == len(want)
    made = subprocess.run([*CLI, "corpus", "--arxiv", tmp_path/"data", "--out", tmp_path/"corpus", "--workers", "1"], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    ledger = conserves(tmp_path/"corpus", len(want))
    for row in ledger.iter_rows(named=True):
        t = truth[row["id"]]
        assert row["license"].startswith("http://creativecommons.org/")
        if t["fate"] == "source": assert row["stage"] not in ("metadata", "archive"), row # what the tars would have given

@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/arxiv here")
def test_real_sources(tmp_path):
    records, payloads = read_folder(SHARED)
    with serving(Arxiv(records, payloads, page=500)) as address:
        summary = fetch_eprints(tmp_path, Wanted(categories=("math.AG", "math.GN"), licence="redistributable", most=30), config_of(address))
    from arxiv_study.corpus.archives import find_sources
    got = {i: bytes(p) for s in find_sources(tmp_path) for i, p in s.sources() if isinstance(p, bytes)}
    assert summary["whole"] >= 1 and all(payloads[i] == data for i, data in got.items())
