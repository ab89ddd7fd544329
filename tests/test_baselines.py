"""The byte 3-gram against another library's."""
import numpy as np
import pytest
from arxiv_study.study.baselines import count_ngrams, probabilities


@pytest.mark.peer
def test_the_weights_of_contexts_are_those_of_nltk():
    "NLTK ends at the frequencies of single symbols instead of a uniform base, so contexts are compared given the distribution below them."
    nltk = pytest.importorskip("nltk.lm")
    text = b"the theorem that the theta of the other thing thinks"
    grams = [[tuple(text[i:i + n].decode("latin-1")) for i in range(len(text) - n + 1)] for n in (1, 2, 3)]
    theirs = nltk.WittenBellInterpolated(3, vocabulary=nltk.Vocabulary([c for c in text.decode("latin-1")], unk_cutoff=1))
    theirs.fit(grams)
    for context, symbol in [("th", "e"), ("he", " "), ("e ", "t"), ("in", "k"), ("th", "a")]:
        below = [probabilities(count_ngrams([text], n), (context[3 - n:] + symbol).encode())[-1] for n in (1, 2, 3)]
        expected, lower = [], [theirs.score(symbol, list(context[2 - k:])) for k in range(3)]
        for k in (1, 2):  # what NLTK adds from the context alone: score = alpha + gamma * lower
            alpha, gamma = theirs.estimator.alpha_gamma(symbol, tuple(context[2 - k:]))
            expected.append(alpha + gamma * below[k - 1])
            assert lower[k] == pytest.approx(alpha + gamma * lower[k - 1])
        assert below[1:] == pytest.approx(expected, rel=1e-12)


def test_a_text_costs_what_a_direct_count_says():
    "Against dictionaries, on a text of few symbols."
    rng = np.random.default_rng(1)
    texts = [bytes(rng.choice(list(b"abc"), 200, p=(.6, .3, .1))) for _ in range(3)]
    model, asked = count_ngrams(texts), bytes(rng.choice(list(b"abcd"), 50))
    def p(context, b):
        below = p(context[1:], b) if context else 1 / 256
        after = [t[i + len(context)] for t in texts for i in range(len(t) - len(context)) if t[i:i + len(context)] == context]
        return (after.count(b) + len(set(after)) * below) / (len(after) + len(set(after))) if after else below
    assert probabilities(model, asked) == pytest.approx([p(asked[max(0, i - 2):i], b) for i, b in enumerate(asked)], rel=1e-12)
