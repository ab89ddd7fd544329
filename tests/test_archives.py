"""Payloads of any kind: what other tools have packed, what is damaged, what wants out, what wants all the memory there is."""
import bz2, gzip, io, json, lzma, os, random, shutil, subprocess, sys, tarfile, time, zipfile, zlib
from pathlib import Path

import pytest

from arxiv_study.corpus.archives import ArchiveRules, LongPayload, container_of, find_sources, loose_payload, paper_id, read_bulk_tar, read_source
from arxiv_study.corpus.ledger import Reason, check_conservation, rows_to_frame
from arxiv_study.corpus.pipeline import Clock, CorpusConfig, Judged, take_paper
from arxiv_study.settings import StudyError

PAPER = b"\\documentclass{article}\n\\begin{document}\n" + b"We show that every compact space is normal, and that the converse fails. " * 40 + b"\n\\end{document}\n"
KEEP = ArchiveRules(truncated="keep", damaged_tar="keep_readable")


def tar_of(files, kinds={}, format=tarfile.PAX_FORMAT):
    "A tar in memory; `kinds` gives the type of a member that is no plain file."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kinds.get(name, tarfile.REGTYPE)
            if name in kinds: member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()

def zip_of(files, method=zipfile.ZIP_DEFLATED, seekable=True):
    "A zip in memory; one written to a pipe has the sizes behind each file."
    out = io.BytesIO()
    target = out if seekable else type("Pipe", (), {"write": out.write, "flush": out.flush})()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in files.items(): archive.writestr(name, data)
    return out.getvalue()

def packed(data): return gzip.compress(data, 6, mtime=0)

def without_magic(tar):
    "The tar as Unix V7 wrote it: no magic word, sums of signed characters."
    data = bytearray(tar)
    data[257:265], data[148:156] = bytes(8), b" "*8
    data[148:156] = b"%06o\0 " % sum(b - 256*(b > 127) for b in data[:512])
    return bytes(data)


# Told by content

CONTAINERS = {
    "gnu": ("tar-gz", packed(tar_of({"d"*150 + "/main.tex": PAPER}, format=tarfile.GNU_FORMAT))), "pax": ("tar-gz", packed(tar_of({"é"*120 + "/main.tex": PAPER}))),
    "ustar": ("tar", tar_of({"d"*90 + "/" + "e"*50 + "/main.tex": PAPER}, format=tarfile.USTAR_FORMAT)), "v7": ("tar-gz", packed(without_magic(tar_of({"main.tex": PAPER})))),
    "v7, signed": ("tar", without_magic(tar_of({"ä/main.tex": PAPER}, format=tarfile.GNU_FORMAT))),
    "one file": ("gz-tex", packed(PAPER)), "plain": ("tex", PAPER), "bzip2": ("tar-bz2", bz2.compress(tar_of({"main.tex": PAPER}))), "xz": ("tar-xz", lzma.compress(tar_of({"main.tex": PAPER}))),
    "xz file": ("xz-tex", lzma.compress(PAPER)), "two streams": ("gz-tex", packed(PAPER[:99]) + packed(PAPER[99:])), "padded": ("gz-tex", packed(PAPER) + bytes(3000)), "NULs behind": ("gz-tex", packed(PAPER + bytes(700))),
    "zip": ("zip", zip_of({"main.tex": PAPER})), "stored": ("zip", zip_of({"main.tex": PAPER}, zipfile.ZIP_STORED)), "from a pipe": ("zip", zip_of({"fig.eps": bytes(9999), "main.tex": PAPER}, seekable=False)),
    "zip in gzip": ("zip", packed(zip_of({"main.tex": PAPER}))), "gzip in gzip": ("gz-tex", packed(packed(PAPER))), "tar in two gzips": ("tar-gz", packed(packed(tar_of({"main.tex": PAPER})))),
    "tar in tar": ("tar-gz", packed(tar_of({"paper.tar.gz": packed(tar_of({"main.tex": PAPER}))}))), "gz in tar": ("tar", tar_of({"a/main.tex.gz": packed(PAPER), "fig.ps.gz": packed(b"%!PS")})),
    "zip in zip": ("zip", zip_of({"p.zip": zip_of({"main.tex": PAPER})})), "UTF-16": ("gz-tex", packed(PAPER.decode().encode("utf-16"))), "UTF-16, no mark": ("gz-tex", packed(PAPER.decode().encode("utf-16-be"))),
    "cr": ("gz-tex", packed(PAPER.replace(b"\n", b"\r")))}

@pytest.mark.parametrize("name", CONTAINERS)
def test_the_paper_is_found_in_any_container(name):
    container, payload = CONTAINERS[name]
    source = read_source(payload)
    assert (source.container, container_of(payload)) == (container, container) and source.reason is None
    assert [t.rstrip("\n") for t in source.files.values()] == [PAPER.decode().rstrip("\n")] and [n.split("/")[-1] for n in source.files] == ["main.tex"]
    assert ("nested_archive" in source.repairs) == (" in " in name and name != "zip in gzip")
    assert source.tex_bytes == sum(len(t.encode()) for t in source.files.values())

@pytest.mark.parametrize("payload, container, reason", [
    (b"", "empty", "zero_bytes"), (bytes(5000), "empty", "zero_bytes"), (packed(b""), "empty", "zero_bytes"), (b"\n%PDF-1.5", "pdf", "pdf_only"), (packed(b"\x04%!PS"), "postscript", "postscript_only"),
    (b"\x1b%-12345X@PJL\n%!PS", "postscript", "postscript_only"), (b"\xc5\xd0\xd3\xc6" + bytes(28), "postscript", "postscript_only"), (packed(b"<?xml version='1.0'?><html/>"), "html", "html_only"),
    (b"\xf7\x02\x01", "dvi", "dvi_only"), (b"\x1f\x9d\x90abc", "compress", "unsupported_archive"), (b"7z\xbc\xaf\x27\x1c\0\4", "7z", "unsupported_archive"), (b"Rar!\x1a\x07\x00", "rar", "unsupported_archive"),
    (packed(packed(packed(PAPER))), "gz", "unsupported_archive"), (random.Random(0).randbytes(5000), "unknown", "not_text"), (packed(b"Dear editor,"), "gz-tex", "no_tex"), (tar_of({"a.eps": b""}), "tar", "no_tex"),
    (zip_of({}), "zip", "no_tex"), (zip_of({"a.zip": zip_of({"b.zip": zip_of({"main.tex": PAPER})})}), "zip", "no_tex"), (b"\x1f\x8b", "damaged", "truncated")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_payload_without_source_says_why(payload, container, reason):
    source = read_source(payload)
    assert (source.container, source.reason, source.files) == (container, reason, {}) and container_of(payload) == container

@pytest.mark.skipif(not shutil.which("zip"), reason="there is no zip program to make an encrypted archive")
def test_zips_of_the_zip_program(tmp_path):
    "Encrypted, from standard input, with a link: the program is the reference."
    (tmp_path/"main.tex").write_bytes(PAPER)
    (tmp_path/"link.tex").symlink_to("/etc/passwd")
    run = lambda *args, **kw: subprocess.run(["zip", "-q", *args], cwd=tmp_path, check=True, capture_output=True, **kw)
    run("-P", "secret", "a.zip", "main.tex")
    assert (source := read_source((tmp_path/"a.zip").read_bytes())).reason == Reason.unsupported_archive and source.repairs == dict(refused_encrypted=1)
    run("-y", "b.zip", "link.tex", "main.tex")
    assert (source := read_source((tmp_path/"b.zip").read_bytes())).repairs == dict(refused_link=1) and list(source.files) == ["main.tex"]
    piped = run("-", "-fz", "main.tex").stdout
    assert list(read_source(piped).files) == ["main.tex"]

def test_a_paper_outside_leaves_the_archives_inside_alone():
    source = read_source(packed(tar_of({"main.tex": PAPER, "old.tar.gz": packed(tar_of({"main.tex": b"\\documentclass{old}"}))})))
    assert source.files == {"main.tex": PAPER.decode()} and source.repairs == {} and source.other_files == ("old.tar.gz",)

def test_a_damaged_file_does_not_lose_the_paper():
    source = read_source(packed(tar_of({"main.tex": PAPER, "bad.tex": random.Random(0).randbytes(5000), "worse.tex": b"\xff\xfe" + b"\0\xd8"*9})))
    assert "main.tex" in source.files and "bad.tex" not in source.files
    assert source.repairs["unreadable_file"] == 1 and source.repairs["unreadable_bytes"] == 5000 and source.reason is None


# Refused, member by member

@pytest.mark.parametrize("name", ["../x.tex", "/etc/x.tex", "a/../../x.tex", "..\\x.tex", "C:\\x.tex", "a\nb.tex", "x"*1500 + ".tex"])
def test_paths_that_lead_outside_are_refused(name):
    for payload in (tar_of({name: b"evil", "main.tex": PAPER}), zip_of({name: b"evil", "main.tex": PAPER})):
        source = read_source(payload)
        assert list(source.files) == ["main.tex"] and sum(source.repairs.values()) == 1 and source.reason is None

@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"D", b"V"])
def test_members_that_are_no_files_are_refused(kind):
    source = read_source(packed(tar_of({"x.tex": b"", "main.tex": PAPER}, {"x.tex": kind})))
    assert list(source.files) == ["main.tex"] and sum(source.repairs.values()) == 1

@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar program to make sparse files")
@pytest.mark.parametrize("how", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"])
def test_sparse_files_of_the_tar_program(tmp_path, how):
    "Thirty pieces of a file of 3 GB: the map needs blocks of its own, and what follows is still found."
    with open(tmp_path/"a.tex", "wb") as f:
        for at in range(30):
            f.seek(at*100 << 20)
            f.write(b"text"*2000)
    (tmp_path/"main.tex").write_bytes(PAPER)
    tar = subprocess.run(["tar", "cS", how, *(["--format=posix"] if "version" in how else []), "a.tex", "main.tex"], cwd=tmp_path, capture_output=True, check=True).stdout
    assert len(tar) < 1 << 20
    source = read_source(tar)
    assert list(source.files) == ["main.tex"] and source.repairs == dict(refused_kind=1)

def test_limits():
    many = packed(tar_of({f"{i}.tex": b"" for i in range(99)}))
    assert read_source(many, ArchiveRules(max_members=50)).reason == Reason.too_large
    assert read_source(many, ArchiveRules(max_tex_files=98)).reason == Reason.too_large and read_source(many, ArchiveRules(max_tex_files=99)).reason == Reason.no_tex
    assert read_source(tar_of({"a.tex": PAPER, "b.tex": PAPER}), ArchiveRules(max_tex_bytes=len(PAPER)+9)).reason == Reason.too_large
    assert read_source(packed(PAPER), ArchiveRules(max_tex_bytes=100)).reason == Reason.too_large
    assert read_source(packed(tar_of({"a.eps": bytes(9999), "main.tex": PAPER})), ArchiveRules(max_bytes=9000)).reason == Reason.too_large
    assert read_source(packed(tar_of({"p.zip": zip_of({"main.tex": PAPER})})), ArchiveRules(max_held_bytes=100)).reason == Reason.too_large


# Cut short

def test_truncated_at_any_byte():
    "What is readable is what zlib can inflate."
    whole = packed(tar_of({"main.tex": PAPER, "fig.eps": random.Random(0).randbytes(3000)}))
    for n in range(0, len(whole), 7):
        source, kept = read_source(whole[:n]), read_source(whole[:n], KEEP)
        inflated = zlib.decompressobj(31).decompress(whole[:n])[512:512+len(PAPER)]
        assert source.files == {} and source.reason in (Reason.zero_bytes, Reason.truncated, Reason.not_text), n
        assert source.tex_bytes == kept.tex_bytes == len(inflated), n
        assert "".join(kept.files.values()).encode() == inflated.replace(b"\0", b"") and kept.repairs.get("truncated", 0) == bool(inflated.strip())

@pytest.mark.parametrize("pack", [zip_of, lambda f: zip_of(f, zipfile.ZIP_STORED), lambda f: zip_of(f, seekable=False), tar_of, lambda f: bz2.compress(tar_of(f)), lambda f: lzma.compress(tar_of(f))])
def test_files_before_the_cut_are_readable(pack):
    rng = random.Random(0)
    files = {f"{c}.tex": b"\\section{A}" + bytes(rng.choices(b"abcdefgh \n", k=400_000)) for c in "ab"} | {"c.eps": rng.randbytes(400_000)}
    whole = pack(files)
    source, kept = read_source(whole[:-150_000]), read_source(whole[:-150_000], KEEP)
    assert source.reason == Reason.truncated and source.container == "damaged" and source.files == {} and kept.reason is None
    assert kept.files["a.tex"].encode() == files["a.tex"] and source.tex_bytes == kept.tex_bytes >= 400_000

def test_a_wrong_checksum_loses_no_byte():
    wrong = packed(PAPER)[:-8] + bytes(8)
    with pytest.raises(zlib.error): zlib.decompress(wrong, 31)
    assert (source := read_source(wrong)).reason == Reason.truncated and source.tex_bytes == len(PAPER)
    assert read_source(wrong, KEEP).files == {"main.tex": PAPER.decode()}


# Encodings: known strings in many codecs, exact recoveries counted

SENTENCES = {
    "russian": ("Пусть X - компактное пространство; тогда всякая непрерывная функция ограничена.", ["cp1251", "koi8-r", "cp866", "iso8859-5", "mac-cyrillic"]),
    "ukrainian": ("Нехай X є компактним простором, тоді її образ обмежений і замкнений.", ["cp1251", "koi8-u"]),
    "polish": ("Zażółć gęślą jaźń: każda funkcja ciągła na przestrzeni zwartej jest ograniczona.", ["iso8859-2", "cp1250", "cp852"]),
    "czech": ("Příliš žluťoučký kůň úpěl ďábelské ódy na kompaktní množině.", ["iso8859-2", "cp1250", "cp852"]),
    "magyar": ("Árvíztűrő tükörfúrógép: minden folytonos függvény korlátos és egyenletesen folytonos.", ["iso8859-2", "cp1250"]),
    "greek": ("Κάθε συνεχής συνάρτηση σε συμπαγή χώρο είναι φραγμένη.", ["iso8859-7", "cp1253"]),
    "turkish": ("Tıkız uzayda her sürekli işlev sınırlıdır ve üst sınırına erişir, değil mi?", ["iso8859-9"]),
    "french": ("Où l'on démontre « le théorème » : naïveté, œuvre, Gödel, 50 € — c'est là.", ["cp1252", "utf-8", "utf-16", "utf-16-le", "utf-8-sig"]),
    "german": ("Für jede stetige Abbildung gilt: größte Schranke wird über Ö angenommen.", ["latin-1", "cp1252"])}
DECLARED = [("latin1", "latin-1", "Übergrößenträger"), ("latin2", "iso8859-2", "žluťoučký kůň"), ("latin9", "iso8859-15", "cœur à 5 €"), ("koi8-r", "koi8-r", "теорема"), ("cp1251", "cp1251", "теорема"), ("cp866", "cp866", "теорема"),
            ("applemac", "mac-roman", "naïveté"), ("cp437", "cp437", "naïveté"), ("cp850", "cp850", "naïveté"), ("latin5", "iso8859-9", "ığdır"), ("latin4", "iso8859-4", "šņķ")]
CJK = [("GBK", "gbk", "设X为紧空间,则连续函数有界。"), ("GB", "gb2312", "设X为紧空间,则连续函数有界。"), ("Bg5", "big5", "設X為緊緻空間,則連續函數有界。"), ("SJIS", "shift_jis", "コンパクト空間上の連続関数は有界である。"), ("JIS", "euc_jp", "コンパクト空間上の連続関数は有界である。"),
       ("KS", "euc_kr", "콤팩트 공간에서 연속함수는 유계이다.")]

def planted_texts():
    "Codec, text and bytes of every planted file."
    for language, (text, codecs) in SENTENCES.items():
        for codec in codecs: yield codec, f"\\documentclass{{article}}\n\\usepackage[{language}]{{babel}}\n{text}\n", codec
    for name, codec, text in DECLARED: yield codec, f"\\documentclass{{article}}\n\\usepackage[{name}]{{inputenc}}\n{text*3}\n", codec
    for name, codec, text in CJK: yield codec, f"\\documentclass{{article}}\n\\usepackage{{CJK}}\\begin{{CJK*}}{{{name}}}{{song}}\n{text}\n\\end{{CJK*}}\n", codec
    for codec in ("shift_jis", "euc_jp", "iso2022_jp"): yield codec, f"\\documentclass{{jarticle}}\n{CJK[3][2]}\n", codec

def by_utf_8_else_windows(data):
    "What a pipeline does that knows two encodings."
    try: return data.decode()
    except UnicodeDecodeError: return data.decode("cp1252", "replace")

def test_planted_encodings_are_recovered():
    planted = [(codec, text, text.encode(codec)) for codec, text, _ in planted_texts()]
    wrong = [codec for codec, text, data in planted if list(read_source(packed(data)).files.values()) != [text]]
    plain = sum(by_utf_8_else_windows(data) == text for _, text, data in planted)
    print(f"{len(planted)} texts: {len(planted)-len(wrong)} recovered, {plain} by UTF-8 else Windows-1252")
    assert wrong == [] and plain < len(planted)/3

def test_a_declaration_in_one_file_holds_for_the_others():
    files = {"main.tex": b"\\documentclass{article}\\usepackage[russian]{babel}\\input{a}", "a.tex": SENTENCES["russian"][0].encode("koi8-r")}
    assert read_source(tar_of(files)).files["a.tex"] == SENTENCES["russian"][0]

def test_encodings_are_counted():
    repairs = lambda data: read_source(packed(data)).repairs
    assert repairs(PAPER + "\ufffd\ufffd\0".encode()) == dict(nul_bytes=1, replacement_characters=2)
    assert repairs(PAPER + "é é é".encode() + b"\xe9") == dict(stray_bytes=1)
    assert repairs(PAPER + b"caf\xe9") == dict(decoded_as_windows=1)


# Mutations

def mutated(rng, payload, other):
    "A payload with bits flipped, a piece cut out, repeated, cut off, or with a piece of another payload for one of its own."
    data, kind = bytearray(payload), rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randrange(1, 9)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    a, b = sorted(rng.randrange(len(data)) for _ in "ab")
    if kind == 1: del data[a:b]
    if kind == 2: data[a:a] = data[a:b]
    if kind == 3: data[a:b] = other[rng.randrange(len(other)):][:rng.randrange(1, len(other)+1)]
    return bytes(data[:rng.randrange(len(data))] if kind == 4 else data)

FILES = {"main.tex": PAPER.replace(b"We show", b"\\input{b} We show", 1), "b.tex": "naïve \\newcommand{\\R}{\\mathbb R} $\\R$".encode("latin-1"), "fig.eps": bytes(99), "._b.tex": b"\0\5\x16\7"}
PLAIN = tar_of(FILES)
HEALTHY = [packed(PLAIN), PLAIN, packed(PAPER), PAPER, zip_of(FILES), zip_of(FILES, zipfile.ZIP_STORED), zip_of(FILES, seekable=False), bz2.compress(PLAIN), lzma.compress(PLAIN), packed(packed(PLAIN)), PAPER.decode().encode("utf-16"),
           packed(PLAIN[:3000]) + packed(PLAIN[3000:]), packed(tar_of({"p.tgz": packed(PLAIN)})), tar_of({"d"*150 + "/main.tex": PAPER, "é.tex": PAPER}), tar_of({"p.zip": zip_of(FILES)}), b"%PDF-1.4\n" + bytes(range(256)), packed(b"%!PS\n" + PAPER)]
RECORD = Judged(id="2101.00001", title="T", categories="math.GN", license=None, year=2021, alone=None, with_source=None)

def mutation(n):
    "Mutation number n, of the payload or of what is compressed in it."
    rng = random.Random(n)
    if n % 3 == 0: return packed(mutated(rng, PLAIN, rng.choice(HEALTHY)))
    return mutated(rng, rng.choice(HEALTHY), rng.choice(HEALTHY))

def survived(numbers):
    "Each mutation through the stages of a worker, by both policies: nothing raises, and each leaves one sound row."
    rows, before = [], sorted(os.listdir("."))
    for n in numbers:
        payload = mutation(n)
        kept = read_source(payload, KEEP)
        assert kept.raw_bytes == len(payload) and (kept.reason is None) == bool(kept.files) and kept.tex_bytes >= sum(map(len, kept.files.values()))
        row = take_paper(f"2101.{n:05d}", RECORD, payload, CorpusConfig(), Clock()).row
        rows.append(row)
    ledger = rows_to_frame(rows)
    assert len(ledger) == len(numbers) and check_conservation(ledger) == [] and sorted(os.listdir(".")) == before
    return ledger

def test_500_mutated_archives_leave_one_row_each(): survived(range(500))

@pytest.mark.slow
def test_20_000_mutated_archives_leave_one_row_each():
    start = time.process_time()
    ledger = survived(range(20_000))
    print(f"{time.process_time()-start:.0f} s", dict(ledger.group_by("reason").len().iter_rows()))
    assert ledger["reason"].n_unique() > 8  # they do not all end at the same place

def test_payloads_of_noise():
    rng = random.Random(1)
    for n in range(300):
        payload = rng.randbytes(rng.randrange(3000))
        for p in (payload, packed(payload), b"PK\3\4" + payload, b"\x1f\x8b\x08" + payload, b"BZh9" + payload, b"\xfd7zXZ\0" + payload):
            assert container_of(p) and read_source(p).raw_bytes == len(p)


# Bulk tars

def bulk_tar(path, payloads):
    "A bulk tar of these payloads, and their ids."
    path.write_bytes(tar_of({f"2101/2101.{i:05d}.gz": p for i, p in enumerate(payloads, 1)}, format=tarfile.USTAR_FORMAT))
    return [f"2101.{i:05d}" for i in range(1, len(payloads)+1)]

def test_a_damaged_header_costs_one_paper(tmp_path):
    path = tmp_path/"arXiv_src_2101_001.tar"
    ids = bulk_tar(path, [packed(PAPER)]*5)
    with tarfile.open(path) as tar: at = tar.getmembers()[2].offset
    data = path.read_bytes()
    for spoil in (b"\xff"*512, b"", b"\xff"*700):  # overwritten, cut out, overwritten and pushed out of step
        path.write_bytes(data[:at] + spoil + data[at+512:])
        with pytest.raises(StudyError, match=f"{path.name} is damaged at byte {at:,}"): list(read_bulk_tar(path))
        report = []
        assert [i for i, _ in read_bulk_tar(path, KEEP, report)] == ids[:2] + ids[3:] and len(report) == 1 and f"byte {at:,}" in report[0]

def test_a_tar_that_ends_early(tmp_path):
    path = tmp_path/"arXiv_src_2101_001.tar"
    ids = bulk_tar(path, [packed(PAPER)]*3)
    whole = path.read_bytes()
    with tarfile.open(path) as tar: last, end = tar.getmembers()[2].offset_data, tar.getmembers()[2].offset_data + 512
    for n, words in ((last + 60, "ends within 2101/2101.00003.gz"), (end, "ends without the empty blocks"), (0, "is empty"), (300, "is damaged at byte 0")):
        path.write_bytes(whole[:n])
        with pytest.raises(StudyError, match=words): list(read_bulk_tar(path))
        report = []
        read = list(read_bulk_tar(path, KEEP, report))
        assert [i for i, _ in read] == (ids if n > 300 else []) and len(report) == 1 and words in report[0]
        if n == last + 60: assert read_source(read[2][1]).reason == Reason.truncated and read_source(read[2][1]).tex_bytes > 0

def test_mutated_bulk_tars(tmp_path):
    "They are read, or an error names them; where what is readable is kept, nothing is an error, and each paper has one sound row."
    path, n_read = tmp_path/"arXiv_src_2101_001.tar", 0
    ids = bulk_tar(path, HEALTHY)
    whole = path.read_bytes()
    for n in range(30):
        rng = random.Random(n)
        path.write_bytes(mutated(rng, whole, whole))
        report = []
        papers = list(read_bulk_tar(path, KEEP, report))
        rows = {i: take_paper(i, RECORD, p, CorpusConfig(), Clock()).row for i, p in papers}
        assert check_conservation(rows_to_frame(rows.values())) == []
        n_read += len(set(rows) & set(ids))
        try: assert [i for i, _ in read_bulk_tar(path)] == [i for i, _ in papers] and not report
        except StudyError as e: assert path.name in str(e) and "\n" not in str(e) and report
    assert n_read > 15*len(ids)

def test_an_id_that_occurs_twice_comes_twice(tmp_path):
    path = tmp_path/"arXiv_src_2101_001.tar"
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("2101/2101.00001.gz", b"a"), ("2101/2101.00002.gz", b"b"), ("2101/2101.00001.pdf", b"c")):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(data))
    path.write_bytes(out.getvalue())
    assert list(read_bulk_tar(path)) == [("2101.00001", b"a"), ("2101.00002", b"b"), ("2101.00001", b"c")]

def test_of_loose_versions_the_latest_comes_first(tmp_path):
    for v in (1, 2, 10): (tmp_path/f"2101.00001v{v}.gz").write_bytes(packed(PAPER + b"%d" % v))
    found, = find_sources(tmp_path)
    assert [(i, gzip.decompress(p)[len(PAPER):]) for i, p in found.sources()] == [("2101.00001", b"10"), ("2101.00001", b"2"), ("2101.00001", b"1")]

def test_a_manifest_that_disagrees(tmp_path):
    bulk_tar(tmp_path/"arXiv_src_2101_001.tar", [packed(PAPER)])
    (tmp_path/"arXiv_src_manifest.xml").write_text("<arXivSRC><file><filename>src/arXiv_src_2101_001.tar</filename><md5sum>0</md5sum><size>10240</size></file></arXivSRC>")
    found, = find_sources(tmp_path)
    with pytest.raises(StudyError, match="MD5"): found.check()
    assert "MD5" in found.check(rules=KEEP) and found.check(md5=False) is None
    assert [i for i, _ in found.sources(KEEP, [])] == ["2101.00001"]

def test_a_long_payload_is_read_where_it_lies(tmp_path):
    "The same from its file as from memory, whatever the container, from a tar, a file and a folder."
    rules, path = ArchiveRules(max_held_bytes=16), tmp_path/"arXiv_src_2101_001.tar"
    bulk_tar(path, [p for _, p in CONTAINERS.values()])
    for (_, payload), (_, held) in zip(read_bulk_tar(path, rules), read_bulk_tar(path)):
        assert isinstance(payload, LongPayload) and len(payload) == len(held)
        assert container_of(payload) == container_of(held) and read_source(payload) == read_source(held)
    (tmp_path/"loose"/"sub").mkdir(parents=True)
    for name in ("main.tex", "sub/" + "x"*120 + ".tex"): (tmp_path/"loose"/name).write_bytes(PAPER)
    for p in (tmp_path/"loose", tmp_path/"loose"/"main.tex"): assert read_source(loose_payload(p, held=16)) == read_source(loose_payload(p)) and len(loose_payload(p, 16)) == len(loose_payload(p))


# Memory

WORKER = """
import re, sys, time
from arxiv_study.corpus.archives import read_bulk_tar
from arxiv_study.corpus.pipeline import Clock, CorpusConfig, Judged, take_paper
record = Judged(id="2101.00001", title="T", categories="math.GN", license=None, year=2021, alone=None, with_source=None)
start, reasons = time.process_time(), []
for id, payload in read_bulk_tar(sys.argv[1]):
    row = take_paper(id, record, payload, CorpusConfig(), Clock()).row
    reasons.append(row.reason or "kept")
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])/1024
print(peak, time.process_time() - start, *reasons)
"""  # VmHWM, not ru_maxrss: that begins with the memory of the process it was forked from

def worker_on(path):
    "Peak memory in MiB, seconds and fates of a fresh worker that reads a bulk tar."
    peak, seconds, *fates = subprocess.run([sys.executable, "-c", WORKER, str(path)], capture_output=True, text=True, check=True).stdout.split()
    return float(peak), float(seconds), fates

def write_bulk(path, size, pieces):
    "A bulk tar of one member: pieces of bytes, and a hole up to its size."
    with open(path, "wb") as f:
        member = tarfile.TarInfo("2101/2101.00001.gz")
        member.size = size
        f.write(member.tobuf(tarfile.GNU_FORMAT))
        for piece in pieces: f.write(piece)
        f.truncate(512 + size + -size % 512 + 1024)

def blank(n_bytes, times, packer=lambda: zlib.compressobj(9, zlib.DEFLATED, 31)):
    "One compressed stream of `times` times `n_bytes` zeros, without its end."
    pack = packer()
    head = pack.compress(bytes(n_bytes)) + pack.flush(zlib.Z_FULL_FLUSH)
    piece = pack.compress(bytes(n_bytes)) + pack.flush(zlib.Z_FULL_FLUSH)
    return head + piece*(times-1)  # after a full flush a piece does not depend on those before it

def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)

def tex(n_bytes, word=b"We show that every compact space is normal. "):
    "A document of about this many bytes, no line of it twice."
    lines = b"\n".join(b"%d %s$x_{%d}$." % (i, word, i*7919) for i in range(n_bytes//(len(word)+25)))
    return b"\\documentclass{article}\n\\begin{document}\n" + lines + b"\n\\end{document}\n"

BOMBS = {
    "10 GB of zeros": lambda: blank(64 << 20, 160), "1 GB of zeros, 10,000 gzips": lambda: packed(bytes(100_000))*10_000, "bzip2 of 4 GB": lambda: bz2.compress(bytes(64 << 20))*64, "xz of 1 GB": lambda: lzma.compress(bytes(64 << 20), preset=1)*16,
    "tar of 100,000 members": lambda: packed(b"".join(header(f"{i}.tex", 0) for i in range(100_000))), "tar with a member of 1 GB": lambda: packed(header("a.eps", 1 << 30)) + blank(64 << 20, 16),
    "a TeX file of 1 GB": lambda: packed(header("main.tex", 1 << 30)) + blank(64 << 20, 16), "TeX files of 30 MB": lambda: gzip.compress(b"".join(header(f"{i}.tex", 30 << 20) + tex(30 << 20).ljust(30 << 20) for i in range(3)), 1),
    "zip of TeX files of 64 MB": lambda: zip_of({f"{i}.tex": b"a "*(32 << 20) for i in range(4)}), "zip of 300,000 names": lambda: zip_of({f"{i}.eps": b"" for i in range(300_000)}), "zip from a pipe": lambda: zip_of({f"{i}.eps": bytes(256 << 20) for i in range(5)}, seekable=False),
    "zips in a zip": lambda: zip_of({f"{i}.zip": zip_of({"a.tex": b"a "*(4 << 20)}) for i in range(16)}), "gzip in gzip in gzip": lambda: packed(packed(packed(bytes(256 << 20)))), "gzip in gzip": lambda: packed(blank(64 << 20, 160)),
    "extended headers of 1 MB": lambda: packed(b"".join(header("a", 1 << 20, b"x") + b"1048576 path=".ljust(1 << 20, b"d") + header("a", 0) for _ in range(300))), "an extended header of 1 GB": lambda: packed(header("a", 1 << 30, b"x")) + blank(64 << 20, 16),
    "names of 1,000 characters": lambda: packed(b"".join(header("é"*500 + f"{i}.eps", 0) for i in range(19_000))), "sparse file of 8 GB": lambda: packed(header("main.tex", (8 << 30) - 1, b"S")),
    "16 MB of TeX": lambda: packed(tex(15 << 20)), "16 MB of TeX with an emoji": lambda: packed(tex(15 << 20) + "\\section{\U0001f600}".encode()), "16 MB of UTF-16": lambda: packed(tex(7 << 20).decode().encode("utf-16")),
    "16 MB of strays": lambda: packed(b"\\documentclass{article}\\begin{document}" + bytes(random.Random(0).choices(range(128, 256), k=15 << 20))), "16 MB of strays among UTF-8": lambda: packed(b"\\documentclass{article}\\begin{document}" + "é\U0001f600".encode()*(2 << 20) + b"\xe9"*(2 << 20)),
    "one line of braces": lambda: packed(b"\\documentclass{article}\\begin{document}" + b"{"*(15 << 20)), "4,000 TeX files": lambda: packed(b"".join(header(f"{i}.tex", 512) + tex(400).ljust(512) for i in range(4_000)))}
LONG = {"a payload of 1 GB, TeX": (1 << 30, PAPER), "a payload of 5 GB, PDF": (5 << 30, b"%PDF-1.4\n"), "a payload of 5 GB, tar": (5 << 30, header("a.eps", (5 << 30) - 4096)), "a payload of 2 GB, zip": (2 << 30, zip_of({"main.tex": PAPER}))}

@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
@pytest.mark.slow
def test_no_input_needs_half_a_gigabyte(tmp_path):
    "The peak of a worker that does nothing else, interpreter and libraries included."
    path, table = tmp_path/"arXiv_src_2101_001.tar", {}
    for name in [*BOMBS, *LONG]:
        if name in BOMBS: payload = BOMBS[name]()
        write_bulk(path, *((len(payload), [payload]) if name in BOMBS else (LONG[name][0], [LONG[name][1]])))
        table[name] = worker_on(path)
        print(f"{name:32} {table[name][0]:6.0f} MiB {table[name][1]:6.1f} s", *table[name][2], flush=True)
    assert {n: p for n, (p, _, _) in table.items() if p > 512} == {}
    assert max(s for _, s, _ in table.values()) < 120

@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
def test_bombs_are_stopped(tmp_path):
    "The bombs of everyday, in one worker."
    path = tmp_path/"arXiv_src_2101_001.tar"
    names = ["10 GB of zeros", "a TeX file of 1 GB", "tar with a member of 1 GB", "an extended header of 1 GB"]
    bulk_tar(path, [BOMBS[name]() for name in names])
    peak, _, fates = worker_on(path)
    assert peak < 512 and fates == ["too_large"]*4, (peak, fates)
    write_bulk(path, 5 << 30, [b"%PDF-1.4\n"])
    assert worker_on(path)[2] == ["pdf_only"]
