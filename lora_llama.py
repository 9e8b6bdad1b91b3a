"""lora_llama.py: any Llama by hand, in 16 or 4 bits, taught to answer with LoRA, in one file.

    python lora_llama.py
        makes a byte-level Llama of 1M parameters from data/texts, loads it in 4 bits, tunes it on data/qa.jsonl; no network
    python lora_llama.py --model meta-llama/Llama-2-7b-hf --load_4bit --data my.jsonl
        the same path on the real thing; Llama 3.x, TinyLlama and SmolLM2 go the same way

Each run prints its NF4 error, bits per parameter, the held-out loss before and after, and the shares of held-out answers that
are exact and that stop by themselves; the README says which figures are not measured yet.
Papers: Llama 2 (arXiv 2307.09288, section 3.1), LoRA (2106.09685), QLoRA (2305.14314), rsLoRA (2312.03732).
Differs from Llama 2's SFT in: 1. examples packed in one sequence do not see each other; 2. LoRA, not all weights, hence the
    larger learning rate; 3. the loss is a mean over the answer tokens of the whole batch, however the batch is cut up.
Differs from QLoRA in: no paged optimizer; LoRA's moments are small, gradient checkpointing bounds the rest.
Not handled: other architectures, biases, DoRA, chat templates, 4-bit head or embedding, models cut over several cards.
"""
import base64, concurrent.futures, dataclasses, functools, hashlib, heapq, json, math, mmap, os, pathlib, re, shutil
import sys, time, types
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from common import sorry

HERE = pathlib.Path(__file__).resolve().parent
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# defaults of a grown model, and of the demo's 1M parameters, which need bigger steps and many more of them
GROWN = dict(epochs=2.0, lr=2e-4, batch_size=16, block_size=1024, load_4bit=False)
DEMO = dict(epochs=15.0, lr=3e-3, batch_size=4, block_size=256, load_4bit=True)

# ---- part 1: flags --------------------------------------------------------------------------------------------------------

def get_args(argv=None):
    p = common.Flags(__doc__)
    # which model
    p.flag("model", "demo", "demo (made here), a folder in Hugging Face's layout, or a Hub id: HuggingFaceTB/SmolLM2-135M")
    p.flag("dtype", "auto", "auto: as stored, but bfloat16 for float16, whose range is short", choices=["auto", *DTYPES])
    p.flag("load_4bit", None, "linear layers in NF4: a quarter of the memory, slower on a CPU; the demo's default",
           action=common.argparse.BooleanOptionalAction, type=None)
    p.flag("double_quant", True, "quantize NF4's block maxima too: 4.127 instead of 4.5 bits per parameter")
    p.flag("fused", True, "torch's fused attention where there are several queries; off: the written-out one")
    # LoRA
    p.flag("lora_r", 16, "rank of the update")
    p.flag("lora_alpha", 32.0, "the update is scaled by alpha / r")
    p.flag("lora_dropout", 0.05, "on the input of the update only")
    p.flag("targets", TARGETS, "layers that get one; all, as QLoRA found necessary", nargs="+", type=str, choices=TARGETS)
    p.flag("rslora", False, "scale by alpha / sqrt(r): a larger rank then does not learn slower")
    p.flag("adapter", "", "start from this adapter folder, ours or peft's")
    # data and training
    p.flag("data", str(HERE / "data/qa.jsonl"), 'JSON lines with "prompt" and "answer"')
    p.flag("held_out", 0.1, "share of the examples kept for the loss before and after")
    p.flag("separator", "auto", "between prompt and answer, a special token or text; auto: <|sep|>, <|eot_id|>, else EOS")
    p.flag("epochs", None, "passes over the examples: 2 as in Llama 2, the demo 15; 0 trains nothing", type=float)
    p.flag("lr", None, "AdamW's peak learning rate: 2e-4 as in QLoRA, the demo 3e-3", type=float)
    p.flag("block_size", None, "tokens per packed sequence: 1024, the demo 256", type=int)
    p.flag("batch_size", None, "sequences per step, over all micro-batches and processes: 16, the demo 4", type=int)
    p.flag("micro_batch", 4, "sequences at once: what fits in memory")
    p.flag("warmup", 0.03, "share of the steps before the cosine's peak; it ends at a tenth of it")
    p.flag("weight_decay", 0.1, "AdamW's, as in Llama 2")
    p.flag("grad_clip", 1.0, "largest gradient norm")
    p.flag("grad_checkpoint", False, "compute each block's activations twice instead of keeping them")
    p.flag("save_every", 20, "steps between checkpoints")
    p.flag("seed", 0, "of weights, order and dropout")
    # the demo's pretraining
    p.flag("texts", str(HERE / "data/texts"), "folder of .txt files, one document a line, that the demo reads first")
    p.flag("pretrain_epochs", 10.0, "passes over them")
    p.flag("n_layer", 5, "the demo's blocks")
    p.flag("n_embd", 128, "the demo's width")
    p.flag("n_head", 4, "the demo's query heads, two to each key-value head")
    # what comes out
    p.flag("prompt", [], "answer these after training", nargs="+", type=str)
    p.flag("prompts", "", "JSON lines whose prompts are completed in batches")
    p.flag("completions", "out/completions.jsonl", "where they go: the same rows with a completion")
    p.flag("gen_batch", 16, "prompts at once")
    p.flag("max_new", 128, "longest answer in tokens")
    p.flag("temperature", 0.0, "0: always the likeliest token")
    p.flag("top_p", 1.0, "sample from the likeliest tokens that hold this mass")
    p.flag("repetition_penalty", 1.0, "above 1: tokens that were seen become less likely")
    p.flag("beam", 1, "beams; 1 samples instead")
    p.flag("length_penalty", 1.0, "beams are ranked by log-probability / length ** this")
    p.flag("merge", "off", "write the merged model: 16 adds the update to the stored weights, 4bit to what NF4 made of them",
           choices=["off", "16", "4bit"])
    p.flag("out", "out/lora", "folder for the adapter, the checkpoint and the merged model")
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv)
    for name, value in (DEMO if args.model == "demo" else GROWN).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.lora_r, args.batch_size, args.micro_batch, args.save_every, args.gen_batch, args.max_new, args.beam) < 1:
        sorry("ranks, batches, lengths and intervals start at 1")
    if args.smoke:
        args.pretrain_epochs, args.n_layer, args.n_embd, args.epochs, args.max_new = 1.0, 2, 64, min(args.epochs, 1.0), 16
    return args

# ---- part 2: data: JSON lines and tokenizers ------------------------------------------------------------------------------

def read_json(path):
    """A JSON object from a file, as a dict."""
    try:
        found = json.loads(pathlib.Path(path).read_bytes())
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else sorry(f"{path} is no JSON object; it may be cut short")

def write_json(path, value):
    with common.whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1))

def read_jsonl(path, keys=("prompt", "answer")):
    """[{"prompt": "What is two plus two?", "answer": "Four."}, ...]; keys must be texts, others pass through."""
    rows = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                row = json.loads(line) if line.strip() else None
                # half of a surrogate pair is JSON, but no text: it becomes a question mark
                rows += [{**row, **{k: row[k].encode("utf-8", "replace").decode() for k in keys}}] if row is not None else []
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                sorry(f"{path}, line {n}: wants a JSON object with the texts {' and '.join(keys)}")
    return rows or sorry(f"{path} has no rows")

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 cuts digits out one by one BEFORE GPT-2's pattern: spaces before a digit then end there, not one earlier
SMOL = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# GPT-2 writes each byte as a printable character: itself where it is one, else one from 256 on
PLAIN = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
BYTE_OF = {chr(b): b for b in PLAIN} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PLAIN}))}

class ByteBPE:
    """Byte-level BPE of GPT-2, Llama 3 and SmolLM2, run by tiktoken. Special tokens in text are text.

    tokens: the 256 bytes, then byte strings in the order in which they are merged; ids: the id of each, or None.
    """
    def __init__(self, tokens, ids, special, pattern, add_bos):
        import tiktoken
        # tiktoken merges by rank whatever is a token, tokenizer.json by a list of pairs. For a trained BPE both are one: the
        # inside of a token merges as it would alone, so every token is only ever made of the same two
        self.bpe = tiktoken.Encoding("llama", pat_str=pattern, special_tokens={},
                                     mergeable_ranks={t: rank for rank, t in enumerate(tokens)})
        self.ids, self.special, self.add_bos = ids, special, add_bos
        self.bytes = {i: t for t, i in zip(tokens, ids) if i is not None}
        self.size = 1 + max([*self.bytes, *special.values()])

    def encode(self, text):
        return [self.ids[rank] for rank in self.bpe.encode_ordinary(text) if self.ids[rank] is not None]

    def decode(self, ids):
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

class CharBPE:
    """Llama 2's BPE: characters merged by rank, unknown ones spelled as bytes, a space written as U+2581.

    vocab: piece -> id; merges: (left, right) -> rank, lower first; prefix: a space first, always, unless there, or never.
    """
    def __init__(self, vocab, merges, special, prefix, add_bos):
        self.vocab, self.merges, self.special, self.prefix, self.add_bos = vocab, merges, special, prefix, add_bos
        self.fallback = [f"<0x{b:02X}>" for b in range(256)]
        self.bytes = {i: p.replace("\u2581", " ").encode() for p, i in vocab.items() if p not in special}
        self.bytes |= {vocab[p]: bytes([b]) for b, p in enumerate(self.fallback)}
        self.size = 1 + max(vocab.values())

    def encode(self, text):
        text = text.replace(" ", "\u2581")
        if text and (self.prefix == "always" or self.prefix == "unless there" and text[0] != "\u2581"):
            text = "\u2581" + text
        parts = []
        for c in text:
            parts += [c] if c in self.vocab else [self.fallback[b] for b in c.encode("utf-8", "replace")]
        # a linked list of parts and a heap of possible merges: O(n log n), for there are no words, the text is one piece
        n, heap = len(parts), []
        right, left = list(range(1, n + 1)), list(range(-1, n - 1))

        def offer(i, j):
            if i >= 0 and j < n and (parts[i], parts[j]) in self.merges:
                heapq.heappush(heap, (self.merges[parts[i], parts[j]], i, parts[i], parts[j]))
        for i in range(n - 1):
            offer(i, i + 1)
        while heap:
            _, i, a, b = heapq.heappop(heap)
            j = right[i]
            if parts[i] == a and j < n and parts[j] == b:           # else one of the two has been merged elsewhere since
                parts[i], parts[j], right[i] = a + b, None, right[j]
                if right[i] < n:
                    left[right[i]] = i
                offer(left[i], i), offer(i, right[i])
        return [self.vocab[p] for p in parts if p is not None]

    def decode(self, ids):
        text = b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", "replace")
        return text[1:] if self.prefix != "never" and text[:1] == " " else text

def load_tokenizer(folder):
    """The tokenizer of a model folder: tokenizer.json, or tokenizer.model (sentencepiece's, or a tiktoken file)."""
    path = next((p for p in (pathlib.Path(folder) / n for n in ("tokenizer.json", "tokenizer.model")) if p.exists()), None)
    if path is None:
        sorry(f"{folder} has neither tokenizer.json nor tokenizer.model")
    try:
        raw = path.read_bytes()
        if path.suffix == ".json":
            return from_tokenizer_json(json.loads(raw))
        return from_tiktoken(raw) if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw) else from_sentencepiece(raw)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        sorry(f"{path} is no tokenizer that is read here: {e if type(e) is ValueError else repr(e)}")

def from_tokenizer_json(spec):
    """The two kinds of BPE that Llamas come with, told apart by byte_fallback. ValueError names what is not handled."""
    bpe, pre, norm = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("normalizer") or {}
    affix = bpe.get("continuing_subword_prefix") or bpe.get("end_of_word_suffix")
    if bpe.get("type", "BPE") != "BPE" or bpe.get("dropout") or affix:
        raise ValueError(f"a {bpe.get('type')} model, or one with dropout or affixes, is not handled")
    vocab, merges = bpe["vocab"], [tuple(m.split(" ") if isinstance(m, str) else m) for m in bpe["merges"]]
    special = {t["content"]: t["id"] for t in spec["added_tokens"]}
    odd = next((t["content"] for t in spec["added_tokens"] if not t["special"]), None)
    if odd is not None:
        raise ValueError(f"the added token {odd!r}, which is not special, is not handled")
    ids = [*vocab.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 1 << 24 for i in ids) or len({*vocab.values()}) < len(vocab):
        raise ValueError("its ids are not whole numbers, one for each token")
    if any(len(m) != 2 or m[0] + m[1] not in vocab for m in merges):
        raise ValueError("a merge makes no token")
    # a template whose first piece is special says: begin with BOS
    add_bos = '"single": [{"SpecialToken"' in json.dumps(spec.get("post_processor"))
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [s.get("type") for s in steps]
    changes = [(s["type"], s.get("prepend") or s.get("content")) for s in norm.get("normalizers", [norm] if norm else [])]
    if bpe.get("byte_fallback"):
        merges = {m: rank for rank, m in reversed(list(enumerate(merges)))}
        if changes == [("Prepend", "\u2581"), ("Replace", "\u2581")] and not pre:
            return CharBPE(vocab, merges, special, "always", add_bos)
        if kinds == ["Metaspace"] and not changes and not pre.get("split", True):
            never = pre.get("prepend_scheme") == "never"
            return CharBPE(vocab, merges, special, "never" if never else "unless there", add_bos)
    elif not changes and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        pattern = GPT2 if kinds == ["ByteLevel"] else None
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            pattern = SMOL
        if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[1].get("use_regex"):
            pattern = steps[0]["pattern"]["Regex"]
        if pattern:
            char_of = {b: c for c, b in BYTE_OF.items()}
            order = [char_of[b] for b in range(256)] + [a + b for a, b in merges]
            if bpe.get("ignore_merges"):                # Llama 3: a word that is a token is that token, mergeable or not
                order += sorted((t for t in vocab if all(c in BYTE_OF for c in t)), key=vocab.get)
            order = list(dict.fromkeys(t for t in order if t not in special))
            tokens = [bytes(BYTE_OF[c] for c in t) for t in order]
            return ByteBPE(tokens, [vocab.get(t) for t in order], special, pattern, add_bos)
    raise ValueError(f"the normalizer {norm.get('type')} with the pre-tokenizers {kinds} is not handled")

def from_tiktoken(raw):
    """Llama 3's own file: a token in base64 and its rank on each line; 256 special tokens follow."""
    ranks = {base64.b64decode(t, validate=True): int(r) for t, r in (line.split() for line in raw.splitlines() if line)}
    tokens = sorted(ranks, key=ranks.get)
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError("its ranks are not 0, 1, 2, ... over all bytes")
    r = "reserved_special_token_"
    names = ["begin_of_text", "end_of_text", r + "0", r + "1", "finetune_right_pad_id", r + "2", "start_header_id",
             "end_header_id", "eom_id", "eot_id", "python_tag", *(f"{r}{i}" for i in range(3, 248))]
    return ByteBPE(tokens, range(len(tokens)), {f"<|{n}|>": len(tokens) + i for i, n in enumerate(names)}, LLAMA3, True)

def protobuf(raw):
    """[(field, value)] of one protobuf message: ints, or bytes for strings, messages and fixed-width numbers."""
    at, out = 0, []

    def varint():
        nonlocal at
        value, shift, more = 0, 0, True
        while more:
            value, more = value | (raw[at] & 127) << shift, raw[at] > 127       # past the end: IndexError
            at, shift = at + 1, shift + 7
        return value
    while at < len(raw):
        field, wire = divmod(varint(), 8)
        if wire == 0:
            out.append((field, varint()))
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        if at + size > len(raw):
            raise ValueError("it is cut short")
        out.append((field, raw[at:at + size]))
        at += size
    return out

def from_sentencepiece(raw):
    """tokenizer.model (sentencepiece_model.proto): pieces with scores, BPE with byte fallback, no normalization."""
    message = protobuf(raw)
    pieces = [dict(protobuf(v)) for f, v in message if f == 1]
    settings = {f: dict(protobuf(v)) for f, v in message if f in (2, 3)}
    trainer, norm, kinds = settings[2], settings[3], [p.get(3, 1) for p in pieces]
    # trainer: 3 is model_type (2: BPE), 35 byte_fallback; norm: 2 is a table of replacements, 4 remove_extra_whitespaces,
    # 5 escape them; kinds of piece: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    if trainer.get(3) != 2 or not trainer.get(35) or norm.get(2) or norm.get(4, 1) or not norm.get(5, 1) or {4, 5} & {*kinds}:
        raise ValueError("only sentencepiece's BPE with byte fallback and without normalization is handled")
    text = [p[1].decode() for p in pieces]
    score = {t: np.frombuffer(p.get(2, bytes(4)), "<f4")[0] for t, p, k in zip(text, pieces, kinds) if k == 1}
    # any two pieces that together are a piece may make it; the best score goes first
    merges = {(t[:i], t[i:]): -s for t, s in score.items() for i in range(1, len(t)) if t[:i] in score and t[i:] in score}
    special = {t: i for i, (t, k) in enumerate(zip(text, kinds)) if k in (2, 3)}
    return CharBPE({t: i for i, t in enumerate(text)}, merges, special, "always" if norm.get(3, 1) else "never", True)

def make_byte_tokenizer(path):
    """The demo's tokenizer.json: 256 bytes and four special tokens, no merges; tokenizers opens it too."""
    names = ["<|begin|>", "<|end|>", "<|sep|>", "<|pad|>"]
    added = [dict(id=256 + i, content=n, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
             for i, n in enumerate(names)]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    a = {"Sequence": dict(id="A", type_id=0)}
    start = dict(type="TemplateProcessing", single=[{"SpecialToken": dict(id=names[0], type_id=0)}, a], pair=[a, a],
                 special_tokens={names[0]: dict(id=names[0], ids=[256], tokens=[names[0]])})
    write_json(path, dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None, decoder=level,
                          pre_tokenizer=level, post_processor=start, model=dict(type="BPE", vocab=BYTE_OF, merges=[])))

# ---- packing: many examples in one sequence, each by itself ---------------------------------------------------------------

def tokenize(rows, tok, frame):
    """rows -> [(ids, n)]: BOS prompt separator answer EOS, and n, how many of the ids are prompt and carry no loss."""
    bos, sep, eos = frame
    heads = [bos + tok.encode(row["prompt"]) + sep for row in rows]
    return [(head + tok.encode(row["answer"]) + eos[:1], len(head)) for head, row in zip(heads, rows)]

def pack(examples, T, rng):
    """examples [(ids, n_prompt)] -> sequences of at most T tokens: lists of examples that fit together, first fit.

    Too long an example is cut at T; one whose prompt alone fills T is left out.
    """
    packed, room = [], []
    for i in rng.permutation(len(examples)):
        ids, n = examples[i][0][:T], examples[i][1]
        if n < T:
            at = next((j for j in range(max(0, len(room) - 64), len(room)) if room[j] >= len(ids)), len(room))
            if at == len(room):
                packed.append([]), room.append(T)
            packed[at].append((ids, n))
            room[at] -= len(ids)
    return packed

def collate(packed, device):
    """Sequences -> ids, labels (-1: no loss), positions, example numbers (-1: padding): all (B, T), T the longest of them.

    labels[t] is the token after ids[t] in its example; positions restart with each example.
    """
    T = max(sum(len(ids) for ids, _ in seq) for seq in packed)
    ids, pos, labels, doc = (torch.full((len(packed), T), v) for v in (0, 0, -1, -1))
    for b, seq in enumerate(packed):
        at = 0
        for d, (tokens, n) in enumerate(seq):
            end, n = at + len(tokens), max(n, 1)        # the last prompt token foretells the first of the answer
            ids[b, at:end], pos[b, at:end], doc[b, at:end] = torch.tensor(tokens), torch.arange(len(tokens)), d
            labels[b, at + n - 1:end - 1] = ids[b, at + n:end]
            at = end
    return [x.to(device) for x in (ids, labels, pos, doc)]

def only_own_example(doc):
    """doc (B, T) example numbers -> mask (B, 1, T, T): a token sees itself and what came before it in its own example."""
    causal = torch.ones(doc.size(1), doc.size(1), dtype=torch.bool, device=doc.device).tril()
    return ((doc[:, :, None] == doc[:, None, :]) & causal)[:, None]

# ---- part 3: the model ----------------------------------------------------------------------------------------------------

def read_config(path):
    """config.json -> the sizes that make a Llama, under nanoGPT's names; what is not a Llama is refused by name."""
    c = read_json(path)
    try:
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}      # transformers 5 says it all in rope_parameters
        kind, name = rope.get("rope_type", rope.get("type", "default")), (c.get("architectures") or [c.get("model_type")])[0]
        llama = name in ("LlamaForCausalLM", "llama") and c.get("model_type", "llama") == "llama"
        for wrong, what in ((not llama, f"a {name}"), (c.get("attention_bias") or c.get("mlp_bias"), "biases"),
                            (kind not in ("default", "llama3"), f"rope of type {kind}"),
                            (c.get("hidden_act", "silu") != "silu", f"the activation {c.get('hidden_act')}")):
            if wrong:
                sorry(f"{path} asks for {what}; only Llama 2, Llama 3 and their look-alikes are handled")
        heads, eos, bos = c["num_attention_heads"], c.get("eos_token_id", 2), c.get("bos_token_id", 1)
        scaling = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        cfg = types.SimpleNamespace(
            vocab_size=c["vocab_size"], n_embd=c["hidden_size"], n_ff=c["intermediate_size"], n_layer=c["num_hidden_layers"],
            n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads, eps=float(c.get("rms_norm_eps", 1e-6)),
            theta=float(rope.get("rope_theta") or c.get("rope_theta", 1e4)),
            scaling=[float(rope[k]) for k in scaling] if kind == "llama3" else None, tied=bool(c.get("tie_word_embeddings")),
            bos=[] if bos is None else [bos], eos=eos if isinstance(eos, list) else [eos],
            dtype=str(c.get("dtype") or c.get("torch_dtype")), quantized=bool(c.get("quantization_config")))
        sizes = [cfg.vocab_size, cfg.n_embd, cfg.n_ff, cfg.n_layer, cfg.n_head, cfg.n_kv_head, cfg.head_dim]
        if not (all(type(n) is int and 0 < n < 1 << 31 for n in sizes) and cfg.n_head % cfg.n_kv_head == cfg.head_dim % 2 == 0
                and all(type(i) is int and 0 <= i < cfg.vocab_size for i in cfg.bos + cfg.eos) and cfg.eos
                and 0 <= cfg.eps < 1 < cfg.theta < math.inf and (not cfg.scaling or min(cfg.scaling) > 0)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError):
        sorry(f"{path} lacks a size, or gives one that makes no Llama")
    return cfg

def rotary(cfg, pos, dtype):
    """pos (B, T) -> cos, sin (B, 1, T, hs): RoPE (arXiv 2104.09864), with Llama 3.1's stretch for long contexts."""
    freq = cfg.theta ** -(torch.arange(0, cfg.head_dim, 2, device=pos.device).float() / cfg.head_dim)      # (hs / 2,)
    if cfg.scaling:
        factor, low, high, context = cfg.scaling
        mix = ((context * freq / (2 * math.pi) - low) / (high - low)).clamp(0, 1)       # by turns in the original context:
        freq = (1 - mix) * freq / factor + mix * freq               # fast pairs stay, slow ones stretch, those between mix
    angle = pos[:, None, :, None].float() * freq                                        # (B, 1, T, hs / 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)                        # signed for rotate()

def rotate(x, cos, sin):
    """x (B, heads, T, hs): turn the pairs (x_i, x_{i + hs/2}), the order in which Hugging Face keeps Llama's rows."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight, the mean in fp32 whatever x is (arXiv 1910.07467)."""
    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(x.dtype)

class Cache:
    """Keys and values of the tokens read so far: k, v (n_layer, B, n_kv_head, longest, hs), the first T in use."""
    def __init__(self, model, B, longest):
        c, w = model.cfg, model.embed_tokens.weight
        self.k, self.v = (w.new_zeros(c.n_layer, B, c.n_kv_head, longest, c.head_dim) for _ in range(2))
        self.T = 0

    def extend(self, layer, k, v):
        """Append k, v (B, n_kv_head, t, hs) of one layer; returns all of its keys and values so far."""
        end = self.T + k.size(2)
        self.k[layer, :, :, self.T:end], self.v[layer, :, :, self.T:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def follow(self, parent):
        """Row i goes on from what was row parent[i]: beams move about, and their past with them."""
        if len(parent) != self.k.size(1):
            self.k, self.v = self.k[:, parent], self.v[:, parent]
        elif parent.tolist() != list(range(len(parent))):
            for x in (self.k, self.v):
                x[:, :, :, :self.T] = x[:, parent, :, :self.T]

class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): G query heads share one key and value head."""
    def __init__(self, cfg, layer):
        super().__init__()
        C, nh, nkv, hs = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim
        self.layer, self.nh, self.nkv, self.hs, self.fused = layer, nh, nkv, hs, True
        self.q_proj, self.k_proj, self.v_proj = Linear(C, nh * hs), Linear(C, nkv * hs), Linear(C, nkv * hs)
        self.o_proj = Linear(nh * hs, C)

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        nkv, G, hs = self.nkv, self.nh // self.nkv, self.hs
        q = self.q_proj(x).view(B, T, self.nh, hs).transpose(1, 2)      # (B, nh, T, hs)
        k = self.k_proj(x).view(B, T, nkv, hs).transpose(1, 2)          # (B, nkv, T, hs)
        v = self.v_proj(x).view(B, T, nkv, hs).transpose(1, 2)          # (B, nkv, T, hs)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                       # (B, nkv, S, hs), S >= T
        S = k.size(2)
        if mask is None and T > 1 and (S > T or not self.fused):        # causal, each query counting from the past's end
            mask = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)[None, None]
        if self.fused and T > 1:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=G > 1)
        elif self.fused:
            y = F.scaled_dot_product_attention(q.reshape(B, nkv, G, hs), k, v, attn_mask=mask)
        else:
            # query head h asks key head h // G: a group's queries become rows of one matrix, and no key is copied
            att = q.reshape(B, nkv, G * T, hs) @ k.transpose(2, 3)      # (B, nkv, G * T, S)
            att = (att * hs**-0.5).view(B, nkv, G, T, S)
            if mask is not None:
                att = att.masked_fill(~mask[:, :, None], -torch.inf)    # mask (B, 1, T, S), True: may look
            att = att.float().softmax(-1).to(x.dtype)                   # (B, nkv, G, T, S)
            y = att.view(B, nkv, G * T, S) @ v                          # (B, nkv, G * T, hs)
        y = y.view(B, self.nh, T, hs).transpose(1, 2)                   # (B, T, nh, hs)
        return self.o_proj(y.reshape(B, T, self.nh * hs))

class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate x) * up x)."""
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(cfg.n_embd, cfg.n_ff), Linear(cfg.n_embd, cfg.n_ff)
        self.down_proj = Linear(cfg.n_ff, cfg.n_embd)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

class Block(nn.Module):
    def __init__(self, cfg, layer):
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(cfg.n_embd, cfg.eps), Attention(cfg, layer)
        self.post_attention_layernorm, self.mlp = RMSNorm(cfg.n_embd, cfg.eps), MLP(cfg)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Llama(nn.Module):
    """The whole model; its parameters are named as in Hugging Face's files, less the leading 'model.'."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.grad_checkpoint = cfg, False
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.n_embd, cfg.eps)
        if not cfg.tied:
            self.lm_head = Linear(cfg.n_embd, cfg.vocab_size)

    def forward(self, ids, pos=None, mask=None, cache=None):
        """ids, pos (B, T), mask (B, 1, T, S) bool or None for plain causal -> hidden states (B, T, C), for logits()."""
        start = cache.T if cache is not None else 0
        if pos is None:
            pos = torch.arange(start, start + ids.size(1), device=ids.device)[None]
        x = self.embed_tokens(ids)                                      # (B, T, C)
        cos, sin = rotary(self.cfg, pos, x.dtype)
        for block in self.layers:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.T += ids.size(1)
        return self.norm(x)

    def logits(self, x):
        """(..., C) -> (..., V), where someone asks for them: the head is a fifth of a small model's work."""
        return F.linear(x, self.embed_tokens.weight) if self.cfg.tied else self.lm_head(x)

def stored_name(name):
    return name if name.startswith("lm_head") else "model." + name

# ---- part 4: the idea: NF4 (QLoRA, arXiv 2305.14314) and LoRA (arXiv 2106.09685) ------------------------------------------

# quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E; bitsandbytes' digits)
NF4_CODE = torch.tensor([
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1])
MIDPOINTS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
BLOCK, BLOCK2 = 64, 256         # weights that share a maximum; maxima that share one when they are quantized too
CHUNK = 1 << 18                 # elements worked on at once on the CPU: they stay in a core's cache; torch splits more

@dataclasses.dataclass
class NF4:
    """A matrix in 4 bits: two codes a byte, the first in the high nibble, times a maximum per block, row-major.

    nested: None, or (code, absmax, offset, block) with which absmax, then uint8, is itself dequantized.
    """
    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple
    block: int = BLOCK
    nested: tuple | None = None

    def nbytes(self):
        return sum(t.nbytes for t in (self.packed, self.absmax, *(self.nested or ())) if torch.is_tensor(t))

    def head(self, n):
        """The first n elements as a row: to look at without unpacking all."""
        return NF4(self.packed[:(n + 1) // 2], self.absmax[:-(-n // self.block)], (n,), self.block, self.nested)

@functools.lru_cache
def dynamic_map():
    """The 256 values of signed 8-bit dynamic quantization (arXiv 1511.04561), sorted: seven decades, 2^e values in each."""
    edges = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    means = torch.cat([10**(e - 6) * ((x[:-1] + x[1:]) / 2) for e, x in enumerate(edges)])
    return torch.cat([-means, means, torch.tensor([0., 1.])]).sort().values

def in_chunks(n, device, work):
    """Call work(begin, end) over n elements: all at once, but on the CPU piece by piece and on as many threads as torch uses."""
    if device.type != "cpu" or n <= CHUNK:
        return work(0, n)

    @torch.inference_mode()                     # a thread's own setting; what is made in it may be written to in it only
    def piece(i):
        work(i, min(i + CHUNK, n))
    with concurrent.futures.ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(piece, range(0, n, CHUNK)))

@functools.lru_cache
@torch.inference_mode(False)                # they outlive the call that first wants them
def tables():
    """For the CPU, where looking up is quicker than computing: low codes and thresholds by key, quads by two bytes."""
    # a float32's upper half leaves an interval so small that at most one midpoint lies in it: code = low + (x > threshold)
    top = torch.arange(65536, dtype=torch.int32) << 16
    ends = torch.stack([top.view(torch.float32), (top | 0xffff).view(torch.float32)]).nan_to_num(0).sort(0).values
    low, high = torch.bucketize(ends, MIDPOINTS)
    threshold = torch.where(high > low, MIDPOINTS[low.clamp(max=14)], torch.inf)
    # two packed bytes -> four floats, fetched as one number of 16 bytes; the byte that comes first in memory is the lower one
    pairs = torch.stack([NF4_CODE.repeat_interleave(16), NF4_CODE.repeat(16)], 1)               # (256, 2)
    quads = torch.cat([pairs.repeat(256, 1), pairs.repeat_interleave(256, 0)], 1)               # (65536, 4)
    return low.to(torch.uint8), threshold, quads.view(torch.complex128).view(-1)

def quantize_nf4(w, double=True):
    """w, a float tensor of any shape -> NF4. Codes and maxima are bitsandbytes', bit for bit; a tie goes to the lower code."""
    n = w.numel()
    flat = F.pad(w.detach().reshape(-1), (0, -n % BLOCK)) if n % BLOCK else w.detach().reshape(-1)
    packed = torch.empty(len(flat) // 2, dtype=torch.uint8, device=w.device)
    absmax, nested = torch.empty(len(flat) // BLOCK, device=w.device), None

    def work(i, end):
        x = flat[i:end].view(-1, BLOCK).float()
        top = torch.amax(x.abs(), 1, out=absmax[i // BLOCK:end // BLOCK])
        x = x * (1 / top.clamp(min=1e-38))[:, None]             # the reciprocal first, as bitsandbytes: last bits differ
        if w.device.type == "cpu":
            low, threshold, _ = tables()
            key = ((x.view(torch.int32) >> 16) & 0xffff).view(-1)               # the upper half of each float
            code = low.index_select(0, key).view(x.shape) + (x > threshold.index_select(0, key).view(x.shape))
        else:
            code = torch.bucketize(x, MIDPOINTS.to(w.device), out_int32=True).to(torch.uint8)
        torch.add(code[:, ::2] << 4, code[:, 1::2], out=packed[i // 2:end // 2].view(-1, BLOCK // 2))
    in_chunks(len(flat), w.device, work)
    if double:
        offset, code = absmax.mean(), dynamic_map().to(w.device)
        rows = F.pad(absmax - offset, (0, -len(absmax) % BLOCK2)).view(-1, BLOCK2)
        top = rows.abs().amax(1)
        rows = torch.bucketize(rows * (1 / top.clamp(min=1e-38))[:, None], (code[1:] + code[:-1]) / 2)
        absmax, nested = rows.to(torch.uint8).view(-1)[:len(absmax)].clone(), (code, top, float(offset), BLOCK2)
    return NF4(packed[:(n + 1) // 2], absmax, tuple(w.shape), BLOCK, nested)

def dequantize_nf4(q, dtype):
    """NF4 -> a tensor of its shape. The product is made in fp32 and rounded once, as in bitsandbytes."""
    n, device, absmax = math.prod(q.shape), q.packed.device, q.absmax
    if device.type == "cuda" and triton:
        return dequantize_triton(q, dtype)
    if q.nested:
        code, top, offset, block = q.nested
        absmax = code[absmax.int()] * top.repeat_interleave(block)[:len(absmax)] + offset
    packed = F.pad(q.packed, (0, -len(q.packed) % (q.block // 2)))
    if device.type != "cpu":
        code = NF4_CODE.to(device)
        x = torch.stack([code[(packed >> 4).int()], code[(packed & 15).int()]], 1).view(-1, q.block)
        return (x * absmax[:, None]).to(dtype).view(-1)[:n].view(q.shape)
    quads, keys, out = tables()[2], packed.view(torch.uint16), torch.empty(2 * len(packed), dtype=dtype)

    def work(i, end):
        x = quads.index_select(0, keys[i // 4:end // 4].int()).view(torch.float32).view(-1, q.block)
        torch.mul(x, absmax[i // q.block:end // q.block, None], out=x)
        out[i:end].view(-1, q.block).copy_(x)
    in_chunks(len(out), device, work)
    return out[:n].view(q.shape)

triton = None
if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    try:
        import triton
        import triton.language as tl
    except ImportError:         # torch for Windows comes without it
        pass
if triton:
    @triton.jit
    def maxima(absmax, code2, absmax2, offset, at, block2, NESTED: tl.constexpr):
        """absmax of the blocks numbered `at`, through the second quantization where there is one"""
        if NESTED:
            return tl.load(code2 + tl.load(absmax + at).to(tl.int32)) * tl.load(absmax2 + at // block2) + offset
        return tl.load(absmax + at)

    @triton.jit
    def dequantize_kernel(packed, absmax, code, code2, absmax2, offset, block, block2, out, n,
                          NESTED: tl.constexpr, TILE: tl.constexpr):
        """out[2i], out[2i + 1] = the two weights of packed[i], n bytes in all: both quantizations undone in one pass"""
        i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        i = tl.minimum(i, n - 1)                                        # the last tile writes its last byte several times
        byte = tl.load(packed + i).to(tl.int32)
        top = maxima(absmax, code2, absmax2, offset, 2 * i // block, block2, NESTED)
        tl.store(out + 2 * i, (tl.load(code + (byte >> 4)) * top).to(out.dtype.element_ty))
        tl.store(out + 2 * i + 1, (tl.load(code + (byte & 15)) * top).to(out.dtype.element_ty))

    @triton.jit
    def matvec_kernel(packed, absmax, code, code2, absmax2, offset, block, block2, x, y, n_out, half,
                      NESTED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
        """y (n_out) = W x, W (n_out, 2 * half) in NF4: each weight is read once, as 4 bits, and never written"""
        row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), n_out - 1)[:, None].to(tl.int64)     # (ROWS, 1)
        total = tl.zeros((ROWS, TILE), tl.float32)
        for start in range(0, half, TILE):
            j = start + tl.arange(0, TILE)[None, :]                     # (1, TILE) bytes of each row
            i = row * half + tl.minimum(j, half - 1)                    # (ROWS, TILE)
            byte = tl.load(packed + i).to(tl.int32)
            top = maxima(absmax, code2, absmax2, offset, 2 * i // block, block2, NESTED)
            even = tl.load(x + 2 * j, mask=j < half, other=0).to(tl.float32)
            odd = tl.load(x + 2 * j + 1, mask=j < half, other=0).to(tl.float32)
            total += top * (tl.load(code + (byte >> 4)) * even + tl.load(code + (byte & 15)) * odd)
        tl.store(y + row, tl.sum(total, 1)[:, None].to(y.dtype.element_ty))

def kernel_arguments(q):
    """How both kernels are told of an NF4; where there is no second quantization, anything stands in its place."""
    code2, absmax2, offset, block2 = q.nested or (q.absmax, q.absmax, 0.0, 1)
    return q.packed, q.absmax, NF4_CODE.to(q.packed.device), code2, absmax2, offset, q.block, block2

def dequantize_triton(q, dtype):
    """dequantize_nf4 in one kernel; the number of elements must be even."""
    out, n = torch.empty(q.shape, dtype=dtype, device=q.packed.device), len(q.packed)
    dequantize_kernel[(triton.cdiv(n, 1024),)](*kernel_arguments(q), out, n, NESTED=q.nested is not None, TILE=1024)
    return out

def matvec_triton(q, x):
    """x (n_in,) -> W x (n_out,), straight from the 4 bits; n_in must be even."""
    (n_out, n_in), y = q.shape, x.new_empty(q.shape[0])
    matvec_kernel[(triton.cdiv(n_out, 4),)](*kernel_arguments(q), x, y, n_out, n_in // 2, NESTED=q.nested is not None,
                                            ROWS=4, TILE=256)
    return y

class MatMul4(torch.autograd.Function):
    """x W^T with W in NF4. W is unpacked anew for the backward pass: kept, all layers together are the 16-bit model."""
    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, dequantize_nf4(q, x.dtype))

    @staticmethod
    def backward(ctx, g):
        return g @ dequantize_nf4(ctx.q, g.dtype), None

class Linear(nn.Module):
    """y = x W^T, W (n_out, n_in) plain or in NF4, plus LoRA's scale * (dropout(x) A^T) B^T where there is one."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.q, self.shape = nn.Parameter(torch.empty(n_out, n_in)), None, (n_out, n_in)
        self.lora_A = self.lora_B = None

    def forward(self, x):
        if self.q is None:
            y = F.linear(x, self.weight)
        elif x.is_cuda and triton and x.numel() == x.size(-1) and not torch.is_grad_enabled():
            y = matvec_triton(self.q, x.reshape(-1)).view(*x.shape[:-1], -1)
        else:
            y = MatMul4.apply(x, self.q)
        if self.lora_A is not None:
            z = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
            y = y + (F.linear(F.linear(z, self.lora_A), self.lora_B) * self.scale).to(y.dtype)
        return y

    def add_lora(self, r, alpha, dropout=0.0, rslora=False, A=None, B=None):
        """Put a rank-r update on top: A (r, n_in) uniform as in nn.Linear, B (n_out, r) zero: it begins as the identity."""
        (n_out, n_in), device = self.shape, (self.weight if self.q is None else self.q.packed).device
        if A is None:
            A, B = torch.empty(r, n_in).uniform_(-n_in**-0.5, n_in**-0.5), torch.zeros(n_out, r)
        # fp32 whatever W is: bfloat16's 8 bits would swallow steps of a thousandth of a value
        self.lora_A, self.lora_B = (nn.Parameter(t.to(device, torch.float32)) for t in (A, B))
        self.scale, self.dropout = alpha / (r**0.5 if rslora else r), dropout

    def merged(self, weight):
        """weight (n_out, n_in) + scale * B A in its dtype, summed in fp32; weight itself where there is no update."""
        if self.lora_A is None:
            return weight
        return (weight.float() + self.scale * (self.lora_B @ self.lora_A).detach().to(weight.device)).to(weight.dtype)

def linears(model):
    """{name: Linear} of the blocks: what is quantized and what gets LoRA; the head is neither, as in QLoRA."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"}

def lora_parameters(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}

def add_lora(model, args):
    """Freeze the model and put a fresh update on args.targets."""
    torch.manual_seed(args.seed)
    model.requires_grad_(False)
    for name, m in linears(model).items():
        if name.split(".")[-1] in args.targets:
            m.add_lora(args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora)

# ---- part 5: files: safetensors, model folders, adapters ------------------------------------------------------------------

SAFE = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64, I32=torch.int32,
            I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

def read_header(path):
    """A safetensors file's table: {name: (path, dtype, shape, begin, end)}, in bytes of the file, checked against its size.

    The file is 8 bytes of length, so much JSON, then the tensors without a gap (safetensors' README).
    """
    size, table = os.path.getsize(path), {}
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        raw, end = f.read(n) if 8 + n <= size and n <= 100 << 20 else b"", 8 + n
    try:
        head = json.loads(raw)
        head.pop("__metadata__", None)
        for name, e in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = SAFE[e["dtype"]], tuple(e["shape"]), e["data_offsets"]
            if not all(type(v) is int and v >= 0 for v in (begin, stop, *shape)) or 8 + n + begin != end:
                raise ValueError
            if stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError
            table[name], end = (path, dtype, shape, end, 8 + n + stop), 8 + n + stop
        if end != size:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sorry(f"{path} ({size} bytes) is no whole safetensors file of common types; fetch it again")
    return table

def map_tensor(path, dtype, shape, begin, end):
    """One tensor of a safetensors file as a view of its pages; they leave memory with the tensor."""
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    base = begin - begin % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as f:
        pages = mmap.mmap(f.fileno(), end - base, access=mmap.ACCESS_COPY, offset=base)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=begin - base).view(dtype).view(shape)

def write_safetensors(path, spec, tensor_of):
    """spec {name: (dtype, shape)}; tensor_of(name) is asked for one tensor at a time: they need not all be in memory."""
    at, table, code = 0, {"__metadata__": {"format": "pt"}}, {v: k for k, v in SAFE.items()}
    for name, (dtype, shape) in spec.items():
        end = at + math.prod(shape) * dtype.itemsize
        table[name], at = dict(dtype=code[dtype], shape=list(shape), data_offsets=[at, end]), end
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)             # tensors begin on a multiple of 8
    with common.whole_file(path) as part, open(part, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name, (dtype, _) in spec.items():
            f.write(tensor_of(name).detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy())

def find_tensors(folder):
    """All tensors of a model folder, in one file or in shards: {name: (path, dtype, shape, begin, end)}."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        return read_header(single) if single.exists() else sorry(f"{folder} has no model.safetensors (.bin is not read)")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) and f and os.path.basename(f) == f for f in where.values()):
        sorry(f"{index} lacks a weight_map from tensors to files beside it")
    gone = next((f for f in where.values() if not (folder / f).exists()), None)
    if gone:
        sorry(f"{folder / gone} is missing, though {index.name} names it")
    return {name: entry for file in sorted({*where.values()}) for name, entry in read_header(folder / file).items()}

def stored_nf4(name, found, device):
    """An NF4 as bitsandbytes writes it: beside `name` lie its .absmax, .quant_map, .quant_state and, if nested, two more."""
    try:
        packed, absmax, code = (map_tensor(*found[name + n]).to(device, copy=True) for n in ("", ".absmax", ".quant_map"))
        state, nested = json.loads(map_tensor(*found[f"{name}.quant_state.bitsandbytes__nf4"]).numpy().tobytes()), None
        shape, block, sizes = tuple(state["shape"]), state["blocksize"], (32, 64, 128, 256, 512, 1024, 2048, 4096)
        if "nested_blocksize" in state:
            code2, top = (map_tensor(*found[f"{name}.nested_{n}"]).to(device, copy=True) for n in ("quant_map", "absmax"))
            nested = code2, top, float(state["nested_offset"]), state["nested_blocksize"]
            fine = nested[3] in sizes and code2.dtype == top.dtype == torch.float32 and absmax.dtype == torch.uint8
            fine = fine and code2.shape == (256,) and top.shape == (-(-len(absmax) // nested[3]),)
        else:
            fine = absmax.dtype == torch.float32
        n = math.prod(shape)
        if not (fine and block in sizes and packed.dtype == torch.uint8 and packed.numel() == (n + 1) // 2
                and absmax.shape == (-(-n // block),) and torch.equal(code.cpu(), NF4_CODE)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError):
        sorry(f"{found[name][0]}: {name} is not in bitsandbytes' NF4 layout, the only quantized one that is read")
    return NF4(packed.view(-1), absmax, shape, block, nested)

def load_model(folder, dtype="auto", four_bit=False, double=True, device="cpu", fused=True, quiet=False):
    """A model folder -> Llama without gradients. Tensors come one by one: the peak is the loaded model plus one of them.

    four_bit quantizes the blocks' linear layers to NF4; what bitsandbytes stored in NF4 stays so in any case.
    """
    folder, tic = pathlib.Path(folder), time.time()
    if not (folder / "config.json").exists():
        sorry(f"{folder} has no config.json")
    cfg, found = read_config(folder / "config.json"), find_tensors(folder)
    layers = {n.split(".")[2] for n in found if n.startswith("model.layers.")}
    if cfg.n_layer != len(layers):                              # before a structure of a billion layers is made
        sorry(f"{folder} holds {len(layers)} layers, its config.json says {cfg.n_layer}")
    if cfg.quantized and not any("bitsandbytes__nf4" in n for n in found):
        sorry(f"{folder} is quantized, and not as bitsandbytes' NF4, the only such layout that is read")
    dtype = DTYPES["float32" if "float32" in cfg.dtype else "bfloat16"] if dtype == "auto" else DTYPES[dtype]
    total = linear = size = seen = 0
    worst, error = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    with torch.device("meta"):                                  # the structure alone, no memory yet
        model = Llama(cfg)
    for name, p in tqdm(list(model.named_parameters()), desc="load", unit="tensor", disable=True if quiet else None):
        owner, full = model.get_submodule(name.rpartition(".")[0]), stored_name(name)
        if full not in found:
            sorry(f"{folder} lacks the tensor {full}")
        path, kind, shape, *_ = found[full]
        inner = isinstance(owner, Linear) and full != "lm_head.weight"
        if inner and f"{full}.quant_state.bitsandbytes__nf4" in found:
            owner.q = stored_nf4(full, found, device)
            shape, kind = owner.q.shape, dtype
        if shape != tuple(p.shape) or kind not in FLOATS:
            sorry(f"{path}: {full} is {kind} {list(shape)}; floats of 16 or 32 bits, {list(p.shape)}, were expected")
        if inner and owner.q is None and four_bit:
            w = map_tensor(*found[full]).to(device)
            owner.q, n = quantize_nf4(w, double), min(1 << 20, p.numel())
            off = (dequantize_nf4(owner.q.head(n), torch.float32) - w.view(-1)[:n].float()).abs().cpu()
            worst, error, seen = torch.maximum(worst, off.max()), error + off.sum(), seen + n
        dense = not (inner and owner.q)
        owner.weight = nn.Parameter(map_tensor(*found[full]).to(device, dtype, copy=True), False) if dense else None
        total, linear = total + p.numel(), linear + p.numel() * inner
        size += (owner.weight.nbytes if dense else owner.q.nbytes()) * inner
    for block in model.layers:
        block.self_attn.fused = fused
    if not quiet:
        print(f"loaded {folder}: {total / 1e6:.2f}M parameters, {8 * size / linear:.3f} bits per linear weight, "
              f"{time.time() - tic:.1f} s")
    if seen and not quiet:
        print(f"NF4's error: at most {worst:.4g}, {error / seen:.4g} on average (first million weights of each matrix)")
    return model.eval()

def fetch_model(name):
    """A folder as it is, or a Hub id's files, downloaded to out/hub (resumed, sizes and hashes checked). -> the folder"""
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        sorry(f"--model {name}: no such folder, and no Hub id (owner/name) either")
    folder, hub = pathlib.Path("out/hub") / name, os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if (folder / "whole").exists():
        return folder
    import requests
    headers = {"Authorization": f"Bearer {os.environ['HF_TOKEN']}"} if os.environ.get("HF_TOKEN") else {}
    try:
        answer = requests.get(f"{hub}/api/models/{name}/tree/main", headers=headers, timeout=30)
        if answer.status_code in (401, 403, 404):
            sorry(f"the Hub refuses {name} (HTTP {answer.status_code}); if it is gated, ask for access there and set HF_TOKEN")
        answer.raise_for_status()
        files = {f["path"]: (f["size"], f.get("lfs", {}).get("oid")) for f in answer.json() if f["type"] == "file"}
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as e:
        sorry(f"cannot ask {hub} for {name} ({type(e).__name__}); without a --model nothing is downloaded")
    shards = r"model-[\w-]+" if "model.safetensors.index.json" in files else "model"
    wanted = [f for f in files if re.fullmatch(rf"config\.json|tokenizer\.(json|model)|{shards}\.safetensors(\.index\.json)?"
                                               r"|model\.safetensors\.index\.json", f)]
    if not any(f.endswith(".safetensors") for f in wanted):
        sorry(f"{name} holds no safetensors files (.bin and .pth are not read)")
    for f in wanted:
        common.download(f"{hub}/{name}/resolve/main/{f}", folder / f, *files[f], headers=headers)
    write_json(folder / "whole", wanted)
    return folder

def save_adapter(model, folder, args, base):
    """The LoRA of a model in peft's format: adapter_config.json and adapter_model.safetensors."""
    folder = pathlib.Path(folder)
    tensors = {f"base_model.model.model.{n}.weight": p for n, p in lora_parameters(model).items()}
    write_safetensors(folder / "adapter_model.safetensors", {n: (p.dtype, p.shape) for n, p in tensors.items()}, tensors.get)
    write_json(folder / "adapter_config.json", dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=args.lora_r, lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout, target_modules=sorted({n.split(".")[-3] for n in tensors}), use_rslora=args.rslora,
        bias="none", fan_in_fan_out=False, inference_mode=True, init_lora_weights=True))

# what may stand in adapter_config.json without changing what the tensors mean; whatever else is set is refused by name
HARMLESS = {"task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path",
            "revision", "auto_mapping", "inference_mode", "use_rslora", "layers_to_transform", "layers_pattern",
            "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
FINE = dict(peft_type=("LORA",), bias=("none", None), init_lora_weights=(True, False, None, "gaussian", "orthogonal"))

def load_adapter(model, folder, args):
    """Put a peft-format adapter on the model; args.lora_r and the like become the adapter's own."""
    folder, layers, pairs = pathlib.Path(folder), linears(model), {}
    file = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").exists() or not file.exists():
        sorry(f"--adapter: {folder} lacks adapter_config.json or adapter_model.safetensors")
    c, found = read_json(folder / "adapter_config.json"), read_header(file)
    odd = [k for k, v in c.items() if v and k not in HARMLESS and k not in FINE] + [k for k in FINE if c.get(k) not in FINE[k]]
    if odd:
        sorry(f"{folder}/adapter_config.json sets {odd[0]} to {str(c.get(odd[0]))[:40]}, which is not handled")
    r, alpha, dropout = c.get("r"), c.get("lora_alpha"), c.get("lora_dropout", 0.0)
    numbers = all(type(v) in (int, float) and 0 <= v < 1e9 for v in (alpha, dropout))
    if type(r) is not int or r < 1 or not numbers or dropout >= 1:
        sorry(f"{folder}/adapter_config.json lacks a good r, lora_alpha or lora_dropout")
    for name, entry in found.items():
        m = re.fullmatch(r"base_model\.model\.model\.(.+)\.lora_([AB])\.weight", name)
        n_out, n_in = layers[m[1]].shape if m and m[1] in layers else (0, 0)
        if not n_in or entry[2] != ((r, n_in) if m[2] == "A" else (n_out, r)) or entry[1] not in FLOATS:
            sorry(f"{file}: the tensor {name}, {list(entry[2])}, belongs to no rank-{r} LoRA of this model")
        pairs.setdefault(m[1], {})[m[2]] = map_tensor(*entry).clone()
    if not pairs or any(len(p) < 2 for p in pairs.values()):
        sorry(f"{file} lacks some lora_A or lora_B")
    args.lora_r, args.lora_alpha, args.lora_dropout, args.rslora = r, float(alpha), float(dropout), bool(c.get("use_rslora"))
    model.requires_grad_(False)
    for name, p in pairs.items():
        layers[name].add_lora(r, alpha, dropout, args.rslora, **p)

def save_merged(model, source, folder, into):
    """Write the model with its LoRA added in as a plain HF folder, tensor by tensor. Each way is exact for something:
    into "4bit", the dequantized NF4 weights: this is the model that was trained and evaluated here;
    into "16", the stored weights: what others compute who load the 16-bit model and the adapter; NF4's error goes out."""
    source, folder, found = pathlib.Path(source), pathlib.Path(folder), find_tensors(pathlib.Path(source))
    plain, dtype = {stored_name(n) + ".weight": m for n, m in linears(model).items()}, model.embed_tokens.weight.dtype
    if into == "16" and any("bitsandbytes__nf4" in n for n in found):
        sorry(f"--merge 16: {source} holds no 16-bit weights; --merge 4bit merges into what it holds")

    def tensor_of(name):
        m = plain.get(name)
        if m is None or into == "16" or m.q is None:
            return map_tensor(*found[name]) if m is None else m.merged(map_tensor(*found[name]))
        return m.merged(dequantize_nf4(m.q, torch.float32))
    spec = {n: (dtype, plain[n].shape if n in plain else e[2]) for n, e in found.items() if n.endswith(".weight")}
    write_safetensors(folder / "model.safetensors", spec, tensor_of)
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    config = {k: v for k, v in read_json(source / "config.json").items() if k not in ("quantization_config", "dtype")}
    write_json(folder / "config.json", dict(config, torch_dtype=str(dtype).removeprefix("torch.")))

# ---- part 6: generate and evaluate ----------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, prompts, max_new, eos, temperature=0.0, top_p=1.0, repetition_penalty=1.0, generator=None):
    """prompts: lists of ids, continued in one batch -> lists of new ids; one that stopped ends with a token of eos."""
    B, T, device = len(prompts), max(map(len, prompts)), model.embed_tokens.weight.device
    pad = torch.tensor([[T - len(p)] for p in prompts], device=device)                  # (B, 1)
    # padding stands on the left and repeats the row's first token: the repetition penalty must not meet one never said
    new = ids = torch.tensor([p[:1] * (T - len(p)) + p for p in prompts], device=device)            # (B, T)
    cache, out, live = Cache(model, B, T + max_new), [[] for _ in prompts], {*range(B)}
    at = torch.arange(T + max_new, device=device)
    real, pos, mask = at >= pad, (at[:T] - pad).clamp(min=0), None
    if pad.any():
        # a token sees the real ones up to it; a padding token sees itself, for a softmax over nothing is NaN
        mask = (real[:, None, None, :T] & (at[:T, None] >= at[:T])) | torch.eye(T, dtype=torch.bool, device=device)
    for n in range(max_new):
        logits = model.logits(model(new, pos, mask, cache)[:, -1]).float()              # (B, V)
        new = common.sample(logits, temperature, 0, top_p, repetition_penalty, ids, generator)
        for b, token in enumerate(new.tolist()):
            if b in live:
                out[b].append(token)
                live -= {b} if token in eos else set()
        if not live:
            break
        new, pos, mask = new[:, None], at[T + n] - pad, real[:, None, None, :T + n + 1] if mask is not None else None
        ids = torch.cat([ids, new], 1)
    return out

@torch.inference_mode()
def beam(model, prompt, width, max_new, eos, length_penalty=1.0, repetition_penalty=1.0):
    """prompt, a list of ids -> the best continuation that `width` beams find (common.beam_search), with one cache."""
    device, cache = model.embed_tokens.weight.device, Cache(model, 1, len(prompt) + max_new)

    def step(ids, parent):
        cache.follow(parent.to(device))
        return model.logits(model(ids[:, cache.T:].to(device), cache=cache)[:, -1])
    return common.beam_search(step, prompt, width, max_new, eos, length_penalty, repetition_penalty)[0][len(prompt):]

def answer(model, prompts, tok, frame, args):
    """Texts -> (completions, whether each stopped by itself), by beams or by sampling as the flags say."""
    bos, sep, eos = frame
    ids = [bos + tok.encode(p) + sep or eos[:1] for p in prompts]
    model.eval()
    if args.beam > 1:
        out = [beam(model, p, args.beam, args.max_new, eos, args.length_penalty, args.repetition_penalty) for p in ids]
    else:
        draw = torch.Generator(model.embed_tokens.weight.device).manual_seed(args.seed)
        out = generate(model, ids, args.max_new, eos, args.temperature, args.top_p, args.repetition_penalty, draw)
    return [tok.decode([i for i in o if i not in eos]) for o in out], [o[-1] in eos for o in out]

def complete(model, rows, tok, frame, args):
    """rows with prompts -> the same rows, each with its "completion" and whether it "stopped" by itself."""
    done = []
    for i in tqdm(range(0, len(rows), args.gen_batch), desc="complete", unit="batch", disable=None):
        part = rows[i:i + args.gen_batch]
        for row, text, stopped in zip(part, *answer(model, [r["prompt"] for r in part], tok, frame, args)):
            done.append(dict(row, completion=text, stopped=stopped))
    return done

def loss_of(model, packed):
    """Sum of -log p over the labelled tokens of packed sequences (a scalar with gradient), and how many there are."""
    ids, labels, pos, doc = collate(packed, model.embed_tokens.weight.device)
    x = model(ids, pos, only_own_example(doc))
    x, y, total = x[labels >= 0], labels[labels >= 0], 0.0              # (N, C), (N,): answers alone reach the head
    for part, target in zip(x.split(1024), y.split(1024)):              # 128k logits in fp32 are half a megabyte per token
        total = total + F.cross_entropy(model.logits(part).float(), target, reduction="sum")
    return total, len(y)

@torch.no_grad()
def evaluate(model, packed, args):
    """Mean loss per answer token of packed sequences, in nats."""
    model.eval()
    sums = [loss_of(model, packed[i:i + args.micro_batch]) for i in range(0, len(packed), args.micro_batch)]
    return sum(loss.item() for loss, _ in sums) / max(1, sum(n for _, n in sums))

# ---- part 7: training -----------------------------------------------------------------------------------------------------

def train(model, packed, epochs, lr, batch_size, path, args, name):
    """AdamW on what of the model wants a gradient -> the last loss. Batch and dropout are functions of (seed, step) alone,
    so a run that was killed goes on from `path` to the same weights. Under torchrun the processes share each batch."""
    params, per_epoch = {n: p for n, p in model.named_parameters() if p.requires_grad}, -(-len(packed) // batch_size)
    steps, start, loss = max(1, round(epochs * per_epoch)), 0, math.nan
    warm = max(1, round(args.warmup * steps))
    opt = torch.optim.AdamW(params.values(), lr=lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    same = ("model", "adapter", "load_4bit", "double_quant", "dtype", "seed", "lora_r", "lora_alpha", "lora_dropout", "rslora",
            "micro_batch", "warmup", "weight_decay", "grad_clip")
    run = json.dumps([steps, lr, batch_size, [getattr(args, k) for k in same], {n: p.shape for n, p in params.items()},
                      hashlib.sha256(json.dumps(packed).encode()).hexdigest()])
    if path.exists():
        saved = common.load_checkpoint(path)
        if saved.get("run") != run:
            sorry(f"{path} is from a run with other flags or data; remove it, or choose another --out")
        start, loss = saved["step"], saved["loss"]
        opt.load_state_dict(saved["opt"])
        for n, p in params.items():
            p.data.copy_(saved["params"][n])
        print(f"{name}: goes on from step {start}")
    bar = tqdm(range(start, steps), desc=name, unit="step", initial=start, total=steps, disable=True if RANK else None)
    for step in bar:
        # linear up, then a cosine down to a tenth
        rate = (step + 1) / warm if step < warm else 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))
        for group in opt.param_groups:
            group["lr"] = lr * rate
        order = np.random.default_rng([args.seed, step // per_epoch]).permutation(len(packed))
        batch = [packed[i] for i in order[step % per_epoch * batch_size:][:batch_size]]
        count = sum(len(ids) - max(n, 1) for seq in batch for ids, n in seq)            # answer tokens of all processes
        model.train()
        total = torch.zeros((), device=model.embed_tokens.weight.device)
        for i in range(0, len(batch), args.micro_batch):
            if i // args.micro_batch % WORLD == RANK:
                torch.manual_seed((args.seed * 1_000_003 + step) * 4093 + i)            # of the dropout
                part = loss_of(model, batch[i:i + args.micro_batch])[0] / count
                part.backward()
                total += part.detach()
        if WORLD > 1:                           # each divided by the whole batch's tokens: gradients and losses add up
            for p in params.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for t in [total, *(p.grad for p in params.values())]:
                torch.distributed.all_reduce(t)
        nn.utils.clip_grad_norm_(params.values(), args.grad_clip)
        opt.step()
        opt.zero_grad()
        loss = total.item()
        bar.set_postfix(loss=f"{loss:.3f}")
        if RANK == 0 and ((step + 1) % args.save_every == 0 or step + 1 == steps):
            common.save_checkpoint(path, dict(run=run, step=step + 1, loss=loss, opt=opt.state_dict(),
                                              params={n: p.detach() for n, p in params.items()}))
    return loss

def make_demo(args, device):
    """Pretrain a byte-level Llama on args.texts, one document a line, and write it as a Hugging Face folder -> the folder."""
    texts = [f.read_text("utf-8", "replace") for f in sorted(pathlib.Path(args.texts).glob("*.txt"))]
    lines = [line for text in texts for line in text.splitlines() if line]
    if not lines or args.n_head < 2 or args.n_head % 2 or args.n_embd % (2 * args.n_head):
        sorry(f"the demo wants .txt files in --texts {args.texts}, an even --n_head, and --n_embd a multiple of twice that")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=260, hidden_size=args.n_embd,
                  intermediate_size=args.n_embd * 5 // 2, num_hidden_layers=args.n_layer, num_attention_heads=args.n_head,
                  num_key_value_heads=args.n_head // 2, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True,
                  bos_token_id=256, eos_token_id=257, max_position_embeddings=2048, hidden_act="silu", torch_dtype="float32")
    digest = hashlib.sha256(json.dumps([config, args.pretrain_epochs, args.seed, lines]).encode()).hexdigest()
    folder = pathlib.Path("out") / f"demo-{digest[:10]}"
    if (folder / "model.safetensors").exists():
        return folder
    write_json(folder / "config.json", config)
    make_byte_tokenizer(folder / "tokenizer.json")
    tok = load_tokenizer(folder)
    torch.manual_seed(args.seed)
    model = Llama(read_config(folder / "config.json"))
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
    model.to(device)
    # a document is an example without a prompt: the same packing, the same loss
    examples = [([256, *tok.encode(line), 257], 0) for line in lines]
    print(f"pretrain: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(lines)} documents of "
          f"{sum(len(ids) for ids, _ in examples)} bytes, {args.pretrain_epochs:g} passes")
    packed = pack(examples, 256, np.random.default_rng(args.seed))
    loss = train(model, packed, args.pretrain_epochs, 3e-3, 8, folder / "train.pt", args, "pretrain")
    if RANK == 0:
        tensors = {stored_name(n): p for n, p in model.named_parameters()}
        write_safetensors(folder / "model.safetensors", {n: (p.dtype, p.shape) for n, p in tensors.items()}, tensors.get)
        (folder / "train.pt").unlink()
    if WORLD > 1:
        torch.distributed.barrier()
    print(f"pretrain: last loss {loss:.3f} nats per byte; written to {folder}")
    return folder

# ---- part 8: main ---------------------------------------------------------------------------------------------------------

def main():
    args, tic, device = get_args(), time.time(), common.pick_device()
    if WORLD > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")         # one voice
    folder = make_demo(args, device) if args.model == "demo" else fetch_model(args.model)
    tok = load_tokenizer(folder)
    model = load_model(folder, args.dtype, args.load_4bit, args.double_quant, device, args.fused, quiet=RANK > 0)
    model.grad_checkpoint = args.grad_checkpoint
    if tok.size > model.cfg.vocab_size:
        sorry(f"{folder}: the tokenizer has ids up to {tok.size - 1}, the model only {model.cfg.vocab_size} of them")
    bos, eos = model.cfg.bos if tok.add_bos else [], model.cfg.eos
    sep = next((n for n in ("<|sep|>", "<|eot_id|>") if n in tok.special), None) if args.separator == "auto" else args.separator
    sep = eos[:1] if sep is None else [tok.special[sep]] if sep in tok.special else tok.encode(sep)
    frame = bos, sep, eos
    load_adapter(model, args.adapter, args) if args.adapter else add_lora(model, args)
    print(f"device {device}  dtype {model.embed_tokens.weight.dtype}  LoRA rank {args.lora_r}, "
          f"{sum(p.numel() for p in lora_parameters(model).values()):,} trainable  begins {bos}  separator {sep}  ends {eos}")

    out, metrics = pathlib.Path(args.out), {}
    if args.epochs > 0:
        rows, rng = read_jsonl(args.data), np.random.default_rng(args.seed)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        n_held = min(len(rows) - 1, math.ceil(args.held_out * len(rows)))
        held, taught = rows[:n_held], rows[n_held:]
        examples = tokenize(taught, tok, frame)
        packed, held_packed = pack(examples, args.block_size, rng), pack(tokenize(held, tok, frame), args.block_size, rng)
        if not packed:
            sorry(f"--block_size {args.block_size} is shorter than every prompt in {args.data}")
        fill = sum(len(ids) for seq in packed for ids, _ in seq) / len(packed) / args.block_size
        cut = sum(len(ids) > args.block_size for ids, _ in examples)
        print(f"data: {len(taught)} examples in {len(packed)} sequences, {fill:.0%} full, {cut} too long; {len(held)} held out")
        probe = (held or taught)[:2]
        before = complete(model, probe, tok, frame, args)
        if held_packed:
            metrics["loss_before"] = evaluate(model, held_packed, args)
        metrics["train_loss"] = train(model, packed, args.epochs, args.lr, args.batch_size, out / "train.pt", args, "tune")
        if held_packed:
            metrics["loss_after"] = evaluate(model, held_packed, args)
            done = complete(model, held, tok, frame, args)
            metrics["exact"] = sum(r["completion"].strip() == r["answer"].strip() for r in done) / len(done)
            metrics["stopped"] = sum(r["stopped"] for r in done) / len(done)
        for row, was, now in zip(probe, before, complete(model, probe, tok, frame, args)):
            print(f"before  {row['prompt']!r} -> {was['completion']!r}\nafter   {row['prompt']!r} -> {now['completion']!r}, "
                  f"wanted {row['answer']!r}")
        if RANK == 0:
            save_adapter(model, out, args, folder)
            (out / "train.pt").unlink()         # the adapter is whole: the next run starts anew
            print(f"adapter in {out}")
    if RANK == 0:
        for row in complete(model, [dict(prompt=p) for p in args.prompt], tok, frame, args):
            print(f"{row['prompt']!r} -> {row['completion']!r}")
        if args.prompts:
            done = complete(model, read_jsonl(args.prompts, ("prompt",)), tok, frame, args)
            with common.whole_file(args.completions) as part:
                part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done), "utf-8")
            print(f"{len(done)} completions in {args.completions}")
        if args.merge != "off":
            save_merged(model, folder, out / f"merged-{args.merge}", args.merge)
            print(f"merged into the {'stored' if args.merge == '16' else '4-bit'} weights, in {out}/merged-{args.merge}")
        common.log_result("lora_llama.py", args, time.time() - tic, metrics)

if __name__ == "__main__":
    common.run(main)
