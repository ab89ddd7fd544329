"""Timing on a noisy machine: the contestants take turns, each figure is a median, and only ratios from one run are compared."""
import statistics, time

def medians(contestants, repeats=5, clock=time.perf_counter):
    "Median seconds of each contestant (name -> function), after one turn to warm up; `time.process_time` leaves the neighbours of a process out."
    seconds = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, work in contestants.items():
            start = clock()
            work()
            if turn or not repeats: seconds[name].append(clock() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}

def turns_by_item(contestants, n_items, repeats=2):
    "Processor seconds of each contestant (name -> function of an item's number) over all items: they take turns at each item, and the best turn counts, so that a neighbour slows all alike."
    seconds = dict.fromkeys(contestants, 0.)
    for i in range(n_items):
        best = dict.fromkeys(contestants, float("inf"))
        for _ in range(repeats):
            for name, work in contestants.items():
                start = time.process_time()
                work(i)
                best[name] = min(best[name], time.process_time() - start)
        for name in contestants: seconds[name] += best[name]
    return seconds

def table(title, unit, amount, seconds, bound):
    "Print rates (amount a second) and each one's ratio to the bound."
    print(f"\n{title}")
    for name, s in sorted(seconds.items(), key=lambda x: x[1]):
        print(f"  {name:58} {amount/s:12,.1f} {unit}   {seconds[bound]/s:6.2f} of {bound}", flush=True)

def bars(title, rows):
    "Print what was asked for beside what was measured; rows of (what, measured, least)."
    print(f"\n{title}")
    for what, measured, least in rows:
        print(f"  {'holds' if measured >= least else 'FAILS':6} {what:70} {measured:8.2f}   asked: {least:g}", flush=True)
