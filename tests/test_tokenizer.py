"""The tokenizer: what a chapter's cells cannot test. Round trips over all of Unicode, peers, real papers, processes, bad input."""
import json
from base64 import b64encode
from pathlib import Path
import numpy as np, polars as pl, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from arxiv_study.settings import StudyError
from arxiv_study.tokens.stability import stability
from arxiv_study.tokens.tokenizer import ESCAPE, Tokenizer, TokenizerConfig, blocks, encoders, learn, train_tokenizer
from corpora import WORDS, write_corpus

REAL = Path(__file__).parents[1].parent/"shared"/"arxiv"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizers")
    write_corpus(home/"corpus")
    for name, config in dict(domain={}, plain=dict(latex_symbols=False, split_digits=False), unigram=dict(kind="unigram", vocab_size=310), bytes=dict(kind="bytes")).items():
        train_tokenizer(home/"corpus", home/name, TokenizerConfig(**{"vocab_size": 350, **config}))
    return home


def texts_of(corpus): return pl.read_parquet(corpus/"text"/"part-000.parquet")["text"].to_list()


# ---- any text

NASTY = st.sampled_from(["\\", "\n", "\n\n", "\r\n", "\t", " ", "  ", "\u2581", ESCAPE, "\U000F0000", "\U000F0007", "\U000FFFFD", "\x00", "<0x0A>", "<|document_end|>", "<|unknown|>",
                         r"\alpha", r"\in", r"\inner", r"\\in", r"\begin{proof}", r"\end{proof", "123", "\ufeff", "\ufffd", "e\u0301", "\U0010FFFF", "0010fffd"])
TEXT = st.lists(st.one_of(NASTY, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=12).map("".join)
CAMPAIGN = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

@pytest.mark.parametrize("kind", ["domain", "plain", "unigram", "bytes"])
def test_round_trip_of_any_text(home, kind):
    tokenizer = Tokenizer.load(home/kind)
    @settings(max_examples=200, **CAMPAIGN)
    @given(TEXT)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and b"".join(tokenizer.piece_bytes(text)) == text.encode()
        assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.end_id not in ids and tokenizer.pad_id not in ids
    check()


@pytest.mark.parametrize("kind", ["domain", "plain", "unigram"])
def test_blocks_change_no_token(home, kind):
    tokenizer = Tokenizer.load(home/kind)
    @settings(max_examples=200, **CAMPAIGN)
    @given(TEXT, st.integers(1, 20))
    def check(text, n_chars):
        cut = blocks(text, n_chars)
        assert "".join(cut) == text and len(blocks(text)) == 1
        assert [i for b in cut for i in tokenizer.encode(b).tolist()] == tokenizer.encode(text).tolist()
    check()


@pytest.mark.parametrize("kind", ["domain", "plain", "unigram"])
def test_units_change_no_token_where_sentencepiece_has_no_choice(home, kind):
    "Cutting before a space is what SentencePiece does itself: no piece holds a space after another character."
    tokenizer = Tokenizer.load(home/kind)
    @settings(max_examples=100, **CAMPAIGN)
    @given(st.lists(st.sampled_from([w for w in " ".join(WORDS).split(" ") if "\\" not in w] + [" ", "  ", "", "$x_1$"]), max_size=30).map(" ".join))
    def check(text): assert tokenizer.encode(text).tolist() == tokenizer.processor.encode(text, out_type=int)
    check()


# ---- control sequences

def tex_words(text):
    "Control words of a text, read character by character as TeX does (The TeXbook, chapter 8)."
    found, i = [], 0
    while i < len(text):
        if text[i] != "\\": i += 1; continue
        j = i + 1
        while j < len(text) and text[j].isascii() and text[j].isalpha(): j += 1
        if j > i + 1: found.append(text[i:j])
        i = max(j, i + 2)
    return found

def test_a_symbol_fires_exactly_as_the_whole_control_word(home):
    tokenizer = Tokenizer.load(home/"domain")
    symbols = {s for s in tokenizer.codec.symbols if s[1:].isalpha() and s[0] == "\\"}
    assert {r"\in", r"\inner", r"\alpha"} <= symbols
    known = Tokenizer(tokenizer.config, [r"\unused" if s == r"\inner" else s for s in tokenizer.codec.symbols], tokenizer.model)
    symbols = symbols - {r"\inner"} | {r"\unused"}
    @settings(max_examples=200, **CAMPAIGN)
    @given(st.lists(st.one_of(st.sampled_from(["\\", r"\in", "ner", "dex", "f", r"\int", r"\alpha", "{", " ", "\n", "1", "_", "in", "\u00e9", "\\\\", r"\unused"])), max_size=14).map("".join))
    def check(text):
        assert [p for p in known.pieces(text) if p in symbols] == [w for w in tex_words(text) if w in symbols]
    check()


def test_a_control_sequence_is_cut_alike_everywhere(home):
    tokenizer = Tokenizer.load(home/"domain")
    alone = tokenizer.encode(r"\unheardof").tolist()
    for before in "", "x", "(", " ", "\n", r"\alpha", r"\\":
        for after in "", "(", " ", "1", "\n", r"\in":
            around = [tokenizer.encode(t).tolist() for t in (before, after)]
            assert tokenizer.encode(rf"{before}\unheardof{after}").tolist() == around[0] + alone + around[1]


def test_the_measure_of_consistency_punishes_a_bare_user_defined_symbol(home):
    "The same sentences, once through a SentencePiece model that was given `\\in` as it is spelled."
    import io, sentencepiece
    lines, model = [r"x \in A and \inner{x} \index{y} z" for _ in range(40)], io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=280, model_type="bpe", byte_fallback=True,
                                             user_defined_symbols=[r"\in"], add_dummy_prefix=False, normalization_rule_name="identity", minloglevel=2)
    bare = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    measure = lambda segment: stability(segment, lines, 350)["context_consistency"]
    fires = measure(lambda t: [p.replace("\u2581", " ").encode() for p in bare.encode(t, out_type=str)])
    assert fires == pytest.approx((40 + 40 + 40) / (120 + 40 + 40))  # \in is right in 40 of 120 places, \inner and \index always alike
    assert measure(Tokenizer.load(home/"domain").piece_bytes) == 1


def test_digits_stand_alone_only_where_asked(home):
    assert Tokenizer.load(home/"domain").pieces("1729") == ["1", "7", "2", "9"]
    assert len(Tokenizer.load(home/"plain").pieces("1729")) < 4


def test_no_learned_entry_has_the_spelling_of_a_symbol(home):
    from arxiv_study.tokens.exchange import entry_names
    names = entry_names(Tokenizer.load(home/"domain"))
    assert len(set(names)) == len(names)


# ---- training

def test_training_is_deterministic_and_says_what_the_text_supports(home, tmp_path):
    again = train_tokenizer(home/"corpus", tmp_path/"again", TokenizerConfig(vocab_size=350))
    for file in again.iterdir(): assert file.read_bytes() == (home/"domain"/file.name).read_bytes()
    for kind in "bpe", "unigram":
        with pytest.raises(StudyError, match=r"supports a vocabulary of at most (\d+)") as e:
            train_tokenizer(home/"corpus", tmp_path/"large", TokenizerConfig(kind=kind, vocab_size=50_000))
        largest = int(str(e.value).split("at most ")[1].split()[0])
        out = train_tokenizer(home/"corpus", tmp_path/kind, TokenizerConfig(kind=kind, vocab_size=largest, latex_symbols=True))
        assert Tokenizer.load(out).vocab_size == largest
    assert not (tmp_path/"large").exists()


def test_the_tables_of_a_corpus_in_any_pieces_give_the_same_tokenizer(home, tmp_path):
    "Parts and their order of rows come from the number of workers."
    papers = pl.read_parquet(home/"corpus"/"text"/"part-000.parquet")
    (tmp_path/"c"/"text").mkdir(parents=True)
    for i in range(3): papers[i::3].reverse().write_parquet(tmp_path/"c"/"text"/f"part-{i:03d}.parquet")
    out = train_tokenizer(tmp_path/"c", tmp_path/"t", TokenizerConfig(vocab_size=350))
    for file in out.iterdir(): assert file.read_bytes() == (home/"domain"/file.name).read_bytes()


def test_one_tree_does_not_choose_the_symbols():
    "Planted: 30 papers of one tree share a macro; three trees of one paper share another."
    text = lambda i, macro: f"{macro} \\alpha " + " ".join("".join(w) for w in np.random.default_rng(i).choice(list("abcdefghij"), (80, 4))) + "\n"
    tree = [dict(domain="math", group="tree", text=text(i, r"\treemacro")) for i in range(30)]
    others = [dict(domain="math", group=f"g{i}", text=text(99 + i, r"\hbar")) for i in range(3)]
    sample, config = pl.DataFrame(tree + others), TokenizerConfig(vocab_size=400)
    by_group = learn(sample, config).codec.symbols
    assert r"\hbar" in by_group and r"\treemacro" not in by_group
    assert r"\treemacro" in learn(sample.with_columns(group=pl.int_range(33).cast(pl.String)), config).codec.symbols


def test_forgetting_units_changes_nothing(home, monkeypatch):
    from arxiv_study.tokens import tokenizer as module
    texts = texts_of(home/"corpus")
    tokenizer = Tokenizer.load(home/"domain")
    ids = tokenizer.encode_many(texts)
    monkeypatch.setattr(module, "REMEMBERED", 3)
    assert all(np.array_equal(a, tokenizer.encode(t)) for a, t in zip(ids, texts))


def test_several_processes_give_the_same_ids(home):
    tokenizer, texts = Tokenizer.load(home/"domain"), ["", *texts_of(home/"corpus"), "one line\n"*60_000]
    with encoders(tokenizer, 2) as encode_all: found = encode_all(texts)
    assert all(np.array_equal(a, b) for a, b in zip(found, tokenizer.encode_many(texts), strict=True))


# ---- bad input

@pytest.mark.parametrize("kind", ["domain", "bytes"])
def test_what_is_not_utf8_is_refused(home, kind):
    tokenizer = Tokenizer.load(home/kind)
    with pytest.raises(StudyError, match="byte 2 of a text, 0xef, is not valid UTF-8"): tokenizer.encode(b"na\xefve")
    with pytest.raises(StudyError, match="character 2 of a text, U.DCEF, is half a character"): tokenizer.encode("na\udcefve")
    assert tokenizer.decode(tokenizer.encode("na\u00efve".encode())) == "na\u00efve"


def test_a_vocabulary_out_of_range():
    for size in 200, 102_401:
        with pytest.raises(StudyError, match="cannot be made; ask for 300"): TokenizerConfig(vocab_size=size)


def test_a_corpus_without_training_text(home, tmp_path):
    with pytest.raises(StudyError, match="build the corpus first"): train_tokenizer(tmp_path, tmp_path/"t")
    corpus = write_corpus(tmp_path/"corpus", n=9)
    path = corpus/"text"/"part-000.parquet"
    pl.read_parquet(path).with_columns(split=pl.lit("test")).write_parquet(path)
    with pytest.raises(StudyError, match="no paper in the training split"): train_tokenizer(corpus, tmp_path/"t")
    pl.read_parquet(path).with_columns(split=pl.lit("train"), text=pl.lit(""), n_bytes=pl.lit(0)).write_parquet(path)
    with pytest.raises(StudyError, match="hold no text"): train_tokenizer(corpus, tmp_path/"t")
    assert not (tmp_path/"t").exists()


# ---- other formats

def fast(tokenizer):
    from arxiv_study.tokens.exchange import fast_tokenizer
    return pytest.importorskip("tokenizers", reason="the package tokenizers is not installed (extra export)").Tokenizer.from_str(json.dumps(fast_tokenizer(tokenizer)))

@pytest.mark.peer
@pytest.mark.parametrize("kind", ["domain", "plain"])
def test_the_fast_tokenizer_has_equal_ids(home, kind):
    tokenizer = Tokenizer.load(home/kind)
    peer = fast(tokenizer)
    @settings(max_examples=150, **CAMPAIGN)
    @given(st.lists(st.sampled_from(["\\", "\n", "\n\n", "\r\n", "\t", " ", "  ", "\u2581", ESCAPE, r"\alpha", r"\in", r"\inner", r"\\in", r"\begin{proof}", r"\end{proof", "123", "\ufeff",
                                     "e\u0301", "\u4e2d", "\U0001F40C", "0010fffd", "word", "proof", r"\unheardof", "}{", "aaaa"]), max_size=14).map("".join))
    def check(text):
        ids = peer.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text).tolist() and peer.decode(ids) == text
    check()


def test_transformers_opens_what_is_written(home, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed (extra export)")
    from arxiv_study.tokens.exchange import write_fast_tokenizer
    tokenizer, texts = Tokenizer.load(home/"domain"), texts_of(home/"corpus")
    assert write_fast_tokenizer(tokenizer, tmp_path/"hf", texts) == []
    (tmp_path/"hf"/"config.json").write_text(json.dumps(dict(model_type="llama", architectures=["LlamaForCausalLM"])))  # as an exported model has it
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path/"hf")
    assert (peer.eos_token_id, peer.pad_token_id, len(peer)) == (tokenizer.end_id, tokenizer.pad_id, tokenizer.vocab_size)
    for text in texts[:9]:
        assert peer(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert peer.decode(peer(text)["input_ids"]) == text


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    "A vocabulary of the GPT-2 kind, trained by the `tokenizers` library: its JSON, and its entries in tiktoken's format."
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed (extra export)")
    from arxiv_study.tokens.exchange import piece_of
    folder = tmp_path_factory.mktemp("ranks")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer, peer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    lines = [" ".join(np.random.default_rng(i).choice([*WORDS, "it's", "caf\u00e9 123456", "\u4e2d\u6587"], 30)) for i in range(300)]
    peer.train_from_iterator(lines, tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    peer.save(str(folder/"tokenizer.json"))
    entries = sorted(peer.get_vocab().items(), key=lambda x: x[1])
    (folder/"r50k_made.tiktoken").write_bytes(b"\n".join(b64encode(piece_of(e, True)) + b" %d" % i for e, i in entries))
    return folder

def test_ranks_are_read_as_the_library_that_made_them_reads_them(byte_level):
    "Our byte-pair encoding over ranks against the `tokenizers` library's, which has merges; both cut words as GPT-2 does."
    from arxiv_study.tokens.exchange import read_vocabulary
    ranks, peer = read_vocabulary(byte_level/"r50k_made.tiktoken"), read_vocabulary(byte_level/"tokenizer.json")
    assert ranks.vocab_size == peer.vocab_size
    @settings(max_examples=200, **CAMPAIGN)
    @given(st.lists(st.one_of(st.sampled_from([*WORDS, "it's", "I'LL", "12345", "  ", "\n", " \n ", "\t"]), st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=4)), max_size=9).map("".join))
    def check(text):
        assert ranks.segment(text) == peer.segment(text)
        assert b"".join(ranks.segment(text)) == text.encode()
    check()


@pytest.mark.peer
@pytest.mark.parametrize("words", ["r50k", "cl100k", "o200k"])
def test_tiktoken_cuts_alike(byte_level, words):
    tiktoken = pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")
    from arxiv_study.tokens.exchange import WORDS_OF, read_ranks, tiktoken_vocabulary
    path = byte_level/"r50k_made.tiktoken"
    peer = tiktoken.Encoding("made", pat_str=WORDS_OF[words], mergeable_ranks=read_ranks(path), special_tokens={})
    mine = tiktoken_vocabulary(path, words)
    @settings(max_examples=200, **CAMPAIGN)
    @given(st.lists(st.one_of(st.sampled_from([*WORDS, "it's", "I'LL", "12345", "  ", "\n", " \n ", "\t"]), st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=4)), max_size=9).map("".join))
    def check(text): assert mine.segment(text) == [peer.decode_single_token_bytes(i) for i in peer.encode_ordinary(text)]
    check()


# ---- real papers

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    if not REAL.is_dir(): pytest.skip(f"no real sources at {REAL}")
    from arxiv_study.corpus.pipeline import CorpusConfig, build_corpus
    folder = tmp_path_factory.mktemp("real")
    build_corpus(REAL, folder/"corpus", CorpusConfig(), workers=2)
    train_tokenizer(folder/"corpus", folder/"tokenizer", TokenizerConfig())
    return folder

@pytest.mark.slow
def test_every_real_document_comes_back(real):
    tokenizer = Tokenizer.load(real/"tokenizer")
    for text in pl.read_parquet(real/"corpus"/"text"/"*.parquet")["text"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if len(text) < 300_000: assert b"".join(tokenizer.piece_bytes(text)) == text.encode()

@pytest.mark.slow
@pytest.mark.peer
def test_every_real_document_has_the_ids_of_the_fast_tokenizer(real):
    tokenizer = Tokenizer.load(real/"tokenizer")
    peer, texts = fast(tokenizer), pl.read_parquet(real/"corpus"/"text"/"*.parquet")["text"].to_list()
    for i in range(0, len(texts), 16):
        for text, found in zip(texts[i:i+16], peer.encode_batch_fast(texts[i:i+16], add_special_tokens=False)):
            assert found.ids == tokenizer.encode(text).tolist()


def test_round_trip_of_real_sources(home):
    if not REAL.is_dir(): pytest.skip(f"no real sources at {REAL}")
    import gzip, tarfile
    tokenizer, n = Tokenizer.load(home/"domain"), 0
    for tar in sorted(REAL.glob("src/*.tar"))[:2]:
        for member in (bulk := tarfile.open(tar)):
            if not member.name.endswith(".gz") or n > 3_000_000: continue
            try: text = gzip.decompress(bulk.extractfile(member).read()).decode("latin-1")[:200_000]
            except (EOFError, OSError): continue
            assert tokenizer.decode(tokenizer.encode(text)) == text
            n += len(text)
    assert n
