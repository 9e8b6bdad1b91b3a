"""What the neighbours alone can do, and how fast they are found: python tests/bench/bench_rag.py [--sweep]

search: milliseconds a query over 500,000 states, one query and forty at a time, beside torch.cdist with topk and scipy's cKDTree,
in turns, five times: medians and the spread of the ratio. cdist and the tree do not diversify; the tree is built once, not counted.
--sweep: closed loop at 300, 600, 1200, 2400, four episodes each, over k, --store_episodes and --rate_weight; everything else is the default.
Run it where out/data/cheetah_ladder.hdf5 is, or can be made.
"""
import os, pathlib, platform, sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import rag_cheetah as rag
from timing import in_turns


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
        jobs = {"find()": lambda: len(store.find(q, want, k)[0]), "torch.cdist, topk": lambda: len(torch.cdist(key, keys).topk(k, 1, largest=False)[0])}
        if tree:
            jobs["scipy cKDTree"] = lambda: len(tree.query(key.numpy(), k)[0])
        speeds = {name: np.array(x[1:]) for name, x in in_turns(6, **jobs).items()}             # the first round warms up
        print(f"\n{E * L:,} states, {n} queries at once (ms a query; asked of find(): 2 on 2 cores)")
        for name, x in speeds.items():
            print(f"  {name:34s} {1000 / np.median(x):12.2f}")
        for name, x in list(speeds.items())[1:]:
            r = speeds["find()"] / x
            print(f"  find() / {name}: {np.median(r):.2f}x ({r.min():.2f}-{r.max():.2f})", flush=True)


def sweep():
    def row(**change):
        args = rag.get_args(["--episodes", "4", "--targets", "300", "600", "1200", "2400", *(f"--{k}={v}" for k, v in change.items())])
        asked = np.repeat(args.targets, args.episodes)
        got, fell, *_ = rag.evaluate(args, rag.find_store(args), asked)
        cells = "  ".join(f"{g.mean():6.0f} +- {g.std():5.0f}" for g in got.reshape(-1, args.episodes))
        print(f"{' '.join(f'{k} {v}' for k, v in change.items()) or 'the default':34s}{cells}   error {np.mean(abs(got - asked) / asked):7.2%}  "
              f"fell {fell.sum()}/{len(fell)}", flush=True)
    for n in (55, 20, 10, 5, 2):                    # of 622
        for k in (1, 8):
            row(store_episodes=n, k=k)
    for w in (0, 0.25):
        row(store_episodes=55, rate_weight=w)
    for k in (1, 4, 8, 32, 128):
        row(k=k)


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    sweep() if "--sweep" in sys.argv else search()
