"""ppo_char.py's grid and the claims of the system that it follows, as measured rows: python tests/bench/grid_ppo.py [--part grid|claims|kl|readable|rlhf] [--seeds N]

Each run is the default command with the flags that its row names; runs of a seed share one pretraining. A run that is done is read from
out/grid_ppo.jsonl, so a stopped series goes on where it was. Prints markdown tables.
grid:   {PPO, GRPO, RLOO, rejection sampling} x {pattern, white_more, white_less, letters} x seeds: the share of the attainable maximum
        that the last policy earns (mean of 256 samples), over seeds: mean, worst, seconds of reinforcement learning, KL, distinct samples
claims: learned, sinusoidal, rotary positions; 1, 2, 3 tokens at a time; shared and separate critic; reward scale; normalisation; ...
kl:     the KL weight, in the loss and in the reward, against reward, KL, distinct samples and surprise (nats per token under the start: how odd the text is to it)
rlhf:   Llama 2's recipe, version by version: the reward model's score, the judge's, KL and distinct samples, mean and range over seeds
readable: high reward in text that the start finds ordinary. A policy does not see where the prompt ends, so --reward length, which counts from there,
        can be had in full only by text that is marked as the policy's own, that is odd; with --prompt_len 1 all prompts end at the same place
"""
import argparse, contextlib, io, json, pathlib, re, sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import numpy as np

import ppo_char as pc

DONE = pathlib.Path("out/grid_ppo.jsonl")
CLAIMS = {"default (PPO, pattern)": "", "positions sinusoidal": "--pos sinusoidal", "positions rotary": "--pos rotary", "2 tokens at a time": "--n_predict 2",
          "3 tokens at a time": "--n_predict 3", "critic of its own": "--value separate", "reward x 10": "--reward_scale 10",
          "reward x 100": "--reward_scale 100", "advantages whitened": "--normalize advantages",
          "advantages whitened, KL 0.02": "--normalize advantages --kl 0.02", "rewards normalised over the array": "--normalize rewards",
          "KL 0.002 to the end": "--kl_end 0.002", "no KL": "--kl 0", "reward per step": "--per_step",
          "temperature 1.5 to 1": "--temperature 1.5", "epsilon 0.2 to 0": "--epsilon 0.2", "clip 0.05": "--clip 0.05", "clip 0.5": "--clip 0.5",
          "lambda 1, gamma 0.99": "--lam 1 --gamma 0.99", "Dr. GRPO": "--algo dr_grpo"}

RLHF = ["", *(f"{flags} --kl_end {flags.split()[-1]}" for flags in ("--kl 0.01", "--pairs 1024 --lam 0.95 --kl 0.05",
                                                                    *(f"--pairs 1024 --kl {kl}" for kl in ("0.2", "0.05", "0.01", "0.002")))),
        "--pairs 1024 --rl_lr 2e-3"]            # the default, and what the README tells of it (but for --pairs 16384, five minutes a seed)


def one(flags):
    """The metrics of one run of the command."""
    key = " ".join(flags.split())
    for line in DONE.read_text().splitlines() if DONE.exists() else ():
        row = json.loads(line)
        if row["flags"] == key:
            return row["metrics"]
    sys.argv = ["ppo_char.py", *key.split()]
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        pc.main()
    metrics = json.loads(pathlib.Path("out/results.jsonl").read_text().splitlines()[-1])["metrics"]
    # the last table it printed: a line of names, then a line for each version of the policy
    names, *rows = re.findall(r"^ *(reward .*|(?:start|SFT|V\d|[a-z_]+) +-?[\d.]+ .*)$", said.getvalue(), re.M)
    metrics["versions"] = {name: dict(zip(names.split(), map(float, x))) for name, *x in map(str.split, rows)}
    with open(DONE, "a") as f:
        f.write(json.dumps(dict(flags=key, metrics=metrics)) + "\n")
    return metrics


def table(rows, seeds, columns):
    """rows: {label: flags} -> a line for each over the seeds: the mean of each column; of the reward also the worst."""
    print("| run | reward, mean | worst | " + " | ".join(columns) + " |\n|" + "---|" * (3 + len(columns)))
    for label, flags in rows.items():
        m = [one(f"{flags} --seed {s}") for s in range(seeds)]
        reward = [x["reward"] for x in m]
        print(f"| {label} | {np.mean(reward):.3f} | {min(reward):.3f} | " + " | ".join(f"{np.mean([x.get(c, np.nan) for x in m]):.3g}" for c in columns) + " |", flush=True)


def blind(prompt_len):
    """The best mean of --reward length if a text ends after T tokens in all, whatever its prompt was: what marks nothing can reach no more."""
    args = pc.get_args(["--prompt_len", str(prompt_len)])
    R, left = args.max_new, pc.draw_prompts(pc.Corpus(args).train, 20000, 1, args, np.random.default_rng(0))[1].numpy()
    return max(np.clip(1 - abs(T - (prompt_len - left) - R // 2) / (R - R // 2), 0, 1).mean() for T in range(prompt_len + R))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="all", choices=["all", "grid", "claims", "kl", "readable", "rlhf"])
    p.add_argument("--seeds", type=int, default=5)
    args = p.parse_args()
    columns = ["beam", "kl", "distinct", "surprise", "rl_seconds"]
    if args.part in ("all", "grid"):
        runs = {f"{a}, {r}": f"--algo {a} --reward {r}" for r in ("pattern", "white_more", "white_less", "letters") for a in ("ppo", "grpo", "rloo", "rejection")}
        for seed in range(args.seeds):              # all of a seed first: a series that was stopped has whole seeds
            for flags in runs.values():
                one(f"{flags} --seed {seed}")
        table(runs, args.seeds, columns)
        got = [one(f"{flags} --seed {s}")["reward"] for flags in runs.values() for s in range(args.seeds)]
        print(f"\n{sum(g >= 0.9 for g in got)} of {len(got)} runs reach 0.9 of the attainable maximum; the worst has {min(got):.3f}\n")
    if args.part in ("all", "claims"):
        for seed in range(min(args.seeds, 3)):
            for flags in CLAIMS.values():
                one(f"{flags} --seed {seed}")
        table(CLAIMS, min(args.seeds, 3), ["pretrain_loss", *columns, "ratio_error"])
    for flags in RLHF if args.part in ("all", "rlhf") else []:
        runs, names = [one(f"--algo rlhf {flags} --seed {s}")["versions"] for s in range(min(args.seeds, 3))], ["reward", "judge", "kl", "distinct", "surprise"]
        print(f"\n--algo rlhf {flags}, {len(runs)} seeds: mean (least to most)\n| | " + " | ".join(names) + " |\n|" + "---|" * (1 + len(names)))
        for v in runs[0]:
            cells = [[r[v][c] for r in runs] for c in names]
            print(f"| {v} | " + " | ".join(f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in cells) + " |", flush=True)
    if args.part in ("all", "kl"):
        table({f"length, --kl_in {w} --kl {k}": f"--reward length --kl_in {w} --kl {k} --kl_end {k}" for w in ("loss", "reward") for k in ("0", "0.002", "0.01", "0.03", "0.1")},
              1, columns)
    if args.part in ("all", "readable"):
        for P in (8, 1):
            print(f"\nprompts of up to {P} tokens: without a mark at most {blind(P):.3f}")
            for label, corpus in (("", ""), ("quotes alone, ", f"--corpus {pc.DATA}/quotes.txt --max_new 40 "))[:1 if P > 1 else 2]:
                print()
                table({f"{label}{flags or 'default'}": f"{corpus}--reward length --prompt_len {P} {flags}"
                       for flags in ("", "--kl_in reward --kl 0.03 --kl_end 0.03 --rl_lr 5e-4")}, min(args.seeds, 3), columns)


if __name__ == "__main__":
    main()
