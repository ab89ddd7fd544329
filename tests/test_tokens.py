"""The tokens room: what a chapter's cells cannot test. Round trips over all of Unicode, replay, corruption, several processes."""
import importlib.util, json, os, shutil, struct, subprocess, sys, time
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np, polars as pl, pytest
from arxiv_study.settings import StudyError
from arxiv_study.tokens.batches import IGNORED, Batches, BatchConfig
from arxiv_study.tokens.order import shuffled
from arxiv_study.tokens.indexed import Shard, shard_writer, token_dtype
from arxiv_study.tokens.pack import pack
from arxiv_study.tokens.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from corpora import write_corpus

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokens")
    write_corpus(home/"corpus")
    for name, config in dict(domain={}, plain=dict(latex_symbols=False, split_digits=False), unigram=dict(kind="unigram", vocab_size=310), bytes=dict(kind="bytes")).items():
        train_tokenizer(home/"corpus", home/name, TokenizerConfig(**{"vocab_size": 350, **config}))
    pack(home/"corpus", home/"domain", home/"tokens")
    return home


@pytest.fixture()
def tokens(home, tmp_path): # a copy to damage
    return Path(shutil.copytree(home/"tokens", tmp_path/"tokens"))


# ---- shards

def read_as_published(prefix):
    "The Megatron-LM layout, read field by field with nothing of this library."
    raw, at = Path(f"{prefix}.idx").read_bytes(), 0
    def take(form):
        nonlocal at
        values = struct.unpack_from(form, raw, at)
        at += struct.calcsize(form)
        return values
    assert take("<9s") == (b"MMIDIDX\0\0",) and take("<Q") == (1,)
    dtype = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}[take("<B")[0]]
    n, n_marks = take("<QQ")
    sizes, pointers, marks = take(f"<{n}i"), take(f"<{n}q"), take(f"<{n_marks}q")
    assert at == len(raw) and marks == tuple(range(n + 1))
    blob = Path(f"{prefix}.bin").read_bytes()
    return [np.frombuffer(blob, dtype, size, pointer).tolist() for size, pointer in zip(sizes, pointers)]

@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 102_400])
def test_shard_layout_byte_for_byte(tmp_path, vocab_size):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, vocab_size, n) for n in (5, 1, 0, 900, 3)]
    with shard_writer(tmp_path/"a.b", vocab_size) as w:
        for d in documents: w.add(d)
    assert read_as_published(tmp_path/"a.b") == [d.tolist() for d in documents]
    shard = Shard(tmp_path/"a.b")
    assert [shard.read(i).tolist() for i in range(5)] == [d.tolist() for d in documents]


def test_ids_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(StudyError, match="vocabulary has 300 entries"):
        with shard_writer(tmp_path/"x", 300) as w: w.add([299, 300])
    assert not list(tmp_path.iterdir())
    with pytest.raises(StudyError, match="does not fit"): token_dtype(2**31 + 1)


def test_pack_is_the_same_for_any_number_of_workers(home, tmp_path):
    pack(home/"corpus", home/"domain", tmp_path/"two", workers=2)
    assert sorted(p.name for p in (tmp_path/"two").iterdir()) == sorted(p.name for p in (home/"tokens").iterdir())
    for file in (home/"tokens").iterdir(): assert file.read_bytes() == (tmp_path/"two"/file.name).read_bytes(), file.name


def test_every_paper_can_be_read_back(home):
    tokenizer, papers = Tokenizer.load(home/"tokens"), pl.read_parquet(home/"tokens"/"papers.parquet")
    texts = dict(pl.read_parquet(home/"corpus"/"text"/"part-000.parquet").select("id", "text").iter_rows())
    assert set(papers["id"]) == set(texts)
    for row in papers.iter_rows(named=True):
        ids = Shard(home/"tokens"/f"{row['split']}-{row['domain']}").read(row["shard_index"])
        assert ids[-1] == tokenizer.end_id and len(ids) == row["n_tokens"] and tokenizer.decode(ids) == texts[row["id"]]


# ---- batches

def sequential(tokens_dir, config, n_steps, world_size):
    "The definition, the slow way: read all papers, join them, list an epoch's rows in order, deal them out."
    papers = pl.read_parquet(tokens_dir/"papers.parquet").filter(split="train")
    from arxiv_study.tokens.tokenizer import order_keys, seed_order
    papers = papers[seed_order(order_keys(papers["id"]), config.seed)]
    stream = np.concatenate([Shard(tokens_dir/f"train-{d}").read(i) for d, i in zip(papers["domain"], papers["shard_index"])])
    n_rows = (len(stream) - 1) // config.context
    if config.unique_tokens: n_rows = min(n_rows, -(-config.unique_tokens // config.context))
    rows = [stream[i*config.context : (i+1)*config.context + 1] for i in range(n_rows)]
    density = np.repeat(np.rint(papers["formula_density"].to_numpy() * 65536).astype(int), papers["n_tokens"].to_numpy())
    means = np.array([density[i*config.context : (i+1)*config.context].sum() for i in range(n_rows)])
    by_density = np.arange(n_rows) if config.order == "mixed" else np.argsort(means if config.order == "prose_first" else -means, kind="stable")
    edges = np.linspace(0, n_rows, (1 if config.order == "mixed" else config.stages) + 1).astype(int)
    def epochs():
        for epoch in range(10**6):
            for stage, (a, b) in enumerate(zip(edges, edges[1:])):
                for i in shuffled(range(b - a), int(b - a), config.seed, epoch, stage) if b > a else []: yield rows[by_density[a + i]]
    sequence = epochs()
    for _ in range(n_steps):
        yield np.stack([[[next(sequence) for _ in range(config.rows)] for _ in range(world_size)] for _ in range(config.accumulation)])  # [A, W, R, T+1]

def draws_that_agree(home, n_draws, seed=0, n_steps=60):
    "Draws of step, world size, rank and order, each asked for directly and out of order, against the definition."
    rng, draws = np.random.default_rng(seed), 0
    for order in "mixed", "prose_first", "formula_first":
        for world_size, rows, accumulation, unique in (1, 3, 1, None), (2, 2, 2, None), (3, 1, 2, 1500), (4, 2, 1, None):
            config = BatchConfig(context=32, rows=rows, accumulation=accumulation, order=order, unique_tokens=unique, seed=int(rng.integers(5)), prefetch=False)
            truth = list(sequential(home/"tokens", config, n_steps, world_size))
            ranks = [Batches(home/"tokens", config, rank, world_size) for rank in range(world_size)]
            for step, rank in zip(rng.integers(0, n_steps, -(-n_draws//12)), rng.integers(0, world_size, -(-n_draws//12))):
                assert np.array_equal(ranks[rank].batch(int(step)).tokens, truth[step][:, rank])
                draws += 1
    return draws

def test_any_batch_equals_the_sequential_definition(home):
    assert draws_that_agree(home, 1000) >= 1000

@pytest.mark.slow
def test_ten_thousand_batches_equal_the_sequential_definition(home):
    assert draws_that_agree(home, 10_000, seed=1, n_steps=300) >= 10_000


def test_after_a_kill_the_next_batch_is_the_one_that_would_have_been(home):
    "A process serves batches and is killed between two of them; another goes on from the number alone."
    code = f"""
import hashlib, sys
from arxiv_study.tokens.batches import Batches, BatchConfig
b = Batches({str(home/'tokens')!r}, BatchConfig(context=32, rows=2, curriculum=({{"at": 0, "math": 1, "cs": 3}}, {{"at": .5, "math": 1}}), budget_tokens=9000), 1, 2)
for step in range(int(sys.argv[1]), 200): print(step, hashlib.sha256(b.batch(step).tokens.tobytes()).hexdigest(), flush=True)
"""
    start = lambda step: subprocess.Popen([sys.executable, "-c", code, str(step)], stdout=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1])))
    whole, lines = start(0).communicate(timeout=120)[0].splitlines(), []
    for n in 7, 31: # lines to read before the kill
        process = start(len(lines))
        lines += [process.stdout.readline().strip() for _ in range(n)]
        process.kill()
        process.communicate()
    rest = start(len(lines))
    lines += rest.communicate(timeout=120)[0].splitlines()
    assert lines == whole and len(whole) == 200


def test_a_schedule_serves_what_it_asks_for_on_any_number_of_ranks(home):
    knots, budget = ({"at": 0, "math": 1, "cs": 1}, {"at": .5, "physics": 1}), 6400
    config = BatchConfig(context=32, rows=4, curriculum=knots, budget_tokens=budget, prefetch=False)
    one, two = Batches(home/"tokens", config), [Batches(home/"tokens", replace(config, rows=2), r, 2) for r in range(2)]
    for step in 0, 13, 30, 60: # the last is past the budget: the schedule begins again
        assert np.array_equal(one.batch(step).tokens[0], np.concatenate([b.batch(step).tokens[0] for b in two]))
    papers, first, second = one.domains[one.papers], Counter(), Counter()
    for step in range(budget // 128):
        s = one.rows.places(one.rows_of(step).ravel())
        for domain, n in zip(papers[s.paper], s.n_tokens): (first if step < budget // 256 else second)[domain] += int(n)
    total = sum(first.values())
    assert abs(first["math"]/total - .5) < .06 and abs(first["cs"]/total - .5) < .06 # borders between papers blur it
    assert second["physics"] > .9 * sum(second.values())
    with pytest.raises(StudyError, match="asks for 'stat'"): Batches(home/"tokens", BatchConfig(context=32, curriculum=({"at": 0, "stat": 1},)))


def test_documents_are_told_apart(home):
    within = Batches(home/"tokens", BatchConfig(context=64, rows=3, attention="within", prefetch=False))
    end = Tokenizer.load(home/"tokens").end_id
    for step in range(20):
        b = within.batch(step)
        changes = np.diff(b.documents, axis=-1) != 0
        assert (changes == (b.tokens[..., :-2] == end)).all() # a document ends with its end token and nowhere else


def test_shards_elsewhere_serve_the_same_and_refuse_what_was_cut(home, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for file in (home/"tokens").iterdir(): memory.pipe_file(f"/far/{file.name}", file.read_bytes())
    config = BatchConfig(context=32, rows=2, prefetch=False)
    near, far = Batches(home/"tokens", config), Batches("memory://far", config, cache=tmp_path/"a")
    for step in range(0, 40, 3): assert np.array_equal(near.batch(step).tokens, far.batch(step).tokens)
    memory.pipe_file("/far/train-cs.bin", (home/"tokens"/"train-cs.bin").read_bytes()[:-2])
    with pytest.raises(StudyError, match="index says"): Batches("memory://far", config, cache=tmp_path/"b")
    memory.rm("/far", recursive=True)
    with pytest.raises(StudyError, match="memory://far"): Batches("memory://far", config, cache=tmp_path/"c")


@pytest.mark.peer
def test_megatron_core_reads_our_shards(home):
    "Megatron's own reader, in a process of its own: it brings much along."
    if importlib.util.find_spec("megatron") is None: pytest.skip("the package megatron-core is not installed (extra bench)")
    code = f"""
import sys, numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from arxiv_study.tokens.indexed import Shard
for name in "train-math", "val-cs":
    theirs, ours = IndexedDataset({str(home/'tokens')!r} + "/" + name), Shard({str(home/'tokens')!r} + "/" + name)
    assert len(theirs) == len(ours) and theirs.document_indices.tolist() == list(range(len(ours) + 1))
    for i in range(len(ours)): assert np.array_equal(theirs[i], ours.read(i)) and theirs.get(i, offset=1, length=2).tolist() == ours.read(i, 1, 3).tolist()
print("read")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip().endswith("read"), run.stderr[-2000:]


def test_the_order_does_not_depend_on_the_number_of_ranks(home):
    def served(world_size, rows, accumulation, n_rows):
        batches = [Batches(home/"tokens", BatchConfig(context=32, rows=rows, accumulation=accumulation, prefetch=False), r, world_size) for r in range(world_size)]
        steps = n_rows // (world_size * rows * accumulation)
        return [row.tolist() for s in range(steps) for step in [[b.batch(s).tokens for b in batches]] for a in range(accumulation) for t in step for row in t[a]]
    first = served(1, 1, 1, 144)
    assert all(served(*shape, 144) == first for shape in [(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 1, 3), (3, 3, 1)])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("order", ["mixed", "prose_first"])
def test_an_epoch_repeats_and_skips_nothing(home, order, layout):
    ranks = [Batches(home/"tokens", BatchConfig(context=32, rows=2, order=order, layout=layout, prefetch=False), r, 2) for r in range(2)]
    n = ranks[0].n_rows
    for epoch in 0, 1, 5:
        steps = range(epoch * n // 4, -(-(epoch + 1) * n // 4))
        positions = np.concatenate([b.positions(s).ravel() for s in steps for b in ranks])
        inside = positions[(positions >= epoch * n) & (positions < (epoch + 1) * n)]
        assert sorted(ranks[0].order.rows_at(inside)) == list(range(n))


def test_each_token_is_predicted_once(home):
    one = Batches(home/"tokens", BatchConfig(context=32, rows=1, prefetch=False))
    starts = sum(one.batch(s).n_tokens for s in range(one.n_rows))
    assert starts == one.n_tokens_per_epoch == one.rows.n_targets // 32 * 32


def test_padding_is_left_out_of_the_targets(home):
    batches = Batches(home/"tokens", BatchConfig(context=200, rows=4, layout="padded", prefetch=False))
    tokenizer, seen = Tokenizer.load(home/"tokens"), 0
    for step in range(5):
        b = batches.batch(step)
        assert ((b.targets == IGNORED) == (b.tokens[..., 1:] == tokenizer.pad_id)).all() and b.n_tokens == (b.targets != IGNORED).sum()
        seen += int((b.targets == IGNORED).sum())
    assert seen


def test_tokenizing_on_the_fly_gives_the_same_batches(home):
    for layout in "packed", "padded":
        made = [Batches(home/"tokens", BatchConfig(context=64, rows=3, layout=layout, source=s), corpus_dir=home/"corpus") for s in ("shards", "text")]
        for step in 0, 1, 9, 4: assert np.array_equal(made[0].batch(step).tokens, made[1].batch(step).tokens)


def test_another_process_reads_the_same(home):
    code = f"""
import hashlib
from arxiv_study.tokens.batches import Batches, BatchConfig
b = Batches({str(home/'tokens')!r}, BatchConfig(context=32, rows=2), 1, 2)
print(hashlib.sha256(b.batch(7).tokens.tobytes() + b.batch(3).tokens.tobytes()).hexdigest())
import sys; assert 'torch' not in sys.modules
"""
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]))
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(env, PYTHONHASHSEED=str(i))).stdout for i in range(2)}
    assert len(digests) == 1


def test_a_throttle_is_waited_for_and_prefetch_hides_it(home):
    config = BatchConfig(context=64, rows=1, throttle_mb_per_s=[0.002], prefetch=False)
    batches = Batches(home/"tokens", config)
    assert batches.batch(0).wait_s >= 0.06 and batches.batch(1).throttle == 0.002
    ahead = Batches(home/"tokens", replace(config, prefetch=True))
    ahead.batch(0)
    time.sleep(0.15)
    assert ahead.batch(1).wait_s < 0.05
    ahead.close()


def test_the_first_batch_of_a_large_shard_comes_at_once(home, tmp_path):
    "50 GB of zeros in a sparse file."
    tokens = Path(shutil.copytree(home/"domain", tmp_path/"tokens"))
    n_documents, size = 50, 500_000_000
    from arxiv_study.storage import file_sha256, write_json
    from arxiv_study.tokens.indexed import write_index
    write_index(tokens/"train-math.idx", np.full(n_documents, size), np.dtype(np.uint16))
    with open(tokens/"train-math.bin", "wb") as f: f.truncate(2 * n_documents * size)
    pl.DataFrame(dict(id=[str(i) for i in range(n_documents)], split="train", domain="math", shard_index=np.arange(n_documents, dtype=np.uint32),
                      n_tokens=size, formula_density=0.1, order_key=np.arange(n_documents, dtype=np.uint64))).write_parquet(tokens/"papers.parquet")
    shard = dict(split="train", domain="math", idx_sha256=file_sha256(tokens/"train-math.idx"))
    write_json(tokens/"shards.json", dict(fingerprint="0"*8, tokenizer=Tokenizer.load(tokens).fingerprint, vocab_size=350, bytes_per_token=2, shards={"train-math": shard}))
    started = time.perf_counter()
    batch = Batches(tokens, BatchConfig(prefetch=False)).batch(123_456)
    assert batch.n_tokens == 1024 and time.perf_counter() - started < 2  # 0.03 s on an idle machine


# ---- bad input

def test_a_truncated_bin(tokens):
    path = tokens/"train-math.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StudyError, match=r"train-math.bin is truncated .* pack the corpus again"): Batches(tokens)


def test_a_foreign_index(tokens, home, tmp_path):
    shutil.copy(tokens/"train-cs.idx", tokens/"train-math.idx")
    with pytest.raises(StudyError, match="another shard's|not the index"): Batches(tokens)
    shard = Shard(home/"tokens"/"train-math")  # same length in all, other documents
    with shard_writer(tokens/"train-math", 350) as w:
        w.add(np.concatenate([shard.read(0), shard.read(1)]))
        for i in range(2, len(shard)): w.add(shard.read(i))
    with pytest.raises(StudyError, match="not the index that was packed"): Batches(tokens)


def test_a_changed_tokenizer(tokens, home):
    for name in "tokenizer.model", "config.json": shutil.copy(home/"plain"/name, tokens/name)
    with pytest.raises(StudyError, match="not the one its shards were written with"): Batches(tokens)
    shutil.copy(home/"unigram"/"tokenizer.model", tokens/"tokenizer.model")
    with pytest.raises(StudyError, match="is not the model"): Batches(tokens)


def test_damaged_or_missing_files(tokens):
    (tokens/"shards.json").write_text("{")
    with pytest.raises(StudyError, match="shards.json is not valid JSON"): Batches(tokens)
    (tokens/"shards.json").unlink()
    with pytest.raises(StudyError, match="shards.json does not exist"): Batches(tokens)


def test_an_empty_domain_and_an_empty_split(home, tmp_path):
    with pytest.raises(StudyError, match="no training paper of domain 'stat'; it has cs, math, physics"): Batches(home/"tokens", BatchConfig(domains=("stat",)))
    corpus = write_corpus(tmp_path/"corpus", n=9)
    path = corpus/"text"/"part-000.parquet"
    pl.read_parquet(path).with_columns(split=pl.lit("test")).write_parquet(path)
    with pytest.raises(StudyError, match="no paper in the training split"): train_tokenizer(corpus, tmp_path/"t", TokenizerConfig(vocab_size=300))
    with pytest.raises(StudyError, match="no paper in the training split"): pack(corpus, home/"domain", tmp_path/"p")
    assert not (tmp_path/"t").exists() and not (tmp_path/"p").exists()


def test_a_corpus_that_is_not_there(home, tmp_path):
    with pytest.raises(StudyError, match="build the corpus first"): pack(tmp_path, home/"domain", tmp_path/"p")
    with pytest.raises(StudyError, match="config.json does not exist"): Tokenizer.load(tmp_path)
