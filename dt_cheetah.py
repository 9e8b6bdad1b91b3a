"""dt_cheetah.py: a Decision Transformer, trained from scratch, that runs HalfCheetah at the return you ask for.

    python dt_cheetah.py --target_rew 1200

Measured: 2 cores of an AMD EPYC (Zen 4), torch 2.13, bfloat16; seeds 0-2, 10 episodes per target, last checkpoint. Asked for 300, 600,
1200, 2400, 4800 it reaches 300.9, 601.1, 1199.6, 2399.8, 4799.1 (mean error 0.25%, worst seed and target 1.02%, nobody fell); shoved or
from rough starts 6 of 300 fall. 38 to 57 s to the first video. Paper: Chen et al. 2021, arXiv 2106.01345. Differs from it in:
1. the return token carries the reward RATE still to be earned, with sine features; --condition rtg is the paper's return-to-go
2. the data is a ladder of 55 stable gaits of all speeds (--search), replayed with action noise, shoves and from each other's runs
3. 500 steps at 1e-3 and no dropout, not 100,000 at 1e-4 with 0.1; training's windows, too, may begin before their episode
Not handled: targets above 5400 (asked for more, it runs as fast as it can); getting up after a fall; environments of other shapes.
"""
import contextlib, functools, hashlib, json, math, pathlib, re, shutil, time

import common                       # before torch: it says how torch's threads wait
from common import Cheetahs, sorry
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

S_DIM, A_DIM, T_DATA = 17, 6, 1000      # HalfCheetah-v5: numbers in an observation, in an action; its time limit in steps of 0.05 s
RANDOM, EXPERT = -280.178953, 12135     # what D4RL's random policy and its expert earn: 0 and 100 of its scale (arXiv 2004.07219)
OUT, SAVE_EVERY = pathlib.Path("out"), 100
LADDER = str(pathlib.Path(__file__).resolve().parent / "data" / "cheetah_ladder.npz")
NAMES = dict(rate="DT, reward rate", rtg="DT, return-to-go", bc="behaviour cloning")

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # what is asked of the cheetah
    p.flag("target_rew", 1200.0, "return to run at, summed over the episode", low=-1e9)
    p.flag("targets", None, "several returns, for a table and a figure: 300 600 1200, or first:last:step", nargs="+")
    p.flag("target_schedule", None, "new targets in mid-run: 400:2400 runs at the pace of 2400 from step 400 on", nargs="+")
    p.flag("episodes", 10, "evaluation episodes per target, each from its own start")
    p.flag("max_steps", T_DATA, "evaluation horizon in steps of 0.05 s; the training data's is 1000")
    p.flag("start_noise", 0.1, "spread of the start states; 0.1 is gymnasium's, 0.3 a rough start", high=5)
    p.flag("push", 0.0, "shove the torso every 200 steps: spread of the kick in m/s and rad/s", high=30)
    # what it learns from
    p.flag("dataset", "ladder", "ladder (made here), mujoco/halfcheetah/expert-v0 (Minari), halfcheetah-medium-v2 (D4RL) or a .hdf5")
    p.flag("ladder", LADDER, "the gaits, as --search writes them")
    p.flag("collect", False, "only make the ladder's episodes, out/data/cheetah_ladder.hdf5; other scripts read them")
    p.flag("ladder_episodes", 12, "episodes per gait of the ladder")
    p.flag("action_noise", 0.05, "spread of the noise on the ladder's actions: the data then shows how to recover", high=2)
    p.flag("cross_start", 0.6, "share of episodes that start in mid-run of another gait: the data then shows how to change speed", high=1)
    p.flag("rough", 0.3, "share of episodes that start far from rest and are shoved: the data then shows how to come back", high=1)
    # how the target reaches the model
    p.flag("condition", "rate", "rate: reward per step still to earn; rtg: the paper's return-to-go; bc: nothing", choices=list(NAMES))
    p.flag("baseline", [], "others to train and show beside: bc (behaviour cloning), rtg", nargs="+", choices=list(NAMES))
    # model: the paper's sizes
    p.flag("n_layer", 3, "transformer blocks")
    p.flag("n_head", 1, "attention heads")
    p.flag("n_embd", 128, "width of a token")
    p.flag("context", 20, "K, the steps that the model sees; a step is three tokens")
    p.flag("dropout", 0.0, "the paper's 0.1 costs time, and precision on data this clean", high=0.99)
    # training
    p.flag("steps", 500, "gradient steps")
    p.flag("batch_size", 64, "windows of K steps per gradient step")
    p.flag("lr", 1e-3, "AdamW's peak learning rate; the paper's 1e-4 is for a hundred times more steps")
    p.flag("warmup", 50, "steps up to the peak; a cosine down to a tenth of it follows")
    p.flag("weight_decay", 1e-4, "AdamW's, the paper's")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("dtype", "auto", "of training's products; auto: bfloat16 where the hardware has it", choices=["auto", "bfloat16", "float32"])
    p.flag("seed", 0, "of weights, batches and evaluation starts", low=0)
    # the search for gaits
    p.flag("search", False, "search a ladder anew, write it to out/cheetah_ladder.npz and end")
    p.flag("search_seed", 2, "of 0-2 the one that random search climbed furthest with", low=0)
    p.flag("search_steps", 80, "steps of random search for the first gait, out of which the ladder grows")
    p.flag("search_iters", 8, "steps per try to bring a gait to its neighbour's speed")
    p.flag("search_tries", 16, "tries per rung, before the way up ends")
    p.flag("search_stride", 1, "take every so many-th rung only")
    # what comes out
    p.flag("video", True, "write an mp4 of the first episode")
    p.flag("video_steps", 400, "its length in steps; 20 are a second")
    p.flag("renderer", "numpy", "numpy works anywhere; mujoco wants a working OpenGL", choices=["numpy", "mujoco"])
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv, smoke=dict(ladder_episodes=1, steps=20, n_embd=32, episodes=2, max_steps=100, video_steps=40, search_steps=2,
                                         search_iters=1, search_tries=2, search_stride=25))
    if args.n_embd % args.n_head:
        p.error(f"argument --n_head: {args.n_head} heads do not share {args.n_embd} dimensions evenly")
    if args.search + args.collect + (args.dataset != "ladder") > 1:
        p.error("--search and --collect are runs of their own, on the ladder")
    try:
        args.targets = [x for t in args.targets or [str(args.target_rew)] for x in numbers(t)]
        pairs = [pair.split(":") for pair in args.target_schedule or []]
        args.target_schedule = [(range(args.max_steps).index(int(t)), *numbers(x)) for t, x in pairs]   # index: ValueError past the end
    except ValueError as e:
        p.error(f"argument --targets or --target_schedule: {e}")
    return args

def numbers(text):
    """"1200" -> [1200.0]; "100:300:100" -> [100.0, 200.0, 300.0]. ValueError on what is neither."""
    x = [float(part) for part in text.split(":")]
    if not all(abs(v) <= 1e9 for v in x) or len(x) not in (1, 3) or len(x) == 3 and not (x[2] > 0 and x[0] <= x[1]):
        raise ValueError(f"{text} is neither a number nor first:last:step")
    return x if len(x) == 1 else np.arange(x[0], x[1] + 1e-6 * x[2], x[2]).tolist()

# ---- gaits: affine policies, many at once ----------------------------------------------------------------------------------
def play(W, b, start, T, noise=0.0, rng=None, shove=None):
    """Let affine policies a = clip(W obs + b + noise) run T steps from start (n, 19) states: W (n, 6, 17), b (n, 6), or one for all,
    W (6, 17), b (6,). shove (n, 3): what the torso's velocities (m/s, m/s, rad/s) change by every 100 steps.
    -> obs (n, T+1, 17), act (n, T, 6), rew (n, T), float32, and the last states (n, 19)."""
    n, sim = len(start), Cheetahs(len(start))
    obs, act, rew = (np.empty((n, *shape), np.float32) for shape in ((T + 1, S_DIM), (T, A_DIM), (T,)))
    sim.state = start.copy()
    for t in range(T):
        if shove is not None and t % 100 == 50:
            sim.state[:, 10:13] += shove
        o = sim.state[:, 2:]
        a = (W @ o[:, :, None])[:, :, 0] + b
        a += noise * rng.standard_normal(a.shape) if noise else 0
        obs[:, t], act[:, t] = o, np.clip(a, -1, 1)
        obs[:, t + 1], rew[:, t] = sim.step(a)
    return obs, act, rew, sim.state

def starts(n, rng, running=None, noise=0.1):
    """n start states (n, 19): from rest, or every second one from running (m, 19), states that gaits were in in mid-run."""
    sim = Cheetahs(n)
    sim.reset(rng, noise)
    if running is not None:
        sim.state[::2] = running[rng.integers(0, len(running), (n + 1) // 2)]
        sim.state[:, :2] = 0
    return sim.state

def upright(obs):
    """obs (n, T+1, 17) -> (n, T) bool: True until the torso first pitches over 1.2 rad; from there no gait here comes back."""
    return np.logical_and.accumulate(np.abs(obs[:, 1:, 1]) < 1.2, axis=1)

# ---- the data: a ladder of gaits, searched once, replayed on every machine ---------------------------------------------------
def search_step(X, mean, std, score, rng, n_dir, top, step, nu):
    """One step of Augmented Random Search (Mania et al. 2018, arXiv 1803.07055, algorithm 2, V2-t): X (6, 18) is the policy on
    normalised observations, its bias the last column. Try n_dir random directions, nu long, both ways; the `top` best make the step."""
    D = rng.standard_normal((n_dir,) + X.shape)
    Y = np.concatenate([X + nu * D, X - nu * D])
    W = Y[:, :, :S_DIM] / std
    plus, minus = score(W, Y[:, :, S_DIM] - W @ mean).reshape(2, n_dir)
    best = np.argsort(-np.maximum(plus, minus))[:top]
    spread = np.concatenate([plus[best], minus[best]]).std() + 1e-6
    return X + step / (top * spread) * np.einsum("k,kij->ij", plus[best] - minus[best], D[best])

def fast_gait(args, z, save):
    """Random search from nothing: the score is the return, and a fall ends it. z: the state to go on from. -> W, b."""
    X, mean, std = z.get("X", np.zeros((A_DIM, S_DIM + 1))), z.get("mean", np.zeros(S_DIM)), z.get("std", np.ones(S_DIM))
    count, total, squares = z.get("count", 0), z.get("total", 0), z.get("squares", 0)
    bar = tqdm(range(int(z.get("step", 0)), args.search_steps), desc="random search", unit="step", disable=None)
    for step in bar:
        rng, seen = np.random.default_rng((args.search_seed, step)), []      # seen: what score() saw, which search_step does not return

        def score(W, b):
            obs, _, rew, _ = play(W, b, starts(len(W), rng), T_DATA)
            seen.append((obs, rew))
            return (rew * upright(obs)).sum(1)

        X = search_step(X, mean, std, score, rng, n_dir=32, top=4, step=0.02, nu=0.03)       # the paper's for HalfCheetah
        o, rew = seen[0][0].reshape(-1, S_DIM).astype(np.float64), seen[0][1]
        count, total, squares = count + len(o), total + o.sum(0), squares + np.square(o).sum(0)
        mean, std = total / count, np.sqrt(squares / count - np.square(total / count) + 1e-8)
        save(X=X, mean=mean, std=std, count=count, total=total, squares=squares, step=step + 1)
        bar.set_postfix(mean=int(rew.sum(1).mean()), best=int(rew.sum(1).max()))
    W = X[:, :S_DIM] / std
    return W, X[:, S_DIM] - W @ mean

def gait_near(W, b, speed, running, hard, args, rng, whole=False):
    """Change a gait until it earns `speed` per step: random search again, the score now minus the distance from it, second by
    second (20 steps); a fall costs 2. With running (m, 19), states of other gaits, half the episodes start there, all actions noisy:
    what survives that can be switched to. hard: the others start rough, and the torso is shoved: what survives that comes back.
    whole: a single step, of whole episodes, whose returns tell of the stumble that comes late."""
    noise, each = 0.0 if running is None else 0.05, 4
    T, span, most, iters, how = 300, 20, np.inf, args.search_iters, dict(n_dir=24, top=8, step=0.015, nu=0.02)
    if whole:                                       # a miss counts 0.4 at most: no fall may outweigh what all the others say
        T, span, most, iters, how = T_DATA, T_DATA, 0.4, 1, dict(n_dir=32, top=32, step=0.012, nu=0.01)
    obs = play(W, b, starts(8, rng), 300, 0.05, rng)[0][:, 50:].reshape(-1, S_DIM)
    mean, std = obs.mean(0, dtype=np.float64), np.maximum(obs.std(0, dtype=np.float64), 0.05)
    X = np.concatenate([W * std, (b + W @ mean)[:, None]], 1)
    for _ in range(iters):
        start = starts(each, rng, running, 0.4 if hard else 0.1)        # the same four starts and shoves for all directions:
        shove = 1.5 * hard * rng.standard_normal((each, 3))             # their luck cancels

        def score(W, b):
            start_all, shove_all = np.tile(start, (len(W), 1)), np.tile(shove, (len(W), 1))
            obs, _, rew, _ = play(W.repeat(each, 0), b.repeat(each, 0), start_all, T, noise, rng, shove_all)
            up = upright(obs)
            miss = np.abs((rew * up).reshape(-1, T // span, span).mean(2) - speed).mean(1) + 2 * ~up[:, -1]
            return -np.minimum(miss, most).reshape(-1, each).mean(1)

        X = search_step(X, mean, std, score, rng, **how)
    W = X[:, :S_DIM] / std
    return W, X[:, S_DIM] - W @ mean

def gait_test(W, b, running, rng):
    """16 episodes from rest, and 24 from mid-run with action noise and shoves -> mean and std of the return from rest, and falls:
    every one from rest, and those from mid-run beyond the second."""
    obs, _, rew, _ = play(W, b, starts(16, rng), T_DATA)
    falls = (~upright(obs)[:, -1]).sum()
    if running is not None:
        rough = play(W, b, running[rng.integers(0, len(running), 24)], T_DATA, 0.05, rng, rng.standard_normal((24, 3)))[0]
        falls += max(0, (~upright(rough)[:, -1]).sum() - 2)
    return rew.sum(1).mean(), rew.sum(1).std(), falls

def search(args, file):
    """Find the ladder from --search_seed alone: one fast gait, then rung by rung its neighbours, up to the fastest and down
    past standing still. Every try is kept in out/search_*.npz: kill it and it goes on. Writes file (.npz)."""
    path = OUT / "search_{search_seed}_{search_steps}_{search_iters}_{search_tries}_{search_stride}.npz".format(**vars(args))
    z = common.load_arrays(path) if path.exists() else {}

    def save(**more):
        z.update(more)
        with common.whole_file(path) as part:
            np.savez(part, **z)

    more = lambda name, x: np.concatenate([z[name], np.asarray(x)[None]])

    def passed():
        order = np.argsort(z["found"][:len(z["failed"]), 0])                # slow to fast
        order = order[(z["failed"][order] == 0) & (z["found"][order, 1] < 60)]
        return order if len(order) else sorry("no gait passed its last test; another --search_seed may do better")

    if "W" not in z:
        W, b = fast_gait(args, z, save)
        rew = play(W, b, starts(16, np.random.default_rng(0)), 300)[2]
        save(W=W, b=b, first=np.round(rew.mean(), 1), i=0, tries=0, rough=True, vetted=0, failed=np.empty(0), hard=np.empty(0, bool),
             Ws=np.empty((0, A_DIM, S_DIM)), bs=np.empty((0, A_DIM)), found=np.empty((0, 2)), running=np.empty((0, 16, 19)))
    # finer where the gaits are slow: there a rung is a larger share of what is asked
    speeds = np.r_[-0.25:1.1:0.09, 1.1:3.0:0.12, 3.0:5.8:0.16, 5.8:6.4:0.08][::args.search_stride]
    up = speeds[speeds >= z["first"]]
    plan = np.concatenate([up, speeds[speeds < z["first"]][::-1]])
    bar = tqdm(total=len(plan), initial=int(z["i"]), desc="ladder", unit="gait", disable=None)
    while z["i"] < len(plan):
        i, tries, W, b = int(z["i"]), int(z["tries"]), z["W"], z["b"]
        rng = np.random.default_rng((args.search_seed, i, tries))
        if i == len(up) > 0 and tries == 0:                     # the way down begins where the way up began
            W, b, z["rough"] = z["Ws"][0], z["bs"][0], True
        near = z["running"][np.argsort(np.abs(z["found"][:, 0] / T_DATA - plan[i]))[:5]]
        others = lambda own: np.concatenate([own, *near]) if z["rough"] else None
        own = play(W, b, starts(16, rng), 150, 0.05, rng)[3]
        W, b = gait_near(W, b, plan[i], others(own), z["rough"], args, rng)
        own = play(W, b, starts(16, rng), 150, 0.05, rng)[3]
        mean, std, falls = gait_test(W, b, others(own), rng)
        bar.set_postfix(wanted=f"{plan[i]:.2f}", got=f"{mean:.0f}+-{std:.0f}", falls=falls)
        if falls == 0 and std < min(max(25, 0.012 * mean), 55):
            save(W=W, b=b, i=i + 1, tries=0, Ws=more("Ws", W), bs=more("bs", b), found=more("found", [mean, std]),
                 running=more("running", own), hard=more("hard", z["rough"]))
        elif tries + 1 < args.search_tries:
            save(W=W, b=b, tries=tries + 1)
        elif not len(z["Ws"]):
            sorry("no gait stayed on its feet; another --search_seed may do better")
        elif i < len(up) and z["rough"]:            # as fast as it gets from anywhere: the last rungs need only run from rest
            save(W=z["Ws"][-1], b=z["bs"][-1], tries=0, rough=False)
        else:                                       # as fast as it gets at all: the rest of the way up is left out
            save(W=W, b=b, i=len(up) if i < len(up) else i + 1, tries=0)
        bar.update(int(z["i"]) - bar.n)
    bar.close()
    # a gait that passed one of sixteen tests may have been lucky: each now runs 96 new episodes. it is searched on from the starts that
    # it failed, shoved only if it was found that way (the fastest were not, and shoves take their speed). at last the fastest gait that
    # passes is entered once more, to be made 1.5% faster by lessons of whole episodes
    n = len(z["hard"])
    bar = tqdm(total=n + 1, initial=int(z["vetted"]), desc="vetting", unit="gait", disable=None)
    while z["vetted"] <= n:
        g, tries = int(z["vetted"]), int(z["tries"])
        if g == n == len(z["Ws"]):
            best = passed()[-1]
            save(top=z["found"][best, 0], **{k: more(k, np.float32(z[k][best])) for k in ("Ws", "bs", "found")})
        W, b, rng = z["Ws"][g], z["bs"][g], np.random.default_rng((args.search_seed, g, tries, 1))
        start = starts(96, rng)
        obs, _, rew, _ = play(W, b, start, T_DATA)
        ret = rew.sum(1)
        bad = ~upright(obs)[:, -1] | (np.abs(ret - np.median(ret)) > 200)
        z["found"][g] = ret.mean(), ret.std()
        failed = bad.any() or g == n and (ret.std() >= 60 or ret.mean() < 1.0075 * z["top"])
        if failed and tries + 1 < (args.search_tries if g < n else args.search_steps):
            how = (rew[~bad, 300:].mean(), start[bad], z["hard"][g]) if g < n else (round(1.015 * z["top"] / T_DATA, 2), None, False)
            z["Ws"][g], z["bs"][g] = gait_near(W, b, *how, args, rng, whole=g == n)
            save(tries=tries + 1)
        else:
            save(tries=0, vetted=g + 1, failed=more("failed", failed))
            bar.update()
    bar.close()
    order = passed()
    with common.whole_file(file) as part:
        np.savez_compressed(part, W=np.float32(z["Ws"][order]), b=np.float32(z["bs"][order]), returns=np.float32(z["found"][order]))
    print(f"{len(order)} gaits that earn {z['found'][order[0], 0]:.0f} to {z['found'][order[-1], 0]:.0f}: {file}, for --ladder")

def collect(args, path):
    """Replay every gait of the ladder, with noise on its actions, from other gaits' mid-run states, shoved, into path (.hdf5)."""
    with common.reading(args.ladder), np.load(args.ladder) as z:
        W, b = np.float64(z["W"]).reshape(-1, A_DIM, S_DIM), np.float64(z["b"]).reshape(-1, A_DIM)
    if not len(W) == len(b) > 0 or not np.isfinite(W).all() or not np.isfinite(b).all():
        sorry(f"{args.ladder} holds no gaits, or broken ones")
    G, each, folder = len(W), max(k for k in range(1, 7) if args.ladder_episodes % k == 0), path.with_suffix(".parts")
    gait, n = np.arange(G).repeat(each), each * G
    files = [folder / f"{i}.npz" for i in range(args.ladder_episodes // each)]     # up to six episodes of each gait a part: a kill costs one
    for i, file in enumerate(tqdm(files, unit="step", unit_scale=n * T_DATA, desc="collecting", disable=None)):
        if not file.exists() or file.stat().st_mtime < pathlib.Path(args.ladder).stat().st_mtime:
            rng = np.random.default_rng(i)
            # in whose run does an episode start? half of the crossings in a neighbour's, half in anyone's
            u, near = rng.random(n), np.clip(gait + rng.choice([-2, -1, 1, 2], n), 0, G - 1)
            other = np.where(u < args.cross_start / 2, near, rng.integers(0, G, n))
            rough = (rng.random(n) < args.rough)[:, None]
            start = np.where(rough, starts(n, rng, noise=0.4), starts(n, rng))
            running = play(W[other], b[other], start, 150, args.action_noise, rng)[3]
            start[u < args.cross_start] = running[u < args.cross_start]
            start[:, :2] = 0
            obs, act, rew, _ = play(W[gait], b[gait], start, T_DATA, args.action_noise, rng, rough * rng.standard_normal((n, 3)))
            ok = upright(obs)[:, -1]                # a fall teaches how to lie on one's back: left out
            with common.whole_file(file) as part:
                np.savez(part, obs=obs[ok], act=act[ok], rew=rew[ok])
    if not all(file.exists() for file in files):
        return                                      # another run has made path of the same parts meanwhile
    parts = [common.load_arrays(file) for file in files]
    obs, act, rew = (np.concatenate([p[k] for p in parts]) for k in ("obs", "act", "rew"))
    print(f"collected: {len(rew)} of {len(files) * n} episodes stayed on their feet")
    write_episodes(path, obs, act, rew)
    if not any(folder.glob("*.unfinished-*")):      # another run may still be at it
        shutil.rmtree(folder, ignore_errors=True)

def write_episodes(path, obs, act, rew):
    """obs (E, T+1, 17), act (E, T, 6), rew (E, T) -> path in Minari's layout, and what minari.MinariDataset(folder) wants."""
    import gymnasium, h5py
    E, T = rew.shape
    ends = dict(terminations=np.zeros(T, bool), truncations=np.arange(T) == T - 1)      # it never terminates: time runs out
    with common.whole_file(path) as part, h5py.File(part, "w") as f:
        for i in range(E):
            group = f.create_group(f"episode_{i}")
            group.attrs["id"], group.attrs["total_steps"] = i, T
            for name, x in dict(observations=obs[i], actions=act[i], rewards=rew[i], **ends).items():
                group.create_dataset(name, data=x, chunks=x.shape, fletcher32=True)     # checksums: flipped bits are noticed
    box = lambda n, bound: json.dumps(dict(type="Box", dtype="float32", shape=[n], low=[-bound] * n, high=[bound] * n))
    with common.whole_file(path.with_name("metadata.json")) as part:
        part.write_text(json.dumps(dict(
            total_episodes=E, total_steps=E * T, data_format="hdf5", dataset_id="mujoco/halfcheetah/ladder-v0", minari_version="0.5.4",
            observation_space=box(17, float("inf")), action_space=box(6, 1.0), env_spec=gymnasium.spec("HalfCheetah-v5").to_json())))
    main = path.with_name("main_data.hdf5")             # the name that minari looks for
    if main.is_symlink() or not main.exists():          # a link is ours, perhaps to an older data set; a file is someone's data
        with contextlib.suppress(FileExistsError):      # or another run makes it, just now
            main.unlink(missing_ok=True)
            main.symlink_to(path.name)

def find_dataset(args):
    """--dataset -> Episodes: the ladder (collected if need be), a known name (downloaded if need be) or a file. Says what it is."""
    name, folder = args.dataset, OUT / "data"
    if name == "ladder":
        how, ladder = [args.ladder_episodes, args.action_noise, args.cross_start, args.rough], pathlib.Path(args.ladder)
        how += [] if args.ladder == LADDER else [hashlib.sha256(ladder.read_bytes()).hexdigest()[:8]]
        path = folder / ("cheetah_ladder.hdf5" if how == [12, 0.05, 0.6, 0.3] else f"cheetah_ladder_{'_'.join(map(str, how))}.hdf5")
        if not path.exists() or path.stat().st_mtime < ladder.stat().st_mtime:          # or it is of an older ladder
            collect(args, path)
    elif re.fullmatch(r"mujoco/halfcheetah/(simple|medium|expert)-v[012]", name):
        path = common.download(f"https://huggingface.co/datasets/farama-minari/mujoco/resolve/main/{name[7:]}/data/main_data.hdf5",
                               folder / name / "data" / "main_data.hdf5")
    elif re.fullmatch(r"halfcheetah-(random|medium|expert|medium-replay|full-replay|medium-expert)-v2", name):
        file = name[:-3].replace("-", "_") + "-v2.hdf5"
        path = common.download(f"http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{file}", folder / file)
    elif not (path := pathlib.Path(name)).is_file():
        sorry(f"--dataset {name} is neither ladder, nor a known data set (--help), nor a file")
    data = common.read_episodes(path)
    q = np.percentile(data.returns, [0, 25, 50, 75, 100])
    print(f"{path}: {len(data.length)} episodes, {len(data.rew)} steps; returns, smallest, quartiles, largest: "
          f"{' '.join(f'{x:.0f}' for x in q)}; D4RL-normalised: {' '.join(f'{100 * (x - RANDOM) / (EXPERT - RANDOM):.1f}' for x in q)}")
    return data

# ---- the model: Decision Transformer (Chen et al. 2021, arXiv 2106.01345) ---------------------------------------------------
# B windows, K steps, T = 3K - 1 tokens (R_1, s_1, a_1, ..., R_K, s_K), C = n_embd, nh heads of size hs

class Attention(nn.Module):
    """Causal self-attention with queries from the tokens `rows` (a slice) only, keys and values from all T."""
    def __init__(self, C, n_head, dropout):
        super().__init__()
        self.n_head, self.p = n_head, dropout
        self.query, self.key_value, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, x, mask, rows):
        B, T, C = x.shape
        q = self.query(x[:, rows])                                  # (B, Q, C)
        k, v = self.key_value(x).split(C, 2)                        # (B, T, C) each
        q, k, v = (z.view(B, -1, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))     # (B, nh, Q or T, hs)
        att = q @ k.transpose(2, 3) * (C // self.n_head)**-0.5      # (B, nh, Q, T)
        att = att.masked_fill(~mask[:, :, rows], -1e9).softmax(3)   # not -inf: a padded row sees nothing, and would be NaN
        att = F.dropout(att, self.p, self.training)
        y = (att @ v).transpose(1, 2).reshape(B, -1, C)             # (B, Q, C)
        return F.dropout(self.proj(y), self.p, self.training)

class Block(nn.Module):
    """GPT-2's pre-norm block, with the paper's ReLU."""
    def __init__(self, C, n_head, dropout):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), Attention(C, n_head, dropout), nn.LayerNorm(C)
        self.up, self.down, self.p = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), dropout

    def forward(self, x, mask, rows=slice(None)):
        x = x[:, rows] + self.attn(self.ln_1(x), mask, rows)        # (B, Q, C)
        return x + F.dropout(self.down(F.relu(self.up(self.ln_2(x)))), self.p, self.training)

class DecisionTransformer(nn.Module):
    """What is still to be earned, the state and the action of each step are a token each; the state's predicts the action."""
    def __init__(self, n_layer, n_head, n_embd, dropout, condition):
        super().__init__()
        C, self.condition, self.p = n_embd, condition, dropout
        if condition != "bc":
            self.embed_return = nn.Linear(dict(rate=9, rtg=1)[condition], C)
        self.embed_state, self.embed_action = nn.Linear(S_DIM, C), nn.Linear(A_DIM, C)
        self.embed_time, self.ln_in = nn.Embedding(T_DATA, C), nn.LayerNorm(C)
        self.blocks = nn.ModuleList(Block(C, n_head, dropout) for _ in range(n_layer))
        self.ln_out, self.head = nn.LayerNorm(C), nn.Linear(C, A_DIM)
        for m in self.modules():                                    # GPT-2's initialisation
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
        self.register_buffer("mean", torch.zeros(S_DIM))            # of the data's states: a model knows its own scale
        self.register_buffer("std", torch.ones(S_DIM))
        self.register_buffer("most", torch.tensor(torch.inf))       # the largest rate it was shown: evaluate() asks for no more

    def forward(self, r, s, a, t, valid, last=False):
        """r (B, K): reward rates or returns-to-go; s (B, K, 17); a (B, K, 6); t (B, K): steps since the start; valid (B, K):
        False where a window begins before its episode. -> actions (B, K, 6), or of the last step alone (B, 1, 6)."""
        (B, K), time = t.shape, self.embed_time(t)
        tokens = [self.embed_state((s - self.mean) / self.std) + time, self.embed_action(a) + time]
        if self.condition != "bc":
            tokens.insert(0, self.embed_return(return_features(r, self.condition)) + time)
        n = len(tokens)
        x = torch.stack(tokens, 2).view(B, n * K, -1)[:, :-1]       # (B, T, C): the last action is what we are asked for
        x, T = F.dropout(self.ln_in(x), self.p, self.training), n * K - 1
        seen = valid.repeat_interleave(n, 1)[:, None, None, :T]     # (B, 1, 1, T)
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & seen
        # only state tokens are read out, so only they go through the last block: two thirds of its work fall away
        rows = slice(T - 1, None) if last else slice(n - 2, None, n)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        x = self.blocks[-1](x, mask, rows)                          # (B, K or 1, C)
        return torch.tanh(self.head(self.ln_out(x)))

# ---- the idea: say what is still to be earned, in units that the next action can be read from -------------------------------
def returns_to_go(rew, length):
    """rew (N,), episodes of length (E,) end to end -> R_t = r_t + r_t+1 + ... + r_end of its own episode, (N,) float64."""
    total = np.cumsum(rew, dtype=np.float64)
    return np.repeat(total[np.cumsum(length) - 1], length) - total + rew

def reward_rate(rtg, steps_left):
    """The return-to-go per step left. The same R_t asks for a stroll at an episode's start and for a sprint at its end: to tell
    which, the network must divide, and it divides badly. In the last second (20 steps) one stride would swing it: hence the floor."""
    return rtg / np.maximum(steps_left, 20)

def return_features(r, condition):
    """r (B, K) -> (B, K, 1), the paper's scale, or (B, K, 9): waves tell rates apart that a line lets look alike (NeRF's
    encoding, arXiv 2003.08934 eq. 4): the shortest is 0.23 long, so 1200 and 1220 differ by half a radian."""
    r = r[..., None]
    if condition == "rtg":
        return r / 1000
    waves = r * torch.tensor([1.0, 3.0, 9.0, 27.0], device=r.device)
    return torch.cat([r, waves.sin(), waves.cos()], -1)

def windows(first, length, K, B, rng):
    """B windows of K steps that end anywhere in an episode, its first steps too, as in evaluation. -> index into the flat
    arrays, time step, valid (False before the episode's start): (B, K) each."""
    end = rng.integers(0, length.sum(), B)
    begin = first[np.searchsorted(first, end, side="right") - 1][:, None]
    index = end[:, None] + np.arange(1 - K, 1)
    return np.maximum(index, begin), np.maximum(index - begin, 0), index >= begin

def clock(t, condition):
    """The time step as the model is told it. A rate already knows how much time is left, so its clock stops after 100 steps
    and every horizon looks alike; the paper's return-to-go needs it to the end of the data's."""
    return np.minimum(t, 100 if condition == "rate" else T_DATA - 1)

# ---- training --------------------------------------------------------------------------------------------------------------
def train(args, condition, data, file, device):
    """Train on windows of data() (called only if needed), going on from file if it is there. -> model, seconds of training."""
    torch.manual_seed(args.seed)
    model = DecisionTransformer(args.n_layer, args.n_head, args.n_embd, args.dropout, condition).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    state = common.resume(file, model=model, optimizer=optimizer)
    step, seconds, losses = state.get("step", 0), state.get("seconds", 0.0), []
    if step == args.steps:
        return model.eval(), seconds
    d = data()
    r = returns_to_go(d.rew, d.length)
    if condition == "rate":
        r = reward_rate(r, np.repeat(d.first + d.length, d.length) - np.arange(len(r)))
        model.most.fill_(np.quantile(r, 0.999))
    r, obs, act = (torch.from_numpy(np.float32(x)).to(device) for x in (r, d.obs, d.act))
    model.mean.copy_(obs.mean(0))
    model.std.copy_(obs.std(0) + 1e-6)
    began = time.time() - seconds                   # as if the run had never been cut
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, desc=f"training {condition}", unit="step", disable=None)
    for step in bar:
        # batches and dropout depend on (seed, step) alone: a resumed run sees what an unbroken one would have seen
        torch.manual_seed(1_000_003 * args.seed + step)
        i, t, valid = windows(d.first, d.length, args.context, args.batch_size, np.random.default_rng((args.seed, step)))
        i, t, valid = (torch.from_numpy(x).to(device) for x in (i, clock(t, condition), valid))
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            guess = model(r[i], obs[i], act[i], t, valid)
        loss = F.mse_loss(guess[valid].float(), act[i][valid])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sorry(f"the loss is not finite at step {step}; a smaller --lr may help")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            seconds = time.time() - began
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}")
            common.save_checkpoint(file, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1, seconds=seconds))
    print(f"trained {NAMES[condition]}: loss {np.mean(losses[-100:]):.5f} over the last {len(losses[-100:])} of {step + 1} steps, {seconds:.0f} s")
    return model.eval(), seconds

# ---- evaluation: closed loop, all targets and episodes in one batch ---------------------------------------------------------
@torch.inference_mode()
def evaluate(model, targets, args, device):
    """One episode per entry of targets (n,), all at once, each from its own start. -> what was asked of them in the end (n,):
    the targets, if no schedule changed them; what they earned (n,); who ever pitched over (n,) bool; and the first one's
    diary: a list of (qpos (9,), return so far, target)."""
    n, K, H, rng = len(targets), args.context, args.max_steps, np.random.default_rng(10_000 + args.seed)
    sim, schedule = Cheetahs(n), dict(args.target_schedule)
    obs, targets = sim.reset(rng, args.start_noise), np.array(targets, float)
    owed, asked = targets.copy(), targets.copy()                # what is still to be earned; what was to be, in all
    earned, fell, diary = np.zeros(n), np.zeros(n, bool), []
    r, s, a = (torch.zeros(n, K, *shape, device=device) for shape in ((), (S_DIM,), (A_DIM,)))
    t, valid = torch.zeros(n, K, dtype=torch.long, device=device), torch.zeros(n, K, dtype=torch.bool, device=device)
    for step in range(H):
        if step in schedule:                                    # from here on at the pace of another target
            targets[:] = schedule[step]
            owed = targets * (H - step) / H
            asked = earned + owed
        if args.push and step % 200 == 100:                     # obs is a view of sim.state: it sees the shove
            sim.state[:, 10:13] += args.push * rng.standard_normal((n, 3))
        for x in (r, s, a, t, valid):                           # the window moves on by a step
            x[:, :-1] = x[:, 1:].clone()
        told = np.minimum(reward_rate(owed, H - step), model.most.item()) if model.condition == "rate" else owed
        r[:, -1], s[:, -1] = torch.from_numpy(told), torch.from_numpy(obs)
        t[:, -1], valid[:, -1] = int(clock(step, model.condition)), True
        a[:, -1] = model(r, s, a, t, valid, last=True)[:, 0]
        obs, reward = sim.step(a[:, -1].cpu().double().numpy())
        earned, owed, fell = earned + reward, owed - reward, fell | (np.abs(obs[:, 1]) > 1.2)
        diary.append((sim.state[0, 1:10].copy(), earned[0], targets[0]))
    return asked, earned, fell, diary

def figure(rows, path):
    """rows: (policy, asked, got), (targets, episodes) each -> a PNG of target against reached: episodes as dots, means as lines."""
    from matplotlib.figure import Figure            # not pyplot, which looks for a display
    ax = Figure(figsize=(6, 6), dpi=120).subplots()
    ax.axline((0, 0), slope=1, color="0.8", lw=4, zorder=0)
    for name, asked, got in rows:
        order = np.argsort(asked.mean(1))
        (line,) = ax.plot(asked.mean(1)[order], got.mean(1)[order], lw=1.5, label=name)
        ax.plot(asked.flatten(), got.flatten(), ".", color=line.get_color(), ms=3, alpha=0.35)
    ax.set(xlabel="return asked for", ylabel="return reached")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    with common.whole_file(path) as part:
        ax.figure.savefig(part, bbox_inches="tight")
    return path

# ---- main ------------------------------------------------------------------------------------------------------------------
def checkpoint(args, condition):
    """A model's file is named after all that shaped it: other flags make another model, the same flags find it again."""
    shape = {k: getattr(args, k) for k in ("dataset ladder_episodes action_noise cross_start rough n_layer n_head n_embd context dropout "
                                           "steps batch_size lr warmup weight_decay grad_clip dtype seed").split()}
    source = pathlib.Path(args.ladder if args.dataset == "ladder" else args.dataset)        # other data, another model
    data = source.read_bytes() if source.is_file() else b""
    return OUT / f"dt_cheetah_{condition}_{hashlib.sha256(json.dumps(shape).encode() + data).hexdigest()[:8]}.pt"

def main():
    args, began, device = get_args(), time.time(), common.pick_device()
    if args.search or args.collect:
        return search(args, OUT / "cheetah_ladder.npz") if args.search else find_dataset(args)
    args.dtype = common.fast_dtype(device) if args.dtype == "auto" else args.dtype
    print(f"device {device}, {torch.get_num_threads()} threads, training in {args.dtype}")
    data, rows = functools.cache(lambda: find_dataset(args)), []        # read once, and only if there is training to do
    for condition in dict.fromkeys([args.condition, *args.baseline]):
        model, seconds = train(args, condition, data, checkpoint(args, condition), device)
        asked, got, fell, diary = evaluate(model, np.repeat(args.targets, args.episodes), args, device)
        asked, got, fell = (z.reshape(-1, args.episodes) for z in (asked, got, fell))
        error = abs(got - asked) / np.maximum(abs(asked), 1)
        rows.append((NAMES[condition], asked, got, fell, error, diary))
        print(f"\n{NAMES[condition]} ({sum(p.numel() for p in model.parameters()):,} parameters, {seconds:.0f} s of training)\n"
              " asked    reached            error    fell")
        for x, g, e, f in zip(asked, got, error, fell):
            print(f"{x.mean():6.0f}   {g.mean():7.1f} +- {g.std():6.1f}  {e.mean():7.2%}  {f.sum():3d}/{len(f)}")
    _, asked, got, fell, error, diary = rows[0]                         # the policy asked for, not its baselines
    tell = lambda x: x.round(1).tolist() if len(x) > 1 else x[0].round(1)
    metrics = dict(asked=tell(asked.mean(1)), reached=tell(got.mean(1)), std=tell(got.std(1)), error_percent=round(100 * error.mean(), 2),
                   episodes=got.size, fell=int(fell.sum()))
    if len(args.targets) > 1:
        metrics["figure"] = str(figure([row[:3] for row in rows], OUT / "dt_cheetah_targets.png"))
    if args.video:
        film = common.draw_episode(Cheetahs.model, diary[:args.video_steps], args.renderer)
        metrics["video"] = str(common.write_video(OUT / f"dt_cheetah_{args.targets[0]:.0f}.mp4", film))
    common.log_result("dt_cheetah.py", args, time.time() - began, metrics)

if __name__ == "__main__":
    common.run(main)
