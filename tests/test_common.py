"""common.py: sampling and beam search against definitions and brute force, files, downloads, pictures."""
import http.server, itertools, json, os, sys, threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import common


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_top_k_and_top_p_keep_exactly_their_tokens(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 12, generator=g) * 2
    p = logits.softmax(-1)[0]
    order = p.argsort(descending=True).tolist()
    for k, top_p in ((3, 1.0), (0, 0.7), (5, 0.5)):
        allowed = order[:k] if k else order
        q = p[allowed] / p[allowed].sum()                   # the nucleus is taken of what top-k left
        n = int((q.cumsum(0) < top_p).sum()) + 1
        allowed = set(allowed[:n])
        drawn = set(common.sample(logits.repeat(4000, 1), top_k=k, top_p=top_p, generator=g).tolist())
        assert drawn <= allowed
        assert {i for i in allowed if p[i] > 0.02} <= drawn


def test_sample_frequencies_follow_temperature():
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    for T in (0.5, 1.0, 2.0):
        x = common.sample(logits.repeat(40000, 1), temperature=T, generator=torch.Generator().manual_seed(0))
        assert np.allclose(np.bincount(x, minlength=3) / 40000, (logits / T).softmax(-1)[0], atol=0.012)
    assert common.sample(logits, temperature=0).item() == 0


def test_penalize_is_ctrls():
    s = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    out = common.penalize(s, torch.tensor([[0, 1, 1]]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0, 0.5]]
    assert common.sample(s, temperature=0, repetition_penalty=3.0, ids=torch.tensor([[0]])).item() == 2


def markov(V, seed):
    """A step() whose next-token logits depend on the whole prefix, so that no two prefixes are alike."""
    def logits(ids):
        rows = [np.random.default_rng([seed, *row]).standard_normal(V) * 2 for row in ids.tolist()]
        return torch.tensor(np.array(rows), dtype=torch.float32)
    return lambda ids, parent: logits(ids)


def brute_force(step, prompt, n, V, eos, length_penalty):
    """Every sequence that ends in eos or at n tokens, scored alone: the truth that a wide beam must find."""
    best = None
    for length in range(1, n + 1):
        for seq in itertools.product(range(V), repeat=length):
            if any(t in eos for t in seq[:-1]) or (length < n and seq[-1] not in eos):
                continue
            ids, total = list(prompt), 0.0
            for t in seq:
                total += step(torch.tensor([ids]), None).log_softmax(-1)[0, t].item()
                ids.append(t)
            score = total / length**length_penalty
            if best is None or score > best[1]:
                best = (ids, score)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beam_is_brute_force(seed, length_penalty):
    V, n, eos = 3, 5, (2,)
    step = markov(V, seed)
    want = brute_force(step, [1, 0], n, V, eos, length_penalty)
    # length_penalty 1 can prefer longer sequences than the early stop waits for; without an eos both look to the end
    if length_penalty:
        eos, want = (), brute_force(step, [1, 0], n, V, (), length_penalty)
    ids, score = common.beam_search(step, [1, 0], width=V**n, max_new=n, eos=eos, length_penalty=length_penalty)
    assert ids == want[0] and score == pytest.approx(want[1], abs=1e-4)


def test_beam_of_one_is_greedy():
    step = markov(7, 5)
    ids = [3]
    for _ in range(12):
        ids.append(step(torch.tensor([ids]), None).argmax().item())
    assert common.beam_search(step, [3], width=1, max_new=12)[0] == ids


def test_beam_parents_follow_a_cache():
    """A cache re-ordered by `parent` must hold, row for row, the prefixes that `ids` shows."""
    cache, inner = [], markov(5, 1)

    def step(ids, parent):
        if cache:
            cache[0] = [cache[0][p] + [i] for p, i in zip(parent.tolist(), ids[:, -1].tolist())]
        else:
            cache.append([[0] for _ in range(len(ids))])
        assert cache[0] == ids.tolist()
        return inner(ids, parent)
    common.beam_search(step, [0], width=4, max_new=8, eos=(4,))


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_beam_search_is_transformers(width, length_penalty):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(width)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.6)).eval()
    for seed in range(3):
        prompt = torch.randint(1, 23, (1, 4), generator=torch.Generator().manual_seed(seed))
        for penalty in (1.0, 1.4):
            want = model.generate(prompt, num_beams=width, max_new_tokens=12, do_sample=False, eos_token_id=[5, 9], pad_token_id=0, early_stopping=False,
                                  length_penalty=length_penalty, repetition_penalty=penalty, attention_mask=torch.ones_like(prompt))[0].tolist()
            with torch.inference_mode():
                step = lambda ids, parent: model(ids).logits[:, -1]
                if width == 1:      # greedy there penalizes logits, not log-probabilities
                    ids = prompt
                    for _ in range(12):
                        ids = torch.cat([ids, common.sample(step(ids, None), temperature=0, repetition_penalty=penalty, ids=ids)[:, None]], 1)
                        if ids[0, -1].item() in (5, 9):
                            break
                    got = ids[0].tolist()
                else:
                    got = common.beam_search(step, prompt[0].tolist(), width, 12, (5, 9), length_penalty, penalty)[0]
            assert got == want


# ---- files -------------------------------------------------------------------------------------------------------------------

def test_whole_file_keeps_the_old_one_when_writing_fails(tmp_path):
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, dict(x=torch.ones(3), step=1))
    with pytest.raises(ZeroDivisionError):
        with common.whole_file(path) as part:
            part.write_bytes(b"half")
            1 / 0
    assert common.resume(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_whole_file_leaves_a_living_run_its_part_and_clears_a_dead_ones(tmp_path):
    import subprocess, sys
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, dead = (tmp_path / f"a.unfinished-{pid}.pt" for pid in (os.getppid(), gone.pid))
    others = [tmp_path / name for name in ("a.unfinished-x.pt", f"a.part{gone.pid}.pt", "a.partial.pt", f"ab.unfinished-{gone.pid}.pt")]     # a user's own
    for p in (mine, dead, *others):
        p.write_bytes(b"half")
    with common.whole_file(tmp_path / "a.pt") as part:
        part.write_bytes(b"whole")
    assert mine.exists() and not dead.exists() and all(p.exists() for p in others) and (tmp_path / "a.pt").read_bytes() == b"whole"


def test_a_word_without_a_flag_gets_a_sentence(capsys):
    for argv, says in ((["1200"], "a value stands where no flag asks for one"), (["--keey=secret", "--x"], "there is no flag --keey, --x")):
        with pytest.raises(SystemExit):
            common.Flags("doc").parse_args(argv)
        err = capsys.readouterr().err
        assert says in err and "secret" not in err


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    path = tmp_path / "a.pt"
    common.save_checkpoint(path, dict(step=1))
    with pytest.raises(SystemExit) as e:
        with common.whole_file(path) as part:
            part.write_bytes(b"something")
            with open("/dev/full", "wb") as f:
                f.write(b"x" * 100_000)
    assert e.value.code == 2 and "No space left" in capsys.readouterr().err
    assert common.resume(path)["step"] == 1


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)
    torch.save(dict(x=Evil()), tmp_path / "evil.pt")
    with pytest.raises(SystemExit):
        common.resume(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def server():
    """A loopback server of 3 MB that drops the first connection half way, and honours Range."""
    body = np.random.default_rng(0).bytes(3 << 20)
    seen = []

    class H(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
            seen.append(first)
            if self.path == "/missing":
                return self.send_error(404)
            if first >= len(body):
                return self.send_error(416)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            self.wfile.write(body[first:first + (1 << 20)] if len(seen) == 1 else body[first:])

        def log_message(self, *a):
            pass
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), H)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{s.server_port}", body, seen
    s.shutdown()


def test_download_goes_on_where_it_was_cut(server, tmp_path, capsys):
    import hashlib
    url, body, seen = server
    digest, path = hashlib.sha256(body).hexdigest(), tmp_path / "x" / "file.bin"
    with pytest.raises(SystemExit):
        common.download(url + "/f", path, size=len(body), sha256=digest)
    assert not path.exists() and "goes on" in capsys.readouterr().err
    common.download(url + "/f", path, size=len(body), sha256=digest)
    assert path.read_bytes() == body and seen[1] > 0
    with pytest.raises(SystemExit):
        common.download(url + "/g", tmp_path / "g", sha256="0" * 64)
    assert not (tmp_path / "g").exists()
    with pytest.raises(SystemExit):
        common.download(url + "/missing", tmp_path / "h")
    assert "404" in capsys.readouterr().err


def test_a_download_is_not_packed_for_the_way(serve, tmp_path):
    """A server that packs what it may would send other lengths than the file's, and a cut download could not go on."""
    seen = []

    def do_GET(handler):
        seen.append(handler.headers["Accept-Encoding"])
        handler.send_response(200), handler.send_header("Content-Length", "4"), handler.end_headers()
        handler.wfile.write(b"body")
    server = serve(lambda *a: None)
    server.RequestHandlerClass = type("Get", (server.RequestHandlerClass,), dict(do_GET=do_GET))
    assert common.download(server.url + "/f", tmp_path / "f").read_bytes() == b"body" and seen == ["identity"]


def test_an_unreachable_host_is_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        common.download("http://127.0.0.1:9/x", tmp_path / "x")     # the discard port: nobody listens
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1 and "127.0.0.1:9" in err


# ---- pictures ----------------------------------------------------------------------------------------------------------------

def test_capsule_covers_its_area_and_nothing_else():
    view = common.SideView(320, 160, scale=100)
    blank = view.frame([], [], 0.0).astype(int)
    img = view.frame([(-0.5, 0.6, 0.5, 0.6, 0.1)], [(255, 0, 0)], 0.0).astype(int)
    changed = (np.abs(img - blank).sum(2) > 60)[:view.ground - 20]
    area = (1.0 * 0.2 + np.pi * 0.1**2) * 100**2                # a rectangle and two half discs, in pixels
    assert abs(changed.sum() - area) < 0.06 * area
    assert (view.frame([(50, 1, 51, 1, 0.1)], [(255, 0, 0)], 0.0) == blank).all()           # out of the picture
    rows, cols = np.nonzero(changed)
    assert abs(cols.mean() - 160) < 1 and abs(rows.mean() - (view.ground - 60)) < 1


def test_the_floor_scrolls_with_the_camera():
    view = common.SideView()
    a, b, c = (view.frame([], [], x)[view.ground + 30] for x in (0.0, 0.5, 2.0))
    assert (a != b).any() and np.abs(a.astype(int) - c).max() <= 2                          # a period is two chequers


def test_text_stays_in_the_picture():
    view = common.SideView(320, 160)
    assert (view.frame([], [], 0, ["target 1200"]) != view.frame([], [], 0)).any()
    assert view.frame([], [], 0, ["x" * 200] * 20).shape == (160, 320, 3)


def test_video_has_its_frames_and_rate(tmp_path):
    import imageio.v2 as imageio
    view = common.SideView(320, 160)
    common.write_video(tmp_path / "v.mp4", (view.frame([(0, .5, .3, .5, .05)], [(255, 0, 0)], t / 10) for t in range(30)))
    with imageio.get_reader(tmp_path / "v.mp4") as r:
        meta, frames = r.get_meta_data(), [f for f in r]
    assert meta["fps"] == 20 and len(frames) == 30 and frames[0].shape == (160, 320, 3)
    assert np.abs(frames[20].astype(int) - view.frame([(0, .5, .3, .5, .05)], [(255, 0, 0)], 2.0)).mean() < 6


def test_the_result_line_can_be_read_back(tmp_path, monkeypatch, capsys):
    import argparse
    monkeypatch.chdir(tmp_path)
    common.log_result("x.py", argparse.Namespace(seed=3, lr=0.1), 1.5, dict(reached=np.float64(2.5)))
    row = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert row["seed"] == 3 and row["metrics"]["reached"] == 2.5 and row["flags"]["lr"] == 0.1
    assert 50 < row["peak_mb"] < 50_000 and row["threads"] >= 1         # torch alone takes over 50 MiB
    assert capsys.readouterr().out == "result x.py: reached 2.5\n"


def test_a_package_that_is_not_there_gets_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    for plugin in [m for m in sys.modules if "ffmpeg" in m and m != "imageio_ffmpeg"]:
        monkeypatch.delitem(sys.modules, plugin)                            # one that was loaded before would not ask again
    with pytest.raises(SystemExit) as e:
        common.run(lambda: common.write_video(tmp_path / "x.mp4", [np.zeros((32, 32, 3), np.uint8)]))
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and "pip install" in said and not list(tmp_path.iterdir())
