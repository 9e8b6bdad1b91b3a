"""lora_llama.py: any Llama by hand, in 16 or 4 bits, taught to answer with LoRA, in one file.

    python lora_llama.py    # no network: makes a byte-level Llama of 0.9M parameters from data/texts, loads it in 4 bits, tunes it on data/qa.jsonl
    python lora_llama.py --model meta-llama/Llama-2-7b-hf --load_4bit --data my.jsonl      # the same path; and Llama 3.x, TinyLlama, SmolLM2

Measured: default command, one core of an AMD EPYC shared with others, torch 2.13, seed 0: 171 s of CPU time (pretraining 131, tuning 38). Held-out
    loss per byte 2.755 before, 1.004 after; 33 of 33 held-out answers stop by themselves, 2 are exact: the form is learned, the facts are not. NF4:
    4.461 bits per linear weight (4.127 if matrices are large), error <= 0.031, mean 0.0030. Llama-2-7B's shape in NF4 on an H200: 183 tokens/s.
Papers: Llama 2 (arXiv 2307.09288, section 3.1), LoRA (2106.09685), QLoRA (2305.14314), rsLoRA (2312.03732).
Differs from Llama 2's SFT in: 1. examples packed in one sequence do not see each other; 2. LoRA, not all weights, hence the
    larger learning rate; 3. the loss is a mean over the answer tokens of the whole batch, however the batch is cut up.
Not handled: other architectures, biases, DoRA, chat templates, 4-bit head or embedding, QLoRA's paged optimizer, several cards' memory.
"""
import base64, collections, functools, hashlib, heapq, json, math, os, pathlib, re, shutil, sys, time, types

import common                       # before torch: it says how torch's threads wait
from common import find_tensors, read_json, read_jsonl, read_safetensors, reading, sorry, write_json
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

DATA = pathlib.Path(__file__).resolve().parent / "data"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
FLOATS = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # which model
    p.flag("model", "demo", "demo (made here), a folder in Hugging Face's layout, or a Hub id: HuggingFaceTB/SmolLM2-135M")
    p.flag("dtype", "auto", "auto: as stored, but bfloat16 for float16, whose range is short", choices=["auto", *FLOATS])
    p.flag("load_4bit", True, "linear layers in NF4: a quarter of the memory, slower on a CPU; the default is off for any other model than the demo")
    p.flag("double_quant", True, "quantize NF4's block maxima too: 4.127 instead of 4.5 bits per parameter")
    # LoRA
    p.flag("lora_r", 16, "rank of the update")
    p.flag("lora_alpha", 32.0, "the update is scaled by alpha / r")
    p.flag("lora_dropout", 0.05, "on the input of the update only", high=1)
    p.flag("targets", TARGETS, "layers that get one; all, as QLoRA found necessary", nargs="+", choices=TARGETS)
    p.flag("rslora", False, "scale by alpha / sqrt(r): a larger rank then does not learn slower")
    p.flag("adapter", "", "start from this adapter folder, ours or peft's; its rank, alpha, dropout and targets count, not the flags'")
    # data and training; after the semicolon: the default for any other model than the demo
    p.flag("data", str(DATA / "qa.jsonl"), 'JSON lines with "prompt" and "answer"')
    p.flag("held_out", 0.1, "share of the examples kept for the loss before and after", high=1)
    p.flag("epochs", 15.0, "passes over the examples; 2 as in Llama 2; 0 trains nothing")
    p.flag("lr", 3e-3, "AdamW's peak learning rate; 2e-4 as in QLoRA")
    p.flag("block_size", 256, "tokens per packed sequence; 1024")
    p.flag("batch_size", 4, "sequences per step, over all micro-batches and processes; 16")
    p.flag("micro_batch", 4, "sequences, or prompts, at once: what fits in memory")
    p.flag("grad_checkpoint", False, "compute each block's activations twice instead of keeping them")
    p.flag("save_every", 20, "steps between checkpoints")
    p.flag("seed", 0, "of weights, order, dropout and sampling", low=0)
    # what comes out
    p.flag("prompts", "", "JSON lines whose prompts are completed in batches, to completions.jsonl in --out")
    p.flag("max_new", 128, "longest answer in tokens")
    p.flag("temperature", 0.0, "0: always the likeliest token")
    p.flag("top_p", 1.0, "sample from the likeliest tokens that hold this mass", low=1e-6, high=1)
    p.flag("repetition_penalty", 1.0, "above 1: tokens that were seen become less likely", low=0.01)
    p.flag("beam", 1, "beams; 1 samples instead")
    p.flag("length_penalty", 1.0, "beams are ranked by log-probability / length ** this", low=-50, high=50)
    p.flag("merge", "off", "write the model with the update added to its stored weights or to the NF4 ones", choices=["off", "16", "4bit"])
    p.flag("out", "out/lora", "folder for the adapter, the checkpoint, completions and the merged model")
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    if p.parse_args(argv).model != "demo":              # other defaults; a flag that is given still wins
        p.set_defaults(load_4bit=False, epochs=2.0, lr=2e-4, block_size=1024, batch_size=16)
    return p.parse_args(argv, smoke=dict(epochs=1.0, max_new=16))

# ---- data: tokenizers --------------------------------------------------------------------------------------------------------
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts out single digits BEFORE GPT-2's pattern runs: a run of spaces before a digit then stays whole, instead of giving its last one away
SMOL = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2 writes each byte as a printable character: itself where it is one, else one from 256 on; Llama 2 writes a space as SPACE
PLAIN = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
BYTE_OF = {chr(b): b for b in PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PLAIN}))}
SPACE = "\u2581"

class ByteBPE:
    """Byte-level BPE of GPT-2, Llama 3 and SmolLM2, run by tiktoken. vocab: byte string -> id, ids in the order of the merges.
    Special tokens in text are text; main() adds bos, sep and eos, the ids around a prompt and its answer."""
    def __init__(self, vocab, special, add_bos, pattern):
        import tiktoken
        # tiktoken merges by rank whatever is a token, tokenizer.json by a list of pairs. For a trained BPE both are one: the
        # inside of a token merges as it would alone. A byte that the model lacks gets an id beyond all, and is dropped again
        missing = {bytes([b]): (1 << 24) + b for b in range(256) if bytes([b]) not in vocab}
        self.bpe = tiktoken.Encoding("llama", pat_str=pattern, mergeable_ranks=vocab | missing, special_tokens={})
        self.bytes, self.special, self.add_bos = {i: t for t, i in vocab.items()}, special, add_bos
    def encode(self, text):
        return [i for i in self.bpe.encode_ordinary(text) if i in self.bytes]
    def decode(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

class CharBPE(ByteBPE):
    """Llama 2's BPE: characters merged by rank, unknown ones spelled as bytes. vocab: piece -> id; ranks: a piece that two others
    make -> rank, lower first; prefix: the text gets a space in front "always", "unless there" or "never"."""
    def __init__(self, vocab, special, add_bos, ranks, prefix):
        self.vocab, self.special, self.add_bos, self.ranks, self.prefix = vocab, special, add_bos, ranks, prefix
        self.bytes = {i: p.replace(SPACE, " ").encode() for p, i in vocab.items() if p not in special}
        self.bytes |= {vocab[f"<0x{b:02X}>"]: bytes([b]) for b in range(256)}
    def encode(self, text):
        text = text.replace(" ", SPACE)
        text = SPACE * bool(text and (self.prefix == "always" or self.prefix == "unless there" and text[0] != SPACE)) + text
        parts = [p for c in text for p in ([c] if c in self.vocab else [f"<0x{b:02X}>" for b in c.encode("utf-8", "replace")])]
        # a linked list of parts and a heap of possible merges: O(n log n), for there are no words, the text is one piece
        left, right, heap = list(range(-1, len(parts))), list(range(1, len(parts) + 1)), []
        def offer(i):
            if i >= 0 and right[i] < len(parts) and (made := parts[i] + parts[right[i]]) in self.ranks:
                heapq.heappush(heap, (self.ranks[made], i, made))
        [offer(i) for i in range(len(parts))]
        while heap:
            _, i, made = heapq.heappop(heap)
            j = right[i]
            if parts[i] and j < len(parts) and parts[i] + parts[j] == made:         # else one of the two is part of another by now
                parts[i], parts[j], right[i], left[right[j]] = made, "", right[j], i
                offer(left[i]), offer(i)
        return [self.vocab[p] for p in parts if p]
    def decode(self, ids):
        return super().decode(ids).removeprefix("" if self.prefix == "never" else " ")

def load_tokenizer(folder):
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model (sentencepiece's, or a tiktoken file)."""
    path = pathlib.Path(folder) / "tokenizer.json"
    path = path if path.exists() else path.with_suffix(".model")
    with reading(path):
        raw = path.read_bytes()
        lines = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw)           # tiktoken's; sentencepiece writes a protobuf
        return (from_tokenizer_json if path.suffix == ".json" else from_tiktoken if lines else from_sentencepiece)(raw)

def from_tokenizer_json(raw):
    """The two kinds of BPE that Llamas come with, told apart by the steps before the merges. ValueError: not handled."""
    spec = json.loads(raw)
    bpe, special = spec["model"], {t["content"]: t["id"] for t in spec["added_tokens"]}
    steps = [step for k in ("normalizer", "pre_tokenizer") if spec.get(k) for step in spec[k].get(k.replace("_", "") + "s", [spec[k]])]
    kinds, said = " ".join(step["type"] for step in steps), {k: v for step in steps for k, v in step.items()}
    regex = said.get("pattern", {}).get("Regex")
    must, prefix, pattern = {       # the kinds of step -> what they must say; CharBPE's prefix; ByteBPE's pattern
        "Prepend Replace": (dict(prepend=SPACE, pattern=dict(String=" "), content=SPACE), "always", None),
        "Metaspace": (dict(replacement=SPACE, split=False), "never" if said.get("prepend_scheme") == "never" else "unless there", None),
        "ByteLevel": (dict(add_prefix_space=False, use_regex=True), None, GPT2),
        "Digits ByteLevel": (dict(add_prefix_space=False, use_regex=True, individual_digits=True), None, SMOL),
        "Split ByteLevel": (dict(add_prefix_space=False, use_regex=False, behavior="Isolated", invert=False), None, regex),
    }.get(kinds, ({}, None, None))
    odd = [t["content"] for t in spec["added_tokens"] if not t["special"]] + [k for k, v in must.items() if said.get(k, True) != v]
    odd += [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if bpe.get(k)] + [kinds or "no steps"] * (not must)
    if bpe["type"] != "BPE" or odd or bool(prefix) != bool(bpe.get("byte_fallback")):
        raise ValueError(f"a {bpe['type']} model with {odd or 'its settings'} is not handled")
    pairs = (m.split(" ") if isinstance(m, str) else m for m in bpe["merges"])
    vocab, merges = bpe["vocab"], list(dict.fromkeys(a + b for a, b in pairs))          # the piece that a merge makes, in order
    ids, made = [*vocab.values(), *special.values()], [vocab[piece] for piece in merges]
    if not all(type(i) is int and 0 <= i < 1 << 24 for i in ids) or len({*vocab.values()}) < len(vocab) or pattern and made != sorted(made):
        raise ValueError("its ids are not whole numbers, one for each token, in the order of the merges")
    add_bos = '"single": [{"SpecialToken"' in json.dumps(spec.get("post_processor"))        # a template that begins with BOS
    if prefix:
        return CharBPE(vocab, special, add_bos, {made: rank for rank, made in enumerate(merges)}, prefix)
    # Llama 3 ignores merges: a word that is a token is that token. Others know only what their merges make
    tokens = vocab if bpe.get("ignore_merges") else [*BYTE_OF, *merges]
    tokens = [t for t in tokens if t in vocab and t not in special and all(c in BYTE_OF for c in t)]
    return ByteBPE({bytes(BYTE_OF[c] for c in t): vocab[t] for t in tokens}, special, add_bos, pattern)

def from_tiktoken(raw):
    """Llama 3's own file: a token in base64 and its rank on each line; 256 special tokens follow, of which three are used here."""
    vocab = {base64.b64decode(t, validate=True): int(rank) for t, rank in (line.split() for line in raw.splitlines() if line)}
    if sorted(vocab.values()) != [*range(n := len(vocab))]:
        raise ValueError("its ranks are not 0, 1, 2, ...")
    special = {"<|begin_of_text|>": n, "<|end_of_text|>": n + 1, "<|eot_id|>": n + 9, "<|reserved_special_token_247|>": n + 255}
    return ByteBPE(vocab, special, True, LLAMA3)

def protobuf(raw):
    """The fields of a protobuf message, (number, value) each: a whole number, or the bytes of a text, a message or a float."""
    stream = iter(raw)
    def varint(byte):                       # seven bits a byte, the lowest first; the eighth says that more come
        return byte if byte < 128 else byte - 128 + (varint(next(stream)) << 7)
    for byte in stream:
        number, kind = divmod(varint(byte), 8)
        n = varint(next(stream)) if kind in (0, 2) else {1: 8, 5: 4}[kind]              # kind 0: the value; others: its length
        yield number, bytes([next(stream) for _ in range(n)]) if kind else n

def from_sentencepiece(raw):
    """tokenizer.model as Llama 2 has it: any two pieces that together are a piece may make it; the best score goes first."""
    message = [*protobuf(raw)]              # numbers and defaults are sentencepiece_model.proto's: 1 a piece, 2 the trainer, 3 the normalizer
    pieces = [{2: bytes(4), 3: 1, **dict(protobuf(value))} for number, value in message if number == 1]     # 1 text, 2 score, 3 kind
    trainer, norm = (dict(protobuf(dict(message)[number])) for number in (2, 3))
    # trainer: 3 is model_type (2: BPE), 35 byte_fallback; norm: 2 a table of replacements, 4 remove_extra_whitespaces, 5 escape them;
    # kinds: 1 normal, 2 unknown, 3 control, 6 byte; not handled: 4 user-defined, 5 unused
    if trainer.get(3) != 2 or not trainer.get(35) or norm.get(2) or norm.get(4, 1) or not norm.get(5, 1) or {4, 5} & {p[3] for p in pieces}:
        raise ValueError("only sentencepiece's BPE with byte fallback and without normalization is handled")
    vocab = {p[1].decode(): i for i, p in enumerate(pieces)}
    ranks = {t: -np.frombuffer(pieces[i][2], "<f4")[0] for t, i in vocab.items() if pieces[i][3] == 1}
    special = {t: i for t, i in vocab.items() if pieces[i][3] in (2, 3)}
    return CharBPE(vocab, special, True, ranks, "always" if norm.get(3, 1) else "never")

# ---- data: many examples in one sequence, each by itself ---------------------------------------------------------------------
def tokenize(rows, tok):
    """[{"prompt": "What is two plus two?", "answer": "Four."}, ...] -> [(ids, n)]: BOS prompt separator answer EOS, and n, how
    many of the ids are prompt and carry no loss."""
    return [((head := tok.bos + tok.encode(row["prompt"]) + tok.sep) + tok.encode(row["answer"]) + tok.eos[:1], len(head)) for row in rows]

def pack(examples, T, rng):
    """examples [(ids, n)] -> sequences of at most T tokens: lists of examples that fit together, each in the first with room.
    Too long an example is cut at T; one whose prompt alone fills T is left out."""
    packed = []
    for ids, n in (examples[i] for i in rng.permutation(len(examples)) if examples[i][1] < T):
        room = (seq for seq in packed[-64:] if sum(len(other) for other, _ in seq) + len(ids[:T]) <= T)
        if (seq := next(room, None)) is None:
            packed.append(seq := [])
        seq.append((ids[:T], n))
    return packed

def collate(packed, device):
    """Sequences -> ids, labels (-1: no loss), positions, example numbers (-1: padding): all (B, T), T the longest of them.
    labels[t] is the token after ids[t] in its example; positions restart with each example."""
    rows = [[] for _ in packed]
    for row, seq in zip(rows, packed):
        for d, (ids, n) in enumerate(seq):      # the last token of the prompt is what the answer's first is learned from
            row += zip(ids, [-1] * (n - 1) + ids[n:] + [-1], range(len(ids)), [d] * len(ids))
    return torch.tensor([row + [(0, -1, 0, -1)] * (max(map(len, rows)) - len(row)) for row in rows], device=device).unbind(-1)

def only_own_example(doc):
    """doc (B, T) example numbers -> mask (B, 1, T, T): a token sees itself and what came before it in its own example."""
    return (doc[:, :, None] == doc[:, None, :]).tril()[:, None]

# ---- the model ---------------------------------------------------------------------------------------------------------------
# nanoGPT's letters: B sequences, T tokens, C = n_embd, nh query heads of size hs, nkv key-value heads; S keys, past ones included

def read_config(path):
    """config.json -> the sizes that make a Llama, under nanoGPT's names; what is not a Llama is refused by name."""
    c = read_json(path)
    with reading(f"{path}, which should give the sizes of a Llama,"):
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}      # transformers 5 says it all in rope_parameters
        kind, name = rope.get("rope_type", rope.get("type", "default")), (c.get("architectures") or [c.get("model_type")])[0]
        llama = name in ("LlamaForCausalLM", "llama") and c.get("model_type", "llama") == "llama"
        odd = dict(biases=c.get("attention_bias") or c.get("mlp_bias"), rope=kind not in ("default", "llama3") and kind,
                   activation=c.get("hidden_act", "silu") != "silu" and c["hidden_act"], model=not llama and name)
        for k in [k for k, v in odd.items() if v]:
            sorry(f"{path} asks for the {k} {odd[k]}; only Llama 2, Llama 3 and their look-alikes are handled")
        heads, eos, bos = c["num_attention_heads"], c.get("eos_token_id", 2), c.get("bos_token_id", 1)  # eos may be a list
        sizes = dict(vocab_size=c["vocab_size"], n_embd=c["hidden_size"], n_ff=c["intermediate_size"], n_layer=c["num_hidden_layers"],
                     n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads)
        stretch = [float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings") if kind == "llama3"]
        cfg = types.SimpleNamespace(
            **sizes, stretch=stretch, theta=float(rope.get("rope_theta") or c.get("rope_theta", 1e4)), tied=bool(c.get("tie_word_embeddings")),
            eps=float(c.get("rms_norm_eps", 1e-6)), bos=[] if bos is None else [bos], eos=eos if isinstance(eos, list) else [eos])
        if not (all(type(i) is int and 0 <= i < cfg.vocab_size for i in cfg.bos + cfg.eos) and min(*sizes.values(), *cfg.stretch) > 0
                and cfg.n_head % cfg.n_kv_head == cfg.head_dim % 2 == 0 <= cfg.eps < 1 < cfg.theta < math.inf):
            raise ValueError("its numbers do not fit each other")           # whether the tensors fit them is for load_model to see
    return cfg

def rotary(cfg, pos, dtype):
    """pos (B, T) -> cos, sin (B, 1, T, hs): RoPE (arXiv 2104.09864), with Llama 3.1's stretch for long contexts."""
    freq = cfg.theta ** -(torch.arange(0, cfg.head_dim, 2, device=pos.device).float() / cfg.head_dim)      # (hs / 2,)
    if cfg.stretch:
        factor, low, high, context = cfg.stretch
        mix = ((context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)       # by turns in the original context:
        freq = (1 - mix) * freq / factor + mix * freq               # fast pairs stay, slow ones stretch, those between mix
    angle = pos[:, None, :, None].float() * torch.cat([-freq, freq])                    # (B, 1, T, hs); the minus is rotate()'s -sin
    return angle.cos().to(dtype), angle.sin().to(dtype)

def rotate(x, cos, sin):
    """x (B, heads, T, hs): turn the pairs (x_i, x_{i + hs/2}), the order in which Hugging Face keeps Llama's rows."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

class Cache:
    """Keys and values so far: kv (n_layer, 2, B, nkv, longest, hs), T in use; at: where a recorded step writes (it reads all), or None."""
    def __init__(self, model, B, longest):
        c, self.T, self.at = model.cfg, 0, None
        self.kv = model.model.norm.weight.new_zeros(c.n_layer, 2, B, c.n_kv_head, longest, c.head_dim)

class Block(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), G query heads to a key-value head, then SwiGLU (2002.05202)."""
    fused = True                # attention in torch's one kernel; False: the same, written out
    def __init__(self, cfg, layer):
        super().__init__()
        C, nh, nkv, hs, ff = self.sizes = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.n_ff
        self.layer, self.input_layernorm, self.post_attention_layernorm = layer, nn.RMSNorm(C, cfg.eps), nn.RMSNorm(C, cfg.eps)
        self.self_attn = nn.ModuleDict(dict(q_proj=Linear(C, nh * hs), k_proj=Linear(C, nkv * hs), v_proj=Linear(C, nkv * hs),
                                            o_proj=Linear(nh * hs, C)))
        self.mlp = nn.ModuleDict(dict(gate_proj=Linear(C, ff), up_proj=Linear(C, ff), down_proj=Linear(ff, C)))
    def attend(self, x, cos, sin, mask, cache):
        (B, T, _), (_, nh, nkv, hs, _), proj = x.shape, self.sizes, self.self_attn
        q = rotate(proj.q_proj(x).view(B, T, nh, hs).transpose(1, 2), cos, sin)         # (B, nh, T, hs)
        k = rotate(proj.k_proj(x).view(B, T, nkv, hs).transpose(1, 2), cos, sin)        # (B, nkv, T, hs)
        v = proj.v_proj(x).view(B, T, nkv, hs).transpose(1, 2)                          # (B, nkv, T, hs)
        if cache and cache.at is not None:
            k, v = cache.kv[self.layer].index_copy_(3, cache.at, torch.stack([k, v]))       # (B, nkv, S, hs), S the longest
        elif cache:
            cache.kv[self.layer, :, :, :, cache.T:cache.T + T] = torch.stack([k, v])
            k, v = cache.kv[self.layer, :, :, :, :cache.T + T]          # (B, nkv, S, hs), S >= T
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=nh > nkv)
        else:
            # query head h asks key head h // G: a group's queries become rows of one matrix, and no key is copied
            att = (q.reshape(B, nkv, nh // nkv * T, hs) @ k.transpose(2, 3) * hs**-0.5).view(B, nkv, nh // nkv, T, -1)      # (B, nkv, G, T, S)
            att = att if mask is None else att.masked_fill(~mask[:, :, None], -torch.inf)           # mask (B, 1, T, S), True: may look
            att = att.float().softmax(-1).to(x.dtype)                   # (B, nkv, G, T, S)
            y = att.view(B, nkv, nh // nkv * T, -1) @ v                 # (B, nkv, G * T, hs)
        return proj.o_proj(y.reshape(B, nh, T, hs).transpose(1, 2).reshape(B, T, nh * hs))      # (B, T, C)
    def forward(self, x, cos, sin, mask, cache):
        x = x + self.attend(self.input_layernorm(x), cos, sin, mask, cache)
        h, mlp = self.post_attention_layernorm(x), self.mlp             # (B, T, C)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))  # (B, T, n_ff) inside

class Llama(nn.Module):
    """The whole model; its parameters are named as in Hugging Face's files."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grad_checkpoint = cfg, False
        embed, layers = nn.Embedding(cfg.vocab_size, cfg.n_embd), nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.model = nn.ModuleDict(dict(embed_tokens=embed, layers=layers, norm=nn.RMSNorm(cfg.n_embd, cfg.eps)))
        self.lm_head = None if cfg.tied else Linear(cfg.n_embd, cfg.vocab_size)         # None: the embedding is the head
    def forward(self, ids, pos=None, mask=None, cache=None):
        """ids, pos (B, T), mask (B, 1, T, S) bool or None for plain causal -> hidden states (B, T, C), for logits()."""
        T, past = ids.size(1), cache.T if cache else 0
        pos = torch.arange(past, past + T, device=ids.device)[None] if pos is None else pos
        mask = torch.ones(T, past + T, dtype=torch.bool, device=ids.device).tril(past)[None, None] if mask is None and T > 1 else mask
        x = self.model.embed_tokens(ids)                                 # (B, T, C)
        cos, sin = rotary(self.cfg, pos, x.dtype)
        for block in self.model.layers:
            again = self.grad_checkpoint and torch.is_grad_enabled()
            x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False) if again else block(x, cos, sin, mask, cache)
        if cache:
            cache.T += T
        return self.model.norm(x)
    def logits(self, x):
        """(..., C) -> (..., V), where someone asks for them: the head is a fifth of a small model's work."""
        return times(x, self.model.embed_tokens.weight) if self.cfg.tied else self.lm_head(x)

def linears(model):
    """{name: Linear} of the blocks: what is quantized and what gets LoRA; the head is neither, as in QLoRA."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"}

# ---- the idea, first half: 4 bits by NF4 (QLoRA, arXiv 2305.14314) -----------------------------------------------------------
# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E; bitsandbytes' digits)
NF4_CODE = torch.tensor([-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833234,
                         -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1])
MIDPOINTS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
# the 256 values of signed 8-bit dynamic quantization (arXiv 1511.04561), sorted: means of neighbours, 2^e in each of seven decades, 0 and 1
MEANS = torch.cat([10**(e - 6) * torch.linspace(0.1, 1, 2**e + 1).unfold(0, 2, 1).mean(1) for e in range(7)])
DYNAMIC = torch.cat([-MEANS, MEANS, torch.tensor([0., 1.])]).sort().values
BLOCK, BLOCK2 = 64, 256         # weights that share a maximum; maxima that share one when they are quantized too
CHUNK = 1 << 18                 # elements worked on at once: they stay in a core's cache

class NF4(collections.namedtuple("NF4", "packed absmax shape block nested")):
    """A matrix in 4 bits: two codes a byte, the first in the high nibble, times a maximum per block, row-major.
    nested: None, or (code, absmax, offset, block) with which absmax, then uint8, is itself dequantized."""
    def nbytes(self):
        return sum(t.nbytes for t in (*self, *(self.nested or ())) if torch.is_tensor(t))
    def arguments(self, tile):
        """How both kernels are told of it, tile weights at once; where there is no second quantization, anything stands in its place."""
        code2, absmax2, offset, block2 = self.nested or (self.absmax, self.absmax, 0.0, 1)
        tensors = self.packed, self.absmax, code2, absmax2, offset, tables(self.packed.device)[2]
        return tensors, dict(HALF=self.block // 2, BLOCK2=block2, NB=max(1, tile // self.block))

@functools.lru_cache
@torch.inference_mode(False)                # they outlive the call that first wants them
def tables(device):
    """Looking up is quicker than computing: codes and thresholds by a float's upper half, NF4_CODE, pairs of weights by a byte."""
    # a float32's upper half leaves an interval so small that at most one midpoint lies in it: code = low + (x > threshold)
    top = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.stack([top.view(torch.float32), (top | 0xffff).view(torch.float32)]).nan_to_num(0).sort(0).values
    low, high = torch.bucketize(ends, MIDPOINTS)
    threshold = torch.where(high > low, MIDPOINTS[low.clamp(max=14)], torch.inf)
    pairs = torch.cartesian_prod(NF4_CODE, NF4_CODE)                                    # (256, 2), fetched as 8 bytes at once
    return low.to(device, torch.uint8), threshold.to(device), NF4_CODE.to(device), pairs.view(torch.int64)[:, 0].to(device)

def quantize_nf4(w, double=True):
    """w, a float tensor of any shape -> NF4. Codes and maxima are bitsandbytes', bit for bit; a tie goes to the lower code."""
    n, device, flat, nested = w.numel(), w.device, w.detach().reshape(-1), None
    flat = F.pad(flat, (0, -n % BLOCK)) if n % BLOCK else flat
    packed, absmax = torch.empty(len(flat) // 2, dtype=torch.uint8, device=device), torch.empty(len(flat) // BLOCK, device=device)
    low, threshold, *_ = tables(device)
    for x, byte, top in zip(flat.split(CHUNK), packed.split(CHUNK // 2), absmax.split(CHUNK // BLOCK)):
        x = x.view(-1, BLOCK).float()                                   # (blocks, 64)
        torch.amax(x.abs(), 1, out=top)
        x = (x * (1 / top.clamp(min=1e-38))[:, None]).view(-1)          # the reciprocal first, as bitsandbytes: last bits differ
        key = (x.view(torch.int32) >> 16) & 0xffff                      # the upper half of each float
        code = low.index_select(0, key) + (x > threshold.index_select(0, key))
        torch.add(code[::2] << 4, code[1::2], out=byte)
    if double:
        offset, code = absmax.mean(), DYNAMIC.to(device)
        rows = F.pad(absmax - offset, (0, -len(absmax) % BLOCK2)).view(-1, BLOCK2)  # signed: the mean is taken off first
        top = rows.abs().amax(1)  # one fp32 for 256 maxima of 64 weights: 0.002 bits each
        rows = torch.bucketize(rows * (1 / top.clamp(min=1e-38))[:, None], (code[1:] + code[:-1]) / 2)
        absmax, nested = rows.to(torch.uint8).view(-1)[:len(absmax)].clone(), (code, top, float(offset), BLOCK2)
    return NF4(packed[:(n + 1) // 2], absmax, tuple(w.shape), BLOCK, nested)

def dequantize_nf4(q, dtype):
    """NF4 -> a tensor of its shape. The product is made in fp32 and rounded once, as in bitsandbytes."""
    n, packed, absmax = math.prod(q.shape), q.packed, q.absmax
    if triton and (packed.is_cuda or INTERPRETED) and n % q.block == 0:
        out, (tensors, sizes) = torch.empty(q.shape, dtype=dtype, device=packed.device), q.arguments(4096)
        dequantize_kernel[(triton.cdiv(len(absmax), sizes["NB"]),)](*tensors, out, len(absmax), num_warps=2, **sizes)
        return out
    if q.nested:
        code, top, offset, block = q.nested
        absmax = code[absmax.int()] * top.repeat_interleave(block)[:len(absmax)] + offset
    packed = F.pad(packed, (0, -len(packed) % (q.block // 2))) if 2 * len(packed) % q.block else packed
    pairs, out = tables(packed.device)[3], torch.empty(2 * len(packed), dtype=dtype, device=packed.device)
    for w, byte, top in zip(out.split(CHUNK), packed.split(CHUNK // 2), absmax.split(CHUNK // q.block)):
        x = pairs.index_select(0, byte.int()).view(torch.float32).view(-1, q.block)                             # (blocks, block)
        w.view(-1, q.block).copy_(x.mul_(top[:, None]))
    return out[:n].view(q.shape)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
try:
    import triton, triton.language as tl
except ImportError:             # torch for macOS and Windows comes without it
    triton = None
if triton:
    @triton.jit
    def maxima(at, there, absmax, code2, absmax2, offset, BLOCK2: tl.constexpr):
        """Blocks' numbers -> their maxima, with the second quantization undone where there is one."""
        top = tl.load(absmax + at, there, 0)
        if absmax.dtype.element_ty == tl.uint8:
            top = tl.load(code2 + top.to(tl.int32)) * tl.load(absmax2 + at // BLOCK2, there, 0) + offset
        return top
    @triton.jit
    def dequantize_kernel(packed, absmax, code2, absmax2, offset, code, out, n_blocks, HALF: tl.constexpr, BLOCK2: tl.constexpr, NB: tl.constexpr):
        """out = the weights of all blocks, NB of them a program; HALF: bytes of a block"""
        at = tl.program_id(0).to(tl.int64) * NB + tl.arange(0, NB)                          # (NB,)
        there, top = (at < n_blocks)[:, None], maxima(at, at < n_blocks, absmax, code2, absmax2, offset, BLOCK2)[:, None]
        byte = tl.load(packed + at[:, None] * HALF + tl.arange(0, HALF), there, 0).to(tl.int32)             # (NB, HALF)
        w = tl.interleave(tl.load(code + (byte >> 4)) * top, tl.load(code + (byte & 15)) * top)             # (NB, 2 HALF), side by side
        tl.store(out + at[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF), w.to(out.dtype.element_ty), there)
    @triton.jit
    def matvec_kernel(packed, absmax, code2, absmax2, offset, code, x, y, n_blocks, HALF: tl.constexpr, BLOCK2: tl.constexpr, NB: tl.constexpr):
        """y (n_out) = W x in bfloat16, a row of n_blocks blocks a program, which is one warp: each weight is read once, as 4 bits"""
        row, total, codes = tl.program_id(0).to(tl.int64), tl.zeros((NB, HALF), tl.float32), tl.load(code + tl.arange(0, 16))
        for start in range(0, n_blocks, NB):
            b = start + tl.arange(0, NB)                                                    # (NB,)
            i, there = b[:, None] * HALF + tl.arange(0, HALF), (b < n_blocks)[:, None]      # (NB, HALF)
            byte = tl.load(packed + row * n_blocks * HALF + i, there, 0).to(tl.int32)       # two weights
            pair = tl.load(x.to(tl.pointer_type(tl.int32)) + i, there, 0)                   # what they multiply; bfloat16 is fp32's upper half
            even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
            # the warp's threads hand codes to each other: looked up in memory, even in the first cache, they took most of the time
            flat = tl.reshape(byte, (NB * HALF,))
            first, second = tl.reshape(tl.gather(codes, flat >> 4, 0), byte.shape), tl.reshape(tl.gather(codes, flat & 15, 0), byte.shape)
            total += (first * even + second * odd) * maxima(row * n_blocks + b, b < n_blocks, absmax, code2, absmax2, offset, BLOCK2)[:, None]
        tl.store(y + row, tl.sum(tl.reshape(total, (NB * HALF,)), 0).to(tl.bfloat16))

class MatMul4(torch.autograd.Function):
    """x W^T with W in NF4. W is unpacked anew for the backward pass: kept, all layers together are the 16-bit model."""
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, dequantize_nf4(q, x.dtype))
    @staticmethod
    def backward(ctx, g):
        return g @ dequantize_nf4(ctx.q, g.dtype), None

# ---- the idea, second half: LoRA (arXiv 2106.09685) --------------------------------------------------------------------------
def times(x, w):
    """x w^T: x (..., n_in), w (n_out, n_in). On a CPU a few short fp32 vectors are multiplied from the other side, (w x^T)^T, a single one
    together with a copy of itself: MKL then reads w up to twice as fast. Short: they fill at most half of the first cache."""
    rows = x.reshape(-1, x.size(-1))
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled() or max(2, len(rows)) * w.size(1) > 4000:
        return F.linear(x, w)
    return (w @ (rows if len(rows) > 1 else rows.repeat(2, 1)).t())[:, :len(rows)].t().reshape(*x.shape[:-1], len(w))

class Linear(nn.Module):
    """y = x W^T, W (n_out, n_in) plain or in NF4, plus LoRA's scale * (dropout(x) A^T) B^T where there is one."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.q, self.shape, self.lora_A = nn.Parameter(torch.empty(n_out, n_in)), None, (n_out, n_in), None
    def forward(self, x):
        n_out, n_in = self.shape
        alone = x.dtype == torch.bfloat16 and x.numel() == n_in and not torch.is_grad_enabled()         # one token of one sequence
        if self.q is None:
            y = times(x, self.weight)
        elif triton and (x.is_cuda or INTERPRETED) and alone and n_in % self.q.block == 0:
            y, (tensors, sizes) = x.new_empty(*x.shape[:-1], n_out), self.q.arguments(2048)
            matvec_kernel[(n_out,)](*tensors, x.contiguous(), y, n_in // self.q.block, num_warps=1, **sizes)
        else:
            y = MatMul4.apply(x, self.q)                                # (..., n_out)
        if self.lora_A is not None:
            z = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A).view(-1, len(self.lora_A))   # (B T, r), fp32
            y = torch.addmm(y.view(-1, n_out).to(z.dtype), z, self.lora_B.t(), alpha=self.scale).to(y.dtype).view_as(y)     # one pass over y
        return y

def lora_parameters(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}

def add_lora(model, args, names=None):
    """Freeze the model and put a fresh update on the layers of these names, or on args.targets: A (r, n_in) uniform as in
    nn.Linear, B (n_out, r) zero, so that it begins as the identity."""
    torch.manual_seed(args.seed)
    model.requires_grad_(False)         # what is added below is all that learns
    for name, m in linears(model).items():
        if name in names if names else name.split(".")[-1] in args.targets:
            (n_out, n_in), r, device = m.shape, args.lora_r, (m.q.packed if m.q else m.weight).device
            # fp32 whatever W is: bfloat16's 8 bits would swallow steps of a thousandth of a value
            m.lora_A = nn.Parameter(torch.empty(r, n_in).uniform_(-n_in**-0.5, n_in**-0.5).to(device))
            m.lora_B = nn.Parameter(torch.zeros(n_out, r, device=device))
            m.scale, m.dropout = args.lora_alpha / (r**0.5 if args.rslora else r), args.lora_dropout

# ---- files: model folders and adapters ---------------------------------------------------------------------------------------
STATE = ".quant_state.bitsandbytes__nf4"            # what bitsandbytes keeps beside an NF4 matrix and nowhere else
PEFT = "base_model.model."                          # what stands before each name in peft's files

def write_safetensors(path, spec, tensor_of):
    """spec {name: (dtype, shape)}; tensor_of(name) is asked for one tensor at a time: they need not all be in memory."""
    table, end, code = {"__metadata__": {"format": "pt"}}, 0, {v: k for k, v in common.DTYPES.items()}
    for name, (dtype, shape) in spec.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = dict(dtype=code[dtype], shape=list(shape), data_offsets=[begin, end])
    head = (text := json.dumps(table)) + " " * (-len(text) % 8)          # tensors begin on a multiple of 8
    with common.whole_file(path) as part, open(part, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head.encode())
        for name, (dtype, _) in spec.items():
            f.write(tensor_of(name).detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())

def stored_nf4(name, found, device):
    """An NF4 as bitsandbytes writes it: beside `name` lie its .absmax, .quant_map, .quant_state and, if nested, two more."""
    with reading(f"{name} in {found[name].path}, which should be in bitsandbytes' NF4 layout,"):
        state = json.loads(bytes(found[name + STATE].tensor().tolist()))
        shape, block, block2 = tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize")
        n_blocks, sizes, small, full = -(-math.prod(shape) // block), {None, *(2**i for i in range(5, 13))}, torch.uint8, torch.float32
        parts = {"": ((math.prod(shape) + 1) // 2, small), ".absmax": (n_blocks, small if block2 else full), ".quant_map": (16, full)}
        parts |= {".nested_quant_map": (256, full), ".nested_absmax": (-(-n_blocks // block2), full)} if block2 else {}
        packed, absmax, code, *nested = tensors = [found[name + k].tensor().view(-1).to(device, copy=True) for k in parts]
        if [(len(x), x.dtype) for x in tensors] != [*parts.values()] or not {block, block2} <= sizes or not torch.equal(code.cpu(), NF4_CODE):
            raise ValueError("its parts do not fit each other")
        return NF4(packed, absmax, shape, block, (*nested, float(state["nested_offset"]), block2) if block2 else None)

def load_model(folder, dtype="auto", four_bit=False, double=True, device="cpu"):
    """A model folder -> Llama without gradients. Tensors come one by one: the peak is the loaded model plus one of them.
    four_bit quantizes the blocks' linear layers to NF4; what bitsandbytes stored in NF4 stays so in any case."""
    folder, tic = pathlib.Path(folder), time.time()
    cfg, found = read_config(folder / "config.json"), find_tensors(folder)
    n_layer = len({n.split(".")[2] for n in found if n.startswith("model.layers.")})       # before a billion of them are made
    cfg.n_layer == n_layer or sorry(f"{folder} holds {n_layer} layers, its config.json says {cfg.n_layer}")
    with reading(folder), torch.device("meta"):                             # the structure alone, no memory yet
        model, stored = Llama(cfg), found["model.embed_tokens.weight"].dtype
    dtype = FLOATS[dtype if dtype != "auto" else "float32" if stored == torch.float32 else "bfloat16"]
    inner, max_error, sum_error, seen = linears(model), 0.0, 0.0, 0
    for name, p in tqdm(list(model.named_parameters()), desc="load", unit="tensor", disable=True if RANK else None):
        x, owner = found.get(name) or sorry(f"{folder} lacks the tensor {name}"), model.get_submodule(name.removesuffix(".weight"))
        q = stored_nf4(name, found, device) if name + STATE in found else None
        fits = (q or x).shape == tuple(p.shape) and (q or x.dtype in FLOATS.values())
        fits or sorry(f"{name} in {x.path} is {x.dtype} {(q or x).shape}; floats of {tuple(p.shape)} were expected")
        if four_bit and owner in inner.values() and not q:
            w = x.tensor().to(device)
            q, n = quantize_nf4(w, double), min(w.numel(), 1 << 20)                             # a million weights of each tell enough
            part = q._replace(packed=q.packed[:(n + 1) // 2], absmax=q.absmax[:-(-n // BLOCK)], shape=(n,))
            error = (dequantize_nf4(part, torch.float32) - w.reshape(-1)[:n].float()).abs()
            max_error, sum_error, seen = max(max_error, error.max().item()), sum_error + error.sum().item(), seen + n
        owner.q, owner.weight = q, None if q else nn.Parameter(x.tensor().to(device, dtype, copy=True), False)
    bits = 8 * sum(m.q.nbytes() if m.q else m.weight.nbytes for m in inner.values()) / sum(math.prod(m.shape) for m in inner.values())
    print(f"loaded {folder} in {time.time() - tic:.1f} s: {bits:.3f} bits per linear weight")
    if seen:
        print(f"NF4's error in the first million weights of each matrix: at most {max_error:.4g}, {sum_error / seen:.4g} on average")
    return model.eval()

def save_adapter(model, folder, args, base):
    """The LoRA of a model in peft's format: adapter_config.json and adapter_model.safetensors."""
    folder, tensors = pathlib.Path(folder), {f"{PEFT}{n}.weight": p for n, p in lora_parameters(model).items()}
    write_safetensors(folder / "adapter_model.safetensors", {n: (p.dtype, p.shape) for n, p in tensors.items()}, tensors.get)
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=args.lora_r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout, use_rslora=args.rslora, target_modules=sorted({n.split(".")[-3] for n in tensors})))

# what may stand in adapter_config.json without changing what the tensors mean; whatever else is set is refused by name
HARMLESS = """task_type r lora_alpha lora_dropout target_modules exclude_modules base_model_name_or_path revision auto_mapping
    inference_mode use_rslora layers_to_transform layers_pattern megatron_core peft_version qalora_group_size runtime_config""".split()
FINE = dict(peft_type=["LORA"], bias=["none"], init_lora_weights=[True, "gaussian", "orthogonal"])

def load_adapter(model, folder, args):
    """Put a peft-format adapter on the model; args.lora_r and the like become the adapter's own."""
    path = pathlib.Path(folder) / "adapter_config.json"
    c, found = read_json(path), read_safetensors(path.with_name("adapter_model.safetensors"))
    for k in [k for k, v in c.items() if v and k not in HARMLESS and v not in FINE.get(k, [])]:
        sorry(f"{path} sets {k} to {str(c[k])[:40]}, which is not handled")
    with reading(path.parent):
        state = {n.removeprefix(PEFT).removesuffix(".weight"): x.tensor() for n, x in found.items() if x.dtype in FLOATS.values()}
        names, ranks = {n.rpartition(".")[0] for n in state}, {len(x) for n, x in state.items() if n.endswith("lora_A")}
        args.lora_r, args.lora_alpha, args.lora_dropout = int(c["r"]), float(c["lora_alpha"]), float(c["lora_dropout"])
        args.rslora, args.targets = bool(c.get("use_rslora")), sorted({n.split(".")[-1] for n in names})
        if ranks != {c["r"]} or c["peft_type"] != "LORA" or not 0 <= args.lora_alpha < 1e9 or not 0 <= args.lora_dropout < 1:
            raise ValueError(f"it speaks of a rank-{c['r']} LoRA, its tensors of {ranks}; or lora_alpha or lora_dropout is out of range")
        add_lora(model, args, names)
        if len(state) < len(found) or {*state} != {*lora_parameters(model)}:
            raise ValueError("some of its tensors belong to nothing in this model, or lack their other half")
        model.load_state_dict(state, strict=False)

def save_merged(model, source, folder, into, write=True):
    """Write the model with its LoRA added in as a plain HF folder, tensor by tensor. Each way is exact for something:
    into "4bit", the dequantized NF4 weights: this is the model that was trained and evaluated here;
    into "16", the stored weights: what others compute who load the 16-bit model and the adapter; NF4's error goes out."""
    inner, found, dtype = {f"{n}.weight": m for n, m in linears(model).items()}, find_tensors(source), model.model.norm.weight.dtype
    if any(n.endswith(STATE) for n in found) if into == "16" else not any(m.q for m in inner.values()):
        sorry(f"--merge {into}: {source} " + ("holds no 16-bit weights" if into == "16" else "was not loaded in 4 bits") + "; take the other")
    source.resolve() != folder.resolve() or sorry(f"--merge {into} would write over {folder}, which it starts from; choose another --out")
    if not write:
        return
    def tensor_of(name):
        m = inner.get(name)
        w = dequantize_nf4(m.q, torch.float32) if m and m.q and into == "4bit" else found[name].tensor()
        return w.float() + m.scale * (m.lora_B @ m.lora_A).detach().to(w.device) if m and m.lora_A is not None else w
    spec = {n: (dtype, inner[n].shape if n in inner else x.shape) for n, x in found.items() if n.endswith(".weight")}
    write_safetensors(folder / "model.safetensors", spec, tensor_of)
    for file in source.glob("tokenizer.*"):
        shutil.copy(file, folder)
    config = {k: v for k, v in read_json(source / "config.json").items() if k not in ("quantization_config", "dtype")}
    write_json(folder / "config.json", dict(config, torch_dtype=str(dtype).removeprefix("torch.")))

# ---- generate, evaluate, train -----------------------------------------------------------------------------------------------
def record(step, *inputs):
    """step as a CUDA graph: a token is some thousand small kernels, which Python launches more slowly than the GPU runs them. They are
    recorded once and replayed on what is copied into the same inputs."""
    kept, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*kept)
    return lambda *inputs: ([old.copy_(new) for old, new in zip(kept, inputs)], graph.replay(), out)[-1]

@torch.inference_mode()
def generate(model, prompts, max_new, eos, temperature=0.0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """prompts: lists of ids, continued in one batch -> lists of new ids; one that stopped ends with a token of eos."""
    T, device = max(map(len, prompts)), model.model.norm.weight.device
    # padding stands on the left and repeats the row's first token: the repetition penalty must not meet one never said
    ids = torch.tensor([p[:1] * (T - len(p)) + p for p in prompts], device=device)      # (B, T), and growing
    pad = torch.tensor([[T - len(p)] for p in prompts], device=device)                  # (B, 1)
    at = torch.arange(T + max_new, device=device)
    # a token sees the real ones up to it, and itself: a softmax over nothing, as padding would have, is NaN
    mask = ((at >= pad)[:, None, None] & (at[:, None] >= at)) | (at[:, None] == at)     # (B, 1, T + max_new, T + max_new)
    cache, ends, stopped = Cache(model, len(prompts), T + max_new), torch.tensor([*eos], device=device), pad < 0
    def step(ids, pos, mask, at=None):
        cache.at = at
        return model.logits(model(ids, pos, mask, cache)[:, -1]).float()
    for end in range(T, T + max_new):
        new = slice(cache.T, end)                                                       # the whole prompt, then token by token
        inputs = ids[:, new], (at[new] - pad).clamp(min=0), mask[:, :, new, :end]
        if end > T and device.type == "cuda":                                           # these all have one shape: recorded once
            inputs = *inputs[:2], mask[:, :, new], at[new]
            step = record(step, *inputs) if end == T + 2 else step                      # not the first: in that one Triton still compiles
        logits, cache.T = step(*inputs), end
        drawn = common.sample(logits, temperature, 0, top_p, repetition_penalty, ids, generator)[:, None]               # (B, 1)
        ids, stopped = torch.cat([ids, drawn], 1), stopped | torch.isin(drawn, ends)
        if stopped.all():
            break
    return [row[:next((n for n, token in enumerate(row, 1) if token in eos), None)] for row in ids[:, T:].tolist()]

@torch.inference_mode()
def beam(model, prompt, width, max_new, eos, length_penalty=1.0, repetition_penalty=1.0):
    """prompt, a list of ids -> the best continuation that `width` beams find (common.beam_search), with one cache."""
    device, cache = model.model.norm.weight.device, Cache(model, 1, len(prompt) + max_new)
    def step(ids, parent):                      # row i goes on from what was row parent[i]: beams move about, and their past with them
        if len(parent) != cache.kv.size(2):     # one row becomes `width`
            cache.kv = cache.kv[:, :, parent.to(device)]
        elif parent.tolist() != list(range(len(parent))):               # the prompt's part is the same in all and stays where it is
            cache.kv[..., len(prompt):cache.T, :] = cache.kv[..., len(prompt):cache.T, :].index_select(2, parent.to(device))
        return model.logits(model(ids[:, cache.T:].to(device), cache=cache)[:, -1])
    return common.beam_search(step, prompt, width, max_new, eos, length_penalty, repetition_penalty)[0][len(prompt):]

def complete(model, rows, tok, args):
    """rows with prompts -> the same rows, each with its "completion", by beams or by sampling, and whether it "stopped" by itself."""
    draw, done = torch.Generator(model.model.norm.weight.device).manual_seed(args.seed), []
    model.eval()
    for i in tqdm(range(0, len(rows), args.micro_batch), desc="complete", unit="batch", disable=None):
        part = rows[i:i + args.micro_batch]
        ids = [tok.bos + tok.encode(row["prompt"]) + tok.sep for row in part]
        if args.beam > 1:
            out = [beam(model, p, args.beam, args.max_new, tok.eos, args.length_penalty, args.repetition_penalty) for p in ids]
        else:
            out = generate(model, ids, args.max_new, tok.eos, args.temperature, args.top_p, args.repetition_penalty, draw)
        done += [dict(row, completion=tok.decode([t for t in new if t not in tok.eos]), stopped=new[-1] in tok.eos) for row, new in zip(part, out)]
    return done

def loss_of(model, packed):
    """Sum of -log p over the labelled tokens of packed sequences (a scalar with gradient), and how many there are."""
    ids, labels, pos, doc = collate(packed, model.model.norm.weight.device)
    x = model(ids, pos, only_own_example(doc))[labels >= 0]             # (N, C): answers alone reach the head
    return F.cross_entropy(model.logits(x).float(), labels[labels >= 0], reduction="sum"), len(x)

@torch.no_grad()
def evaluate(model, packed, args):
    """Mean loss per answer token of packed sequences, in nats; NaN where there are none."""
    model.eval()
    sums = [loss_of(model, packed[i:i + args.micro_batch]) for i in range(0, len(packed), args.micro_batch)]
    return float(sum(loss for loss, _ in sums)) / sum(n for _, n in sums) if sums else math.nan

def train(model, packed, epochs, lr, batch_size, path, args, name):
    """AdamW on what of the model wants a gradient -> the last loss. Batch and dropout are functions of (seed, step) alone,
    so a run that was killed goes on from `path` to the same weights. Under torchrun the processes share each batch."""
    params, per_epoch = {n: p for n, p in model.train().named_parameters() if p.requires_grad}, -(-len(packed) // batch_size)
    steps, start, loss = max(1, round(epochs * per_epoch)), 0, math.nan
    warm = max(1, round(0.03 * steps))
    opt = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)       # the last two as in Llama 2
    keys = "model adapter load_4bit double_quant dtype seed lora_r lora_alpha lora_dropout rslora micro_batch".split() * (name != "pretrain")
    run = repr([steps, lr, batch_size, [vars(args)[k] for k in keys], [*params], hashlib.sha256(repr(packed).encode()).hexdigest()])
    if saved := common.resume(path, opt=opt):
        saved["run"] == run or sorry(f"{path} is from a run with other flags or data; remove it, or choose another --out")
        start, loss = saved["step"], saved["loss"]
        model.load_state_dict(saved["params"], strict=False)
        print(f"{name}: goes on from step {start}")
    bar = tqdm(range(start, steps), desc=name, unit="step", initial=start, total=steps, disable=True if RANK else None)
    for step in bar:                            # the rate goes up in a line, then down to a tenth in a cosine
        opt.param_groups[0]["lr"] = lr * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
        order = np.random.default_rng([args.seed, step // per_epoch]).permutation(len(packed))
        batch = [packed[i] for i in order[step % per_epoch * batch_size:][:batch_size]]
        count = sum(len(ids) - n for seq in batch for ids, n in seq)                    # answer tokens of all processes
        total = torch.zeros((), device=model.model.norm.weight.device)
        for p in params.values():
            p.grad = torch.zeros_like(p)        # not None: under torchrun a process may be without a share of the batch
        for i in range(RANK * args.micro_batch, len(batch), WORLD * args.micro_batch):
            torch.manual_seed((args.seed * 1_000_003 + step) * 4093 + i)                # of the dropout
            part = loss_of(model, batch[i:i + args.micro_batch])[0] / count
            part.backward()
            total += part.detach()
        for t in [total, *(p.grad for p in params.values())] if WORLD > 1 else []:      # divided by the whole batch's tokens: they add up
            torch.distributed.all_reduce(t)
        math.isfinite(loss := total.item()) or sorry(f"the {name} loss is {loss} at step {step}: try a smaller --lr, or --dtype bfloat16")
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        opt.step()
        bar.set_postfix(loss=f"{loss:.3f}")
        if RANK == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps):
            common.save_checkpoint(path, dict(run=run, step=step + 1, loss=loss, opt=opt.state_dict(), params=params))
    return loss

def make_demo(args, device):
    """Pretrain a byte-level Llama on data/texts, one document a line, and write it as a Hugging Face folder -> the folder."""
    lines = [line for f in sorted(DATA.glob("texts/*.txt")) for line in f.read_text("utf-8", "replace").splitlines() if line]
    lines or sorry(f"the demo wants .txt files in {DATA / 'texts'}")
    n_layer, C, epochs = (2, 64, 1) if args.smoke else (5, 128, 10)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=260, hidden_size=C, intermediate_size=C * 5 // 2,
                  num_hidden_layers=n_layer, num_attention_heads=C // 32, num_key_value_heads=C // 64, tie_word_embeddings=True,
                  bos_token_id=256, eos_token_id=257, torch_dtype="float32")
    folder = pathlib.Path("out") / f"demo-{hashlib.sha256(json.dumps([config, epochs, args.seed, lines]).encode()).hexdigest()[:10]}"
    if (folder / "model.safetensors").exists():
        return folder
    write_json(folder / "tokenizer.json", read_json(DATA / "bytes_tokenizer.json"))         # 256 bytes, three special tokens, no merges
    write_json(folder / "config.json", config)              # under torchrun each process writes the same
    tok, model = load_tokenizer(folder), Llama(read_config(folder / "config.json"))
    torch.manual_seed(args.seed)
    for p in model.to(device).parameters():
        p.data.normal_(std=0.02) if p.dim() == 2 else p.data.fill_(1)
    # a document is an example whose prompt is BOS alone: the same packing, the same loss
    packed = pack([([256, *tok.encode(line), 257], 1) for line in lines], 256, np.random.default_rng(args.seed))
    loss = train(model, packed, epochs, 3e-3, 8, folder / "train.pt", args, "pretrain")
    if RANK == 0:
        write_safetensors(folder / "model.safetensors", {n: (p.dtype, p.shape) for n, p in model.named_parameters()}, model.get_parameter)
        (folder / "train.pt").unlink()
    WORLD > 1 and torch.distributed.barrier()
    print(f"pretrained {sum(p.numel() for p in model.parameters()):,} parameters, {epochs} x {len(lines)} lines: {folder}, loss {loss:.3f}")
    return folder

# ---- main --------------------------------------------------------------------------------------------------------------------
def main():
    args, tic, device = get_args(), time.time(), common.pick_device()
    if WORLD > 1:
        device == "cuda" and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")         # one voice
    wanted, local = r"model[\w-]*\.safetensors(\.index\.json)?|tokenizer\.(json|model)", pathlib.Path(args.model)
    folder = make_demo(args, device) if args.model == "demo" else local if local.is_dir() else common.fetch_hub(args.model, [wanted], RANK)
    tok, model = load_tokenizer(folder), load_model(folder, args.dtype, args.load_4bit, args.double_quant, device)
    model.grad_checkpoint = args.grad_checkpoint
    # what ends a turn stands between prompt and answer: the demo's and Llama 3's own token, for others EOS
    seps = [tok.special[t] for t in ("<|sep|>", "<|eot_id|>") if t in tok.special]
    tok.bos, tok.sep, tok.eos = model.cfg.bos if tok.add_bos else [], (seps + model.cfg.eos)[:1], model.cfg.eos
    ids = {*tok.bytes, *tok.special.values()}           # a tiktoken file that was cut short is one of fewer tokens
    if max(ids) >= model.cfg.vocab_size or not ids.issuperset(tok.bos + tok.eos[:1]):
        sorry(f"{folder}: its tokenizer, with ids up to {max(ids)}, is not of its config.json: {model.cfg.vocab_size}, {tok.bos + tok.eos}")
    asked, out, metrics = read_jsonl(args.prompts, ["prompt"]) if args.prompts else [], pathlib.Path(args.out), {}
    merged = model, folder, out / f"merged-{args.merge}", args.merge
    args.merge == "off" or save_merged(*merged, write=False)            # what it refuses, it refuses before the training
    load_adapter(model, args.adapter, args) if args.adapter else add_lora(model, args)
    print(f"device {device}  dtype {model.model.norm.weight.dtype}  LoRA rank {args.lora_r}, "
          f"{sum(p.numel() for p in lora_parameters(model).values()):,} trainable  begins {tok.bos}  separator {tok.sep}  ends {tok.eos}")
    if args.epochs > 0:
        rows, rng = read_jsonl(args.data, ("prompt", "answer")), np.random.default_rng(args.seed)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        held, taught = rows[:(n := min(len(rows) - 1, math.ceil(args.held_out * len(rows))))], rows[n:]
        packed, held_packed = (pack(tokenize(part, tok), args.block_size, rng) for part in (taught, held))
        packed or sorry(f"--block_size {args.block_size} is shorter than every prompt in {args.data}")
        cut = sum(ids[-1:] != tok.eos[:1] for seq in packed for ids, _ in seq)          # these have lost their EOS
        print(f"data: {sum(map(len, packed))} of {len(taught)} examples, {cut} of them cut short, in {len(packed)} sequences of up to "
              f"{args.block_size} tokens; {len(held)} held out")
        metrics["loss_before"], before = evaluate(model, held_packed, args), complete(model, (held or taught)[:2], tok, args)
        metrics["train_loss"] = train(model, packed, args.epochs, args.lr, args.batch_size, out / "train.pt", args, "tune")
        metrics["loss_after"], after = evaluate(model, held_packed, args), complete(model, held or taught[:2], tok, args)
        metrics["exact"] = sum(row["completion"].strip() == row["answer"].strip() for row in after) / len(after)
        metrics["stopped"] = sum(row["stopped"] for row in after) / len(after)
        for was, now in zip(before, after):
            print(f"{now['prompt']!r}, wanted {now['answer']!r}\n    before {was['completion']!r}\n    after  {now['completion']!r}")
    if RANK == 0:
        args.epochs > 0 and save_adapter(model, out, args, folder)
        if asked:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in complete(model, asked, tok, args))
            with common.whole_file(out / "completions.jsonl") as part:
                part.write_text(text, "utf-8", "replace")
        args.merge == "off" or save_merged(*merged)
        args.epochs > 0 and (out / "train.pt").unlink()         # all is written: the next run starts anew
        print(f"{out} now holds {', '.join(sorted(os.listdir(out)))}" if args.epochs > 0 or asked or args.merge != "off" else "nothing written")
        common.log_result("lora_llama.py", args, time.time() - tic, metrics)

if __name__ == "__main__":
    common.run(main)
