"""lora_llama.py beside transformers, peft and bitsandbytes: same weights, same batch, same dtype, same process, in turns.

    python tests/bench/bench_llama.py                     some minutes on 2 cores
    python tests/bench/bench_llama.py --memory7b          builds 13.5 GB in out/, loads it in 4 bits, one LoRA step, removes it

Printed are medians, and the median and spread of the turns' ratios. --memory7b removes its checkpoint however it ends, kill -9 apart
(then at its next start), and says so if the disk has no room for it.
"""
import argparse, contextlib, math, os, pathlib, shutil, signal, sys, tempfile, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch

import lora_llama as L

CPU_TIME = False
SMOL = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            max_position_embeddings=2048, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)


def clock():
    return time.process_time() if CPU_TIME else time.perf_counter()


def turns(repeat, **jobs):
    """Run each job once to warm up, then all in turn, `repeat` times -> {name: seconds (repeat,)}."""
    seconds = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeat):
        for name, job in jobs.items():
            tic = clock()
            job()
            seconds[name].append(clock() - tic)
    return {name: np.array(s) for name, s in seconds.items()}


def show(what, seconds, amount, unit, asked, ours="ours", theirs="theirs"):
    """One line in the form that run.py collects; amount: how much of unit a job does."""
    r = seconds[theirs] / seconds[ours]
    print(f"{what}, {amount / np.median(seconds[ours]):.3g} {unit} beside {amount / np.median(seconds[theirs]):.3g}: "
          f"{np.median(r):.2f}x ({r.min():.2f}-{r.max():.2f}); asked {asked}", flush=True)


def decode(args, folder, config):
    import transformers
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, n = L.load_model(folder, "float32"), args.tokens
    prompt = list(range(5, 37))
    none = [config.vocab_size - 1]                  # an end that random weights will not say
    reference.generation_config.eos_token_id = none
    reference.generation_config.pad_token_id = 0
    weights = [m.weight for m in model.modules() if isinstance(m, L.Linear)] + [model.model.embed_tokens.weight]
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
    greedy = lambda: L.generate(model, [prompt], n, none)[0]
    their_greedy = lambda: reference.generate(ids, max_new_tokens=n, do_sample=False)[0, 32:].tolist()
    assert greedy() == their_greedy()
    run = turns(args.repeat, ours=greedy, theirs=their_greedy, first=lambda: L.generate(model, [prompt], 1, none), matvecs=matvecs, big=one_big)
    show("greedy, batch 1", run, n, "tokens/s", ">= 1.3")
    token = (run["ours"] - run["first"]) / (n - 1)          # a token of decoding: the prompt's pass is another matter
    limit, streamed = run["matvecs"] / 8, run["big"] / 8 * size / big.nbytes
    for name, t in ("of its own matrices alone", limit), ("in one big matrix", streamed):
        share = t / token
        print(f"    {np.median(share):.0%} ({share.min():.0%}-{share.max():.0%}) of the {1 / np.median(t):.3g} tokens/s that mat-vecs {name} allow; "
              f"asked >= 85%", flush=True)
    beams = lambda: L.beam(model, prompt, 4, n, none)
    their_beams = lambda: reference.generate(ids, max_new_tokens=n, num_beams=4, do_sample=False)[0, 32:].tolist()
    assert beams() == their_beams()
    show("beam 4", turns(args.repeat, ours=beams, theirs=their_beams), n, "tokens/s", ">= 1.8")


def step(args, folder, config):
    """One LoRA step (r 16, all linear layers): 4 sequences of 256 tokens, the first half of each a prompt."""
    import peft, transformers
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = peft.get_peft_model(reference, peft.LoraConfig(r=16, lora_alpha=32, target_modules=L.TARGETS, lora_dropout=0.0)).train()
    model = L.load_model(folder, "float32")
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
    show("LoRA step, 4 sequences of 256, half answers", run, 1024, "tokens/s", ">= 1.2")


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
        show(f"NF4 quantize {name}", run, n, "M/s", ">= 5")
        show(f"NF4 dequantize {name}", run, n, "M/s", "as fast as can be", "back", "their_back")


class Peak:
    """The largest resident memory while the block runs, in bytes, as Linux keeps it: mapped files count while their pages are in."""
    def __enter__(self):
        with contextlib.suppress(OSError):      # where it cannot be set back, it is the largest since the start
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *e):
        self.top = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def cold(folder):
    """Forget what of a folder's files is in memory: reading them is from the disk again."""
    for f in folder.glob("*.safetensors"):
        with open(f, "rb") as raw:
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build7b(folder, n_layer):
    """Llama-2-7B's shapes with random weights in 3 shards; each tensor is one 8 MB tile of noise over and over. -> {name: shape}"""
    C, ff, V = 4096, 11008, 32000
    spec = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(n_layer):
        spec |= {f"model.layers.{i}.self_attn.{p}_proj.weight": (C, C) for p in "qkvo"}
        spec |= {f"model.layers.{i}.mlp.{p}_proj.weight": (ff, C) for p in ("gate", "up")}
        spec |= {f"model.layers.{i}.mlp.down_proj.weight": (C, ff)}
        spec |= {f"model.layers.{i}.{p}_layernorm.weight": (C,) for p in ("input", "post_attention")}
    tile, names, shards = (torch.randn(1 << 22) * 0.02).bfloat16(), list(spec), {}

    def tensor_of(name):
        n = math.prod(spec[name])
        return torch.ones(n, dtype=torch.bfloat16) if "norm" in name else tile.repeat(-(-n // len(tile)))[:n]
    for k in range(3):
        L.write_safetensors(folder / f"model-{k + 1}.safetensors", {n: (torch.bfloat16, spec[n]) for n in names[k::3]}, tensor_of)
        shards |= {n: f"model-{k + 1}.safetensors" for n in names[k::3]}
    L.write_json(folder / "model.safetensors.index.json", dict(metadata={}, weight_map=shards))
    L.write_json(folder / "config.json", dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V, hidden_size=C, intermediate_size=ff, num_hidden_layers=n_layer,
        num_attention_heads=32, num_key_value_heads=32, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16"))
    return spec


def memory7b(args):
    folder, need = ROOT / "out/bench7b", (0.6 + 0.41 * args.layers) * 1e9
    shutil.rmtree(folder, ignore_errors=True)               # of a run that was killed
    (ROOT / "out").mkdir(exist_ok=True)
    if shutil.disk_usage(ROOT / "out").free < need + 2e9:
        sys.exit(f"{need / 1e9 + 2:.0f} GB of disk are needed in {ROOT / 'out'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # so that the folder goes then too
    try:
        tic = clock()
        spec = build7b(folder, args.layers)
        print(f"{args.layers} layers of Llama-2-7B's shape, written in {clock() - tic:.0f} s", flush=True)
        linear, w = sum(math.prod(s) for n, s in spec.items() if "proj" in n), (torch.randn(4096, 4096) * 0.02).bfloat16()
        # what nobody can do without: reading the files, and quantizing (at the rate of 8 matrices, after one to warm up)
        cold(folder)
        tic, buffer = clock(), bytearray(1 << 24)
        for f in folder.glob("*.safetensors"):
            with open(f, "rb", buffering=0) as raw:
                while raw.readinto(buffer):
                    pass
        read, rate = clock() - tic, turns(8, job=lambda: L.quantize_nf4(w))["job"]
        quantizing = rate.mean() * linear / w.numel()
        cold(folder)
        del w, buffer
        with Peak() as peak:
            tic = clock()
            model = L.load_model(folder, four_bit=True)
            took = clock() - tic
        bits, size = 8 * sum(m.q.nbytes() for m in L.linears(model).values()) / linear, sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.1f} GB on disk, loaded in {took:.1f} s ({read:.1f} s reading alone, {quantizing:.1f} s quantizing alone), "
              f"{bits:.3f} bits per linear weight (asked <= 4.2), peak resident {peak.top / 1e9:.2f} GB (asked <= 5.5)", flush=True)
        L.add_lora(model, L.get_args(["--model", "x"]))
        model.grad_checkpoint = True
        with Peak() as peak:
            tic = clock()
            opt = torch.optim.AdamW(L.lora_parameters(model).values())
            loss, n = L.loss_of(model.train(), [[(list(range(5, 5 + args.step_tokens)), 8)]])
            (loss / n).backward()
            opt.step()
        print(f"one LoRA step of {args.step_tokens} tokens: {clock() - tic:.0f} s, peak resident {peak.top / 1e9:.2f} GB (asked <= 24)")
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
    print(f"torch {torch.__version__}, {args.threads} threads, {'CPU' if CPU_TIME else 'wall'} time, {args.repeat} turns, load {os.getloadavg()[0]:.1f}")
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
