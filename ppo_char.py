"""ppo_char.py: reinforcement learning on a small character transformer, each part of it checked.

    python ppo_char.py

Measured: one core of an AMD EPYC, others' work beside it, torch 2.13; seeds 0-4, last checkpoint, 256 samples. After 17 s of pretraining
31 s of PPO take "b c" from 0.001 to 0.992 (worst 0.989) of what any completion can attain; that is no longer language: KL 111 nats, 4%
distinct samples. Of {PPO, GRPO, RLOO, rejection sampling} x 4 rewards x 5 seeds, 80 of 80 runs reach 0.9, the worst 0.986.
Papers: PPO (Schulman et al. 2017, arXiv 1707.06347), GAE (1506.02438), GRPO (2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740),
Llama 2 (2307.09288, section 3). Differs from them in:
1. KL to the frozen start is a loss (k3, as GRPO's) or, with --kl_in reward, part of the reward, and is let go in the last third of the
   rounds; rejection sampling has no KL term
2. no mini-batches: each gradient step sees all completions of its round; RLOO takes PPO's clipped ratio, token by token; PPO's
   advantages are not whitened
3. rejection sampling trains on the best 64 winners of all rounds and, but for rlhf, samples with noise; rlhf's judge is a program
Not handled: prompts longer than --prompt_len tokens (their end is kept); rewards that look at the prompt, but for the learned one.
"""
import collections, copy, functools, hashlib, itertools, json, math, os, pathlib, re, time

import common                       # before torch: it says how torch's threads wait
from common import sorry
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

PAD, BOS, EOS, UNK = range(4)
OUT, DATA, SAVE_EVERY, LOOK_EVERY = pathlib.Path("out"), pathlib.Path(__file__).resolve().parent / "data", 20, 20
# Llama 2's betas; its eps of 1e-5 is more than many a gradient here
adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # what is wanted
    p.flag("algo", "ppo", "how to improve the policy; rlhf: Llama 2's recipe", choices="ppo grpo dr_grpo rloo rejection rlhf".split())
    p.flag("reward", "pattern", "what earns; model: a learned judge", choices="pattern white_more white_less letters length model".split())
    p.flag("pattern", "b c", "the text whose occurrences --reward pattern counts")
    p.flag("letters", "xdj", "--reward letters: tokens made of nothing but these")
    p.flag("per_step", False, "PPO: reward each token with what it adds to the score, not the last one with all of it")
    # data and tokens
    p.flag("corpus", [f"{DATA}/{x}.txt" for x in ("quotes", "patterns")], "UTF-8, an example a line; rlhf's prompts: the first", nargs="+")
    p.flag("vocab_size", 256, "all characters of the corpus, then its most frequent words, up to this many tokens")
    p.flag("prompt_len", 8, "longest prompt in tokens")
    p.flag("max_new", 24, "longest completion in tokens", low=2)
    # model
    p.flag("n_layer", 2, "transformer blocks")
    p.flag("n_head", 4, "attention heads")
    p.flag("n_embd", 64, "width of a token")
    p.flag("pos", "learned", "how the model knows where a token stands", choices="learned sinusoidal rotary".split())
    p.flag("n_predict", 1, "tokens drawn at a time, independently of each other")
    p.flag("value", "shared", "the critic: a head on the policy's trunk, or a model of its own", choices=["shared", "separate"])
    # pretraining
    p.flag("steps", 600, "gradient steps of pretraining")
    p.flag("batch_size", 64, "lines per step")
    p.flag("lr", 3e-3, "AdamW's peak learning rate in pretraining; a cosine goes down to a tenth of it")
    # reinforcement learning
    p.flag("iterations", 150, "rounds of sampling and updating (300 for rejection sampling; rlhf shares out 100 among its five versions)")
    p.flag("prompts", 16, "prompts per round")
    p.flag("group", 8, "completions per prompt: G of GRPO and RLOO, K of rejection sampling", low=2)
    p.flag("epochs", 2, "gradient steps on each round's completions")
    p.flag("rl_lr", 2e-3, "AdamW's learning rate in reinforcement learning (5e-4 for rlhf)")
    p.flag("clip", 0.2, "how far the ratio may go from 1, and a value from its old one, in one round")
    p.flag("gamma", 1.0, "discount; 1: texts are short, and what counts is their whole score", high=1)
    p.flag("lam", 0.95, "GAE's lambda: 1 trusts the returns, 0 the critic; below 1 a critic that knows nothing favours early ends (rlhf: 1)", high=1)
    p.flag("kl", 0.002, "weight of the KL divergence to the frozen start (0.02 for GRPO): higher keeps the text nearer to it, and varied")
    p.flag("kl_end", 0.0, "its weight at the last round (0.002 for rlhf): it holds for two thirds of the rounds, then goes there")
    p.flag("kl_in", "loss", "GRPO's way, steady before any reward is found, or Llama 2's, which keeps nearer", choices=["loss", "reward"])
    p.flag("entropy", 0.0, "weight of the entropy bonus")
    p.flag("normalize", "none", "PPO: whiten advantages, the batch's rewards, or nothing", choices="none advantages rewards".split())
    p.flag("reward_scale", 1.0, "multiplies what the learner sees (not what is reported)")
    p.flag("temperature", 1.0, "of sampling, at the first round", low=1e-3)
    p.flag("temperature_end", 1.0, "at the last round; linear between", low=1e-3)
    p.flag("epsilon", 0.0, "share of tokens drawn at random at first (0.1 for rejection sampling); the ratio knows of it", high=1)
    p.flag("epsilon_end", 0.0, "at the last round", high=1)
    p.flag("pairs", 1024, "pairs of completions that the judge compares for a reward model, per version (4096 for rlhf)")
    # what comes out
    p.flag("beam", 5, "width of the beam search shown beside sampling")
    p.flag("seed", 0, "of weights, batches and samples", low=0)
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    # rejection sampling learns from winners alone: noise costs it nothing, and without, it samples the same few texts again and again;
    # rlhf's critic begins at 0, and with lambda below 1 what ends soon then looks good; with larger steps its samples lose their variety,
    # and with fewer pairs the reward model is a poor judge; GRPO divides rewards by their spread, so it takes more KL to hold against them
    own = dict(rejection=dict(iterations=300, epsilon=0.1), grpo=dict(kl=0.02),
               rlhf=dict(iterations=100, rl_lr=5e-4, lam=1.0, normalize="advantages", kl_end=0.002, pairs=4096, reward="model"))
    p.set_defaults(**own.get(p.parse_args(argv).algo, {}))      # defaults still: what was said stays
    args = p.parse_args(argv, smoke=dict(steps=20, batch_size=16, n_embd=32, iterations=4, prompts=4, group=4, pairs=64, beam=2))
    if args.n_embd % (2 * args.n_head):
        p.error(f"argument --n_head: {args.n_head} heads do not share {args.n_embd} dimensions evenly, in pairs")
    if args.algo == "rlhf" and args.reward != "model":
        p.error("argument --reward: rlhf learns its own")
    args.device = common.pick_device()
    return args

# ---- data: quotes, letter patterns, and a trie that turns them into tokens ---------------------------------------------------
class Tokenizer:
    """All characters of the lines, then their most frequent words, up to vocab_size; longest match first. A character that
    the lines do not have becomes UNK, which decodes to U+FFFD: everything else comes back as it was."""
    def __init__(self, lines, vocab_size):
        chars = sorted(set("".join(lines)))
        if vocab_size < len(chars) + 4:
            sorry(f"--vocab_size {vocab_size} is too small: the corpus has {len(chars)} characters, and 4 tokens are special")
        count = collections.Counter(w for line in lines for w in re.findall(r"[^\W\d_]{2,}", line))
        words = sorted(count, key=lambda w: (-count[w], w))[:vocab_size - len(chars) - 4]
        self.tokens, self.trie = ["", "", "", "\ufffd", *chars, *words], {}
        for i, token in enumerate(self.tokens[4:], 4):
            node = self.trie                        # a node maps a character to the next node, and None to the token that ends here
            for ch in token:
                node = node.setdefault(ch, {})
            node[None] = i

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            node, best, end, j = self.trie, UNK, i + 1, i
            while j < len(text) and text[j] in node:
                node, j = node[text[j]], j + 1
                if None in node:
                    best, end = node[None], j
            ids.append(best)
            i = end
        return ids

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids)

class Corpus:
    """The files' lines as lists of ids, BOS ... EOS; every twentieth is held out. quotes: those of the first file, for rlhf.
    Reinforcement learning only makes more frequent what happens at all, so the second file has letter patterns ("b c"; tests/ make it)."""
    def __init__(self, args):
        with common.reading(f"--corpus {' '.join(args.corpus)}"):
            files = [[line.strip() for line in pathlib.Path(path).read_text("utf-8").splitlines() if line.strip()] for path in args.corpus]
            if min(map(len, files)) < 20 or any("\0" in line for line in sum(files, [])):
                raise ValueError("each file must be a text of 20 lines or more")
        self.tok, self.words = Tokenizer(sum(files, []), args.vocab_size), set(re.findall(r"[^\W\d_]+", " ".join(files[0])))
        files = [[[BOS, *self.tok.encode(line), EOS] for line in lines] for lines in files]
        self.held = [line for lines in files for line in lines[::20]]
        rest = [[line for i, line in enumerate(lines) if i % 20] for lines in files]
        self.train, self.quotes = sum(rest, []), rest[0]

def pad(rows, width, side):
    """Lists of ids -> (B, width), with PAD on the left, so that completions begin in one column, or on the right."""
    return torch.tensor([[PAD] * (width - len(r)) + r if side == "left" else r + [PAD] * (width - len(r)) for r in rows])

def draw_prompts(lines, n, copies, args, rng, tails=False):
    """n beginnings of lines, 1 to prompt_len tokens, each `copies` times side by side -> ids (n copies, P), pads on the left
    (n copies,), the rest of each line. tails: cut so near the end that the rest fits max_new, the prompt being what comes before."""
    P, picked = args.prompt_len, [lines[i] for i in rng.integers(0, len(lines), n)]
    between = lambda T: (max(1, T - args.max_new), T - 1) if tails else (1, min(P, T - 1) + 1)
    cuts = [(line, rng.integers(*between(len(line)))) for line in picked]
    ids = pad([line[max(0, c - P):c] for line, c in cuts], P, "left").to(args.device).repeat_interleave(copies, 0)
    return ids, (ids == PAD).sum(1), [line[c:] for line, c in cuts]

# ---- model -------------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """GPT-2's pre-norm block with ReLU and a hidden layer of 2 C, as wide as this little text needs."""
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head, self.ln_1, self.ln_2 = n_head, nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj, self.up, self.down = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x, mask, turn, cache):
        """x (B, T, C); mask (B, 1, T, S): what may be seen; turn: rotary's (cos, sin) or None; cache: None or a dict to keep k, v in."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)     # (B, nh, T, hs) each
        q, k = (rotate(q, *turn), rotate(k, *turn)) if turn else (q, k)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)                 # (B, nh, S, hs)
            cache["k"], cache["v"] = k, v
        # summed in float64 (mps has none): in float32 a cache changes the sum's order, and the first ratio was off 1 by 1.6e-5
        q, k = (q, k) if x.device.type == "mps" else (q.double(), k.double())
        att = (q @ k.transpose(2, 3)).to(x) * (C // self.n_head)**-0.5              # (B, nh, T, S)
        att = att.masked_fill(~mask, -1e9).softmax(3)               # not -inf: a pad sees nothing, and would be NaN
        x = x + self.proj((att @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(self.ln_2(x))))

def rotate(x, cos, sin):
    """RoPE (arXiv 2104.09864 eq. 34): x (B, nh, T, hs), each pair (x_i, x_i+hs/2) turned by its angle; cos, sin (B, 1, T, hs/2)."""
    a, b = x.chunk(2, 3)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], 3)

class Transformer(nn.Module):
    """Policy, critic and reward model are all this one: `predict` reads tokens off its trunk, `value` a number."""
    def __init__(self, V, block_size, args):
        super().__init__()
        C, self.pos, self.n_predict, self.n_head = args.n_embd, args.pos, args.n_predict, args.n_head
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(block_size, C) if args.pos == "learned" else None
        self.blocks, self.ln_f = nn.ModuleList(Block(C, args.n_head) for _ in range(args.n_layer)), nn.LayerNorm(C)
        self.ahead = nn.Linear(C, args.n_predict * C) if args.n_predict > 1 else None
        self.lm_head, self.value = nn.Linear(C, V), nn.Sequential(nn.Linear(C, 1), nn.Flatten(1))       # value: (B, K, C) -> (B, K)
        for name, p in self.named_parameters():                     # GPT-2's initialisation; values begin at 0
            if "ln_" not in name:
                nn.init.normal_(p, std=0.0 if "bias" in name or "value" in name else 0.02)

    def forward(self, ids, left, cache=None):
        """ids (B, T), after those in cache (a list of a dict per block); left (B,): pads on the left of each row. -> (B, T, C)"""
        (B, T), x, turn = ids.shape, self.wte(ids), None
        slot = torch.arange(T + (cache[0]["k"].size(2) if cache and cache[0] else 0), device=ids.device)        # (S,)
        pos = (slot[-T:] - left[:, None]).clamp(min=0)              # (B, T): pads are not counted
        if self.pos == "learned":
            x = x + self.wpe(pos)
        else:
            half = (x.size(2) if self.pos == "sinusoidal" else x.size(2) // self.n_head) // 2
            angle = pos[:, :, None] * 10000**(-torch.arange(half, device=ids.device) / half)                    # (B, T, half)
            if self.pos == "sinusoidal":                            # scaled to the embeddings' own size, or it drowns them
                x = x + 0.02 * torch.cat([angle.sin(), angle.cos()], 2)
            else:
                turn = angle.cos()[:, None], angle.sin()[:, None]
        mask = ((slot <= slot[-T:, None]) & (slot >= left[:, None, None]))[:, None]     # (B, 1, T, S): the past, without the pads
        for i, block in enumerate(self.blocks):
            x = block(x, mask, turn, None if cache is None else cache[i])
        return self.ln_f(x)

    def predict(self, x):
        """hidden states (B, K, C) -> logits (B, K, N, V) of the N tokens that follow each, none of which sees the others."""
        return self.lm_head(x[:, :, None] if self.ahead is None else x[:, :, None] + self.ahead(x).unflatten(2, (self.n_predict, -1)))

# ---- rewards: automata over tokens, so that what can be attained is known -------------------------------------------------------
class Rule:
    """A named reward as an automaton: reading token v in state s earns gain[s, v] and leads to then[s, v]. All scores are
    divided by the best that any completion can earn, found exactly by dynamic programming: so they end in [0, 1]."""
    def __init__(self, args, tok):
        V, R, name = len(tok.tokens), args.max_new, args.reward
        S = dict(pattern=max(1, len(args.pattern)), length=R + 1).get(name, 1)
        self.gain, self.then = torch.zeros(S, V), torch.zeros(S, V, dtype=torch.long)
        for s, (v, text) in itertools.product(range(S), enumerate(tok.tokens)):
            if name == "pattern":                   # the state: how many characters of the pattern have been read
                *found, rest = (args.pattern[:s] + text).split(args.pattern or "\0")       # begin anew after each, as str.count does
                self.gain[s, v], self.then[s, v] = len(found), max(n for n in range(S) if rest.endswith(args.pattern[:n]))
            elif name == "length":                  # end after R // 2 tokens: all of it comes with EOS
                self.gain[s, v], self.then[s, v] = (v == EOS) * (1 - abs(s - R // 2) / (R - R // 2)), min(s + 1, R)
            elif text and v != UNK:
                self.gain[s, v] = dict(white_more=text.isspace(), white_less=not text.isspace(), letters={*text} <= {*args.letters})[name]
        best = torch.zeros(S)
        for _ in range(R):                          # best: what n more tokens can earn from each state, then n + 1
            total = self.gain + best[self.then] * (torch.arange(V) != EOS)
            best = total[:, [EOS, *range(UNK + 1, V)]].amax(1)                      # PAD, BOS and UNK are never drawn
        self.maximum = best[0].item()
        if self.maximum == 0:
            sorry(f"no completion of {R} tokens of this vocabulary can earn any --reward {name}")

    def __call__(self, ids, left, mask):
        """ids (B, P + R), mask (B, R) of real tokens -> the score of each prefix of the completions, (B, R)."""
        state, gains = torch.zeros(len(ids), dtype=torch.long), []
        for token in ids[:, -mask.size(1):].cpu().unbind(1):
            gains.append(self.gain[state, token])
            state = self.then[state, token]
        return (torch.stack(gains, 1).to(mask.device) * mask).cumsum(1) / self.maximum

def learned(model, mean, ids, left, mask):
    """A reward model's score r as a reward: sigmoid(r - mean), mean being the start's, is the probability (in the model's own
    terms, Bradley and Terry's) that a completion beats one of the start."""
    return torch.sigmoid(model.value(model(ids, left))[:, -mask.size(1):] - mean)

# ---- the idea: a text is a trajectory, a token an action ----------------------------------------------------------------------
# tensors are (B, R): R columns of completion, the same for all rows because prompts are padded on the left. mask is 1 up to EOS and for
# it, and 0 after it. If what is sampled and what is replayed agree, the rest is a few short formulas

def policy_logp(logits, temperature=1.0, epsilon=0.0):
    """logits (..., V) -> log-probabilities of the policy that acts: softmax at a temperature, mixed with a share epsilon of
    uniform noise. Sampling and update both use it, so exploration is no off-policy error. PAD, BOS and UNK are never drawn."""
    never = torch.zeros(logits.size(-1), device=logits.device)
    never[[PAD, BOS, UNK]] = -1e9                   # not -inf: p log p must be 0, not NaN
    logp = ((logits if temperature == 1 else logits / temperature) + never).log_softmax(-1)
    if epsilon:
        logp = torch.logaddexp(logp + (math.log1p(-epsilon) if epsilon < 1 else -1e9), math.log(epsilon / (len(never) - 3)) + never)
    return logp

def completion_mask(tokens):
    """tokens (B, R) -> bool (B, R): True for all tokens up to the first EOS and for it, False after."""
    return (tokens == EOS).cumsum(1) - (tokens == EOS).long() == 0

@torch.no_grad()
def rollout(model, prompts, left, R, temperature=1.0, epsilon=0.0):
    """Sample a completion of each prompt (B, P), keys and values cached. -> ids (B, P + R), PAD after EOS; the log-probability
    of each token as it was drawn (B, R); mask (B, R)."""
    N, cache, new, drawn = model.n_predict, [{} for _ in model.blocks], prompts, []
    for _ in range(0, R, N):
        logp = policy_logp(model.predict(model(new, left, cache)[:, -1:])[:, 0], temperature, epsilon)     # (B, N, V)
        up_to = logp.exp().cumsum(2)                # draw by inverting the distribution: much faster here than torch.multinomial
        u = torch.rand_like(up_to[:, :, :1]).clamp(min=1e-9) * up_to[:, :, -1:]         # (B, N, 1); a 0 would draw PAD
        new = (up_to < u).sum(2)                                                        # (B, N)
        drawn.append((new, logp.gather(2, new[:, :, None])[:, :, 0]))
    tokens, logps = (torch.cat(x, 1)[:, :R] for x in zip(*drawn))
    mask = completion_mask(tokens)
    return torch.cat([prompts, tokens.masked_fill(~mask, PAD)], 1), logps, mask

def replay(model, ids, left, R, temperature=1.0, epsilon=0.0):
    """The same tokens in one pass, with gradients: their log-probabilities (B, R), all tokens' (B, R, V), values (B, R). The token
    in column c was drawn from the hidden state at c - 1 or, N at a time, at the last state before its group: P - 1, P - 1 + N, ..."""
    P, N = ids.size(1) - R, model.n_predict
    x = model(ids[:, :-1], left)[:, P - 1::N]                                                   # (B, R / N, C)
    logp = policy_logp(model.predict(x).flatten(1, 2)[:, :R], temperature, epsilon)             # (B, R, V)
    return logp.gather(2, ids[:, P:, None])[:, :, 0], logp, model.value(x).repeat_interleave(N, 1)[:, :R]

def final(x, mask):
    """x (B, R) at each row's last real token -> (B,)"""
    return x.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]

def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438 eq. 16): A_t = sum_l (gamma lam)^l delta_t+l with delta_t = r_t +
    gamma V_t+1 - V_t, and V = 0 after the end, which is terminal. -> advantages, returns A + V."""
    adv, last, after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.size(1))):
        last = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last) * mask[:, t]
        adv[:, t], after = last, values[:, t] * mask[:, t]
    return adv, (adv + values) * mask

def group_advantages(scores, G, algo):
    """scores (B,), the G completions of a prompt side by side -> (B,), compared within each group and never over the array.
    grpo: (r - mean) / std (2402.03300 sec. 4.1.2); dr_grpo: r - mean (2503.20783); rloo: r - the mean of the OTHERS (2402.14740)."""
    r = scores.view(-1, G)
    centred = r - r.mean(1, keepdim=True)
    if algo == "grpo":
        centred = centred / (r.std(1, keepdim=True) + 1e-4)         # a group without spread teaches nothing: 0, not 0 / 0
    return (centred * G / (G - 1) if algo == "rloo" else centred).flatten()

def whiten(x, mask):
    """Mean 0 and spread 1 over what mask says is there."""
    mean = average(x, mask, "ppo")
    return (x - mean) / (average((x - mean)**2, mask, "ppo") + 1e-8).sqrt() * mask

def policy_loss(logp, old, adv, clip):
    """PPO's clipped surrogate (1707.06347 eq. 7), per token, to be minimised."""
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)

def value_loss(value, old, returns, clip):
    """Squared error, the worse of the value's and of the value's kept within clip of its old self (OpenAI's PPO2)."""
    return 0.5 * torch.maximum((value - returns)**2, (old + (value - old).clamp(-clip, clip) - returns)**2)

def kl_k3(logp, ref):
    """Schulman's k3: r - 1 - log r with r = ref / p, for tokens drawn from p: never negative, and right on average for
    KL(p || ref). As a loss its gradient is that of KL(ref || p): it pulls the same way, a little more evenly."""
    return (ref - logp).exp() - 1 - (ref - logp)

def kl_weight(args, done):
    """--kl for two thirds of the rounds, then on a line to --kl_end; done: 0 at the first round, 1 at the last. A policy that is pulled
    back keeps its variety and so finds what is three changes away (from "b c b c" to the better "b cb c"); then it is let go."""
    return args.kl + (args.kl_end - args.kl) * max(0.0, 3 * done - 2)

def average(x, mask, algo):
    """Per token -> one number. ppo: mean over all tokens; grpo: each completion's mean first (long ones count no more than
    short ones); dr_grpo, rloo: sums over a constant, which makes no token's weight depend on how long its text became."""
    if algo == "grpo":
        return ((x * mask).sum(1) / mask.sum(1)).mean()
    return (x * mask).sum() / (mask.numel() if algo in ("dr_grpo", "rloo") else mask.sum())

def ranking_loss(chosen, rejected, margin):
    """Llama 2 eq. 2: -log sigmoid(r_chosen - r_rejected - margin), the margin growing with how clear the preference was."""
    return -F.logsigmoid(chosen - rejected - margin)

# ---- training ----------------------------------------------------------------------------------------------------------------
def descend(loss, optimizer, where):
    """One gradient step; a loss that is not finite ends the program."""
    if not math.isfinite(loss.item()):
        sorry(f"the loss is not finite at {where}; a smaller --lr or --rl_lr may help")
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()

def next_token_loss(model, rows, device):
    """Lists of ids -> cross-entropy of each token's successors, all N of them."""
    ids = pad(rows, max(map(len, rows)) + model.n_predict - 1, "right").to(device)
    targets = ids[:, 1:].unfold(1, model.n_predict, 1)                                      # (B, T, N)
    logits = model.predict(model(ids[:, :targets.size(1)], torch.zeros_like(ids[:, 0])))    # (B, T, N, V)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD)

def pretrain(corpus, args, file):
    """Next-token prediction on the corpus, going on from file if it is there. -> model, held-out loss in nats per token."""
    T = args.prompt_len + args.max_new
    train, held = ([line[i:i + T + 1] for line in lines for i in range(0, len(line) - 1, T)] for lines in (corpus.train, corpus.held))
    torch.manual_seed(args.seed)
    model = Transformer(len(corpus.tok.tokens), T, args).to(args.device)
    optimizer = adamw(model.parameters(), lr=args.lr)
    state = dict(step=0, seconds=0.0) | common.resume(file, model=model, optimizer=optimizer)
    began = time.time() - state["seconds"]
    for step in tqdm(range(state["step"], args.steps), "pretraining", args.steps, initial=state["step"], disable=None):
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        pick = np.random.default_rng((args.seed, 0, step)).integers(0, len(train), args.batch_size)
        descend(next_token_loss(model, [train[i] for i in pick], args.device), optimizer, f"step {step} of pretraining")
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            state = dict(step=step + 1, seconds=time.time() - began)
            common.save_checkpoint(file, dict(state, model=model.state_dict(), optimizer=optimizer.state_dict()))
    with torch.no_grad():
        loss = next_token_loss(model, held, args.device).item()
    print(f"pretrained {sum(map(torch.numel, model.parameters())):,} weights in {state['seconds']:.0f} s: held-out loss {loss:.3f} a token")
    return model, loss

def improve(name, algo, policy, start, reward, lines, args, file, tails=False, pool=None, v=0):
    """Sample completions, score them, move the policy, round by round, from file on if it is there. -> seconds, rejection sampling's pool
    {ids: score}, and curve, [(round, reward, KL, distinct, worst |ratio - 1| before the first inner step, beam's reward or nan)]."""
    R, G, B = args.max_new, args.group, args.prompts * args.group
    critic = policy if args.value == "shared" else copy.deepcopy(start).requires_grad_(True)
    optimizer = adamw([*policy.parameters(), *(critic.parameters() if critic is not policy else ())], lr=args.rl_lr)
    parts = dict(policy=policy, critic=critic, optimizer=optimizer)
    state = dict(step=0, curve=[], pool=pool or {}, seconds=0.0) | common.resume(file, **parts)
    curve, pool, began = state["curve"], state["pool"], time.time() - state["seconds"]
    for step in (bar := tqdm(range(state["step"], args.iterations), name, args.iterations, initial=state["step"], disable=None)):
        # prompts and samples depend on (seed, version, round) alone: a resumed run sees what an unbroken one would have seen
        torch.manual_seed(1_000_003 * args.seed + 10_000 * v + step)
        rng, done, error = np.random.default_rng((args.seed, 1, step, v)), step / max(1, args.iterations - 1), 0.0
        heat = [a + (b - a) * done for a, b in ((args.temperature, args.temperature_end), (args.epsilon, args.epsilon_end))]
        weight = kl_weight(args, done)
        kl_in_loss, kl_in_reward = (weight, 0.0) if args.kl_in == "loss" else (0.0, weight)
        prompts, left, _ = draw_prompts(lines, args.prompts, G, args, rng, tails)
        ids, old, mask = rollout(policy, prompts, left, R, *heat)
        prefix = reward(ids, left, mask)                            # (B, R)
        score, ref = final(prefix, mask), replay(start, ids, left, R)[0]        # (B,), (B, R)
        # in the reward, log p/ref is KL's right gradient: the best policy is start x exp(score / kl), normalised. in the loss it is k3
        cost = kl_in_reward * (old - ref) * mask
        if algo == "rejection":                                     # the best 64 winners of all rounds; of equals the newest
            won = score.view(-1, G).argmax(1) + torch.arange(0, B, G, device=args.device)
            pool.update(zip(map(tuple, ids[won].tolist()), score[won].tolist()))
            pool = dict(sorted(pool.items(), key=lambda x: x[1])[-64:])
            best = list(pool)[::-1]
            for _ in range(args.epochs):
                picked = [best[i] for i in (len(best) * rng.random(B)**2).astype(int)]          # squared: the better, the oftener
                won = torch.tensor(picked, device=args.device)
                loss = average(-replay(policy, won, (won[:, :-R] == PAD).sum(1), R)[0], completion_mask(won[:, -R:]), algo)
                descend(loss, optimizer, f"round {step} of {name}")
        for epoch in range(args.epochs if algo != "rejection" else 0):
            logp, every, value = replay(policy, ids, left, R, *heat)
            value = value if critic is policy or algo != "ppo" else replay(critic, ids, left, R)[2]
            if epoch == 0:                                          # nothing has moved yet: a ratio that is not 1 here is a bug
                error = ((logp - old).exp() - 1).abs()[mask].max().item()
                if algo == "ppo":
                    if args.per_step:
                        earned = (prefix - F.pad(prefix, (1, -1))) * mask           # by each token what it adds
                    else:
                        earned = F.one_hot(mask.sum(1) - 1, R) * score[:, None]     # all of it by the last one
                    if args.normalize == "rewards":
                        earned = whiten(earned, mask)
                    old_value = value.detach()
                    adv, returns = gae(args.reward_scale * earned - cost, old_value, mask, args.gamma, args.lam)
                    adv = whiten(adv, mask) if args.normalize == "advantages" else adv
                else:
                    adv = group_advantages(args.reward_scale * score - cost.sum(1), G, algo)[:, None].expand(-1, R)
            loss = average(policy_loss(logp, old, adv, args.clip) + kl_in_loss * kl_k3(logp, ref), mask, algo)
            loss = loss + args.entropy * average((every.exp() * every).sum(2), mask, algo) if args.entropy else loss
            if algo == "ppo":
                loss = loss + 0.5 * average(value_loss(value, old_value, returns, args.clip), mask, algo)       # PPO2's weight
            descend(loss, optimizer, f"round {step} of {name}")
        look, kl = step % LOOK_EVERY == 0 or step + 1 == args.iterations, (kl_k3(old, ref) * mask).sum(1).mean().item()
        curve.append((step, score.mean().item(), kl, len(set(map(tuple, ids[:, -R:].tolist()))) / B, error,
                      evaluate(policy, start, reward, lines, args, tails)[0]["beam"] if look else math.nan))
        bar.set_postfix(reward=f"{curve[-1][1]:.3f}", kl=f"{curve[-1][2]:.1f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.iterations:
            state = dict(step=step + 1, curve=curve, pool=pool, seconds=time.time() - began)
            common.save_checkpoint(file, state | {name: part.state_dict() for name, part in parts.items()})
    return state

# ---- evaluation ----------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def beam(policy, prompt, left, R, width):
    """The completion of prompt (P,) that common.beam_search finds, by the sum of its log-probabilities. -> ids (P + R,)"""
    fill = lambda ids: F.pad(ids, (0, len(prompt) + R - ids.size(-1)), value=PAD).to(left.device)
    # from the whole prefix each time, and what is not drawn yet as pads: short enough to go without a cache
    step = lambda ids, parent: replay(policy, fill(ids), left.expand(len(ids)), R)[1][:, ids.size(1) - len(prompt)]
    return fill(torch.tensor(common.beam_search(step, prompt.tolist(), width, R, eos=[EOS], length_penalty=0.0)[0]))

def evaluate(policy, start, reward, lines, args, tails=False):
    """8 samples for each of 32 fixed prompts, temperature 1, no noise; beam search for the first 4. -> metrics, ids (256, P + R)"""
    torch.manual_seed(args.seed)
    R, (prompts, left, _) = args.max_new, draw_prompts(lines, 32, 8, args, np.random.default_rng(2), tails)
    ids, logp, mask = rollout(policy, prompts, left, R)
    ref, beams = replay(start, ids, left, R)[0], torch.stack([beam(policy, prompts[i], left[i], R, args.beam) for i in range(0, 32, 8)])
    sampled, found = final(reward(ids, left, mask), mask), completion_mask(beams[:, -R:])
    return dict(reward=sampled.mean().item(), beam=final(reward(beams, left[:32:8], found), found).mean().item(),
                kl=(kl_k3(logp, ref) * mask).sum(1).mean().item(), surprise=-average(ref, mask, "ppo").item(),
                distinct=len(set(map(tuple, ids[:, -R:].tolist()))) / 256), ids

def figure(path, panels, xlabel):
    """panels: (ylabel, {name: (xs, ys)}) each -> a PNG, the panels side by side."""
    from matplotlib.figure import Figure            # not pyplot, which looks for a display
    fig = Figure(figsize=(4 * len(panels), 3.2), dpi=110, layout="constrained")
    for ax, (ylabel, lines) in zip(fig.subplots(1, len(panels)), panels):
        for name, (xs, ys) in lines.items():
            ax.plot(xs, ys, ".-" if len(xs) < 50 else "-", label=name)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.legend(frameon=False)
    with common.whole_file(path) as part:
        fig.savefig(part, bbox_inches="tight")
    return str(path)

# ---- Llama 2's recipe: judge, reward model, V1 to V5 ---------------------------------------------------------------------------
def judge(tokens, corpus):
    """The programmatic judge: a good completion comes to an end and has many different words that the corpus knows. -> [0, 1]"""
    known = set(corpus.tok.decode(tokens).split()) & corpus.words
    return min(1.0, len(known) / 8) if EOS in tokens else 0.0

def ask_judge(policy, corpus, n, args, rng):
    """Two completions for each of n prompts -> ids (n, 2, P + R), the better first; left (n, 2); margin (n,): Llama 2's four
    strengths of preference as margins 1, 2/3, 1/3, 0 (table 27). Ties are not asked about, so fewer than n come back."""
    prompts, left, _ = draw_prompts(corpus.quotes, n, 2, args, rng, tails=True)
    ids = rollout(policy, prompts, left, args.max_new)[0].view(n, 2, -1)
    score = torch.tensor([[judge(row[args.prompt_len:], corpus) for row in two] for two in ids.tolist()], device=args.device)
    gap = score[:, 0] - score[:, 1]
    ids = torch.where(gap[:, None, None] > 0, ids, ids.flip(1))
    margin = sum((gap.abs() > x).float() for x in (0.2, 0.4, 0.6)) / 3
    return [x[gap != 0] for x in (ids, left.view(n, 2), margin)]

def rate(model, ids, left, R):
    """A reward model's scalar for each completion, at its last real token: ids (..., P + R), left (...) -> (...)"""
    flat = ids.flatten(0, -2)
    return final(model.value(model(flat, left.flatten()))[:, -R:], completion_mask(flat[:, -R:])).view(left.shape)

def learn_reward(policy, start, corpus, pairs, args, v):
    """Ask the judge about the policy, add its answers to pairs, train a copy of start to rank them all, one epoch. -> the reward,
    all pairs, and its accuracy on 256 new pairs per strength, the clearest first (nan: no such pair)."""
    torch.manual_seed(1_000_003 * args.seed + v)
    R, rng, model = args.max_new, np.random.default_rng((args.seed, 2, v)), copy.deepcopy(start).requires_grad_(True)
    new, held = ask_judge(policy, corpus, args.pairs, args, rng), ask_judge(policy, corpus, 256, args, rng)
    pairs = [torch.cat(x) for x in zip(pairs, new)] if pairs else new
    order, optimizer = torch.randperm(len(pairs[0])), adamw(model.parameters(), lr=5e-4)
    for at in range(0, len(order), 32):             # a cosine to a tenth after a warm-up of 3%, as Llama 2's
        optimizer.param_groups[0]["lr"] = 5e-4 * min((at + 1) / (0.03 * len(order)), 0.55 + 0.45 * math.cos(math.pi * at / len(order)))
        ids, left, margin = (x[order[at:at + 32]] for x in pairs)
        descend(ranking_loss(*rate(model, ids, left, R).unbind(1), margin).mean(), optimizer, f"pair {at} of the reward model")
    prompts, left, _ = draw_prompts(corpus.quotes, 256, 1, args, rng, tails=True)
    mean = rate(model.requires_grad_(False), rollout(start, prompts, left, R)[0], left, R).mean()
    ids, left, margin = held
    better, worse = rate(model, ids, left, R).unbind(1)
    right = {f"right_{m}": (better > worse)[(3 * margin).round() == m].float().mean().item() for m in (3, 2, 1, 0)}
    return functools.partial(learned, model, mean), pairs, right

def rlhf(policy, corpus, args, file):
    """SFT, then V1 ... V5: each asks the judge about the newest policy, trains a reward model on all pairs so far and improves the
    policy by rejection sampling or, V5, PPO. -> {version: (metrics, samples)}; right_3 ... right_0: the reward model's accuracies."""
    R, rng = args.max_new, np.random.default_rng((args.seed, 2))
    optimizer, order = adamw(policy.parameters(), lr=args.lr / 10), np.concatenate([rng.permutation(len(corpus.quotes)) for _ in range(2)])
    for at in range(0, len(order), 32):             # SFT: two epochs, the loss on the answer alone
        prompts, left, rests = draw_prompts([corpus.quotes[i] for i in order[at:at + 32]], 32, 1, args, rng, tails=True)
        ids = torch.cat([prompts, pad(rests, R, "right").to(args.device)], 1)
        descend(average(-replay(policy, ids, left, R)[0], completion_mask(ids[:, -R:]), "ppo"), optimizer, f"line {at} of SFT")
    start, pool, pairs, versions = copy.deepcopy(policy).requires_grad_(False), {}, None, {}
    args = copy.copy(args)                          # the log shows what was asked
    args.iterations = math.ceil(args.iterations / 5)
    for v in range(6):
        reward, pairs, accuracy = learn_reward(policy, start, corpus, pairs, args, v)
        job = policy, start, reward, corpus.quotes, args
        if v:
            if pool:                                # the winners of earlier versions, as the newest reward model sees them
                won = torch.tensor(list(pool), device=args.device)
                mask = completion_mask(won[:, -R:])
                score = final(reward(won, (won[:, :-R] == PAD).sum(1), mask), mask)
                pool = dict(zip(pool, score.tolist()))
            pool = improve(f"RLHF-V{v}", "rejection" if v < 5 else "ppo", *job, file(f"v{v}"), True, pool, v)["pool"]
        metrics, ids = evaluate(*job, tails=True)
        judged = np.mean([judge(row[-R:], corpus) for row in ids.tolist()])
        versions[f"V{v}" if v else "SFT"] = dict(metrics, judge=judged, **accuracy), ids
    return versions

# ---- main ----------------------------------------------------------------------------------------------------------------------
def main():
    args, began = get_args(), time.time()
    if "OMP_NUM_THREADS" not in os.environ:         # two threads add in another order, and a run of RL then ends elsewhere: with one it ends
        torch.set_num_threads(1)                    # as the README says, however many cores there are; a second one saves little
    corpus = Corpus(args)
    tok, P = corpus.tok, args.prompt_len
    print(f"device {args.device}, {torch.get_num_threads()} threads, float32; {len(corpus.train)} lines, "
          f"{sum(map(len, corpus.train)):,} tokens of {len(tok.tokens)}, such as", "|".join(tok.tokens[i] for i in corpus.quotes[0][1:-1]))
    def file(what, keys=tuple(vars(args))):         # named after all that shaped it: the same flags find it again
        texts = [hashlib.sha256(pathlib.Path(c).read_bytes()).hexdigest() for c in args.corpus]
        flags = json.dumps([{k: getattr(args, k) for k in keys if k not in ("corpus", "smoke")}, texts])
        return OUT / f"ppo_char_{what}_{hashlib.sha256(flags.encode()).hexdigest()[:8]}.pt"
    base = file("base", "vocab_size prompt_len max_new n_layer n_head n_embd pos n_predict steps batch_size lr seed".split())
    policy, loss = pretrain(corpus, args, base)
    start, metrics = copy.deepcopy(policy).requires_grad_(False), dict(pretrain_loss=round(loss, 3))
    if args.algo == "rlhf":
        versions = rlhf(policy, corpus, args, file)
        panels = [(label, {k: (list(versions), [m[k] for m, _ in versions.values()]) for k in keys})
                  for label, keys in (("reward", ("reward", "judge", "beam")), ("nats", ("kl",)), ("share of samples", ("distinct",)))]
    else:
        lines, tails = (corpus.quotes, True) if args.reward == "model" else (corpus.train, False)
        reward = learn_reward(policy, start, corpus, None, args, 0)[0] if tails else Rule(args, tok)
        versions = {"start": evaluate(policy, start, reward, lines, args, tails)}
        state = improve(args.algo, args.algo, policy, start, reward, lines, args, file(args.algo), tails)
        versions[args.algo] = evaluate(policy, start, reward, lines, args, tails)
        n, score, kl, _, error, beams = zip(*state["curve"])
        looked = [i for i, b in enumerate(beams) if not math.isnan(b)]
        panels = [("reward", {"sampled": (n, score), "beam search": (looked, [beams[i] for i in looked])}), ("nats", {"KL": (n, kl)})]
        if args.algo != "rejection":
            metrics["ratio_error"] = max(error)
        metrics["rl_seconds"] = round(state["seconds"], 1)
    (before, old), *_, (after, new) = versions.values()
    found = beam(policy, new[0, :P], (new[0, :P] == PAD).sum(), args.max_new, args.beam)
    for title, ids in (("before", old[::43]), ("after", new[::43]), ("after, by beam search", found[None])):
        print(f"\n{title} (prompt|completion):", *(f"{tok.decode(row[:P])}|{tok.decode(row[P:])}" for row in ids.tolist()), sep="\n  ")
    print("\n" + " ".join(f"{k:>8s}" for k in ("", *after)))
    for name, (m, _) in versions.items():
        print(f"{name:>8s} " + " ".join(f"{x:8.3f}" for x in m.values()))
    metrics.update(figure=figure(OUT / f"ppo_char_{args.algo}_{args.reward}.png", panels, "version" if args.algo == "rlhf" else "round"),
                   before=round(before["reward"], 3), **{k: round(float(v), 3) for k, v in after.items()})
    common.log_result("ppo_char.py", args, time.time() - began, metrics)

if __name__ == "__main__":
    common.run(main)
