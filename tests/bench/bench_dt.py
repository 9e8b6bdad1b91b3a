"""Speeds of dt_cheetah.py as ratios against its peers, side by side in one run: python tests/bench/bench_dt.py

collection: environment steps per second of play() against gymnasium's AsyncVectorEnv with 2 workers and a bare mujoco.rollout loop
training:   seconds per gradient step against transformers' DecisionTransformerModel: same shapes, dropout, clipping and optimizer
pictures:   frames per second of the numpy renderer, drawn and drawn-and-encoded
Each pair is measured in turns, five times; printed are medians and the spread of the ratio.
"""
import os, pathlib, platform, sys, tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import common
import dt_cheetah as dt
from timing import in_turns, show

LADDER = pathlib.Path(dt.__file__).parent / "data" / "cheetah_ladder.npz"


def collection():
    import gymnasium, mujoco, mujoco.rollout
    z, n, T = common.load_arrays(LADDER), 240, 100
    gait = np.arange(n) % len(z["W"])
    W, b, rng = z["W"][gait].astype(float), z["b"][gait].astype(float), np.random.default_rng(0)
    start = dt.starts(n, rng)
    _, act, _, _ = dt.play(W, b, start, T)
    sim, order = dt.Cheetahs(n), np.ascontiguousarray(act.transpose(1, 0, 2)[:, :, None].repeat(5, 2), dtype=float)

    def bare():                                     # the same physics under the same actions, nothing computed, nothing kept
        state = start.copy()
        for t in range(T):
            sim.pool.rollout(sim.models, sim.datas, state, order[t], nstep=5, control_spec=sim.spec, skip_checks=True, state=sim.out, sensordata=sim.sensor)
            state = np.ascontiguousarray(sim.out[:, -1])
        return n * T

    envs = gymnasium.make_vec("HalfCheetah-v5", num_envs=2, vectorization_mode="async")
    envs.reset(seed=0)

    def vector():
        for t in range(1000):
            envs.step(act[:2, t % T])
        return 2000

    def ours():
        dt.play(W, b, start, T, 0.05, rng)
        return n * T
    speeds = in_turns(5, **{"play()": ours, "AsyncVectorEnv, 2 workers": vector, "bare mujoco.rollout loop": bare})
    envs.close()
    show("collection", "environment steps/s", speeds, "play()", {"AsyncVectorEnv, 2 workers": ">= 4x", "bare mujoco.rollout loop": ">= 0.85x"})


def training(dropout):
    from transformers import DecisionTransformerConfig, DecisionTransformerModel
    B, K = 64, 20
    torch.manual_seed(0)
    ours = dt.DecisionTransformer(3, 1, 128, dropout, "rtg")
    ref = DecisionTransformerModel(DecisionTransformerConfig(state_dim=17, act_dim=6, hidden_size=128, max_ep_len=1000, n_layer=3, n_head=1, n_inner=512,
                                   activation_function="relu", resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, n_positions=1024)).train()
    rtg, s, a = torch.rand(B, K), torch.randn(B, K, 17), torch.rand(B, K, 6)
    t, valid = torch.randint(0, 900, (B, 1)) + torch.arange(K), torch.ones(B, K, dtype=torch.bool)

    def stepper(model, predict, bf16=False):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

        def job():
            for _ in range(10):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    guess = predict()
                loss = torch.nn.functional.mse_loss(guess[valid].float(), a[valid])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                optimizer.step()
            return 10
        job()                                       # warm up
        return job
    us = lambda: ours(rtg, s, a, t, valid)
    them = lambda: ref(states=s, actions=a, rewards=None, returns_to_go=rtg[..., None], timesteps=t, attention_mask=valid.long()).action_preds
    ours.train()
    fast = common.fast_dtype("cpu")                 # what --dtype auto takes on this machine; transformers' own default is float32
    names = dict(ours=f"ours, {fast}", float32="ours, float32", ref="transformers, float32", same=f"transformers, {fast}")
    speeds = in_turns(5, **{names["ours"]: stepper(ours, us, fast == "bfloat16"), names["float32"]: stepper(ours, us),
                            names["ref"]: stepper(ref, them), names["same"]: stepper(ref, them, fast == "bfloat16")})
    title = f"training, batch {B}, K {K}, dropout {dropout}"
    show(title, "gradient steps/s", speeds, names["ours"], {names["ref"]: ">= 1.5x, goal 2x", names["same"]: "none: both in the fast type"})
    show(title, "gradient steps/s", speeds, names["float32"], {names["ref"]: "none: both in float32"})


def pictures():
    import mujoco
    dt.Cheetahs(1)
    z = common.load_arrays(LADDER)
    sim, data, view, poses = dt.Cheetahs(1), mujoco.MjData(dt.Cheetahs.model), common.SideView(), []
    obs = sim.reset(np.random.default_rng(0))
    for t in range(100):
        obs, _ = sim.step(obs @ z["W"][-1].T + z["b"][-1])
        poses.append(sim.state[0, 1:10].copy())

    def frames():
        for q in poses:
            data.qpos[:] = q
            mujoco.mj_forward(dt.Cheetahs.model, data)
            yield view.frame(*common.cheetah_capsules(dt.Cheetahs.model, data), camera=q[0], lines=["target 1200", "return 600", "3.1 m/s"])

    with tempfile.TemporaryDirectory() as folder:
        speeds = in_turns(5, **{"drawn": lambda: sum(1 for _ in frames()),
                                "drawn and encoded": lambda: common.write_video(pathlib.Path(folder) / "v.mp4", frames()) and len(poses)})
    show("pictures, 640 x 352 (asked >= 100)", "frames/s", speeds, "drawn", {})


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    collection()
    training(0.0)
    training(0.1)
    pictures()
