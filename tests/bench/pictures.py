"""The README's pictures, made from the default models: python tests/bench/pictures.py (after python dt_cheetah.py and python bounce.py)

assets/cheetah.gif: one model asked for 600, 2400 and 4800, side by side, from standing still
assets/bounce.gif:  of 200 held-out games that cover no cell twice the one with the most bounces, written by the default model
assets/bounce_layouts.png: what python tests/bench/compare_bounce.py drew last
assets/targets.png: what python dt_cheetah.py --targets 200:5000:400 --episodes 3 --baseline rtg bc drew last
"""
import pathlib, shutil, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import mujoco
import numpy as np
from PIL import Image

import bounce as b
import common
import dt_cheetah as dt


def cheetah(targets=(600.0, 2400.0, 4800.0), begin=0, steps=140, every=2):
    args, panels = dt.get_args(["--episodes", "1"]), []
    args.dtype = common.fast_dtype("cpu")
    model, _ = dt.train(args, "rate", lambda: dt.find_dataset(args), dt.checkpoint(args, "rate"), "cpu")
    for target in targets:
        *_, diary = dt.evaluate(model, [target], args, "cpu")
        view, data, frames = common.SideView(320, 192, 80), mujoco.MjData(dt.Cheetahs.model), []
        for step in range(begin, begin + steps, every):
            qpos, earned, _ = diary[step]
            data.qpos[:] = qpos
            mujoco.mj_forward(dt.Cheetahs.model, data)
            speed = (qpos[0] - diary[max(0, step - 20)][0][0]) / (0.05 * max(1, min(step, 20)))
            frames.append(view.frame(*common.cheetah_capsules(dt.Cheetahs.model, data), qpos[0], [f"asked for {target:.0f}", f"{speed:.1f} m/s"]))
        panels.append(frames)
    gap = np.full((192, 8, 3), 255, np.uint8)
    movie = [np.concatenate([p[0], gap, p[1], gap, p[2]], 1) for p in zip(*panels)]
    palette = Image.fromarray(np.concatenate(movie[::10])).quantize(96, dither=Image.Dither.NONE)
    pictures = [Image.fromarray(m).quantize(palette=palette, dither=Image.Dither.NONE) for m in movie]
    pictures[0].save(ROOT / "assets/cheetah.gif", save_all=True, append_images=pictures[1:], duration=int(50 * every), loop=0, optimize=True)
    return movie


def bounce():
    args = b.get_args([])
    args.dtype = common.fast_dtype("cpu")
    quotes, unseen = b.read_quotes(args.quotes)
    model, _ = b.train(args, quotes, b.checkpoint(args, quotes), "cpu")
    games = [b.make_games(np.random.default_rng((0, 5, i)), 1, 1, unseen, [18, 20], [56, 64], args.bars) for i in range(200)]
    legible = lambda R, C: len(set(zip(R, C))) == len(R) and np.ptp(R) > 11 and np.ptp(C) > 20
    g = max(games, key=lambda g: np.count_nonzero(np.diff(g["D"][0, 0])) * legible(g["R"][0, 0], g["C"][0, 0]))
    _, _, R, C, text, _ = next(b.read_path(g, *b.generate(model, g, "cpu")))
    movie = list(b.draw_pen(g["fields"][0], R, C, text))
    palette = movie[-1].quantize(32, dither=Image.Dither.NONE)
    pictures = [m.quantize(palette=palette, dither=Image.Dither.NONE) for m in [*movie, *[movie[-1]] * 15]]
    pictures[0].save(ROOT / "assets/bounce.gif", save_all=True, append_images=pictures[1:], duration=100, loop=0, optimize=True)


if __name__ == "__main__":
    (ROOT / "assets").mkdir(exist_ok=True)
    cheetah()
    bounce()
    for made, name in ((dt.OUT / "dt_cheetah_targets.png", "targets.png"), (b.OUT / "bounce_layouts.png", "bounce_layouts.png")):
        if made.exists():
            shutil.copy(made, ROOT / "assets" / name)
    for p in sorted((ROOT / "assets").iterdir()):
        print(f"{p.name}: {p.stat().st_size / 1e6:.2f} MB")
