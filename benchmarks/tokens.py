"""The token room: `python -m benchmarks.tokens [ARXIV]`, an arXiv folder, else a miniature of 400 papers."""
import sys, tempfile
from pathlib import Path
import numpy as np
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
from arxiv_study.tokens.batches import BatchConfig, Batches
from arxiv_study.tokens.pack import pack
from arxiv_study.tokens.tokenizer import TokenizerConfig, train_tokenizer
from .interleaved import medians, table
from .tokenizing import tokenizing

def serving(shards):
    config = BatchConfig(context=1024, rows=8, prefetch=False)
    batches = Batches(shards, config)
    steps = max(1, batches.n_rows//batches.rows_per_step)
    n_tokens = steps*batches.rows_per_step*config.context
    flat = np.zeros(n_tokens + config.context, np.uint16)
    starts = np.random.default_rng(0).permutation(n_tokens//config.context)*config.context
    def indexing():
        for part in np.array_split(starts, steps): flat[part[:, None] + np.arange(config.context + 1)[None, :] - (part[:, None] > 0)].astype(np.int64)
    table(f"serving batches: {n_tokens:,} tokens", "million tokens/s", n_tokens/1e6,
          medians({"NumPy fancy indexing of one array": indexing, "Batches.batch": lambda: [batches.batch(k) for k in range(steps)]}, 5), "NumPy fancy indexing of one array")
    batches.close()

def main(arxiv=None):
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        if arxiv is None: arxiv = d/"arxiv"; write_miniature(arxiv, 400)
        corpus = build_corpus(Path(arxiv), d/"corpus", CorpusConfig())
        tokenizer = train_tokenizer(corpus, d/"tokenizer", TokenizerConfig(vocab_size=4096))
        tokenizing(corpus, tokenizer)
        serving(pack(corpus, tokenizer, d/"shards"))

if __name__ == "__main__": main(*map(Path, sys.argv[1:2]))
