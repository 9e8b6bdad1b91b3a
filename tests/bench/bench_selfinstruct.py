"""How long cleaning takes, and what the ROUGE-L index is worth.

    python tests/bench/bench_selfinstruct.py [rows] [rows of the all-pairs comparison]

The questions are made of a Zipf vocabulary and frames like those that teachers write (and so half of their words are common); three in
ten are edited copies, so that many lie near the threshold. The 30,000 rows that the issue asks about are to be cleaned in at most ten minutes on two cores.
"""
import collections, os, pathlib, random, sys, time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import selfinstruct as si

FRAMES = ["What is the best way to {} the {} when {} is {}?", "How should a player {} with the king against {} {}?",
          "Why is it important for the king to {} the {} before {} {} {}?", "In which {} does the king {} the {} of a {}?",
          "Describe how {} {} can help the king to {} {} in the {} {} of the game.", "Which {} should the king avoid while {} {}?",
          "What happens if the king {} a {} too early in {} {}?", "How do {} and {} differ for the king in {} positions?"]


class Passes:
    def ask(self, jobs, label):
        return [("pass", "stop") for _ in jobs]


def make_rows(count, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(3, 9))) for _ in range(4000)]
    weights = [1 / (i + 3) for i in range(len(words))]
    rows = []
    while len(rows) < count:
        chunk = " ".join(rng.choices(words, weights, k=150))
        for _ in range(10):
            answer = "king " + " ".join(rng.choices(chunk.split(), k=rng.randint(4, 40)))
            if rows and rng.random() < 0.3:                 # an edited copy
                question = rng.choice(rows)["q"].rstrip("?").split()
                for _ in range(rng.randint(0, 6)):
                    question[rng.randrange(len(question))] = rng.choices(words, weights)[0]
                question = " ".join(question) + "?"
            else:
                frame = rng.choice(FRAMES)
                question = frame.format(*rng.choices(words, weights, k=frame.count("{}")))[:-1]
                question += " " + " ".join(rng.choices(words, weights, k=rng.randint(2, 10))) + "?"
            rows.append(dict(q=question, a=answer, job=dict(name="king", chunk=chunk + " king")))
    return rows[:count]


def main():
    count, few = (int(a) for a in (sys.argv[1:] + ["30000", "3000"][len(sys.argv) - 1:]))
    rows, begin, cpu = make_rows(count), time.time(), time.process_time()
    si.clean(rows, si.get_args([]), Passes())
    wall, cpu = time.time() - begin, time.process_time() - cpu
    print(f"cleaning {count} rows: {wall:.1f} s, {cpu:.1f} s of CPU, 1 thread of {os.cpu_count()} (asked: 600 s for 30,000)")
    print("  " + ", ".join(f"{why or 'kept'} {n}" for why, n in collections.Counter(r["why"] for r in rows).most_common()))

    texts = [si.tokens(r["q"]) for r in make_rows(few, seed=1)]
    begin, index, near = time.process_time(), si.RougeIndex(0.7), []
    for t in texts:
        near.append(index.near(t))
        if not near[-1]:
            index.add(t)
    fast, begin, kept, slow_near = time.process_time() - begin, time.process_time(), [], []
    for t in texts:
        where = collections.defaultdict(int)
        for i, w in enumerate(t):
            where[w] |= 1 << i
        slow_near.append(any(2 * si.lcs(where, len(t), k) > 0.7 * (len(t) + len(k)) for k in kept))
        if not slow_near[-1]:
            kept.append(t)
    slow = time.process_time() - begin
    assert near == slow_near, "the index and all pairs disagree"
    print(f"ROUGE-L over {few} questions, {sum(near)} of them near: index {fast:.2f} s, all pairs (the same LCS) {slow:.2f} s, "
          f"{slow / fast:.1f} times; the same answers")


if __name__ == "__main__":
    main()
