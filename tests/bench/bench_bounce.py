"""Speeds of bounce.py as ratios against its peers, side by side in one run: python tests/bench/bench_bounce.py

physics:    simulated steps per second of paths() against the same rule in a plain Python loop (asked: 100,000 on one core)
training:   gradient steps per second against nn.TransformerDecoder of the same layers, width, heads and feed-forward: its memory is
            the same tokens, repeated for each game of a maze, its positions are added, its attention is torch's own. Both in bfloat16
generation: greedy tokens per second, ours with its cache against nn.TransformerDecoder without one, as it comes
Each pair is measured in turns, five times; printed are medians and the spread of the ratio.
"""
import pathlib, platform, sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import bounce as b
from timing import in_turns, show

QUOTES = sorted((" ".join(["word"] * n) for n in range(6, 16)), key=len)
SIZES = dict(small=dict(height=[9, 12], width=[14, 22], bars=2.0), full=dict(height=[18, 26], width=[32, 86], bars=4.0))


class Peer(nn.Module):
    """The obvious alternative: torch's decoder, tokens and memory with the same positions added."""
    def __init__(self, n_layer=3, n_head=4, C=128):
        super().__init__()
        self.wte, self.pos, self.head = nn.Embedding(b.VOCAB, C), nn.Linear(3, C), nn.Linear(C, b.VOCAB)
        layer = nn.TransformerDecoderLayer(C, n_head, 4 * C, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, n_layer)

    def forward(self, ids, pos, mem, at, sort):
        M, n, T = ids.shape
        memory = (self.wte(mem) + self.pos(at)).repeat_interleave(n, 0)
        x = (self.wte(ids) + self.pos(pos)).flatten(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        pad = torch.zeros(sort.shape).masked_fill(sort < 0, -torch.inf).repeat_interleave(n, 0)
        return self.head(self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=pad, tgt_is_causal=True)).view(M, n, T, -1)


def physics():
    rng = np.random.default_rng(0)
    g = b.make_games(rng, 64, 16, QUOTES, **SIZES["full"])
    r, c, d = (g[k][..., 0] for k in "RCD")

    def ours():
        b.paths(g["fields"], r, c, d, 50)
        return r.size * 50

    games = [((g["fields"][i] > 0).tolist(), int(r[i, 0]), int(c[i, 0]), *b.STEP[d[i, 0]].tolist()) for i in range(20)]

    def loop():
        for solid, y, x, dy, dx in games:
            for _ in range(50):
                V, H, X = solid[y + dy][x], solid[y][x + dx], solid[y + dy][x + dx]
                fy, fx = (V or not H, H or not V) if X else (V and H, V and H)
                y, x, dy, dx = y + dy * (not fy), x + dx * (not fx), -dy if fy else dy, -dx if fx else dx
        return len(games) * 50
    show("physics", "steps/s", in_turns(5, paths=ours, loop=loop), "paths", {"loop": "of paths: 100,000 steps/s on one core"})


def training(size):
    ours, peer = b.Bouncer(3, 4, 128), Peer()
    g = b.make_games(np.random.default_rng(0), 8, 6, QUOTES, **SIZES[size])

    def step(model, loss):
        opt = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def job():
            with torch.autocast("cpu", torch.bfloat16):
                value = loss()
            opt.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            return 1
        job()
        return job

    def theirs():                                       # from the games on, as loss_of is
        ids, pos, *memory = (torch.from_numpy(x) for x in (*b.pen(g), *b.memory_of(g)))
        logits = peer(ids[..., :-1], pos[..., :-1, :], *memory)
        return F.cross_entropy(logits.flatten(0, 2).float(), ids[..., 1:].flatten(), ignore_index=b.PAD)

    show(f"training, {size} mazes, {sum(w.numel() for w in ours.parameters()):,} and {sum(w.numel() for w in peer.parameters()):,} parameters", "steps/s",
         in_turns(5, ours=step(ours, lambda: b.loss_of(ours, g, "cpu")), TransformerDecoder=step(peer, theirs)), "ours", dict(TransformerDecoder="none"))


@torch.inference_mode()
def generation():
    ours, peer = b.Bouncer(3, 4, 128).eval(), Peer().eval()
    g = b.make_games(np.random.default_rng(0), 16, 1, QUOTES[-1:], **SIZES["full"])
    ids, pos = (torch.from_numpy(x) for x in b.pen(g))
    memory, L = [torch.from_numpy(x) for x in b.memory_of(g)], ids.size(2)
    ours.head.weight[b.END] = 0                         # a logit of 0 is never the largest: it does not end early, both write L - 1 tokens

    def cached():
        with torch.autocast("cpu", torch.bfloat16):
            return b.generate(ours, g, "cpu")[0].size

    def plain():
        with torch.autocast("cpu", torch.bfloat16):
            for s in range(1, L):
                peer(ids[..., :s], pos[..., :s, :], *memory)[..., -1, :].argmax(-1)
        return 16 * (L - 1)
    show("generation, 16 full-size games", "tokens/s", in_turns(3, ours=cached, TransformerDecoder=plain), "ours", dict(TransformerDecoder="none"))


if __name__ == "__main__":
    print(f"{platform.machine()} x{torch.get_num_threads()} threads, torch {torch.__version__}")
    physics()
    for size in SIZES:
        training(size)
    generation()
