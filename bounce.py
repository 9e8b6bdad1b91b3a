"""bounce.py: a language model that learns to bounce a ball through ASCII mazes, writing a quote along its path.

    python bounce.py

Measured: ONE core of an AMD EPYC (Zen 4), torch 2.13, bfloat16; last checkpoint. Of 1,000 held-out mazes of the full size (18-26 x 32-86),
with quotes never trained on, 99.6, 99.4 and 99.9% come out exactly right (seeds 0-2), after 504-512 s of training; of 200 that are
39 x 129, 1.5 times larger than any trained on, 99.0, 98.0 and 98.5%. With TWO threads seed 0 takes 347 s and comes out at 94.9%.
Source: Shimmin's Bouncing LLaMa (an 8B Llama, LoRA, 40 minutes on a 4090: direction ignored, letters jumbled). Differs from it in:
1. a token's position is WHERE THE PEN IS: rotary over (row, column, time); tests/bench/compare_bounce.py has the alternatives
2. the answer is the path, a move and a letter per step; the grid is drawn from it by code, or by the model (--draw model)
3. 0.7 million parameters from scratch, small dense mazes first, the seed's sizes after
Not handled: characters outside printable ASCII; fields with holes in their rim; more than one ball at a time.
"""
import hashlib, json, math, os, pathlib, re, sys, time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

import common
from common import sorry

OUT, SAVE_EVERY = pathlib.Path("out"), 100
GLYPHS = " |-+"                                     # a cell's flags: 1 a vertical wall, 2 a horizontal one, 3 a crossing
DIRECTIONS = dict(NE=(-1, 1), NW=(-1, -1), SE=(1, 1), SW=(1, -1))           # (row, column); rows count downwards
STEP = np.array(list(DIRECTIONS.values()))
# the vocabulary: 16 moves (4 headings times whether row and column stay), 95 characters, and marks; a wall is WALL + flag
# (PLAIN, nine displacements, and NEWLINE are only used by tests/bench/compare_bounce.py)
MOVE, PLAIN, CHAR, END, PAD, NULL, WALL, CELL, NEWLINE, VOCAB = 0, 16, 25, 120, 121, 122, 122, 126, 127, 128
# what each move adds to the pen's place, (16, 2) rows and columns: this table is all that the harness knows
SHIFT = (STEP[:, None] * np.array([(1, 1), (1, 0), (0, 1), (0, 0)])).reshape(16, 2)

# ---- flags -----------------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    here = pathlib.Path(__file__).resolve().parent
    p = common.Flags(__doc__)
    # the game: the seed's sizes
    p.flag("quotes", str(here / "data" / "quotes.txt"), "texts to write: lines, .csv or .json, any encoding; a tenth is held out")
    p.flag("height", [18, 26], "smallest and largest height of a maze", nargs=2, type=int)
    p.flag("width", [32, 86], "smallest and largest width", nargs=2, type=int)
    p.flag("bars", 4.0, "mean number of walls of each orientation")
    # what is drawn in the end
    p.flag("draw", "code", "who draws the final grid: code, from the path, or the model, cell by cell, after it", choices=["code", "model"])
    # model
    p.flag("n_layer", 3, "transformer blocks")
    p.flag("n_head", 4, "attention heads")
    p.flag("n_embd", 128, "width of a token")
    # training
    p.flag("steps", 1000, "gradient steps")
    p.flag("small", 0.6, "share of the steps on small dense mazes alone (9-12 x 14-22, 3 bars), full of bounces; then every second")
    p.flag("mazes", 8, "mazes per step and process")
    p.flag("balls", 6, "games per maze: they share its memory")
    p.flag("lr", 2e-3, "AdamW's peak learning rate")
    p.flag("warmup", 50, "steps up to the peak; a cosine down to a tenth of it follows")
    p.flag("weight_decay", 0.01, "AdamW's")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("noise_texts", 0.25, "share of texts of random characters: rare letters are learned, and no quote by heart")
    p.flag("decoys", 64, "walls outside the maze in its memory: far ones must mean nothing, or larger mazes fail")
    p.flag("dtype", "auto", "of the matrix products; auto: bfloat16 where the hardware has it", choices=["auto", "bfloat16", "float32"])
    p.flag("seed", 0, "of weights and games")
    # evaluation and things to look at
    p.flag("games", 1000, "held-out games, each in a maze of its own")
    p.flag("show", False, "play one game in the terminal, the truth beside it, and end")
    p.flag("field", None, "show a maze of yours instead, drawn as the others are, with a * in it", metavar="FILE")
    p.flag("text", "Here is my handle, here is my spout.", "what to write into it")
    p.flag("direction", "SE", "where its ball starts to", choices=list(DIRECTIONS))
    p.flag("video", True, "write an mp4 and a PNG of a held-out game")
    # other models: the seed's text format, as JSON lines for lora_llama.py
    p.flag("export", None, "write the seed's prompts and answers here, held-out ones beside it, and end", metavar="FILE.jsonl")
    p.flag("export_games", [10000, 1000], "how many to train on and to hold out; no maze is on both sides", nargs=2, type=int)
    p.flag("score", None, "measure the completions that any model gave to such prompts, and end", metavar="FILE.jsonl")
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    if "--smoke" in (sys.argv if argv is None else argv):
        p.set_defaults(steps=20, warmup=5, mazes=2, balls=2, games=10, height=[9, 10], width=[14, 16], n_embd=64, export_games=[20, 5])
    args = p.parse_args(argv)
    for name in ("n_layer", "n_head", "steps", "mazes", "balls", "warmup", "games"):
        if getattr(args, name) < 1:
            p.error(f"argument --{name}: must be at least 1")
    if args.n_embd % (16 * args.n_head):
        p.error("argument --n_embd: must be a multiple of 16 per head, for the rotary pairs to be shared among three axes")
    for name in ("height", "width"):
        if not 6 <= getattr(args, name)[0] <= getattr(args, name)[1] <= 1000:
            p.error(f"argument --{name}: must be two numbers from 6 on, the smaller first")
    return args

# ---- the maze and its physics ----------------------------------------------------------------------------------------------

def maze(rng, H, W, bars):
    """A field (H, W) of flags, uint8: its rim, and Poisson(bars) bars of each orientation, from 2 to 3/4 of the side long, no two of
    one orientation side by side; a bar that finds no room in 5 tries is left out. The seed's generator."""
    field = np.zeros((H, W), np.uint8)
    field[[0, -1]] |= 2
    field[:, [0, -1]] |= 1
    for flag, view in ((1, field), (2, field.T)):           # a horizontal bar is a vertical one of the transposed field
        h, w = view.shape
        for _ in range(rng.poisson(bars)):
            for _ in range(5):
                n = rng.integers(2, 3 * h // 4 + 1)
                r, c = rng.integers(0, h - n + 1), rng.integers(2, w - 2)
                if not (view[r:r + n, c - 1:c + 2] & flag).any():
                    view[r:r + n, c] |= flag
                    break
    return field


def bounce(wall, r, c, dr, dc):
    """One step of N balls. wall(r, c) -> (N,) bool; r, c, dr, dc: (N,) ints -> the same after the step.

    The ball o goes to X, unless something is in the way; V is the cell across the row, H the one across the column:

         H X        X free, V and H not both walls: on to X, the ball slips past a lone corner
         o V'       X wall: an axis whose own cell is a wall flips; if neither is (an outer corner) or both are, both flip
                    V and H both walls: both flip, whatever X is
    A flipped axis stays for this step: the ball turns beside the wall and is not pushed through it. Run backwards (both velocities
    turned round) the same rule leads back to the start: the test plays 10,000 games forward and back.
    """
    V, H, X = wall(r + dr, c), wall(r, c + dc), wall(r + dr, c + dc)
    flip_r, flip_c = np.where(X, V | ~H, V & H), np.where(X, H | ~V, V & H)
    return (np.where(flip_r, r, r + dr), np.where(flip_c, c, c + dc),
            np.where(flip_r, -dr, dr), np.where(flip_c, -dc, dc))


def paths(fields, which, r, c, d, T):
    """T steps of N balls, ball i in fields[which[i]] from r[i], c[i] towards direction d[i] (index into DIRECTIONS). fields:
    (M, H, W). -> rows, columns and headings (as d), (N, T+1) each; a ball bounced where its heading changes."""
    M, H, W = fields.shape
    solid, base = np.ascontiguousarray(fields > 0).ravel(), which * (H * W)
    R, C, D = np.empty((3, T + 1, len(r)), int)
    R[0], C[0], D[0] = r, c, d
    dr, dc = STEP[d].T
    for t in range(1, T + 1):
        r, c, dr, dc = bounce(lambda r, c: solid[base + r * W + c], r, c, dr, dc)
        R[t], C[t], D[t] = r, c, 2 * (dr > 0) + (dc < 0)
    return R.T, C.T, D.T


def make_games(rng, M, n, quotes, height, width, bars, noise_texts=0.0):
    """M mazes, n balls in each, one text a maze. -> dict: fields (M, H, W), walls outside a smaller maze's own H, W (M,); texts;
    R, C, D (M, n, T+1): where the ball is and where it is heading. quotes: sorted by length."""
    H, W = (rng.integers(lo, hi + 1, M) for lo, hi in (height, width))
    fields = np.ones((M, H.max(), W.max()), np.uint8)
    for m in range(M):
        fields[m, :H[m], :W[m]] = maze(rng, H[m], W[m], bars)
    first = rng.integers(0, max(1, len(quotes) - M + 1))                # neighbours are of about one length: little padding
    texts = [quotes[(first + i) % len(quotes)] for i in range(M)]
    texts = ["".join(map(chr, rng.integers(32, 127, len(x)))) if rng.random() < noise_texts else x for x in texts]
    which, todo = np.repeat(np.arange(M), n), np.arange(M * n)
    r, c, d = np.zeros((3, M * n), int)
    while len(todo):                                # a start is a blank cell, two from the rim, out of which the ball can move
        m = which[todo]
        r[todo], c[todo] = rng.integers(2, H[m] - 2), rng.integers(2, W[m] - 2)
        d[todo] = rng.integers(0, 4, len(todo))
        R, C, _ = paths(fields, m, r[todo], c[todo], d[todo], 2)        # who has not moved after two steps never will
        todo = todo[(fields[m, r[todo], c[todo]] > 0) | ((R == R[:, :1]) & (C == C[:, :1])).all(1)]
    R, C, D = (x.reshape(M, n, -1) for x in paths(fields, which, r, c, d, max(map(len, texts))))
    return dict(fields=fields, H=H, W=W, texts=texts, R=R, C=C, D=D)


def drawn(field, R, C, text):
    """The field (H, W) as lines, with text written along R, C: the last letter wins, a space leaves the cell as it was."""
    grid = [[GLYPHS[f] for f in row] for row in field]
    for r, c, x in zip(R, C, text):
        if x != " " and 0 <= r < len(grid) and 0 <= c < len(grid[0]):
            grid[r][c] = x
    return ["".join(row) for row in grid]

# ---- quotes, and the seed's text format ------------------------------------------------------------------------------------

def split_quotes(quotes):
    """-> (train, held out): every tenth by length is never trained on."""
    return [x for i, x in enumerate(quotes) if i % 10 != 5], quotes[5::10]


def one_game(field, r, c, direction, text):
    """A single game as make_games makes them: M = n = 1."""
    start = (np.array([x]) for x in (0, r, c, list(DIRECTIONS).index(direction)))
    R, C, D = (x[None] for x in paths(field[None], *start, len(text)))
    return dict(fields=field[None], H=np.array([len(field)]), W=np.array([len(field[0])]), texts=[text], R=R, C=C, D=D)


def prompt(g):
    """A single game in the seed's text format; its answer is the fenced grid with the text written along the path."""
    rows = drawn(g["fields"][0], g["R"][0, 0, :1], g["C"][0, 0, :1], "*")
    return ("A ball starts at the * and moves diagonally through the playing field, one cell per step. Walls reflect it. Each step writes "
            "the next character of the reference text; a space leaves the cell as it was, a later character overwrites an earlier one.\n\n"
            f"### Starting direction:\n{list(DIRECTIONS)[g['D'][0, 0, 0]]}\n\n### Reference text:\n{g['texts'][0]}\n\n"
            "### Playing field:\n```\n" + "\n".join(rows) + "\n```\n\n### Answer:\n")


def answer(g):
    return "```\n" + "\n".join(drawn(g["fields"][0], g["R"][0, 0], g["C"][0, 0], g["texts"][0])) + "\n```"


def read_field(lines):
    """Lines of text -> field (H, W) of flags, and where the * is. ValueError says what is wrong."""
    lines = [x.rstrip("\r\n") for x in lines]
    if len(lines) < 3 or len({len(x) for x in lines}) != 1 or len(lines[0]) < 3:
        raise ValueError("the field's rows are fewer than 3 or not all equally long")
    odd = sorted(set("".join(lines)) - set(GLYPHS + "*"))
    if odd:
        raise ValueError(f"the field has unknown glyphs: {' '.join(map(repr, odd[:5]))}; it may have | - + * and spaces")
    grid = np.array([list(x) for x in lines])
    at = np.argwhere(grid == "*")
    if len(at) != 1:
        raise ValueError(f"the field has {len(at)} starts (*), not one")
    field = np.vectorize(GLYPHS.replace(" ", "*", 1).find)(np.where(grid == " ", "*", grid)).astype(np.uint8)
    rim = np.concatenate([field[0], field[-1], field[:, 0], field[:, -1]])
    if (rim == 0).any():
        raise ValueError("the field's rim has a hole (or the * stands on it): the ball would get out")
    return field, *map(int, at[0])


def read_prompt(text):
    """A prompt in the format above -> its game. ValueError says what is wrong."""
    m = re.search(r"### Starting direction:\n(\w+)\n\n### Reference text:\n(.*)\n\n### Playing field:\n```\n(.*?)\n```", text, re.S)
    if not m or m[1] not in DIRECTIONS or not m[2] or "\n" in m[2]:
        raise ValueError("the prompt is not of --export's form")
    return one_game(*read_field(m[3].split("\n")), m[1], m[2])


def export(args, path, quotes):
    """JSON lines {"prompt", "answer"} to train on, and of other mazes and quotes in <name>_heldout.jsonl."""
    path = pathlib.Path(path)
    for side, name in enumerate((path, path.with_name(f"{path.stem}_heldout{path.suffix}"))):
        with common.whole_file(name) as part, open(part, "w") as f:
            for i in tqdm(range(args.export_games[side]), desc=name.name, unit="game", disable=None):
                rng = np.random.default_rng((args.seed, 3, side, i))
                g = make_games(rng, 1, 1, split_quotes(quotes)[side], args.height, args.width, args.bars)
                f.write(json.dumps(dict(prompt=prompt(g), answer=answer(g))) + "\n")
        print(f"wrote {args.export_games[side]} games to {name}")


def compare(line):
    """A JSON line {"prompt", "completion"} -> what is right in it. ValueError: it cannot be compared, and why."""
    try:
        row = json.loads(line)
        g = read_prompt(row["prompt"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("no line of JSON with a prompt of --export's form") from None
    if not isinstance(row.get("completion"), str):
        raise ValueError("no completion")
    fence = re.search(r"```[^\n]*\n(.*?)\n?(```|$)", row["completion"], re.S)              # the last fence may have been cut off
    got, want = fence[1].split("\n") if fence else [], answer(g).split("\n")[1:-1]
    if not fence or [len(x) for x in got] != [len(x) for x in want]:
        raise ValueError("a grid of another size" if fence else "no fenced grid")
    got, want = np.array([list(x) for x in got]), np.array([list(x) for x in want])
    same, second, wall = got == want, (g["R"][0, 0, 1], g["C"][0, 0, 1]), g["fields"][0] > 0
    rates, letter = dict(exact_grid=same.all(), walls=same[wall].all()), ~wall & (want != " ")
    if letter.any():
        rates["letters"] = same[letter].mean()
    if want[second] == g["texts"][0][1:2]:          # unless overwritten later: is the second letter where the direction says?
        rates["direction"] = same[second]
    return rates


def score(path):
    """JSON lines of any model's completions -> counts and rates; what cannot be compared is counted by what is wrong with it."""
    try:
        lines = [x for x in pathlib.Path(path).read_text(encoding="utf-8").splitlines() if x.strip()]
    except (OSError, UnicodeDecodeError) as e:
        sorry(f"{path} cannot be read ({e})")
    if not lines:
        sorry(f"{path} has no completions in it")
    rates, wrong = {}, {}
    for line in lines:
        try:
            for name, right in compare(line).items():
                rates.setdefault(name, []).append(float(right))
        except ValueError as e:
            wrong[str(e)] = wrong.get(str(e), 0) + 1
    exact = rates.pop("exact_grid", [])                     # of all completions; the other rates are of those that could be compared
    return dict(completions=len(lines), compared=len(exact), wrong=wrong, exact_grid=sum(exact) / len(lines),
                **{name: round(float(np.mean(x)), 4) for name, x in rates.items()})

# ---- model -----------------------------------------------------------------------------------------------------------------

def rotate(x, cos, sin):
    """x (..., T, hs), cos and sin (..., T, hs/2): each pair of dimensions (i, i + hs/2) turned by its angle (RoPE, arXiv 2104.09864)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """One softmax over the game's own past and the memory of its maze, which n games share and nobody writes to."""
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.qkv, self.memory, self.proj = (nn.Linear(C, m * C, bias=False) for m in (3, 2, 1))

    def remember(self, mem, cos, sin, axes, absent):
        """mem (M, K, C) -> keys and values (M, nh, K, hs), computed once for all games and steps. axes (M, K, hs): see Bouncer."""
        k, v = (z.unflatten(2, (self.n_head, -1)).transpose(1, 2) for z in self.memory(mem).chunk(2, 2))
        return rotate(k * axes[:, None], cos[:, None], sin[:, None]).to(v.dtype), v, absent.to(v.dtype).repeat_interleave(self.n_head, 0)

    def forward(self, x, cos, sin, memory, mask, past=None):
        M, n, T, C = x.shape
        q, k, v = (z.unflatten(3, (self.n_head, -1)).permute(0, 3, 1, 2, 4) for z in self.qkv(x).chunk(3, 3))       # (M, nh, n, T, hs)
        cos, sin = (z[:, None].to(v.dtype) for z in (cos, sin))
        q, k = rotate(q * (C // self.n_head)**-0.5, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], 3), torch.cat([past[1], v], 3)           # (M, nh, n, S, hs)
        mk, mv, absent = memory
        # all games of a maze in one product with its memory; absent: 0, or -inf where a smaller maze's memory is padded
        far = torch.baddbmm(absent, q.reshape(-1, n * T, q.size(4)), mk.flatten(0, 1).transpose(1, 2))          # (M*nh, n*T, K)
        own = torch.baddbmm(mask.to(v.dtype), q.flatten(0, 2), k.flatten(0, 2).transpose(1, 2))                 # (M*nh*n, T, S)
        with torch.autocast(x.device.type, enabled=False):          # autocast's softmax would copy the scores to float32 and back
            att = torch.cat([far.view(M, -1, n, T, far.size(2)), own.view(M, -1, n, T, own.size(2))], 4).softmax(4)     # (M, nh, n, T, K+S)
        far, own = att.split([far.size(2), own.size(2)], 4)         # split, not slices: a slice's backward fills a whole tensor
        y = (far.flatten(2, 3) @ mv).view(v.shape[:3] + (T, -1)) + own @ v             # (M, nh, n, T, hs)
        return self.proj(y.permute(0, 2, 3, 1, 4).flatten(3)), (k, v)


class Block(nn.Module):
    """Pre-norm; squared ReLU (arXiv 2109.08668), which trains a little faster than GELU here and costs less."""
    def __init__(self, C, n_head):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), Attention(C, n_head), nn.LayerNorm(C)
        self.up, self.down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x, cos, sin, memory, mask, past=None):
        y, past = self.attn(self.ln_1(x), cos, sin, memory, mask, past)
        x = x + y                                                                   # (M, n, T, C)
        return x + self.down(F.relu(self.up(self.ln_2(x))).square()), past


class Bouncer(nn.Module):
    """Tokens with positions (row, column, time), and a memory of walls, which have a place and no time, and of the text's characters,
    which have a time and no place: their keys are zero in the other axes' pairs. So a wall is found by where it is seen from the pen,
    a character by when, wherever the maze stands and however large it is."""
    shift = SHIFT           # this and the next two are what tests/bench/compare_bounce.py replaces to show why they are as they are
    tokens = lambda self, g: pen(g)
    memory = lambda self, g, decoys=0, rng=None: memory_of(g, decoys, rng)

    def __init__(self, n_layer, n_head, n_embd):
        super().__init__()
        C, pairs = n_embd, n_embd // n_head // 2
        self.wte, self.kind = nn.Embedding(VOCAB, C), nn.Embedding(5, C)
        self.blocks = nn.ModuleList(Block(C, n_head) for _ in range(n_layer))
        self.ln_mem, self.ln_out, self.head = nn.LayerNorm(C), nn.LayerNorm(C), nn.Linear(C, VOCAB, bias=False)
        for name, w in self.named_parameters():
            if w.dim() == 2:
                last = name.endswith(("proj.weight", "down.weight"))                # GPT-2's: what adds to the stream starts smaller
                nn.init.normal_(w, std=C**-0.5 * (2 * n_layer)**(-0.5 if last else 0))
        # what all letters share (being letters) stands out from what tells them apart: attention by position alone is then easy
        # to find. with one embedding per token the letters took three times as many steps
        nn.init.normal_(self.wte.weight, std=0.5)
        nn.init.normal_(self.kind.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.02)
        kinds = [0] * 25 + [1] * 96 + [2, 2, 3, 3, 3, 4, 4]                           # moves, characters, none, walls, marks
        self.register_buffer("kinds", torch.tensor(kinds), persistent=False)
        self.axes = (3 * pairs // 8, 3 * pairs // 8, pairs - 2 * (3 * pairs // 8))              # pairs for row, column, time
        omega = [2.2 * (0.1 / 2.2)**(i / (m - 1)) for m in self.axes for i in range(m)]         # radians per cell or step
        place, time = ([float((axis == 2) == late) for axis, m in enumerate(self.axes) for _ in range(m)] for late in (False, True))
        self.register_buffer("omega", torch.tensor(omega), persistent=False)
        table = torch.tensor([[0.0] * pairs, place, time]).repeat(1, 2)             # of nothing, walls, text: (3, hs)
        self.register_buffer("table", table, persistent=False)

    def angles(self, pos):
        """pos (..., 3) -> cos and sin (..., pairs) of each pair's angle."""
        angle = torch.cat([pos[..., i:i + 1].expand(*pos.shape[:-1], m) for i, m in enumerate(self.axes)], -1) * self.omega
        return angle.cos(), angle.sin()

    def embed(self, ids, pos):
        return self.wte(ids) + self.kind(self.kinds[ids])                           # (..., C)

    def remember(self, ids, pos, sort):
        """The memory's ids (M, K), pos (M, K, 3), sort (M, K): -1 absent, 0 none, 1 wall, 2 text -> each block's keys and values."""
        x, (cos, sin), absent = self.ln_mem(self.embed(ids, pos)), self.angles(pos), torch.zeros(sort.shape, device=ids.device)
        absent = absent.masked_fill(sort < 0, -torch.inf)[:, None]                  # (M, 1, K)
        return [b.attn.remember(x, cos, sin, self.table[sort.clamp(min=0)], absent) for b in self.blocks]

    def forward(self, ids, pos, memory, past=None, cells=0):
        """ids (M, n, T), pos (M, n, T, 3) -> logits (M, n, T, VOCAB) and the cache. The last `cells` tokens see all before them
        and themselves, not each other."""
        x, (cos, sin), T, new = self.embed(ids, pos), self.angles(pos), ids.size(2), []
        S = T + (past[0][0].size(3) if past else 0)
        mask = torch.full((T, S), -torch.inf, device=ids.device).triu(S - T + 1)
        if cells:
            mask[T - cells:, S - cells:] = mask.new_full((cells, cells), -torch.inf).fill_diagonal_(0)
        for i, block in enumerate(self.blocks):
            x, kv = block(x, cos, sin, memory[i], mask, past[i] if past else None)
            new.append(kv)
        return self.head(self.ln_out(x)), new

# ---- the idea: a token stands where the pen is -------------------------------------------------------------------------------

def characters(text):
    return [CHAR + ord(x) - 32 for x in text]


def memory_of(g, decoys=0, rng=None):
    """What all games in a maze may read -> ids (M, K), pos (M, K, 3), sort (M, K): nothing (to look at where there is no wall), the
    walls, the text and its end. decoys: so many walls more, anywhere outside the maze within 160 cells: rotary waves that fit at
    distances never met in training would be taken for walls nearby, and larger mazes fail."""
    rows = []
    for m, text in enumerate(g["texts"]):
        r, c = np.nonzero(g["fields"][m, :g["H"][m], :g["W"][m]])
        glyph = g["fields"][m, r, c].astype(int)
        if decoys:
            far = rng.integers(-160, 161, (decoys, 2)) + [g["H"][m] // 2, g["W"][m] // 2]
            far = far[((far < -1) | (far > [g["H"][m], g["W"][m]])).any(1)]
            r, c, glyph = np.append(r, far[:, 0]), np.append(c, far[:, 1]), np.append(glyph, rng.integers(1, 4, len(far)))
        n, T = len(r), len(text)
        ids = np.concatenate([[NULL], WALL + glyph, characters(text), [END]])
        pos = np.zeros((len(ids), 3), np.float32)
        pos[1:1 + n, 0], pos[1:1 + n, 1], pos[1 + n:, 2] = r, c, np.arange(T + 1)
        rows.append((ids, pos, np.repeat([0, 1, 2], [1, n, T + 1])))
    K = max(len(ids) for ids, _, _ in rows)
    ids, pos, sort = np.full((len(rows), K), NULL), np.zeros((len(rows), K, 3), np.float32), np.full((len(rows), K), -1)
    for m, (i, p, s) in enumerate(rows):
        ids[m, :len(i)], pos[m, :len(i)], sort[m, :len(i)] = i, p, s
    return ids, pos, sort


def pen(g):
    """move and letter for every step, and the end -> ids (M, n, 2T+2), pos (M, n, 2T+2, 3).

        token        SE      I       SE      '       SE      m      ...     PAD after the end
        position    start  start   there   there   there'  there'           a move stands where it has led to
    The first move is the direction of the prompt, said as any other, as if it had led to the start: a token of its own would have to
    learn all about walls again, from one step a game (it did: the first move was wrong in 26% of the small mazes, the others in 1%).
    """
    R, C, D, T = g["R"], g["C"], g["D"], max(map(len, g["texts"]))
    M, n = R.shape[:2]
    ids, pos = np.full((M, n, 2 * T + 2), PAD), np.zeros((M, n, 2 * T + 2, 3), np.float32)
    dr, dc, time = np.diff(R), np.diff(C), np.arange(2 * T + 2) // 2
    # in a corridor one cell wide the ball bounces at every step and its displacement is (0, 1), (0, 1), ...: which way it is heading can
    # only be known by counting. a move that says its heading leaves nothing to count
    move = MOVE + 4 * D[..., 1:] + 2 * (dr == 0) + (dc == 0)                                # (M, n, T)
    ids[..., 0] = MOVE + 4 * D[..., 0]
    for m, text in enumerate(g["texts"]):
        L = len(text)
        ids[m, :, 1:2 * L:2], ids[m, :, 2:2 * L + 1:2], ids[m, :, 2 * L + 1] = characters(text), move[m, :, :L], END
        pos[m, :, :2 * L + 2] = np.stack([R[m][:, time], C[m][:, time], np.broadcast_to(time, (n, len(time)))], -1)[:, :2 * L + 2]
    return ids, pos


def cells_of(g, rng, Q):
    """For --draw model: Q cells a game, half of them on its path -> pos (M, n, Q, 3), what stands there in the end (M, n, Q)."""
    M, n = g["R"].shape[:2]
    pos, ids = np.zeros((M, n, Q, 3), np.float32), np.zeros((M, n, Q), int)
    for m, text in enumerate(g["texts"]):
        r, c = rng.integers(0, g["H"][m], (n, Q)), rng.integers(0, g["W"][m], (n, Q))
        t = rng.integers(0, len(text), (n, Q // 2))
        r[:, :Q // 2], c[:, :Q // 2] = np.take_along_axis(g["R"][m], t, 1), np.take_along_axis(g["C"][m], t, 1)
        for i in range(n):
            last = {(a, b): ord(x) - 32 for a, b, x in zip(g["R"][m, i], g["C"][m, i], text) if x != " "}
            ids[m, i] = [CHAR + last.get(at, 0) if not g["fields"][m][at] else WALL + g["fields"][m][at] for at in zip(r[i], c[i])]
        pos[m, ..., 0], pos[m, ..., 1], pos[m, ..., 2] = r, c, len(text)
    return pos, ids


def loss_of(model, g, device, cells=None, decoys=0, rng=None):
    """Mean cross-entropy of the next token over a batch of games, plus that of cells = (pos, ids), asked for after the path."""
    ids, pos = (torch.from_numpy(x).to(device) for x in model.tokens(g))
    memory = model.remember(*(torch.from_numpy(x).to(device) for x in model.memory(g, decoys, rng)))
    target, Q = ids[..., 1:], 0
    ids, pos = ids[..., :-1], pos[..., :-1, :]
    if cells is not None:
        at, there = (torch.from_numpy(x).to(device) for x in cells)
        Q = at.size(2)
        ids, pos, target = torch.cat([ids, torch.full_like(there, CELL)], 2), torch.cat([pos, at], 2), torch.cat([target, there], 2)
    logits, _ = model(ids, pos, memory, cells=Q)
    return F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), ignore_index=PAD)

# ---- generation and evaluation -----------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, g, device, draw="code"):
    """Greedy, with a KV cache, all games at once. The harness adds up the displacements and knows no physics: a pen may go through
    walls or out of the field. -> tokens (M, n, L), and with draw="model" the grids (M, n, H, W) of ids that the model wrote."""
    memory = model.remember(*(torch.from_numpy(x).to(device) for x in model.memory(g)))
    shift = torch.from_numpy(np.concatenate([model.shift, np.zeros((1, 2), int)])).to(device)      # what is no move adds nothing
    ids, place = (torch.from_numpy(x).to(device) for x in (MOVE + 4 * g["D"][..., 0], np.stack([g["R"][..., 0], g["C"][..., 0]], -1)))
    alive, out, past = torch.ones_like(ids, dtype=torch.bool), [], None
    for s in range(2 * max(map(len, g["texts"])) + 1):
        pos = torch.cat([place, torch.full_like(place[..., :1], s // 2)], 2) * (ids != PAD)[..., None]
        logits, past = model(ids[..., None], pos[..., None, :].float(), memory, past)
        ids = torch.where(alive, logits[..., 0, :].argmax(-1), PAD)
        place = place + shift[ids.clamp(max=len(shift) - 1)]
        alive &= ids != END
        out.append(ids)
    tokens = torch.stack(out, 2).cpu().numpy()
    return (tokens, draw_cells(model, g, memory, past)) if draw == "model" else (tokens, None)


def draw_cells(model, g, memory, past):
    """Ask the model, after its paths, for every cell of every field -> ids (M, n, H, W). The cells do not see each other."""
    (M, n), (H, W), device = g["R"].shape[:2], g["fields"].shape[1:], past[0][0].device
    at = torch.tensor(np.stack(np.divmod(np.arange(H * W), W), 1), dtype=torch.float32, device=device)          # (H*W, 2)
    T, grids = torch.tensor([float(len(x)) for x in g["texts"]], device=device)[:, None, None, None], []
    for some in at.split(512):
        pos = torch.cat([some.expand(M, n, -1, 2), T.expand(M, n, len(some), 1)], 3)
        logits, _ = model(torch.full(pos.shape[:3], CELL, device=device), pos, memory, past, cells=len(some))
        grids.append(logits.argmax(-1))
    return torch.cat(grids, 2).view(M, n, H, W).cpu().numpy()


def read_path(g, tokens, shift=SHIFT):
    """A pen's tokens (M, n, L) -> per game (m, i, R, C, text): where each letter was put."""
    for m, i in np.ndindex(tokens.shape[:2]):
        letters, moves = tokens[m, i, ::2], tokens[m, i, 1::2]
        T = int(np.argmax(np.append(letters, END) == END))
        step = np.where((moves < len(shift))[:, None], shift[np.minimum(moves, len(shift) - 1)], 0)[:max(0, T - 1)]
        at = np.concatenate([np.zeros((1, 2), int), step.cumsum(0)]) + [g["R"][m, i, 0], g["C"][m, i, 0]]
        yield m, i, at[:T, 0], at[:T, 1], "".join(chr(x - CHAR + 32) if CHAR <= x < END else " " for x in letters[:T])


def evaluate(model, args, quotes, device, games, **change):
    """Rates over held-out games, each in its own maze. -> dict: exact_path, exact_grid, letters, direction, walls, by_time
    (letters right, in tens of steps) and by_bounce (pen in the right place when the k-th bounce is done). change: other sizes."""
    size = dict(dict(height=args.height, width=args.width, bars=args.bars), **change)
    tally, groups = {}, dict(by_time=[], by_bounce=[])
    count = lambda name, right: tally.setdefault(name, []).append(float(right))
    for b in tqdm(range(0, games, 50), desc="evaluating", unit="x50 games", disable=None, leave=False):
        g = make_games(np.random.default_rng((args.seed, 2, b)), min(50, games - b), 1, quotes, **size)
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens, grids = generate(model, g, device, args.draw)
        want = model.tokens(g)[0][..., 1:]
        same = ((tokens == want) | (want == PAD)).all(2)
        for m, i, R, C, text in read_path(g, tokens, model.shift):
            truth, field, wr, wc = g["texts"][m], g["fields"][m, :g["H"][m], :g["W"][m]], g["R"][m, i], g["C"][m, i]
            grid, target = drawn(field, R, C, text), drawn(field, wr, wc, truth)
            if grids is not None:
                sign = {CHAR + x: chr(32 + x) for x in range(95)} | {WALL + f: GLYPHS[f] for f in (1, 2, 3)}
                grid = ["".join(sign.get(x, "?") for x in row) for row in grids[m, i, :len(field), :field.shape[1]]]
            n, pad = len(truth), lambda x: np.append(x, np.full(len(truth), -1))[:len(truth)]
            there = (pad(R) == wr[:n]) & (pad(C) == wc[:n])
            right = there & (np.array(list(truth)) == np.array(list(text.ljust(n)[:n])))
            count("exact_path", same[m, i])
            count("exact_grid", grid == target)
            count("direction", there[1])
            count("walls", all(a == GLYPHS[f] for row, line in zip(field, grid) for f, a in zip(row, line) if f))
            tally.setdefault("letters", []).extend(right.astype(float))
            after = 1 + np.flatnonzero(np.diff(g["D"][m, i, :len(truth)]))
            groups["by_time"] += zip(np.arange(len(truth)) // 10, right)
            groups["by_bounce"] += zip(range(len(after)), there[after])
    rates = {k: round(float(np.mean(v)), 4) for k, v in tally.items()}
    for name, pairs in groups.items():
        k, right = np.array(pairs, int).reshape(-1, 2).T
        rates[name] = [round(float(x), 4) for x in np.bincount(k, right) / np.maximum(np.bincount(k), 1)]
    return rates

# ---- training --------------------------------------------------------------------------------------------------------------

def train(args, quotes, file, device, kind=Bouncer):
    """Small mazes, then the asked sizes, going on from file if it is there. Under torchrun each process plays mazes of its own and
    gradients are averaged. -> model, seconds of training."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed)
    model = kind(args.n_layer, args.n_head, args.n_embd).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    state = common.resume(file, model=model, optimizer=optimizer)
    step, seconds, losses = state.get("step", 0), state.get("seconds", 0.0), []
    bar = tqdm(total=args.steps, initial=step, desc="training", unit="step", disable=rank > 0 or None)
    began = time.time() - seconds
    while step < args.steps:
        rng = np.random.default_rng((args.seed, 1, step, rank))         # a batch depends on this alone: a resumed run sees the same
        # full sizes come late, when bounces are understood: what is new there is only that walls are many and far
        small = step < args.small * args.steps or step % 2
        size = dict(height=[9, 12], width=[14, 22], bars=3.0) if small else dict(height=args.height, width=args.width, bars=args.bars)
        g = make_games(rng, args.mazes, args.balls, quotes, noise_texts=args.noise_texts, **size)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(model, g, device, cells_of(g, rng, 48) if args.draw == "model" else None, args.decoys, rng)
        optimizer.zero_grad()
        loss.backward()
        for w in model.parameters() if world > 1 else ():
            dist.all_reduce(w.grad)
            w.grad /= world
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sorry(f"the loss is not finite at step {step}; a smaller --lr may help")
        optimizer.step()
        step += 1
        bar.update()
        if step % SAVE_EVERY == 0 or step == args.steps:
            seconds = time.time() - began
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}")
            if rank == 0:
                common.save_checkpoint(file, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, seconds=seconds))
    bar.close()
    return model.eval(), seconds

# ---- to look at ------------------------------------------------------------------------------------------------------------

def show(model, g, args, device):
    """One game in the terminal: what the model wrote, the truth beside it, and in red what differs."""
    tokens, _ = generate(model, g, device)
    (_, _, R, C, text), truth = next(read_path(g, tokens)), g["texts"][0]
    field = g["fields"][0]
    got, want = drawn(field, R, C, text), drawn(field, g["R"][0, 0], g["C"][0, 0], truth)
    red = (lambda x: f"\033[1;31m{x}\033[0m") if sys.stdout.isatty() else (lambda x: "?" if x == " " else x)
    print(f"{list(DIRECTIONS)[g['D'][0, 0, 0]]}: {truth}\n\n{'the model':{len(got[0])}}   the truth")
    for a, b in zip(got, want):
        print("".join(x if x == y else red(x) for x, y in zip(a, b)) + "   " + b)
    print(f"\n{sum(x != y for a, b in zip(got, want) for x, y in zip(a, b))} cells differ")

# ---- main ------------------------------------------------------------------------------------------------------------------

def checkpoint(args, quotes):
    """A model's file is named after all that shaped it: other flags make another model, the same flags find it again."""
    shape = {k: getattr(args, k) for k in ("height width bars draw n_layer n_head n_embd steps small mazes balls lr warmup weight_decay "
                                           "grad_clip noise_texts decoys dtype seed").split()}
    return OUT / f"bounce_{hashlib.sha256(json.dumps([shape, quotes]).encode()).hexdigest()[:8]}.pt"


def main():
    args, began, device = get_args(), time.time(), common.pick_device()
    if args.score:
        return common.log_result("bounce.py", args, time.time() - began, score(args.score))
    everything = common.read_texts(args.quotes)
    if args.export:
        return export(args, args.export, everything)
    quotes, unseen = split_quotes(everything)
    g = make_games(np.random.default_rng((args.seed, 4)), 1, 1, unseen, args.height, args.width, args.bars)
    if args.field:
        try:
            lines = pathlib.Path(args.field).read_text(encoding="utf-8").strip("\n").split("\n")
            g = one_game(*read_field(lines), args.direction, "".join(x for x in args.text if " " <= x <= "~") or "*")
        except (OSError, ValueError) as e:
            sorry(f"{args.field}: {e}")
    if args.dtype == "auto":
        args.dtype = common.fast_dtype(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"])) if device == "cuda" else None
    print(f"device {device}, {torch.get_num_threads()} threads, {args.dtype}; {len(quotes)} quotes to train on, {len(unseen)} held out")
    model, seconds = train(args, quotes, checkpoint(args, quotes), device)
    if dist.is_initialized() and dist.get_rank():
        return
    if args.show or args.field:
        return show(model, g, args, device)
    metrics = dict(parameters=sum(w.numel() for w in model.parameters()), train_seconds=round(seconds))
    print(f"\n{metrics['parameters']:,} parameters, {seconds:.0f} s of training")
    tall, wide = (int(1.5 * x[1]) for x in (args.height, args.width))
    long = sorted((f"{a} {b}" for a, b in zip(unseen, unseen[len(unseen) // 2:])), key=len)
    beyond = {"": {}, f", {tall} x {wide}": dict(height=[tall] * 2, width=[wide] * 2), ", two quotes in one": {},
              ", twice the walls": dict(bars=2 * args.bars)}
    titles = dict(by_time="letters right, steps 0-9, 10-19, ...", by_bounce="in place after bounce 1, 2, ...")
    for name, change in beyond.items():                     # 1.5 times the largest size, and what else it never saw
        games = max(1, args.games // (5 if name else 1))
        rates = evaluate(model, args, long if "two" in name else unseen, device, games, **change)
        print(f"{games} held-out games{name}: " + "  ".join(f"{k} {v:.2%}" for k, v in rates.items() if not isinstance(v, list)))
        for k, title in () if name else titles.items():
            print(f"  {title}: " + " ".join(f"{x:.3f}" for x in rates[k]))
        metrics.update({k + name: v for k, v in rates.items() if k in ("exact_grid", "exact_path")})
    _, _, R, C, text = next(read_path(g, generate(model, g, device)[0]))
    if args.video and text:                                 # an untrained model may end before its first letter
        frames = list(common.draw_pen(g["fields"][0], R, C, text))
        metrics["video"] = str(common.write_video(OUT / "bounce.mp4", frames, fps=10))
        metrics["picture"] = str(common.write_picture(OUT / "bounce.png", frames[-1]))
    common.log_result("bounce.py", args, time.time() - began, metrics)


if __name__ == "__main__":
    common.run(main)
