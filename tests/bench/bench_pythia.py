"""The adapter's training step beside the same adapter on transformers' GPTNeoXModel: python tests/bench/bench_pythia.py

Same weights, tokens, dtype, optimizer and clipping; the trunk is frozen in both. Each is run in turns, five times: medians and the
spread of the ratio. Memory: what a step keeps for its backward pass (on a GPU: what it adds to the peak), weights not counted.
"""
import pathlib, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import pythia_adapter as pa


class Peer(torch.nn.Module):
    """transformers' GPTNeoXModel in the trunk's place: the same weights, called with embeddings and an attention mask."""
    def __init__(self, trunk):
        super().__init__()
        from transformers import GPTNeoXConfig, GPTNeoXModel
        cfg = trunk.cfg
        self.model = GPTNeoXModel(GPTNeoXConfig(vocab_size=8, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
                                                intermediate_size=cfg.ffn)).to(next(trunk.parameters()))
        self.model.load_state_dict(trunk.state_dict(), strict=False)
        self.model.requires_grad_(False)
        self.final_layer_norm = self.model.final_layer_norm          # the adapter asks it for the dtype

    def forward(self, x, mask, rows):
        seen = mask[:, 0, -1]                                       # the last token sees all but what is padded
        return self.model(inputs_embeds=x, attention_mask=seen.long(), use_cache=False).last_hidden_state[:, rows]


def stepper(trunk, adapter, K, B, device):
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, fused=True)
    g = torch.Generator().manual_seed(0)
    r, s, a = (x.to(device) for x in (torch.rand(B, K, generator=g), torch.randn(B, K, 17, generator=g), torch.rand(B, K, 6, generator=g)))
    t, valid = torch.arange(K, device=device).repeat(B, 1), torch.ones(B, K, dtype=torch.bool, device=device)

    def step(learn=True):
        loss = torch.nn.functional.mse_loss(adapter(trunk, r, s, a, t, valid), a)
        if learn:
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
        return loss.item()
    return step


def pair(shape, device, which=("ours", "transformers")):
    args = pa.get_args(["--model", f"random:{shape}"])
    trunk, adapter, _ = pa.build(args, device)
    return {name: (trunk if name == "ours" else Peer(trunk).to(device), adapter) for name in which}


def memory(step, trunk, device):
    """MB that a step keeps for its backward pass, weights not counted; on a GPU: what it adds to the peak."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    weights, kept = {p.untyped_storage().data_ptr() for p in trunk.parameters()}, {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(n for at, n in kept.items() if at not in weights) / 2**20


def main():
    device = pa.common.pick_device()
    for shape, K, B in (("pythia-70m", 2, 32), ("pythia-70m", 20, 8), ("pythia-410m", 2, 32)):
        both = pair(shape, device)
        steps = {name: stepper(*x, K, B, device) for name, x in both.items()}
        before = " and ".join(f"{step(learn=False):.4f}" for step in steps.values())            # they share adapter and weights: one loss
        n, speeds = max(1, int(2 / time_of(steps["ours"]))), {name: [] for name in steps}      # two seconds a turn
        for _ in range(5):
            for name, step in steps.items():
                began = time.perf_counter()
                for _ in range(n):
                    step()
                speeds[name].append(n / (time.perf_counter() - began))
        ratio = np.array(speeds["ours"]) / np.array(speeds["transformers"])
        used = {name: memory(step, both[name][0], device) for name, step in steps.items()}
        print(f"{shape}, K {K}, batch {B}, {pa.trunk_dtype(pa.get_args([]), device, False)} on {device}: "
              f"{np.median(speeds['ours']):.2f} and {np.median(speeds['transformers']):.2f} steps/s, {np.median(ratio):.2f}x "
              f"({ratio.min():.2f}-{ratio.max():.2f}; asked 1.2x); {used['ours']:.1f} and {used['transformers']:.1f} MB kept; loss {before}", flush=True)


def time_of(step):
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
