"""Who falls, the gaits of the ladder themselves: python tests/bench/falls_dt.py [--episodes 60]

1. Each gait alone, --episodes 1000-step episodes each: from rest, with start noise 0.3 (gymnasium's is 0.1), and shoved.
2. The very starts that dt_cheetah.py --start_noise 0.3 --targets 300 600 1200 2400 4800 has with seeds 0-2: how many of the gaits fall from
   each, in 300 steps. A start from which all fall is no fault of the model's. About 3 minutes on 2 cores.
"""
import argparse, pathlib, sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np

import dt_cheetah as dt
from common import Cheetahs


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ladder", default=dt.LADDER)
    p.add_argument("--episodes", type=int, default=60, help="per gait and kind of trouble")
    args = p.parse_args()
    z = np.load(args.ladder)
    W, b, G, n = z["W"].astype(float), z["b"].astype(float), len(z["W"]), args.episodes

    fell = np.zeros((3, G), int)
    for kind, (noise, shove) in enumerate(((0.1, 0), (0.3, 0), (0.1, 1))):
        for g in range(0, G, 9):                                                # nine gaits at a time: a batch that fits in a cache
            rng, some = np.random.default_rng((kind, g)), np.arange(g, min(g + 9, G)).repeat(n)
            start = dt.starts(len(some), rng, noise=noise)
            obs = dt.play(W[some], b[some], start, dt.T_DATA, 0.0, rng, shove * rng.standard_normal((len(some), 3)))[0]
            fell[kind, g:g + 9] = (~dt.upright(obs)[:, -1]).reshape(-1, n).sum(1)
    print(f"of {n} episodes each fell: return, from rest, start noise 0.3, shoved")
    for g in range(G):
        print(f"{z['returns'][g, 0]:6.0f} {fell[0, g]:4d} {fell[1, g]:4d} {fell[2, g]:4d}")
    print("share of all: " + ", ".join(f"{x.sum() / x.size / n:.2%}" for x in fell))

    state = []
    for seed in range(3):
        sim = Cheetahs(50)
        sim.reset(np.random.default_rng(10_000 + seed), 0.3)
        state.append(sim.state)
    state, down, high = np.concatenate(state), np.zeros(150, int), np.zeros(150)
    for g in range(G):
        obs = dt.play(W[[g] * 150], b[[g] * 150], state, 300)[0]
        down += ~dt.upright(obs)[:, -1]
        high = np.maximum(high, obs[:, :20, 0].max(1))
    print(f"\nfrom {sum(down == 0)} of 150 rough starts no gait falls, from {sum((down > 0) & (down <= G // 2))} at most half, and from these more:")
    for i in np.flatnonzero(down > G // 2):
        print(f"seed {i // 50}, target {[300, 600, 1200, 2400, 4800][i % 50 // 10]}, episode {i % 10}: {down[i]} of {G} fall; torso starts "
              f"{-state[i, 2]:.2f} m too low, is thrown {high[i] - state[i, 2]:.2f} m up within a second")


if __name__ == "__main__":
    main()
