"""rag_cheetah.py: the search against brute force, the prompt against the original's, a server on this machine with every fault."""
import gc, collections, json, os, re, signal, subprocess, sys, threading, time

import numpy as np
import pytest

import common
import dt_cheetah as dt
import rag_cheetah as rag
from conftest import ROOT, refused

KEY = "opaque-4f9a2cThisMustNotBeSeen"


def some_store(E=30, L=40, seed=0, uneven=True, weight=2.0):
    rng = np.random.default_rng(seed)
    length = rng.integers(1, L + 1, E) if uneven else np.full(E, L)
    N = length.sum()
    obs, act, rate = rng.standard_normal((N, 17)) * rng.uniform(0.1, 9, 17) + 3, rng.uniform(-1, 1, (N, 6)), rng.uniform(0, 5, N)
    return rag.Store(*(np.float32(x) for x in (obs, act, rate)), length, weight), obs, rate, length


def some_episodes(path, E=12, T=50, seed=0):
    """A data set of real runs, short and noisy: enough for the search to have something to find."""
    rng, sim = np.random.default_rng(seed), rag.Cheetahs(E)
    obs, act, rew = np.empty((E, T + 1, 17), np.float32), np.float32(rng.uniform(-1, 1, (E, T, 6))), np.empty((E, T), np.float32)
    obs[:, 0] = sim.reset(rng)
    for t in range(T):
        obs[:, t + 1], rew[:, t] = sim.step(np.float64(act[:, t]))
    dt.write_episodes(path, obs, act, rew)
    return path


# ---- retrieval ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize("n, k", [(1, 5), (17, 1), (64, 12), (3, 99)])
def test_the_search_finds_what_brute_force_finds(uneven, n, k):
    store, obs, rate, length = some_store(uneven=uneven)
    rng = np.random.default_rng(1)
    q, want = rng.standard_normal((n, 17)) * 4 + 3, rng.uniform(0, 5, n)
    episodes, steps = store.find(q, want, k)
    first = np.cumsum(length) - length
    assert episodes.shape == (n, min(k, len(length)))
    for i in range(n):
        d = np.sqrt(np.square((obs - q[i]) / store.std).sum(1) + np.square(2.0 * (rate - want[i])))      # in float64, one by one
        near = np.minimum.reduceat(d, first)                                            # of each episode its nearest
        assert np.allclose(d[first[episodes[i]] + steps[i]], np.sort(near)[:k], rtol=1e-4)
        assert len(set(episodes[i])) == len(episodes[i]) and (steps[i] < length[episodes[i]]).all()


def test_pieces_do_not_change_what_is_found():
    store, *_ = some_store(E=300, L=100, uneven=False)
    rng = np.random.default_rng(2)
    q, want = rng.standard_normal((500, 17)) * 4 + 3, rng.uniform(0, 5, 500)
    together = store.find(q, want, 4)                               # one or two episodes a piece
    alone = [store.find(q[i:i + 1], want[i:i + 1], 4) for i in range(0, 500, 25)]       # all in one
    for i, (e, t) in zip(range(0, 500, 25), alone):
        assert np.array_equal(together[0][i], e[0]) and np.array_equal(together[1][i], t[0])


def test_a_state_of_the_store_is_its_own_nearest_neighbour():
    store, obs, rate, length = some_store()
    e, t = store.find(obs, rate, 1)
    assert np.array_equal(e[:, 0], np.repeat(np.arange(len(length)), length))
    assert np.array_equal(t[:, 0], np.concatenate([np.arange(n) for n in length]))


def test_the_rate_decides_among_equal_states_and_weight_0_ignores_it():
    obs, rate = np.zeros((10, 17), np.float32), np.arange(10, dtype=np.float32)
    obs[:, 0] = np.arange(10) * 1e-3
    store = rag.Store(obs, np.zeros((10, 6), np.float32), rate, np.ones(10, int), 4.0)
    assert [int(store.find(obs[:1], np.array([r]), 1)[0][0, 0]) for r in (0, 4.1, 8.9)] == [0, 4, 9]
    store = rag.Store(obs, np.zeros((10, 6), np.float32), rate, np.ones(10, int), 0.0)
    assert all(int(store.find(obs[:1], np.array([r]), 1)[0][0, 0]) == 0 for r in (0.0, 9.0))


def test_the_physics_are_gymnasiums():
    import gymnasium
    env = gymnasium.make("HalfCheetah-v5").unwrapped
    env.reset(seed=0)
    rng, sim = np.random.default_rng(0), rag.Cheetahs(1)
    sim.reset(rng)
    for _ in range(100):
        sim.state = np.concatenate([[0], env.data.qpos, env.data.qvel])[None]
        a = rng.uniform(-1, 1, 6)
        obs, r, *_ = env.step(a)
        o, q = sim.step(a[None])
        assert np.abs(o[0] - obs).max() < 1e-6 and abs(q[0] - r) < 1e-6
    env.close()

# ---- prompt and parse ----------------------------------------------------------------------------------------------------------

def a_prompt(*flags, past=()):
    store, *_ = some_store()
    args = rag.get_args([*flags])
    obs = np.linspace(-1, 1, 17)
    return rag.messages(args, store, 7, obs, *(x[0] for x in store.find(obs[None], np.ones(1), 2)), list(past)), store, obs


def test_the_prompt_is_the_originals():
    (system, user), store, obs = a_prompt()
    assert system == dict(role="system", content="You are an expert Mujoco Half Cheetah V0 environment controller.")
    e, t = (x[0] for x in store.find(obs[None], np.ones(1), 2))
    show = lambda x: "[" + ", ".join(f"{v:.3f}" for v in x) + "]"
    assert user["content"] == (
        f"Time step 7. HalfCheetah-v0 state vector has dimension 17.\nCurrent state: {show(obs)}.\nHere are similar states to the current state and "
        "their corresponding actions to take you should use as a reference:\n"
        + "".join(f"Similar state: {show(store.obs[i, j])} : action {show(store.act[i, j])}\n" for i, j in zip(e, t))
        + '\nRespond in strict JSON: {"action": [f1, f2, f3, f4, f5, f6]}. No extra text.')


def test_history_and_whole_numbers():
    past = [(np.full(17, i / 10), np.full(6, -i / 10), i) for i in range(5)]
    text = a_prompt("--history", "2", past=past)[0][1]["content"]
    assert text.count("reward") == 2 and "-0.400" in text and "-0.300" in text and "-0.200" not in text
    (_, user), store, obs = a_prompt("--encoding", "int")
    numbers = [int(x) for line in user["content"].splitlines()[1:5] for x in re.findall(r"-?\d+", line)]
    assert len(numbers) == 17 + 2 * 23 and 0 <= min(numbers) and max(numbers) <= 200 and "." not in user["content"].split("reference:")[1].split("\n\n")[0]


def test_whole_numbers_lose_at_most_half_a_step():
    store, *_ = some_store()
    a = np.random.default_rng(0).uniform(-1, 1, (100, 6))
    back = [rag.parse('{"action": %s}' % rag.write(x, store, "int", "action"), "int")[0] for x in a]
    assert np.abs(back - a).max() <= 0.005 + 1e-9


@pytest.mark.parametrize("reply", ["", "I would move.", "[0, 0, 0, 0, 0, 0]", '{"action": [0, 0, 0, 0, 0]}', '{"action": [0, 0, 0, 0, 0, 0, 0]}',
                                   '{"action": [0, 0, 0, 0, 0, NaN]}', '{"action": [0, 0, 0, 0, 0, Infinity]}', '{"action": [0, 0, 0, 0, 0, true]}',
                                   '{"action": [0, 0, 0, 0, 0, "0"]}', '{"action": 3}', '{"action": [0, 0, 0, 0, 0, 0], "why": 1}', "null", "[" * 100_000,
                                   'Sure! {"action": [0, 0, 0, 0, 0, 0]}', '```json\n{"action": [0, 0, 0, 0, 0, 0]}\n```', '{"action": [1e400, 0, 0, 0, 0, 0]}',
                                   '{"action": [1%s, 0, 0, 0, 0, 0]}' % ("0" * 5000)])
def test_only_strict_json_is_an_action(reply):
    with pytest.raises(ValueError):
        rag.parse(reply, "float")


def test_what_is_out_of_range_is_clipped_and_said():
    action, clipped = rag.parse(' {"action": [2, -3, 0.5, 0, 1, -1]}\n', "float")
    assert action.tolist() == [1, -1, 0.5, 0, 1, -1] and clipped
    assert not rag.parse('{"action": [1, -1, 0.5, 0, 1, -1]}', "float")[1]

# ---- the endpoint --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """run(server, *flags): main() in this process, in an empty folder with a small data set. -> metrics, journal's lines"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(rag, "PAUSE", 0.01)
    some_episodes(tmp_path / "e.hdf5")

    def run(server, *flags):
        flags = ["--dataset", "e.hdf5", "--llm", "test", "--api_base", server.url + "/v1", "--price_in", 1, "--price_out", 2, "--no-video", *flags]
        monkeypatch.setattr(sys, "argv", ["rag_cheetah.py", *map(str, flags)])
        rag.main()
        row = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[-1])
        assert KEY not in "".join(p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file())
        out = capsys.readouterr()
        assert KEY not in out.out + out.err
        return row["metrics"], [json.loads(x) for p in (tmp_path / "out").glob("rag_test_*.jsonl") for x in p.read_text().splitlines()]
    run.folder = tmp_path
    return run


def steady(text):
    """An action that depends on the prompt alone, so that a repeated request gets the same."""
    return json.dumps(dict(action=np.round(np.random.default_rng(abs(hash(text)) % 2**32).uniform(-1, 1, 6), 3).tolist()))


class Faulty:
    """Every fault by turns: the first try of a place in the run fails in its own way, later ones do not."""
    KINDS = "good prose short long nan range 429 500 drop huge text good good good good good good good".split()

    def __init__(self):
        self.tries, self.kinds, self.lock, self.billed = collections.Counter(), {}, threading.Lock(), 0

    def __call__(self, h, body):
        key, repair = h.headers["Idempotency-Key"], "/repair" in h.headers["Idempotency-Key"]
        with self.lock:
            self.tries[key] += 1
            place = key.split("-")[0]
            kind = self.KINDS[len(self.kinds) % len(self.KINDS)]
            if int(place.split("/")[0]) in (10, 30):        # all at once, for each costs the client a timeout
                kind = ("slow", "headers")[int(place.split("/")[1]) % 2]
            kind = self.kinds.setdefault(place, kind) if not repair else "good"
            n = self.tries[key]
        good, rest = steady(body["messages"][1]["content"]), dict(choices=[dict(message=dict(content="x"))])
        if n == 1 and kind == "429":
            return h.send("{}", 429, **{"Retry-After": "0.3"})
        if n == 1 and kind == "500":
            return h.send("oops", 500)
        if n == 1 and kind == "slow":                       # a byte now and then, for longer than anyone waits
            h.send(b"{", length=1000)
            for _ in range(30):
                time.sleep(0.1)
                h.wfile.write(b" ")
                h.wfile.flush()
            return
        if n == 1 and kind == "headers":
            for _ in range(30):
                time.sleep(0.1)
                h.wfile.write(b"HTTP/1.1 200 OK\r\n"[:1])
                h.wfile.flush()
            return
        if n == 1 and kind == "drop":
            return h.send(json.dumps(rest)[:20], length=1000)
        if n == 1 and kind == "huge":
            return h.send(b" " * 3_000_000)
        if n == 1 and kind == "text":
            return h.send("<html>not JSON</html>")
        text = {"prose": "Sure, here it is: " + good, "short": '{"action": [0, 0, 0]}', "long": '{"action": [0, 0, 0, 0, 0, 0, 0]}',
                "nan": '{"action": [NaN, 0, 0, 0, 0, 0]}', "range": '{"action": [1.5, 0, 0, 0, 0, -7]}'}.get(kind, good)
        with self.lock:
            self.billed += 1
        h.reply(text)


def test_1000_steps_under_every_fault(serve, go):
    faulty = Faulty()
    server = serve(faulty)
    m, journal = go(server, "--episodes", 20, "--max_steps", 50, "--parallel", 20, "--timeout", 1.5, "--history", 2)
    kinds = collections.Counter(faulty.kinds.values())
    assert len(faulty.kinds) == 1000 == sum(kinds.values())                 # no step was lost, none was asked under two names
    assert m["good"] + m["repaired"] + m["fallback"] == 1000
    assert m["repaired"] == sum(kinds[k] for k in ("prose", "short", "long", "nan")) and m["clipped"] == kinds["range"] and m["fallback"] == 0
    assert m["faults"]["HTTP 429"] == kinds["429"] and m["faults"]["HTTP 500"] == kinds["500"]
    assert sum(m["faults"].values()) == sum(kinds[k] for k in ("429", "500", "slow", "headers", "drop", "huge", "text"))
    replies = [x for x in journal if "reply" in x]
    assert faulty.billed == len(replies) == len({x["key"] for x in replies}) == 1000 + m["repaired"]
    assert m["tokens_in"] == 1000 * len(replies) and abs(m["cost"] - len(replies) * (1000 + 80) / 1e6) < 1e-6
    for key in [k for k, n in faulty.tries.items() if n == 2 and faulty.kinds.get(k.split("-")[0]) == "429"]:   # Retry-After was obeyed
        a, b = [t for t, h in zip(server.times, server.headers) if h["Idempotency-Key"] == key]
        assert b - a >= 0.3
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in server.headers)
    assert all(b["temperature"] == 0 and b["model"] == "test" for b in server.bodies)


def test_a_stopped_run_goes_on_without_paying_twice(serve, go):
    server = serve(lambda h, body: h.reply(steady(body["messages"][1]["content"])))
    flags = ["--episodes", 3, "--max_steps", 20]
    whole, _ = go(server, *flags)
    asked = len(server.bodies)
    assert asked == 60
    again, _ = go(server, *flags)                                           # everything is found, nothing is asked
    assert len(server.bodies) == asked and again["table"] == whole["table"] and again["good"] == 60
    (path,) = go.folder.glob("out/rag_test_*.jsonl")
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:61]) + lines[61][:20])                 # killed in mid-write
    had = sum(b'"reply"' in x for x in lines[:61])
    again, _ = go(server, *flags)
    assert len(server.bodies) == asked + 60 - had and again["table"] == whole["table"]


def test_who_never_parses_or_never_answers_is_replaced_and_counted(serve, go):
    m, _ = go(serve(lambda h, body: h.reply("no")), "--episodes", 2, "--max_steps", 5)
    assert (m["good"], m["repaired"], m["fallback"]) == (0, 0, 10) and m["tokens_out"] == 20 * 40

    def moody(h, body):                                                     # one step in five never gets an answer
        step = int(re.match(r"Time step (\d+)", body["messages"][1]["content"])[1])
        h.send("{}", 503) if step % 5 == 2 else h.reply(steady("x"))
    m, _ = go(serve(moody), "--episodes", 2, "--max_steps", 10, "--retries", 2)
    assert (m["good"], m["fallback"]) == (16, 4) and m["faults"] == {"HTTP 503": 8}


def an_endpoint(folder, base, *flags):
    args = rag.get_args(["--llm", "t", "--api_base", base, "--timeout", "2", "--price_in", "10", "--price_out", "1000", *flags])
    return rag.Endpoint(args, folder / "j.jsonl", KEY)


def test_what_was_never_sent_is_free(tmp_path):
    for i, base in enumerate(("http://[::1", "https://127.0.0.1:9/v1", "http://127.0.0.1:9/v1")):
        got = an_endpoint(tmp_path / str(i), base).post("k", dict(messages=[], max_tokens=1), 100)
        assert got["free"] and got["retry"] == (i > 0) and KEY not in str(got)


def test_a_server_that_does_not_count_costs_no_more_than_was_allowed(serve, tmp_path):
    server = serve(lambda h, body: h.send(json.dumps(dict(choices=[dict(message=dict(content="\u00fc" * 5000))]))))
    endpoint, prompt = an_endpoint(tmp_path, server.url + "/v1", "--max_tokens", "100"), [dict(role="user", content="Wo ist der K\u00f6nig?")]
    assert endpoint.ask("0/0", prompt, 3) == "\u00fc" * 5000
    assert abs(endpoint.spent - (100 + 18) * 10e-6 - 100 * 1000e-6) < 1e-12 and not endpoint.open        # its 17 letters are 18 bytes
    assert endpoint.ask("0/0", prompt, 3) and len(server.bodies) == 1       # paid for once


def test_a_full_disk_ends_the_run_and_a_second_run_waits_its_turn(serve, go, monkeypatch, capsys):
    server = serve(lambda h, body: h.reply(steady("x")))
    write, left = rag.Endpoint.write, [9]

    def full(self, **line):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        write(self, **line)
    monkeypatch.setattr(rag.Endpoint, "write", full)
    with pytest.raises(OSError):
        go(server, "--episodes", 1, "--max_steps", 50)
    assert len(server.bodies) <= 5
    first = an_endpoint(go.folder, server.url)
    with pytest.raises(SystemExit):
        an_endpoint(go.folder, server.url)
    assert "another run is writing" in capsys.readouterr().err and first.asks == 0


def test_a_key_that_is_no_secret_is_no_part_of_words():
    assert rag.hide("six steps, none lost", "x") == rag.hide("six steps, none lost", "none") == "six steps, none lost"
    assert rag.hide(f"say {KEY}!", KEY) == "say [key]!" and rag.hide("sk-abcdefgh12", "") == "[key]"


def test_half_a_letter_is_no_action_and_no_traceback(serve, go):
    """Half of a surrogate pair is JSON, but no text: it stands in the prompt that asks for repair."""
    m, _ = go(serve(lambda h, body: h.reply("\ud83d")), "--episodes", 1, "--max_steps", 3)
    assert (m["good"], m["repaired"], m["fallback"]) == (0, 0, 3)


def test_the_fallback_is_the_neighbours_mean(serve, go):
    m, _ = go(serve(lambda h, body: h.reply("no")), "--episodes", 2, "--max_steps", 30)
    args = rag.get_args(["--dataset", "e.hdf5", "--episodes", "2", "--max_steps", "30"])
    earned = rag.evaluate(args, rag.find_store(args), np.repeat(args.targets, 2))[0]
    assert m["reached"] == [round(earned.mean(), 1)]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_one_sentence_and_no_retry(serve, go, capsys, status):
    server = serve(lambda h, body: h.send(json.dumps(dict(error=dict(message=f"no such model, {KEY}"))), status))
    with pytest.raises(SystemExit) as e:
        go(server, "--episodes", 1, "--max_steps", 5)
    err = [x for x in capsys.readouterr().err.splitlines() if "\r" not in x and x.strip() and "it/s" not in x and "step" not in x]
    assert e.value.code == 2 and len(server.bodies) == 1 and len(err) == 1 and f"HTTP {status}" in err[0] and KEY not in err[0], err
    assert ("no such model" in err[0]) == (status != 401)


def test_a_dead_endpoint_ends_in_a_sentence(serve, go, capsys):
    server = serve(lambda h, body: None)
    server.shutdown(), server.server_close()
    with pytest.raises(SystemExit) as e:
        go(server, "--episodes", 1, "--max_steps", 100, "--parallel", 1, "--retries", 2, "--timeout", 0.5)
    assert e.value.code == 2 and "does not answer" in capsys.readouterr().err


def test_what_nobody_answered_is_asked_again(serve, go, capsys):
    """A server that is down for a while spoils nothing: what has no answer is written down only once another has one."""
    up = []
    server = serve(lambda h, body: h.reply(steady(body["messages"][1]["content"])) if up else h.send("{}", 503))
    flags = ["--episodes", 2, "--max_steps", 10, "--retries", 1]
    with pytest.raises(SystemExit):
        go(server, *flags)
    assert "does not answer" in capsys.readouterr().err and len(server.bodies) <= 8
    up.append(True), gc.collect()                                           # the first run's journal lets go of its file
    m, lines = go(server, *flags)
    assert (m["good"], m["fallback"], m["faults"]) == (20, 0, {}) and all(x.get("reply", 1) for x in lines)


def test_no_request_beyond_max_cost(serve, go, capsys):
    server = serve(lambda h, body: h.reply(steady("x")))
    with pytest.raises(SystemExit):
        go(server, "--episodes", 1, "--max_steps", 50, "--max_cost", 0.02)
    assert "max_cost" in capsys.readouterr().err
    spent = len(server.bodies) * 0.00108
    assert 0 < spent <= 0.02
    with pytest.raises(SystemExit):
        go(server, "--episodes", 1, "--max_steps", 50, "--max_cost", 0)
    with pytest.raises(SystemExit):
        go(server, "--episodes", 1, "--max_steps", 51, "--max_cost", 0, "--price_in", 0, "--price_out", 0)
    assert len(server.bodies) * 0.00108 == spent                            # 0 only shows the plan, of a server that is free, too

# ---- the command -------------------------------------------------------------------------------------------------------------------

def test_smoke_alone_in_an_empty_folder(alone):
    some_episodes(alone.folder / "e.hdf5")
    r = alone("rag_cheetah.py", "--smoke", "--dataset", "e.hdf5", "--targets", "300", "600", files=())
    assert r.returncode == 0, r.stderr
    m = json.loads((alone.folder / "out/results.jsonl").read_text().splitlines()[-1])["metrics"]
    assert (alone.folder / m["video"]).stat().st_size > 1000
    z = common.load_arrays(alone.folder / m["actions"])
    assert z["actions"].shape == (100, 4, 6) and z["targets"].tolist() == [300, 300, 600, 600] and [x[0] for x in m["table"]] == [300, 600]
    assert r.stdout.splitlines()[-1].startswith("result rag_cheetah.py:") and "kNN (0 parameters, 0 s of training)" in r.stdout
    (kept,) = alone.folder.glob("out/rag_store_*.npz")                      # the store is kept, and found again
    before = kept.stat().st_mtime_ns
    assert alone("rag_cheetah.py", "--smoke", "--dataset", "e.hdf5", "--no-video").returncode == 0 and kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:1000])
    assert kept.name in refused(alone("rag_cheetah.py", "--smoke", "--dataset", "e.hdf5"))


def test_a_users_mistake_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    some_episodes(tmp_path / "e.hdf5", 2, 10)
    for flags in (["--nonsense"], ["--k", "0"], ["--k", "many"], ["--targets", "fast"], ["--target_rew", "nan"], ["--episodes", "0"], ["--temperature", "3"],
                  ["--rate_weight", "nan"], ["--dataset", "gone.hdf5"], ["--llm", "gpt"], ["--llm", "gpt", "--price_in", "1", "--price_out", "2"],
                  ["--llm", "gpt", "--price_in", "0", "--price_out", "0", "--api_base", "http://me:secret@host/v1"]):
        monkeypatch.setattr(sys, "argv", ["rag_cheetah.py", "--smoke", "--dataset", "e.hdf5", *flags])
        with pytest.raises(SystemExit) as e:
            common.run(rag.main)
        err = capsys.readouterr().err
        assert e.value.code == 2 and len(err.strip().splitlines()) == 1 and "secret" not in err, (flags, err)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    with pytest.raises(SystemExit):
        rag.read_key(rag.get_args(["--llm", "gpt", "--price_in", "1", "--price_out", "2"]))
    assert "two words" not in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_in_a_new_process(serve, tmp_path):
    """kill -9 in the middle of an episode; the second process asks for the rest only, and ends at the same table."""
    server = serve(lambda h, body: h.reply(steady(body["messages"][1]["content"])))
    some_episodes(tmp_path / "e.hdf5")
    cmd = [sys.executable, str(ROOT / "rag_cheetah.py"), "--dataset", "e.hdf5", "--llm", "test", "--api_base", server.url + "/v1", "--price_in", "1", "--price_out", "2",
           "--no-video", "--episodes", "2", "--max_steps", "60"]
    env = dict(os.environ, OPENAI_API_KEY=KEY)
    p, end = subprocess.Popen(cmd, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), time.time() + 60
    while len(server.bodies) < 40 and p.poll() is None and time.time() < end:
        time.sleep(0.002)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    asked = len(server.bodies)
    r = subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and KEY not in r.stdout + r.stderr, r.stderr
    (path,) = tmp_path.glob("out/rag_test_*.jsonl")
    lines = [json.loads(x) for x in path.read_text().splitlines()]
    replies = [x for x in lines if "reply" in x]
    assert len(replies) == len({x["key"] for x in replies}) == 120
    assert len(server.bodies) <= 120 + 2 and asked < len(server.bodies)         # asked twice: at most what was under way at the kill
    for p in tmp_path.glob("out/rag_test_*.jsonl"):
        p.unlink()
    table = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[-1])["metrics"]["table"]
    r = subprocess.run(cmd, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[-1])["metrics"]["table"] == table
