"""Tables against bounds and peers, one module a room: `python -m benchmarks.corpus`. No test and no CI step waits on a clock."""
