"""Bulk tars side by side: `python -m benchmarks.fetch [STREAMS …]`, from an S3 server on this machine whose every answer comes half a second late.

The bound is a closed form: so many tars of one stretch each, s at a time, cannot be there before ⌈tars/s⌉ late answers, and the manifest's before them. What the machine itself needs for the bytes is measured without the delay."""
import os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]/"tests"))
from arxiv_servers import serving_s3
from arxiv_study.corpus.bulk import fetch_bulk
from arxiv_study.corpus.fetch import FetchConfig
from arxiv_study.corpus.miniature import write_miniature
from .interleaved import bars

LATE_S, ROUNDS = .5, 3
ACCOUNT = dict(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="benchmark", AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")

def bound_s(n_tars, streams): return (1 + -(-n_tars//streams))*LATE_S

def fetched(bucket, streams, wait_s):
    "Seconds of one fetch, the tars, and what was asked and sent for it."
    bucket.wait_s, bucket.n, bucket.sent, bucket.most_open = wait_s, 0, 0, 0
    with tempfile.TemporaryDirectory() as d:
        start = time.monotonic()
        fetch_bulk(Path(d), FetchConfig(streams=streams), quiet=True)
        return time.monotonic() - start, {p.name: p.read_bytes() for p in (Path(d)/"src").glob("*.tar")}, (bucket.n, bucket.sent)

def main(streams=(1, 2, 4, 8)):
    with tempfile.TemporaryDirectory() as d:
        write_miniature(Path(d)/"mini", 240, seed=0, papers_per_tar=15)
        n = len(list((Path(d)/"mini"/"src").glob("*.tar")))
        with serving_s3(Path(d)/"mini") as (address, bucket):
            os.environ |= ACCOUNT | dict(AWS_ENDPOINT_URL=address)
            fetched(bucket, 1, 0) # warm
            own_s, tars, asked = fetched(bucket, 1, 0)
            print(f"{n} tars of {sum(map(len, tars.values()))/n/1e3:,.0f} kB, each answer {LATE_S:g} s late; without the delay one stream takes {own_s:.2f} s")
            rows = {s: [] for s in streams}
            for _ in range(ROUNDS):
                for s in streams: # in turns
                    seconds, came, paid = fetched(bucket, s, LATE_S)
                    assert came == tars and paid == asked and bucket.most_open <= s, "another number of streams brought other bytes, or another bill"
                    rows[s].append(seconds)
            median = {s: statistics.median(r) for s, r in rows.items()}
            for s in streams: print(f"  {s:2} at once: {median[s]:6.2f} s, not below {bound_s(n, s):6.2f} s; {median[streams[0]]/median[s]:5.2f} times as fast as {streams[0]}, at best {bound_s(n, streams[0])/bound_s(n, s):5.2f}", flush=True)
            bars("what was asked for", [(f"{s} at once: share of the speed that the delay and the machine's own {own_s:.2f} s allow", (bound_s(n, s) + own_s)/median[s], .9) for s in streams])

if __name__ == "__main__": main(tuple(map(int, sys.argv[1:])) or (1, 2, 4, 8))
