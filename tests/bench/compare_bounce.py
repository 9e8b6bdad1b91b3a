"""The comparison that teaches: what a token's position should be. python tests/bench/compare_bounce.py

Seven ways to write the same game down, one thing changed at a time, the same model (0.7M parameters), games and seconds of training:
  pen         the script's own: a move that says its heading, and a letter, both standing where the pen is, rotary
  pen, alone  no token knows the one before it: a letter must first find out where the ball is heading
  pen, plain  the moves say the displacement alone: in a corridor one cell wide the heading must then be counted
  pen, added  positions are sinusoids added to the tokens, as in the first transformer, instead of rotary
  moves       the same tokens, all standing where the ball started: where the pen is must be added up
  raster 2-D  the drawn grid row by row, each token at its (row, column), rotary
  raster 1-D  the same at its place in the line of text, as a language model sees it
Small mazes (9-12 x 14-22, 3 bars), no decoys; each point is a run of its own to its last step. Finished runs are kept in
out/compare_bounce.json, so that a stopped comparison goes on; the table and out/bounce_layouts.png are made at the end. Seconds are CPU
seconds: run it with OMP_NUM_THREADS=1, and other jobs on the machine do not count.
"""
import argparse, json, os, pathlib, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import bounce as b
import common

FILE = pathlib.Path("out/compare_bounce.json")
b.time = argparse.Namespace(time=time.process_time)         # what training measures its seconds with


class PenAlone(b.Bouncer):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.before.weight.requires_grad_(False).zero_()


class PenPlain(b.Bouncer):
    shift = np.zeros((b.VOCAB, 2), int)
    shift[b.PLAIN:b.PLAIN + 9] = np.stack(np.divmod(np.arange(9), 3), 1) - 1

    def tokens(self, g):
        ids, pos = b.pen(g)
        ids[..., 2::2] = np.where(ids[..., 2::2] < b.PLAIN, b.PLAIN + 3 * np.diff(g["R"]) + np.diff(g["C"]) + 4, ids[..., 2::2])
        return ids, pos


class PenAdded(b.Bouncer):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.table[1:] = 1.0                            # keys are not turned, so none of their pairs is masked

    def angles(self, pos):
        cos, sin = super().angles(pos)
        return torch.ones_like(cos), torch.zeros_like(sin)

    def embed(self, ids, pos):
        x, wave = super().embed(ids, pos), torch.cat(super().angles(pos), -1)
        return x + wave.repeat(*[1] * (wave.dim() - 1), x.size(-1) // wave.size(-1))


class Moves(b.Bouncer):
    def forward(self, ids, pos, memory, past=None, cells=0):
        if past is None:
            self.start = pos[..., :1, :2]
        return super().forward(ids, torch.cat([self.start * (ids != b.PAD)[..., None], pos[..., 2:]], -1), memory, past, cells)


class Raster2D(b.Bouncer):
    """direction, then the drawn grid row by row; a token stands at the cell that is to be written next."""
    def places(self, g, m, l):                          # of the direction, one per game, and of the l cells
        k, W = np.arange(1, l + 1), g["W"][m] + 1
        return np.stack([g["R"][m, :, 0], g["C"][m, :, 0], 0 * g["R"][m, :, 0]], -1), np.stack([k // W, k % W, 0 * k], -1)

    def tokens(self, g):
        (M, n), (H, W) = g["R"].shape[:2], (g["H"], g["W"])
        L = int((H * (W + 1)).max()) + 2
        ids, pos = np.full((M, n, L), b.PAD), np.zeros((M, n, L, 3), np.float32)
        ids[..., 0] = b.MOVE + 4 * g["D"][..., 0]
        for m, text in enumerate(g["texts"]):
            field, l = g["fields"][m, :H[m], :W[m]], H[m] * (W[m] + 1)
            for i in range(n):
                grid = np.full((H[m], W[m] + 1), b.NEWLINE)
                grid[:, :-1] = b.drawn(field, g["R"][m, i], g["C"][m, i], text)
                ids[m, i, 1:l + 2] = np.append(grid, b.END)
            pos[m, :, 0], pos[m, :, 1:l + 1] = self.places(g, m, l)
        return ids, pos


class Raster1D(Raster2D):
    """Text, field, answer end to end: all pairs turn by the place in that line."""
    def __init__(self, *sizes):
        super().__init__(*sizes)
        pairs = len(self.omega)
        self.axis[:], self.omega = 2, 2.2 * (0.002 / 2.2)**(torch.arange(pairs) / (pairs - 1))              # 3,000 cells before it repeats
        self.table[1:] = 1.0

    def places(self, g, m, l):
        T, W = len(g["texts"][m]) + 1, g["W"][m] + 1
        line = lambda x: np.stack([0 * x, 0 * x, x], -1)
        return line(T + g["R"][m, :, 0] * W + g["C"][m, :, 0]), line(T + l + np.arange(1, l + 1))

    def memory(self, g, decoys=0, rng=None):
        ids, pos, sort = b.memory_of(g, decoys, rng)
        for m, text in enumerate(g["texts"]):
            wall = sort[m] == 1
            pos[m, wall, 2] = len(text) + 1 + pos[m, wall, 0] * (g["W"][m] + 1) + pos[m, wall, 1]
        return ids, pos, sort


LAYOUTS = {"pen": b.Bouncer, "pen, alone": PenAlone, "pen, plain": PenPlain, "pen, added": PenAdded, "moves": Moves, "raster 2-D": Raster2D, "raster 1-D": Raster1D}


@torch.inference_mode()
def raster_exact(model, args, quotes, games):
    """The share of grids that come out right, generated greedily."""
    right = 0
    for at in range(0, games, 50):
        g = b.make_games(np.random.default_rng((args.seed, 2, at)), 50, 1, quotes, args.height, args.width, args.bars)
        want, pos = map(torch.from_numpy, model.tokens(g))
        with torch.autocast("cpu", torch.bfloat16):
            memory, past, ids, ok = model.remember(*map(torch.from_numpy, model.memory(g))), None, want[..., 0], torch.ones(50, 1, dtype=torch.bool)
            for s in range(want.size(2) - 1):
                logits, past = model(ids[..., None], pos[..., s:s + 1, :], memory, past)
                ids = logits[..., 0, :].argmax(-1)
                ok &= (ids == want[..., s + 1]) | (want[..., s + 1] == b.PAD)
                if not ok.any():
                    break
        right += int(ok.sum())
    return right / games


def run(name, seconds, seed, games=200):
    args = b.get_args(["--height", "9", "12", "--width", "14", "22", "--bars", "3", "--small", "1", "--decoys", "0", "--seed", str(seed)])
    train, unseen = b.read_quotes(args.quotes)
    file, kind = pathlib.Path(f"out/compare_{os.getpid()}.pt"), LAYOUTS[name]
    args.steps = 16                                     # how many steps fit: measured, then run from nothing with that many
    args.steps = max(args.warmup + 1, int(16 * seconds / b.train(args, train, file, "cpu", kind)[1]))
    file.unlink()
    model, spent = b.train(args, train, file, "cpu", kind)
    file.unlink()
    exact = raster_exact(model, args, unseen, games) if issubclass(kind, Raster2D) else b.evaluate(model, args, unseen, "cpu", games)["exact_grid"]
    return dict(layout=name, budget=seconds, seed=seed, steps=args.steps, seconds=round(spent, 1), exact_grid=exact)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--budgets", type=float, nargs="+", default=[30, 60, 120], help="seconds of training")
    p.add_argument("--long", type=float, default=900, help="seconds for one longer run of the rasters, seed 0; 0: none")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--file", type=pathlib.Path, default=FILE, help="where finished runs are kept")
    args = p.parse_args()
    rows = json.loads(args.file.read_text()) if args.file.exists() else []
    todo = [(name, s, seed) for seed in args.seeds for s in args.budgets for name in LAYOUTS]
    todo += [(name, args.long, 0) for name in ("raster 2-D", "raster 1-D") if args.long]
    for name, seconds, seed in todo:
        if not any((r["layout"], r["budget"], r["seed"]) == (name, seconds, seed) for r in rows):
            rows.append(run(name, seconds, seed))
            print(rows[-1], flush=True)
            with common.whole_file(args.file) as part:
                part.write_text(json.dumps(rows, indent=0))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    print("\nexact grids of 200, mean over seeds (worst), by seconds of training\n" + f"{'layout':12}" + "".join(f"{s:16.0f} s" for s in args.budgets))
    for i, name in enumerate(LAYOUTS):
        by = [[r["exact_grid"] for r in rows if r["layout"] == name and r["budget"] == s] for s in args.budgets]
        print(f"{name:12}" + "".join(f"   {np.mean(x):7.1%} ({min(x):.1%})" for x in by if x))
        at = [s + 0.012 * (i - 3) * max(args.budgets) for s in args.budgets]                # side by side, or the zeros hide each other
        ax.errorbar(at, [np.mean(x) for x in by], yerr=np.abs([[np.mean(x) - f(x) for x in by] for f in (min, max)]), marker="o", capsize=3, label=name)
    for r in rows:
        if r["budget"] == args.long:
            print(f"{r['layout']}, {r['seconds']:.0f} s: {r['exact_grid']:.1%}")
    ax.set(xlabel="seconds of training", ylabel="grids exactly right, mean and range of seeds", ylim=(-0.03, 1.03), xticks=args.budgets)
    ax.legend(frameon=False, loc=(0.66, 0.1))
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig("out/bounce_layouts.png", bbox_inches="tight")


if __name__ == "__main__":
    main()
