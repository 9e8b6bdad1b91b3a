"""lora_llama.py beside transformers, peft and bitsandbytes: same weights, same batch, same process, in turns.

    python tests/bench/bench_llama.py                     about 4 minutes on 2 cores
    python tests/bench/bench_llama.py --memory7b          builds 13.5 GB in out/, loads it in 4 bits, one LoRA step, removes it

Each figure is the best of --repeat turns (a stranger's load only ever adds time); the spread is worst / best.
"""
import argparse, json, os, pathlib, shutil, subprocess, sys, tempfile, threading, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch

import lora_llama as L

CPU_TIME = False
SMOL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=2048, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)


def turns(repeat, **jobs):
    """Run each job once to warm up, then all in turn, `repeat` times -> {name: (best seconds, worst / best)}."""
    seconds, clock = {name: [] for name in jobs}, time.process_time if CPU_TIME else time.perf_counter
    for job in jobs.values():
        job()
    for _ in range(repeat):
        for name, job in jobs.items():
            tic = clock()
            job()
            seconds[name].append(clock() - tic)
    return {name: (min(s), max(s) / min(s)) for name, s in seconds.items()}


def show(what, ours, theirs, unit, asked, better="higher"):
    (a, da), (b, db) = ours, theirs
    ratio = a / b if better == "higher" else b / a
    print(f"{what:34s} {a:10.3g} {b:10.3g} {unit:10s} ratio {ratio:5.2f}  asked {asked:8s} spread {da:.2f}, {db:.2f}", flush=True)
    return ratio


def decode(args, folder, config):
    import transformers
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, n = L.load_model(folder, "float32", quiet=True), args.tokens
    prompt = list(range(5, 37))
    none = [config.vocab_size - 1]                  # an end that random weights will not say
    reference.generation_config.eos_token_id = none
    reference.generation_config.pad_token_id = 0
    weights = [m.weight for m in model.modules() if isinstance(m, L.Linear)] + [model.embed_tokens.weight]
    size = sum(w.nbytes for w in weights)
    # the limit: the same matrices times a vector each, and nothing else
    vectors = [torch.randn(1, w.size(1)) for w in weights]
    big = torch.randn(49152, 576 * 2)
    x = torch.randn(1, big.size(1))

    def matvecs():
        with torch.inference_mode():
            for _ in range(8):
                for w, v in zip(weights, vectors):
                    torch.nn.functional.linear(v, w)

    def one_big():
        with torch.inference_mode():
            for _ in range(8):
                torch.nn.functional.linear(x, big)
    ids = torch.tensor([prompt])
    run = turns(args.repeat, ours=lambda: L.generate(model, [prompt], n, none),
                theirs=lambda: reference.generate(ids, max_new_tokens=n, do_sample=False), matvecs=matvecs, big=one_big)
    assert L.generate(model, [prompt], n, none)[0] == reference.generate(ids, max_new_tokens=n, do_sample=False)[0, 32:].tolist()
    rate = lambda name, k=n: (k / run[name][0], run[name][1])
    show("greedy, batch 1", rate("ours"), rate("theirs"), "tokens/s", ">= 1.3")
    limit, streamed = 8 / run["matvecs"][0], 8 * big.nbytes / run["big"][0] / size
    print(f"{'':34s} {rate('ours')[0] / limit:.0%} of the {limit:.1f} tokens/s that its matrices' mat-vecs alone allow (asked >= 85%); "
          f"{rate('ours')[0] / streamed:.0%} of {streamed:.1f}, one big matrix's rate", flush=True)
    run = turns(args.repeat, ours=lambda: L.beam(model, prompt, 4, n, none), theirs=lambda: reference.generate(ids, max_new_tokens=n, num_beams=4, do_sample=False))
    assert L.beam(model, prompt, 4, n, none) == reference.generate(ids, max_new_tokens=n, num_beams=4, do_sample=False)[0, 32:].tolist()
    show("beam 4", rate("ours"), rate("theirs"), "tokens/s", ">= 1.8")


def step(args, folder, config):
    """One LoRA step (r 16, all linear layers): 4 sequences of 256 tokens, the first half of each a prompt."""
    import peft, transformers
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=16, lora_alpha=32, target_modules=L.TARGETS, lora_dropout=0.0)).train()
    model = L.load_model(folder, "float32", quiet=True)
    L.add_lora(model, L.get_args(["--model", "x", "--lora_dropout", "0"]))
    rng = np.random.default_rng(0)
    seqs = [[([int(i) for i in rng.integers(5, 40000, 256)], 128)] for _ in range(4)]
    ids = torch.tensor([s[0][0] for s in seqs])
    labels = ids.clone()
    labels[:, :128] = -100
    a = torch.optim.AdamW(L.lora_parameters(model).values(), lr=1e-4)
    b = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-4)
    losses = {}

    def ours():
        model.train()
        loss, n = L.loss_of(model, seqs)
        (loss / n).backward()
        a.step(), a.zero_grad()
        losses.setdefault("ours", (loss / n).item())

    def theirs():
        loss = reference(ids, labels=labels, use_cache=False).loss
        loss.backward()
        b.step(), b.zero_grad()
        losses.setdefault("theirs", loss.item())
    run = turns(args.repeat, ours=ours, theirs=theirs)
    assert abs(losses["ours"] - losses["theirs"]) < 1e-3, losses
    show("LoRA step, 4 x 256, half answers", *((1024 / run[k][0], run[k][1]) for k in ("ours", "theirs")), "tokens/s", ">= 1.2")


def quantize(args):
    import bitsandbytes.functional as bf
    for dtype in (torch.float32, torch.bfloat16):
        w = (torch.randn(2048, 4096) * 0.02).to(dtype)
        q, (packed, state), n = L.quantize_nf4(w, False), bf.quantize_4bit(w, quant_type="nf4"), w.numel() / 1e6
        assert torch.equal(q.packed, packed.view(-1))
        assert torch.equal(L.dequantize_nf4(q, dtype), bf.dequantize_4bit(packed, state))
        run = turns(args.repeat, ours=lambda: L.quantize_nf4(w, False), theirs=lambda: bf.quantize_4bit(w, quant_type="nf4"),
                    back=lambda: L.dequantize_nf4(q, dtype), their_back=lambda: bf.dequantize_4bit(packed, state))
        name = str(dtype).removeprefix("torch.")
        rate = {k: (n / t, d) for k, (t, d) in run.items()}
        show(f"NF4 quantize {name}", rate["ours"], rate["theirs"], "M/s", ">= 5")
        show(f"NF4 dequantize {name}", rate["back"], rate["their_back"], "M/s", "fast")


def resident():
    """Resident memory of this process now, in bytes."""
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024


class Peak:
    """The largest resident memory while the block runs, looked at every 5 ms."""
    def __enter__(self):
        self.top, self.run = resident(), True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.run:
            self.top = max(self.top, resident())
            time.sleep(0.005)

    def __exit__(self, *e):
        self.run = False
        self.thread.join()


def memory7b(args):
    """Llama-2-7B's shapes with random weights in 2+ shards; each tensor is one 8 MB tile of noise over and over."""
    folder = ROOT / "out/bench7b"
    C, ff, V, n_layer = 4096, 11008, 32000, args.layers
    spec = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(n_layer):
        spec |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (C, C) for p in "qkvo"}
        spec |= {f"model.layers.{i}.mlp.{p}_proj.weight": (ff, C) for p in ("gate", "up")}
        spec |= {f"model.layers.{i}.mlp.down_proj.weight": (C, ff)}
        spec |= {f"model.layers.{i}.{p}_layernorm.weight": (C,) for p in ("input", "post_attention")}
    tile = (torch.randn(1 << 22) * 0.02).bfloat16()
    try:
        shards, names = {}, list(spec)
        for k in range(3):
            part = names[k::3]
            tensor_of = lambda n: torch.ones(spec[n], dtype=torch.bfloat16) if "norm" in n else tile.repeat(-(-int(np.prod(spec[n])) // len(tile)))[:int(np.prod(spec[n]))].view(spec[n])
            L.write_safetensors(folder / f"model-{k + 1}.safetensors", {n: (torch.bfloat16, spec[n]) for n in part}, tensor_of)
            shards |= {n: f"model-{k + 1}.safetensors" for n in part}
        L.write_json(folder / "model.safetensors.index.json", dict(weight_map=shards))
        L.write_json(folder / "config.json", dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V, hidden_size=C, intermediate_size=ff,
                     num_hidden_layers=n_layer, num_attention_heads=32, num_key_value_heads=32, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16"))
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        # reading and quantizing, each for itself
        tic = time.time()
        for f in folder.glob("*.safetensors"):
            with open(f, "rb", buffering=0) as raw:
                buffer = bytearray(1 << 24)
                while raw.readinto(buffer):
                    pass
        read, w = time.time() - tic, tile.view(1024, 4096)
        linear = sum(int(np.prod(s)) for n, s in spec.items() if "proj" in n)
        L.quantize_nf4(w)
        tic = time.time()
        for _ in range(4):
            L.quantize_nf4(w)
        need = (time.time() - tic) / 4 * linear / w.numel()
        with Peak() as peak:
            tic = time.time()
            model = L.load_model(folder, four_bit=True)
            took = time.time() - tic
        bits = 8 * sum(m.q.nbytes() for m in L.linears(model).values()) / linear
        print(f"7B shape: {size / 1e9:.1f} GB on disk, loaded in {took:.0f} s (reading alone {read:.0f} s, quantizing alone {need:.0f} s), "
              f"{bits:.3f} bits per linear weight (asked <= 4.2), peak resident {peak.top / 1e9:.2f} GB (asked <= 5.5)", flush=True)
        L.add_lora(model, L.get_args(["--model", "x"]))
        model.grad_checkpoint = True
        with Peak() as peak:
            tic = time.time()
            opt = torch.optim.AdamW(L.lora_parameters(model).values())
            loss, n = L.loss_of(model.train(), [[(list(range(5, 5 + args.step_tokens)), 8)]])
            (loss / n).backward()
            opt.step()
        print(f"one LoRA step of {args.step_tokens} tokens: {time.time() - tic:.0f} s, peak resident {peak.top / 1e9:.2f} GB (asked <= 24)")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=5, help="turns per figure")
    p.add_argument("--tokens", type=int, default=64, help="tokens per generation")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--cpu_time", action="store_true", help="CPU seconds instead of wall seconds: with --threads 1, on a machine that others use")
    p.add_argument("--only", default="decode step quantize", help="which parts")
    p.add_argument("--memory7b", action="store_true")
    p.add_argument("--layers", type=int, default=32, help="of the 7B shape")
    p.add_argument("--step_tokens", type=int, default=128)
    args = p.parse_args()
    global CPU_TIME
    CPU_TIME = args.cpu_time
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {'CPU' if CPU_TIME else 'wall'} time, best of {args.repeat}, load {os.getloadavg()[0]:.1f}")
    if args.memory7b:
        return memory7b(args)
    if "quantize" in args.only:
        quantize(args)
    import transformers
    transformers.logging.set_verbosity_error()
    if "decode" in args.only or "step" in args.only:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**SMOL)
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
            if "decode" in args.only:
                decode(args, folder, config)
            if "step" in args.only:
                step(args, folder, config)


if __name__ == "__main__":
    main()
