"""lora_llama.py on a CUDA GPU, beside bitsandbytes, transformers and peft: python tests/bench/bench_gpu.py [kernels] [decode] [step]

kernels: the fused dequantize and the fused dequantize-mat-vec: right against float64, and how near to the card's memory bandwidth, which a
         device-to-device copy measures first. Matrices take turns, more of them than the L2 cache holds; timed as replayed CUDA graphs.
decode:  tokens/s of greedy decoding, one sequence, with Llama-2-7B's shape and random weights, in NF4 and in bfloat16.
step:    one LoRA step (r 16, all linear layers, gradient checkpointing) on the same shape in NF4: tokens/s and the peak of memory.
The 7B checkpoint, 13.5 GB, is made in --folder (a memory disk if there is one) and removed.
"""
import argparse, pathlib, shutil, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import numpy as np
import torch

import bench_llama
import lora_llama as L


def milliseconds(jobs, repeat=20):
    """jobs, a list of functions, are recorded one after the other as one CUDA graph -> median milliseconds of a job, over replays."""
    for job in jobs:
        job()
    torch.cuda.synchronize()
    graph, took = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for job in jobs:
            job()
    for _ in range(repeat + 3):
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        took.append(a.elapsed_time(b) / len(jobs))
    return float(np.median(took[3:]))


def copy_bandwidth():
    """GB/s of copying 2 GB from device to device, bytes read plus bytes written."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds([lambda: torch.mul(a, 1.5, out=b)]) / 1e6


def kernels(args):
    import bitsandbytes.functional as bf
    peak = copy_bandwidth()
    print(f"copying: {peak:.0f} GB/s")
    for shape in ((4096, 4096), (11008, 4096), (4096, 11008)):
        n_copies = max(2, int(2.5e8 / (shape[0] * shape[1] / 2)))               # 250 MB of 4-bit weights: several times any L2 cache
        for double in (False, True):
            torch.manual_seed(0)
            w = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for _ in range(n_copies)]
            qs, theirs = [L.quantize_nf4(m, double) for m in w], [bf.quantize_4bit(m, quant_type="nf4", compress_statistics=double) for m in w]
            same = sum(torch.equal(q.packed, t[0].view(-1)) for q, t in zip(qs, theirs))
            exact, back = L.dequantize_nf4(qs[0], torch.float32), bf.dequantize_4bit(*theirs[0]).float()
            x, layer = torch.randn(1, 1, shape[1], device="cuda").bfloat16(), L.Linear(shape[1], shape[0])
            layer.weight, layer.q = None, qs[0]
            with torch.inference_mode():
                want = exact.double() @ x.view(-1).double()
                off = lambda y: f"{((y.view(-1).double() - want).norm() / want.norm()).item():.1e}"
                errors = [off(layer(x.to(dtype))) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
                errors.append(off(bf.gemv_4bit(x, theirs[0][0], state=theirs[0][1])))
            print(f"{shape[0]} x {shape[1]}, maxima {'quantized' if double else 'in fp32'}: {same} of {n_copies} have bitsandbytes' codes; dequantized "
                  f"within {(back - exact.bfloat16().float()).abs().max():.1e} of its bfloat16; mat-vec off float64 by {', '.join(errors[:3])} (bfloat16, "
                  f"float16, float32), bitsandbytes' by {errors[3]} (bfloat16)")
            size = qs[0].nbytes()

            def layers(x):
                out = []
                for q in qs:
                    one = L.Linear(0, 0)
                    one.weight, one.q, one.shape = None, q, shape
                    out.append(lambda one=one: one(x))
                return out
            with torch.inference_mode():
                out = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
                rows = [("dequantize", size + out.nbytes, [lambda q=q: L.dequantize_nf4(q, torch.bfloat16) for q in qs],
                         [lambda t=t: bf.dequantize_4bit(*t, out=None) for t in theirs]),
                        ("mat-vec", size + x.nbytes + 2 * shape[0], layers(x), [lambda t=t: bf.gemv_4bit(x, t[0], state=t[1]) for t in theirs])]
                for name, moved, ours, peer in rows:
                    a, b = milliseconds(ours), milliseconds(peer)
                    print(f"    {name}: {1e3 * a:.1f} us, {moved / a / 1e6:.0f} GB/s, {moved / a / 1e6 / peak:.0%} of copying; bitsandbytes {1e3 * b:.1f} us: {b / a:.2f}x", flush=True)
                if not double:
                    c = milliseconds([lambda m=m: torch.nn.functional.linear(x, m) for m in w])
                    print(f"    torch's mat-vec of the bfloat16 matrix: {1e3 * c:.1f} us, {w[0].nbytes / c / 1e6 / peak:.0%} of copying")
            del w, qs, theirs


def seconds(job, repeat):
    took = []
    for _ in range(repeat):
        torch.cuda.synchronize()
        tic = time.perf_counter()
        job()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - tic)
    return np.array(took)


def rates(label, n, ours, theirs=None):
    a = n / ours
    text = f"{label}: {np.median(a):.1f} tokens/s ({a.min():.1f}-{a.max():.1f})"
    if theirs is not None:
        b = n / theirs
        text += f"; {np.median(b):.1f} ({b.min():.1f}-{b.max():.1f}): {np.median(a) / np.median(b):.2f}x"
    print(text, flush=True)


def load_peer(args, four_bit):
    import transformers
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                             bnb_4bit_compute_dtype=torch.bfloat16) if four_bit else None
    model = transformers.LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [31999], 0
    return model.eval()


def decode(args):
    prompt, none, kept = list(range(5, 133)), [31999], L.record
    ids = torch.tensor([prompt], device="cuda")
    for four_bit in (True, False):
        model = L.load_model(args.folder, "bfloat16", four_bit, device="cuda")
        size = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes + sum(m.q.nbytes() for m in L.linears(model).values() if m.q)
        rate = copy_bandwidth()
        go = lambda n: (lambda: L.generate(model, [prompt], n, none))
        run = lambda: seconds(go(args.tokens), args.repeat) - np.median(seconds(go(4), args.repeat))        # without prompt, first token and recording
        name = "NF4" if four_bit else "bfloat16"
        L.generate(model, [prompt], 8, none)
        recorded = run()
        rates(f"{name}, recorded", args.tokens - 4, recorded)
        first = L.generate(model, [prompt], 32, none)
        L.record = lambda step, *inputs: step
        assert first == L.generate(model, [prompt], 32, none), "recorded and launched steps say the same"
        launched = run()
        L.record = kept
        if four_bit:
            L.add_lora(model, L.get_args(["--model", "x"]))
            L.generate(model, [prompt], 8, none)
            rates("NF4 with LoRA, unmerged", args.tokens - 4, run())
        del model
        torch.cuda.empty_cache()
        peer = load_peer(args, four_bit)
        theirs = lambda n: (lambda: peer.generate(ids, max_new_tokens=n, do_sample=False))
        theirs(8)()
        t = seconds(theirs(args.tokens), args.repeat) - np.median(seconds(theirs(4), args.repeat))
        del peer
        torch.cuda.empty_cache()
        rates(f"greedy, {name}, beside transformers{' and bitsandbytes' * four_bit}", args.tokens - 4, recorded, t)
        rates(f"    steps launched one by one, not recorded", args.tokens - 4, launched, t)
        print(f"    {size / 1e9:.2f} GB of weights a token: {size / (np.median(recorded) / (args.tokens - 4)) / 1e9 / rate:.0%} of copying's {rate:.0f} GB/s", flush=True)


def lora_step(args):
    import peft
    B, T = args.batch
    rng = np.random.default_rng(0)
    seqs = [[([int(i) for i in rng.integers(5, 30000, T)], 1)] for _ in range(B)]
    ids = torch.tensor([s[0][0] for s in seqs], device="cuda")

    def measure(loss_of, params):
        opt = torch.optim.AdamW(params, lr=1e-4)

        def step():
            loss = loss_of()
            loss.backward()
            opt.step(), opt.zero_grad()
            return loss.item()
        losses = [step()]
        torch.cuda.reset_peak_memory_stats()
        return seconds(step, args.repeat), torch.cuda.max_memory_allocated() / 1e9, losses[0]

    def ours():
        model = L.load_model(args.folder, "bfloat16", True, device="cuda")
        L.add_lora(model, L.get_args(["--model", "x", "--lora_dropout", "0"]))
        model.grad_checkpoint = True
        model.train()
        return measure(lambda: (lambda loss, n: loss / n)(*L.loss_of(model, seqs)), list(L.lora_parameters(model).values()))

    def theirs():
        model = load_peer(args, True)
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=L.TARGETS, lora_dropout=0.0)).train()
        return measure(lambda: model(ids, labels=ids, use_cache=False).loss, [p for p in model.parameters() if p.requires_grad])
    a = ours()
    torch.cuda.empty_cache()
    b = theirs()
    rates(f"LoRA step, {B} sequences of {T}, NF4, beside transformers, peft and bitsandbytes", B * T, a[0], b[0])
    print(f"    peak of memory {a[1]:.1f} and {b[1]:.1f} GB; first loss {a[2]:.4f} and {b[2]:.4f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", default=["kernels", "decode", "step"])
    p.add_argument("--tokens", type=int, default=132, help="tokens per generation")
    p.add_argument("--repeat", type=int, default=5)
    p.add_argument("--batch", type=int, nargs=2, default=[4, 1024], help="sequences, and their tokens, of a LoRA step")
    p.add_argument("--layers", type=int, default=32, help="of the 7B shape")
    p.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/dev/shm/bench7b" if pathlib.Path("/dev/shm").exists() else "out/bench7b"))
    args = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py: no CUDA GPU here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {L.triton.__version__}", flush=True)
    if "kernels" in args.parts:
        kernels(args)
    try:
        if {"decode", "step"} & {*args.parts}:
            tic = time.perf_counter()
            bench_llama.build7b(args.folder, args.layers)
            print(f"{args.layers} layers of Llama-2-7B's shape, written in {time.perf_counter() - tic:.0f} s", flush=True)
        if "decode" in args.parts:
            decode(args)
        if "step" in args.parts:
            lora_step(args)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
