"""Servers that speak arXiv's protocols, fed from an arXiv folder, with the manners of bad days.

The OAI-PMH side follows arXiv's own server (github.com/arXiv/oaipmh): records in the order of their datestamps; a token that holds the query, from the day of the
next record on, and how many of that day to skip; no list from a day before the oldest record's; errors with status 200. An empty token closes a list that was resumed, as the protocol asks. E-prints come as arXiv sends them: gzipped, chunked, without an announced length."""
import json, re, tarfile, threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape, quoteattr

PHYSICS = set("astro-ph cond-mat gr-qc hep-ex hep-lat hep-ph hep-th math-ph nlin nucl-ex nucl-th physics quant-ph".split())
WITHDRAWN = b"<!DOCTYPE html><html><body><h1>Withdrawn</h1>This paper has been withdrawn by its authors; no source is available.</body></html>"
ROBOT = b"<!DOCTYPE html><html><head><title>arXiv</title></head><body>Please show that you are not a robot.</body></html>"


def read_folder(folder):
    "Records in the order of the snapshot, and payloads by id, without the help of the library."
    records = [json.loads(line) for line in (Path(folder)/"arxiv-metadata-oai-snapshot.json").read_text(encoding="utf-8").splitlines()]
    payloads = {}
    for path in sorted((Path(folder)/"src").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isfile(): continue
                stem = re.sub(r"\.(gz|pdf)$", "", member.name.rpartition("/")[2])
                old = re.fullmatch(r"([a-z-]+)(\d{7})", stem)
                payloads[f"{old[1]}/{old[2]}" if old else stem] = tar.extractfile(member).read()
    return records, payloads


def sets_of(record):
    "The sets of a record, most precise ones."
    cats = record["categories"].split()
    return [f"{'physics' if (a := c.partition('.')[0]) in PHYSICS else a}:{c.replace('.', ':')}" for c in cats]


def record_xml(r, prefix, deleted=False):
    "A record as arXiv words it."
    header = f"<identifier>oai:arXiv.org:{r['id']}</identifier><datestamp>{r['update_date']}</datestamp>" + "".join(f"<setSpec>{s}</setSpec>" for s in sets_of(r))
    if deleted: return f'<record><header status="deleted">{header}</header></record>'
    fields = {k: r.get(k) for k in ("title", "categories", "comments", "report-no", "journal-ref", "doi", "license", "abstract")}
    rest = "".join(f"<{k}>{escape(v)}</{k}>" for k, v in fields.items() if v)
    if prefix == "arXivRaw":
        versions = "".join(f'<version version="{v["version"]}"><date>{v["created"]}</date><size>{v.get("size", "12kb")}</size>'
                           + (f"<source_type>{v['source_type']}</source_type>" if v.get("source_type") else "") + "</version>" for v in r["versions"])
        body = f"<submitter>{escape(r['submitter'] or '')}</submitter>{versions}<authors>{escape(r['authors'])}</authors>{rest}"
    else:
        from email.utils import parsedate_to_datetime
        authors = "".join(f"<author><keyname>{escape(k)}</keyname><forenames>{escape(f)}</forenames></author>" for k, f, *_ in r["authors_parsed"])
        body = f"<created>{parsedate_to_datetime(r['versions'][0]['created']):%Y-%m-%d}</created><authors>{authors}</authors>{rest}"
    return f'<record><header>{header}</header><metadata><{prefix} xmlns="http://arxiv.org/OAI/{prefix}/"><id>{r["id"]}</id>{body}</{prefix}></metadata></record>'


def oai_document(inside):
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">\n<responseDate>2026-11-26T10:00:00Z</responseDate>\n'
            f"<request>http://arxiv.org/oai</request>\n{inside}\n</OAI-PMH>").encode()


class Arxiv:
    """What the server has, how it behaves, and what it was asked.

    `fault(n, path)` is asked before the n-th answer, from 1, and names what goes wrong: busy, reset, cut, slow, robot, flip, expire, again, empty, big, endless, bomb, forbidden;
    or it is called when half of the answer has gone out, which is then cut."""
    def __init__(self, records, payloads, page=7, announced=False, fault=lambda n, path: None, clock=time.monotonic, deleted=(), withdrawn=(), retry_after="7", earliest=None):
        self.records, self.payloads, self.page, self.announced, self.fault, self.clock = records, payloads, page, announced, fault, clock
        self.deleted, self.withdrawn, self.retry_after = set(deleted), set(withdrawn), retry_after
        self.earliest, self.last_list = earliest or min((r["update_date"] for r in records), default="2005-09-16"), b""
        self.asked, self.times, self.headers, self.now_open, self.most_open, self.lock = [], [], [], 0, 0, threading.Lock()

    def error(self, code): return oai_document(f"<error code={quoteattr(code)}>{code}, says the server</error>")

    def oai(self, query, expired=False, again=False):
        "The answer to a query; `again`: the list that was answered last."
        q = dict(parse_qsl(query))
        match q.get("verb"):
            case "Identify": return oai_document(f"<Identify><repositoryName>arXiv</repositoryName><earliestDatestamp>{self.earliest}</earliestDatestamp><deletedRecord>persistent</deletedRecord><granularity>YYYY-MM-DD</granularity></Identify>")
            case "GetRecord":
                found = [r for r in self.records if q["identifier"] == f"oai:arXiv.org:{r['id']}"]
                return oai_document(f"<GetRecord>{record_xml(found[0], q['metadataPrefix'])}</GetRecord>") if found else self.error("idDoesNotExist")
            case "ListRecords": return self.last_list if again else self.list_records(q, expired)
            case _: return self.error("badVerb")

    def list_records(self, q, expired):
        "A page of a list."
        resumed, skip = "resumptionToken" in q, 0
        if resumed:
            if expired or len(q) > 2: return self.error("badResumptionToken")
            q = dict(parse_qsl(unquote(q["resumptionToken"])))
            skip = int(q.pop("skip"))
        if q.get("metadataPrefix") not in ("arXiv", "arXivRaw"): return self.error("cannotDisseminateFormat")
        first, last = q.get("from", self.earliest), q.get("until", "9999")
        if first < self.earliest or first > last: return self.error("badArgument")
        found = [r for r in self.records if ("set" not in q or any(f"{s}:".startswith(f"{q['set']}:") for s in sets_of(r))) and first <= r["update_date"] <= last]
        found.sort(key=lambda r: (r["update_date"], r["id"]))
        page, rest = found[skip:skip + self.page], found[skip + self.page:]
        if not page: return self.error("noRecordsMatch")
        token = "<resumptionToken/>" if resumed else ""
        if rest:
            day = rest[0]["update_date"]
            q |= dict(skip=skip + self.page) if page[0]["update_date"] == day else {"from": day, "skip": sum(r["update_date"] == day for r in page)}
            token = f"<resumptionToken expires='2026-11-27T00:00:00Z'>{escape(quote(urlencode(q)))}</resumptionToken>"
        self.last_list = oai_document(f"<ListRecords>{''.join(record_xml(r, q['metadataPrefix'], r['id'] in self.deleted) for r in page)}{token}</ListRecords>")
        return self.last_list


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *about): pass

    def answer(self, status, data, kind, announced=True, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.send_header(*(("Content-Length", str(len(data))) if announced else ("Transfer-Encoding", "chunked")))
        if not data: self.close_account()
        self.end_headers()
        is_cut = self.fault == "cut" or callable(self.fault)
        half = len(data)//2 if is_cut else len(data)
        if announced:
            self.wfile.write(data[:half - 1])
            self.close_account()
            self.wfile.write(data[max(0, half - 1):half])
        else:
            for start in range(0, half, 1000):
                piece = data[start:min(start + 1000, half)]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.close_account()
            if not is_cut: self.wfile.write(b"0\r\n\r\n")
        if callable(self.fault):
            self.wfile.flush()
            time.sleep(.2) # until it has arrived
            self.fault()
        self.close_connection = True

    def do_GET(self):
        a = self.server.arxiv
        with a.lock:
            a.asked.append(self.path); a.times.append(a.clock()); a.headers.append(dict(self.headers))
            a.now_open, self.counted = a.now_open + 1, True
            a.most_open = max(a.most_open, a.now_open)
            n = len(a.asked)
        try: self.reply(a, n)
        except (BrokenPipeError, ConnectionResetError): pass # whoever asked has left
        finally: self.close_account()

    def close_account(self):
        "The answer is over once its last byte is about to go: whoever asks next may do so before this thread has ended."
        with self.server.arxiv.lock: self.server.arxiv.now_open, self.counted = self.server.arxiv.now_open - self.counted, False

    def reply(self, a, n):
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.fault = a.fault(n, self.path)
        if self.fault == "reset": self.close_connection = True; return
        if self.fault == "busy": return self.answer(503, b"<html>busy</html>", "text/html", Retry_After=a.retry_after)
        if self.fault == "forbidden": return self.answer(403, ROBOT, "text/html")
        if self.fault == "robot": return self.answer(200, ROBOT, "text/html; charset=utf-8")
        if self.fault == "empty": return self.answer(200, b"", "application/octet-stream")
        if self.fault == "bomb": return self.answer(200, b'<!DOCTYPE a [<!ENTITY b "ha"><!ENTITY c "' + b"&b;"*99 + b'">]><a>&c;</a>', "text/xml")
        if self.fault == "big": self.send_response(200); self.send_header("Content-Length", str(1<<45)); self.end_headers(); self.close_connection = True; return
        if self.fault in ("slow", "endless"): return self.drip()
        if path == "/oai": return self.answer(200, a.oai(query, self.fault == "expire", self.fault == "again"), "text/xml", announced=False)
        if m := re.fullmatch(r"/moved/(.*)", path): return self.answer(301, b"", "text/html", Location=f"/e-print/{m[1]}")
        if m := re.fullmatch(r"/away/(.*)", path): return self.answer(302, b"", "text/html", Location=f"http://localhost:9/e-print/{m[1]}")
        paper = unquote(path.removeprefix("/e-print/"))
        if paper in a.withdrawn: return self.answer(200, WITHDRAWN, "text/html; charset=utf-8")
        if (data := a.payloads.get(paper)) is None: return self.answer(404, b"<html>no such paper</html>", "text/html")
        if self.fault == "flip": data = data[:len(data)//2] + bytes([data[len(data)//2] ^ 1]) + data[len(data)//2 + 1:]
        kind = "application/pdf" if data[:4] == b"%PDF" else "application/gzip"
        self.answer(200, data, kind, announced=a.announced, Content_Encoding="x-gzip")

    def drip(self):
        "Bytes one by one for ever, or very many."
        self.send_response(200)
        self.end_headers()
        piece, wait_s = (b"x", .02) if self.fault == "slow" else (b"\x1f\x8b" + bytes(1<<16), 0)
        while True:
            self.wfile.write(piece)
            self.wfile.flush()
            time.sleep(wait_s)


@contextmanager
def serving(arxiv, context=None): # context: of TLS
    "Yields the address of a server."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.arxiv, server.handle_error = True, arxiv, lambda *about: None
    if context: server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True)
    thread.start()
    try: yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class PaidBucket:
    """Moto's S3 as a bucket whose readers pay: who does not say that they pay, or does not sign, is refused.

    `fault(n, path)` is asked before the n-th GET of an object, from 1: cut or flip. Each answer takes `wait_s`, or waits until `together` of the GETs of tars have come."""
    def __init__(self, app, fault=lambda n, path: None):
        self.app, self.fault, self.wait_s, self.together, self.lock = app, fault, 0, None, threading.Lock()
        self.n, self.sent, self.refused, self.now_open, self.most_open, self.keys = 0, 0, 0, 0, 0, set()

    def __call__(self, environ, start):
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET" or path.startswith("/moto-api"): return self.app(environ, start)
        who = re.search(r"Credential=([^/]*)/", environ.get("HTTP_AUTHORIZATION", ""))
        if who is None or environ.get("HTTP_X_AMZ_REQUEST_PAYER") != "requester":
            self.refused += 1
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        with self.lock:
            self.keys.add(who[1])
            self.n, self.now_open, n = self.n + 1, self.now_open + 1, self.n + 1
            self.most_open = max(self.most_open, self.now_open)
        fault = self.fault(n, path)
        time.sleep(self.wait_s)
        if self.together and path.endswith(".tar"): self.together.wait()
        def started(status, headers, *more): # a store that rots does not tell the sum of what it sends
            return start(status, [h for h in headers if fault != "flip" or not h[0].lower().startswith("x-amz-checksum")], *more)
        data = b"".join(self.app(environ, started))
        if fault == "flip": data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "cut": data = data[:len(data)//2]
        with self.lock: self.sent, self.now_open = self.sent + len(data), self.now_open - 1
        return [data]


@contextmanager
def serving_s3(folder, bucket="arxiv", fault=lambda n, path: None): # folder: an arXiv folder
    "Yields the address of an S3 server with the folder's src/ in a bucket whose readers pay, and the bucket."
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    guard = PaidBucket(DomainDispatcherApplication(create_backend_app), fault)
    server = make_server("127.0.0.1", 0, guard, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        owner = boto3.client("s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="owner", aws_secret_access_key="owner")
        owner.create_bucket(Bucket=bucket)
        for path in sorted((Path(folder)/"src").iterdir()): owner.put_object(Bucket=bucket, Key=f"src/{path.name}", Body=path.read_bytes())
        yield address, guard
    finally:
        server.shutdown()
        thread.join(5)
