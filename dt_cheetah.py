"""dt_cheetah.py: a Decision Transformer, trained from scratch, that runs HalfCheetah at the return you ask for.

    python dt_cheetah.py --target_rew 1200
"""
import functools, hashlib, json, math, os, pathlib, re, shutil, sys, time
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import sorry

S_DIM, A_DIM, DT = 17, 6, 0.05          # HalfCheetah-v5: observation, action, seconds per step
T_DATA = 1000                           # its time limit, and the length of the timestep embedding
LADDER = pathlib.Path(__file__).resolve().parent / "data" / "cheetah_ladder.npz"
SHAPING = ("dataset ladder_episodes action_noise cross_start n_layer n_head n_embd context dropout steps batch_size lr warmup "
           "weight_decay grad_clip seed").split()        # the flags that make a model what it is
NAMES = dict(rate="DT (reward rate)", rtg="DT (return-to-go)", bc="BC")

# ---- flags -----------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    p = common.Flags(__doc__)
    # what is asked of the cheetah
    p.flag("target_rew", 1200.0, "return to run at, summed over the episode")
    p.flag("targets", None, "several returns, for a table and a figure: 300 600 1200, or 100:5000:100 for a range", nargs="+")
    p.flag("target_schedule", None, "change the target in mid-run: 0:600 400:2400 asks for the pace of 600, from step 400 on of 2400", nargs="+")
    p.flag("episodes", 10, "evaluation episodes per target, each from its own start")
    p.flag("max_steps", 1000, "evaluation horizon in steps of 0.05 s; the training data's is 1000")
    p.flag("start_noise", 0.1, "spread of the start state; 0.1 is gymnasium's, 0.3 a rough start")
    p.flag("push", 0.0, "shove the torso every 200 steps: spread of the kick in m/s and rad/s")
    # what it learns from
    p.flag("dataset", "ladder", "ladder (made here), mujoco/halfcheetah/expert-v0 (Minari), halfcheetah-medium-v2 (D4RL) or a .hdf5")
    p.flag("ladder_episodes", 36, "episodes per gait of the ladder")
    p.flag("action_noise", 0.05, "spread of the noise on the ladder's actions: the data then shows how to recover")
    p.flag("cross_start", 0.6, "share of ladder episodes that start in mid-run of another gait: the data then shows how to change speed")
    p.flag("search", False, "search the ladder's gaits anew and end")
    p.flag("search_seed", 2, "of the search; 2 of 0-2 climbed fastest")
    p.flag("search_steps", 80, "steps of random search for the first gait, before the ladder grows from it")
    # how the target reaches the model
    p.flag("condition", "rate", "rate: reward per step still to earn; rtg: the paper's return-to-go; bc: behaviour cloning, no return at all",
           choices=["rate", "rtg", "bc"])
    p.flag("baseline", [], "policies to train and print beside: none is behaviour cloning (bc), rtg the paper's conditioning",
           nargs="+", choices=["bc", "rtg", "rate"])
    # model: the paper's sizes
    p.flag("n_layer", 3, "transformer blocks")
    p.flag("n_head", 1, "attention heads")
    p.flag("n_embd", 128, "width of a token")
    p.flag("context", 20, "K, the steps the model looks back; a step is three tokens")
    p.flag("dropout", 0.0, "the paper's 0.1 costs time and precision on data this clean")
    # training
    p.flag("steps", 1000, "gradient steps")
    p.flag("batch_size", 64, "windows of K steps per gradient step")
    p.flag("lr", 1e-3, "AdamW's peak learning rate")
    p.flag("warmup", 50, "steps up to the peak; a cosine down to a tenth of it follows")
    p.flag("weight_decay", 1e-4, "AdamW's")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("seed", 0, "of weights, batches and evaluation starts")
    # what comes out
    p.flag("video", True, "write an mp4 of the first episode")
    p.flag("video_steps", 400, "its length in steps; 20 are a second")
    p.flag("renderer", "numpy", "numpy works anywhere; mujoco wants a working OpenGL", choices=["numpy", "mujoco"])
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv)
    if args.smoke:
        for k, v in dict(ladder_episodes=1, search_steps=2, steps=20, n_embd=32, episodes=2, max_steps=100, video_steps=40).items():
            setattr(args, k, v)
    try:
        args.targets = [float(x) for t in args.targets or () for x in (spread(t) if ":" in t else [t])]
        args.target_schedule = [(int(t), float(x)) for t, x in (pair.split(":") for pair in args.target_schedule or ())]
    except ValueError:
        p.error("--targets takes numbers or from:to:step, --target_schedule takes step:target pairs")
    return args


def spread(text):
    """"100:5000:100" -> 100, 200, ... 5000."""
    first, last, step = map(float, text.split(":"))
    return np.arange(first, last + step / 2, step)

# ---- the cheetahs: gymnasium's HalfCheetah-v5, many at once ----------------------------------------------------------------

class Cheetahs:
    """n HalfCheetah-v5 in one batch, stepped by mujoco.rollout on all cores. state (n, 19) is time, 9 qpos, 9 qvel."""
    model = None

    def __init__(self, n):
        import mujoco, mujoco.rollout
        if Cheetahs.model is None:
            import gymnasium.envs.mujoco
            xml = pathlib.Path(gymnasium.envs.mujoco.__file__).parent / "assets" / "half_cheetah.xml"
            # settotalmass is deprecated, and mujoco says so on stderr and in a log file: drop it and scale the masses here
            model = mujoco.MjModel.from_xml_string(xml.read_text().replace(' settotalmass="14"', ""))
            mujoco.mj_setTotalmass(model, 14)
            mujoco.mj_setConst(model, mujoco.MjData(model))
            model.stat.meaninertia = model.dof_M0.mean()        # scales the solver's tolerance; only the compiler sets it
            Cheetahs.model = model
        self.n, self.models, cores = n, [self.model] * n, os.cpu_count()
        self.pool, self.datas = mujoco.rollout.Rollout(nthread=cores), [mujoco.MjData(self.model) for _ in range(cores)]
        self.control, self.out, self.sensor = np.empty((n, 5, A_DIM)), np.empty((n, 5, 19)), np.empty((n, 5, 0))
        self.spec = mujoco.mjtState.mjSTATE_CTRL.value

    def reset(self, rng, noise=0.1):
        """Start states as gymnasium draws them: qpos + U(-noise, noise), qvel + noise N(0, 1). Returns observations (n, 17)."""
        self.state = np.zeros((self.n, 19))
        self.state[:, 1:10] = self.model.qpos0 + rng.uniform(-noise, noise, (self.n, 9))
        self.state[:, 10:] = noise * rng.standard_normal((self.n, 9))
        return self.state[:, 2:]

    def step(self, action):
        """action (n, 6), clipped to [-1, 1] -> observations (n, 17), rewards (n,): metres per second minus 0.1 |action|^2."""
        action = np.clip(action, -1, 1)
        self.control[:] = action[:, None]                       # frame_skip: five steps of 0.01 s under one action
        self.pool.rollout(self.models, self.datas, self.state, self.control, nstep=5, control_spec=self.spec,
                          skip_checks=True, state=self.out, sensordata=self.sensor)
        x = self.state[:, 1]
        self.state = self.out[:, -1].copy()
        return self.state[:, 2:], (self.state[:, 1] - x) / DT - 0.1 * np.square(action).sum(1)

# ---- the data: episodes in files --------------------------------------------------------------------------------------------

class Episodes:
    """Episodes end to end: obs (N, 17), act (N, 6), rew (N,) float32, N steps in all; first, length (E,) of each episode."""
    def __init__(self, obs, act, rew, length):
        self.obs, self.act, self.rew, self.length = obs, act, rew, np.asarray(length)
        self.first = np.cumsum(self.length) - self.length
        self.returns = np.add.reduceat(rew, self.first, dtype=np.float64)


def read_episodes(path):
    """Read a .hdf5 in Minari's layout (groups episode_<i>) or D4RL's (flat arrays) -> Episodes. Broken files get a sentence."""
    import h5py
    budget = path.stat().st_size * 1000             # no array can be larger: a flipped bit in a shape would ask for terabytes

    def array(node, name, *shape):
        x = node[name]
        if x.size * x.dtype.itemsize > budget:
            raise ValueError(f"{name} claims {x.size} numbers")
        x = np.asarray(x[()], np.float32)
        x = x.reshape(len(x)) if shape == () and x.shape == (len(x), 1) else x          # D4RL's rewards may be (N, 1)
        if x.shape[1:] != shape:
            raise ValueError(f"{name} has shape {x.shape}, not (steps, {', '.join(map(str, shape))})")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} has values that are not finite")
        return x

    try:
        with h5py.File(path, "r") as f:
            names = sorted((k for k in f if k.startswith("episode_")), key=lambda k: int(k[8:]))
            if names:
                parts = [(array(f[k], "observations", S_DIM), array(f[k], "actions", A_DIM), array(f[k], "rewards")) for k in names]
                if any(not len(o) == len(a) + 1 == len(r) + 1 > 1 for o, a, r in parts):
                    raise ValueError("an episode's arrays do not fit each other")
                obs, act, rew = np.concatenate([o[:-1] for o, _, _ in parts]), *(np.concatenate([p[i] for p in parts]) for i in (1, 2))
                length = [len(r) for _, _, r in parts]
            else:
                obs, act, rew = array(f, "observations", S_DIM), array(f, "actions", A_DIM), array(f, "rewards")
                N = len(rew)
                if not len(obs) == len(act) == N > 0:
                    raise ValueError("its arrays do not fit each other")
                ends = array(f, "timeouts") if "timeouts" in f else np.arange(1, N + 1) % T_DATA == 0
                ends = (ends > 0) | (array(f, "terminals") > 0 if "terminals" in f else False)
                if len(ends) != N:
                    raise ValueError("its timeouts do not fit its rewards")
                last = np.flatnonzero(ends)
                # a tail without an end is an episode cut short: its returns-to-go would be wrong, so it is dropped
                length = np.diff(last, prepend=-1)
                N = length.sum()
                obs, act, rew = obs[:N], act[:N], rew[:N]
                if N == 0:
                    raise ValueError("no episode in it ends")
    except Exception as e:                          # h5py raises OSError, KeyError, RuntimeError, TypeError, ... for broken files
        sorry(f"{path} is not a HalfCheetah data set that can be read ({e})")
    return Episodes(obs, act, rew, length)


def write_episodes(path, obs, act, rew):
    """obs (E, T+1, 17), act (E, T, 6), rew (E, T) -> path in Minari's layout; metadata.json and main_data.hdf5 beside it make
    the folder one that minari.MinariDataset opens."""
    import gymnasium, h5py
    from gymnasium.envs.registration import spec
    with common.whole_file(path) as part, h5py.File(part, "w") as f:
        for i in tqdm(range(len(rew)), desc="writing", unit="episode", disable=None):
            g = f.create_group(f"episode_{i}")
            g.attrs["id"], g.attrs["total_steps"] = i, len(rew[i])
            ends = np.zeros((2, len(rew[i])), bool)
            ends[1, -1] = True                      # HalfCheetah never terminates: time runs out
            for name, x in (("observations", obs[i]), ("actions", act[i]), ("rewards", rew[i]), ("terminations", ends[0]), ("truncations", ends[1])):
                g.create_dataset(name, data=x, chunks=x.shape, fletcher32=True)     # a checksum: flipped bits are noticed
    box = lambda shape, bound: json.dumps(dict(type="Box", dtype="float32", shape=list(shape), low=[-bound] * shape[0], high=[bound] * shape[0]))
    meta = dict(total_episodes=len(rew), total_steps=int(rew.size), data_format="hdf5", dataset_id="mujoco/halfcheetah/ladder-v0",
                observation_space=box((S_DIM,), float("inf")), action_space=box((A_DIM,), 1.0), minari_version="0.5.4",
                env_spec=spec("HalfCheetah-v5").to_json())
    with common.whole_file(path.with_name("metadata.json")) as part:
        part.write_text(json.dumps(meta))
    main = path.with_name("main_data.hdf5")
    if not main.exists():
        main.symlink_to(path.name)


def find_dataset(args, out):
    """--dataset -> Episodes: the ladder (collected if need be), a known name (downloaded if need be) or a file."""
    name, folder = args.dataset, out / "data"
    if name == "ladder":
        how = (args.ladder_episodes, args.action_noise, args.cross_start)
        path = folder / ("cheetah_ladder.hdf5" if how == (36, 0.05, 0.6) else "cheetah_ladder_{}x_{}_{}.hdf5".format(*how))
        if not path.exists():
            collect(args, path)
    elif re.fullmatch(r"mujoco/halfcheetah/(simple|medium|expert)-v[012]", name):
        path = common.download(f"https://huggingface.co/datasets/farama-minari/mujoco/resolve/main/{name[7:]}/data/main_data.hdf5",
                               folder / name / "data" / "main_data.hdf5")
    elif re.fullmatch(r"halfcheetah-(random|medium|expert|medium-replay|full-replay|medium-expert)-v2", name):
        file = name.replace("-", "_").replace("_v2", "-v2") + ".hdf5"
        path = common.download(f"http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{file}", folder / file)
    else:
        path = pathlib.Path(name)
        if not path.is_file():
            sorry(f"--dataset {name} is neither ladder, a known data set nor a file; --help names the known ones")
    data = read_episodes(path)
    banner(data)
    return data


def banner(data):
    """What the model will learn from, in three lines."""
    q = np.percentile(data.returns, [0, 25, 50, 75, 100])
    print(f"data: {len(data.length)} episodes of {data.length.min()}-{data.length.max()} steps, {len(data.rew)} steps in all")
    print("returns (min, quartiles, max): " + " ".join(f"{x:.0f}" for x in q))
    print("D4RL-normalised:               " + " ".join(f"{d4rl_score(x):.1f}" for x in q))


def d4rl_score(ret):
    """0 is D4RL's random policy, 100 its expert (Fu et al. 2020, arXiv 2004.07219)."""
    return 100 * (ret + 280.178953) / (12135 + 280.178953)

# ---- the data: a ladder of gaits, searched and replayed -----------------------------------------------------------------------

def play(W, b, start, T, noise=0.0, rng=None):
    """Let n affine policies a = clip(W obs + b + noise) run T steps: W (n, 6, 17), b (n, 6), start (n, 19) states.
    -> obs (n, T+1, 17), act (n, T, 6), rew (n, T), float32, and the last states (n, 19)."""
    n, sim = len(W), Cheetahs(len(W))
    obs, act, rew = np.empty((n, T + 1, S_DIM), np.float32), np.empty((n, T, A_DIM), np.float32), np.empty((n, T), np.float32)
    sim.state = start.copy()
    for t in range(T):
        o = sim.state[:, 2:]
        a = (W @ o[:, :, None])[:, :, 0] + b
        if noise:
            a += noise * rng.standard_normal(a.shape)
        act[:, t], obs[:, t] = np.clip(a, -1, 1), o
        obs[:, t + 1], rew[:, t] = sim.step(a)
    return obs, act, rew, sim.state


def upright(obs):
    """obs (n, T+1, 17) -> (n, T) bool: True until the torso first pitches over 1.2 rad; from there no gait here comes back."""
    return np.logical_and.accumulate(np.abs(obs[:, 1:, 1]) < 1.2, axis=1)


def starts(n, rng, running=None):
    """n start states (n, 19): from rest as gymnasium draws them, every second one from `running` (m, 19), states in mid-run."""
    sim = Cheetahs(n)
    sim.reset(rng)
    if running is not None:
        sim.state[::2] = running[rng.integers(0, len(running), (n + 1) // 2)]
        sim.state[:, :2] = 0
    return sim.state


def search_step(X, mean, std, score, rng, n_dir, top, step, nu):
    """One step of Augmented Random Search (Mania et al. 2018, arXiv 1803.07055, algorithm 2, V2-t): X (6, 18) is the policy on
    normalised observations, its bias the last column. Try n_dir random directions both ways; the `top` best make the step."""
    D = rng.standard_normal((n_dir,) + X.shape)
    Y = np.concatenate([X + nu * D, X - nu * D])
    W = Y[:, :, :S_DIM] / std
    plus, minus = score(W, Y[:, :, S_DIM] - W @ mean).reshape(2, n_dir)
    best = np.argsort(-np.maximum(plus, minus))[:top]
    spread = np.concatenate([plus[best], minus[best]]).std() + 1e-6
    return X + step / (top * spread) * np.einsum("k,kij->ij", plus[best] - minus[best], D[best])


def fast_gait(args, z, save):
    """ARS from nothing: the score is the return, and a fall ends it. z is the state to go on from, save(z) keeps it."""
    X, count, total, squares = z.get("X", np.zeros((A_DIM, S_DIM + 1))), z.get("count", 0), z.get("total", 0), z.get("squares", 0)
    mean, std = z.get("mean", np.zeros(S_DIM)), z.get("std", np.ones(S_DIM))
    bar = tqdm(range(int(z.get("step", 0)), args.search_steps), desc="random search", unit="step", disable=None)
    for step in bar:
        rng, seen = np.random.default_rng((args.search_seed, step)), []

        def score(W, b):
            obs, _, rew, _ = play(W, b, starts(len(W), rng), T_DATA)
            seen.append((obs, rew))
            return (rew * upright(obs)).sum(1)

        X = search_step(X, mean, std, score, rng, n_dir=32, top=4, step=0.02, nu=0.03)       # the paper's for HalfCheetah
        o = seen[0][0].reshape(-1, S_DIM).astype(np.float64)
        count, total, squares = count + len(o), total + o.sum(0), squares + np.square(o).sum(0)
        mean = total / count
        std = np.sqrt(squares / count - mean**2 + 1e-8)
        bar.set_postfix(mean=int(seen[0][1].sum(1).mean()), best=int(seen[0][1].sum(1).max()))
        save(X=X, count=count, total=total, squares=squares, mean=mean, std=std, step=step + 1)
    W = X[:, :S_DIM] / std
    return W, X[:, S_DIM] - W @ mean


def gait_near(W, b, speed, running, rng):
    """Change a gait until it earns `speed` per step: ARS whose score is minus the distance from it, in averages over a second
    (20 steps); a fall costs 2. Half the episodes start in mid-run of other gaits: what survives that can be switched to."""
    obs = play(W[None].repeat(8, 0), b[None].repeat(8, 0), starts(8, rng), 300, 0.05, rng)[0][:, 50:].reshape(-1, S_DIM)
    mean, std = obs.mean(0, dtype=np.float64), np.maximum(obs.std(0, dtype=np.float64), 0.05)
    X = np.concatenate([W * std, (b + W @ mean)[:, None]], 1)
    for _ in range(8):
        start = starts(4, rng, running)             # the same four starts for all directions: their luck cancels

        def score(W, b):
            n = len(W)
            obs, _, rew, _ = play(W.repeat(4, 0), b.repeat(4, 0), np.tile(start, (n, 1)), 300, 0.05, rng)
            up = upright(obs)
            miss = np.abs((rew * up).reshape(-1, 15, 20).mean(2) - speed).mean(1) + 2 * ~up[:, -1]
            return -miss.reshape(n, 4).mean(1)

        X = search_step(X, mean, std, score, rng, n_dir=24, top=8, step=0.015, nu=0.02)
    W = X[:, :S_DIM] / std
    return W, X[:, S_DIM] - W @ mean


def gait_test(W, b, running, rng):
    """16 episodes from rest, 24 in mid-run with action noise -> mean and std of the return of the first, falls in all."""
    obs, _, rew, _ = play(W[None].repeat(16, 0), b[None].repeat(16, 0), starts(16, rng), T_DATA)
    rough = play(W[None].repeat(24, 0), b[None].repeat(24, 0), running[rng.integers(0, len(running), 24)], T_DATA, 0.05, rng)[0]
    return rew.sum(1).mean(), rew.sum(1).std(), (~upright(obs)[:, -1]).sum() + (~upright(rough)[:, -1]).sum()


def search(args, file):
    """Find the ladder from --search_seed alone: one fast gait, then rung by rung its neighbours, up to the fastest and down
    past standing still. Every try is kept in out/search.npz: kill it and it goes on. Writes file (.npz)."""
    path = pathlib.Path("out/search.npz")
    z = load_arrays(path) if path.exists() else {}

    def save(**more):
        z.update(more)
        with common.whole_file(path) as part:
            np.savez(part, **z)

    if "W" not in z:
        W, b = fast_gait(args, z, save)
        rew = play(W[None].repeat(16, 0), b[None].repeat(16, 0), starts(16, np.random.default_rng(0)), 300)[2]
        save(W=W, b=b, first=np.round(rew.mean(), 1), i=0, tries=0, Ws=np.empty((0, A_DIM, S_DIM)), bs=np.empty((0, A_DIM)),
             found=np.empty((0, 2)), running=np.empty((0, 16, 19)))
    up = np.arange(z["first"], 6.7, 0.12)
    down = np.concatenate([np.arange(z["first"] - 0.12, 1.1, -0.12), np.arange(1.1, -0.26, -0.09)])
    plan = np.concatenate([up, down])
    bar = tqdm(total=len(plan), initial=int(z["i"]), desc="ladder", unit="gait", disable=None)
    while z["i"] < len(plan):
        i, tries, W, b = int(z["i"]), int(z["tries"]), z["W"], z["b"]
        rng = np.random.default_rng((args.search_seed, i, tries))
        if i == len(up) and tries == 0:             # the way down begins where the way up began
            W, b = z["Ws"][0], z["bs"][0]
        own = play(W[None].repeat(16, 0), b[None].repeat(16, 0), starts(16, rng), 150, 0.05, rng)[3]
        near = np.argsort(np.abs(z["found"][:, 0] / T_DATA - plan[i]))[:5]          # mid-run states of the nearest rungs
        W, b = gait_near(W, b, plan[i], np.concatenate([own, *z["running"][near]]), rng)
        own = play(W[None].repeat(16, 0), b[None].repeat(16, 0), starts(16, rng), 150, 0.05, rng)[3]
        mean, std, falls = gait_test(W, b, np.concatenate([own, *z["running"][near]]), rng)
        bar.set_postfix(wanted=f"{plan[i]:.2f}", got=f"{mean:.0f}+-{std:.0f}", falls=falls)
        if falls == 0 and std < max(25, 0.012 * mean):
            save(W=W, b=b, i=i + 1, tries=0, Ws=np.concatenate([z["Ws"], W[None]]), bs=np.concatenate([z["bs"], b[None]]),
                 found=np.concatenate([z["found"], [[mean, std]]]), running=np.concatenate([z["running"], own[None]]))
        elif tries < 11:
            save(W=W, b=b, tries=tries + 1)
        else:                                       # as fast as it gets: the rest of the way up is left out
            save(W=W, b=b, i=len(up) if i < len(up) else i + 1, tries=0)
        bar.n = int(z["i"])
        bar.refresh()
    order = np.argsort(z["found"][:, 0])
    with common.whole_file(file) as part:
        np.savez_compressed(part, W=z["Ws"][order].astype(np.float32), b=z["bs"][order].astype(np.float32),
                            returns=z["found"][order, :2].astype(np.float32))
    print(f"{len(order)} gaits, {z['found'][order[0], 0]:.0f} to {z['found'][order[-1], 0]:.0f} -> {file}")


def load_arrays(path):
    """An .npz as a dict of arrays; a broken one gets a sentence."""
    try:
        with np.load(path) as z:
            return dict(z)
    except Exception as e:                          # zipfile, numpy and zlib each have their own errors
        sorry(f"{path} cannot be read ({e}); remove it to start anew")


def collect(args, path):
    """Replay every gait of the ladder, with noise on its actions and from other gaits' mid-run states, into path."""
    z = load_arrays(LADDER)
    W, b = z["W"].astype(np.float64), z["b"].astype(np.float64)
    G, each, folder = len(W), min(6, args.ladder_episodes), path.with_suffix(".parts")
    gait, n = np.arange(G).repeat(each), each * G
    files = [folder / f"{i}.npz" for i in range(args.ladder_episodes // each)]
    bar = tqdm(total=len(files) * n * T_DATA, unit="step", unit_scale=True, desc="collecting", disable=None)
    for i, file in enumerate(files):                # six episodes of each gait make a part; a killed run keeps its parts
        if not file.exists():
            rng = np.random.default_rng(i)
            # in whose run an episode starts: half of the crossings from a neighbour's, half from anyone's, the rest from rest
            u, near = rng.random(n), np.clip(gait + rng.choice([-2, -1, 1, 2], n), 0, G - 1)
            other = np.where(u < args.cross_start / 2, near, rng.integers(0, G, n))
            start = starts(n, rng)
            running = play(W[other], b[other], start, 150, args.action_noise, rng)[3]
            start[u < args.cross_start] = running[u < args.cross_start]
            start[:, :2] = 0
            obs, act, rew, _ = play(W[gait], b[gait], start, T_DATA, args.action_noise, rng)
            ok = upright(obs)[:, -1]                # a fall shows how to lie on one's back: left out
            with common.whole_file(file) as part:
                np.savez(part, obs=obs[ok], act=act[ok], rew=rew[ok])
        bar.update(n * T_DATA)
    bar.close()
    parts = [load_arrays(file) for file in files]
    obs, act, rew = (np.concatenate([p[k] for p in parts]) for k in ("obs", "act", "rew"))
    print(f"{len(rew)} of {len(files) * n} episodes stayed on their feet")
    write_episodes(path, obs, act, rew)
    shutil.rmtree(folder)

# ---- the model: Decision Transformer (Chen et al. 2021, arXiv 2106.01345) ---------------------------------------------------

class Attention(nn.Module):
    """Causal self-attention; only the tokens `rows` ask, all tokens answer."""
    def __init__(self, C, n_head, dropout):
        super().__init__()
        self.n_head, self.p = n_head, dropout
        self.query, self.key_value, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)

    def forward(self, x, mask, rows):
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q = self.query(x[:, rows])                                  # (B, Q, C)
        k, v = self.key_value(x).split(C, 2)                        # (B, T, C) each
        q, k, v = (z.view(B, -1, nh, hs).transpose(1, 2) for z in (q, k, v))    # (B, nh, Q or T, hs)
        att = q @ k.transpose(2, 3) * hs**-0.5                      # (B, nh, Q, T)
        att = att.masked_fill(~mask[:, :, rows], -1e9).softmax(3)   # not -inf: a padded row may see nothing, and then NaN
        att = F.dropout(att, self.p, self.training)
        y = (att @ v).transpose(1, 2).reshape(B, -1, C)             # (B, Q, C)
        return F.dropout(self.proj(y), self.p, self.training)


class Block(nn.Module):
    """Pre-norm block of GPT-2, with the paper's ReLU."""
    def __init__(self, C, n_head, dropout):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), Attention(C, n_head, dropout), nn.LayerNorm(C)
        self.up, self.down, self.p = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), dropout

    def forward(self, x, mask, rows=slice(None)):
        x = x[:, rows] + self.attn(self.ln_1(x), mask, rows)
        return x + F.dropout(self.down(F.relu(self.up(self.ln_2(x)))), self.p, self.training)


class DecisionTransformer(nn.Module):
    """(condition, state, action) per step -> the action at each state token."""
    def __init__(self, n_layer, n_head, n_embd, dropout, condition):
        super().__init__()
        C, self.condition, self.p = n_embd, condition, dropout
        self.tokens = 2 if condition == "bc" else 3
        if condition != "bc":
            self.embed_return = nn.Linear(9 if condition == "rate" else 1, C)
        self.embed_state, self.embed_action = nn.Linear(S_DIM, C), nn.Linear(A_DIM, C)
        self.embed_time, self.ln_in = nn.Embedding(T_DATA, C), nn.LayerNorm(C)
        self.blocks = nn.ModuleList(Block(C, n_head, dropout) for _ in range(n_layer))
        self.ln_out, self.head = nn.LayerNorm(C), nn.Linear(C, A_DIM)
        for m in self.modules():                                    # GPT-2's initialisation
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
        self.register_buffer("mean", torch.zeros(S_DIM)), self.register_buffer("std", torch.ones(S_DIM))

    def forward(self, rtg, s, a, t, valid, last=False):
        """rtg (B, K) what `condition` makes of the return, s (B, K, 17) raw, a (B, K, 6), t (B, K) steps, valid (B, K) bool,
        False where a window begins before its episode. -> actions (B, K, 6), or (B, 1, 6) of the last step alone."""
        B, K = t.shape
        time = self.embed_time(t)
        tok = [self.embed_state((s - self.mean) / self.std) + time, self.embed_action(a) + time]
        if self.condition != "bc":
            tok.insert(0, self.embed_return(features(rtg, self.condition)) + time)
        x = torch.stack(tok, 2).view(B, self.tokens * K, -1)[:, :-1]        # the last action is what we are asked for
        x = F.dropout(self.ln_in(x), self.p, self.training)
        T = x.size(1)
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & valid.repeat_interleave(self.tokens, 1)[:, None, None, :T]
        # only state tokens are read out, so the last block computes nothing else: its keys and values, but a third of its rest
        rows = slice(T - 1, None) if last else slice(self.tokens - 2, None, self.tokens)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        x = self.blocks[-1](x, mask, rows)
        return torch.tanh(self.head(self.ln_out(x)))

# ---- the idea: conditioning on what is still to be earned ------------------------------------------------------------------

def returns_to_go(rew, length):
    """rew (N,), episodes of length (E,) end to end -> R_t = r_t + r_t+1 + ... to the end of its own episode, (N,)."""
    total = np.cumsum(rew, dtype=np.float64)
    last = np.cumsum(length) - 1
    return np.repeat(total[last], length) - total + rew


def rate(rtg, steps_left):
    """Return-to-go in reward per step: all that the model needs to know of the future."""
    return rtg / np.maximum(steps_left, 20)


def features(r, condition):
    """r (..., ) -> (..., 9) or (..., 1)"""
    r = r[..., None]
    if condition == "rtg":
        return r / 1000
    waves = r * torch.tensor([1., 3., 9., 27.], device=r.device)
    return torch.cat([r, waves.sin(), waves.cos()], -1)


def windows(first, length, K, B, rng):
    """B windows of K steps, each ending anywhere in an episode: index into the flat arrays, time, valid: all (B, K)."""
    end = rng.integers(0, length.sum(), B)
    e = np.searchsorted(first, end, side="right") - 1
    idx = end[:, None] + np.arange(1 - K, 1)
    t = idx - first[e][:, None]
    return np.maximum(idx, first[e][:, None]), np.clip(t, 0, T_DATA - 1), t >= 0


def train(args, condition, data, file, device):
    """Train on windows of data() (called only if needed), going on from file if it is there. -> model, seconds of training."""
    torch.manual_seed(args.seed)
    model = DecisionTransformer(args.n_layer, args.n_head, args.n_embd, args.dropout, condition).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    step, seconds = 0, 0.0
    if file.exists():
        state = common.load_checkpoint(file)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, seconds = state["step"], state["seconds"]
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
            sorry(f"{file} holds a model of another shape than the flags ask for; remove it to train anew")
    if step == args.steps:
        return model.eval(), seconds
    d = data()
    value = returns_to_go(d.rew, d.length)
    if condition == "rate":
        value = rate(value, np.repeat(d.first + d.length, d.length) - np.arange(len(d.rew)))
    value, obs, act = (torch.from_numpy(np.float32(x)).to(device) for x in (value, d.obs, d.act))
    if step == 0:
        model.mean.copy_(obs.mean(0)), model.std.copy_(obs.std(0) + 1e-6)
    bar = tqdm(total=args.steps, initial=step, desc=f"training {condition}", unit="step", disable=None)
    began, losses = time.time() - seconds, []
    while step < args.steps:
        # batches and dropout depend on (seed, step) alone: a resumed run sees what an unbroken one would have seen
        torch.manual_seed(1_000_003 * args.seed + step)
        batch = windows(d.first, d.length, args.context, args.batch_size, np.random.default_rng((args.seed, step)))
        i, t, valid = (torch.from_numpy(x).to(device) for x in batch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        loss = F.mse_loss(model(value[i], obs[i], act[i], t, valid)[valid], act[i][valid])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sorry(f"the loss is not finite at step {step}; a smaller --lr may help")
        step += 1
        bar.update()
        if step % 100 == 0 or step == args.steps:
            seconds = time.time() - began
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}")
            common.save_checkpoint(file, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, seconds=seconds))
    bar.close()
    print(f"trained {condition} for {step} steps: loss {np.mean(losses[-100:]):.5f} over the last 100, {seconds:.0f} s")
    return model.eval(), seconds

# ---- evaluation: closed loop, all targets and episodes in one batch ---------------------------------------------------------

@torch.inference_mode()
def evaluate(model, targets, args, device, watch=False):
    """One episode per entry of targets (n,), all at once, each from its own start. Returns what they earned (n,), who fell
    (n,) bool, and with watch the first one's diary: a list of (qpos (9,), return so far, target)."""
    n, K, H = len(targets), args.context, args.max_steps
    rng = np.random.default_rng(10_000 + args.seed)
    sim = Cheetahs(n)
    obs, earned, owed, fallen, diary = sim.reset(rng, args.start_noise), np.zeros(n), np.array(targets, float), np.zeros(n, bool), []
    rtg, s, a = (torch.zeros(n, K, *shape, device=device) for shape in ((), (S_DIM,), (A_DIM,)))
    time, valid = (torch.zeros(n, K, dtype=dtype, device=device) for dtype in (torch.long, torch.bool))
    schedule = dict(args.target_schedule)
    for t in range(H):
        if t in schedule:                                       # from here on run at the pace of another target
            owed[:] = schedule[t] * (H - t) / H
            targets = np.full(n, schedule[t])
        if args.push and t % 200 == 100:
            sim.state[:, 10:13] += args.push * rng.standard_normal((n, 3))
            obs = sim.state[:, 2:]
        for x in (rtg, s, a, time, valid):                      # the window moves on by a step
            x[:, :-1] = x[:, 1:].clone()
        now = rate(owed, H - t) if model.condition == "rate" else owed
        rtg[:, -1], s[:, -1] = torch.from_numpy(now), torch.from_numpy(obs)
        time[:, -1], valid[:, -1] = min(t, T_DATA - 1), True
        a[:, -1] = model(rtg, s, a, time, valid, last=True)[:, 0]
        obs, reward = sim.step(a[:, -1].double().cpu().numpy())
        earned, owed, fallen = earned + reward, owed - reward, fallen | (np.abs(obs[:, 1]) > 1.2)
        if watch:
            diary.append((sim.state[0, 1:10].copy(), earned[0], targets[0]))
    return earned, fallen, diary


def draw(diary, args):
    """An episode's diary as frames (352, 640, 3) uint8, by our own renderer or MuJoCo's."""
    import mujoco
    view, model, data, gl = common.SideView(), Cheetahs.model, mujoco.MjData(Cheetahs.model), None
    if args.renderer == "mujoco":
        try:
            gl = mujoco.Renderer(model, view.h, view.w)
        except Exception as e:                                  # no GL library, no display, no device: each its own error
            print(f"no OpenGL here ({type(e).__name__}): drawing with numpy instead", file=sys.stderr)
    for t, (qpos, earned, target) in enumerate(diary):
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        second = max(0, t - 20)
        speed = (qpos[0] - diary[second][0][0]) / DT / max(1, t - second)
        lines = [f"target {target:.0f}", f"return {earned:.0f}", f"{speed:.1f} m/s"]
        if gl is None:
            yield view.frame(*common.cheetah_capsules(model, data), camera=qpos[0], lines=lines)
        else:
            gl.update_scene(data, camera="track")
            frame = gl.render().copy()
            for i, line in enumerate(lines):
                view.text(frame, line, 14, 10 + 24 * i, color=(250, 250, 250))
            yield frame


def figure(rows, path):
    """rows: (policy, asked (n,), got (n,)) -> a PNG of target against reached, each episode a dot, the wish a diagonal."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 6), dpi=120)
    top = max(asked.max() for _, asked, _ in rows) * 1.05
    ax.plot([0, top], [0, top], color="0.75", lw=1, zorder=0)
    for (name, asked, got), color in zip(rows, ("C0", "C1", "C2", "C3")):
        targets = np.unique(asked)
        ax.plot(asked, got, ".", color=color, ms=3, alpha=0.35)
        ax.plot(targets, [got[asked == x].mean() for x in targets], "-", color=color, lw=1.5, label=name)
    ax.set(xlabel="return asked for", ylabel="return reached", xlim=(0, top), ylim=(-200, max(top, max(g.max() for _, _, g in rows))))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    with common.whole_file(path) as part:
        fig.savefig(part, bbox_inches="tight")
    plt.close(fig)
    return path

# ---- main ------------------------------------------------------------------------------------------------------------------

def main():
    args, began, out, device = get_args(), time.time(), pathlib.Path("out"), common.pick_device()
    if args.search:
        return search(args, LADDER)
    print(f"device {device}, {torch.get_num_threads()} threads, float32")
    data, rows = functools.cache(lambda: find_dataset(args, out)), []           # read once, and only if there is training to do
    asked = np.repeat(args.targets or [args.target_rew], args.episodes)
    for condition in dict.fromkeys([args.condition] + args.baseline):
        # a model's name carries all that shaped it: other flags make another model, the same flags find it again
        shape = {k: v for k, v in vars(args).items() if k in SHAPING} | dict(condition=condition)
        key = hashlib.sha256(json.dumps(shape).encode() + LADDER.read_bytes()).hexdigest()[:8]
        model, seconds = train(args, condition, data, out / f"dt_cheetah_{condition}_{key}.pt", device)
        got, fallen, diary = evaluate(model, asked, args, device, watch=condition == args.condition)
        rows.append((NAMES[condition], asked, got))
        print(f"\n{NAMES[condition]}: {sum(p.numel() for p in model.parameters()):,} parameters, trained {seconds:.0f} s")
        print("  target   reached           error    fell")
        for target in np.unique(asked):
            r = got[asked == target]
            print(f"  {target:6.0f}   {r.mean():7.1f} +- {r.std():6.1f} {abs(r - target).mean() / target:7.2%} {fallen[asked == target].sum():4d}/{len(r)}")
        if condition == args.condition:
            metrics = dict(target=asked[0], reached=got[asked == asked[0]].mean(), std=got[asked == asked[0]].std(), episodes=args.episodes)
            if args.targets:
                metrics = dict(targets=len(np.unique(asked)), mean_error=(abs(got - asked) / asked).mean(), fell=int(fallen.sum()), episodes=len(got))
            film = diary
    if args.targets:
        metrics["figure"] = str(figure(rows, out / "dt_cheetah_targets.png"))
    if args.video:
        metrics["video"] = str(common.write_video(out / f"dt_cheetah_{asked[0]:.0f}.mp4", draw(film[:args.video_steps], args)))
    common.log_result("dt_cheetah.py", args, time.time() - began, metrics)


if __name__ == "__main__":
    common.run(main)
