"""Batches from a warm page cache against bare NumPy: `python -m benchmarks.batches [TOKENS]`, a packed folder, else a miniature of 400 papers."""
import shutil, sys, tempfile, time
from pathlib import Path
import numpy as np, polars as pl
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
from arxiv_study.storage import file_sha256, write_json
from arxiv_study.tokens.batches import BatchConfig, Batches
from arxiv_study.tokens.indexed import write_index
from arxiv_study.tokens.pack import pack
from arxiv_study.tokens.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from .interleaved import bars, medians, table

# The bar is asked of the first: the second is 17 microseconds of Python for 1,024 tokens, of which training takes a tenth of a second.
SHAPES = {"paper: 32 x 32 windows of 768 tokens": dict(context=768, rows=32, accumulation=32), "desk: 4 windows of 256 tokens": dict(context=256, rows=4)}

def against_numpy(tokens_dir, shape, config):
    "The same tokens, picked by one index from one array."
    batches = Batches(tokens_dir, BatchConfig(**config, prefetch=False))
    stream = np.concatenate([batches.rows.source.tokens[s][a:a + n] for s, a, n in zip(batches.rows.source.shard[batches.papers], batches.rows.source.start[batches.papers], batches.rows.ends - batches.rows.starts)])
    n_steps = max(1, batches.n_rows // batches.rows_per_step)
    indices = [batches.rows_of(k)[..., None] * batches.config.context + np.arange(batches.config.context + 1) for k in range(n_steps)]
    assert all(np.array_equal(stream[i], batches.batch(k).tokens) for k, i in enumerate(indices[:5]))
    contestants = {"NumPy fancy indexing": lambda: [stream[i] for i in indices], "Batches": lambda: [batches.batch(k) for k in range(n_steps)]}
    seconds = medians(contestants, 9, time.process_time)
    table(f"{shape}, {n_steps} steps", "M tokens/s", sum(i.size for i in indices)/1e6, seconds, "NumPy fancy indexing")
    return f"batches of the {shape}, share of fancy indexing", seconds["NumPy fancy indexing"]/seconds["Batches"], .3

def first_of_a_large_shard(tokens_dir, d):
    "50 GB of zeros in a sparse file: seconds until the first batch."
    big = Path(shutil.copytree(tokens_dir, Path(d)/"big"))
    n_documents, size = 2500, 10_000_000
    write_index(big/"train-math.idx", np.full(n_documents, size), np.dtype(np.uint16))
    with open(big/"train-math.bin", "wb") as f: f.truncate(2*n_documents*size)
    pl.DataFrame(dict(id=[str(i) for i in range(n_documents)], split="train", domain="math", shard_index=np.arange(n_documents, dtype=np.uint32),
                      n_tokens=size, formula_density=.1, order_key=np.arange(n_documents, dtype=np.uint64))).write_parquet(big/"papers.parquet")
    write_json(big/"shards.json", dict(fingerprint="0"*8, tokenizer=Tokenizer.load(big).fingerprint, vocab_size=4096, bytes_per_token=2,
                                       shards={"train-math": dict(split="train", domain="math", idx_sha256=file_sha256(big/"train-math.idx"))}))
    def first():
        start = time.perf_counter()
        Batches(big, BatchConfig(prefetch=False)).batch(123_456)
        return time.perf_counter() - start
    seconds = sorted(first() for _ in range(5))[2]
    print(f"\nthe first batch from a shard of {2*n_documents*size/1e9:.0f} GB: {seconds:.3f} s")
    return "first batch of a 50 GB shard, 0.2 s over the time it took", .2/seconds, 1

def packed_miniature(d):
    write_miniature(Path(d)/"arxiv", 400)
    corpus = build_corpus(Path(d)/"arxiv", Path(d)/"corpus", CorpusConfig())
    return pack(corpus, train_tokenizer(corpus, Path(d)/"tokenizer", TokenizerConfig(vocab_size=2048)), Path(d)/"tokens")

def measure(tokens_dir):
    with tempfile.TemporaryDirectory() as d:
        return [[against_numpy(tokens_dir, shape, config) for shape, config in SHAPES.items()][0], first_of_a_large_shard(tokens_dir, d)]

def main(tokens_dir=None):
    with tempfile.TemporaryDirectory() as d: bars("what was asked for", measure(tokens_dir or packed_miniature(d)))

if __name__ == "__main__": main(*map(Path, sys.argv[1:2]))
