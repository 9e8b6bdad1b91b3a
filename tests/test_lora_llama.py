"""lora_llama.py against transformers, peft, bitsandbytes, tokenizers and sentencepiece; and against broken files, kills and torn lines."""
import base64, contextlib, functools, http.server, io, json, os, pathlib, random, re, shutil, signal, subprocess, sys, threading, time

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn import functional as F

import common
import lora_llama as L

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
calm = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# widths are multiples of 64: where they are not, bitsandbytes' C++ dequantizes wrongly on the CPU
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
ROPE3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
KINDS = dict(llama2=dict(num_key_value_heads=4), tinyllama=dict(num_key_value_heads=1), llama31=dict(num_key_value_heads=2, rope_parameters=ROPE3),
             llama32=dict(num_key_value_heads=2, rope_parameters=dict(ROPE3, factor=32.0), head_dim=32, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """{kind: (transformers' random model, its folder)}; weights large enough that attention matters."""
    made = {}
    for kind, more in KINDS.items():
        torch.manual_seed(len(made))
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}, initializer_range=0.15)).eval()
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        made[kind] = model, folder
    return made


def ours(folder, fused=True, **kw):
    model = L.load_model(folder, "float32", **kw)
    for block in model.model.layers:
        block.fused = fused
    return model


def args_of(*words):
    return L.get_args(list(map(str, words)))


def sentence(call, *args, **kw):
    """What call prints as it ends in status 2; anything else but a return is a failure of the test."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            call(*args, **kw)
    except SystemExit as e:
        assert e.code == 2 and err.getvalue().count("\n") == 1, err.getvalue()
        return err.getvalue()
    return None

# ---- the model against transformers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_logits(theirs, kind):
    reference, folder = theirs[kind]
    model, ids = ours(folder), torch.randint(0, 97, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = reference(ids).logits, model.logits(model(ids))
        assert want.std() > 0.5 and (want - got).abs().max() < 1e-4
        plain = model.logits(ours(folder, fused=False)(ids))
        assert (plain - got).abs().max() < 1e-4
        cache = L.Cache(model, 2, 90)
        steps = torch.cat([model.logits(model(ids[:, a:b], cache=cache)) for a, b in [(0, 30), *((i, i + 1) for i in range(30, 90))]], 1)
        assert (steps - want).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_llama3_scaling_is_seen(theirs, kind):
    """The rope test above can fail: without scaling, Llama 3.1's logits are others."""
    reference, folder = theirs[kind]
    model, ids = ours(folder), torch.arange(90)[None] % 97
    model.cfg.stretch = []
    with torch.no_grad():
        same = (reference(ids).logits - model.logits(model(ids))).abs().max() < 1e-3
    assert same == (kind in ("llama2", "tinyllama"))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_and_penalty(theirs, kind):
    reference, folder = theirs[kind]
    model, rng = ours(folder), random.Random(0)
    for penalty in (1.0, 1.3):
        prompt = [rng.randrange(3, 97) for _ in range(9)]
        want = reference.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=penalty)[0, 9:].tolist()
        assert L.generate(model, [prompt], 24, [2], repetition_penalty=penalty)[0] == want


def test_beams(theirs):
    """Token for token, over widths, length penalties, repetition penalties and several eos ids, the likely ones among them."""
    rng, ended = random.Random(3), 0
    for kind in KINDS:
        reference, folder = theirs[kind]
        model = ours(folder)
        for width, length, penalty, eos in ((2, 1.0, 1.0, [2]), (3, 0.0, 1.2, [2, 5]), (4, 2.0, 1.0, [7, 8, 9]), (8, -1.0, 1.4, list(range(40, 60))),
                                            (5, 0.6, 1.0, list(range(20, 40))), (1, 1.0, 1.1, [3])):
            prompt = [rng.randrange(3, 97) for _ in range(rng.randrange(1, 12))]
            want = reference.generate(torch.tensor([prompt]), max_new_tokens=14, num_beams=width, do_sample=False, length_penalty=length, eos_token_id=eos,
                                      repetition_penalty=penalty, early_stopping=False, pad_token_id=0)[0, len(prompt):].tolist()
            got = L.beam(model, prompt, width, 14, eos, length, penalty) if width > 1 else L.generate(model, [prompt], 14, eos, repetition_penalty=penalty)[0]
            ended += got[-1] in eos
            assert got == want, (kind, width, length, penalty)
    assert ended > 5


def test_batch_equals_one_by_one(theirs):
    model = ours(theirs["tinyllama"][1])
    prompts = [[5, 6, 7], [9], list(range(10, 40))]
    for penalty in (1.0, 1.3):
        one = [L.generate(model, [p], 10, [2], repetition_penalty=penalty)[0] for p in prompts]
        assert L.generate(model, prompts, 10, [2], repetition_penalty=penalty) == one


def test_a_step_of_fixed_shapes_is_the_usual_one(theirs):
    """As generate() records it on a GPU: the new key goes where a tensor says, all of the cache is read, the mask hides what is not there yet."""
    model, ids = ours(theirs["tinyllama"][1]), torch.arange(5, 17)[None]
    with torch.no_grad():
        want, cache = model.logits(model(ids)[:, -1]), L.Cache(model, 1, 30)
        model(ids[:, :-1], cache=cache)
        cache.kv[..., 11:, :], cache.at = 7.0, torch.tensor([11])                   # what stands beyond must not matter
        got = model.logits(model(ids[:, -1:], torch.tensor([[11]]), (torch.arange(30) <= 11)[None, None, None], cache)[:, -1])
    assert torch.allclose(got, want, atol=1e-4)


def test_other_architectures_are_refused_by_name(theirs, tmp_path):
    config = json.loads((theirs["llama2"][1] / "config.json").read_text())
    for change, word in ((dict(architectures=["MistralForCausalLM"], model_type="mistral"), "MistralForCausalLM"), (dict(attention_bias=True), "biases"),
                         (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "yarn"), (dict(hidden_act="gelu"), "gelu"),
                         (dict(num_attention_heads=0), "size"), (dict(hidden_size="64"), "size"), (dict(eos_token_id=[2, 1000]), "size")):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert word in sentence(L.read_config, tmp_path / "config.json")

# ---- tokenizers ------------------------------------------------------------------------------------------------------------

LOOKALIKES = ["<s>", "</s>", "<unk>", "<0x41>", "<|begin_of_text|>", "<|end|>", "<|eot_id|>", "\u2581", "  ", "\n\n", "'re", "'S", "\u0130", "\x00", "\x1c",
              "\u00a0", "\u200d", "e\u0301", "\U0001f469\u200d\U0001f680", "\u6f22\u5b57", "1234567", "\t", "\r\n", "\ufeff", "\ufffd", "\u1e9e", "\u017f"]
# characters that Python's tables know: the libraries' Unicode versions differ over newer ones
TEXT = st.lists(st.one_of(st.sampled_from(LOOKALIKES), st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=6),
                          st.text("abc the 123.,'\n ", max_size=12)), max_size=12).map("".join)
CORPUS = (["the cat and the cats sat on 1234 mats, isn't it? don't", "  spaces   here\n\nand there\t", "caf\u00e9 na\u00efve \u6f22\u5b57 \u6f22 \U0001f600",
           "the then there these theme 2024 aaaa aaaaa abab"] + [f"word{i % 17} and number {i * 37}" for i in range(60)])
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def byte_level(kind):
    """A tokenizer of the tokenizers library, trained on CORPUS, of GPT-2's, SmolLM2's or Llama 3's make."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    tok.pre_tokenizer = dict(gpt2=lambda: level, smol=lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), level]), llama3=lambda:
                             pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(L.LLAMA3), "isolated"), level]))[kind]()
    tok.decoder = decoders.ByteLevel()
    first = SPECIAL if kind == "smol" else []           # SmolLM2's special tokens come first, Llama 3's last
    tok.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if not first:
        tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    if kind != "smol":
        tok.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[(SPECIAL[0], tok.token_to_id(SPECIAL[0]))])
    tok.encode_special_tokens = True                    # the library's word for: special tokens in text are text
    return tok


@pytest.mark.parametrize("kind", ["gpt2", "smol", "llama3"])
def test_byte_level_ids(kind, tmp_path):
    theirs = byte_level(kind)
    theirs.save(str(tmp_path / "tokenizer.json"))
    mine = L.load_tokenizer(tmp_path)
    assert mine.special == {s: theirs.token_to_id(s) for s in SPECIAL} and mine.add_bos == (kind != "smol")
    assert any(len(mine.encode(w)) < len(w) for w in ("the", "and")), "merges are at work"

    @calm
    @given(TEXT)
    def same(text):
        ids = mine.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert mine.decode(ids) == text
    same()


def test_tiktoken_file(tmp_path):
    """Llama 3's own format: the ids are the ranks, as tiktoken gives them; 256 special ids follow."""
    import tiktoken
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"an", b"and", b" and", b"12", b"123", b"\xe6\xbc", b"\xe6\xbc\xa2"]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    mine = L.load_tokenizer(tmp_path)
    reference = tiktoken.Encoding("x", pat_str=L.LLAMA3, mergeable_ranks={t: i for i, t in enumerate(tokens)}, special_tokens={})
    assert mine.special["<|eot_id|>"] == 266 + 9 and mine.special["<|reserved_special_token_247|>"] == 266 + 255

    @calm
    @given(TEXT)
    def same(text):
        assert mine.encode(text) == reference.encode(text, disallowed_special=()) and mine.decode(mine.encode(text)) == text
    same()


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    spm, path = pytest.importorskip("sentencepiece"), tmp_path_factory.mktemp("spm")
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_prefix=str(path / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
                                   normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, hard_vocab_limit=False,
                                   minloglevel=2)
    return path


@pytest.mark.parametrize("form", ["model", "prepend", "metaspace"])
def test_llama2_ids(form, sentencepiece_file, tmp_path):
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file / "tokenizer.model"))
    encode = reference.encode
    if form == "model":
        shutil.copy(sentencepiece_file / "tokenizer.model", tmp_path)
    else:
        n = reference.get_piece_size()
        vocab = {reference.id_to_piece(i): i for i in range(n)}
        normal = {p: -i for p, i in vocab.items() if not (reference.is_byte(i) or reference.is_control(i) or reference.is_unknown(i))}
        merges = sorted(((p[:k], p[k:]) for p in normal for k in range(1, len(p)) if p[:k] in normal and p[k:] in normal), key=lambda m: -normal[m[0] + m[1]])
        tok = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        if form == "prepend":
            tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        else:
            tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tok.add_special_tokens(["<unk>", "<s>", "</s>"])
        tok.encode_special_tokens = True
        tok.save(str(tmp_path / "tokenizer.json"))
        encode = lambda text: tok.encode(text, add_special_tokens=False).ids
    mine = L.load_tokenizer(tmp_path)
    assert len(mine.encode("the cats")) < 8 and set(mine.special) == {"<unk>", "<s>", "</s>"}

    @calm
    @given(TEXT)
    def same(text):
        ids = mine.encode(text)
        assert ids == encode(text)
        if "\u2581" not in text and not (form == "metaspace" and text[:1] == " "):      # the format's own losses
            assert mine.decode(ids) == text
    same()


def test_tokenizers_that_are_not_handled_are_refused_by_name(tmp_path):
    good = json.loads(byte_level("gpt2").to_str())
    for change, word in ((dict(normalizer=dict(type="NFKC")), "NFKC"), (dict(pre_tokenizer=dict(type="Whitespace")), "Whitespace"),
                         (dict(model=dict(type="Unigram", vocab=[], merges=[])), "Unigram"), (dict(added_tokens=[dict(content="<x>", id=9, special=False)]), "<x>"),
                         (dict(pre_tokenizer=dict(good["pre_tokenizer"], add_prefix_space=True)), "add_prefix_space"),
                         (dict(pre_tokenizer=dict(good["pre_tokenizer"], use_regex=False)), "use_regex"), (dict(pre_tokenizer=None), "no steps")):
        (tmp_path / "tokenizer.json").write_text(json.dumps({**good, **change}))
        assert word in sentence(L.load_tokenizer, tmp_path)

# ---- NF4 against bitsandbytes ----------------------------------------------------------------------------------------------

def bnb():
    return pytest.importorskip("bitsandbytes").functional


def blockwise(w):
    """bitsandbytes' absmax and packed codes of w, by its C++ code."""
    packed, state = bnb().quantize_4bit(w, quant_type="nf4", blocksize=64)
    return packed.view(-1), state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (96, 320), (3, 64 * 7), (1000, 64)])
def test_nf4_codes(dtype, shape):
    torch.manual_seed(0)
    w = (torch.randn(shape) * 0.02).to(dtype)
    packed, state = blockwise(w)
    q = L.quantize_nf4(w, double=False)
    assert torch.equal(q.packed, packed) and torch.equal(q.absmax, state.absmax)
    for out in (torch.float32, dtype):
        state.dtype = out
        assert torch.equal(L.dequantize_nf4(q, out), bnb().dequantize_4bit(packed.view(-1, 1), state))


def test_nf4_midpoints_and_their_neighbours():
    """Every threshold, the floats on both sides of it and both zeros; a tie goes to the lower code."""
    x = torch.cat([L.MIDPOINTS, torch.nextafter(L.MIDPOINTS, torch.tensor(9.)), torch.nextafter(L.MIDPOINTS, torch.tensor(-9.)), L.NF4_CODE,
                   torch.tensor([0.0, -0.0, 1e-40])])
    x = F.pad(x, (0, 63 * 2 - len(x)))
    w = torch.cat([torch.tensor([1.0]), x[:63], torch.tensor([-1.0]), x[63:]])
    q = L.quantize_nf4(w, double=False)
    code = torch.stack([q.packed >> 4, q.packed & 15], 1).view(-1)
    assert torch.equal(code[1:16].long(), torch.arange(15)) and torch.equal(code[16:31].long(), torch.arange(1, 16))
    assert torch.equal(code.long(), torch.bucketize(w, L.MIDPOINTS)) and torch.equal(q.packed, blockwise(w)[0])


def test_nf4_zero_block_and_tail():
    w = torch.cat([torch.zeros(64), torch.randn(70)])
    q = L.quantize_nf4(w, double=True)
    back = L.dequantize_nf4(q, torch.float32)
    assert back.shape == w.shape and len(q.packed) == 67 and (back - w)[64:].abs().max() < 0.5
    assert torch.equal(L.dequantize_nf4(L.quantize_nf4(w, False), torch.float32)[:64], torch.zeros(64))


def test_double_quantization():
    torch.manual_seed(1)
    assert torch.equal(L.DYNAMIC, bnb().create_dynamic_map())
    for shape in ((64, 64), (512, 320), (1024, 1024)):
        w = torch.randn(shape) * torch.rand(shape[0], 1)
        q = L.quantize_nf4(w)
        packed, state = bnb().quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        assert torch.equal(q.packed, packed.view(-1)) and torch.equal(q.nested[1], state.state2.absmax) and q.nested[2] == state.offset.item()
        # its C++ for 8 bits rounds within 1e-5 of a midpoint either way; its torch code, taken for doubles, is the nearest value, as ours
        assert (q.absmax.int() - state.absmax.int()).abs().max() <= 1 and (q.absmax != state.absmax).float().mean() < 0.01
        maxima = L.quantize_nf4(w, double=False).absmax
        exact = torch.ops.bitsandbytes.quantize_blockwise.default((maxima - state.offset).double(), L.DYNAMIC, 256)[0]
        assert torch.equal(q.absmax, exact.view(-1))
        state.absmax = q.absmax
        assert torch.allclose(L.dequantize_nf4(q, torch.float32), bnb().dequantize_4bit(packed, state), atol=1e-7)
    assert 8 * q.nbytes() / w.numel() < 4.14         # 4 + 8/64 + 32/(64 * 256), and the table


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_checkpoint_loads(theirs, tmp_path, nested):
    """A folder as transformers writes it for a model held in NF4."""
    from safetensors.torch import save_file
    reference, folder = theirs["tinyllama"]
    state, dense = {}, {}
    for name, w in reference.state_dict().items():
        if "proj" in name:
            packed, s = bnb().quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
            state[name] = packed
            state |= {f"{name}.{k}": v for k, v in s.as_dict(packed=True).items()}
            dense[name] = bnb().dequantize_4bit(packed, s)
        else:
            state[name] = dense[name] = w.contiguous()
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.arange(40)[None]
    model = ours(tmp_path)
    with torch.no_grad():
        copy = transformers.LlamaForCausalLM(reference.config).eval()
        copy.load_state_dict(dense)
        assert (copy(ids).logits - model.logits(model(ids))).abs().max() < 1e-3
        assert (reference(ids).logits - model.logits(model(ids))).abs().max() > 1e-2
    # the same, made here from the 16-bit weights, is the same model
    again = ours(folder, four_bit=True, double=nested)
    with torch.no_grad():
        assert torch.allclose(again(ids), model(ids), atol=1e-2 if nested else 1e-5)       # see test_double_quantization


def test_triton_kernels():
    """In a process of its own: TRITON_INTERPRET is read when triton is imported. Kernels and the torch code must agree."""
    pytest.importorskip("triton")
    code = """
import torch, lora_llama as L
assert L.triton
torch.manual_seed(0)
for shape in ((5, 64), (13, 128), (6, 1408), (4, 96)):
    w = torch.randn(shape)
    for double in (False, True):
        q, L.INTERPRETED = L.quantize_nf4(w, double), False
        want = L.dequantize_nf4(q, torch.float32)
        L.INTERPRETED = True
        assert torch.allclose(L.dequantize_nf4(q, torch.float32), want, atol=1e-6), shape
        # the interpreter rounds to bfloat16 by cutting, hence a unit in the last place
        assert torch.allclose(L.dequantize_nf4(q, torch.bfloat16).float(), want, rtol=2**-7)
        layer, x = L.Linear(shape[1], shape[0]), torch.randn(1, 1, shape[1]).bfloat16()
        layer.q, calls, kept = q, [], L.dequantize_nf4
        L.dequantize_nf4 = lambda *a: calls.append(a) or kept(*a)
        with torch.no_grad():
            y, exact = layer(x).float(), x.float() @ want.T
            assert bool(calls) == (shape[1] % 64 > 0), "the mat-vec kernel was at work where rows are whole blocks"
            assert torch.allclose(y, exact, rtol=2**-6, atol=0.02 * exact.std()), shape
            assert not torch.allclose(y, x.float() @ w.T, rtol=2**-6, atol=0.02 * exact.std()), "on the codes, not on the weights"
            assert torch.allclose(layer(x.float()), exact, atol=1e-4), shape        # what the mat-vec kernel does not know goes the other way
        L.dequantize_nf4 = kept
for block in (32, 128, 4096):                   # as others may have stored it
    q = L.NF4(torch.randint(0, 256, (3 * 4096 // 2,), dtype=torch.uint8), torch.rand(3 * 4096 // block), (3, 4096), block, None)
    L.INTERPRETED = False
    want = L.dequantize_nf4(q, torch.float32)
    L.INTERPRETED = True
    assert torch.allclose(L.dequantize_nf4(q, torch.float32), want, atol=1e-6), block
    layer, x = L.Linear(4096, 3), torch.randn(1, 4096).bfloat16()
    layer.q = q
    with torch.no_grad():
        assert torch.allclose(layer(x).float(), x.float() @ want.T, rtol=2**-6, atol=0.5), block
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

# ---- LoRA against peft -----------------------------------------------------------------------------------------------------

def randomize(model):
    torch.manual_seed(5)
    for p in L.lora_parameters(model).values():
        p.data.normal_(std=0.1)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_both_ways(theirs, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    reference, folder = theirs["tinyllama"]
    ids = torch.arange(50)[None]
    model, args = ours(folder), args_of("--lora_r", 4, "--lora_alpha", 6, "--targets", "q_proj", "v_proj", "down_proj", *["--rslora"] * rslora)
    with torch.no_grad():
        base = model.logits(model(ids))
        L.add_lora(model, args)
        assert torch.equal(model.logits(model(ids)), base), "B = 0 is the identity"
        randomize(model)
        L.save_adapter(model, tmp_path / "ours", args, folder)
        copy = transformers.LlamaForCausalLM.from_pretrained(folder)
        opened = peft.PeftModel.from_pretrained(copy, tmp_path / "ours").eval()
        got = model.logits(model(ids))
        assert (got - base).abs().max() > 0.1 and (opened(ids).logits - got).abs().max() < 1e-4
        opened.save_pretrained(tmp_path / "theirs")
        again = ours(folder)
        L.load_adapter(again, tmp_path / "theirs", args)
        assert torch.allclose(again.logits(again(ids)), got, atol=1e-6)
    assert sum(p.numel() for p in L.lora_parameters(again).values()) == sum(p.numel() for n, p in opened.named_parameters() if "lora_" in n)


def test_adapter_gradients_are_pefts(theirs, tmp_path):
    """The same loss moves both by the same gradients, NF4 or not, checkpointed or not."""
    peft = pytest.importorskip("peft")
    reference, folder = theirs["llama2"]
    model, args = ours(folder), args_of("--lora_r", 4, "--lora_dropout", 0)
    L.add_lora(model, args)
    randomize(model)
    L.save_adapter(model, tmp_path, args, folder)
    copy = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), tmp_path, is_trainable=True)
    ids = list(range(3, 40))
    loss, n = L.loss_of(model.train(), [[(ids, 10)]])
    (loss / n).backward()
    labels = torch.tensor([[-100] * 10 + ids[10:]])
    copy(torch.tensor([ids]), labels=labels).loss.backward()
    theirs_grad = {re.sub(r"^base_model\.model\.|\.default|\.weight$", "", k): p.grad for k, p in copy.named_parameters() if p.grad is not None}
    first = {k: p.grad.clone() for k, p in L.lora_parameters(model).items()}
    assert set(first) == set(theirs_grad) and all(torch.allclose(first[k], theirs_grad[k], atol=1e-5, rtol=1e-4) for k in first)
    model.zero_grad()
    model.grad_checkpoint = True
    L.loss_of(model, [[(ids, 10)]])[0].backward()
    assert all(torch.allclose(p.grad / n, first[k], atol=1e-6, rtol=1e-4) for k, p in L.lora_parameters(model).items())


def test_nf4_layers_pass_the_gradient_on():
    layer = L.Linear(64, 32)
    layer.weight.data.normal_()
    x = torch.randn(5, 64, requires_grad=True)
    layer.q = L.quantize_nf4(layer.weight)
    dense = L.dequantize_nf4(layer.q, torch.float32)
    (layer(x) ** 2).sum().backward()
    y = x.detach().requires_grad_()
    (F.linear(y, dense) ** 2).sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-5)


@pytest.mark.parametrize("into", ["16", "4bit"])
def test_merged_is_unmerged(theirs, tmp_path, into):
    reference, folder = theirs["llama32" if into == "16" else "llama31"]
    model = ours(folder, four_bit=into == "4bit")
    L.add_lora(model, args_of("--lora_r", 4))
    randomize(model)
    L.save_merged(model, folder, tmp_path / "m", into)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        want = model.logits(model(ids))
        merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "m").eval()
        assert (merged(ids).logits - want).abs().max() < 2e-3
        assert (ours(tmp_path / "m")(ids) - model(ids)).abs().max() < 1e-3
        assert (reference(ids).logits - want).abs().max() > 0.1
        if into == "4bit":                      # merged into the other weights, it is another model: NF4's error goes out
            L.save_merged(model, folder, tmp_path / "m16", "16")
            assert (ours(tmp_path / "m16")(ids) - model(ids)).abs().max() > 0.01


def test_a_merge_into_weights_that_are_not_there_is_refused(theirs, tmp_path, capsys):
    model = ours(theirs["llama2"][1])
    L.add_lora(model, args_of("--lora_r", 4))
    with pytest.raises(SystemExit):
        L.save_merged(model, theirs["llama2"][1], tmp_path / "m", "4bit")
    assert "was not loaded in 4 bits" in capsys.readouterr().err and not (tmp_path / "m").exists()
    source, before = theirs["llama2"][1], (theirs["llama2"][1] / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        L.save_merged(model, source, source.parent / "." / source.name, "16")
    assert "choose another --out" in capsys.readouterr().err and (source / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("double", [True, False])
def test_the_error_it_reports_is_the_error_it_makes(theirs, capsys, double):
    """The matrices of this model are small: the first million weights of each are all of them."""
    folder = theirs["llama2"][1]
    model, found = L.load_model(folder, "float32", four_bit=True, double=double), L.find_tensors(folder)
    errors = torch.cat([(L.dequantize_nf4(m.q, torch.float32) - found[f"{n}.weight"].tensor()).abs().flatten() for n, m in L.linears(model).items()])
    said = re.search(r"at most ([\d.e-]+), ([\d.e-]+) on average", capsys.readouterr().out)
    assert float(said[1]) == pytest.approx(errors.max().item(), rel=1e-3) and float(said[2]) == pytest.approx(errors.mean().item(), rel=1e-3)


def test_auto_is_the_dtype_of_the_files_if_the_config_names_none(theirs, tmp_path):
    folder = shutil.copytree(theirs["llama2"][1], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None), config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    stored = L.find_tensors(folder)["model.norm.weight"].dtype
    assert stored == torch.float32 == L.load_model(folder).model.norm.weight.dtype


def test_adapters_that_are_not_handled_are_refused_by_name(theirs, tmp_path):
    model = ours(theirs["llama2"][1])
    L.add_lora(model, args_of("--lora_r", 4))
    L.save_adapter(model, tmp_path, args_of("--lora_r", 4), "x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change, word in ((dict(use_dora=True), "use_dora"), (dict(modules_to_save=["lm_head"]), "modules_to_save"), (dict(peft_type="IA3"), "IA3"),
                         (dict(bias="all"), "bias"), (dict(rank_pattern={"q_proj": 8}), "rank_pattern"), (dict(init_lora_weights="pissa"), "pissa"),
                         (dict(use_frobnication=True), "use_frobnication"), (dict(r=8), "rank-8")):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
        assert word in sentence(L.load_adapter, model, tmp_path, args_of())

# ---- packing ---------------------------------------------------------------------------------------------------------------

@calm
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=30), st.integers(8, 30))
def test_packing_keeps_every_example_whole(sizes, T):
    examples = [([100 * i + k for k in range(n + m + 1)], n) for i, (n, m) in enumerate(sizes)]
    packed = L.pack(examples, T, np.random.default_rng(0))
    assert all(sum(len(ids) for ids, _ in seq) <= T for seq in packed)
    assert sorted(e[0][0] for seq in packed for e in seq) == sorted(e[0][0] for e in examples if e[1] < T)
    if packed:
        ids, labels, pos, doc = L.collate(packed, "cpu")
        for row, seq in zip(zip(ids, labels, pos, doc), packed):
            at = 0
            for d, (tokens, n) in enumerate(seq):
                part = slice(at, at + len(tokens))
                assert row[0][part].tolist() == tokens and row[2][part].tolist() == list(range(len(tokens))) and set(row[3][part].tolist()) == {d}
                # labels: the answer and its eos, foretold from the token before each; nothing of the prompt
                assert row[1][part].tolist() == [-1] * (n - 1) + tokens[n:] + [-1]
                at += len(tokens)


@pytest.mark.parametrize("fused", [False, True])
def test_packed_examples_do_not_see_each_other(theirs, fused):
    model = ours(theirs["llama31"][1], fused=fused)
    a, b, c = (list(range(3, 20)), 4), (list(range(30, 50)), 6), (list(range(60, 70)), 2)
    ids, labels, pos, doc = L.collate([[a, b, c]], "cpu")
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    model.model.embed_tokens.forward, kept = (lambda _: x), model.model.embed_tokens.forward
    out = model(ids, pos, L.only_own_example(doc))
    model.model.embed_tokens.forward = kept
    with torch.no_grad():                       # no logit: packed, an example gets the very hidden states it gets alone
        alone = torch.cat([model(torch.tensor([e[0]])) for e in (a, b, c)], 1)
        assert torch.allclose(out, alone, atol=1e-5)
    out[0, 17:37].square().sum().backward()     # no gradient: what b says moves b alone
    assert x.grad[0, :17].abs().max() == 0 and x.grad[0, 37:].abs().max() == 0 and x.grad[0, 17:37].abs().max() > 0
    leaky = model(ids, pos)
    assert not torch.allclose(leaky, alone, atol=1e-2), "without the mask they do"


def test_loss_is_a_mean_over_answer_tokens_however_it_is_cut(theirs):
    model = ours(theirs["llama2"][1])
    seqs = [[(list(range(3, 20)), 4)], [(list(range(30, 50)), 15)], [(list(range(60, 70)), 2)]]
    with torch.no_grad():
        whole, n = L.loss_of(model, seqs)
        parts = [L.loss_of(model, [s]) for s in seqs]
    assert n == sum(k for _, k in parts) == 13 + 5 + 8 and torch.allclose(whole, sum(l for l, _ in parts), rtol=1e-5)


def test_training_is_the_same_however_a_batch_is_cut(theirs, tmp_path):
    seqs, losses, weights = [[(list(range(3, 3 + n)), 2)] for n in (40, 5, 9, 4)], [], []
    for micro in (1, 4):
        model, args = ours(theirs["llama2"][1]), args_of("--lora_r", 4, "--lora_dropout", 0, "--micro_batch", micro)
        L.add_lora(model, args)
        losses.append(L.train(model, seqs, 3, 1e-3, 4, tmp_path / f"{micro}.pt", args, "test"))
        weights.append(torch.cat([p.detach().flatten() for p in L.lora_parameters(model).values()]))
    assert abs(losses[0] - losses[1]) < 1e-4 and (weights[0] - weights[1]).abs().max() < 1e-4

# ---- training: the whole script --------------------------------------------------------------------------------------------

ENV = dict(os.environ, OMP_NUM_THREADS="1", HTTP_PROXY="http://127.0.0.1:9", HTTPS_PROXY="http://127.0.0.1:9", ALL_PROXY="http://127.0.0.1:9")


def script(folder, *flags, launcher=(), **kw):
    return subprocess.run([sys.executable, *launcher, str(folder / "lora_llama.py"), *map(str, flags)], cwd=folder, env=ENV, capture_output=True, text=True, timeout=120, **kw)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script, common.py and its data in an otherwise empty folder, run once with --smoke."""
    folder = tmp_path_factory.mktemp("alone")
    for name in ("lora_llama.py", "common.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "data/texts", folder / "data/texts")
    for name in ("qa.jsonl", "bytes_tokenizer.json"):
        shutil.copy(ROOT / "data" / name, folder / "data")
    tic = time.time()
    done = script(folder, "--smoke", "--merge", "4bit")
    return folder, done, time.time() - tic


def test_smoke_alone_and_offline(alone):
    folder, done, seconds = alone
    assert done.returncode == 0, done.stderr[-2000:]
    assert seconds < 60 and "result lora_llama" in done.stdout and "before" in done.stdout and "bits per linear weight" in done.stdout
    row = json.loads((folder / "out/results.jsonl").read_text())
    assert row["metrics"]["loss_after"] < row["metrics"]["loss_before"]
    assert not (folder / "out/lora/train.pt").exists() and not list(folder.glob("out/*/train.pt"))
    # the pretrained folder and the merged one are anyone's: transformers and tokenizers open them
    made = next(folder.glob("out/demo-*"))
    ids = transformers.AutoTokenizer.from_pretrained(made)("What is 2 + 2?")["input_ids"]
    assert ids == [256, *L.load_tokenizer(made).encode("What is 2 + 2?")]
    reference, model = transformers.LlamaForCausalLM.from_pretrained(made).eval(), ours(made)
    with torch.no_grad():
        assert (reference(torch.tensor([ids])).logits - model.logits(model(torch.tensor([ids])))).abs().max() < 1e-4
    transformers.LlamaForCausalLM.from_pretrained(folder / "out/lora/merged-4bit")


def test_eos_is_learned(alone, tmp_path):
    """Tuned on a few lines only, the completions are these lines and stop by themselves; before, they ran on."""
    model = ours(next(alone[0].glob("out/demo-*")))
    tok = L.load_tokenizer(next(alone[0].glob("out/demo-*")))
    rows = [dict(prompt=p, answer=a) for p, a in (("a?", "yes"), ("is b?", "no, never"), ("c?", "maybe so"), ("d?", "ask again"))]
    args = args_of("--out", tmp_path, "--lora_dropout", 0, "--save_every", 1000)
    tok.bos, tok.sep, tok.eos = [256], [258], [257]
    L.add_lora(model, args)
    model.requires_grad_(True)                  # so small a model has little that LoRA alone could bend
    args.max_new = 20
    assert not all(r["stopped"] for r in L.complete(model, rows, tok, args))
    packed = L.pack(L.tokenize(rows, tok), 20, np.random.default_rng(0))
    L.train(model, packed, 150, 3e-3, 4, tmp_path / "train.pt", args, "test")
    args.micro_batch = 3                          # in batches of unequal prompts
    done = L.complete(model, rows * 2, tok, args)
    assert [r["completion"] for r in done] == [r["answer"] for r in rows * 2] and all(r["stopped"] for r in done)


SHORT = ["--smoke", "--epochs", 1, "--save_every", 2, "--micro_batch", 2, "--held_out", 0]


def adapter_bytes(folder, out):
    return (folder / out / "adapter_model.safetensors").read_bytes()


def test_kill_and_resume(alone):
    """kill -9 in mid-training, twice; the weights are the very bytes of a run that nobody stopped."""
    folder = alone[0]
    assert script(folder, *SHORT, "--out", "straight").returncode == 0
    p, kills = None, 0
    for at in (2, 6):
        p = subprocess.Popen([sys.executable, "lora_llama.py", *map(str, SHORT), "--out", "killed"], cwd=folder, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen, limit = None, time.time() + 60
        while p.poll() is None and time.time() < limit:
            with contextlib.suppress(Exception):
                seen = torch.load(folder / "killed/train.pt", weights_only=True)["step"]
            if seen is not None and seen >= at:
                p.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        p.wait()
    assert kills and (folder / "killed/train.pt").exists()
    wrong = script(folder, *SHORT, "--out", "killed", "--lr", 1)
    assert wrong.returncode == 2 and "other flags" in wrong.stderr
    done = script(folder, *SHORT, "--out", "killed")
    assert done.returncode == 0 and "goes on from step" in done.stdout
    assert adapter_bytes(folder, "killed") == adapter_bytes(folder, "straight")


def test_torchrun_gives_the_same_losses(alone):
    folder = alone[0]
    flags = ["--smoke", "--lora_dropout", 0, "--epochs", 0.5, "--micro_batch", 1]
    assert script(folder, *flags, "--out", "one").returncode == 0
    done = script(folder, *flags, "--out", "two", launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"))
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(l)["metrics"] for l in (folder / "out/results.jsonl").read_text().splitlines()][-2:]
    assert all(abs(losses[0][k] - losses[1][k]) < 1e-4 for k in ("train_loss", "loss_after"))
    from safetensors.torch import load_file
    one, two = (load_file(folder / o / "adapter_model.safetensors") for o in ("one", "two"))
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


@pytest.mark.parametrize("flags,word", [(["--frobnicate", "1"], "frobnicate"), (["--epochs", "many"], "epochs"), (["--model", "no/such folder"], "no such folder"),
                                        (["--model", "meta-llama/none"], "of the files of meta-llama/none"), (["--data", "missing.jsonl", "--smoke"], "missing.jsonl"),
                                        (["--adapter", "out", "--smoke"], "adapter_config"), (["--lora_dropout", "1.5"], "--lora_dropout"), (["--lora_r", "0"], "not between"),
                                        (["--length_penalty", "inf"], "--length_penalty"), (["--seed", "-1"], "--seed"), (["--top_p", "0"], "--top_p"), (["--epochs", "nan"], "--epochs"),
                                        (["--block_size", "3", "--smoke"], "--block_size")])
def test_mistakes_get_a_sentence(alone, flags, word, monkeypatch):
    monkeypatch.chdir(alone[0])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "argv", ["lora_llama.py", *flags])
    assert word in sentence(common.run, L.main)


def test_every_flag_is_used_and_explained():
    text = (ROOT / "lora_llama.py").read_text()
    for name in vars(args_of()):
        assert re.search(rf"args\.{name}\b|\"{name}\"", text.replace(f'p.flag("{name}"', "")), f"--{name} is not used"

# ---- the Hub, without the Hub ----------------------------------------------------------------------------------------------

class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the Hub: a listing and files with ranges; the first big answer is cut in the middle."""
    folder, cut, seen = None, True, []

    def do_GET(self):
        Hub.seen.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        if self.path.startswith("/api/"):
            body = json.dumps([dict(type="file", path=p.name, size=p.stat().st_size) for p in self.folder.iterdir()]).encode()
        else:
            body = (self.folder / self.path.rpartition("/")[2]).read_bytes()
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if self.path.endswith(".safetensors") and Hub.cut:
            Hub.cut = False
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.connection.shutdown(2)
            return
        self.wfile.write(body[start:])

    def log_message(self, *a):
        pass


def test_download_resumes(theirs, tmp_path, monkeypatch, capsys):
    Hub.folder, Hub.cut, Hub.seen = shutil.copytree(theirs["llama2"][1], tmp_path / "far"), True, []
    (Hub.folder / "model.safetensors").write_bytes(os.urandom(5 << 20))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret\r\n")
    try:
        files = r"model\.safetensors|config\.json"
        said = sentence(common.fetch_hub, "someone/model", [files])
        assert "goes on" in said and "hf_secret" not in said
        folder = common.fetch_hub("someone/model", [files])
        assert any(r and int(r[6:-1]) > 0 for _, r, _ in Hub.seen) and all(a == "Bearer hf_secret" for _, _, a in Hub.seen)
        assert (folder / "model.safetensors").read_bytes() == (Hub.folder / "model.safetensors").read_bytes()
        n = len(Hub.seen)
        assert common.fetch_hub("someone/model", [files]) == folder and len(Hub.seen) == n, "what is whole is not asked for again"
        assert "hf_secret" not in "".join(capsys.readouterr())
    finally:
        server.shutdown()

# ---- broken files ----------------------------------------------------------------------------------------------------------

WHOLE = "LLAMA_FAULTS" in os.environ            # LLAMA_FAULTS=1 python -m pytest ... -k broken: everywhere, a minute


def broken(data, n_prefixes, n_flips, rng):
    """Prefixes and single-byte flips of data, by a fixed seed; WHOLE: every prefix and 1,000 flips."""
    cuts = range(len(data)) if WHOLE or len(data) <= n_prefixes else sorted(rng.sample(range(len(data)), n_prefixes))
    yield from ((f"cut at {n}", data[:n]) for n in cuts)
    for _ in range(1000 if WHOLE else n_flips):
        i = rng.randrange(len(data))
        yield f"flip at {i}", data[:i] + bytes([data[i] ^ rng.randrange(1, 256)]) + data[i + 1:]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 5k parameters with tokenizer and adapter: small enough to break everywhere."""
    folder = tmp_path_factory.mktemp("small")
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                                         "num_key_value_heads": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(ROOT / "data/bytes_tokenizer.json", folder / "tokenizer.json")
    args = args_of("--lora_r", 2)
    model = ours(folder)
    L.add_lora(model, args)
    L.save_adapter(model, folder / "adapter", args, folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(dict(prompt=f"q{i}", answer="\u00e9\u6f22")) + "\n" for i in range(4)))
    return folder


@functools.cache
def whole_model(folder):
    return ours(folder, four_bit=True)


def use(folder, name):
    """Load what the file belongs to and use it: what loads must verify."""
    if name == "rows.jsonl":
        return L.read_jsonl(folder / name, ("prompt", "answer"))
    if name == "tokenizer.json":
        tok = L.load_tokenizer(folder)
        return tok.decode(tok.encode("the 1 \u6f22"))
    model, ids = whole_model(folder) if name.startswith("adapter") else ours(folder, four_bit=True), torch.arange(9)[None]
    if name.startswith("adapter"):
        for m in L.linears(model).values():
            m.lora_A = m.lora_B = None
        L.load_adapter(model, folder / "adapter", args_of())
    with torch.no_grad():
        assert model.logits(model(ids)).shape == (1, 9, 300)


@pytest.mark.parametrize("name,prefixes,flips", [("model.safetensors", 100, 60), ("config.json", 1000, 80), ("tokenizer.json", 300, 200), ("rows.jsonl", 500, 1000),
                                                 ("adapter/adapter_model.safetensors", 100, 60), ("adapter/adapter_config.json", 500, 80)])
def test_broken_files(small, tmp_path, name, prefixes, flips):
    shutil.copytree(small, tmp_path / "m")
    path, rng, said = tmp_path / "m" / name, random.Random(name), 0
    data = path.read_bytes()
    use(tmp_path / "m", name)
    for what, bad in broken(data, prefixes, flips, rng):
        path.write_bytes(bad)
        words = sentence(use, tmp_path / "m", name)
        said += words is not None
        if what.startswith("cut") and name != "rows.jsonl" and bad.strip() != data.strip():      # a last newline may go
            assert words is not None, what
    assert said > prefixes // 2 or said > len(data) // 2


@pytest.mark.parametrize("which", ["sentencepiece", "tiktoken"])
def test_broken_tokenizer_model(which, sentencepiece_file, tmp_path):
    if which == "sentencepiece":
        data = (sentencepiece_file / "tokenizer.model").read_bytes()
    else:
        data = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)) + base64.b64encode(b"the") + b" 256\n"
    for what, bad in broken(data, 40, 60, random.Random(1)):
        (tmp_path / "tokenizer.model").write_bytes(bad)
        sentence(lambda: L.load_tokenizer(tmp_path).encode("the cat \u6f22"))


def test_shards(theirs, tmp_path):
    """A model in several files with an index is the same model; a missing shard or a path that leads away has its sentence."""
    reference, folder = theirs["llama31"]
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    assert torch.equal(ours(tmp_path)(torch.arange(9)[None]), ours(folder)(torch.arange(9)[None]))
    bad = json.loads(index.read_text())
    bad["weight_map"]["model.norm.weight"] = "../evil.safetensors"
    good = index.read_text()
    index.write_text(json.dumps(bad))
    assert f"{tmp_path}/evil.safetensors" in sentence(ours, tmp_path)
    index.write_text(good)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    assert "No such file" in sentence(ours, tmp_path)


def test_huge_claims_allocate_nothing(small, tmp_path):
    """Sizes that a broken config or header claims are checked against the file before anything is made of them."""
    shutil.copytree(small, tmp_path / "m")
    config = json.loads((small / "config.json").read_text())
    for claim in (dict(vocab_size=2**30), dict(hidden_size=2**20), dict(num_hidden_layers=2**30), dict(intermediate_size=2**31 - 1)):
        (tmp_path / "m/config.json").write_text(json.dumps({**config, **claim}))
        tic = time.time()
        assert sentence(ours, tmp_path / "m") and time.time() - tic < 2
    (tmp_path / "m/model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert "model.safetensors cannot be read" in sentence(ours, tmp_path / "m")


def test_a_tokenizer_of_another_model_is_refused(small, tmp_path, monkeypatch):
    """A tiktoken file cut at the end of a line is a tiktoken file; but config.json's BOS and EOS are not in it any more."""
    shutil.copytree(small, tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    config = json.loads((small / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(dict(config, bos_token_id=44, eos_token_id=45)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora_llama.py", "--model", str(tmp_path / "m"), "--epochs", "0"])
    for n, words in ((44, None), (40, "its tokenizer")):
        (tmp_path / "m/tokenizer.model").write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(n)))
        said = sentence(L.main)
        assert said is None if words is None else words in said
