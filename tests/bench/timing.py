"""What two benchmarks share: jobs run in turns, and the ratio of their speeds with its spread."""
import time

import numpy as np


def in_turns(rounds, **jobs):
    """Run the jobs in turns; each returns how much it did. -> {name: [amount per second, ...]}"""
    speeds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            amount = job()
            speeds[name].append(amount / (time.perf_counter() - began))
    return speeds


def show(title, unit, speeds, ours, asked):
    """Medians, and the ratio of ours to each peer that asked names: asked {peer: what ratio}."""
    print(f"\n{title} ({unit})")
    for name, x in speeds.items():
        print(f"  {name:34s} {np.median(x):12.1f}")
    for name, ask in asked.items():
        r = np.array(speeds[ours]) / np.array(speeds[name])
        print(f"  {ours} / {name}: {np.median(r):.2f}x ({r.min():.2f}-{r.max():.2f}); asked {ask}")
