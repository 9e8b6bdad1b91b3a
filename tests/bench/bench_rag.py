"""What the neighbours alone can do, and how fast they are found: python tests/bench/bench_rag.py [--sweep]

search: milliseconds a query over 500,000 states, one query and forty at a time, beside torch.cdist with topk and scipy's cKDTree,
in turns, five times: medians and the spread of the ratio. cdist and the tree do not diversify; the tree is built once, not counted.
--sweep: closed loop at 300, 600, 1200, 2400, four episodes each, over k, --store_episodes and --rate_weight; everything else is the default.
Run it where out/data/cheetah_ladder.hdf5 is, or can be made.
"""
import os, pathlib, platform, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import rag_cheetah as rag


def in_turns(rounds, jobs):
    times = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - began)
    return times


def search():
    rng, E, L, k = np.random.default_rng(0), 500, 1000, 8
    obs, act, rate = (np.float32(rng.standard_normal(s)) for s in ((E * L, 17), (E * L, 6), (E * L,)))
    store = rag.Store(obs, act, rate, np.full(E, L), 4.0)
    keys = store.table[:-1].T.contiguous()
    try:
        from scipy.spatial import cKDTree
        tree = cKDTree(keys.numpy())
    except ImportError:
        tree = None
    for n in (1, 40):
        q, want = obs[:n] + 0.1 * np.float32(rng.standard_normal((n, 17))), rate[:n]
        key = torch.from_numpy(store.key(q, want))
        jobs = {"find()": lambda: store.find(q, want, k), "torch.cdist, topk": lambda: torch.cdist(key, keys).topk(k, 1, largest=False)}
        if tree:
            jobs["scipy cKDTree"] = lambda: tree.query(key.numpy(), k)
        times = in_turns(6, jobs)
        for name, t in times.items():
            ratio = np.array(t[1:]) / np.array(times["find()"][1:])                 # the first round warms up
            print(f"{E * L:,} states, {n:2d} queries, {name:18s} {1000 * np.median(t[1:]) / n:8.2f} ms a query, find() is "
                  f"{np.median(ratio):.2f}x as fast ({ratio.min():.2f}-{ratio.max():.2f}); asked: 2 ms on 2 cores", flush=True)


def sweep():
    def row(**change):
        args = rag.get_args(["--episodes", "4", "--targets", "300", "600", "1200", "2400", *(f"--{k}={v}" for k, v in change.items())])
        asked = np.repeat(args.targets, args.episodes)
        got, fell, *_ = rag.evaluate(args, rag.find_store(args), asked)
        cells = "  ".join(f"{g.mean():6.0f} +- {g.std():5.0f}" for g in got.reshape(-1, args.episodes))
        print(f"{' '.join(f'{k} {v}' for k, v in change.items()) or 'the default':34s}{cells}   error {np.mean(abs(got - asked) / asked):7.2%}  "
              f"fell {fell.sum()}/{len(fell)}", flush=True)
    for n in (55, 20, 10, 5, 2):                    # of 655
        for k in (1, 8):
            row(store_episodes=n, k=k)
    for w in (0, 0.25):
        row(store_episodes=55, rate_weight=w)
    for k in (1, 4, 8, 32, 128):
        row(k=k)


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    sweep() if "--sweep" in sys.argv else search()
