"""bounce.py: the rule against plain cases and the seed's own picture, the model against SDPA and itself, its files, faults, resumes."""
import json, os, re, signal, subprocess, sys, time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

import bounce as b
import common
from conftest import ROOT, refused

FILES = ("data/quotes.txt",)
QUOTES = ["The rest is silence.", "Know thyself.", "To be, or not to be, that is the question.", "All the world's a stage."]
SIZE = dict(height=[9, 12], width=[14, 22], bars=3.0)


def games(seed, M=4, n=3, quotes=sorted(QUOTES, key=len), **size):
    return b.make_games(np.random.default_rng(seed), M, n, quotes, **dict(SIZE, **size))


def small_model(seed=0):
    torch.manual_seed(seed)
    m = b.Bouncer(2, 2, 64).eval()
    for name, w in m.named_parameters():                # sharp enough to see what it looks at
        torch.nn.init.normal_(w, mean=float(name.endswith("weight")), std=0.2) if w.dim() == 1 else w.data.mul_(3 if "qkv" in name or "head" in name else 1)
    return m


def tensors(arrays):
    return [torch.from_numpy(x) for x in arrays]


# ---- the maze and its physics ------------------------------------------------------------------------------------------------

# H = the wall across the column, V = across the row, X = on the diagonal -> which velocities flip (row, column)
RULE = {"": (0, 0), "V": (0, 0), "H": (0, 0), "VH": (1, 1), "X": (1, 1), "VX": (1, 0), "HX": (0, 1), "VHX": (1, 1)}


@pytest.mark.parametrize("walls", RULE)
@pytest.mark.parametrize("d", range(4))
def test_each_case_of_the_rule(walls, d):
    dr, dc = b.STEP[d]
    solid = {"V": (dr, 0), "H": (0, dc), "X": (dr, dc)}
    wall = lambda r, c: np.array([(r[0], c[0]) in [solid[w] for w in walls]])
    r, c, dr2, dc2 = (x[0] for x in b.bounce(wall, *(np.array([x]) for x in (0, 0, dr, dc))))
    fr, fc = RULE[walls]
    assert (dr2, dc2) == (-dr if fr else dr, -dc if fc else dc)
    assert (r, c) == (0 if fr else dr, 0 if fc else dc)


SEEDS_PICTURE = """
+-----------------------+------------------------+
|           I   s       |                        |
|            'm  o |    |                        |
+---------------  r|    |                        |
|  d              r|    |                        |
|t  o            y |    |                        |
|'                 |    |                        |
| n   t        D   |    |                        |
|  a   h      a         |                        |
|   c|  a    v          |            |           |
|    |   t  e         | |            |           |
|  I |    .,         -+-+----------              |
|    |                |                          |
|d       I            |                          |
|i      '                                        |
| a    m                                         |
|  r                                             |
|   fa                                           |
+------------------------------------------------+""".strip("\n").split("\n")


def test_the_seeds_own_picture():
    """The one worked example that the seed shows (github.com, cshimmin: bouncing-llama): its path came from an event-driven ball."""
    text = "I'm sorry Dave, I'm afraid I can't do that."
    bare = [re.sub(r"[^|+\- ]", " ", row) for row in SEEDS_PICTURE]
    bare[1] = bare[1][:12] + "*" + bare[1][13:]
    assert b.example(b.one_game(bare, "SE", text))["answer"].split("\n")[1:-1] == SEEDS_PICTURE


def test_10000_games_lead_back_to_their_starts():
    rng, n = np.random.default_rng(0), 100
    for _ in range(100):
        H, W = rng.integers(9, 27), rng.integers(14, 87)
        field = b.maze(rng, H, W, 6.0)
        free = np.argwhere(field == 0)
        r, c = free[rng.integers(0, len(free), n)].T
        dr, dc = b.STEP[rng.integers(0, 4, n)].T
        state, wall = (r, c, dr, dc), lambda r, c: field[r, c] > 0
        seen = [state]
        for _ in range(60):
            state = b.bounce(wall, *state)
            assert (field[state[0], state[1]] == 0).all()
            seen.append(state)
        for want in seen[::-1]:
            assert all(np.array_equal(x, y) for x, y in zip(state, want))
            r, c, dr, dc = b.bounce(wall, state[0], state[1], -state[2], -state[3])
            state = (r, c, -dr, -dc)


def test_paths_of_many_are_the_paths_of_each():
    g = games(0, M=5, n=4)
    for m in range(5):
        for i in range(4):
            r, c, (dr, dc) = g["R"][m, i, 0], g["C"][m, i, 0], b.STEP[g["D"][m, i, 0]]
            for t in range(1, g["R"].shape[2]):
                wall = lambda r, c: np.array([g["fields"][m, r[0], c[0]] > 0])
                r, c, dr, dc = (x[0] for x in b.bounce(wall, *(np.array([x]) for x in (r, c, dr, dc))))
                assert (r, c, (dr, dc)) == (g["R"][m, i, t], g["C"][m, i, t], tuple(b.STEP[g["D"][m, i, t]]))


def test_mazes_are_the_seeds():
    rng = np.random.default_rng(0)
    bars = []
    for _ in range(300):
        H, W = rng.integers(18, 27), rng.integers(32, 87)
        f = b.maze(rng, H, W, 4.0)
        assert (f[[0, -1]] & 2).all() and (f[:, [0, -1]] & 1).all() and f[0, 0] == 3
        for flag, view in ((1, f), (2, f.T)):
            inner = (view & flag)[:, 1:-1] > 0
            assert not (inner[:, 1:] & inner[:, :-1]).any()             # no two of one orientation side by side
            runs = [len(x) for col in inner.T for x in "".join(map(str, col.astype(int))).split("0") if x]
            assert all(n >= 2 for n in runs)
            bars.append(len(runs))
    assert 3.2 < np.mean(bars) < 4.1                    # Poisson(4), less those that found no room or touched end to end
    g = games(1, M=40, n=5)
    for m in range(40):
        r, c = g["R"][m, :, 0], g["C"][m, :, 0]
        assert (g["fields"][m, r, c] == 0).all() and (r >= 2).all() and (r < g["H"][m] - 2).all() and (c >= 2).all() and (c < g["W"][m] - 2).all()
        assert ((g["R"][m] != r[:, None]) | (g["C"][m] != c[:, None])).any(1).all()             # all of them move
    assert set(g["D"][..., 0].ravel()) == {0, 1, 2, 3}


def test_mazes_without_a_start_get_a_sentence(monkeypatch, capsys):
    """A ball walled in on all sides: at 6 x 6 one maze in a hundred has no cell that a ball can move out of."""
    monkeypatch.setattr(b, "maze", lambda rng, H, W, bars: np.pad(np.zeros((H - 2, W - 2), np.uint8), 1, constant_values=3) | np.uint8(np.add.outer(np.arange(H), np.arange(W)) % 2))
    with pytest.raises(SystemExit) as e:
        games(0, M=2, n=2)
    assert e.value.code == 2 and "--bars" in capsys.readouterr().err


def test_drawing_the_last_letter_wins_and_spaces_leave_the_cell():
    field = np.zeros((1, 4), np.uint8)
    assert "".join(b.SIGN[b.drawn(field, [0, 0, 0, 0, 9, -1], [0, 1, 0, 1, 0, 0], "ab cxy")][0]) == "ac  "


# ---- tokens --------------------------------------------------------------------------------------------------------------------

def test_tokens_say_the_path_and_stand_where_the_pen_is():
    g = games(2)
    ids, pos = b.pen(g)
    for m, i, R, C, text, _ in b.read_path(g, ids[..., 1:]):
        n = len(g["texts"][m])
        assert text == g["texts"][m] and np.array_equal(R, g["R"][m, i, :n]) and np.array_equal(C, g["C"][m, i, :n])
        assert ids[m, i, 0] == b.MOVE + 4 * g["D"][m, i, 0] and ids[m, i, 2 * n + 1] == b.END and (ids[m, i, 2 * n + 2:] == b.PAD).all()
        for s in range(2 * n + 2):
            assert tuple(pos[m, i, s]) == (g["R"][m, i, s // 2], g["C"][m, i, s // 2], s // 2)


def test_cells_are_asked_where_they_are():
    g = games(4)
    pos, ids = b.cells_of(g, np.random.default_rng(0), 16)
    for m, text in enumerate(g["texts"]):
        for i in range(3):
            last = {at: x for *at, x in zip(g["R"][m, i], g["C"][m, i], text) if x != " " for at in [tuple(at)]}
            for (r, c, t), x in zip(pos[m, i].astype(int), ids[m, i]):
                flag = g["fields"][m, r, c]
                assert t == len(text) and r < g["H"][m] and c < g["W"][m]
                assert x == b.WALL + flag if flag else chr(x - b.CHAR + 32) == last.get((r, c), " ")


# ---- model ---------------------------------------------------------------------------------------------------------------------

def test_attention_is_torchs():
    """Memory and own past under one softmax = SDPA over the two laid end to end, the memory repeated for every game."""
    torch.manual_seed(0)
    M, n, T, K, C, nh = 2, 3, 5, 7, 32, 4
    a, x, mem = b.Attention(C, nh), torch.randn(M, n, T, C), torch.randn(M, K, C)
    cos, sin = (f(torch.randn(M, n, T, C // nh // 2)) for f in (torch.cos, torch.sin))
    mcos, msin = (f(torch.randn(M, K, C // nh // 2)) for f in (torch.cos, torch.sin))
    axes, absent = (torch.rand(M, K, C // nh) > 0.5).float(), torch.where(torch.rand(M, 1, K) > 0.7, -torch.inf, 0.0)
    causal = torch.full((T, T), -torch.inf).triu(1)
    y, _ = a(x, cos, sin, a.remember(mem, mcos, msin, axes, absent), causal)
    for m in range(M):
        for i in range(n):
            q, k, v = (z.view(T, nh, -1).transpose(0, 1) for z in a.qkv(x[m, i]).chunk(3, -1))
            mk, mv = (z.view(K, nh, -1).transpose(0, 1) for z in a.memory(mem[m]).chunk(2, -1))
            k = torch.cat([b.rotate(mk * axes[m], mcos[m], msin[m]), b.rotate(k, cos[m, i], sin[m, i])], 1)
            mask = torch.cat([absent[m].expand(T, K), causal], 1)
            want = F.scaled_dot_product_attention(b.rotate(q, cos[m, i], sin[m, i]), k, torch.cat([mv, v], 1), attn_mask=mask)
            torch.testing.assert_close(y[m, i], a.proj(want.transpose(0, 1).reshape(T, C)), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_game_does_not_depend_on_its_company():
    """Other games in the maze, other mazes in the batch and the padding they bring change nothing."""
    model, g = small_model(), games(5)
    logits, _ = model(*tensors(b.pen(g)), model.remember(*tensors(b.memory_of(g))))
    m, i = 2, 1
    H, W, text = g["H"][m], g["W"][m], g["texts"][m]
    one = dict(fields=g["fields"][m:m + 1, :H, :W], H=np.array([H]), W=np.array([W]), texts=[text], D=g["D"][m:m + 1, i:i + 1, :len(text) + 1],
               R=g["R"][m:m + 1, i:i + 1, :len(text) + 1], C=g["C"][m:m + 1, i:i + 1, :len(text) + 1])
    alone, _ = model(*tensors(b.pen(one)), model.remember(*tensors(b.memory_of(one))))
    torch.testing.assert_close(logits[m, i, :alone.size(2)], alone[0, 0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_maze_may_stand_anywhere():
    """Shift walls and pen alike by rows and columns: the logits stay. This is what makes larger mazes possible."""
    model, g = small_model(), games(6)
    (ids, pos), (mem, at, sort) = tensors(b.pen(g)), tensors(b.memory_of(g))
    want, _ = model(ids, pos, model.remember(mem, at, sort))
    shift = torch.tensor([13.0, 40.0, 0.0])
    got, _ = model(ids, pos + shift, model.remember(mem, at + shift * (sort == 1)[..., None], sort))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
    moved, _ = model(ids, pos + torch.tensor([1.0, 0, 0]), model.remember(mem, at, sort))
    assert (moved - want).abs().max() > 0.01


@torch.no_grad()
def test_generation_with_the_cache_is_the_full_forward():
    """Feed back what was generated: each token is the argmax of the uncached logits, at positions that come from the model's own moves."""
    model, g = small_model(), games(7, M=2, n=2)
    out, _ = b.generate(model, g, "cpu")
    first, places = b.pen(g)
    ids = np.concatenate([first[..., :1], out], 2)
    move = b.SHIFT[ids]
    move[..., 0, :] = 0                                 # the first one is the prompt's, and has led to the start
    time = np.broadcast_to(np.arange(ids.shape[2]) // 2, ids.shape)[..., None]
    places = np.concatenate([np.stack([g["R"][..., :1], g["C"][..., :1]], -1) + move.cumsum(2), time], 3) * (ids != b.PAD)[..., None]
    logits, _ = model(torch.from_numpy(ids[..., :-1]), torch.from_numpy(places[..., :-1, :]).float(), model.remember(*tensors(b.memory_of(g))))
    best, alive = logits.argmax(-1).numpy(), out != b.PAD
    assert alive.any() and (best == out)[alive].all()


@torch.no_grad()
def test_cells_see_the_path_and_not_each_other():
    model, g = small_model(), games(8, M=2, n=2)
    (ids, pos), memory = tensors(b.pen(g)), model.remember(*tensors(b.memory_of(g)))
    at = torch.from_numpy(b.cells_of(g, np.random.default_rng(0), 6)[0])
    ask = lambda at: model(torch.cat([ids, torch.full(at.shape[:3], b.CELL)], 2), torch.cat([pos, at], 2), memory, cells=at.size(2))[0]
    all_six, plain = ask(at), model(ids, pos, memory)[0]
    torch.testing.assert_close(all_six[:, :, :ids.size(2)], plain)
    torch.testing.assert_close(all_six[:, :, -1], ask(at[:, :, -1:])[:, :, -1], atol=1e-5, rtol=1e-4)


def learned(steps=150, draw="code", balls=4):
    """A small model on one-quote games in tiny empty mazes: enough to see that it learns what it should."""
    torch.manual_seed(0)
    model, losses = b.Bouncer(2, 4, 64), []
    opt = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.98))
    for step in range(steps):
        rng = np.random.default_rng((5, step))
        g = b.make_games(rng, 4, balls, ["abcdefgh"], [8, 9], [8, 9], 0.0)
        loss = b.loss_of(model, g, "cpu", b.cells_of(g, rng, 12) if draw == "model" else None)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return model.eval(), losses


def test_it_learns_and_the_model_can_draw():
    model, losses = learned(draw="model")
    assert np.mean(losses[-10:]) < 0.15 * losses[0]
    g = b.make_games(np.random.default_rng(1), 30, 1, ["abcdefgh"], [8, 9], [8, 9], 0.0)
    tokens, grids = b.generate(model, g, "cpu", "model")
    text = [x for *_, x, _ in b.read_path(g, tokens)]
    assert np.mean([x == "abcdefgh" for x in text]) > 0.9
    wall = g["fields"][:, :8, :8] > 0
    assert (grids[:, 0, :8, :8][wall] == (b.WALL + g["fields"][:, :8, :8])[wall]).mean() > 0.95


# ---- files ---------------------------------------------------------------------------------------------------------------------

def singles(seed, n):
    for m in range(n):
        yield games((seed, m), M=1, n=1)


def test_prompts_are_read_back():
    for g in singles(9, 10):
        parts = b.example(g)["prompt"].split("\n\n")                       # the game's sentence, direction, text, field, "### Answer:"
        direction, text, field = (x.split("\n", 1)[1] for x in parts[1:4])
        back = b.one_game(field.split("\n")[1:-1], direction, text)
        assert back["texts"] == g["texts"] and all(np.array_equal(back[k], g[k]) for k in ("fields", "H", "W", "R", "C", "D"))


FIELD = ["+-----+", "|     |", "| *   |", "|     |", "|     |", "+-----+"]


@pytest.mark.parametrize("lines, says", [
    (FIELD[:2] + ["| *  |"] + FIELD[3:], "equally long"), ([x.replace("*", " ") for x in FIELD], "0 starts"), (FIELD[:3] + ["|*    |"] + FIELD[4:], "2 starts"),
    (FIELD[:1] + ["|  #  |"] + FIELD[2:], "'#'"), (["+- ---+"] + FIELD[1:], "hole"), (["+-*---+"] + [x.replace("*", " ") for x in FIELD[1:]], "hole"), ([], "fewer"), (["*"], "fewer")])
def test_malformed_fields_are_refused(lines, says):
    with pytest.raises(ValueError, match=says):
        b.one_game(lines, "SE", "hello")


@pytest.mark.parametrize("direction, text, says", [("N", "hello", "'N'"), ("SE", "", "empty"), ("SE", "na\u00efve", "ASCII"), ("SE", "a\nb", "ASCII")])
def test_odd_directions_and_texts_are_refused(direction, text, says):
    with pytest.raises(ValueError, match=says):
        b.one_game(FIELD, direction, text)


@pytest.mark.parametrize("name, raw, want", [
    ("a.txt", "One thing. -- Me\n\nTwo things.\none THING.\n".encode(), ["One thing.", "Two things."]),
    ("b.txt", "\ufeffNa\u00efve \u2018cr\u00eape\u2019\u2026\n".encode("utf-16"), ["Naive 'crepe'."]),
    ("c.txt", "caf\xe9 noir\n".encode("latin-1"), ["cafe noir"]),
    ("d.csv", b'author,quote\nMe,"First, this."\nYou,Second one\n', ["First, this.", "Second one"]),
    ("e.json", json.dumps([dict(quote="Alpha beta", author="x"), dict(text="Gamma ray"), "Plain one"]).encode(), ["Alpha beta", "Gamma ray", "Plain one"]),
    ("f.json", json.dumps(dict(me=["Alpha beta", "Gamma ray"])).encode(), ["Alpha beta", "Gamma ray"])])
def test_quotes_in_any_form(name, raw, want, tmp_path, capsys):
    filler = [f"number {i} of ten" for i in range(10)]
    if name.endswith(".json"):
        x = json.loads(raw)
        raw = json.dumps(x + filler if isinstance(x, list) else dict(x, more=filler)).encode()
    else:
        encoding = "utf-16" if raw[:2] == b"\xff\xfe" else "latin-1"
        raw = (raw.decode(encoding) + "".join(("x," if name.endswith("csv") else "") + f"{i}\n" for i in filler)).encode(encoding)
    (tmp_path / name).write_bytes(raw)
    got = sum(b.read_quotes(str(tmp_path / name)), [])
    assert sorted(set(got) - set(filler)) == sorted(want)
    assert ("1 duplicates" in capsys.readouterr().out) == (name == "a.txt")


def test_a_utf_16_file_that_is_cut_within_a_letter_is_read(tmp_path):
    text = "".join(f"number {i} of ten\n" for i in range(11)).encode("utf-16")
    (tmp_path / "q.txt").write_bytes(text[:-3])
    assert "number 9 of ten" in sum(b.read_quotes(str(tmp_path / "q.txt")), [])


def test_what_is_no_text_in_a_json_is_left_out(tmp_path):
    ten = [f"number {i} of ten" for i in range(10)]
    for content in ([*({"quote": x} for x in ten), {"quote": None}, {"quote": None}, 7], {"quotes": ten, "count": 11, "source": "http://x"},
                    {f"author {i}": x for i, x in enumerate(ten)}):
        (tmp_path / "q.json").write_text(json.dumps(content))
        assert sorted(sum(b.read_quotes(str(tmp_path / "q.json")), [])) == sorted(ten)


def test_the_quotes_that_ship():
    lines = (ROOT / FILES[0]).read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 500 and all(re.fullmatch(r"\S.{13,}\S -- \S.*\S", x) for x in lines)
    assert len({x.split(" -- ")[0].casefold() for x in lines}) == len(lines)
    train, unseen = b.read_quotes(str(ROOT / FILES[0]))
    assert not set(train) & set(unseen) and len(unseen) >= 50


def completions(n=12):
    return [dict(prompt=x["prompt"], completion=x["answer"]) for x in map(b.example, singles(10, n))]


def scored(rows, tmp_path):
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows).replace("\\u2028", "\u2028")        # others write it raw
    (tmp_path / "c.jsonl").write_text(text, encoding="utf-8")
    return b.score(str(tmp_path / "c.jsonl"))


def test_a_space_says_nothing_of_the_direction(tmp_path):
    g = b.one_game(FIELD, "SE", "A cat")
    row = b.example(g)
    blank = "```\n" + row["prompt"].split("```\n")[1].replace("*", " ") + "```"
    r = scored([dict(row, completion=blank)], tmp_path)
    assert r["compared"] == 1 and "direction" not in r


def test_an_answer_that_ends_at_once_is_counted_wrong(monkeypatch):
    args = b.get_args(["--smoke"])
    args.dtype, model = "float32", b.Bouncer(args.n_layer, args.n_head, args.n_embd).eval()
    quotes = ["a thing or two", "what is it now"] * 6
    monkeypatch.setattr(b, "generate", lambda model, g, *more, real=b.generate: (np.full_like(real(model, g, *more)[0], b.END), None))
    rates = b.evaluate(model, args, quotes, "cpu", 3)
    assert rates["exact_path"] == rates["letters"] == rates["direction"] == 0


def test_scores(tmp_path):
    good = completions()
    assert scored(good, tmp_path) == dict(completions=12, compared=12, wrong={}, exact_grid=1.0, letters=1.0, direction=1.0, walls=1.0)
    blank = [dict(x, completion="```\n" + x["prompt"].split("```\n")[1].replace("*", " ") + "```") for x in good]
    r = scored(blank, tmp_path)
    assert r["compared"] == 12 and r["exact_grid"] == r["letters"] == r["direction"] == 0 and r["walls"] == 1
    r = scored(good[:6] + ["{", dict(prompt="x", completion="y"), dict(good[6], completion="no fence"), dict(good[7], completion="```\n|\n```"),
                           dict(good[8], completion=good[8]["completion"][:-4]), 7], tmp_path)
    assert r["completions"] == 12 and r["compared"] == 7 and abs(r["exact_grid"] - 7 / 12) < 1e-9
    assert r["wrong"] == {"no JSON with a prompt of --export's form and a completion": 3, "no fenced grid": 1, "a grid of another size": 1}
    r = scored([dict(good[0], completion=good[0]["completion"] + "\u2028"), dict(good[1], completion=None)], tmp_path)
    assert r["completions"] == 2 and r["compared"] == 1 and r["exact_grid"] == 0.5


GOOD = completions(4)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(GOOD), st.sampled_from(["prompt", "completion"]), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40), st.text(max_size=4)), max_size=4))
def test_a_thousand_broken_completions(tmp_path_factory, row, which, cuts):
    x = row[which]
    for at, n, put in cuts:
        x = x[:at % (len(x) + 1)] + put + x[at % (len(x) + 1) + n:]
    r = scored([dict(row, **{which: x}), row], tmp_path_factory.getbasetemp())
    assert r["completions"] == 2 and r["compared"] + sum(r["wrong"].values()) == 2 and r["exact_grid"] >= 0.5


# ---- the whole script ------------------------------------------------------------------------------------------------------------

def test_smoke_alone_then_show_export_score(alone):
    r = alone("bounce.py", "--smoke", files=FILES)
    assert r.returncode == 0, r.stderr
    row = json.loads((alone.folder / "out/results.jsonl").read_text())
    assert row["metrics"]["parameters"] > 0 and (alone.folder / row["metrics"]["video"]).stat().st_size > 1000 and (alone.folder / "out/bounce.png").exists()
    r = alone("bounce.py", "--smoke", "--show")
    assert r.returncode == 0 and "cells differ" in r.stdout
    (alone.folder / "f.txt").write_text("\n".join(FIELD))
    r = alone("bounce.py", "--smoke", "--field", "f.txt", "--text", "hello", "--direction", "NE")
    assert r.returncode == 0 and "NE: hello" in r.stdout
    r = alone("bounce.py", "--smoke", "--export", "out/x.jsonl")
    train, held = ([json.loads(x) for x in (alone.folder / f"out/{n}.jsonl").read_text().splitlines()] for n in ("x", "x_heldout"))
    assert len(train) == 20 and len(held) == 5 and not {x["prompt"].split("```")[1] for x in train} & {x["prompt"].split("```")[1] for x in held}
    (alone.folder / "c.jsonl").write_text("".join(json.dumps(dict(x, completion=x["answer"])) + "\n" for x in held))
    r = alone("bounce.py", "--score", "c.jsonl")
    assert r.returncode == 0 and "exact_grid 1" in r.stdout


@pytest.mark.parametrize("flags, says", [
    (["--stepps", "3"], "--stepps"), (["--steps", "0"], "--steps"), (["--width", "40", "30"], "--width"), (["--n_embd", "100"], "--n_embd"),
    (["--seed", "-1"], "--seed"), (["--bars", "nan"], "--bars"), (["--field", "good.txt", "--text", "na\u00efve"], "ASCII"),
    (["--quotes", "none.txt"], "none.txt"), (["--quotes", "bin.txt"], "binary"), (["--quotes", "few.txt"], "at least 10"), (["--quotes", "bad.json"], "bad.json"),
    (["--score", "none.jsonl"], "none.jsonl"), (["--score", "bin.txt"], "bin.txt"), (["--score", "empty.jsonl"], "no completions"),
    (["--field", "bad.txt"], "2 starts"), (["--field", "none.txt"], "none.txt")])
def test_mistakes_get_a_sentence(flags, says, tmp_path, monkeypatch, capsys):
    for name, raw in {"good.txt": "\n".join(FIELD).encode(), "bin.txt": b"\x00\xff\x01" * 9, "few.txt": b"one\n", "bad.json": b"[[[", "empty.jsonl": b"\n", "bad.txt": "\n".join(FIELD[:3] + ["|*    |"] + FIELD[4:]).encode()}.items():
        (tmp_path / name).write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bounce.py", "--smoke", *flags])
    with pytest.raises(SystemExit) as e:
        common.run(b.main)
    err = capsys.readouterr().err.strip()
    assert e.value.code == 2 and says in err and "\n" not in err and not (tmp_path / "out").exists()


def weights(folder):
    (file,) = (folder / "out").glob("bounce_*.pt")
    return torch.load(file, weights_only=True)["model"]


def test_killed_and_resumed_is_never_stopped(alone, tmp_path_factory):
    flags = ("--smoke", "--steps", "120", "--small", "0.5", "--no-video", "--games", "1")
    assert alone("bounce.py", *flags, files=FILES).returncode == 0
    want, folder = weights(alone.folder), alone.folder
    for x in (folder / "out").iterdir():
        x.unlink()
    p = subprocess.Popen([sys.executable, "bounce.py", *flags], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((folder / "out").glob("bounce_????????.pt")):
        time.sleep(0.02)
        assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert alone("bounce.py", *flags).returncode == 0
    assert all(torch.equal(want[k], v) for k, v in weights(folder).items())
    (file,) = (folder / "out").glob("bounce_*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    assert "remove it" in refused(alone("bounce.py", *flags))


def test_two_processes_share_their_gradients(alone):
    """torchrun with two processes = the mean of both gradients: played again here in one."""
    flags = ["--smoke", "--steps", "3", "--dtype", "float32", "--no-video", "--games", "1"]
    alone("bounce.py", "--help", files=FILES)
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "bounce.py", *flags], cwd=alone.folder,
                       capture_output=True, text=True, timeout=120, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert r.returncode == 0, r.stderr[-2000:]
    args = b.get_args(["--smoke", *flags[1:]])
    quotes, _ = b.read_quotes(str(ROOT / FILES[0]))
    torch.manual_seed(0)
    model = b.Bouncer(args.n_layer, args.n_head, args.n_embd)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    for step in range(3):
        loss = 0
        for rank in (0, 1):
            rng = np.random.default_rng((0, 1, step, rank))
            size = ([9, 12], [14, 22], 3.0) if step < args.small * 3 or step % 2 else (args.height, args.width, args.bars)
            loss = loss + b.loss_of(model, b.make_games(rng, args.mazes, args.balls, quotes, *size, args.noise_texts), "cpu", None, args.decoys, rng) / 2
        opt.param_groups[0]["lr"] = args.lr * min((step + 1) / args.warmup, 0.55 + 0.45 * np.cos(np.pi * step / 3))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        opt.step()
    for k, v in weights(alone.folder).items():
        torch.testing.assert_close(v, model.state_dict()[k], atol=2e-5, rtol=1e-3)


# ---- the comparison's other layouts ------------------------------------------------------------------------------------------------

sys.path.insert(0, str(ROOT / "tests/bench"))
import compare_bounce as cb


def test_plain_moves_say_the_path():
    g, model = games(2), cb.PenPlain(2, 2, 64)
    for m, i, R, C, text, _ in b.read_path(g, model.tokens(g)[0][..., 1:], shift=model.shift):
        n = len(g["texts"][m])
        assert text == g["texts"][m] and np.array_equal(R, g["R"][m, i, :n]) and np.array_equal(C, g["C"][m, i, :n])


@pytest.mark.parametrize("kind", [cb.Raster2D, cb.Raster1D])
def test_raster_tokens_say_the_grid(kind):
    g, model = games(3), kind(2, 2, 64)
    ids, pos = model.tokens(g)
    for m, text in enumerate(g["texts"]):
        field = g["fields"][m, :g["H"][m], :g["W"][m]]
        for i in range(3):
            l = field.size + len(field)
            rows = ids[m, i, 1:l + 1].reshape(len(field), -1)
            assert (rows[:, :-1] == b.drawn(field, g["R"][m, i], g["C"][m, i], text)).all() and (rows[:, -1] == b.NEWLINE).all() and ids[m, i, l + 1] == b.END
            if kind is cb.Raster2D:                     # a token stands where the next one is written
                assert [tuple(x[:2]) for x in pos[m, i, 1:l].astype(int)] == [divmod(k, field.shape[1] + 1) for k in range(1, l)]


@torch.no_grad()
@pytest.mark.parametrize("name", cb.LAYOUTS)
def test_no_layout_depends_on_its_company(name):
    torch.manual_seed(0)
    model, g, m = cb.LAYOUTS[name](2, 2, 64).eval(), games(5), 2
    grid = b.drawn(g["fields"][m, :g["H"][m], :g["W"][m]], g["R"][m, 1, :1], g["C"][m, 1, :1], "*")
    one = b.one_game(["".join(row) for row in b.SIGN[grid]], list(b.DIRECTIONS)[g["D"][m, 1, 0]], g["texts"][m])
    logits, alone = (model(*tensors(model.tokens(x)), model.remember(*tensors(model.memory(x))))[0] for x in (g, one))
    torch.testing.assert_close(logits[m, 1, :alone.size(2)], alone[0, 0], atol=1e-4, rtol=1e-4)
