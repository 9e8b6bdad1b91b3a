"""Completions per second of ppo_char.py's reinforcement learning against TRL's on the CPU: python tests/bench/bench_ppo.py

The same on both sides: a GPT-2 of 2 layers, width 64 and 256 tokens with random weights, 16 prompts x 8 completions of up to 24 tokens
per round, one batch, 2 gradient steps per round, a KL term, the same reward (a program), the same machine and threads. Counted: the CPU
seconds of a whole round (sampling, reward, reference, updates), in turns, three times; the first round of each turn is left out. TRL's trainers want text:
its prompts are the same ids, written as words of a word-level tokenizer. Wants trl==1.16.0 and datasets (TRL has no PPO any more since
1.0: its GRPO and RLOO are measured; ours has PPO too, which is shown beside them).
"""
import contextlib, copy, io, os, pathlib, platform, sys, tempfile, time, warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import ppo_char as pc

ROUNDS, TURNS = 8, 3


def ours(algo, args, corpus):
    """-> CPU seconds of each round"""
    torch.manual_seed(0)
    policy = pc.Transformer(len(corpus.tok.tokens), 32, args)
    start, rule, times = copy.deepcopy(policy).requires_grad_(False), pc.Rule(args, corpus.tok), []

    def reward(ids, left, mask):
        times.append(time.process_time())
        return rule(ids, left, mask)
    pc.SAVE_EVERY, pc.evaluate, args.iterations = 10**9, lambda *job: ({"beam": 0.0}, None), ROUNDS + 2     # TRL is not evaluated either
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        pc.improve(algo, algo, policy, start, reward, corpus.train, args, pathlib.Path(folder) / "x.pt")
    return np.diff(times[1:ROUNDS + 2])             # from reward to reward


def theirs(algo, args, corpus):
    """TRL's GRPOTrainer or RLOOTrainer -> CPU seconds of each round"""
    import trl, transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    transformers.logging.set_verbosity_error()
    V, R = len(corpus.tok.tokens), args.max_new
    tok = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token=f"t{pc.UNK}"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=f"t{pc.PAD}", eos_token=f"t{pc.EOS}", padding_side="left")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_positions=40, n_embd=args.n_embd, n_layer=args.n_layer, n_head=args.n_head,
                                         n_inner=2 * args.n_embd, activation_function="relu", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                         bos_token_id=pc.BOS, eos_token_id=pc.EOS, pad_token_id=pc.PAD, tie_word_embeddings=False))
    ids, left, _ = pc.draw_prompts(corpus.train, 400, 1, args, np.random.default_rng(0))
    data = Dataset.from_dict(dict(prompt=[" ".join(f"t{i}" for i in row[n:]) for row, n in zip(ids.tolist(), left.tolist())]))
    rule, times = pc.Rule(args, corpus.tok), []

    def reward(completion_ids, **kw):
        times.append(time.process_time())
        rows = pc.pad([list(c)[:R] for c in completion_ids], R, "right")
        mask = pc.completion_mask(rows)
        return pc.final(rule(rows, None, mask), mask).tolist()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        config, trainer = dict(grpo=(trl.GRPOConfig, trl.GRPOTrainer), rloo=(trl.RLOOConfig, trl.RLOOTrainer))[algo]
        config = config(output_dir=folder, use_cpu=True, bf16=False, per_device_train_batch_size=args.prompts * args.group, num_generations=args.group,
                        max_completion_length=R, num_iterations=args.epochs, steps_per_generation=1, max_steps=args.epochs * (ROUNDS + 2), beta=args.kl,
                        learning_rate=args.rl_lr, temperature=1.0, logging_steps=10**6, save_strategy="no", report_to=[], disable_tqdm=True,
                        gradient_checkpointing=False, dataloader_pin_memory=False)
        model.save_pretrained(folder + "/start")                    # TRL reads its frozen reference from where the model came from
        model = transformers.GPT2LMHeadModel.from_pretrained(folder + "/start")
        trainer(model=model, reward_funcs=reward, args=config, train_dataset=data, processing_class=tok).train()
    return np.diff(times[1:ROUNDS + 2])


def main():
    warnings.filterwarnings("ignore")
    args = pc.get_args([])
    corpus, B = pc.Corpus(args), args.prompts * args.group
    import trl
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, trl {trl.__version__}")
    speeds = {}
    for _ in range(TURNS):
        for who, job, algo in (("ppo_char ppo", ours, "ppo"), ("ppo_char grpo", ours, "grpo"), ("TRL grpo", theirs, "grpo"), ("ppo_char rloo", ours, "rloo"),
                               ("TRL rloo", theirs, "rloo")):
            speeds.setdefault(who, []).append(B / np.median(job(algo, copy.copy(args), corpus)))
            print(f"  {who:14s} {speeds[who][-1]:8.1f} completions per CPU second", flush=True)
    for algo in ("grpo", "rloo"):
        r = np.array(speeds[f"ppo_char {algo}"]) / np.array(speeds[f"TRL {algo}"])
        print(f"{algo}: ours {np.median(speeds[f'ppo_char {algo}']):.0f}/s, TRL {np.median(speeds[f'TRL {algo}']):.0f}/s: {np.median(r):.2f}x ({r.min():.2f}-{r.max():.2f}); asked >= 5x")


if __name__ == "__main__":
    main()
