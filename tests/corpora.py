"""A small corpus of made-up papers in the layout of the corpus room, for tests of what reads it."""
import numpy as np, polars as pl

WORDS = r"the of let a space map proof then holds every $\alpha$ $\beta_1$ $x\in\inner{y}$ \[ \int_0^1 f\,dx \] \\ 1729 42".split(" ")


def write_corpus(folder, n=90, domains=("math", "cs", "physics"), seed=0):
    rng = np.random.default_rng(seed)
    def paper(i):
        text = "\n".join(" ".join(rng.choice(WORDS, 12)) for _ in range(rng.integers(1, 40))) + "\n\n\\begin{proof}\ndone\n\\end{proof}\n"
        return dict(id=f"2401.{i:05d}", text=text, domain=domains[i % len(domains)], split="val" if i % 10 == 9 else "train",
                    formula_density=float(rng.random()), n_bytes=len(text.encode()))
    (folder/"text").mkdir(parents=True)
    pl.DataFrame([paper(i) for i in range(n)]).write_parquet(folder/"text/part-000.parquet")
    return folder
