"""rag_cheetah.py: a language model that was never trained for it runs HalfCheetah, shown what others did in similar states.

    python rag_cheetah.py --target_rew 1200                     # offline: the neighbours alone, no model
    OPENAI_API_KEY=... python rag_cheetah.py --llm MODEL --price_in $ --price_out $ --episodes 1 --max_steps 100

Measured, the neighbours alone (--llm knn; seed 0, 10 episodes per target, 1 shared core of an AMD EPYC, torch 2.13): asked for 300,
600, 1200, 2400 they earn 298 +- 2, 598 +- 2, 1196 +- 1, 2396 +- 3. With --k 1, ten of the 631 episodes are enough for an error of
0.8%, two for 18%; with --rate_weight 0 they earn some 340, whatever is asked. Any --llm has to beat them. The only LLM run so far is
SmolLM2-135M, three steps behind a real server: none of its replies could be used. The tests have a server with every fault.
After the RAG demonstration of Small-LLM, whose code was never published: the prompt is its document's. Differs from it in:
1. the query holds the reward rate that is still to be earned, so the neighbours obey --target_rew; k of them, each of another episode
2. a reply that can't be used is asked for once more, then replaced by the neighbours' mean (there: by zeros), and counted
3. HalfCheetah-v5, whatever the prompt says
Not handled: models that refuse temperature or max_tokens; replies in pieces (streaming); other environments.
"""
import collections, concurrent.futures, hashlib, json, os, pathlib, queue, re, threading, time

import common                       # before torch: it says how torch's threads wait
from common import Cheetahs, sorry
import numpy as np
import requests, urllib3
import torch
from tqdm import tqdm
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, SSLError

S_DIM, A_DIM, T_DATA = 17, 6, 1000       # HalfCheetah-v5: observation, action, time limit in steps of 0.05 s
OUT, PAUSE = pathlib.Path("out"), 1.0      # PAUSE: seconds before a second try; then it doubles
OPENAI = "https://api.openai.com/v1"

# ---- flags -----------------------------------------------------------------------------------------------------------------
def get_args(argv=None):
    p = common.Flags(__doc__)
    # what is asked of the cheetah
    p.flag("target_rew", 1200.0, "return to run at, summed over the episode", low=-1e9)
    p.flag("targets", None, "several returns, for a table: 300 600 1200", nargs="+", type=float, low=-1e9)
    p.flag("episodes", 10, "episodes per target, each from its own start; with an LLM each step of each is a request")
    p.flag("max_steps", T_DATA, "steps of 0.05 s per episode; the original's videos have 100")
    # what is retrieved
    p.flag("dataset", "out/data/cheetah_ladder.hdf5", "episodes, a .hdf5 of Minari or D4RL; dt_cheetah.py is run to make this one")
    p.flag("store_episodes", 0, "use so many of them, drawn by --seed; 0: all", low=0)
    p.flag("k", 8, "similar states that are looked up, each from another episode", high=1000)
    p.flag("rate_weight", 4.0, "how much a neighbour's reward rate counts beside its state; 0: the target is ignored")
    # who acts
    p.flag("llm", "knn", "knn: the neighbours' mean action, free; any other name is a model at --api_base")
    p.flag("api_base", OPENAI, "an OpenAI-compatible endpoint; vLLM's is http://localhost:8000/v1")
    p.flag("history", 0, "last steps that the prompt tells, with the actions taken and the rewards", low=0, high=1000)
    p.flag("encoding", "float", "numbers in the prompt: float, three decimals; int, 0 to 200", choices=["float", "int"])
    p.flag("temperature", 0.0, "0: the likeliest action", high=2)
    p.flag("max_tokens", 120, "tokens of a reply at most; six numbers are about 40")
    p.flag("parallel", 8, "requests at once: one per episode", high=256)
    p.flag("timeout", 60.0, "seconds until a request counts as lost", low=0.01, high=3600)
    p.flag("retries", 6, "attempts for one request; the pause doubles, and Retry-After is obeyed", high=100)
    p.flag("price_in", None, "dollars per million prompt tokens, as the provider says; 0: your own server", type=float)
    p.flag("price_out", None, "dollars per million reply tokens", type=float)
    p.flag("max_cost", 5.0, "dollars for this run, earlier parts of it included; 0 only shows the plan")
    p.flag("seed", 0, "of the start states and of --store_episodes", low=0)
    # what comes out
    p.flag("video", True, "write an mp4 of the first episode")
    p.flag("video_steps", 400, "its length in steps; 20 are a second")
    p.flag("renderer", "numpy", "numpy works anywhere; mujoco wants a working OpenGL", choices=["numpy", "mujoco"])
    p.flag("smoke", False, "the same path with tiny numbers, under a minute")
    args = p.parse_args(argv, smoke=dict(dataset="out/data/cheetah_ladder_1_0.05_0.6_0.3.hdf5", episodes=2, max_steps=100, video_steps=40))
    args.targets = args.targets or [args.target_rew]
    if args.llm == "knn":
        args.price_in = args.price_out = 0.0
    if None in (args.price_in, args.price_out):
        sorry("--price_in and --price_out: dollars per million tokens, as the provider says; 0 for a server of your own")
    if not re.fullmatch(r"https?://[^\s@/]+(/[^\s@]*)?", args.api_base):         # a password would end up in the results
        sorry("--api_base takes http://host:port/v1 or https://host/v1, and no user or password in it; a key goes into OPENAI_API_KEY")
    return args

# ---- episodes: what was still to be earned at each of their steps -------------------------------------------------------------
def reward_rate(rtg, steps_left):
    """The return-to-go per step left: what made dt_cheetah.py obey. Under 20 steps (a second) single strides would rule."""
    return rtg / np.maximum(steps_left, 20)

def still_to_earn(d):
    """Episodes -> the rate that each of their steps was still to earn, (N,)."""
    total, end = np.cumsum(d.rew, dtype=np.float64), np.repeat(d.first + d.length, d.length)
    return reward_rate(total[end - 1] - total + d.rew, end - np.arange(len(end)))

# ---- the idea, first half: what did others do who were where we are, and earned what we want? -----------------------------------
class Store:
    """All steps of the episodes: obs, rate and act, float32, as (E, L, ...), E episodes padded to L steps. A key is the state,
    normalised, and the reward rate that its episode was still to earn; so a query asks for a state AND a future."""
    def __init__(self, obs, act, rate, length, weight):
        E, L = len(length), int(max(length))
        self.E, self.L, self.weight, self.steps = E, L, weight, int(sum(length))
        e, t = np.repeat(np.arange(E), length), np.concatenate([np.arange(n) for n in length])      # of each step: its episode, its time
        self.obs, self.act = np.zeros((E, L, S_DIM), np.float32), np.zeros((E, L, A_DIM), np.float32)
        self.obs[e, t], self.act[e, t] = obs, act
        self.mean, self.std = obs.mean(0), obs.std(0) + 1e-6
        key = np.zeros((E, L, S_DIM + 2), np.float32)
        key[:, :, -1] = -1e30                                   # padding: infinitely far away
        key[e, t, :-1] = self.key(obs, rate)
        key[e, t, -1] = -0.5 * np.square(key[e, t, :-1]).sum(1)
        self.table = torch.from_numpy(np.ascontiguousarray(key.reshape(E * L, -1).T))       # (19, E L); numpy's, for it asks for large pages

    def key(self, obs, rate):
        return np.concatenate([(obs - self.mean) / self.std, self.weight * np.reshape(rate, (-1, 1))], 1, dtype=np.float32)

    def find(self, obs, rate, k):
        """obs (n, 17), rate (n,) -> the k nearest steps, at most one of each episode, nearest first: episodes, steps (n, k).

        Exact: q.x - |x|^2 / 2 is largest where |q - x| is smallest, so a matmul over all the store finds how near each episode
        comes; the nearest k of them are looked through once more for the step, as a maximum is found twice as fast as its place.
        In pieces, for a piece's products to stay in the cache."""
        q = torch.from_numpy(np.concatenate([self.key(obs, rate), np.ones((len(obs), 1), np.float32)], 1))             # (n, 19)
        n, L, piece = len(q), self.L, max(1, 2**20 // (self.L * len(q)))        # piece: so many episodes at a time
        near, products = torch.empty(n, self.E), torch.empty(n * piece * L)     # one buffer for all: memory that is fresh is slow
        for e in range(0, self.E, piece):
            part = self.table[:, e * L:(e + piece) * L]
            scores = torch.mm(q, part, out=products[:n * part.size(1)].view(n, -1))                                     # (n, piece L)
            near[:, e:e + piece] = scores.view(n, -1, L).amax(2)
        episodes = near.topk(min(k, self.E), 1).indices                                                                # (n, k)
        table, steps = self.table.view(-1, self.E, L), torch.empty_like(episodes)
        for i in range(n):
            steps[i] = (q[i] @ table[:, episodes[i]].flatten(1)).view(-1, L).argmax(1)                  # (19) @ (19, k L) -> (k, L) -> (k)
        return episodes.numpy(), steps.numpy()

def find_store(args):
    """--dataset -> Store. Its arrays are computed once and kept in out/, under the name of what they were made from."""
    path = common.find_ladder(args.dataset)
    stamp = json.dumps([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
    kept, began = OUT / f"rag_store_{hashlib.sha256(stamp.encode()).hexdigest()[:8]}.npz", time.time()
    if not kept.exists():
        d = common.read_episodes(path)
        with common.whole_file(kept) as part:
            np.savez(part, obs=d.obs, act=d.act, rate=np.float32(still_to_earn(d)), length=d.length)
    z = common.load_arrays(kept)
    if args.store_episodes:
        some = np.random.default_rng(args.seed).permutation(len(z["length"]))[:args.store_episodes]
        use = np.isin(np.repeat(np.arange(len(z["length"])), z["length"]), some)
        z = dict(obs=z["obs"][use], act=z["act"][use], rate=z["rate"][use], length=z["length"][np.sort(some)])
    store = Store(z["obs"], z["act"], z["rate"], z["length"], args.rate_weight)
    print(f"store {kept}: {len(z['rate']):,} steps of {store.E} episodes, {store.table.nbytes >> 20} MB, {time.time() - began:.1f} s")
    return store

# ---- the idea, second half: say it to a language model ----------------------------------------------------------------------------
SYSTEM = "You are an expert Mujoco Half Cheetah V0 environment controller."

def write(x, store, encoding, kind):
    """Numbers as the prompt has them. float: three decimals. int: 0 to 200, 100 the middle, as tokenizers cut whole numbers
    best (Wang et al. 2023, arXiv 2309.09969): 25 a standard deviation of a state, 100 the largest action."""
    if encoding == "float":
        return "[" + ", ".join(f"{v:.3f}" for v in x) + "]"
    x = 100 + 25 * (x - store.mean) / store.std if kind == "state" else 100 + 100 * x
    return "[" + ", ".join(str(int(v)) for v in np.clip(np.rint(x), 0, 200)) + "]"

def messages(args, store, step, obs, episodes, steps, past):
    """The original's prompt for one cheetah: obs (17,), its neighbours (k,) each, past [(obs, action, reward), ...]."""
    say = lambda x, kind: write(x, store, args.encoding, kind)
    lines = [f"Time step {step}. HalfCheetah-v0 state vector has dimension {S_DIM}.", f"Current state: {say(obs, 'state')}.",
             "Here are similar states to the current state and their corresponding actions to take you should use as a reference:"]
    lines += [f"Similar state: {say(store.obs[e, t], 'state')} : action {say(store.act[e, t], 'action')}" for e, t in zip(episodes, steps)]
    if args.history and past:
        lines += ["The last steps were:"]
        lines += [f"State: {say(o, 'state')} : action {say(a, 'action')} : reward {r:.3f}" for o, a, r in past[-args.history:]]
    form = ", ".join(args.encoding[0] + str(i) for i in range(1, 7))                # f1, f2, ... or i1, i2, ...
    lines += ["", f'Respond in strict JSON: {{"action": [{form}]}}. No extra text.']
    return [dict(role="system", content=SYSTEM), dict(role="user", content="\n".join(lines))]

def parse(reply, encoding):
    """A reply -> (action (6,) within [-1, 1], whether it had to be clipped to that); ValueError with what is wrong with it."""
    try:
        data = json.loads(reply)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON and nothing but JSON") from None
    x = data.get("action") if isinstance(data, dict) and len(data) == 1 else None
    if not isinstance(x, list) or len(x) != A_DIM or not all(type(v) in (int, float) and abs(v) < 1e9 for v in x):     # nan fails, too
        raise ValueError(f'it is not {{"action": [...]}} with {A_DIM} finite numbers')
    x = np.array(x, float) if encoding == "float" else np.array(x, float) / 100 - 1
    return np.clip(x, -1, 1), bool((abs(x) > 1).any())

# ---- the endpoint: everything that can go wrong, and what was paid -----------------------------------------------------------------
def read_key(args):
    """The API key, from OPENAI_API_KEY only, "" for who needs none. It goes into one header and nowhere else: no file, log or message."""
    key = os.environ.get("OPENAI_API_KEY", "").strip() if args.llm != "knn" else ""
    if not re.fullmatch(r"[\x21-\x7e]*", key):          # requests would quote the whole header in its complaint
        sorry("OPENAI_API_KEY holds characters that no key has; set it anew")
    if args.llm != "knn" and not key and args.api_base == OPENAI:
        sorry("set OPENAI_API_KEY, or --api_base for a server of your own, or use --llm knn, which needs neither")
    return key

def hide(text, key):
    """text without the key, should a server repeat it. Under 8 letters it is what people set for a server that wants none: a word."""
    return re.sub(r"\bsk-[\w*.-]{8,}", "[key]", text.replace(key, "[key]") if len(key) >= 8 else text)

class GivenUp(Exception):
    """A sentence that a request's thread has for the user; the main thread says it, once."""

class Endpoint(common.Journal):
    """The server, and a journal of what was asked and paid: {"ask": n, "bound": $} before a request, {"n": n, "key": its place in the run,
    "reply": ..., "cost": $} or {"n": n, "free": why} after it. An ask without its second line may have been paid for: it counts with
    its bound. A reply that is here is never asked for again."""
    def __init__(self, args, path, key):
        self.args, self.key, self.lock, self.stop = args, key, threading.Lock(), threading.Event()
        self.replies, self.open, self.asks, self.spent = {}, {}, 0, 0.0
        self.faults, self.lost, self.unanswered = collections.Counter(), [], 0
        super().__init__(path)

    def count(self, line):
        if "ask" in line:
            self.open[line["ask"]], self.asks = float(line["bound"]), line["ask"] + 1
        else:
            self.open.pop(line["n"], None)
        if "reply" in line:
            self.spent += line["cost"]
            self.replies.setdefault(line["key"], line)

    def ask(self, place, prompt, enough):
        """-> the reply's text, from the journal if it was paid for before; None if there was none after all --retries. enough: so many
        requests in a row without an answer, and nobody is there."""
        args, got = self.args, {}
        body = dict(model=args.llm, messages=prompt, temperature=args.temperature, max_tokens=args.max_tokens)
        key = f"{place} {hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]}"
        # tokens of the prompt, at most: one is a byte or more; 100 are for the chat template
        size = 100 + sum(len(m["content"].encode("utf-8", "replace")) for m in prompt)
        price = lambda n_in, n_out: (n_in * args.price_in + n_out * args.price_out) / 1e6
        bound = price(size, args.max_tokens)
        for tries in range(args.retries if key not in self.replies else 0):
            with self.lock:
                if not args.max_cost or self.spent + sum(self.open.values()) + bound > args.max_cost:
                    raise GivenUp(f"--max_cost ${args.max_cost:g} does not cover the next request (${self.spent:.4f} is spent)")
                n = self.asks
                self.write(ask=n, bound=bound)
            box = queue.SimpleQueue()       # a thread that may be given up: dripping headers outlive any timeout of a socket
            threading.Thread(target=lambda: box.put(self.post(key.replace(" ", "-"), body, size)), daemon=True).start()
            try:
                got = box.get(timeout=1.5 * args.timeout)
            except queue.Empty:
                got = dict(why="no answer in time")
            with self.lock:
                if "reply" in got:
                    for gone in self.lost:          # what had no answer before this one keeps none: a resumed run must take the same way
                        self.write(n=-1, key=gone, cost=0.0, reply=None)
                    self.lost.clear()
                    self.write(n=n, key=key, cost=price(got["in"], got["out"]), **got)
                    self.unanswered = 0
                    break
                self.faults[got["why"]] += 1
                if got.get("free"):
                    self.write(n=n, free=got["why"])
            if not got.get("retry", True):
                raise GivenUp(f"{args.api_base} refuses {args.llm} ({got['why']})")
            wait = min(got.get("after", 0.0), 120.0) or min(60, PAUSE * 2.0**tries) * (0.5 + 0.5 * np.random.random())
            if tries + 1 < args.retries and self.stop.wait(wait):
                break
        else:
            if key not in self.replies:
                with self.lock:             # not yet written: a run that ends before the next answer may ask again
                    self.lost.append(key)
                    self.unanswered += 1
                    if self.unanswered >= enough:
                        raise GivenUp(f"{args.api_base} does not answer ({got['why']})")
        return self.replies.get(key, dict(reply=None))["reply"]

    def post(self, name, body, size):
        """One attempt. -> reply, in, out (tokens), seconds; or why, with free=True if nothing can have been billed, retry=False if it is no
        use, after=seconds if the server asks for a pause. size: tokens of the prompt at most, for a server that does not count."""
        began, got, url, timeout = time.monotonic(), {}, self.args.api_base.rstrip("/") + "/chat/completions", self.args.timeout
        # servers and gateways that know Idempotency-Key answer a repeated request from memory, unpaid; others ignore it
        headers = {"Idempotency-Key": name, "Authorization": f"Bearer {self.key}" if self.key else None}        # None: it is not sent
        try:
            # auth: without one requests would replace the header by what ~/.netrc has for the host
            with requests.post(url, json=body, headers=headers, auth=lambda plain: plain, stream=True, allow_redirects=False,
                               timeout=(min(10, timeout), timeout)) as r:
                status, after = r.status_code, r.headers.get("Retry-After")
                # errors are not billed; but behind a 502 or 504 is a gateway that gave up on a model who may answer yet
                got = dict(why=f"HTTP {status}", free=status not in (200, 502, 504),
                           retry=status in (200, 408, 409, 425, 429) or status >= 500)
                raw = r.raw.read(10**6 + 1, decode_content=True)        # no more, whatever it sends
            if len(raw) > 10**6:
                raise ValueError
            if status == 200:
                data = json.loads(raw)
                text, use = hide(str(data["choices"][0]["message"].get("content") or ""), self.key), data.get("usage") or {}
                most = dict(prompt_tokens=size, completion_tokens=min(body["max_tokens"], len(text.encode("utf-8", "replace"))))
                used = [use[k] if type(use.get(k)) is int and use[k] >= 0 else most[k] for k in most]
                got = {"reply": text, "in": used[0], "out": used[1], "seconds": round(time.monotonic() - began, 3)}
            elif status in (400, 404, 422):
                said = hide(raw.decode("utf-8", "replace"), self.key)           # before it is cut: half a key is a secret, too
                got["why"] += " " + " ".join(re.findall(r'"message": *"([^"]{1,200})', said))
            elif after:
                got["after"] = float(after) if re.fullmatch(r"[\d.]{1,9}", after) else urllib3.Retry().parse_retry_after(after)
        except Exception as e:                  # of requests, JSON, dates; only its type is told: its message may quote headers
            if not got.get("free"):
                reason, bad = getattr(e.args[0] if e.args else None, "reason", None), isinstance(e, requests.exceptions.InvalidURL)
                unsent = bad or isinstance(reason, (NewConnectionError, ConnectTimeoutError, SSLError))
                got = dict(why=type(e).__name__ + " in the reply" * bool(got), free=unsent, retry=not bad)
        return got

class Controller:
    """Asks the LLM for actions; counts hold what became of each step."""
    def __init__(self, args, store, endpoint):
        self.args, self.store, self.endpoint = args, store, endpoint
        self.pool, self.counts = concurrent.futures.ThreadPoolExecutor(args.parallel), dict(good=0, repaired=0, fallback=0, clipped=0)

    def act(self, step, obs, episodes, steps, past):
        """obs (n, 17), neighbours (n, k), past n lists -> actions (n, 6)."""
        enough = 3 * min(self.args.parallel, len(obs))
        jobs = [self.pool.submit(self.one, f"{step}/{i}", messages(self.args, self.store, step, o, episodes[i], steps[i], past[i]),
                                 self.store.act[episodes[i], steps[i]].mean(0), enough) for i, o in enumerate(obs)]
        try:
            return np.stack([job.result() for job in jobs])
        except BaseException as e:          # what waits is not asked; what is under way is waited for, it is paid
            self.endpoint.stop.set()
            self.pool.shutdown(cancel_futures=True)
            if isinstance(e, GivenUp):
                sorry(f"{e}; what was answered is kept, the same command goes on")
            raise

    def one(self, place, prompt, mean, enough):
        """One cheetah's action at one step: the reply, or the repaired reply, or the neighbours' mean."""
        clipped, how = False, "good"
        for attempt in ("", "/repair"):
            reply = self.endpoint.ask(place + attempt, prompt, enough)
            try:
                if reply is None:
                    raise ValueError
                action, clipped = parse(reply, self.args.encoding)
                break
            except ValueError as e:
                prompt = [*prompt, dict(role="assistant", content=(reply or "")[:2000]),
                          dict(role="user", content=f"That can't be used: {e}. Reply with the JSON object alone.")]
                action, how = mean, "repaired" if not attempt and reply is not None else "fallback"
                if reply is None:           # who does not answer is not asked to repair
                    break
        with self.endpoint.lock:
            self.counts[how] += 1
            self.counts["clipped"] += clipped
        return action

# ---- evaluation: closed loop, all targets and episodes in one batch ---------------------------------------------------------
def evaluate(args, store, targets, controller=None):
    """One episode per entry of targets (n,), each from its own start -> what they earned (n,); who ever pitched over (n,)
    bool; all actions (steps, n, 6); the first one's diary: (qpos (9,), return so far, target); seconds per search."""
    n, H, sim = len(targets), args.max_steps, Cheetahs(len(targets))
    obs, owed = sim.reset(np.random.default_rng(10_000 + args.seed)), np.array(targets, float)
    earned, fell, searching = np.zeros(n), np.zeros(n, bool), 0.0
    diary, actions, past = [], [], [[] for _ in range(n)]
    for step in tqdm(range(H), desc=f"running, {args.llm}", unit="step", disable=None):
        began = time.perf_counter()
        episodes, steps = store.find(obs, reward_rate(owed, H - step), args.k)
        searching += time.perf_counter() - began
        action = controller.act(step, obs, episodes, steps, past) if controller else store.act[episodes, steps].mean(1)
        before, (obs, reward) = obs, sim.step(np.float64(action))
        for steps_so_far, *last in zip(past, before, action, reward):
            steps_so_far.append(last)
        earned, owed, fell = earned + reward, owed - reward, fell | (np.abs(obs[:, 1]) > 1.2)
        actions.append(action)
        diary.append((sim.state[0, 1:10].copy(), earned[0], targets[0]))
    return earned, fell, np.stack(actions), diary, searching / H

# ---- main ------------------------------------------------------------------------------------------------------------------
def journal_file(args):
    """A run's journal is named after all that its prompts depend on: the same command finds it again."""
    shape = {k: getattr(args, k) for k in ("targets episodes max_steps dataset store_episodes k rate_weight llm api_base history encoding "
                                           "temperature max_tokens seed").split()}
    return OUT / f"rag_{re.sub(r'[^A-Za-z0-9.-]+', '_', args.llm)}_{hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:8]}.jsonl"

def main():
    args, began, controller = get_args(), time.time(), None
    key = read_key(args)
    store, asked = find_store(args), np.repeat(args.targets, args.episodes)
    if args.llm != "knn":
        file = journal_file(args)
        endpoint = Endpoint(args, file, key)
        controller = Controller(args, store, endpoint)
        n, paid = len(asked) * args.max_steps, len(endpoint.replies)
        print(f"{n} requests to {args.llm} at {args.api_base}, {args.parallel} at once; {paid} replies for ${endpoint.spent:.4f} "
              f"of --max_cost ${args.max_cost:g} are in {file}")
    earned, fell, actions, diary, searching = evaluate(args, store, asked, controller)
    error, table = abs(earned - asked) / np.maximum(abs(asked), 1), []
    print(f"\n{'kNN' if controller is None else 'kNN + ' + args.llm} (0 parameters, 0 s of training)\n"
          " asked    reached            error    fell")
    for x, g, e, f in zip(*(z.reshape(-1, args.episodes) for z in (asked, earned, error, fell))):
        print(f"{x.mean():6.0f}   {g.mean():7.1f} +- {g.std():6.1f}  {e.mean():7.2%}  {f.sum():3d}/{len(f)}")
        table.append([float(x[0]), float(g.mean().round(1)), float(g.std().round(1)), int(f.sum())])
    metrics = dict(asked=args.targets, reached=[row[1] for row in table], error_percent=round(100 * error.mean(), 2),
                   episodes=len(earned), fell=int(fell.sum()), k=args.k, steps_in_store=store.steps,
                   ms_per_query=round(1000 * searching / len(asked), 3), table=table)
    if controller:
        replies = [r for r in endpoint.replies.values() if r["reply"] is not None]
        seconds = np.array([r["seconds"] for r in replies] or [0.0])
        metrics.update(controller.counts, faults=dict(endpoint.faults), tokens_in=sum(r["in"] for r in replies),
                       tokens_out=sum(r["out"] for r in replies), cost=round(endpoint.spent, 6),
                       unsettled=round(sum(endpoint.open.values()), 6), latency=round(float(np.median(seconds)), 3),
                       latency_p95=round(float(np.percentile(seconds, 95)), 3), journal=str(file))
    name = f"rag_cheetah_{re.sub(r'[^A-Za-z0-9.-]+', '_', args.llm)}_{args.targets[0]:.0f}"
    with common.whole_file(OUT / f"{name}.npz") as part:
        np.savez_compressed(part, actions=np.float32(actions), targets=asked, returns=earned)     # actions (steps, episodes, 6)
    metrics["actions"] = str(OUT / f"{name}.npz")
    if args.video:
        film = common.draw_episode(Cheetahs.model, diary[:args.video_steps], args.renderer)
        metrics["video"] = str(common.write_video(OUT / f"{name}.mp4", film))
    common.log_result("rag_cheetah.py", args, time.time() - began, metrics)

if __name__ == "__main__":
    common.run(main)
