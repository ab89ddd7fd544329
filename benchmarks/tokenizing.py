"""The tokenizer's bars, against the `tokenizers` library and bare SentencePiece, and the report on every vocabulary that can be had: part of `python -m benchmarks.tokens`."""
import json, os, tempfile
from importlib.util import find_spec
from pathlib import Path
import numpy as np, polars as pl, sentencepiece
from arxiv_study.tokens.exchange import compare, fast_tokenizer, ours
from arxiv_study.tokens.tokenizer import Tokenizer, TokenizerConfig, blocks, encoders, learn, scan_papers, training_sample
from .interleaved import bars, medians, table
from .vocabularies import outside

VARIANTS = dict(domain={}, plain=dict(latex_symbols=False, split_digits=False), bytes=dict(kind="bytes"), prose=dict(sample="prose"), double=dict(vocab_size=8192)) # R03, R13 to R16
SHOWN = ("vocab_size", "round_trip", "bytes_per_token", "control_words_whole", "pieces_per_control_word", "context_consistency", "number_consistency", "straddling_pieces",
         "delimiters_aligned", "renyi_efficiency", "unused_vocabulary")

def some(texts, n_bytes):
    "Texts of about so many bytes in all, long ones among them."
    sizes = np.cumsum([len(t.encode()) for t in texts])
    return texts[:int(np.searchsorted(sizes, n_bytes)) + 1]

def alone(work):
    "Run the `tokenizers` library without its threads."
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try: work()
    finally: os.environ["TOKENIZERS_PARALLELISM"] = "true"

def speed(folder, texts, repeats=3):
    "Encoding side by side at one vocabulary size; ratios of ours to the library's, on one core and on all."
    n_mb, tokenizer = sum(len(t.encode()) for t in texts)/1e6, Tokenizer.load(folder)
    bare = sentencepiece.SentencePieceProcessor(model_file=str(folder/"tokenizer.model"))
    with encoders(tokenizer) as encode_all:
        contestants = {"ours, one core": lambda: tokenizer.encode_many(texts), "ours, one core, nothing met before": lambda: Tokenizer.load(folder).encode_many(texts),
                       "ours, all cores": lambda: encode_all(texts), "sentencepiece alone, one core": lambda: [bare.encode(t) for t in texts],
                       "sentencepiece alone, all cores": lambda: bare.encode(texts, num_threads=os.cpu_count())}
        if find_spec("tokenizers"):
            from tokenizers import Tokenizer as Fast
            fast = Fast.from_str(json.dumps(fast_tokenizer(tokenizer)))
            contestants |= {f"tokenizers, {call}, {where}": (lambda f=getattr(fast, call), run=run: run(lambda: f(texts, add_special_tokens=False)))
                            for call in ("encode_batch", "encode_batch_fast") for where, run in (("one core", alone), ("all cores", lambda work: work()))}
        else: print("tokenizers: left out, the package is not installed (extra export)")
        seconds = medians(contestants, repeats)
    table(f"encoding: {len(texts)} papers, {n_mb:.1f} MB, vocabulary {tokenizer.vocab_size}", "MB/s", n_mb, seconds, "ours, one core")
    best = lambda where: min((s for name, s in seconds.items() if name.startswith("tokenizers") and name.endswith(where)), default=None)
    return [(f"encoding, {where}: times the better of tokenizers' two", best(where)/seconds[f"ours, {where}"], 1) for where in ("one core", "all cores") if best(where)]

def long_paper(tokenizer, texts, repeats=3):
    "One text of 2 MB against the same bytes as texts of 20 kB."
    one = "".join(texts)[:2_000_000]
    small = blocks(one, 20_000)
    seconds = medians({"one text of 2 MB": lambda: tokenizer.encode(one), "texts of 20 kB": lambda: tokenizer.encode_many(small)}, repeats)
    return [("a text of 2 MB: share of the speed of texts of 20 kB", seconds["texts of 20 kB"]/seconds["one text of 2 MB"], .9)]

def exact(folder, texts):
    "Which documents come back, and which have the ids of the exported fast tokenizer."
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode_many(texts)
    rows = [(f"round trip: share of {len(texts)} documents", float(np.mean([tokenizer.decode(i) == t for i, t in zip(ids, texts)])), 1)]
    if find_spec("tokenizers"):
        from tokenizers import Tokenizer as Fast
        fast = Fast.from_str(json.dumps(fast_tokenizer(tokenizer)))
        rows.append((f"fast tokenizer: share of {len(texts)} documents with equal ids", float(np.mean([fast.encode_batch_fast([t], add_special_tokens=False)[0].ids == i.tolist() for t, i in zip(texts, ids)])), 1))
    return rows

def report(corpus, held_out):
    "One row a tokenizer: the variants of the runs, and what others use."
    sample = training_sample(corpus, TokenizerConfig())
    variants = [ours(name, learn(sample, TokenizerConfig(**change))) for name, change in VARIANTS.items()]
    with tempfile.TemporaryDirectory() as d: rows = compare([*variants, *outside(d)], held_out)
    per = [c for c in rows.columns if c.startswith("bytes_per_token_")]
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=220, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, float_precision=3, set_fmt_str_lengths=40):
        for title, columns in ("how symbols are cut", SHOWN), ("bytes a token, by kind of text and by domain", per):
            print(f"\n{title}, on {held_out.height} papers not trained on, {held_out['text'].str.len_bytes().sum()/1e6:.1f} MB")
            print(rows.select("name", *columns).transpose(include_header=True, header_name="measure", column_names="name"))

def held_out_papers(corpus, n_bytes=40_000):
    "Beginnings of the papers of the validation and test splits."
    from arxiv_study.tokens.tokenizer import head_lines
    papers = scan_papers(corpus).filter(pl.col("split") != "train").select("domain", "text").collect()
    return papers.with_columns(pl.Series("text", [head_lines(t, n_bytes) for t in papers["text"]]))

def tokenizing(corpus, folder):
    "All of it; `folder` is a tokenizer trained on the corpus."
    texts = scan_papers(corpus).select("text").collect()["text"].to_list()
    rows = speed(folder, some(texts, 6_000_000))
    bars("the tokenizer", [*rows, *long_paper(Tokenizer.load(folder), texts), *exact(folder, texts)])
    report(corpus, held_out_papers(corpus))
