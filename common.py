"""common.py: the uninteresting ground floor under the seven experiments.

What scripts would repeat, and what no one reads for its idea. Copy it beside any script and the script runs.
    1 errors in one sentence, flags         all         4 a renderer without OpenGL, mp4          the cheetah's three
    2 files that are never half-written     all         5 HalfCheetah in batches, its episodes    the cheetah's three
    3 sampling, beam search                 ppo, lora   6 safetensors, JSON                       pythia, lora
"""
import argparse, collections, contextlib, glob, hashlib, json, math, os, pathlib, platform, re, sys, time

# torch's threads spin for milliseconds while they wait for each other. with another program busy on one of their cores, a step of
# dt_cheetah.py then takes 1900 to 2700 ms instead of 55; if they go to sleep sooner, 152, and on a quiet machine still 55
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import torch

# ---- part 1: one sentence for the user -----------------------------------------------------------------------------------
def sorry(sentence):
    """End the program as every user's mistake ends it: one sentence on stderr, exit status 2."""
    print(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(str(sentence).split())}", file=sys.stderr)
    raise SystemExit(2)

class Flags(argparse.ArgumentParser):
    """argparse whose errors are one sentence, whose help shows defaults, and which takes no abbreviations."""
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.ranges = {}

    def flag(self, name, default, why, low=None, high=1e9, **kw):
        """Numbers are from low to high; if nothing is said, whole ones are counts, at least 1, and others at least 0."""
        if isinstance(default, bool):
            kw.setdefault("action", argparse.BooleanOptionalAction)
        elif not isinstance(default, (list, type(None))):
            kw.setdefault("type", type(default))
        if kw.get("type") in (int, float):
            self.ranges[name] = (1 if kw["type"] is int else 0) if low is None else low, high
        self.add_argument(f"--{name}", default=default, help=f"{why} [{default}]".replace("%", "%%"), **kw)

    def parse_args(self, argv=None, smoke={}):
        """smoke: the defaults that --smoke brings; other flags still win over them."""
        if "--smoke" in (sys.argv if argv is None else argv):
            self.set_defaults(**smoke)
        args = super().parse_args(argv)
        for name, (low, high) in self.ranges.items():
            for x in np.ravel(getattr(args, name)):             # a number, a list of them, or None: not given
                if x is not None and not low <= x <= high:      # in this form nan fails, too
                    self.error(f"argument --{name}: {x:g} is not between {low:g} and {high:g}")
        return args

    def error(self, message):
        if message.startswith("unrecognized"):      # their values may be secrets: a key typed after a wrong flag
            wrong = ", ".join(x.split("=")[0] for x in message.split() if x.startswith("-"))
            message = f"there is no flag {wrong}" if wrong else "a value stands where no flag asks for one"
        sorry(f"{message} (--help lists the flags)")

def run(main):
    """Call main(); Ctrl-C, a full disk, a missing file or package end in a sentence, not in a traceback."""
    if hasattr(sys.stdout, "reconfigure"):          # a console that lacks a letter shows a question mark
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130)
    except (OSError, MemoryError, RuntimeError, ImportError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise                                   # torch says by a RuntimeError that memory is not enough; all others are bugs
        hint = "; pip install -r requirements.txt brings it" if isinstance(e, ImportError) else ""
        sorry((str(e).split("\n")[0] or type(e).__name__) + hint)

def pick_device():
    """cuda, else mps, else cpu: chosen once, at the start of main()."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"

def fast_dtype(device):
    """"bfloat16" where the hardware multiplies it, else "float32": emulated on an older CPU it is slower than float32."""
    has = lambda name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)()         # private names: some versions lack them
    fast = torch.cuda.is_bf16_supported(False) if device == "cuda" else device == "cpu" and (has("avx512_bf16") or has("amx_tile"))
    return "bfloat16" if fast else "float32"

# ---- part 2: files that are whole or not there ---------------------------------------------------------------------------
@contextlib.contextmanager
def whole_file(path):
    """Yields a path beside `path` to write to; renamed over `path` at the end, removed if anything went wrong before."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.unfinished-{os.getpid()}{path.suffix}")         # the suffix stays: writers go by it
    others = path.parent.glob(f"{glob.escape(path.stem)}.unfinished-*{path.suffix}")
    for old in others if os.name != "nt" else []:       # there, signal 0 is Ctrl-C; here it only asks: does the writer live?
        try:
            os.kill(int(old.stem.rsplit("-", 1)[1]), 0)
        except ProcessLookupError:
            old.unlink(missing_ok=True)                 # it was killed while it wrote
        except (PermissionError, ValueError, OverflowError):
            pass                                        # it lives, as another user's; or the name is no work of ours
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())        # else a power cut may leave the new name on an empty file
        os.replace(part, path)
    except OSError as e:
        sorry(f"cannot write {path}: {e.strerror or e}")
    finally:
        part.unlink(missing_ok=True)

@contextlib.contextmanager
def reading(what):
    """Whatever Python raises in this block over a broken file, the user reads one sentence: `what` cannot be read, and why."""
    try:
        yield
    except Exception as e:              # zip, HDF5, JSON, dicts, tensors, requests: each has errors of its own
        cut = isinstance(e, StopIteration) or isinstance(e.__cause__, StopIteration)        # what reads byte by byte ran out of bytes
        why = "it is cut short" if cut else f"it lacks {e}" if isinstance(e, KeyError) else str(e) or type(e).__name__
        sorry(f"{what} cannot be read ({why[:200]})")

def save_checkpoint(path, state):
    """Write a dict of tensors and plain values; the previous checkpoint stays good until this one is whole."""
    with whole_file(path) as part:
        try:
            torch.save(state, part)
        except RuntimeError as e:       # torch reports a full disk as a RuntimeError of its zip writer
            raise OSError(None, str(e).splitlines()[0]) from e

def resume(path, **parts):
    """Load a checkpoint into parts (model=, optimizer=), by their names in it -> what else it holds, on the CPU; {} if there is no such
    file. Tensors and plain values only, never code (weights_only)."""
    if not pathlib.Path(path).exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:              # a broken zip, pickle or tensor: torch raises half a dozen types for it
        sorry(f"{path} is not a checkpoint that can be read ({type(e).__name__}); remove it to start anew")
    try:
        for name, part in parts.items():
            part.load_state_dict(state.pop(name))
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        sorry(f"{path} holds a model of another shape than the flags ask for; remove it to train anew")
    return state

def load_arrays(path):
    """An .npz as a dict of arrays; a missing or broken one gets a sentence."""
    with reading(path), np.load(path) as z:
        return dict(z)

def download(url, path, size=None, sha256=None, headers=None):
    """Fetch url to path, going on from path.part if an earlier run was cut. size in bytes, sha256 in hex: checked if given."""
    import requests
    from tqdm import tqdm
    path = pathlib.Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        # identity: of a body that was packed for the way, neither length nor place would be the file's
        ask = {"Accept-Encoding": "identity", **(headers or {}), **({"Range": f"bytes={have}-"} if have else {})}
        with requests.get(url, headers=ask, stream=True, timeout=30) as r:
            if r.status_code != 416:            # 416: nothing is left to send, the part is already whole
                r.raise_for_status()
                have = have if r.status_code == 206 else 0      # 200: the server sends everything from the start
                total = have + int(r.headers["Content-Length"]) if "Content-Length" in r.headers else None
                with open(part, "ab" if have else "wb") as f, tqdm(total=total, initial=have, unit="B", unit_scale=True,
                                                                   desc=path.name, disable=None) as bar:
                    for block in r.iter_content(1 << 20):
                        f.write(block)
                        bar.update(len(block))
                if total is not None and part.stat().st_size != total:
                    raise requests.ConnectionError("the connection ended early")
    except requests.RequestException as e:
        code = getattr(getattr(e, "response", None), "status_code", None)
        sorry(f"cannot download {url} ({f'HTTP {code}' if code else type(e).__name__}); what has come so far is kept and the "
              f"same command goes on, or put the file at {path} yourself")
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
    if found != sha256 or size not in (None, part.stat().st_size):
        sorry(f"{part} is not what {url} promised: its size or sha256 is another; remove it to try again")
    os.replace(part, path)
    return path

def fetch_hub(name, wanted, rank=0, instead=""):
    """The files of a Hub id (owner/name) that fullmatch the first of wanted that any does, and config.json, downloaded to out/hub: resumed,
    sizes and hashes checked, HF_TOKEN honoured, by the process of rank 0 while others wait. instead: what else to do. -> the folder"""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        sorry(f"--model {name}: no such folder, and no Hub id (owner/name) either{instead}")
    folder, hub = pathlib.Path("out/hub") / name, os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    while rank and not (folder / "config.json").exists():
        time.sleep(1)
    if not (folder / "config.json").exists():       # it comes last: where it is, all is
        import requests
        token = "".join(os.environ.get("HF_TOKEN", "").split())     # a line break in it, and requests would quote it in its complaint
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = requests.get(f"{hub}/api/models/{name}/tree/main", headers=headers, timeout=30)
            answer.raise_for_status()
            files = {f["path"]: (f["size"], f.get("lfs", {}).get("oid")) for f in answer.json() if f["type"] == "file"}
        except Exception as e:              # of requests, of JSON, of dicts
            why = re.split(" (?:for|with) url", str(e))[0][:100] or type(e).__name__
            sorry(f"{hub} gives no list of the files of {name} ({why}); a gated model needs HF_TOKEN{instead}")
        kinds = [w for w in wanted if any(re.fullmatch(w, f) for f in files)]
        if not kinds:
            sorry(f"{hub}/{name} holds no weights in a format that is read here{instead}")
        for f in sorted((f for f in files if re.fullmatch(rf"{kinds[0]}|config\.json", f)), key="config.json".__eq__):     # config.json last
            download(f"{hub}/{name}/resolve/main/{f}", folder / f, *files[f], headers=headers)
    return folder

class Journal:
    """JSON lines, each on disk before the run goes on. Who inherits has a count(line), which is told of each, old and new."""
    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab+")
        with contextlib.suppress(ImportError):          # windows has no fcntl: two runs at once are the user's care
            import fcntl
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)           # the system lets go of it however we die
            except OSError:
                sorry(f"another run is writing to {path}; wait for it")
        *lines, torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            with reading(f"{path}, line {number} (remove it to go on)"):
                self.count(json.loads(line))
        self.file.truncate(self.file.tell() - len(torn))                        # torn by a crash: cut off

    def write(self, **line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.count(line)

def log_result(script, args, seconds, metrics):
    """Print the one result line of a run and append it, with all that is needed to make it again, to out/results.jsonl."""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} x{os.cpu_count()}"
    peak = None
    with contextlib.suppress(ImportError):          # windows has no such module
        import resource                             # the most memory that the process ever held; KiB on Linux, bytes on a Mac
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
    row = dict(time=time.strftime("%Y-%m-%dT%H:%M:%S"), script=script, flags=vars(args), seed=getattr(args, "seed", None),
               versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
               hardware=hardware, threads=torch.get_num_threads(), seconds=round(seconds, 1), peak_mb=peak, metrics=metrics)
    pathlib.Path("out").mkdir(exist_ok=True)
    with open("out/results.jsonl", "a") as f:
        f.write(json.dumps(row, default=str) + "\n")
    print(f"result {script}: " + "  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))

# ---- part 3: the next token ----------------------------------------------------------------------------------------------
def penalize(scores, ids, penalty):
    """CTRL's repetition penalty (arXiv 1909.05858): tokens of ids (B, T) become less likely in scores (B, V)."""
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

def sample(logits, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, ids=None, generator=None):
    """logits (B, V) -> next tokens (B,). temperature 0 is greedy; top_k 0 and top_p 1 keep all; ids (B, T) are penalized."""
    if repetition_penalty != 1.0:
        logits = penalize(logits, ids, repetition_penalty)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1.0:
        p, order = logits.softmax(-1).sort(-1, descending=True)
        drop = p.cumsum(-1) - p >= top_p            # the mass BEFORE a token: the first one always stays
        logits = logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

def beam_search(step, prompt, width, max_new, eos=(), length_penalty=1.0, repetition_penalty=1.0):
    """The best continuation of prompt (a list of ids) and its score, sum of log-probabilities / length**length_penalty.

    step(ids (W, T), parent (W,)) -> next-token logits (W, V); parent tells which row of the last call each row goes on
    from, for those who keep a KV cache. Ends as transformers does (early_stopping=False); lengths count eos, not the prompt.
    """
    eos = set(eos)
    ids, scores, parent = torch.tensor([prompt]), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    done = []                                       # finished (score, ids), best first, at most `width`
    for n in range(1, max_new + 1):
        logp = step(ids, parent).float().log_softmax(-1)
        if repetition_penalty != 1.0:
            logp = penalize(logp, ids.to(logp.device), repetition_penalty)
        V = logp.size(1)
        total = (scores[:, None] + logp.cpu()).flatten()
        # eos can end at most len(eos) candidates per beam: so many more than width are enough to keep width alive
        best, at = total.topk(min(max(2, 1 + len(eos)) * width, total.numel()))
        keep = []
        for rank, (s, i) in enumerate(zip(best.tolist(), at.tolist())):
            if i % V in eos or n == max_new:
                if rank < width:                    # an ending outside the first `width` would not have lived anyway
                    done.append((s / n**length_penalty, ids[i // V].tolist() + [i % V]))
            elif len(keep) < width:
                keep.append((s, i))
        done = sorted(done, key=lambda d: -d[0])[:width]
        # stop when no running beam, as it stands, beats the worst of a full set of finished ones
        if not keep or len(done) == width and keep[0][0] / n**length_penalty <= done[-1][0]:
            break
        scores = torch.tensor([s for s, _ in keep])
        parent = torch.tensor([i // V for _, i in keep])
        ids = torch.cat([ids[parent], torch.tensor([[i % V] for _, i in keep])], 1)
    return done[0][1], done[0][0]

# ---- part 4: pictures ----------------------------------------------------------------------------------------------------
class SideView:
    """A numpy camera that looks at planar capsules from the side: shaded, anti-aliased, over a chequered floor that scrolls.
    width, height in pixels, both divisible by 16 (video codecs want that); scale in pixels per metre. No OpenGL."""

    def __init__(self, width=640, height=352, scale=150.0):
        self.w, self.h, self.scale, self.font = width, height, scale, None
        self.ground = int(height * 0.74)                        # the row where z = 0 stands
        down = np.linspace(0, 1, self.ground, dtype=np.float32)[:, None, None]
        sky = np.float32([126, 172, 214]) * (1 - down) + np.float32([240, 243, 238]) * down
        self.back = np.empty((height, width, 3), np.float32)
        self.back[:self.ground], self.back[self.ground:] = sky, np.float32([171, 186, 160])
        self.column = (np.arange(width, dtype=np.float32) - width / 2) / scale      # metres right of the camera
        # the floor in perspective: rows nearer to the viewer show larger chequers; in depth they are evenly wide in log(near)
        near = 1 + np.arange(height - self.ground, dtype=np.float32)[:, None] / 60
        self.floor_x, self.floor_row = self.column / near, np.clip(np.sin(np.pi * 2.2 * np.log(near)) * 8, -1, 1)
        self.floor_edge = scale * near                          # pixels per metre there: the rims are blurred by one pixel

    def frame(self, capsules, colors, camera, lines=()):
        """capsules (n, 5): x0, z0, x1, z1, radius in metres; colors (n, 3) in 0..255; camera: x in the middle of the picture;
        lines: texts from the top left. -> (height, width, 3) uint8."""
        img, g = self.back.copy(), self.ground
        # hills move at a fifth of the speed: the eye reads the speed off the difference
        far = self.column + np.float32(camera * 0.2)
        for base, amp, color in ((52, 16, (176, 199, 205)), (26, 11, (142, 176, 164))):
            top = base + amp * (np.sin(far * (40 / base)) + 0.6 * np.sin(far * (91 / base) + 1))
            band = img[g - base - 2 * amp:g]
            cover = np.clip(np.arange(len(band))[::-1, None] * -1.0 + top, 0, 1).astype(np.float32)[..., None]
            band += cover * (np.float32(color) - band)
        wave = np.abs((self.floor_x + np.float32(camera)) % 2 - 1)                  # 1 m chequers: crosses 1/2 at their rims
        floor = np.clip((0.5 - wave) * self.floor_edge, -1, 1) * self.floor_row
        img[g:] += floor[..., None] * np.float32([17, 15, 17])
        for x0, _, x1, _, r in capsules:                        # a soft shadow under each
            middle, half = (x0 + x1) / 2 - camera, abs(x1 - x0) / 2 + r
            d = ((self.column - np.float32(middle)) / half)**2 + ((np.arange(16, dtype=np.float32)[:, None] - 6) / 8)**2
            img[g:g + 16] *= (1 - 0.18 * np.clip(1 - d, 0, 1))[..., None]
        for capsule, color in zip(capsules, colors):
            self._capsule(img, capsule, np.float32(color), camera)
        return self.text(img.astype(np.uint8), lines)

    def _capsule(self, img, capsule, color, camera):
        x0, z0, x1, z1, r = capsule
        p = np.float32([self.w / 2 + (x0 - camera) * self.scale, self.ground - z0 * self.scale])
        v = np.float32([(x1 - x0) * self.scale, (z0 - z1) * self.scale])            # along the axis, in pixels, y down
        r = np.float32(r * self.scale)
        left, top = np.floor(np.minimum(p, p + v) - r - 1).clip(0, (self.w, self.h)).astype(int)
        right, bottom = np.ceil(np.maximum(p, p + v) + r + 2).clip(0, (self.w, self.h)).astype(int)
        dx = np.arange(left, right, dtype=np.float32)[None] - p[0]
        dy = np.arange(top, bottom, dtype=np.float32)[:, None] - p[1]
        along = np.clip((dx * v[0] + dy * v[1]) / max(float(v @ v), 1e-6), 0, 1)    # nearest point of the axis
        nx, ny = (dx - along * v[0]) / r, (dy - along * v[1]) / r                   # outward, length 1 at the surface
        d2 = nx * nx + ny * ny
        nz = np.sqrt(np.clip(1 - d2, 0, 1))                                         # towards the viewer
        light = np.clip(0.55 - 0.16 * nx - 0.26 * ny + 0.32 * nz, 0, 1.25)
        shine = 70 * np.clip(-0.35 * nx - 0.62 * ny + 0.70 * nz, 0, 1)**24
        cover = np.clip((1 - np.sqrt(d2)) * r + 0.5, 0, 1)[..., None]               # signed distance: a rim one pixel soft
        box = img[top:bottom, left:right]
        box += cover * (np.clip(color * light[..., None] + shine[..., None], 0, 255) - box)

    def text(self, img, lines, color=(28, 36, 44)):
        """Write lines into a picture (H, W, 3) uint8 from the top left down -> the picture."""
        from PIL import Image, ImageDraw, ImageFont
        self.font = self.font or ImageFont.load_default(size=19)
        page = Image.fromarray(img)
        ImageDraw.Draw(page).text((14, 12), "\n".join(lines), color, self.font, spacing=5)
        return np.asarray(page)

def cheetah_capsules(model, data):
    """HalfCheetah's bodies from MuJoCo's geom positions, for SideView.frame: capsules (8, 5), colors (8, 3), far ones first."""
    half = model.geom_size[1:, 1:2] * data.geom_xmat[1:].reshape(-1, 3, 3)[:, :, 2]             # geom 0 is the floor
    a, b = data.geom_xpos[1:] - half, data.geom_xpos[1:] + half
    order = [2, 3, 4, 0, 1, 5, 6, 7]                # back leg (thigh, shin, foot), torso, head, front leg
    colors = [(168, 98, 44), (158, 88, 38), (146, 78, 34), (231, 157, 66), (239, 174, 88), (214, 138, 56), (202, 124, 48), (190, 110, 42)]
    return np.concatenate([a[:, ::2], b[:, ::2], model.geom_size[1:, :1]], 1)[order], colors

def draw_episode(model, diary, renderer="numpy"):
    """diary: (qpos (9,), return so far, target) per step of 0.05 s -> frames (352, 640, 3) uint8 of HalfCheetah, by SideView or,
    where OpenGL works, by MuJoCo's own renderer. model: the MjModel."""
    import mujoco, warnings
    view, data, gl = SideView(), mujoco.MjData(model), None
    if renderer == "mujoco":
        try:
            with warnings.catch_warnings(action="ignore"):      # GLFW's, in four lines
                gl = mujoco.Renderer(model, view.h, view.w)
        except Exception as e:                      # no GL library, no display, no device: each its own error
            print(f"no OpenGL here ({type(e).__name__}): drawing with numpy instead", file=sys.stderr)
    for step, (qpos, earned, target) in enumerate(diary):
        data.qpos[:] = qpos
        mujoco.mj_forward(model, data)
        back = max(0, step - 20)                    # the speed of the last second
        speed = (qpos[0] - diary[back][0][0]) / (0.05 * max(1, step - back))
        lines = [f"target {target:.0f}", f"return {earned:z.0f}", f"{speed:z.1f} m/s"]
        if gl is None:
            yield view.frame(*cheetah_capsules(model, data), qpos[0], lines)
        else:
            gl.update_scene(data, camera="track")
            yield view.text(gl.render().copy(), lines, color=(250, 250, 250))

def write_video(path, frames, fps=20):
    """frames: an iterable of (H, W, 3) uint8, H and W divisible by 16 -> an mp4 (H.264) at path. 20 fps is HalfCheetah's time."""
    import imageio.v2 as imageio
    with whole_file(path) as part, imageio.get_writer(part, format="FFMPEG", fps=fps, codec="libx264", macro_block_size=16, quality=None,
                                                      output_params=["-crf", "23", "-preset", "veryfast"]) as w:
        for frame in frames:
            w.append_data(frame)
    return path

# ---- part 5: HalfCheetah and its episodes --------------------------------------------------------------------------------
class Cheetahs:
    """n HalfCheetah-v5 in one batch, stepped by mujoco.rollout on all cores. state (n, 19): time, 9 qpos, 9 qvel."""
    model = None

    def __init__(self, n):
        try:
            import mujoco, mujoco.rollout
        except Exception:                   # $MUJOCO_GL may name an OpenGL that is not here; physics needs none
            os.environ["MUJOCO_GL"] = "disable"
            import mujoco, mujoco.rollout
        if Cheetahs.model is None:
            import gymnasium            # its file alone: its own renderer, and what that needs, stays out
            xml = pathlib.Path(gymnasium.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
            # settotalmass is deprecated, and mujoco says so on stderr and in a log file: drop it and scale the masses here
            model = mujoco.MjModel.from_xml_string(xml.read_text().replace(' settotalmass="14"', ""))
            mujoco.mj_setTotalmass(model, 14)
            mujoco.mj_setConst(model, mujoco.MjData(model))
            model.stat.meaninertia = model.dof_M0.mean()        # scales the solver's tolerance; only the compiler sets it
            Cheetahs.model = model
        self.n, self.models, cores = n, [self.model] * n, os.cpu_count()
        self.pool, self.datas = mujoco.rollout.Rollout(nthread=cores), [mujoco.MjData(self.model) for _ in range(cores)]
        self.control, self.out, self.sensor = np.empty((n, 5, 6)), np.empty((n, 5, 19)), np.empty((n, 5, 0))
        self.spec = mujoco.mjtState.mjSTATE_CTRL.value

    def reset(self, rng, noise=0.1):
        """Start states as gymnasium draws them: qpos + U(-noise, noise), qvel + noise N(0, 1). -> observations (n, 17)."""
        self.state = np.zeros((self.n, 19))
        self.state[:, 1:10] = self.model.qpos0 + rng.uniform(-noise, noise, (self.n, 9))
        self.state[:, 10:] = noise * rng.standard_normal((self.n, 9))
        return self.state[:, 2:]                                # all but time and the x position

    def step(self, action):
        """action (n, 6), clipped to [-1, 1] -> observations (n, 17), rewards (n,): speed in m/s minus 0.1 |action|^2."""
        action = np.clip(action, -1, 1)
        self.control[:] = action[:, None]                       # frame_skip: five steps of 0.01 s under one action
        # each call starts the contact solver cold where gymnasium's goes on warm: they differ by less than 1e-6 a step (in one
        # call of many steps by not a bit; see the tests). running is chaotic: over many steps any such difference grows
        self.pool.rollout(self.models, self.datas, self.state, self.control, nstep=5, control_spec=self.spec,
                          skip_checks=True, state=self.out, sensordata=self.sensor)
        x, self.state = self.state[:, 1], self.out[:, -1].copy()
        return self.state[:, 2:], (self.state[:, 1] - x) / 0.05 - 0.1 * np.square(action).sum(1)

class Episodes:
    """Episodes end to end: obs (N, 17), act (N, 6), rew (N,), float32, N steps in all; first, length (E,) of each episode."""
    def __init__(self, obs, act, rew, length):
        self.obs, self.act, self.rew, self.length = obs, act, rew, np.asarray(length)
        self.first = np.cumsum(self.length) - self.length
        self.returns = np.add.reduceat(rew, self.first, dtype=np.float64)

def read_episodes(path):
    """Read a .hdf5 in Minari's layout (groups episode_<i>) or D4RL's (flat arrays) -> Episodes. Broken files get a sentence."""
    import h5py
    path = pathlib.Path(path)

    def array(node, name, *shape):
        x = node[name]
        if x.size * x.dtype.itemsize > 1000 * path.stat().st_size:      # a flipped bit in a shape would ask for terabytes
            raise ValueError(f"{name} claims {x.size} numbers")
        x = np.asarray(x[()], np.float32)
        x = x[:, 0] if shape == () and x.shape[1:] == (1,) else x       # D4RL's rewards may be a column
        if x.ndim == 0 or x.shape[1:] != shape or not np.isfinite(x).all():
            raise ValueError(f"{name} {x.shape} is not of shape (steps, {', '.join(map(str, shape))}) or not finite")
        return x

    with reading(f"{path}, which should be a HalfCheetah data set,"), h5py.File(path, "r") as f:
        groups = sorted((k for k in f if k.startswith("episode_")), key=lambda k: int(k[8:]))
        if groups:                                  # Minari's: an episode has one observation more than actions, the last one: dropped
            parts = [(array(f[k], "observations", 17), array(f[k], "actions", 6), array(f[k], "rewards")) for k in groups]
            if not all(len(o) == len(a) + 1 == len(r) + 1 > 1 for o, a, r in parts):
                raise ValueError("an episode's arrays do not fit each other")
            obs, act, rew = map(np.concatenate, zip(*[(o[:-1], a, r) for o, a, r in parts]))
            length = [len(r) for _, _, r in parts]
        else:                                       # D4RL's: episodes end to end
            obs, act, rew = array(f, "observations", 17), array(f, "actions", 6), array(f, "rewards")
            ends = array(f, "timeouts") if "timeouts" in f else np.arange(1, len(rew) + 1) % 1000 == 0
            ends = np.logical_or(ends, array(f, "terminals") if "terminals" in f else False)
            if not len(obs) == len(act) == len(rew) == len(ends) or not ends.any():
                raise ValueError("its arrays do not fit each other, or no episode in it ends")
            length = np.diff(np.flatnonzero(ends), prepend=-1)
            N = length.sum()                        # a tail without an end has no known return: dropped
            obs, act, rew = obs[:N], act[:N], rew[:N]
    return Episodes(obs, act, rew, length)

def find_ladder(name):
    """--dataset -> its path. The file that dt_cheetah.py collects by default, and the one of --smoke (an episode per gait), are made by that
    script, as a process, if they are missing or older than the ladder of gaits that they come from."""
    path, script = pathlib.Path(name), pathlib.Path(__file__).with_name("dt_cheetah.py")
    collected = re.fullmatch(r"out/data/cheetah_ladder(_1_0\.05_0\.6_0\.3)?\.hdf5", name)
    age = lambda file: file.stat().st_mtime if file.exists() else 0
    if collected and script.exists() and age(path) <= age(script.with_name("data") / "cheetah_ladder.npz"):
        import subprocess
        command = [sys.executable, script, "--collect", *(["--ladder_episodes", "1"] if collected[1] else [])]
        print(f"{path} is not there, or of an older ladder; dt_cheetah.py makes it: python {script.name} {' '.join(command[2:])}", flush=True)
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sorry("dt_cheetah.py could not make the episodes; its sentence is above")
    if not path.is_file():
        sorry(f"{path} is not there: --dataset takes a HalfCheetah .hdf5, of Minari, D4RL or dt_cheetah.py (out/data)")
    return path

# ---- part 6: model files -------------------------------------------------------------------------------------------------
DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64, I32=torch.int32,
              I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)          # as safetensors files name them

def read_json(path):
    """A JSON object from a file, as a dict."""
    with reading(path):
        return {**json.loads(pathlib.Path(path).read_bytes())}      # of a list, ** is a TypeError, and so a sentence

def write_json(path, value):
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1))

def read_jsonl(path, keys):
    """A JSON-lines file -> its rows as dicts. What stands under keys must be text; whatever else a row holds passes through."""
    rows = []
    for n, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), 1):
        with reading(f"{path}, line {n}, which should be a JSON object with the texts {' and '.join(keys)},"):
            if line.strip():
                row = json.loads(line)              # half of a surrogate pair is JSON, but no text: it becomes a question mark
                rows.append({**row, **{k: row[k].encode("utf-8", "replace").decode() for k in keys}})
    return rows or sorry(f"{path} has no rows")

class Stored(collections.namedtuple("Stored", "path dtype shape begin end")):
    """Where in a safetensors file a tensor lies, begin and end in bytes; nothing of it is read before tensor() is called."""
    def tensor(self):
        """The tensor as a view of the file's pages: they come into memory where they are read, and leave with the tensor."""
        x = torch.from_numpy(np.memmap(self.path, np.uint8, "c", self.begin, (self.end - self.begin,)))    # c: copied where written to
        return (x.clone() if self.begin % self.dtype.itemsize else x).view(self.dtype).view(self.shape)     # old files align nothing

def read_safetensors(path):
    """A safetensors file -> {name: Stored}: 8 bytes of length, so much JSON, then the tensors without a gap, all of it checked."""
    with reading(path), open(path, "rb") as f:
        table, size, n = {}, os.path.getsize(path), int.from_bytes(f.read(8), "little")
        head = json.loads(f.read(n) if n <= min(size, 100 << 20) else b"")
        head.pop("__metadata__", None)
        data, end = 8 + n, 0                        # where the tensors begin in the file; how far they have come, counted from there
        for name, e in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (begin, stop) = DTYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"]
            whole = all(type(v) is int and v >= 0 for v in (begin, stop, *shape)) and begin == end
            if not whole or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the header's sizes for {name} do not fit each other")
            table[name], end = Stored(path, dtype, shape, data + begin, data + stop), stop
        if data + end != size:
            raise ValueError(f"it has {size} bytes, its header says {data + end}")
        return table

def find_tensors(folder):
    """All tensors of a model folder, in model.safetensors or in shards with an index: {name: Stored}."""
    single = pathlib.Path(folder) / "model.safetensors"
    index, files = single.with_name("model.safetensors.index.json"), [single.name]
    if index.exists():
        with reading(index):
            files = sorted({os.path.basename(f) for f in read_json(index)["weight_map"].values()})     # beside it, wherever they claim
    return {name: x for f in files for name, x in read_safetensors(single.with_name(f)).items()}
