"""pythia_adapter.py against transformers' GPT-NeoX, the original's parameter counts, gymnasium; its faults, its resumes, its idea."""
import http.server, json, os, pathlib, signal, subprocess, sys, threading, time

import numpy as np
import pytest
import torch

import common
import dt_cheetah as dt
import pythia_adapter as pa
from conftest import refused

ALONE = ("dt_cheetah.py", "data/cheetah_ladder.npz")
# 70m and 410m in miniature: their proportions of heads, layers and rotary dimensions
MINI = {"70m": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4), "410m": dict(hidden_size=96, num_hidden_layers=6, num_attention_heads=6),
        "1b": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1)}


def reference(folder, size="70m", **kw):
    """A random GPTNeoXForCausalLM with weights large enough that everything matters, saved to folder."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    shape = MINI[size]
    torch.manual_seed(0)
    ref = GPTNeoXForCausalLM(GPTNeoXConfig(**{**shape, "intermediate_size": 4 * shape["hidden_size"], "vocab_size": 101, **kw})).eval()
    for name, p in ref.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.1)
    ref.save_pretrained(folder)
    return ref


def rewrite(folder, **change):
    """Change fields of a config.json; None takes one away."""
    config = json.loads((folder / "config.json").read_text())
    config.update(change)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def off(folder, ref, ids):
    """How far our logits are from transformers': the trunk is ours, the words' embeddings at both ends are the reference's."""
    embed_in, embed_out = ref.get_input_embeddings(), ref.get_output_embeddings()
    with torch.no_grad():
        mask = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril()[None, None]
        ours, theirs = embed_out(pa.load_trunk(folder)(embed_in(ids), mask)), ref(ids).logits
    assert theirs.std() > 0.5
    return (ours - theirs).abs().max()


# ---- the trunk -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", list(MINI))
@pytest.mark.parametrize("parallel", [True, False])
def test_logits_are_transformers(tmp_path, size, parallel):
    ref = reference(tmp_path, size, use_parallel_residual=parallel)
    assert off(tmp_path, ref, torch.randint(0, 101, (3, 33))) < 1e-4


@pytest.mark.parametrize("fields", ["old", "new", "flat"])
def test_old_and_new_names_of_the_rotary_numbers(tmp_path, fields):
    """Pythia's own files say rotary_pct and rotary_emb_base; newer ones partial_rotary_factor and rope_theta."""
    ref = reference(tmp_path, rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5, rope_type="default"))
    change = dict(old=dict(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500), new={},
                  flat=dict(rope_parameters=None, partial_rotary_factor=0.5, rope_theta=500))[fields]
    rewrite(tmp_path, **change)
    cfg = pa.load_trunk(tmp_path).cfg
    assert (cfg.theta, cfg.rot) == (500, 8) and off(tmp_path, ref, torch.randint(0, 101, (2, 40))) < 1e-4


def as_bin(folder, shards=1, half=False):
    """As Pythia's first files: pytorch_model.bin, with the buffers that newer code no longer wants, in 16 bits."""
    import safetensors.torch
    x = {k: v.half() if half else v for k, v in safetensors.torch.load_file(folder / "model.safetensors").items()}
    x["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    x["gpt_neox.layers.0.attention.masked_bias"], x["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.tensor(-1e9), torch.ones(8)
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin" for i in range(shards)]
    where = {k: names[i % shards] for i, k in enumerate(x)}
    for name in names:
        torch.save({k: v for k, v in x.items() if where[k] == name}, folder / name)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=where)))


@pytest.mark.parametrize("shards, half", [(1, False), (3, False), (1, True)])
def test_pytorch_model_bin_in_one_or_many(tmp_path, shards, half):
    ref, ids = reference(tmp_path), torch.randint(0, 101, (2, 20))
    as_bin(tmp_path, shards, half)
    assert off(tmp_path, ref.half().float() if half else ref, ids) < 1e-4


def test_sharded_safetensors_and_only_the_trunks_tensors(tmp_path):
    ref = reference(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    ref.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    trunk = pa.load_trunk(tmp_path)
    assert off(tmp_path, ref, torch.randint(0, 101, (2, 20))) < 1e-4 and sum(p.numel() for p in trunk.parameters()) == sum(
        p.numel() for n, p in ref.named_parameters() if "embed" not in n and "lm_head" not in n)


def test_random_pythia_410m_has_its_parameters():
    with torch.device("meta"):
        count = lambda s: sum(p.numel() for p in pa.GPTNeoX(pa.Config(dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads"), pa.SHAPES[s]),
                                                                           intermediate_size=4 * pa.SHAPES[s][1]))).parameters())
        # table 1 of the Pythia paper, "non-embedding"
        assert count("pythia-70m") == 18_915_328 and count("pythia-410m") == 302_311_424 and count("pythia-1b") == 805_736_448


def test_only_the_rows_asked_for_and_a_padded_beginning():
    """The last block's short cut changes nothing, and what is masked at the beginning has no influence."""
    torch.manual_seed(0)
    trunk = pa.GPTNeoX(pa.Config(dict(num_hidden_layers=3, hidden_size=32, num_attention_heads=2, intermediate_size=64)))
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, seen = torch.randn(2, 8, 32), torch.ones(2, 1, 1, 8, dtype=torch.bool)
    seen[1, ..., :3] = False
    mask = torch.ones(8, 8, dtype=torch.bool).tril() & seen
    full, part = trunk(x, mask), trunk(x, mask, slice(1, None, 3))
    assert torch.allclose(full[:, 1::3], part, atol=1e-5)
    y = x.clone()
    y[1, :3] = 99
    assert torch.equal(trunk(y, mask)[1, 3:], full[1, 3:]) and not torch.equal(trunk(y, mask.new_ones(2, 1, 8, 8).tril())[1, 3:], full[1, 3:])


# ---- the adapter -------------------------------------------------------------------------------------------------------------

def count(*flags, C=1024):
    args = pa.get_args(["--condition", "rtg", *flags])
    return sum(p.numel() for p in pa.Adapter(C, args.adapter, args.condition).parameters())


def test_it_has_the_originals_parameters():
    assert count("--adapter", "linear") == 1_059_846 and count("--adapter", "mlp") == 4_208_646


def batch(B=4, K=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, K, dtype=torch.bool)
    valid[0, 0] = False
    return [torch.rand(B, K, generator=g) * 5, torch.randn(B, K, 17, generator=g), torch.rand(B, K, 6, generator=g) * 2 - 1,
            torch.arange(K).repeat(B, 1), valid]


def small(*flags):
    return pa.build(pa.get_args(["--model", "random:pythia-14m", "--dtype", "float32", *flags]), "cpu")


def test_it_is_the_same_adapter_on_transformers(tmp_path):
    """Outputs and the encoders' gradients, through our trunk and through transformers' GPTNeoXModel with the same weights."""
    from transformers import GPTNeoXModel
    reference(tmp_path)
    trunk, theirs = pa.load_trunk(tmp_path), GPTNeoXModel.from_pretrained(tmp_path).eval()
    adapter, data = pa.Adapter(64, "mlp", "rate"), batch()

    def peer(x, mask, rows):
        return theirs(inputs_embeds=x, attention_mask=mask[:, 0, -1].long()).last_hidden_state[:, rows]
    peer.final_layer_norm = theirs.final_layer_norm
    outs, grads = [], []
    for model in (trunk, peer):
        adapter.zero_grad()
        out = adapter(model, *data)
        out[data[4]].square().sum().backward()
        outs.append(out[data[4]].detach()), grads.append([p.grad.clone() for p in adapter.parameters()])
    assert (outs[0] - outs[1]).abs().max() < 1e-4
    for a, b in zip(*grads):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max())


def test_gradients_flow_through_a_trunk_that_keeps_none():
    trunk, adapter, params = small()
    adapter(trunk, *batch()).sum().backward()
    assert all(p.grad is None for p in trunk.parameters()) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert len(params) == len(list(adapter.parameters()))
    trunk, adapter, params = small("--tune_ln")
    adapter(trunk, *batch()).sum().backward()
    tuned = {n for n, p in trunk.named_parameters() if p.grad is not None}
    assert len(tuned) == 6 * 4 + 2 and all("norm" in n for n in tuned) and len(params) == len(tuned) + len(list(adapter.parameters()))
    assert len(pa.build(pa.get_args(["--model", "scratch:pythia-14m"]), "cpu")[2]) > 60


def test_the_last_action_alone_is_the_last_of_all_and_nothing_looks_ahead():
    trunk, adapter, _ = small()
    data = batch(K=5)
    with torch.no_grad():
        out = adapter(trunk, *data)
        assert torch.allclose(out[:, -1:], adapter(trunk, *data, last=True), atol=1e-6)
        for i, at in ((0, 3), (1, 3), (2, 2)):                  # a later return, state or action
            other = [x.clone() for x in data]
            other[i][:, at:] += 1
            changed = (adapter(trunk, *other) - out)[data[4][:, 0]].abs().amax((0, 2)) > 1e-7       # before the start: anything
            assert changed.tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_are_near_float32_and_nearly_as_good_a_teacher(dtype):
    trunk, adapter, _ = small("--dtype", "float32")
    half, _, _ = small("--dtype", dtype)
    assert {p.dtype for p in half.parameters()} == {getattr(torch, dtype)}
    for train in (["--tune_ln"], ["--model", "scratch:pythia-14m"]):            # small steps would be rounded away
        assert {p.dtype for p in small("--dtype", dtype, *train)[0].parameters()} == {torch.float32}
    grads = []
    for model in (trunk, half):
        adapter.zero_grad()
        out = adapter(model, *batch(B=32))
        out.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))
        assert out.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_windows_stay_within_their_episode_and_rates_add_up():
    length, rng = np.array([3, 1, 7]), np.random.default_rng(0)
    first = np.cumsum(length) - length
    index, t, valid = pa.windows(first, length, 4, 2000, rng)
    episode = np.repeat(np.arange(3), length)
    assert (episode[index] == episode[index[:, -1:]]).all() and (t == index - first[episode[index]]).all()
    assert set(index[:, -1]) == set(range(11)) and (valid.sum(1) == np.minimum(t[:, -1] + 1, 4)).all()
    rew = rng.standard_normal(11).astype(np.float32)
    d = common.Episodes(np.zeros((11, 17)), np.zeros((11, 6)), rew, length)
    rtg = [rew[i:first[e] + length[e]].sum(dtype=np.float64) for i, e in enumerate(episode)]
    assert np.allclose(pa.still_to_earn(d, "rtg"), rtg)
    assert np.allclose(pa.still_to_earn(d, "rate"), np.array(rtg) / 20)         # the last second of an episode


def test_the_physics_are_gymnasiums():
    import gymnasium
    env, rng, sim = gymnasium.make("HalfCheetah-v5").unwrapped, np.random.default_rng(0), pa.Cheetahs(1)
    env.reset(seed=0)
    for _ in range(100):
        sim.state = np.concatenate([[0], env.data.qpos, env.data.qvel])[None]
        a = rng.uniform(-1, 1, 6)
        obs, r, *_ = env.step(a)
        o, q = sim.step(a[None])
        assert np.abs(o[0] - obs).max() < 1e-6 and abs(q[0] - r) < 1e-6
    env.close()


def test_a_rate_it_was_never_shown_is_told_as_the_largest_it_was():
    told = []

    def spy(trunk, r, s, a, t, valid, last):
        told.append(r[:, -1].clone().numpy())
        return torch.zeros(len(r), 1, 6)

    spy.most = torch.tensor(25.0)
    pa.evaluate(None, spy, [1000.0, 9000.0], pa.get_args(["--max_steps", "50"]), "cpu")
    told = np.array(told)
    assert (told[:, 1] == 25).all() and told[0, 0] == 20 and (told[:, 0] >= 20).all()


# ---- files and faults ------------------------------------------------------------------------------------------------------------

BROKEN = {
    "no config": lambda f: (f / "config.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "a llama": lambda f: rewrite(f, model_type="llama"),
    "no width": lambda f: rewrite(f, hidden_size=None),
    "another width": lambda f: rewrite(f, hidden_size=128),
    "more layers": lambda f: rewrite(f, num_hidden_layers=9),
    "three heads": lambda f: rewrite(f, num_attention_heads=3),
    "relu": lambda f: rewrite(f, hidden_act="relu"),
    "odd rope": lambda f: rewrite(f, rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.2, rope_type="default")),
    "linear rope, newly named": lambda f: rewrite(f, rope_scaling=dict(rope_type="linear", factor=2.0), rope_parameters=None),
    "stretched rope": lambda f: rewrite(f, rope_scaling=dict(type="linear", factor=2.0), rope_parameters=None),
    "cut off": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
    "cut in the header": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:100]),
    "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "a page of HTML": lambda f: (f / "model.safetensors").write_text("<html>not found</html>"),
    "a .bin that is code": lambda f: bad_pickle(f),
    "an index to nowhere": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')),
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def bad_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save(dict(a=Evil()), folder / "pytorch_model.bin")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_one_sentence(tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    reference(tmp_path / "m")
    capsys.readouterr()
    BROKEN[how](tmp_path / "m")
    with pytest.raises(SystemExit) as e:
        pa.load_trunk(tmp_path / "m")
    err = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(err) == 1 and str(tmp_path / "m") in err[0], err
    assert not (tmp_path / "HACKED").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """The two answers of the Hub that are needed, from self.server.folder; a first try of a large file is cut in the middle."""
    def do_GET(self):
        folder, seen = self.server.folder, self.server.seen
        seen.append((self.path, self.headers.get("Range")))
        raw, status = b"", 404
        if self.path == "/api/models/EleutherAI/pythia-70m/tree/main":
            raw, status = json.dumps([dict(type="file", path=p.name, size=p.stat().st_size) for p in sorted(folder.iterdir())]).encode(), 200
        elif self.path.startswith("/EleutherAI/pythia-70m/resolve/main/"):
            raw, status = (folder / self.path.split("/")[-1]).read_bytes(), 200
        begin = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        self.send_response(206 if begin else status)
        self.send_header("Content-Length", str(len(raw) - begin))
        self.end_headers()
        cut = self.path.endswith("safetensors") and not begin and self.server.cut
        self.wfile.write(raw[begin:len(raw) // 2] if cut else raw[begin:])

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    reference(tmp_path / "hubs_files", vocab_size=9000)        # 5 MB: a cut download keeps whole megabytes
    (tmp_path / "hubs_files/README.md").write_text("not wanted")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.seen, server.cut = tmp_path / "hubs_files", [], True
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown(), server.server_close()


def test_a_hub_id_is_downloaded_and_a_cut_download_goes_on(hub, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pa.fetch_model("EleutherAI/pythia-70m")
    assert "goes on" in capsys.readouterr().err
    folder = pa.fetch_model("EleutherAI/pythia-70m")
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "hubs_files/model.safetensors").read_bytes()
    assert any(r and p.endswith("safetensors") for p, r in hub.seen) and not any("README" in p for p, _ in hub.seen)
    pa.load_trunk(folder)
    n = len(hub.seen)
    assert pa.fetch_model("EleutherAI/pythia-70m") == folder and len(hub.seen) == n     # whole: nobody is asked again


def test_a_model_that_cannot_be_had_names_the_flag_that_runs_instead(hub, capsys):
    for name, why in (("EleutherAI/pythia-160m", "random:pythia-160m"), ("EleutherAI/pythia-1.4b-deduped", "random:pythia-1.4b"), ("nowhere", "no such folder"),
                      ("../..", "no such folder"), ("a/b/c", "no such folder")):
        with pytest.raises(SystemExit) as e:
            pa.fetch_model(name)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.count("\n") == 1 and why in err and "--model random:" in err


# ---- the command -------------------------------------------------------------------------------------------------------------------

def killed(cmd, cwd, until):
    """Start cmd, kill -9 it as soon as until() is true."""
    p, end = subprocess.Popen(cmd, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time() + 60
    while not until() and p.poll() is None and time.time() < end:
        time.sleep(0.002)
    alive = p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert alive, "it ended before it was killed"


def test_smoke_alone_in_an_empty_folder_and_killed_it_ends_at_the_same_weights(alone):
    r = alone("pythia_adapter.py", "--smoke", "--targets", "300", "600", "1200", files=ALONE)
    assert r.returncode == 0, r.stderr
    assert "dt_cheetah.py makes it" in r.stdout and "Traceback" not in r.stderr
    row = json.loads((alone.folder / "out/results.jsonl").read_text().splitlines()[-1])
    assert (alone.folder / row["metrics"]["video"]).stat().st_size > 1000 and len(row["metrics"]["table"]) == 3
    assert (alone.folder / row["metrics"]["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert r.stdout.splitlines()[-1].startswith("result pythia_adapter.py:") and not list(alone.folder.rglob("*.part*"))
    (path,) = alone.folder.glob("out/pythia_adapter_*.pt")
    whole = torch.load(path, weights_only=True)
    assert path.stat().st_size < 4e6 and not whole["trunk"]                     # the adapter alone is saved
    # the same again, killed at its first checkpoint
    path.unlink()
    code = "import sys, pythia_adapter as p; sys.argv[0] = 'pythia_adapter.py'; p.SAVE_EVERY = 5; p.common.run(p.main)"
    cmd = [sys.executable, "-c", code, "--smoke", "--no-video"]
    killed(cmd, alone.folder, path.exists)
    assert torch.load(path, weights_only=True)["step"] < 20
    r = subprocess.run(cmd, cwd=alone.folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    again = torch.load(path, weights_only=True)
    assert again["step"] == whole["step"] == 20
    for k in whole["adapter"]:
        assert torch.equal(whole["adapter"][k], again["adapter"][k]), k
    # a checkpoint of another shape, and a broken one
    state = dict(whole, adapter=dict(whole["adapter"], **{"head.weight": torch.zeros(6, 7)}))
    torch.save(state, path)
    assert "shape" in refused(alone("pythia_adapter.py", "--smoke", "--no-video"))
    path.write_bytes(path.read_bytes()[:1000])
    assert path.name in refused(alone("pythia_adapter.py", "--smoke", "--no-video"))


def test_a_users_mistake_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for flags in (["--nonsense"], ["--steps", "many"], ["--targets", "1:x:3"], ["--steps", "0"], ["--context", "0"], ["--target_rew", "nan"], ["--dtype", "int8"],
                  ["--model", "random:pythia-3m"], ["--model", "EleutherAI/pythia-410m"], ["--dataset", "gone.hdf5"], ["--adapter", "lora"]):
        monkeypatch.setattr(sys, "argv", ["pythia_adapter.py", "--smoke", *flags])
        with pytest.raises(SystemExit) as e:
            common.run(pa.main)
        err = capsys.readouterr().err
        assert e.value.code == 2 and len(err.strip().splitlines()) == 1, (flags, err)
        if "EleutherAI/pythia-410m" in flags:
            assert "--model random:pythia-410m" in err


@pytest.mark.parametrize("name", ["e.hdf5", "my_cheetah_ladder.hdf5"])              # not the ladder that ships, though it is called so
def test_other_data_or_weights_under_the_same_name_are_another_adapter(name, tmp_path):
    (tmp_path / "m").mkdir()
    args, names = pa.get_args(["--dataset", str(tmp_path / name), "--model", str(tmp_path / "m")]), set()
    for data, weights in ((b"a", b"x"), (b"a", b"x"), (b"b", b"x"), (b"b", b"xy")):
        (tmp_path / name).write_bytes(data)
        if not (file := tmp_path / "m/model.safetensors").exists() or file.read_bytes() != weights:
            file.write_bytes(weights)
        names.add(pa.checkpoint(args).name)
    assert len(names) == 3


def test_a_loss_that_is_not_finite_names_its_step(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    obs, act, rew = np.zeros((2, 31, 17), np.float32), np.zeros((2, 30, 6), np.float32), np.zeros((2, 30), np.float32)
    rew[:] = 3e38                                                   # its return-to-go is not a float32
    dt.write_episodes(tmp_path / "e.hdf5", obs, act, rew)
    monkeypatch.setattr(sys, "argv", ["pythia_adapter.py", "--smoke", "--dataset", "e.hdf5"])
    with pytest.raises(SystemExit) as e:
        common.run(pa.main)
    assert e.value.code == 2 and "not finite at step 0" in capsys.readouterr().err


def test_the_comparison_says_what_each_command_printed_and_what_could_not_be_run(monkeypatch, tmp_path, capsys):
    """The commands are not run here: their real output, as text, stands in for them."""
    monkeypatch.chdir(tmp_path)
    head = " asked    reached            error    fell\n"
    said = {"dt_cheetah.py": "device cpu\n\nDT, reward rate (728,582 parameters, 54 s of training)\n" + head +
            "   300     301.1 +-    0.6    0.37%    0/10\n  1200   -1200.5 +-    2.2    0.15%    1/10\n\nbehaviour cloning (727,302 parameters, 51 s of training)\n" + head +
            "   300    1700.0 +-  900.0  466.67%    0/10\n  1200    1650.0 +- 1000.5   90.00%    0/10\nresult dt_cheetah.py: targets 2\n",
            "rag_cheetah.py": "store\n\nkNN (0 parameters, 0 s of training)\n" + head + "   300     299.0 +-    0.2    0.33%    0/10\n  1200    1194.0 +-    3.0    0.50%    0/10\n"}
    commands = []

    def fake(command, **kw):
        commands.append([str(x) for x in command])
        return subprocess.CompletedProcess(command, 0, said.get(pathlib.Path(command[1]).name, ""))
    monkeypatch.setattr(pa.subprocess, "run", fake)
    monkeypatch.setattr(sys, "argv", ["pythia_adapter.py", "--compare", "--targets", "300", "1200", "--seed", "3", "--max_steps", "500",
                                      "--steps", "70", "--tune_ln", "--dataset", "my.hdf5"])
    (tmp_path / "out").mkdir(exist_ok=True)
    rag = lambda steps, mean, seed=3: json.dumps(dict(script="rag_cheetah.py", flags=dict(
        llm="tiny", targets=[300.0, 1200.0], max_steps=steps, seed=seed, episodes=10, dataset="my.hdf5"), metrics=dict(table=[[300.0, mean, 1.0, 0], [1200.0, mean, 2.0, 0]])))
    (tmp_path / "out/results.jsonl").write_text("\n".join([rag(500, 7.0), rag(3, 8.0), rag(500, 9.0, seed=4), '{"script": "rag_cheetah.py"}', '{"torn']) + "\n")
    common.run(pa.main)
    out = capsys.readouterr().out
    assert [pathlib.Path(c[1]).name for c in commands] == ["dt_cheetah.py", "pythia_adapter.py", "pythia_adapter.py", "rag_cheetah.py"]
    assert all(c[c.index("--seed") + 1] == "3" and c[c.index("--targets") + 1:] == ["300.0", "1200.0"] for c in commands)
    assert all(c[c.index("--max_steps") + 1] == "500" for c in commands) and commands[1][2:4] == ["--model", "random:pythia-70m"]
    assert all(("--steps" in c and "--tune_ln" in c) == ("pythia" in c[1]) and c[c.index("--dataset") + 1] == "my.hdf5" for c in commands)
    rows = {line[:34].strip(): line[34:].split() for line in out.splitlines() if line[:34].strip()}
    assert rows["DT, reward rate"] == "301 +- 1 -1200 +- 2 728,582 54".split()
    assert rows["behaviour cloning"] == "1700 +- 900 1650 +- 1000 727,302 51".split()
    assert rows["kNN"] == "299 +- 0 1194 +- 3 0 0".split()
    assert out.split("result ")[0].count("could not be run here") == 2 and rows["kNN + tiny"] == "7 +- 1 7 +- 2 0 0".split()     # not the torn, not the short one
    m = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[-1])["metrics"]
    assert m["policies"] == 4 and pathlib.Path(m["figure"]).read_bytes()[:4] == b"\x89PNG"
