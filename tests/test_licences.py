"""Every distribution that the constraints pin may be used and passed on, and none of them is known to be vulnerable where the registry tells."""
import re, shutil, subprocess, sys
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


def test_no_known_vulnerability():
    "pip-audit, where it is installed and the registry answers it"
    if shutil.which("pip-audit") is None: pytest.skip("pip-audit is not installed, and is no dependency; where the registry answers it: pip install pip-audit")
    answer = subprocess.run(["pip-audit", "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--progress-spinner", "off"], capture_output=True, text=True, timeout=300)
    if re.search(r"ConnectionError|ServiceError|HTTPError|Max retries|HTTPSConnectionPool", answer.stderr): pytest.skip(f"the registry does not answer pip-audit: {answer.stderr.strip().splitlines()[-1][:200]}")
    assert answer.returncode == 0, answer.stdout
