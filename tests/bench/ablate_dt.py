"""What makes dt_cheetah.py obey: one thing changed at a time, everything else at its default: python tests/bench/ablate_dt.py

Prints target -> reached for each row, seed 0, and appends all runs to out/results.jsonl. About 15 minutes on 2 cores.
"""
import pathlib, subprocess, sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TARGETS = ["300", "600", "1200", "2400", "3600", "4800"]

# what has no flag is changed in the module, by a line of its own
NO_WAVES = "dt.return_features = lambda r, c: torch.cat([r[..., None], torch.zeros(*r.shape, 8)], -1)"
NO_FLOOR = "dt.reward_rate = lambda rtg, left: rtg / left"
FULL_CLOCK = "dt.clock = lambda t, c: np.minimum(t, 999)"
ROWS = [
    ("default", [], ""),
    ("plain return-to-go", ["--condition", "rtg"], ""),
    ("plain return-to-go, K = 2", ["--condition", "rtg", "--context", "2"], ""),
    ("rate without sine features", [], NO_WAVES),
    ("rate without the floor of 20 steps", [], NO_FLOOR),
    ("rate, clock runs to the end", [], FULL_CLOCK),
    ("no action noise", ["--action_noise", "0"], ""),
    ("no episodes from other gaits' runs", ["--cross_start", "0"], ""),
    ("no rough starts, no shoves", ["--rough", "0"], ""),
    ("every 4th gait of the ladder", ["--ladder", "out/ladder_4th.npz", "--ladder_episodes", "48"], ""),
    ("K = 2", ["--context", "2"], ""),
    ("K = 5", ["--context", "5"], ""),
    ("dropout 0.1", ["--dropout", "0.1"], ""),
    ("behaviour cloning", ["--condition", "bc"], ""),
]


def main():
    (ROOT / "out").mkdir(exist_ok=True)
    z = np.load(ROOT / "data/cheetah_ladder.npz")
    np.savez(ROOT / "out/ladder_4th.npz", **{k: z[k][::4] for k in z})
    only = sys.argv[1:]
    for name, flags, patch in ROWS:
        if only and not any(o in name for o in only):
            continue
        code = (f"import sys, torch, numpy as np, dt_cheetah as dt; sys.argv[0] = 'dt_cheetah.py'\n{patch}\n"
                # a patched model must not be taken for an unpatched one: it lives in a folder of its own
                + (f"dt.OUT = dt.pathlib.Path('out/ablation_{ROWS.index((name, flags, patch))}'); (dt.OUT / 'data').mkdir(parents=True, exist_ok=True)\n"
                   "src = dt.pathlib.Path('out/data/cheetah_ladder.hdf5').resolve(); dst = dt.OUT / 'data/cheetah_ladder.hdf5'\n"
                   "dst.exists() or dst.symlink_to(src)\n" if patch else "") + "dt.common.run(dt.main)")
        r = subprocess.run([sys.executable, "-c", code, "--targets", *TARGETS, "--episodes", "5", "--no-video", *flags], cwd=ROOT, capture_output=True, text=True)
        rows = [line.split() for line in r.stdout.splitlines() if line.strip().endswith("/5")]
        print(f"| {name} | " + " | ".join(f"{w[1]}+-{w[3]}" + (f" ({w[-1].split('/')[0]} fell)" if w[-1] != "0/5" else "") for w in rows) + " |", flush=True)
        if r.returncode:
            print(r.stderr[-500:])


if __name__ == "__main__":
    print("| changed | " + " | ".join(TARGETS) + " |\n|---|" + "---|" * len(TARGETS), flush=True)
    main()
