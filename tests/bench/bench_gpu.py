"""lora_llama.py on a CUDA GPU, beside bitsandbytes, transformers and peft: python tests/bench/bench_gpu.py [kernels] [decode] [step]

kernels: the fused dequantize and the fused dequantize-mat-vec: right against float64, and how near to the card's memory bandwidth, which a
         pass over 2 GB measures first. Matrices take turns, more of them than the L2 cache holds; timed as replayed CUDA graphs.
decode:  tokens/s of greedy decoding, one sequence, with Llama-2-7B's shape and random weights, in NF4 and in bfloat16.
step:    one LoRA step (r 16, all linear layers, gradient checkpointing) on the same shape in NF4: tokens/s and the peak of memory.
The 7B checkpoint, 13.5 GB, is made in --folder (a memory disk if there is one) and removed. About 3 minutes on an H200.
"""
import argparse, pathlib, shutil, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import numpy as np
import torch

import bench_llama
import lora_llama as L

SHAPES, PROMPT, NONE = ((4096, 4096), (11008, 4096), (4096, 11008)), list(range(5, 133)), [31999]      # NONE: an end that is not said


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


def bandwidth():
    """GB/s of b = 1.5 a over 2 GB, bytes read plus bytes written."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds([lambda: torch.mul(a, 1.5, out=b)]) / 1e6


def layer_of(q):
    """A linear layer that holds q."""
    layer = L.Linear(0, 0)
    layer.weight, layer.q, layer.shape = None, q, q.shape
    return layer


def kernels(args):
    import bitsandbytes.functional as bf
    peak = bandwidth()
    print(f"memory: {peak:.0f} GB/s")
    for shape in SHAPES:
        n = max(2, int(2.5e8 / (shape[0] * shape[1] / 2)))                      # 250 MB of 4-bit weights: several times any L2 cache
        for double in (False, True):
            torch.manual_seed(0)
            w = [(torch.randn(shape, device="cuda") * 0.02).bfloat16() for _ in range(n)]
            qs, theirs = [L.quantize_nf4(m, double) for m in w], [bf.quantize_4bit(m, quant_type="nf4", compress_statistics=double) for m in w]
            same, exact, size = sum(torch.equal(q.packed, t[0].view(-1)) for q, t in zip(qs, theirs)), L.dequantize_nf4(qs[0], torch.float32), qs[0].nbytes()
            off = (bf.dequantize_4bit(*theirs[0]) - exact.bfloat16()).abs().max()
            x = torch.randn(1, 1, shape[1], device="cuda").bfloat16()
            with torch.inference_mode():
                want = exact.double() @ x.view(-1).double()
                error = lambda y: ((y.view(-1).double() - want).norm() / want.norm()).item()
                print(f"{shape[0]} x {shape[1]}, maxima {'quantized' if double else 'in fp32'}: {same} of {n} have bitsandbytes' codes; dequantized, off its "
                      f"bfloat16 by {off:.1e}; mat-vec off float64 by {error(layer_of(qs[0])(x)):.1e}, bitsandbytes' by "
                      f"{error(bf.gemv_4bit(x, theirs[0][0], state=theirs[0][1])):.1e}")
                rows = [("dequantize", size + 2 * shape[0] * shape[1], [lambda q=q: L.dequantize_nf4(q, torch.bfloat16) for q in qs],
                         [lambda t=t: bf.dequantize_4bit(*t) for t in theirs]),
                        ("mat-vec", size + x.nbytes + 2 * shape[0], [lambda m=layer_of(q): m(x) for q in qs],
                         [lambda t=t: bf.gemv_4bit(x, t[0], state=t[1]) for t in theirs])]
                for name, moved, ours, peer in rows:
                    a, b = milliseconds(ours), milliseconds(peer)
                    print(f"    {name}: {1e3 * a:.1f} us, {moved / a / 1e6:.0f} GB/s, {moved / a / 1e6 / peak:.0%} of memory's; "
                          f"bitsandbytes {1e3 * b:.1f} us: {b / a:.2f}x", flush=True)
                a = milliseconds([lambda m=m: torch.nn.functional.linear(x, m) for m in w])
                print(f"    torch's mat-vec of the bfloat16 matrix: {1e3 * a:.1f} us, {w[0].nbytes / a / 1e6 / peak:.0%} of memory's")
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
    """n tokens in so many seconds each -> a line; theirs: the peer's seconds."""
    a, text = n / ours, ""
    if theirs is not None:
        b = n / theirs
        text = f" beside {np.median(b):.1f} ({b.min():.1f}-{b.max():.1f}): {np.median(a) / np.median(b):.2f}x"
    print(f"{label}: {np.median(a):.1f} tokens/s ({a.min():.1f}-{a.max():.1f}){text}", flush=True)


def load_peer(args, four_bit):
    import transformers
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                             bnb_4bit_compute_dtype=torch.bfloat16) if four_bit else None
    model = transformers.LlamaForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": 0})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = NONE, 0
    return model.eval()


def decode(args):
    """Tokens 5 to args.tokens of a sequence: without the prompt's pass, and without what is compiled and recorded at first."""
    n, ids, record, rate = args.tokens - 4, torch.tensor([PROMPT], device="cuda"), L.record, bandwidth()

    def timed(go):
        go(8)
        return seconds(lambda: go(args.tokens), args.repeat) - np.median(seconds(lambda: go(4), args.repeat))
    for four_bit in (True, False):
        name, model = "NF4" if four_bit else "bfloat16", L.load_model(args.folder, "bfloat16", four_bit, device="cuda")
        size = sum(m.q.nbytes() if m.q else m.weight.nbytes for m in model.modules() if isinstance(m, L.Linear))
        ours = lambda n: L.generate(model, [PROMPT], n, NONE)
        recorded, said = timed(ours), ours(32)
        L.record = lambda step, *inputs: step
        assert said == ours(32), "recorded and launched steps say the same"
        launched, L.record = timed(ours), record
        if four_bit:
            L.add_lora(model, L.get_args(["--model", "x"]))
            rates("NF4 with LoRA, unmerged", n, timed(ours))
        del model, ours
        torch.cuda.empty_cache()
        peer = load_peer(args, four_bit)
        theirs = timed(lambda n: peer.generate(ids, max_new_tokens=n, do_sample=False))
        del peer
        torch.cuda.empty_cache()
        rates(f"greedy, {name}, beside transformers{' and bitsandbytes' * four_bit}", n, recorded, theirs)
        rates("    steps launched one by one, not recorded", n, launched, theirs)
        print(f"    {size / 1e9:.2f} GB of weights a token: {size * n / np.median(recorded) / 1e9 / rate:.0%} of memory's {rate:.0f} GB/s", flush=True)


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
        first = step()
        torch.cuda.reset_peak_memory_stats()
        return seconds(step, args.repeat), torch.cuda.max_memory_allocated() / 1e9, first

    def ours():
        model = L.load_model(args.folder, "bfloat16", True, device="cuda")
        L.add_lora(model, L.get_args(["--model", "x", "--lora_dropout", "0"]))
        model.grad_checkpoint = True
        model.train()
        return measure(lambda: (lambda loss, n: loss / n)(*L.loss_of(model, seqs)), list(L.lora_parameters(model).values()))

    def theirs():
        model = peft.prepare_model_for_kbit_training(load_peer(args, True), gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules=L.TARGETS, lora_dropout=0.0)).train()
        return measure(lambda: model(ids, labels=ids, use_cache=False).loss, [p for p in model.parameters() if p.requires_grad])
    a = ours()
    torch.cuda.empty_cache()
    b = theirs()
    rates(f"LoRA step, {B} sequences of {T}, NF4, {args.layers} layers, beside transformers, peft and bitsandbytes", B * T, a[0], b[0])
    print(f"    peak of memory {a[1]:.1f} and {b[1]:.1f} GB; first loss {a[2]:.4f} and {b[2]:.4f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", default=["kernels", "decode", "step"])
    p.add_argument("--tokens", type=int, default=132, help="tokens per generation")
    p.add_argument("--repeat", type=int, default=3)
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
