"""What bad input gets: one sentence on stderr, the right exit code, and nothing half-written."""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest

CLI = [sys.executable, "-c", "from arxiv_study.cli import main; main()"]
ROOT = Path(__file__).parents[1]

def call(*arguments, cwd=ROOT, **kwargs):
    return subprocess.run([*CLI, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, **kwargs)

def assert_one_sentence(answer, code, *words):
    assert answer.returncode == code, answer.stderr[-2000:]
    said = answer.stderr.strip().splitlines()
    complaint = [line for line in said if line.startswith("arxiv-study: ")]
    assert len(complaint) == 1 and "Traceback" not in answer.stderr, answer.stderr[-2000:]
    for word in words: assert word in complaint[0], complaint[0]

def leftovers(folder):
    return sorted(p.name for p in Path(folder).rglob("*") if p.name.endswith(".part"))

@pytest.fixture(scope="module")
def arxiv(tmp_path_factory):
    "A miniature of 30 papers in two tars."
    folder = tmp_path_factory.mktemp("arxiv")/"mini"
    from arxiv_study.corpus.miniature import write_miniature
    write_miniature(folder, 30, 0, papers_per_tar=15)
    return folder

@pytest.fixture
def own_arxiv(arxiv, tmp_path):
    "A copy to damage."
    return Path(shutil.copytree(arxiv, tmp_path/"arxiv"))

def test_no_such_folder(tmp_path):
    assert_one_sentence(call("corpus", "--arxiv", tmp_path/"absent", "--out", tmp_path/"out"), 1, "absent")
    assert list(tmp_path.iterdir()) == []

def test_no_arxiv_set(tmp_path):
    assert_one_sentence(call("corpus", "--out", tmp_path/"out"), 2, "--arxiv", "miniature")

def test_folder_that_is_no_arxiv(tmp_path):
    (tmp_path/"empty").mkdir()
    assert_one_sentence(call("corpus", "--arxiv", tmp_path/"empty", "--out", tmp_path/"out"), 1, "empty", "arXiv_src_")

def test_no_snapshot(own_arxiv, tmp_path):
    (own_arxiv/"arxiv-metadata-oai-snapshot.json").unlink()
    assert_one_sentence(call("corpus", "--arxiv", own_arxiv, "--out", tmp_path/"out"), 1, "arxiv-metadata-oai-snapshot.json")

def test_empty_snapshot(own_arxiv, tmp_path):
    (own_arxiv/"arxiv-metadata-oai-snapshot.json").write_bytes(b"")
    assert_one_sentence(call("corpus", "--arxiv", own_arxiv, "--out", tmp_path/"out"), 1, "arxiv-metadata-oai-snapshot.json", "empty")
    assert not (tmp_path/"out").exists() and not leftovers(tmp_path)

def test_a_line_that_is_not_json(own_arxiv, tmp_path):
    snapshot = own_arxiv/"arxiv-metadata-oai-snapshot.json"
    lines = snapshot.read_bytes().splitlines(keepends=True)
    snapshot.write_bytes(b"".join(lines[:3]) + b'{"id": "9901.1", \n' + b"".join(lines[3:]))
    assert_one_sentence(call("corpus", "--arxiv", own_arxiv, "--out", tmp_path/"out"), 1, "arxiv-metadata-oai-snapshot.json", "4")
    assert not (tmp_path/"out").exists() and not leftovers(tmp_path)

def test_manifest_disagrees_with_a_tar(own_arxiv, tmp_path):
    tar = next((own_arxiv/"src").glob("*.tar"))
    with open(tar, "ab") as f: f.write(b"\0"*512)
    assert_one_sentence(call("corpus", "--arxiv", own_arxiv, "--out", tmp_path/"out"), 1, tar.name, "manifest")
    assert not (tmp_path/"out").exists() and not leftovers(tmp_path)

def test_unreadable_tar(own_arxiv, tmp_path):
    tar = next((own_arxiv/"src").glob("*.tar"))
    size = tar.stat().st_size
    tar.write_bytes(b"this is no tar " * (size//15) + b"." * (size % 15))
    (own_arxiv/"src"/"arXiv_src_manifest.xml").unlink()
    assert_one_sentence(call("corpus", "--arxiv", own_arxiv, "--out", tmp_path/"out"), 1, tar.name)
    assert not (tmp_path/"out").exists() and not leftovers(tmp_path)

def test_output_exists(arxiv, tmp_path):
    (tmp_path/"out").mkdir()
    assert_one_sentence(call("corpus", "--arxiv", arxiv, "--out", tmp_path/"out"), 1, "out", "exists")

def test_full_disk(arxiv, tmp_path):
    "A limit on file size stands for a full disk: the system refuses the write in the same place."
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from arxiv_study.cli import main; main()"
    answer = subprocess.run([sys.executable, "-c", limited, "corpus", "--arxiv", str(arxiv), "--out", str(tmp_path/"out")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert_one_sentence(answer, 1, "space")
    assert not (tmp_path/"out").exists() and not leftovers(tmp_path)

@pytest.mark.parametrize("arguments, code, words", [
    (["run", "R77", "--dry-run"], 2, ["R77", "R07"]),
    (["run", "R07", "--dry-run", "--scale", "dekk"], 2, ["dekk", "desk"]),
    (["study", "--only", "R01,R99", "--dry-run"], 2, ["R99"]),
    (["train", "absent.json", "--out", "x"], 1, ["absent.json"]),
    (["fit", "absent.csv"], 1, ["absent.csv"]),
    (["yield", "absent"], 1, ["absent"]),
])
def test_unknown_names(arguments, code, words, tmp_path):
    assert_one_sentence(call(*arguments, "--workspace", tmp_path/"work"), code, *words)

def test_bad_yaml_key(tmp_path):
    shutil.copytree(ROOT/"runs", tmp_path/"runs", ignore=shutil.ignore_patterns("results"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    bad = tmp_path/"runs"/"R07.yaml"
    bad.write_text(bad.read_text().replace("lr_multiplier", "lr_multiplyer"))
    assert_one_sentence(call("run", "R07", "--dry-run", cwd=tmp_path), 2, "R07.yaml", "lr_multiplyer", "lr_multiplier")

def test_usage_is_exit_2():
    answer = call("corpus", "--no-such-option")
    assert answer.returncode == 2 and "no-such-option" in answer.stderr and "Traceback" not in answer.stderr

@pytest.mark.parametrize("typed, offered", [("st", {"study"}), ("fit --dr", {"--draws"}), ("run R0", {f"R0{k}" for k in range(1, 10)}), ("study --scale ", {"smoke", "desk", "paper"})])
def test_the_shell_completes(typed, offered):
    "What the completion of bash asks, and what it is told."
    words = f"arxiv-study {typed}"
    asks = os.environ | dict(_ARXIV_STUDY_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    answer = subprocess.run([Path(sys.executable).parent/"arxiv-study"], cwd=ROOT, capture_output=True, text=True, timeout=60, env=asks)
    assert set(answer.stdout.split()) == offered, answer.stderr

def test_interrupt_leaves_nothing_half_written(tmp_path):
    "SIGINT to the whole group, as a terminal sends it, while the corpus is being built."
    from arxiv_study.corpus.miniature import write_miniature
    write_miniature(tmp_path/"mini", 600, 0, papers_per_tar=60)
    (tmp_path/"out").mkdir()
    job = subprocess.Popen([*CLI, "corpus", "--arxiv", str(tmp_path/"mini"), "--out", str(tmp_path/"out"/"corpus")], cwd=ROOT, start_new_session=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    started = lambda: list((tmp_path/"out").glob("corpus.working-*/**/*.parquet"))
    while not started() and time.monotonic() < until and job.poll() is None: time.sleep(.05)
    assert started(), "the stage never started to write"
    os.killpg(job.pid, signal.SIGINT)
    _, complaint = job.communicate(timeout=60)
    assert job.returncode == 1 and "interrupted" in complaint, complaint[-2000:]
    left = [p.name for p in (tmp_path/"out").iterdir()]
    assert all(name.startswith("corpus.working-") for name in left), left # tars that were done wait for the same command; no output is half there
    again = call("corpus", "--arxiv", str(tmp_path/"mini"), "--out", str(tmp_path/"out"/"corpus"))
    assert again.returncode == 0, again.stderr
    assert [p.name for p in (tmp_path/"out").iterdir()] == ["corpus"]

def test_commands_work_on_a_miniature(arxiv, tmp_path):
    "The corpus and token rooms by their commands, as the README shows them."
    answer = call("corpus", "--arxiv", arxiv, "--out", tmp_path/"corpus", "--json")
    assert answer.returncode == 0, answer.stderr
    assert sum(row["papers"] for row in json.loads(answer.stdout)) >= 30
    answer = call("yield", tmp_path/"corpus", "--html", tmp_path/"yield.html")
    assert answer.returncode == 0 and "<html" in (tmp_path/"yield.html").read_text()[:200], answer.stderr
    answer = call("tokenizer", "--text", tmp_path/"corpus", "--out", tmp_path/"tokenizer", "--vocab-size", 700)
    assert answer.returncode == 0, answer.stderr
    answer = call("pack", "--text", tmp_path/"corpus", "--tokenizer", tmp_path/"tokenizer", "--out", tmp_path/"shards")
    assert answer.returncode == 0 and (tmp_path/"shards"/"shards.json").is_file(), answer.stderr
