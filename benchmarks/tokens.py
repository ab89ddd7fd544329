"""The token room: `python -m benchmarks.tokens [ARXIV]`, an arXiv folder, else a miniature of 400 papers."""
import sys, tempfile
from pathlib import Path
from arxiv_study.corpus.miniature import write_miniature
from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
from arxiv_study.tokens.pack import pack
from arxiv_study.tokens.tokenizer import TokenizerConfig, train_tokenizer
from .batches import measure
from .interleaved import bars
from .tokenizing import tokenizing

def main(arxiv=None):
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        if arxiv is None: arxiv = d/"arxiv"; write_miniature(arxiv, 400)
        corpus = build_corpus(Path(arxiv), d/"corpus", CorpusConfig())
        tokenizer = train_tokenizer(corpus, d/"tokenizer", TokenizerConfig(vocab_size=4096))
        tokenizing(corpus, tokenizer)
        bars("batches: what was asked for", measure(pack(corpus, tokenizer, d/"shards")))

if __name__ == "__main__":
    from benchmarks import tokens # workers import what they run, and `__main__` is no name for it
    tokens.main(*map(Path, sys.argv[1:2]))
