"""Every distribution that the constraints pin may be used and passed on, and none of them is known to be vulnerable where the registry tells."""
import json, os, re, shutil, subprocess, sys, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import Distribution, distribution, metadata, PackageNotFoundError
from pathlib import Path
import pytest

CONSTRAINTS = Path(__file__).parents[1]/"constraints.txt"
# Words of SPDX expressions, classifiers and free text: permissive licences, and MPL-2.0, whose copyleft ends at its own files.
ALLOWED = re.compile(r"\b(MIT(-0|-CMU)?|Apache([- ]2(\.0)?)?|BSD([- ][023]-Clause)?|0BSD|[23]-Clause BSD|ISC|PSF(-2\.0|L)?|Python Software Foundation|MPL-2\.0|Mozilla Public License 2\.0|Zlib|BSL-1\.0|CC0-1\.0|CNRI-Python|Public Domain|Academic Free License)\b", re.I)
REFUSED = re.compile(r"\b(A?GPL|LGPL|GNU|SSPL|BUSL|Commons Clause|Proprietary|Other/Proprietary|CC-BY-NC|non-?commercial)", re.I)
# Used as they come from the registry, unchanged and not passed on by us: the library's copyleft asks no more of who only imports it.
NAMED = {"chardet": "LGPL, imported unchanged, by a package of the extra `bench`",
         "pyppmd": "LGPL, the extra `baselines` alone: a compressor that the study compares with",
         "dominate": "LGPL, comes with a package of the extra `evaluate`, and nothing of ours imports it",
         "docutils": "public domain and BSD, with some files under the GPL that Sphinx does not load"}


def pinned():
    "Names of the constraints file"
    return re.findall(r"^([A-Za-z0-9._-]+)==", CONSTRAINTS.read_text(encoding="utf-8"), re.M)


def statements(found: Distribution):
    "What a distribution says of its licence: the SPDX expression alone where it has one, since it is the newest and most exact; where it only encloses the text, its first line"
    said = found.metadata
    if said.get("License-Expression"): return [said["License-Expression"]]
    classifiers = [c.split(" :: ")[-1] for c in said.get_all("Classifier") or [] if c.startswith("License")]
    free_text = (said.get("License") or "").strip()
    stated = classifiers + [free_text[:400]] * (free_text not in ("", "UNKNOWN"))
    return stated or [text.strip().splitlines()[0] for name in said.get_all("License-File") or [] if (text := found.read_text(f"licenses/{name}"))]


def complaint(name, said):
    "Why a licence is not accepted, or nothing"
    if name in NAMED: return ""
    if not said: return f"{name} states no licence"
    refused = [s for s in said if REFUSED.search(s)]
    if refused: return f"{name} is under {refused[0]}"
    return "" if any(ALLOWED.search(s) for s in said) else f"{name} states {said}, which is not on the list"


def test_licences_permit_reuse():
    installed = {}
    for name in pinned():
        try: installed[name] = distribution(name)
        except PackageNotFoundError: continue
    assert len(installed) >= 20, "hardly anything of constraints.txt is installed: install with the Makefile"
    assert list(filter(None, (complaint(name, statements(found)) for name, found in installed.items()))) == []


def test_exceptions_are_needed():
    "A name leaves the list when its package does"
    assert set(NAMED) <= set(pinned())


@pytest.mark.parametrize("said", [["AGPL-3.0-only"], ["GNU General Public License v3 (GPLv3)"], ["Free for non-commercial use"], ["BUSL-1.1"], ["Apache-2.0 AND Proprietary"], ["Our own terms"], []])
def test_other_licences_are_refused(said): assert complaint("a-package", said)


@pytest.mark.parametrize("said", [["MIT"], ["BSD License"], ["Apache-2.0 OR BSD-2-Clause"], ["ISC License (ISCL)"], ["MPL-2.0 AND MIT"]])
def test_permissive_ones_are_not(said): assert not complaint("a-package", said)


def test_ours_is_stated():
    "What we ask of others"
    assert metadata("arxiv-study").get("License-Expression") == "Apache-2.0" or "Apache" in (CONSTRAINTS.parent/"LICENSE").read_text(encoding="utf-8")[:300]


# Vulnerabilities

PROGRAM = shutil.which("pip-audit", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
with_pip_audit = pytest.mark.skipif(PROGRAM is None, reason="pip-audit is not installed, and is no dependency; where the registry has it: pip install -c constraints.txt pip-audit")


def audit(requirements, *options):
    "pip-audit's table of a file of pins, or None and its last words where the service did not answer"
    answer = subprocess.run([PROGRAM, "--requirement", str(requirements), "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", *options], capture_output=True, text=True, timeout=300)
    try: return json.loads(answer.stdout)["dependencies"], ""
    except (ValueError, KeyError): return None, (answer.stderr.strip().splitlines() or ["nothing was said"])[-1][:200]


def findings(table):
    "Known vulnerabilities by package, and the packages that the service does not know"
    return ({f"{p['name']} {p['version']}": [v["id"] for v in p["vulns"]] for p in table if p.get("vulns")}, [p["name"] for p in table if "skip_reason" in p])


def judge(requirements, *options):
    "Fail where a pin is known to be vulnerable; skip, and say so, where nobody knows: no news is good news only from who has news"
    table, words = audit(requirements, *options)
    if table is None: pytest.skip(f"the service of known vulnerabilities does not answer: {words}")
    vulnerable, unknown = findings(table)
    assert vulnerable == {}
    if len(unknown) > len(table)//20: pytest.skip(f"the service of known vulnerabilities does not know {len(unknown)} of {len(table)} packages, {unknown[0]} among them")


@with_pip_audit
def test_no_known_vulnerability(): judge(CONSTRAINTS)


class Osv(BaseHTTPRequestHandler):
    "OSV's query by package and version, as its interface is documented; `status` other than 200: it is ill"
    known, status, asked, log_message = {}, 200, [], lambda self, *about: None
    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((query["package"]["name"], query["version"]))
        data = json.dumps(self.known.get(self.asked[-1], {})).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

OLD = ("jinja2", "2.4.1") # the example of OSV's documentation
VULNERABLE = {"vulns": [{"schema_version": "1.6.0", "id": "PYSEC-2014-8", "aliases": ["CVE-2014-1402"], "summary": "Files in a shared folder of temporary files are loaded", "modified": "2021-07-05T00:01:22Z", "published": "2014-05-19T14:55:00Z",
                         "affected": [{"package": {"name": "jinja2", "ecosystem": "PyPI", "purl": "pkg:pypi/jinja2"}, "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.7.2"}]}], "versions": ["2.4", "2.4.1"]}]}]}


@contextmanager
def osv(known=(), status=200):
    "Options for pip-audit to ask a server of our own, and what that is asked"
    handler = type("Planted", (Osv,), dict(known=dict(known), status=status, asked=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()
    try: yield ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/v1/query", "--timeout", "5"], handler.asked
    finally: server.shutdown(); server.server_close()


@with_pip_audit
def test_a_vulnerable_pin_is_found(tmp_path):
    "One old version among the pins, of which the service knows; and the same pins without it"
    name, version = OLD
    pins = CONSTRAINTS.read_text(encoding="utf-8")
    (tmp_path/"old.txt").write_text(re.sub(rf"(?mi)^{name}==.*$", f"{name}=={version}", pins), encoding="utf-8")
    with osv({OLD: VULNERABLE}) as (options, asked):
        judge(CONSTRAINTS, *options, "--cache-dir", str(tmp_path/"cache"))
        assert len(asked) == len(set(asked)) == len(pinned()) and OLD not in asked # nobody was left out
        with pytest.raises(AssertionError, match="PYSEC-2014-8"): judge(tmp_path/"old.txt", *options, "--cache-dir", str(tmp_path/"cache"))


@with_pip_audit
def test_a_service_that_does_not_answer_is_no_acquittal(tmp_path):
    "It is ill, and then it has gone"
    (tmp_path/"pins.txt").write_text(f"{OLD[0]}=={OLD[1]}\n")
    with osv({OLD: VULNERABLE}, status=503) as (options, asked):
        with pytest.raises(pytest.skip.Exception, match="does not answer"): judge(tmp_path/"pins.txt", *options)
        assert asked == [OLD]
    with pytest.raises(pytest.skip.Exception, match="does not answer"): judge(tmp_path/"pins.txt", *options)


def test_a_registry_without_the_service_is_no_acquittal(monkeypatch):
    "A mirror may have the packages and not what is known of them: pip-audit then ends with success"
    mirror = [dict(name=n, skip_reason=f"Dependency not found on PyPI and could not be audited: {n} (1.0)") for n in ("numpy", "torch")]
    monkeypatch.setitem(globals(), "audit", lambda *about: (mirror, ""))
    with pytest.raises(pytest.skip.Exception, match="does not know 2 of 2"): judge(CONSTRAINTS)
    mirror.append(dict(name="jinja2", version="2.4.1", vulns=[dict(id="PYSEC-2014-8", fix_versions=["2.7.2"], aliases=[], description="")]))
    with pytest.raises(AssertionError, match="PYSEC-2014-8"): judge(CONSTRAINTS) # what it does know counts
