"""bounce.py: a language model that learns to bounce a ball through ASCII mazes, writing a quote along its path.

    python bounce.py

Measured: two cores of an AMD EPYC (Zen 4), torch 2.13, bfloat16, 286-308 s of training; seeds 0-2, last checkpoint. Of 1,000 held-out
mazes of the full size (18-26 x 32-86), with quotes never trained on, 99.3, 99.9 and 99.9% come out exactly right; of 200 that are
39 x 129, 1.5 times larger than any trained on, 99.5, 99 and 100%.
Source: Shimmin's Bouncing LLaMa (an 8B Llama, LoRA, 40 minutes on a 4090: direction ignored, letters jumbled). Differs from it in:
1. a token's position is WHERE THE PEN IS: rotary over (row, column, time); tests/bench/compare_bounce.py has the alternatives
2. the answer is the path, a move and a letter per step, each knowing the one before; the grid is drawn by code, or by the model
3. 0.7 million parameters from scratch, small dense mazes first, Shimmin's sizes after
Not handled: characters outside printable ASCII; fields with holes in their rim; more than one ball at a time.
"""
import argparse, collections, csv, hashlib, io, itertools, json, math, os, pathlib, re, sys, time, unicodedata

import common                       # before torch: it says how torch's threads wait
from common import sorry
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

OUT, SAVE_EVERY = pathlib.Path("out"), 100
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")      # one kernel per shape, and each batch brings new ones: 1,024 take gigabytes
GLYPHS = " |-+"                                     # a cell's flags: 1 a vertical wall, 2 a horizontal one, 3 a crossing
DIRECTIONS, STEP = ["NE", "NW", "SE", "SW"], np.array([(-1, 1), (-1, -1), (1, 1), (1, -1)])         # (row, column); rows count downwards
# token ids: 16 moves (4 headings x does the row stay x does the column), 95 characters, marks, walls (WALL + flag); the 9 from PLAIN on and
# NEWLINE serve tests/bench/compare_bounce.py alone
MOVE, PLAIN, CHAR, END, PAD, NULL, WALL, CELL, NEWLINE, VOCAB = 0, 16, 25, 120, 121, 122, 122, 126, 127, 128
SIGN = np.array(list("?" * CHAR + "".join(map(chr, range(32, 127))) + "???" + GLYPHS[1:] + "??"))       # how a token looks in a grid
characters = lambda text: [CHAR + ord(x) - 32 for x in text]           # its tokens
means = lambda groups: {name: round(float(np.mean(x)), 4) for name, x in groups.items()}            # of rates, by name or number
# what a token adds to the pen's place, (VOCAB, 2) rows and columns: moves alone add anything, and this is all that the harness knows
SHIFT = np.pad((STEP[:, None] * [(1, 1), (1, 0), (0, 1), (0, 0)]).reshape(16, 2), ((0, VOCAB - 16), (0, 0)))

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # the game: Shimmin's sizes
    p.flag("quotes", str(pathlib.Path(__file__).resolve().parent / "data" / "quotes.txt"), "texts: lines, .csv, .json; a tenth is held out")
    p.flag("height", [18, 26], "smallest and largest height of a maze", nargs=2, type=int, low=8, high=800)
    p.flag("width", [32, 86], "smallest and largest width", nargs=2, type=int, low=8, high=1000)
    p.flag("bars", 4.0, "mean number of walls of each orientation")
    p.flag("draw", "code", "who draws the final grid: code, from the path, or the model, cell by cell, after it", choices=["code", "model"])
    # model
    p.flag("n_layer", 3, "transformer blocks")
    p.flag("n_head", 4, "attention heads")
    p.flag("n_embd", 128, "width of a token")
    # training
    p.flag("steps", 1000, "gradient steps")
    p.flag("small", 0.6, "share of the steps on small dense mazes alone (9-12 x 14-22, 3 bars), full of bounces; then every second", high=1)
    p.flag("mazes", 8, "mazes per step and process")
    p.flag("balls", 6, "games per maze: they share its memory")
    p.flag("lr", 2e-3, "AdamW's peak learning rate")
    p.flag("warmup", 50, "steps up to the peak; a cosine down to a tenth of it follows")
    p.flag("weight_decay", 0.01, "AdamW's")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("noise_texts", 0.25, "share of texts of random characters: rare letters are learned, and no quote by heart", high=1)
    p.flag("decoys", 64, "walls outside the maze in its memory: far ones must mean nothing, or larger mazes fail", low=0)
    p.flag("dtype", "auto", "of the matrix products; auto: bfloat16 where the hardware has it", choices=["auto", "bfloat16", "float32"])
    p.flag("seed", 0, "of weights and games", low=0)
    # evaluation and things to look at
    p.flag("games", 1000, "held-out games, each in a maze of its own")
    p.flag("show", False, "play one game in the terminal, the truth beside it, and end")
    p.flag("field", None, "show a maze of yours instead, drawn as the others are, with a * in it", metavar="FILE")
    p.flag("text", "Here is my handle, here is my spout.", "what to write into it")
    p.flag("direction", "SE", "where its ball starts to", choices=DIRECTIONS)
    p.flag("video", True, "write an mp4 and a PNG of a held-out game")
    # other models: Shimmin's text format, as JSON lines for lora_llama.py
    p.flag("export", None, "write Shimmin's prompts and answers here, held-out ones beside it, and end", metavar="FILE.jsonl")
    p.flag("export_games", [10000, 1000], "how many to train on and to hold out, of other quotes and other seeds", nargs=2, type=int)
    p.flag("score", None, "measure the completions that any model gave to such prompts, and end", metavar="FILE.jsonl")
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv, smoke=dict(steps=20, warmup=5, mazes=2, balls=2, games=10, height=[9, 10], width=[14, 16], n_embd=64,
                                         export_games=[20, 5]))
    if args.n_embd % (16 * args.n_head):
        p.error("argument --n_embd: must be a multiple of 16 per head, for the rotary pairs to be shared among three axes")
    if not all(low <= high for low, high in (args.height, args.width)):
        p.error("arguments --height and --width: each is two numbers, the smaller first")
    return args

# ---- the maze and its physics ----------------------------------------------------------------------------------------------
def maze(rng, H, W, bars):
    """A field (H, W) of flags, uint8: its rim, and Poisson(bars) bars of each orientation, from 2 to 3/4 of the side long, no two of
    one orientation side by side; a bar that finds no room in 5 tries is left out. Shimmin's generator."""
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

    The ball at o is on its way to X; V is where its row alone would take it, H where its column alone would:

         V X        X free, V and H not both walls: on to X, the ball slips past a lone corner
         o H        X wall: an axis whose own cell is a wall flips; if neither is (an outer corner) or both are, both flip
                    V and H both walls: both flip, whatever X is
    A flipped axis stays for this step: the ball turns beside the wall and is not pushed through it. Run backwards (both velocities
    turned round) the same rule leads back to the start: the test plays 10,000 games forward and back.
    """
    V, H, X = wall(r + dr, c), wall(r, c + dc), wall(r + dr, c + dc)
    flip_r, flip_c = np.where(X, V | ~H, V & H), np.where(X, H | ~V, V & H)
    return np.where(flip_r, r, r + dr), np.where(flip_c, c, c + dc), np.where(flip_r, -dr, dr), np.where(flip_c, -dc, dc)

def paths(fields, r, c, d, T):
    """T steps of the balls at r, c (M, n), n in each of the fields (M, H, W), that set out in direction d (index into DIRECTIONS).
    -> dict R, C, D: rows, columns and headings (as d), (M, n, T+1) each; a ball bounced where its heading changes."""
    solid, m, path = fields > 0, np.arange(len(fields))[:, None], [(r, c, d)]
    dr, dc = STEP[d].transpose(2, 0, 1)
    for _ in range(T):
        r, c, dr, dc = bounce(lambda r, c: solid[m, r, c], r, c, dr, dc)
        path.append((r, c, 2 * (dr > 0) + (dc < 0)))
    return dict(zip("RCD", np.array(path).transpose(1, 2, 3, 0)))

def make_games(rng, M, n, quotes, height, width, bars, noise_texts=0.0):
    """M mazes, n balls in each, one text a maze. -> dict: H, W (M,), the mazes' sizes; fields (M, max H, max W), all wall beyond a maze's own
    size; texts; R, C, D (M, n, T+1), the balls' rows, columns and headings. quotes: sorted by length."""
    H, W = (rng.integers(lo, hi + 1, M) for lo, hi in (height, width))
    fields = np.ones((M, H.max(), W.max()), np.uint8)
    for m in range(M):
        fields[m, :H[m], :W[m]] = maze(rng, H[m], W[m], bars)
    first = rng.integers(0, max(1, len(quotes) - M + 1))                # neighbours are of about one length: little padding
    texts = [quotes[(first + i) % len(quotes)] for i in range(M)]
    texts = ["".join(map(chr, rng.integers(32, 127, len(x)))) if rng.random() < noise_texts else x for x in texts]
    (r, c, d), todo = np.zeros((3, M, n), int), np.ones((M, n), bool)
    for _ in range(1000):                           # a start is a blank cell, two from the rim, out of which the ball can move
        m = todo.nonzero()[0]
        r[todo], c[todo], d[todo] = rng.integers(2, H[m] - 2), rng.integers(2, W[m] - 2), rng.integers(0, 4, len(m))
        R, C, _ = paths(fields, r, c, d, 2).values()                    # who has not moved after two steps never will
        todo = (fields[np.arange(M)[:, None], r, c] > 0) | ((R == R[..., :1]) & (C == C[..., :1])).all(2)
        if not todo.any():
            return dict(fields=fields, H=H, W=W, texts=texts, **paths(fields, r, c, d, max(map(len, texts))))
    sorry("in 1,000 tries no start was found that lets a ball move: take fewer --bars, or larger mazes")

def drawn(field, R, C, text):
    """The field as tokens (H, W), with text written along R, C: the last letter wins, a space leaves the cell as it was."""
    grid = np.where(field, WALL + field, CHAR)                          # a blank cell is a space
    for r, c, x in zip(R, C, characters(text)):
        if x != CHAR and 0 <= r < len(grid) and 0 <= c < grid.shape[1]:         # a model's pen may be outside
            grid[r, c] = x
    return grid

# ---- quotes, and Shimmin's text format -------------------------------------------------------------------------------------
def read_quotes(path):
    """Lines (`text -- author`), .csv or .json, UTF-8, UTF-16 or Windows' Latin -> printable ASCII, by length: to train on, a tenth held out."""
    with common.reading(path):
        raw = pathlib.Path(path).read_bytes()
        utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")               # its byte order mark
        if b"\0" in raw and not utf16:
            raise ValueError("it is binary")
        try:
            text = raw.decode("utf-16", "replace") if utf16 else raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("cp1252", "replace")
        rows = [line.split(" -- ")[0] for line in text.splitlines()]
        if path.endswith(".json"):
            rows = json.loads(text)
            if isinstance(rows, dict):                              # {"quotes": [...], "source": ...}, or {author: quote}
                rows = [x for v in rows.values() if isinstance(v, list) for x in v] or rows.values()
        elif path.endswith(".csv"):
            head, *rows = [row for row in csv.reader(io.StringIO(text)) if row]
            names = [x.strip().lower() for x in head]
            rows = [dict(zip(names, row)) for row in rows] if {"quote", "text", "q"} & {*names} else [row[0] for row in (head, *rows)]
        rows = [next((x[k] for k in ("quote", "text", "Quote", "q", "body") if k in x), "") if isinstance(x, dict) else x for x in rows]
    plain = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")
    texts = [unicodedata.normalize("NFKD", x.translate(plain)).encode("ascii", "ignore").decode() for x in rows if isinstance(x, str)]
    texts = [re.sub("[^!-~]+", " ", x).strip() for x in texts]
    fit, long = [x for x in texts if 2 <= len(x) <= 120], sum(len(x) > 120 for x in texts)
    kept = sorted({x.casefold(): x for x in reversed(fit)}.values(), key=lambda x: (len(x), x))         # of duplicates the first one stays
    print(f"{len(kept)} texts from {path}; dropped: {len(rows) - len(fit) - long} empty, {long} longer than 120, {len(fit) - len(kept)} duplicates")
    if len(kept) < 10:
        sorry(f"{path} has {len(kept)} texts that can be used; at least 10 are needed")
    return [x for i, x in enumerate(kept) if i % 10 != 5], kept[5::10]

def one_game(lines, direction, text):
    """A field drawn as lines, with a * in it -> a single game as make_games makes them (M = n = 1). ValueError says what is wrong."""
    if not re.fullmatch("[ -~]+", text):
        raise ValueError("the text is empty or has characters outside printable ASCII")
    if len(lines) < 3 or len(lines[0]) < 3 or len({len(x) for x in lines}) > 1:
        raise ValueError("the field's rows are fewer than 3 or not all equally long")
    if odd := sorted(set("".join(lines)) - set(GLYPHS + "*")):
        raise ValueError(f"the field has unknown glyphs: {' '.join(map(repr, odd[:5]))}; it may have | - + * and spaces")
    flags = np.array([[GLYPHS.find(x) for x in row] for row in lines])          # -1 where the * is
    if len(at := np.argwhere(flags < 0)) != 1:
        raise ValueError(f"the field has {len(at)} starts (*), not one")
    if (np.concatenate([flags[0], flags[-1], flags[:, 0], flags[:, -1]]) < 1).any():
        raise ValueError("the field's rim has a hole (or the * stands on it): the ball would get out")
    fields = flags.clip(0).astype(np.uint8)[None]
    r, c, d = (np.array([[x]]) for x in (*at[0], DIRECTIONS.index(direction)))        # one maze, one ball
    return dict(fields=fields, H=np.array([len(flags)]), W=np.array([flags.shape[1]]), texts=[text], **paths(fields, r, c, d, len(text)))

def example(g):
    """A single game in Shimmin's text format; the answer is the grid with the text written along the path."""
    field, R, C, text = g["fields"][0], g["R"][0, 0], g["C"][0, 0], g["texts"][0]
    fenced = lambda *path: "```\n" + "\n".join("".join(row) for row in SIGN[drawn(field, *path)]) + "\n```"
    return dict(prompt="A ball starts at the * and moves diagonally through the playing field, one cell per step. Walls reflect it. Each "
                "step writes the next character of the reference text; a space leaves the cell as it was, a later character overwrites "
                f"an earlier one.\n\n### Starting direction:\n{DIRECTIONS[g['D'][0, 0, 0]]}\n\n### Reference text:\n{text}\n\n"
                f"### Playing field:\n{fenced(R[:1], C[:1], '*')}\n\n### Answer:\n", answer=fenced(R, C, text))

def export(args, quotes):
    """JSON lines {"prompt", "answer"} to train on, and of other seeds' mazes and other quotes in <name>_heldout.jsonl. quotes: of both
    sides. With next to no walls (--bars 0 to 2) mazes repeat, and one may be on both."""
    path = pathlib.Path(args.export)
    if not path.name:
        sorry(f"--export {args.export}: takes a file's name")
    for side, name in enumerate((path, path.with_name(f"{path.stem}_heldout{path.suffix}"))):
        with common.whole_file(name) as part, open(part, "w") as f:
            for i in tqdm(range(args.export_games[side]), desc=name.name, unit="game", disable=None):
                g = make_games(np.random.default_rng((args.seed, 3, side, i)), 1, 1, quotes[side], args.height, args.width, args.bars)
                f.write(json.dumps(example(g)) + "\n")
        print(f"wrote {args.export_games[side]} games to {name}")

def score(path):
    """JSON lines {"prompt", "completion"} of any model -> counts and rates; what cannot be compared is counted by what is wrong."""
    with common.reading(path):
        lines = [x for x in pathlib.Path(path).read_text(encoding="utf-8").split("\n") if x.strip()]
    if not lines:
        sorry(f"{path} has no completions")
    rates, wrong = collections.defaultdict(list), collections.Counter()
    for line in lines:
        try:
            row = json.loads(line)
            m = re.search(r"direction:\n(.*?)\n\n### Reference text:\n(.*?)\n\n### Playing field:\n```\n(.*?)\n```", row["prompt"], re.S)
            g = one_game(m[3].split("\n"), m[1], m[2])
            fence = re.search(r"```[^\n]*\n(.*?)\n?(```|$)", row["completion"], re.S)            # the last fence may have been cut off
        except (ValueError, TypeError, KeyError, RecursionError):       # of JSON; of a regex that finds nothing; of one_game
            wrong["no JSON with a prompt of --export's form and a completion"] += 1
            continue
        field, R, C, text = g["fields"][0], g["R"][0, 0], g["C"][0, 0], g["texts"][0]
        want, got = SIGN[drawn(field, R, C, text)], fence[1].split("\n") if fence else []
        if [len(x) for x in got] != [len(x) for x in want]:
            wrong["a grid of another size" if fence else "no fenced grid"] += 1
            continue
        same, letter = np.array([list(x) for x in got]) == want, (field == 0) & (want != " ")
        rates["exact_grid"].append(same.all())
        rates["walls"].append(same[field > 0].all())
        if letter.any():
            rates["letters"].append(same[letter].mean())
        if want[R[1], C[1]] == text[1:2] != " ":    # where the second letter stands, if it can still be seen, tells the direction
            rates["direction"].append(same[R[1], C[1]])
    exact = rates.pop("exact_grid", [])             # of all completions; the other rates are of those that could be compared
    return dict(completions=len(lines), compared=len(exact), wrong=dict(wrong), exact_grid=sum(exact) / len(lines), **means(rates))

# ---- the idea: a token stands where the pen is -------------------------------------------------------------------------------
# What the ball does next depends on what stands around it. So a token's position is not its place in a line of text, but the (row, column,
# time) of the pen that writes it; a wall's, in the memory, is its (row, column). Rotary attention sees differences of positions: "is there
# a wall one up and one to the right?" is then the same question anywhere in any maze, and "which letter is due?" at any time. In the grid
# read as text, what stands one row up stands W + 1 characters back: another number in every maze.

def pen(g):
    """Games g, as make_games makes them -> move and letter for every step, and the end: ids (M, n, 2T+2), pos (M, n, 2T+2, 3).

        token        SE      I       SE      '       SE      m      ...     PAD after the end
        position    start  start   there   there   there'  there'           a move stands where it has led to
    The first move is the direction of the prompt, said as any other, as if it had led to the start: a token of its own would have to
    learn all about walls again, from one step a game (it did: the first move was wrong in 26% of the small mazes, the others in 1%).
    """
    R, C, D, time = g["R"], g["C"], g["D"], np.arange(g["R"].shape[2])
    # in a corridor one cell wide the ball bounces at every step and its displacement is (0, 1), (0, 1), ...: which way it is heading can
    # only be known by counting. a move that says its heading leaves nothing to count
    move = MOVE + 4 * D + 2 * (np.diff(R, prepend=-1) == 0) + (np.diff(C, prepend=-1) == 0)         # (M, n, T+1); the first moves both
    letter = np.array([[characters(x) + [END] + [PAD] * (len(time) - 1 - len(x))] for x in g["texts"]])         # (M, 1, T+1)
    ids = np.stack(np.broadcast_arrays(np.where(letter == PAD, PAD, move), letter), 3).reshape(*R.shape[:2], -1)
    pos = np.stack(np.broadcast_arrays(R, C, time), 3).repeat(2, 2) * (ids != PAD)[..., None]
    return ids, pos.astype(np.float32)

def memory_of(g, decoys=0, rng=None):
    """What all games in a maze may read -> ids (M, K), pos (M, K, 3), sort (M, K), -1 where a maze has less: nothing (to look at where
    there is no wall), the walls, the text and its end. decoys: so many walls more, anywhere outside the maze within 160 cells: rotary
    waves that fit at distances never met in training would be taken for walls nearby, and larger mazes fail."""
    block = lambda id, row, column, time, sort: np.stack(np.broadcast_arrays(id, row, column, time, sort), 1)            # (k, 5)
    rows = []
    for field, H, W, text in zip(g["fields"], g["H"], g["W"], g["texts"]):
        at = np.argwhere(field[:H, :W])
        flag = field[tuple(at.T)]
        if decoys:
            far = rng.integers(-160, 161, (decoys, 2)) + [H // 2, W // 2]
            far = far[((far < -1) | (far > [H, W])).any(1)]
            at, flag = np.concatenate([at, far]), np.append(flag, rng.integers(1, 4, len(far)))
        rows.append(np.concatenate([block([NULL], 0, 0, 0, 0), block(WALL + flag, *at.T, 0, 1),
                                    block(characters(text) + [END], 0, 0, np.arange(len(text) + 1), 2)]))
    nothing = np.tile([NULL, 0, 0, 0, -1], (max(map(len, rows)), 1))
    table = np.array([np.concatenate([row, nothing[len(row):]]) for row in rows])
    return table[..., 0], table[..., 1:4].astype(np.float32), table[..., 4]

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
    shift, tokens, memory = SHIFT, staticmethod(pen), staticmethod(memory_of)          # tests/bench/compare_bounce.py tries others

    def __init__(self, n_layer, n_head, n_embd):
        super().__init__()
        C, pairs = n_embd, n_embd // n_head // 2
        self.wte, self.before, self.kind = nn.Embedding(VOCAB, C), nn.Embedding(VOCAB, C), nn.Embedding(5, C)
        self.blocks = nn.ModuleList(Block(C, n_head) for _ in range(n_layer))
        self.ln_mem, self.ln_out, self.head = nn.LayerNorm(C), nn.LayerNorm(C), nn.Linear(C, VOCAB, bias=False)
        for name, w in self.named_parameters():
            if w.dim() == 2:
                shrink = (2 * n_layer)**-0.5 if name.endswith(("proj.weight", "down.weight")) else 1        # GPT-2's: what adds to the stream
                nn.init.normal_(w, std=C**-0.5 * shrink)
        # what all letters share (being letters) stands out from what tells them apart: attention by position alone is then easy
        # to find. the loss after 150 steps is 0.54, with one embedding per token it was 1.23
        for part, std in ((self.wte, 0.5), (self.before, 0.5), (self.kind, 1.0), (self.head, 0.02)):
            nn.init.normal_(part.weight, std=std)
        axes = torch.tensor([3, 3, 2]) * pairs // 8                                 # so many pairs for row, column and time
        omega = [2.2 * (0.1 / 2.2)**(i / (m - 1)) for m in axes.tolist() for i in range(m)]     # radians per cell or step
        axis = torch.arange(3).repeat_interleave(axes)
        seen = torch.stack([axis < 0, axis < 2, axis == 2]).float().repeat(1, 2)    # (3, hs), 1: where nothing, walls, text have keys
        kinds = torch.tensor([0] * 25 + [1] * 96 + [2, 2, 3, 3, 3, 4, 4])           # moves, characters, none, walls, marks
        for name, x in dict(kinds=kinds, omega=torch.tensor(omega), axis=axis, table=seen).items():
            self.register_buffer(name, x, persistent=False)

    def angles(self, pos):
        """pos (..., 3) -> cos and sin (..., pairs) of each pair's angle."""
        angle = pos[..., self.axis] * self.omega
        return angle.cos(), angle.sin()

    def embed(self, ids, pos):
        return self.wte(ids) + self.kind(self.kinds[ids])                           # (..., C)

    def remember(self, ids, pos, sort):
        """The memory's ids (M, K), pos (M, K, 3), sort (M, K): -1 padding, 0 "no wall here", 1 wall, 2 text -> each block's keys and values."""
        x, (cos, sin), absent = self.ln_mem(self.embed(ids, pos)), self.angles(pos), torch.where(sort < 0, -torch.inf, 0.0)[:, None]
        return [b.attn.remember(x, cos, sin, self.table[sort.clamp(min=0)], absent) for b in self.blocks]

    def forward(self, ids, pos, memory, past=None, cells=0):
        """ids (M, n, T), pos (M, n, T, 3) -> logits (M, n, T, VOCAB), and the cache: each block's keys and values, then the last ids. The
        last `cells` tokens see all before them and themselves, not each other."""
        (cos, sin), T, new = self.angles(pos), ids.size(2), []
        # a token knows the one before it: else a letter, at which the next move is due, would not know the heading until the first block
        # has fetched it, and the heads of that block would look the same way for every heading
        before = torch.cat([past[-1] if past else torch.full_like(ids[..., :1], NULL), ids[..., :-1]], 2)
        before[..., T - cells:] = NULL
        x, S = self.embed(ids, pos) + self.before(before), T + (past[0][0].size(3) if past else 0)
        mask = torch.full((T, S), -torch.inf, device=ids.device).triu(S - T + 1)
        mask[T - cells:, S - cells:].fill_(-torch.inf).fill_diagonal_(0)            # without cells this square is empty
        for i, block in enumerate(self.blocks):
            x, kv = block(x, cos, sin, memory[i], mask, past[i] if past else None)
            new.append(kv)
        return self.head(self.ln_out(x)), [*new, ids[..., -1:]]

# ---- generation and evaluation -----------------------------------------------------------------------------------------------
@torch.inference_mode()
def generate(model, g, device, draw="code"):
    """Greedy, with a KV cache, all games at once. The harness adds up the displacements and knows no physics: a pen may go through
    walls or out of the field. -> tokens (M, n, L), and with draw="model" the grids (M, n, H, W) of ids that the model wrote."""
    arrays = MOVE + 4 * g["D"][..., 0], np.stack([g["R"][..., 0], g["C"][..., 0]], 2), model.shift, *model.memory(g)
    ids, place, shift, *memory = (torch.from_numpy(x).to(device) for x in arrays)
    memory = model.remember(*memory)
    alive, out, past = torch.ones_like(ids, dtype=torch.bool), [], None
    for s in range(2 * max(map(len, g["texts"])) + 1):
        pos = torch.cat([place, torch.full_like(place[..., :1], s // 2)], 2) * (ids != PAD)[..., None]
        logits, past = model(ids[..., None], pos[..., None, :].float(), memory, past)
        ids = torch.where(alive, logits[..., 0, :].argmax(-1), PAD)
        place = place + shift[ids]
        alive &= ids != END
        out.append(ids)
    tokens = torch.stack(out, 2).cpu().numpy()
    if draw == "code":
        return tokens, None
    # the model is asked for every cell, few at a time: cells do not see each other, but their scores are computed before they are masked
    (M, n), (H, W), grids = ids.shape, g["fields"].shape[1:], []
    T = torch.tensor([float(len(x)) for x in g["texts"]], device=device)[:, None, None, None]
    for at in torch.cartesian_prod(torch.arange(H), torch.arange(W)).float().to(device).split(128):
        pos = torch.cat([at.expand(M, n, -1, 2), T.expand(M, n, len(at), 1)], 3)                # (M, n, cells, 3)
        grids.append(model(torch.full(pos.shape[:3], CELL, device=device), pos, memory, past, cells=len(at))[0].argmax(-1))
    return tokens, torch.cat(grids, 2).view(M, n, H, W).cpu().numpy()

def read_path(g, tokens, grids=None, shift=SHIFT):
    """Tokens (M, n, L), and grids if the model drew them -> per game m, i, R, C, text, grid: where each letter was put, the final grid."""
    for m, i in np.ndindex(tokens.shape[:2]):
        letters = list(itertools.takewhile(lambda x: x != END, tokens[m, i, ::2]))
        text = "".join(SIGN[x] if CHAR <= x < END else " " for x in letters)
        R, C = np.cumsum([(g["R"][m, i, 0], g["C"][m, i, 0]), *shift[tokens[m, i, 1::2]]], 0)[:len(text)].T
        grid = drawn(g["fields"][m], R, C, text) if grids is None else grids[m, i]
        yield m, i, R, C, text, SIGN[grid[:g["H"][m], :g["W"][m]]]

def evaluate(model, args, quotes, device, games):
    """Rates over held-out games, each in its own maze. -> dict: exact_path, exact_grid, letters, direction, walls, by_time
    (letters right, in tens of steps) and by_bounce (pen in the right place when the k-th bounce is done)."""
    tally, by_time, by_bounce = (collections.defaultdict(list) for _ in range(3))
    for b in tqdm(range(0, games, 50), desc="evaluating", unit="x50 games", disable=None, leave=False):
        g = make_games(np.random.default_rng((args.seed, 2, b)), min(50, games - b), 1, quotes, args.height, args.width, args.bars)
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens, grids = generate(model, g, device, args.draw)
        want = model.tokens(g)[0][..., 1:]
        exact = ((tokens == want) | (want == PAD)).all(2)
        for m, i, R, C, text, grid in read_path(g, tokens, grids, model.shift):
            truth, field, wr, wc = g["texts"][m], g["fields"][m, :g["H"][m], :g["W"][m]], g["R"][m, i], g["C"][m, i]
            same = grid == SIGN[drawn(field, wr, wc, truth)]
            got = [*zip(R, C, text), *[(-1, -1, "")] * len(truth)]              # where the path ended too early it is nowhere
            there, right = np.array([(a[:2] == b[:2], a == b) for a, b in zip(got, zip(wr, wc, truth))]).T
            for name, x in dict(exact_path=exact[m, i], exact_grid=same.all(), direction=there[1], walls=same[field > 0].all()).items():
                tally[name].append(x)
            tally["letters"].extend(right)
            for t, ok in enumerate(right):
                by_time[t // 10].append(ok)
            for k, ok in enumerate(there[1:][np.diff(g["D"][m, i, :len(truth)]) != 0]):
                by_bounce[k].append(ok)
    return means(tally) | dict(by_time=[*means(by_time).values()], by_bounce=[*means(by_bounce).values()])

def draw_pen(field, R, C, text):
    """text written along R, C into field (H, W), a letter a step -> a picture for each step; its sides are divisible by 16, as video wants."""
    from PIL import Image, ImageDraw, ImageFont
    wall, font = np.zeros((2, 16, 16), np.uint8), ImageFont.load_default(size=16)
    wall[0, :, 7:10] = wall[1, 7:10] = 1                            # a cell is 16 x 16 pixels, a wall goes through the middle of its cell
    ink = np.pad(np.kron(field & 1, wall[0]) | np.kron(field >> 1, wall[1]), ((0, 32), (0, 0)))        # and two rows for the text
    page = np.where(ink[..., None], (52, 62, 80), (250, 248, 242)).astype(np.uint8)
    places = [(16 * int(c) + 8, 16 * int(r) + 8) for r, c in zip(R, C)]
    for t, (x, y) in enumerate(places, 1):
        frame = Image.fromarray(page)
        pencil = ImageDraw.Draw(frame)
        pencil.line(places[:t], fill=(240, 222, 190), width=5, joint="curve")
        for place, letter in {at: ch for at, ch in zip(places[:t], text) if ch != " "}.items():            # the last letter wins
            pencil.text(place, letter, font=font, fill=(160, 44, 36), anchor="mm")
        pencil.text((8, len(page) - 24), text[:t], font=font, fill=(96, 90, 84))
        pencil.ellipse((x - 8, y - 8, x + 8, y + 8), outline=(34, 120, 200), width=2)
        yield frame

def show(model, g, args, device):
    """One game in the terminal: what the model wrote, the truth beside it, and in red what differs."""
    *_, got = next(read_path(g, *generate(model, g, device, args.draw)))
    want = SIGN[drawn(g["fields"][0], g["R"][0, 0], g["C"][0, 0], g["texts"][0])]
    red = "\033[1;31m{}\033[0m" if sys.stdout.isatty() else "{}"
    print(f"{DIRECTIONS[g['D'][0, 0, 0]]}: {g['texts'][0]}\n\n{'the model':{len(got[0])}}   the truth")
    for a, b in zip(got, want):
        print(*(x if x == y else red.format("?" if x == " " else x) for x, y in zip(a, b)), "   ", *b, sep="")
    print(f"\n{(got != want).sum()} cells differ")

# ---- training --------------------------------------------------------------------------------------------------------------
def cells_of(g, rng, Q):
    """For --draw model: Q cells a game, half of them on its path -> pos (M, n, Q, 3), what stands there in the end (M, n, Q)."""
    pos, ids, n = [], [], g["R"].shape[1]
    for m, text in enumerate(g["texts"]):
        r, c = rng.integers(0, g["H"][m], (n, Q)), rng.integers(0, g["W"][m], (n, Q))
        t = rng.integers(0, len(text), (n, Q // 2))
        r[:, :Q // 2], c[:, :Q // 2] = np.take_along_axis(g["R"][m], t, 1), np.take_along_axis(g["C"][m], t, 1)
        pos.append(np.stack([r, c, np.full_like(r, len(text))], 2))
        ids.append([drawn(g["fields"][m], g["R"][m, i], g["C"][m, i], text)[r[i], c[i]] for i in range(n)])
    return np.array(pos, np.float32), np.array(ids, int)

def loss_of(model, g, device, cells=None, decoys=0, rng=None):
    """Mean cross-entropy of the next token over a batch of games, plus that of cells = (pos, ids), asked for after the path."""
    ids, pos = model.tokens(g)
    at, there = cells or (pos[:, :, :0], ids[:, :, :0])                 # without cells both are empty
    target, pos = np.concatenate([ids[:, :, 1:], there], 2), np.concatenate([pos[:, :, :-1], at], 2)
    ids = np.concatenate([ids[:, :, :-1], np.full_like(there, CELL)], 2)
    ids, pos, target, *memory = (torch.from_numpy(x).to(device) for x in (ids, pos, target, *model.memory(g, decoys, rng)))
    logits, _ = model(ids, pos, model.remember(*memory), cells=there.shape[2])
    return F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), ignore_index=PAD)

def train(args, quotes, file, device, kind=Bouncer):
    """Small mazes, then the asked sizes, going on from file if it is there. Under torchrun each process plays mazes of its own and
    gradients are averaged. -> model, seconds of training."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(args.seed)
    model = kind(args.n_layer, args.n_head, args.n_embd).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    state, losses = dict(step=0, seconds=0.0) | common.resume(file, model=model, optimizer=optimizer), []
    first, began = state["step"], time.time() - state["seconds"]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training", unit="step", disable=rank > 0 or None)
    for step in bar:
        rng = np.random.default_rng((args.seed, 1, step, rank))         # a batch depends on this alone: a resumed run sees the same
        # full sizes come late, when bounces are understood: what is new there is only that walls are many and far
        size = ([9, 12], [14, 22], 3.0) if step < args.small * args.steps or step % 2 else (args.height, args.width, args.bars)
        g = make_games(rng, args.mazes, args.balls, quotes, *size, args.noise_texts)
        optimizer.param_groups[0]["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(model, g, device, cells_of(g, rng, 48) if args.draw == "model" else None, args.decoys, rng)
        optimizer.zero_grad()
        loss.backward()
        for w in model.parameters() if world > 1 else []:
            dist.all_reduce(w.grad)
            w.grad /= world
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            sorry(f"the loss is not finite at step {step}; a smaller --lr may help")
        optimizer.step()
        if rank == 0 and ((step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps):
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.5f}")
            common.save_checkpoint(file, dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step + 1,
                                              seconds=time.time() - began))
    return model.eval(), time.time() - began

# ---- main ------------------------------------------------------------------------------------------------------------------
def checkpoint(args, quotes):
    """A model's file is named after all that shaped it but torchrun's number of processes: the same flags find it again."""
    shape = {k: getattr(args, k) for k in ("height width bars draw n_layer n_head n_embd steps small mazes balls lr warmup weight_decay "
                                           "grad_clip noise_texts decoys dtype seed").split()}
    return OUT / f"bounce_{hashlib.sha256(json.dumps([shape, quotes]).encode()).hexdigest()[:8]}.pt"

def main():
    args, began, device = get_args(), time.time(), common.pick_device()
    if args.score is not None:
        return common.log_result("bounce.py", args, metrics=score(args.score), seconds=time.time() - began)
    quotes, unseen = read_quotes(args.quotes)
    if args.export is not None:
        return export(args, (quotes, unseen))
    g = make_games(np.random.default_rng((args.seed, 4)), 1, 1, unseen, args.height, args.width, args.bars)
    if args.field is not None:
        with common.reading(args.field):
            g = one_game(pathlib.Path(args.field).read_text(encoding="utf-8").strip("\n").split("\n"), args.direction, args.text)
    args.dtype = common.fast_dtype(device) if args.dtype == "auto" else args.dtype
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    print(f"device {device}, {torch.get_num_threads()} threads, {args.dtype}; {len(quotes)} quotes to train on, {len(unseen)} held out")
    model, seconds = train(args, quotes, checkpoint(args, quotes), device)
    if dist.is_initialized() and dist.get_rank():
        return
    if args.show or args.field:
        return show(model, g, args, device)
    metrics = dict(parameters=sum(w.numel() for w in model.parameters()), train_seconds=round(seconds))
    tall, wide = (int(1.5 * x[1]) for x in (args.height, args.width))
    print(f"\n{metrics['parameters']:,} parameters, {seconds:.0f} s of training")
    long = sorted((f"{a} {b}" for a, b in zip(unseen, unseen[len(unseen) // 2:])), key=len)
    beyond = {"": (unseen, {}), f", {tall} x {wide}": (unseen, dict(height=[tall] * 2, width=[wide] * 2)),
              ", two quotes in one": (long, {}), ", twice the walls": (unseen, dict(bars=2 * args.bars))}
    for name, (texts, change) in beyond.items():            # 1.5 times the largest size, and what else it never saw
        games = max(1, args.games // (5 if name else 1))
        rates = evaluate(model, argparse.Namespace(**vars(args) | change), texts, device, games)
        by_time, by_bounce = (" ".join(f"{x:.3f}" for x in rates.pop(k)) for k in ("by_time", "by_bounce"))
        print(f"{games} held-out games{name}: " + "  ".join(f"{k} {v:.2%}" for k, v in rates.items()))
        if not name:
            print(f"  letters right, steps 0-9, 10-19, ...: {by_time}\n  in place after bounce 1, 2, ...: {by_bounce}")
        metrics.update({k + name: rates[k] for k in ("exact_path", "exact_grid")})
    _, _, R, C, text, _ = next(read_path(g, *generate(model, g, device)))
    if args.video and text:                                 # an untrained model may end before its first letter
        frames = list(draw_pen(g["fields"][0], R, C, text))
        metrics.update(video=str(OUT / "bounce.mp4"), picture=str(OUT / "bounce.png"))
        common.write_video(metrics["video"], map(np.asarray, frames + frames[-1:] * 20), fps=10)
        with common.whole_file(metrics["picture"]) as part:
            frames[-1].save(part)
    common.log_result("bounce.py", args, time.time() - began, metrics)

if __name__ == "__main__":
    common.run(main)
