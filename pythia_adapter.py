"""pythia_adapter.py: a language model's frozen transformer runs HalfCheetah; only its new ends are trained.

    python pythia_adapter.py --target_rew 1200          # Pythia-70m's shape with random frozen weights: no network
    python pythia_adapter.py --model EleutherAI/pythia-410m         # the real thing, from the Hub
    python pythia_adapter.py --compare                  # beside DT, cloning and nearest neighbours

Measured: 1 core of an AMD EPYC (Zen 4), torch 2.13, the trunk random and in bfloat16; seeds 0-2, 10 episodes per target, last
checkpoint. Asked for 300, 600, 1200, 2400 it reaches 307.3, 602.2, 1198.5, 2393.4 (mean error 1.0%, from 600 on 0.4%; the worst seed
makes 318 of 300; nobody fell); 46 s of training. Pretrained weights were not run: the Hub could not be reached.
After Small-LLM's adapter on Pythia-410M, which made 74.9 +- 108 of 1200. Differs from it in:
1. the return token carries the reward rate still to be earned, and the data is dt_cheetah.py's ladder of gaits
2. K = 2 steps of context, 500 gradient steps; windows begin before the episode does in training too
3. small tokens (0.03) and large random weights (0.06): an early version needed them, this one is as good with 1 and 0.02 (0.44%)
Not handled: other architectures than GPT-NeoX; dropout; targets above 2400 were not measured.
"""
import contextlib, hashlib, json, math, pathlib, re, subprocess, sys, time

import common                       # before torch: it says how torch's threads wait
from common import Cheetahs, sorry
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

S_DIM, A_DIM, T_DATA = 17, 6, 1000       # HalfCheetah-v5: observation, action, time limit in steps of 0.05 s
OUT, SAVE_EVERY = pathlib.Path("out"), 100
CLOCK = dict(rate=100, rtg=T_DATA - 1)  # the time token stands still from here on: a rate holds for any time left, a return does not
# Pythia's sizes (Biderman et al. 2023, arXiv 2304.01373, table 1): layers, width, heads
SHAPES = {"pythia-14m": (6, 128, 4), "pythia-31m": (6, 256, 8), "pythia-70m": (6, 512, 8), "pythia-160m": (12, 768, 12),
          "pythia-410m": (24, 1024, 16), "pythia-1b": (16, 2048, 8), "pythia-1.4b": (24, 2048, 16), "pythia-2.8b": (32, 2560, 32),
          "pythia-6.9b": (32, 4096, 32), "pythia-12b": (36, 5120, 40)}

# the flags that shape an adapter: they name its file, and --compare hands them on
SHAPED_BY = ("dataset model dtype adapter token_std random_std tune_ln condition context steps batch_size lr warmup weight_decay grad_clip "
             "seed").split()

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # what is asked of the cheetah
    p.flag("target_rew", 1200.0, "return to run at, summed over the episode", low=-1e9)
    p.flag("targets", None, "several returns, for a table and a figure: 300 600 1200", nargs="+", type=float, low=-1e9)
    p.flag("episodes", 10, "evaluation episodes per target, each from its own start")
    p.flag("max_steps", T_DATA, "evaluation horizon in steps of 0.05 s; the training data's is 1000")
    p.flag("dataset", "out/data/cheetah_ladder.hdf5", "episodes, a .hdf5 of Minari or D4RL; dt_cheetah.py is run to make this one")
    # the trunk
    p.flag("model", "random:pythia-70m", "random:SHAPE, frozen noise; scratch:SHAPE, trained; a folder or a Hub id such as "
           f"EleutherAI/pythia-410m, frozen; shapes are {', '.join(SHAPES)}")
    p.flag("dtype", "auto", "the frozen trunk's; auto is the fastest here: bfloat16 where the hardware multiplies it",
           choices=["auto", "float32", "bfloat16", "float16"])
    # the adapter
    p.flag("adapter", "mlp", "the encoders: mlp (Linear-GELU-Linear, what the original trained) or linear", choices=["mlp", "linear"])
    p.flag("token_std", 0.03, "spread of a token where it enters the trunk: small, so that what the trunk adds to it weighs more")
    p.flag("random_std", 0.06, "spread of the weights of random: and scratch: trunks")
    p.flag("tune_ln", False, "train the trunk's LayerNorms, too")
    p.flag("condition", "rate", "rate: reward per step still to earn; rtg: the return-to-go itself", choices=["rate", "rtg"])
    p.flag("context", 2, "K, the steps that the model sees; a step is three tokens, and each passes all of the trunk")
    # training
    p.flag("steps", 500, "gradient steps")
    p.flag("batch_size", 32, "windows of K steps per gradient step")
    p.flag("lr", 1e-3, "AdamW's peak learning rate")
    p.flag("warmup", 50, "steps up to the peak; a cosine down to a tenth of it follows")
    p.flag("weight_decay", 1e-4, "AdamW's")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("seed", 0, "of weights, batches and evaluation starts", low=0)
    # what comes out
    p.flag("video", True, "write an mp4 of the first episode")
    p.flag("video_steps", 400, "its length in steps; 20 are a second")
    p.flag("renderer", "numpy", "numpy works anywhere; mujoco wants a working OpenGL", choices=["numpy", "mujoco"])
    p.flag("compare", False, "run this and the other policies as processes: one table, one figure")
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv, smoke=dict(dataset="out/data/cheetah_ladder_1_0.05_0.6_0.3.hdf5", model="random:pythia-14m", steps=20,
                                         episodes=2, max_steps=100, video_steps=40))
    if args.compare and args.target_rew == p.get_default("target_rew"):
        args.targets = args.targets or [300.0, 600.0, 1200.0, 2400.0]
    args.targets = args.targets or [args.target_rew]
    return args

# ---- the trunk: GPT-NeoX (Black et al. 2022, arXiv 2204.06745), which Pythia is ---------------------------------------------
# B sequences, T tokens, C = n_embd, nh heads of size hs, of which the first `rot` dimensions turn with the position

class Config:
    """What shapes a GPT-NeoX, from the dict of a config.json; newer ones keep the rotary numbers under rope_parameters."""
    def __init__(self, c):
        rope = c.get("rope_parameters") or {}
        self.n_layer, self.n_embd, self.n_head = c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"]
        self.ffn, self.eps = c["intermediate_size"], c.get("layer_norm_eps", 1e-5)
        self.parallel, self.bias = c.get("use_parallel_residual", True), c.get("attention_bias", True)
        flat = {**c, **rope}                # rotary_pct and rotary_emb_base are the old names, and Pythia's
        self.theta = float(flat.get("rope_theta") or flat.get("rotary_emb_base") or 10_000)
        self.hs = self.n_embd // self.n_head
        self.rot = int(self.hs * (flat.get("partial_rotary_factor") or flat.get("rotary_pct") or 0.25))
        scaling = rope or c.get("rope_scaling") or {}
        kind, act = scaling.get("rope_type") or scaling.get("type") or "default", c.get("hidden_act", "gelu")
        if act != "gelu" or kind != "default" or self.n_embd % self.n_head or self.rot % 2:
            raise ValueError(f"{act} (gelu is handled), rope {kind} (default is), {self.n_head} heads on {self.n_embd}, {self.rot} turning")

class Block(nn.Module):
    """Attention and MLP side by side on the same input (parallel), or one after the other. Names are the files' names."""
    def __init__(self, cfg):
        super().__init__()
        C, self.cfg = cfg.n_embd, cfg
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(C, cfg.eps), nn.LayerNorm(C, cfg.eps)
        self.attention, self.mlp = nn.Module(), nn.Module()
        self.attention.query_key_value, self.attention.dense = nn.Linear(C, 3 * C, cfg.bias), nn.Linear(C, C, cfg.bias)
        self.mlp.dense_h_to_4h, self.mlp.dense_4h_to_h = nn.Linear(C, cfg.ffn), nn.Linear(cfg.ffn, C)

    def attend(self, x, mask, rope, rows):
        (B, T, C), nh, hs = x.shape, self.cfg.n_head, self.cfg.hs
        # the trap of this family: rows of the matrix are head by head (q, k, v of head 0, q, k, v of head 1, ...)
        qk, v = self.attention.query_key_value(x).view(B, T, nh, 3, hs).permute(3, 0, 2, 1, 4).split([2, 1])
        q, k = rotate(qk, *rope)                                    # (B, nh, T, hs) each
        att = q[:, :, rows] @ k.transpose(2, 3) * hs**-0.5          # (B, nh, Q, T)
        att = (att + mask[:, :, rows]).softmax(3)
        return self.attention.dense((att @ v[0]).transpose(1, 2).reshape(B, -1, C))     # (B, Q, C)

    def forward(self, x, mask, rope, rows):
        y = self.attend(self.input_layernorm(x), mask, rope, rows)
        x = x[:, rows]
        z = self.post_attention_layernorm(x if self.cfg.parallel else x + y)
        return x + y + self.mlp.dense_4h_to_h(F.gelu(self.mlp.dense_h_to_4h(z)))        # (B, Q, C)

def rotate(x, cos, sin):
    """Rotary position (Su et al. 2021, arXiv 2104.09864) on the first dimensions of x (..., T, hs): i turns with i + rot/2."""
    half = cos.size(1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

class GPTNeoX(nn.Module):
    """All between the words: their embeddings at both ends are what the adapter takes the place of."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.layers = cfg, nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.final_layer_norm = nn.LayerNorm(cfg.n_embd, cfg.eps)

    def forward(self, x, mask, rows=slice(None)):
        """x (B, T, C): embeddings; mask (B or 1, 1, T, T): who sees whom; rows: the tokens that are asked for -> (B, Q, C)."""
        cfg, T = self.cfg, x.size(1)
        freq = cfg.theta**-(torch.arange(0, cfg.rot, 2, device=x.device) / cfg.rot)
        angle = torch.outer(torch.arange(T, device=x.device), freq)                     # (T, rot/2)
        rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        mask = -1e4 * (~mask).to(x.dtype)                           # not -inf: a padded row sees nothing, and would be NaN
        for block in self.layers[:-1]:
            x = block(x, mask, rope, slice(None))
        # of the last block nothing else is read: two thirds of its work fall away
        return self.final_layer_norm(self.layers[-1](x, mask, rope, rows))

def load_trunk(folder, dtype=torch.float32):
    """A folder in Hugging Face's layout -> GPTNeoX in dtype, whatever its files hold. One or many .safetensors or .bin."""
    folder = pathlib.Path(folder)
    config, bins = common.read_json(folder / "config.json"), sorted(folder.glob("pytorch_model*.bin"))
    with common.reading(folder):
        if config.get("model_type", "gpt_neox") != "gpt_neox":
            raise ValueError(f"it is a {config['model_type']}, not a gpt_neox")
        cfg = Config(config)
        if bins and not any(folder.glob("model*.safetensors")):
            found = {k: x for path in bins for k, x in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()}
        else:
            found = {k: x.tensor() for k, x in common.find_tensors(folder).items()}
        found = {k.removeprefix("gpt_neox."): x for k, x in found.items()}
        with torch.device("meta"):
            trunk = GPTNeoX(cfg)
        trunk.load_state_dict({k: found[k].to(dtype) for k in trunk.state_dict()}, assign=True)     # files hold more: words, old buffers
    return trunk

def fetch_model(name):
    """A Hub id's config and weights, .safetensors rather than .bin. -> the folder they were downloaded to"""
    instead = next((s for s in SHAPES if name.removesuffix("-deduped").endswith(s)), "pythia-70m")
    return common.fetch_hub(name, [r"model(-[\w-]+)?\.safetensors(\.index\.json)?", r"pytorch_model(-[\w-]+)?\.bin(\.index\.json)?"],
                            instead=f"; --model random:{instead} runs the same path on a random frozen trunk, with no network")

def trunk_dtype(args, device, trained):
    """float32 if any of it is trained; else the fastest that the hardware multiplies: bfloat16, float16 (older GPUs), float32."""
    name = common.fast_dtype(device) if args.dtype == "auto" else args.dtype
    older_gpu = args.dtype == "auto" and device == "cuda" and name == "float32"
    return getattr(torch, "float32" if trained else "float16" if older_gpu else name)

def find_trunk(args, device):
    """--model -> the trunk. What is not to be trained needs no gradient: the backward pass goes through it and keeps none."""
    kind, _, shape = args.model.partition(":")
    dtype = trunk_dtype(args, device, kind == "scratch" or args.tune_ln)
    if kind not in ("random", "scratch"):
        trunk = load_trunk(args.model if pathlib.Path(args.model).is_dir() else fetch_model(args.model), dtype)
    elif shape not in SHAPES:
        sorry(f"--model {args.model}: {kind}: wants one of {', '.join(SHAPES)}")
    else:
        L, C, nh = SHAPES[shape]
        trunk = GPTNeoX(Config(dict(num_hidden_layers=L, hidden_size=C, num_attention_heads=nh, intermediate_size=4 * C)))
        draw = torch.Generator().manual_seed(args.seed)
        for m in trunk.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=args.random_std, generator=draw)
                nn.init.zeros_(m.bias)
    for name, p in trunk.named_parameters():
        p.requires_grad_(kind == "scratch" or args.tune_ln and "norm" in name)
    return trunk.to(device, dtype)

# ---- the idea: new ends for a language model ----------------------------------------------------------------------------------
class Adapter(nn.Module):
    """What is still to be earned, the state and the action of each step become a token each, in place of a word's embedding.
    The trunk reads them as it would read a sentence, and what it makes of a state is read out as an action. trunk is no part
    of this module: it is passed in, frozen, and gradients flow through it to the encoders."""
    def __init__(self, C, kind, condition, token_std=0.03):
        super().__init__()
        encoder = lambda n: nn.Linear(n, C) if kind == "linear" else nn.Sequential(nn.Linear(n, C), nn.GELU(), nn.Linear(C, C))
        self.embed_return = encoder(dict(rate=9, rtg=1)[condition])
        self.embed_state, self.embed_action, self.embed_time = encoder(S_DIM), encoder(A_DIM), nn.Embedding(T_DATA, C)
        self.ln_in, self.head, self.condition = nn.LayerNorm(C), nn.Linear(C, A_DIM), condition
        nn.init.normal_(self.embed_time.weight, std=0.02)
        nn.init.constant_(self.ln_in.weight, token_std)
        self.register_buffer("mean", torch.zeros(S_DIM))            # of the data's states: a model knows its own scale
        self.register_buffer("std", torch.ones(S_DIM))
        self.register_buffer("most", torch.tensor(torch.inf))       # the largest rate it was shown, but for a thousandth; more is not asked of it

    def forward(self, trunk, r, s, a, t, valid, last=False):
        """r (B, K): reward rates or returns-to-go; s (B, K, 17); a (B, K, 6); t (B, K): steps since the start; valid (B, K):
        False where a window begins before its episode. -> actions (B, K, 6), or of the last step alone (B, 1, 6)."""
        (B, K), time = t.shape, self.embed_time(t.clamp(max=CLOCK[self.condition]))
        T = 3 * K - 1                                                       # tokens: the last action is what we are asked for
        tokens = [self.embed_return(return_features(r, self.condition)) + time, self.embed_state((s - self.mean) / self.std) + time,
                  self.embed_action(a) + time]
        x = self.ln_in(torch.stack(tokens, 2).view(B, 3 * K, -1)[:, :-1])   # (B, T, C)
        seen = valid.repeat_interleave(3, 1)[:, None, None, :T]             # (B, 1, 1, T)
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() & seen
        rows = slice(T - 1, None) if last else slice(1, None, 3)            # the states' tokens
        y = trunk(x.to(trunk.final_layer_norm.weight.dtype), mask, rows)    # (B, K or 1, C)
        return torch.tanh(self.head(y.float()))

def reward_rate(rtg, steps_left):
    """The return-to-go per step left: what made dt_cheetah.py obey. Under 20 steps (a second) single strides would rule."""
    return rtg / np.maximum(steps_left, 20)

def still_to_earn(d, condition):
    """Episodes -> what the return token says at each of their steps, (N,): R_t = r_t + ... + r_end, or its rate."""
    total, end = np.cumsum(d.rew, dtype=np.float64), np.repeat(d.first + d.length, d.length)
    rtg = total[end - 1] - total + d.rew
    return rtg if condition == "rtg" else reward_rate(rtg, end - np.arange(len(rtg)))

def return_features(r, condition):
    """r (B, K) -> (B, K, 1), the paper's scale, or (B, K, 9): waves tell rates apart that a line lets look alike."""
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

# ---- training --------------------------------------------------------------------------------------------------------------
def build(args, device):
    """-> trunk, adapter, and a list of all that is trained."""
    torch.manual_seed(args.seed)
    trunk = find_trunk(args, device)
    adapter = Adapter(trunk.cfg.n_embd, args.adapter, args.condition, args.token_std).to(device)
    return trunk, adapter, [p for p in (*adapter.parameters(), *trunk.parameters()) if p.requires_grad]

def train(args, data, file, device):
    """Train on windows of data() (called only if needed), going on from file if it is there. -> trunk, adapter, seconds, how
    many parameters were trained."""
    trunk, adapter, params = build(args, device)
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    step, seconds, losses, count = 0, 0.0, [], sum(p.numel() for p in params)
    state = common.resume(file, adapter=adapter, optimizer=optimizer)
    if state:
        trunk.load_state_dict(state["trunk"], strict=False)         # what was trained of it; the rest is frozen, and there already
        step, seconds = state["step"], state["seconds"]
    dtype, size = next(trunk.parameters()).dtype, sum(p.numel() for p in trunk.parameters())
    print(f"{args.model}: {trunk.cfg.n_layer} layers, width {trunk.cfg.n_embd}, {size:,} weights in {str(dtype)[6:]}; trained: {count:,}")
    if step == args.steps:
        return trunk, adapter, seconds, count
    d = data()
    r, obs, act = (torch.from_numpy(np.float32(x)).to(device) for x in (still_to_earn(d, args.condition), d.obs, d.act))
    adapter.mean.copy_(obs.mean(0))
    adapter.std.copy_(obs.std(0) + 1e-6)
    if args.condition == "rate":
        adapter.most.fill_(np.quantile(r.cpu(), 0.999))
    scale = 1024.0 if dtype == torch.float16 else 1.0           # or small gradients become 0; AdamW does not mind a factor
    bar, began = tqdm(total=args.steps, initial=step, desc="training", unit="step", disable=None), time.time() - seconds
    while step < args.steps:
        # batches depend on (seed, step) alone: a resumed run sees what an unbroken one would have seen
        batch = windows(d.first, d.length, args.context, args.batch_size, np.random.default_rng((args.seed, step)))
        i, t, valid = (torch.from_numpy(x).to(device) for x in batch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        loss = F.mse_loss(adapter(trunk, r[i], obs[i], act[i], t, valid)[valid], act[i][valid])
        optimizer.zero_grad()
        (scale * loss).backward()
        nn.utils.clip_grad_norm_(params, scale * args.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sorry(f"the loss is not finite at step {step}; a smaller --lr may help")
        step += 1
        bar.update()
        if step % SAVE_EVERY == 0 or step == args.steps:
            seconds = time.time() - began
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}")
            tuned = {k: p.detach() for k, p in trunk.named_parameters() if p.requires_grad}       # of a frozen trunk: nothing
            common.save_checkpoint(file, dict(adapter=adapter.state_dict(), trunk=tuned, optimizer=optimizer.state_dict(), step=step,
                                              seconds=seconds))
    bar.close()
    print(f"trained: loss {np.mean(losses[-100:]):.5f} over the last {len(losses[-100:])} of {step} steps, {seconds:.0f} s")
    return trunk, adapter, seconds, count

# ---- evaluation: closed loop, all targets and episodes in one batch ---------------------------------------------------------
@torch.inference_mode()
def evaluate(trunk, adapter, targets, args, device):
    """One episode per entry of targets (n,), all at once, each from its own start -> what they earned (n,); who ever pitched
    over (n,) bool; and the first one's diary: a list of (qpos (9,), return so far, target)."""
    n, K, H, sim = len(targets), args.context, args.max_steps, Cheetahs(len(targets))
    obs, owed = sim.reset(np.random.default_rng(10_000 + args.seed)), np.array(targets, float)
    earned, fell, diary = np.zeros(n), np.zeros(n, bool), []
    r, s, a = (torch.zeros(n, K, *shape, device=device) for shape in ((), (S_DIM,), (A_DIM,)))
    t, valid = torch.zeros(n, K, dtype=torch.long, device=device), torch.zeros(n, K, dtype=torch.bool, device=device)
    for step in tqdm(range(H), desc="running", unit="step", disable=None):
        for x in (r, s, a, t, valid):                           # the window moves on by a step
            x[:, :-1] = x[:, 1:].clone()
        told = np.minimum(reward_rate(owed, H - step), adapter.most.item()) if args.condition == "rate" else owed
        r[:, -1], s[:, -1] = torch.from_numpy(told), torch.from_numpy(obs)
        t[:, -1], valid[:, -1] = step, True
        a[:, -1] = adapter(trunk, r, s, a, t, valid, last=True)[:, 0]
        obs, reward = sim.step(a[:, -1].cpu().double().numpy())
        earned, owed, fell = earned + reward, owed - reward, fell | (np.abs(obs[:, 1]) > 1.2)
        diary.append((sim.state[0, 1:10].copy(), earned[0], targets[0]))
    return earned, fell, diary

def figure(rows, path):
    """rows: (policy, asked (n,), mean (n,), std (n,)) -> a PNG: for each target a group of bars, and a line where they should end."""
    from matplotlib.figure import Figure            # not pyplot, which looks for a display
    ax = Figure(figsize=(8, 4.5), dpi=120).subplots()
    x, width, asked = np.arange(len(rows[0][1])), 0.8 / len(rows), rows[0][1]
    for i, (name, _, mean, std) in enumerate(rows):
        ax.bar(x - 0.4 + (i + 0.5) * width, mean, width, yerr=std, capsize=2, label=name)
    ax.hlines(asked, x - 0.45, x + 0.45, color="0.2", lw=1, ls="--", label="asked for")
    ax.set(xlabel="return asked for", ylabel="return reached, mean and spread", xticks=x, xticklabels=[f"{a:.0f}" for a in asked])
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3)
    ax.spines[["top", "right"]].set_visible(False)
    with common.whole_file(path) as part:
        ax.figure.savefig(part, bbox_inches="tight")
    return path

# ---- the comparison: every policy in a process of its own, as its own command runs it ---------------------------------------
def compare(args):
    """Run the four commands at --targets, read the tables that they print, print one table and draw one figure."""
    began, rows, here = time.time(), [], pathlib.Path(__file__).resolve().parent
    smoke = ["--smoke"] if args.smoke else []
    flags = [*smoke, "--episodes", args.episodes, "--max_steps", args.max_steps, "--seed", args.seed, "--no-video", "--targets", *args.targets]
    usual, data, tuned = get_args(smoke), [], []            # data, tuned: what else was said; for all commands, for the adapters
    for k in SHAPED_BY:
        if k not in ("model", "seed") and (v := getattr(args, k)) != getattr(usual, k):
            (data if k == "dataset" else tuned).extend([f"--{k}"] if v is True else [f"--{k}", v])
    control = ["--model", args.model] if ":" in args.model else []          # the random trunk, or the one to be trained
    real = args.model if not control else "EleutherAI/pythia-70m"
    for label, script, *more in (("DT, cloning", "dt_cheetah.py", "--baseline", "bc"), ("adapter", "pythia_adapter.py", *control, *tuned),
                                 (f"adapter, {real}", "pythia_adapter.py", "--model", real, *tuned), ("kNN", "rag_cheetah.py")):
        command = [sys.executable, str(here / script), *map(str, [*more, *data, *flags])]
        print(f"running python {' '.join(command[1:])}", flush=True)
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout      # its stderr, progress and faults, is ours
        found = re.findall(r"\n(.+) \(([\d,]+) parameters, (\d+) s of training\)\n asked.*((?:\n *-?\d+ +-?[\d.]+ \+- .*)+)", text)
        rows += [(name, count, seconds, [[float(x) for x in re.findall(r"-?[\d.]+", line)[:3]] for line in table.split("\n")[1:]])
                 for name, count, seconds, table in found] or [(label, "", "", "could not be run here: its sentence stands above")]
    rows.append(("kNN + LLM", "", "", "not run: it asks a paid endpoint at every step; python rag_cheetah.py --llm MODEL --price_in $ --price_out $"))
    log = OUT / "results.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):          # torn by a kill, or an older script's
            run = json.loads(line)
            llm, same = run["flags"]["llm"], all(run["flags"][k] == getattr(args, k) for k in ("targets", "max_steps", "episodes", "seed", "dataset"))
            if run["script"] == "rag_cheetah.py" and llm != "knn" and same:
                rows[-1] = (f"kNN + {llm}", "0", "0", [row[:3] for row in run["metrics"]["table"]])
    print(f"\n{'return, mean +- std of episodes':34s}" + "".join(f"{x:>16.0f}" for x in args.targets) + "   parameters  seconds trained")
    for name, count, seconds, table in rows:
        print(f"{name:34s}" + (table if isinstance(table, str) else "".join(f"{f'{m:.0f} +- {s:.0f}':>16s}" for _, m, s in table)
                               + f"{count:>13s}{seconds:>17s}"))
    drawn = [(name, *zip(*table)) for name, _, _, table in rows if not isinstance(table, str)]
    if not drawn:
        sorry("none of the policies could be run; their sentences stand above")
    common.log_result("pythia_adapter.py", args, time.time() - began, dict(
        policies=len(drawn), figure=str(figure(drawn, OUT / "comparison.png")), rows={name: table for name, _, _, table in rows}))

# ---- main ------------------------------------------------------------------------------------------------------------------
def checkpoint(args):
    """The adapter's file is named after all that shaped it: other flags make another, the same flags find it again."""
    shape = {k: getattr(args, k) for k in SHAPED_BY}
    # new gaits, other data, other weights in the model's folder make another adapter
    ladder = pathlib.Path(__file__).with_name("data") / "cheetah_ladder.npz"
    source = ladder if args.dataset.startswith("out/data/cheetah_ladder") and ladder.exists() else pathlib.Path(args.dataset)
    data, weights = source.read_bytes() if source.is_file() else b"", []
    if (folder := pathlib.Path(args.model)).is_dir():
        weights = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]
    stamp = json.dumps([shape, weights] if weights else shape).encode() + data
    return OUT / f"pythia_adapter_{hashlib.sha256(stamp).hexdigest()[:8]}.pt"

def main():
    args, began, device = get_args(), time.time(), common.pick_device()
    if args.compare:
        return compare(args)
    args.dtype = str(trunk_dtype(args, device, args.tune_ln or args.model.startswith("scratch:")))[6:]
    print(f"device {device}, {torch.get_num_threads()} threads")
    data = lambda: common.read_episodes(common.find_ladder(args.dataset))       # read only if there is training to do
    trunk, adapter, seconds, count = train(args, data, checkpoint(args), device)
    asked = np.repeat(args.targets, args.episodes)
    got, fell, diary = evaluate(trunk, adapter, asked, args, device)
    error = abs(got - asked) / np.maximum(abs(asked), 1)
    print(f"\nadapter, {args.model} ({count:,} parameters, {seconds:.0f} s of training)\n asked    reached            error    fell")
    table = []
    for x, g, e, f in zip(*(z.reshape(-1, args.episodes) for z in (asked, got, error, fell))):
        print(f"{x.mean():6.0f}   {g.mean():7.1f} +- {g.std():6.1f}  {e.mean():7.2%}  {f.sum():3d}/{len(f)}")
        table.append([float(x[0]), float(g.mean().round(1)), float(g.std().round(1)), int(f.sum())])
    metrics = dict(asked=args.targets, reached=[row[1] for row in table], error_percent=round(100 * error.mean(), 2),
                   episodes=len(got), fell=int(fell.sum()), trained=count, table=table)
    if len(args.targets) > 1:
        metrics["figure"] = str(figure([(f"adapter, {args.model}", *list(zip(*table))[:3])], OUT / "pythia_adapter_targets.png"))
    if args.video:
        film = common.draw_episode(Cheetahs.model, diary[:args.video_steps], args.renderer)
        metrics["video"] = str(common.write_video(OUT / f"pythia_adapter_{args.targets[0]:.0f}.mp4", film))
    common.log_result("pythia_adapter.py", args, time.time() - began, metrics)

if __name__ == "__main__":
    common.run(main)
