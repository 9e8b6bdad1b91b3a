"""dt_cheetah.py against gymnasium, transformers, minari, torch's SDPA and plain loops; its faults, its resumes, its idea."""
import json, os, pathlib, re, shutil, signal, subprocess, sys, time

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import common
import dt_cheetah as dt
from conftest import ROOT, refused

ALONE = ("data/cheetah_ladder.npz",)
LADDER = ROOT / ALONE[0]


# ---- physics -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def env():
    import gymnasium
    e = gymnasium.make("HalfCheetah-v5").unwrapped
    yield e
    e.close()


@pytest.mark.parametrize("kind", ["random", "slow gait", "fast gait"])
def test_1000_steps_are_gymnasiums(env, kind):
    """The same start and the same 1000 actions through both: equal to the last bit, although running is chaotic."""
    rng, sim = np.random.default_rng(0), dt.Cheetahs(1)
    start = dt.starts(1, rng)
    act = rng.uniform(-1, 1, (1000, 6))
    if kind != "random":
        z = common.load_arrays(LADDER)
        g = len(z["W"]) // 3 if kind == "slow gait" else len(z["W"]) - 1
        act = dt.play(z["W"][g:g + 1].astype(float), z["b"][g:g + 1].astype(float), start, 1000)[1][0].astype(float)
    states, _ = sim.pool.rollout(sim.models, sim.datas, start, act.repeat(5, 0)[None])
    env.reset(seed=0)
    env.set_state(start[0, 1:10], start[0, 10:])
    for t in range(1000):
        env.step(act[t])
        assert np.array_equal(states[0, 5 * t + 4, 1:], np.concatenate([env.data.qpos, env.data.qvel])), t


def test_each_of_1000_random_steps_is_gymnasiums(env):
    """step() starts the contact solver cold every 5 physics steps, which chaos would amplify: so each starts where gymnasium is."""
    rng, sim, worst = np.random.default_rng(0), dt.Cheetahs(1), 0.0
    obs, _ = env.reset(seed=0)
    for t in range(1000):
        sim.state = np.concatenate([[0], env.data.qpos, env.data.qvel])[None]
        a = rng.uniform(-1.2, 1.2, 6)
        obs, r, *_ = env.step(np.clip(a, -1, 1))
        o, q = sim.step(a[None])
        worst = max(worst, np.abs(o[0] - obs).max(), abs(q[0] - r))
    assert worst < 1e-6


def test_start_states_are_drawn_as_gymnasium_draws_them(env):
    sim = dt.Cheetahs(4000)
    sim.reset(np.random.default_rng(0))
    ref = []
    for seed in range(500):
        env.reset(seed=seed)
        ref.append(np.concatenate([env.data.qpos, env.data.qvel]))
    ref, mine = np.array(ref), sim.state[:, 1:]
    assert np.allclose(mine.mean(0), ref.mean(0), atol=0.02) and np.allclose(mine.std(0), ref.std(0), rtol=0.12)
    assert np.abs(mine[:, :9] - env.init_qpos).max() <= 0.1


def test_a_shove_is_what_it_says_and_nothing_else():
    rng, z = np.random.default_rng(0), common.load_arrays(LADDER)
    W, b, start = z["W"][[20, 40]].astype(float), z["b"][[20, 40]].astype(float), dt.starts(2, np.random.default_rng(1), noise=0.0)
    shove = rng.standard_normal((2, 3))
    calm, zero, hit = (dt.play(W, b, start, 160, shove=x)[0] for x in (None, 0 * shove, shove))
    assert np.array_equal(calm, zero) and np.array_equal(calm[:, :50], hit[:, :50])
    jump = hit[:, 50] - calm[:, 50]
    assert np.allclose(jump[:, 8:11], shove, atol=1e-6) and not jump[:, :8].any() and not jump[:, 11:].any()
    on = dt.play(W, b, dt.play(W, b, start, 60, shove=shove)[3], 100)[0]            # from step 60 on it is shoved again at 150 only
    assert np.array_equal(on[:, 30:90], hit[:, 90:150]) and not np.array_equal(on[:, 90], hit[:, 150])
    spread = [np.abs(dt.starts(500, np.random.default_rng(2), noise=x)[:, 3]).max() for x in (0.1, 0.4)]
    assert 0.09 < spread[0] <= 0.1 and 0.36 < spread[1] <= 0.4


# ---- the ladder ----------------------------------------------------------------------------------------------------------------

def test_the_ladder_is_small_dense_and_its_gaits_are_stable():
    assert LADDER.stat().st_size <= 30 * 1024
    z = common.load_arrays(LADDER)
    rng, mean, std, sure, failed = np.random.default_rng(7), [], [], [], 0
    # six episodes tell a spread of 10 from 60, but not 45: the fast gaits get 24
    for gaits, n in ((np.flatnonzero(z["returns"][:, 0] <= 5000), 6), (np.flatnonzero(z["returns"][:, 0] > 5000), 24)):
        W, b = (z[k][gaits].astype(float).repeat(n, 0) for k in ("W", "b"))
        ret = dt.play(W, b, dt.starts(len(W), rng), 1000)[2].sum(1).reshape(-1, n)
        ok, sure = np.abs(ret - np.median(ret, 1, keepdims=True)) < 250, [*sure, *z["returns"][gaits, 1] / n**0.5]
        mean, std, failed = [*mean, *(r[k].mean() for r, k in zip(ret, ok))], [*std, *(r[k].std() for r, k in zip(ret, ok))], failed + (~ok).sum()
    mean, std = np.array(mean), np.array(std)
    assert failed <= 6, failed                                  # of 600 episodes: a gait that never failed in 96 may in the 97th
    assert z["returns"][:, 1].max() < 60                        # over the search's 96 episodes
    assert std.max() < 60 * 1.3, (mean[std.argmax()], std.max())    # 24 know a spread to 15%: two of these and no more
    # the file says what its gaits earn, to five standard errors; from here on its means, of 96 episodes, know better than these
    assert (np.abs(mean - z["returns"][:, 0]) < 5 * np.array(sure)).all(), np.abs((mean - z["returns"][:, 0]) / sure).max()
    told = z["returns"][:, 0]
    gaps = np.diff(told)
    assert (gaps > 0).all() and told.min() < 30 and told.max() >= 6000
    assert gaps[told[1:] <= 3000].max() <= 200 and gaps.max() <= 400


@pytest.mark.xfail(strict=True, reason="asked: a spread under 60 over six episodes; the fastest have 50 to 60, so one six in three is wider")
def test_no_six_episodes_of_any_gait_spread_wider_than_60():
    z = common.load_arrays(LADDER)
    W, b = (z[k].astype(float).repeat(6, 0) for k in ("W", "b"))
    ret = dt.play(W, b, dt.starts(len(W), np.random.default_rng(7)), 1000)[2].sum(1).reshape(-1, 6)
    assert ret.std(1).max() < 60


def test_one_gait_for_all_plays_as_many_equal_ones(tmp_path):
    z = common.load_arrays(LADDER)
    W, b, start = z["W"][-1].astype(float), z["b"][-1].astype(float), dt.starts(5, np.random.default_rng(3))
    one, many = dt.play(W, b, start, 200), dt.play(W[None].repeat(5, 0), b[None].repeat(5, 0), start, 200)
    assert all(np.array_equal(x, y) for x, y in zip(one, many))


def test_the_fastest_comes_in_once_more_and_counts_only_if_it_got_faster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    z, (slow, fast), asked = common.load_arrays(LADDER), (25, 30), []
    keep = {k: z[k][[slow]].astype(float) for k in ("W", "b", "returns")}
    state = dict(W=keep["W"][0], b=keep["b"][0], first=1.0, i=1000, tries=0, rough=True, running=np.empty((0, 16, 19)), hard=np.ones(1, bool),
                 vetted=1, failed=np.zeros(1), Ws=keep["W"], bs=keep["b"], found=keep["returns"])

    def lesson(W, b, speed, running, hard, args, rng, whole):
        asked.append((speed, running, whole))
        return (W, b) if len(asked) < 3 else (z["W"][fast].astype(float), z["b"][fast].astype(float))

    monkeypatch.setattr(dt, "gait_near", lesson)
    goal = round(1.015 * keep["returns"][0, 0] / 1000, 2)
    for steps, gaits in ((2, 1), (5, 2)):                           # after one lesson it is what it was; the third makes another of it
        (tmp_path / "out").mkdir(exist_ok=True)
        np.savez(f"out/search_2_{steps}_8_16_1.npz", **state)
        dt.search(dt.get_args(["--search_steps", str(steps)]), tmp_path / "ladder.npz")
        assert len(common.load_arrays("ladder.npz")["W"]) == gaits and set(asked) == {(goal, None, True)}
    assert len(asked) == 3


# ---- the model -----------------------------------------------------------------------------------------------------------------

def batch(B=3, K=6, seed=0, pad=True):
    g = torch.Generator().manual_seed(seed)
    valid = torch.ones(B, K, dtype=torch.bool)
    if pad:
        valid[0, :2] = False
    return [torch.rand(B, K, generator=g) * 5, torch.randn(B, K, 17, generator=g), torch.rand(B, K, 6, generator=g) * 2 - 1,
            torch.arange(K).repeat(B, 1) + 100, valid]


def big(condition, **kw):
    """A model whose weights are large enough that everything matters."""
    torch.manual_seed(0)
    model = dt.DecisionTransformer(**dict(dict(n_layer=3, n_head=1, n_embd=128, dropout=0.0, condition=condition), **kw)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("ln_" in name and "weight" in name), std=0.08)
    return model


def test_it_has_the_papers_727558_parameters():
    count = lambda condition: sum(p.numel() for p in big(condition).parameters())
    assert count("rtg") == 727_558
    assert count("rate") == 727_558 + 8 * 128                   # nine features instead of one number
    assert count("bc") == 727_558 - 2 * 128


@pytest.mark.parametrize("n_head", [1, 4])
def test_it_computes_what_transformers_decision_transformer_computes(n_head):
    from transformers import DecisionTransformerConfig, DecisionTransformerModel
    ours = big("rtg", n_head=n_head)
    ref = DecisionTransformerModel(DecisionTransformerConfig(state_dim=17, act_dim=6, hidden_size=128, max_ep_len=1000, n_layer=3, n_head=n_head,
                                   n_inner=512, activation_function="relu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, n_positions=1024)).eval()
    w, pairs = ours.state_dict(), {}
    for a, b in (("embed_timestep", "embed_time"), ("embed_return", "embed_return"), ("embed_state", "embed_state"), ("embed_action", "embed_action"),
                 ("embed_ln", "ln_in"), ("encoder.ln_f", "ln_out"), ("predict_action.0", "head")):
        for kind in ("weight", "bias"):
            if f"{b}.{kind}" in w:
                pairs[f"{a}.{kind}"] = w[f"{b}.{kind}"]
    for i in range(3):
        h, o = f"encoder.h.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            t = (lambda x: x.T) if kind == "weight" else (lambda x: x)      # GPT-2's Conv1D keeps its weights transposed
            pairs[h + f"attn.c_attn.{kind}"] = t(torch.cat([w[o + f"attn.query.{kind}"], w[o + f"attn.key_value.{kind}"]]))
            pairs[h + f"attn.c_proj.{kind}"] = t(w[o + f"attn.proj.{kind}"])
            pairs[h + f"mlp.c_fc.{kind}"], pairs[h + f"mlp.c_proj.{kind}"] = t(w[o + f"up.{kind}"]), t(w[o + f"down.{kind}"])
            pairs[h + f"ln_1.{kind}"], pairs[h + f"ln_2.{kind}"] = w[o + f"ln_1.{kind}"], w[o + f"ln_2.{kind}"]
    missing, unexpected = ref.load_state_dict(pairs, strict=False)
    assert not unexpected and all(k.startswith(("predict_state", "predict_return", "encoder.wte", "encoder.wpe")) for k in missing)
    rtg, s, a, t, valid = batch()
    with torch.inference_mode():
        ref.encoder.wpe.weight.zero_()              # theirs adds position 0 of GPT-2's table to every token: a constant
        want = ref(states=s, actions=a, rewards=None, returns_to_go=rtg[..., None] / 1000, timesteps=t, attention_mask=valid.long()).action_preds
        got = ours(rtg, s, a, t, valid)
    assert (got - want)[valid].abs().max() < 1e-5


@pytest.mark.parametrize("condition", ["rate", "rtg", "bc"])
def test_the_future_and_the_padding_are_not_seen(condition):
    model = big(condition)
    x = batch()
    base = model(*x)
    for k in range(6):
        y = [z.clone() for z in x]
        y[0][:, k + 1:] += 1.0                      # from the next step on, everything; of this step, its action
        y[1][:, k + 1:] += 1.0
        y[2][:, k:] *= -1
        valid = x[4][:, :k + 1]                     # what a padded row computes is thrown away
        assert torch.equal(model(*y)[:, :k + 1][valid], base[:, :k + 1][valid])
    y = [z.clone() for z in x]
    y[0][0, :2], y[1][0, :2], y[2][0, :2] = 9.0, 9.0, -0.9
    assert torch.allclose(model(*y)[x[4]], base[x[4]], atol=1e-6)
    for which in (0, 1, 2):                         # and what lies in the past is seen
        y = [z.clone() for z in x]
        y[which][:, 2] += 1.0
        assert (condition == "bc" and which == 0) == torch.equal(model(*y)[:, -1], base[:, -1])


@pytest.mark.parametrize("condition", ["rate", "bc"])
def test_last_alone_is_the_last_of_all(condition):
    model, x = big(condition), batch()
    assert torch.allclose(model(*x, last=True)[:, 0], model(*x)[:, -1], atol=1e-6)


def test_attention_is_torchs():
    torch.manual_seed(0)
    for n_head in (1, 4):
        att, x = dt.Attention(64, n_head, 0.0), torch.randn(2, 9, 64)
        mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        q, (k, v) = att.query(x), att.key_value(x).split(64, 2)
        q, k, v = (z.view(2, 9, n_head, -1).transpose(1, 2) for z in (q, k, v))
        want = att.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(2, 9, 64))
        assert torch.allclose(att(x, mask, slice(None)), want, atol=1e-6)
        assert torch.allclose(att(x, mask, slice(1, None, 3)), want[:, 1::3], atol=1e-6)


# ---- the idea --------------------------------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 99))
def test_returns_to_go_and_rate_against_a_loop(length, seed):
    rew = np.random.default_rng(seed).standard_normal(sum(length)).astype(np.float32)
    got, i = dt.returns_to_go(rew, np.array(length)), 0
    for n in length:
        for t in range(n):
            want = sum(float(x) for x in rew[i + t:i + n])
            assert got[i + t] == pytest.approx(want, abs=1e-4)
            assert dt.reward_rate(got[i + t], n - t) == pytest.approx(want / max(n - t, 20), abs=1e-4)
        i += n


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 99))
def test_windows_against_a_loop(length, K, seed):
    length = np.array(length)
    first = np.cumsum(length) - length
    i, t, valid = dt.windows(first, length, K, 64, np.random.default_rng(seed))
    episode, step = np.repeat(np.arange(len(length)), length), np.concatenate([np.arange(n) for n in length])
    for row_i, row_t, row_v in zip(i, t, valid):
        e, end = episode[row_i[-1]], row_t[-1]
        assert step[row_i[-1]] == end and row_v[-1]
        for j in range(K):
            at = end - (K - 1 - j)
            assert row_v[j] == (at >= 0)
            if at >= 0:
                assert episode[row_i[j]] == e and step[row_i[j]] == at == row_t[j]


def test_windows_end_everywhere():
    """The first steps of an episode too: in evaluation a window begins before step 0, so it must in training."""
    length = np.array([5, 7])
    i, _, _ = dt.windows(np.array([0, 5]), length, 4, 4000, np.random.default_rng(0))
    counts = np.bincount(i[:, -1], minlength=12)
    assert counts.min() > 250 and counts.max() < 420


def test_first_last_step_does_not_pass_last():
    ask = lambda text: dt.get_args(["--targets", text]).targets
    assert ask("300:800:300") == [300, 600] and ask("100:300:100") == [100, 200, 300] and ask("0.1:0.3:0.1") == pytest.approx([0.1, 0.2, 0.3])
    assert ask("7:7:5") == [7]


def test_the_figure_shows_negative_targets_and_joins_means_by_target(tmp_path, monkeypatch):
    import matplotlib.axes
    drawn, limits = [], []
    monkeypatch.setattr(matplotlib.axes.Axes, "legend", lambda self, **kw: limits.append((self.get_xlim(), [x.get_slope() for x in self.lines if hasattr(x, "get_slope")])))
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, x, y, *a, _plot=matplotlib.axes.Axes.plot, **kw:
                        (drawn.append((np.array(x), np.array(y))), _plot(self, x, y, *a, **kw))[1])
    asked = np.array([[300.0, 310.0], [-200.0, -200.0]])             # under a schedule each episode ends up owing something else
    dt.figure([("it", asked, asked + [[2.0, 4.0]])], tmp_path / "f.png")
    (x, y), (dots, _) = drawn
    ((low, high), slopes), = limits
    assert low < -200 and high > 310 and slopes == [1]                  # the diagonal is a line without ends
    assert x.tolist() == [-200, 305] and y.tolist() == [-197, 308] and len(dots) == 4


class Spy:
    """Stands where a model stands, does nothing, and keeps what it was told is still to be earned."""
    def __init__(self, condition, most):
        self.condition, self.most, self.told = condition, torch.tensor(most), []

    def __call__(self, r, s, a, t, valid, last):
        self.told.append(r[:, -1].clone().numpy())
        return torch.zeros(len(r), 1, 6)


@pytest.mark.parametrize("condition", ["rate", "rtg"])
def test_a_rate_it_was_never_shown_is_told_as_the_largest_it_was(condition):
    spy, args = Spy(condition, 25.0), dt.get_args(["--max_steps", "50"])
    asked, got, _, diary = dt.evaluate(spy, [1000.0, 9000.0], args, "cpu")
    owed, left = 1000.0 - np.array([0.0, *(d[1] for d in diary[:-1])]), np.maximum(50 - np.arange(50), 20)
    want = np.minimum(owed / left, 25.0) if condition == "rate" else owed
    told = np.array(spy.told)
    assert np.allclose(told[:, 0], want, rtol=1e-5) and asked.tolist() == [1000.0, 9000.0]
    assert (told[:, 1] == 25.0).all() if condition == "rate" else (told[:, 1] > 8000).all()


# ---- files -----------------------------------------------------------------------------------------------------------------------

def some_episodes(E=3, T=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((E, T + 1, 17)).astype(np.float32), rng.uniform(-1, 1, (E, T, 6)).astype(np.float32), rng.standard_normal((E, T)).astype(np.float32)


def same(data, obs, act, rew):
    assert np.array_equal(data.obs, obs[:, :-1].reshape(-1, 17)) and np.array_equal(data.act, act.reshape(-1, 6))
    assert np.array_equal(data.rew, rew.reshape(-1)) and data.length.tolist() == [rew.shape[1]] * len(rew)
    assert np.allclose(data.returns, rew.sum(1), atol=1e-4)


def test_our_file_is_minaris(tmp_path):
    import minari
    obs, act, rew = some_episodes(12)               # 12: episode_10 must not sort before episode_2
    dt.write_episodes(tmp_path / "cheetah_ladder.hdf5", obs, act, rew)
    same(common.read_episodes(tmp_path / "cheetah_ladder.hdf5"), obs, act, rew)
    ds = minari.MinariDataset(tmp_path)
    assert ds.total_episodes == 12 and ds.total_steps == 360
    for i, e in enumerate(ds):
        assert np.array_equal(e.observations, obs[i]) and np.array_equal(e.actions, act[i]) and np.array_equal(e.rewards, rew[i])
        assert e.truncations[-1] and not e.terminations.any()
    assert ds.recover_environment().spec.id == "HalfCheetah-v5"


def test_minaris_file_is_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import gymnasium, minari
    from minari.data_collector import EpisodeBuffer
    obs, act, rew = some_episodes(11, 40)
    ends = np.arange(40) == 39
    buffers = [EpisodeBuffer(id=i, observations=obs[i].astype(float), actions=act[i], rewards=list(rew[i].astype(float)),
                             terminations=[False] * 40, truncations=list(ends), infos={}) for i in range(11)]
    minari.create_dataset_from_buffers("mujoco/halfcheetah/mine-v0", buffers, env=gymnasium.spec("HalfCheetah-v5"))
    (path,) = tmp_path.rglob("main_data.hdf5")
    same(common.read_episodes(path), obs, act, rew)


@pytest.mark.parametrize("timeouts", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_d4rl_layout(tmp_path, timeouts, column):
    obs, act, rew = some_episodes(3, 1000)
    flat = dict(observations=obs[:, :-1].reshape(-1, 17), actions=act.reshape(-1, 6), rewards=rew.reshape(-1), terminals=np.zeros(3000, bool))
    tail = 123                                      # the last episode is cut short: dropped
    flat = {k: np.concatenate([v, v[:tail]]) for k, v in flat.items()}
    if timeouts:
        flat["timeouts"] = np.arange(1, 3124) % 1000 == 0
    if column:
        flat["rewards"], flat["terminals"] = flat["rewards"][:, None], flat["terminals"][:, None]
    with h5py.File(tmp_path / "d.hdf5", "w") as f:
        for k, v in flat.items():
            f.create_dataset(k, data=v, compression="gzip")
        f["metadata/algorithm"], f["metadata/iteration"] = "SAC", 7         # scalars, as in the real files
    same(common.read_episodes(tmp_path / "d.hdf5"), obs, act, rew)


def test_another_ladder_is_another_data_set_and_an_older_one_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(dt, "collect", lambda args, path: (made.append(path.name), dt.write_episodes(path, *some_episodes(2))))
    def ask(*flags):
        (tmp_path / "out/data").mkdir(parents=True, exist_ok=True)
        dt.find_dataset(dt.get_args(list(flags)))
        return made.pop() if made else None
    z = common.load_arrays(LADDER)
    np.savez(tmp_path / "half.npz", **{k: v[::2] for k, v in z.items()})
    assert ask() == "cheetah_ladder.hdf5" and ask() is None
    assert ask("--rough", "0") == "cheetah_ladder_12_0.05_0.6_0.0.hdf5" and ask("--rough", "0") is None
    other = ask("--ladder", "half.npz")
    assert re.fullmatch(r"cheetah_ladder_12_0\.05_0\.6_0\.3_[0-9a-f]{8}\.hdf5", other) and ask("--ladder", "half.npz") is None
    old = LADDER.stat().st_mtime - 100
    os.utime(tmp_path / "out/data/cheetah_ladder.hdf5", (old, old))
    assert common.find_ladder("half.npz").name == "half.npz"        # whatever is there, if it is not dt_cheetah.py's to make
    assert ask() == "cheetah_ladder.hdf5" and ask() is None


def test_parts_of_an_older_ladder_are_collected_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    z = common.load_arrays(LADDER)
    np.savez("two.npz", **{k: v[[10, 20]] for k, v in z.items()})
    ask = ["--ladder", "two.npz", "--ladder_episodes", "2"]
    for age, kept in ((-50, False), (50, True)):
        folder = tmp_path / "out/data/x.parts"
        folder.mkdir(parents=True)
        np.savez(folder / "0.npz", obs=np.full((1, 1001, 17), 7.0, np.float32), act=np.zeros((1, 1000, 6), np.float32), rew=np.zeros((1, 1000), np.float32))
        when = (tmp_path / "two.npz").stat().st_mtime + age
        os.utime(folder / "0.npz", (when, when))
        dt.collect(dt.get_args(ask), tmp_path / "out/data/x.hdf5")
        data = common.read_episodes(tmp_path / "out/data/x.hdf5")
        assert ((data.obs == 7).all(1).any() == kept) and len(data.length) == (1 if kept else 4) and not folder.exists()


def test_a_ladder_without_gaits_is_a_sentence(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "l.npz", x=np.zeros(3))
    with pytest.raises(SystemExit) as e:
        dt.collect(dt.get_args(["--ladder", str(tmp_path / "l.npz")]), tmp_path / "d.hdf5")
    assert e.value.code == 2 and "l.npz cannot be read" in capsys.readouterr().err
    W, b = np.zeros((5, 6, 17)), np.zeros((5, 6))
    for bad in (dict(W=W[:0], b=b[:0]), dict(W=W, b=b[:3]), dict(W=W * np.nan, b=b)):
        np.savez(tmp_path / "l.npz", **bad)
        with pytest.raises(SystemExit) as e:
            dt.collect(dt.get_args(["--ladder", str(tmp_path / "l.npz")]), tmp_path / "d.hdf5")
        assert e.value.code == 2 and "holds no gaits, or broken ones" in capsys.readouterr().err


def test_minaris_file_is_the_newest(tmp_path):
    for name in ("a.hdf5", "b.hdf5"):
        dt.write_episodes(tmp_path / name, *some_episodes())
        assert (tmp_path / "main_data.hdf5").resolve().name == name
        (tmp_path / name).unlink()


def test_the_banner_tells_d4rls_score(tmp_path, capsys):
    obs, act, rew = some_episodes(2, 1000)
    rew[0], rew[1] = 12.135, -0.280178953                           # D4RL's expert and its random policy
    dt.write_episodes(tmp_path / "d.hdf5", obs, act, rew)
    dt.find_dataset(dt.get_args(["--dataset", str(tmp_path / "d.hdf5")]))
    assert re.search(r"largest: -280 .* 12135; D4RL-normalised: -?0\.0 .* 100\.0$", capsys.readouterr().out.strip())


def spoil(path, name, value):
    with h5py.File(path, "r+") as f:
        del f[name]
        if value is not None:
            f[name] = value


BROKEN = {
    "not hdf5 at all": lambda p: p.write_bytes(b"hello" * 100),
    "empty": lambda p: p.write_bytes(b""),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:-p.stat().st_size // 3]),
    "no rewards": lambda p: spoil(p, "episode_1/rewards", None),
    "wrong width": lambda p: spoil(p, "episode_1/observations", np.zeros((31, 18))),
    "an axis more": lambda p: spoil(p, "episode_1/actions", np.zeros((30, 2, 3))),
    "a single number": lambda p: spoil(p, "episode_1/rewards", 3.0),
    "lengths differ": lambda p: spoil(p, "episode_1/actions", np.zeros((29, 6))),
    "nan": lambda p: spoil(p, "episode_1/rewards", np.full(30, np.nan)),
    "text for numbers": lambda p: spoil(p, "episode_1/rewards", "none today"),
    "a group for an array": lambda p: (spoil(p, "episode_1/rewards", None), spoil_group(p)),
    "zero steps": lambda p: [spoil(p, f"episode_1/{k}", np.zeros(s)) for k, s in (("observations", (1, 17)), ("actions", (0, 6)), ("rewards", (0,)))],
    "a shape of terabytes": lambda p: spoil_huge(p),
    "an odd name": lambda p: spoil_name(p),
}


def spoil_group(path):
    with h5py.File(path, "r+") as f:
        f.create_group("episode_1/rewards")


def spoil_huge(path):
    with h5py.File(path, "r+") as f:
        del f["episode_1/observations"]
        f.create_dataset("episode_1/observations", shape=(10**11, 17), chunks=(1000, 17), dtype="f4")


def spoil_name(path):
    with h5py.File(path, "r+") as f:
        f.create_group("episode_one")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_data_set_is_one_sentence(tmp_path, capsys, how):
    path = tmp_path / "broken.hdf5"
    dt.write_episodes(path, *some_episodes())
    BROKEN[how](path)
    with pytest.raises(SystemExit) as e:
        common.read_episodes(path)
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and "broken.hdf5" in err[-1]


def test_flipped_bits_in_the_numbers_are_noticed(tmp_path, capsys):
    path = tmp_path / "flip.hdf5"
    obs, act, rew = some_episodes(2, 50)
    dt.write_episodes(path, obs, act, rew)
    good, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(60):
        at = good.index(obs[1].tobytes()[:64]) + int(rng.integers(0, obs[1].nbytes))
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises(SystemExit):
            common.read_episodes(path)


FUZZ = """
import sys, contextlib, io, pathlib, numpy as np
sys.path.insert(0, sys.argv[1])
import common
path, rng = pathlib.Path(sys.argv[2]), np.random.default_rng(int(sys.argv[3]))
good, counts = path.read_bytes(), [0, 0]
for i in range(int(sys.argv[4])):
    bad = bytearray(good)
    bad[int(rng.integers(len(bad)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bad if i % 4 else good[:int(rng.integers(len(good)))])
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            d = common.read_episodes(path)
            assert d.obs.shape == (len(d.rew), 17) and d.length.sum() == len(d.rew) and np.isfinite(d.obs).all()
            counts[0] += 1
        except SystemExit as e:
            assert e.code == 2 and err.getvalue().count(chr(10)) == 1, err.getvalue()
            counts[1] += 1
print(counts)
"""


def test_200_damaged_files_load_whole_or_are_refused(tmp_path):
    """In a process of its own: a damaged file must not crash the C library under us either, hang it, or eat the memory."""
    import resource
    path = tmp_path / "f.hdf5"
    dt.write_episodes(path, *some_episodes(2, 20))
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    r = subprocess.run([sys.executable, "-c", FUZZ, str(ROOT), str(path), "0", "200"], capture_output=True, text=True, timeout=100, preexec_fn=limit)
    assert r.returncode == 0, r.stderr[-2000:]
    assert json.loads(r.stdout.splitlines()[-1])[1] > 50


# ---- the command -------------------------------------------------------------------------------------------------------------------

def test_smoke_alone_in_an_empty_folder(alone):
    r = alone("dt_cheetah.py", "--smoke", "--targets", "300", "600:1200:300", "--baseline", "bc", "rtg", files=ALONE)
    assert r.returncode == 0, r.stderr
    assert "Traceback" not in r.stderr and "settotalmass" not in r.stdout + r.stderr
    assert not list(alone.folder.rglob("MUJOCO_LOG.TXT"))
    assert not list(alone.folder.rglob("*.part*"))
    row = json.loads((alone.folder / "out/results.jsonl").read_text().splitlines()[-1])
    assert (alone.folder / row["metrics"]["video"]).stat().st_size > 1000
    assert (alone.folder / row["metrics"]["figure"]).read_bytes()[:4] == b"\x89PNG"
    assert r.stdout.splitlines()[-1].startswith("result dt_cheetah.py:")
    for name in dt.NAMES.values():
        assert name in r.stdout
    # the same command again: everything is found, nothing is trained
    before = {p: p.stat().st_mtime_ns for p in alone.folder.glob("out/*.pt")}
    r = alone("dt_cheetah.py", "--smoke", "--targets", "300", "600:1200:300", "--baseline", "bc", "rtg", files=ALONE)
    assert r.returncode == 0 and len(before) == 3
    assert before == {p: p.stat().st_mtime_ns for p in alone.folder.glob("out/*.pt")}


@pytest.mark.parametrize("flags", [["--nonsense"], ["--steps", "many"], ["--target_rew", "fast"], ["--targets", "1:x:3"], ["--dataset", "no/such-v9"],
                                   ["--target_schedule", "400"], ["--target_schedule", "1000:600"], ["--targets=-1e300"], ["--steps", "0"], ["--context", "0"], ["--n_head", "3"], ["--episodes", "-1"],
                                   ["--target_rew", "nan"], ["--targets", "5:1:0"], ["--collect", "--dataset", "x.hdf5"], ["--search", "--collect"]])
def test_a_users_mistake_is_one_sentence(alone, flags):
    refused(alone("dt_cheetah.py", "--smoke", *flags, files=ALONE))


def test_an_opengl_that_is_not_here_is_one_sentence(alone):
    """Servers export MUJOCO_GL for all programs; mujoco cannot even be imported if it names what is missing."""
    r = alone("dt_cheetah.py", "--smoke", "--steps", "1", "--max_steps", "20", "--video_steps", "3", "--renderer", "mujoco", files=ALONE,
              env=dict(os.environ, MUJOCO_GL="nothing"))
    said = [x for x in r.stderr.splitlines() if x.strip() and "\r" not in x and "it/s" not in x]
    assert r.returncode == 0 and len(said) == 1 and said[0].startswith("no OpenGL here"), r.stderr
    assert (alone.folder / "out/dt_cheetah_1200.mp4").stat().st_size > 1000


def test_other_data_under_the_same_name_is_another_model(tmp_path):
    args = dt.get_args(["--dataset", str(tmp_path / "my.hdf5")])
    names = set()
    for seed in (0, 0, 1):
        dt.write_episodes(tmp_path / "my.hdf5", *some_episodes(2, seed=seed))
        names.add(dt.checkpoint(args, "rate").name)
    assert len(names) == 2 and dt.checkpoint(dt.get_args([]), "rate") == dt.checkpoint(dt.get_args([]), "rate")


def test_two_runs_may_collect_at_once(alone):
    cmd = [sys.executable, "dt_cheetah.py", "--collect", "--ladder_episodes", "1"]
    for name in ("common.py", "dt_cheetah.py", "data/cheetah_ladder.npz"):
        (alone.folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, alone.folder / name)
    both = [subprocess.Popen(cmd, cwd=alone.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert len(common.read_episodes(alone.folder / "out/data/cheetah_ladder_1_0.05_0.6_0.3.hdf5").length) > 40


def test_a_missing_or_broken_ladder_and_checkpoint(alone):
    r = alone("dt_cheetah.py", "--smoke")
    assert "cheetah_ladder.npz" in refused(r)
    assert alone("dt_cheetah.py", "--smoke", "--no-video", files=ALONE).returncode == 0
    (path,) = alone.folder.glob("out/*.pt")
    good = path.read_bytes()
    path.write_bytes(good[:len(good) // 2])
    assert path.name in refused(alone("dt_cheetah.py", "--smoke", "--no-video"))
    path.write_bytes(good)
    state = torch.load(path, weights_only=True)
    state["model"]["embed_state.weight"] = torch.zeros(7, 17)
    torch.save(state, path)
    assert "shape" in refused(alone("dt_cheetah.py", "--smoke", "--no-video"))


def killed(cmd, cwd, until, times=1):
    """Start cmd, kill -9 it as soon as until() is true; that many times."""
    for k in range(times):
        p = subprocess.Popen(cmd, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.time() + 60
        while not until() and p.poll() is None and time.time() < end:
            time.sleep(0.002)
        alive = p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert alive, "it ended before it was killed"


def test_killed_in_collection_and_in_training_it_ends_at_the_same_weights(alone, tmp_path_factory):
    import shutil
    flags = ["--smoke", "--no-video", "--dropout", "0.1"]
    code = "import sys, dt_cheetah as d; sys.argv[0] = 'dt_cheetah.py'; d.SAVE_EVERY = 5; d.common.run(d.main)"
    cmd = [sys.executable, "-c", code, *flags]
    whole = tmp_path_factory.mktemp("whole")
    for name in ("common.py", "dt_cheetah.py", *ALONE):
        for folder in (whole, alone.folder):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    r = subprocess.run(cmd, cwd=whole, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    out = alone.folder / "out"
    killed(cmd, alone.folder, lambda: any(out.glob("data/*.parts")))                # in collection
    killed(cmd, alone.folder, lambda: any(out.glob("*.pt")))                        # at the first checkpoint
    r = subprocess.run(cmd, cwd=alone.folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    (a,), (b,) = whole.glob("out/*.pt"), out.glob("*.pt")
    a, b = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    assert a["step"] == b["step"] == 20
    for k in a["model"]:
        assert torch.equal(a["model"][k], b["model"][k]), k


def test_killed_in_the_search_it_finds_the_same_gaits(alone, tmp_path_factory):
    import shutil
    whole = tmp_path_factory.mktemp("whole")
    for name in ("common.py", "dt_cheetah.py"):
        for folder in (whole, alone.folder):
            shutil.copy(ROOT / name, folder / name)
    cmd = [sys.executable, "dt_cheetah.py", "--smoke", "--search"]
    r = subprocess.run(cmd, cwd=whole, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    state = alone.folder / "out/search_2_2_1_2_25.npz"
    killed(cmd, alone.folder, state.exists)
    size = state.stat().st_size
    killed(cmd, alone.folder, lambda: state.stat().st_size != size)
    r = subprocess.run(cmd, cwd=alone.folder, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    a, b = (common.load_arrays(f / "out/cheetah_ladder.npz") for f in (whole, alone.folder))
    for k in a:
        assert np.array_equal(a[k], b[k])
