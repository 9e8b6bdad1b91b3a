import http.server, json, os, pathlib, subprocess, sys, threading, time

import pytest
from hypothesis import settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")         # as common.py, before a test imports torch
# the same examples in every run: a stranger's suite must not fail by its own draw. --hypothesis-profile default draws new ones
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture
def alone(tmp_path):
    """run(script, *flags): the script in an empty folder with nothing but common.py (and the ladder) beside it."""
    import shutil

    def run(script, *flags, files=(), timeout=120, **kw):
        for name in ("common.py", script, *files):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if not (tmp_path / name).exists():
                shutil.copy(ROOT / name, tmp_path / name)
        return subprocess.run([sys.executable, script, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout, **kw)
    run.folder = tmp_path
    return run


def refused(r):
    """A user's mistake: exit status 2 and one sentence on stderr, no traceback."""
    lines = [x for x in r.stderr.splitlines() if x.strip() and "\r" not in x]
    assert r.returncode == 2, (r.returncode, r.stderr)
    assert len(lines) == 1 and "Traceback" not in r.stderr, r.stderr
    return lines[0]


def completion(text, tokens=(1000, 40), finish="stop"):
    """What an OpenAI-compatible server replies: text, and the tokens that it bills for prompt and reply."""
    return json.dumps(dict(choices=[dict(message=dict(content=text), finish_reason=finish)],
                           usage=dict(prompt_tokens=tokens[0], completion_tokens=tokens[1])))


class Server(http.server.ThreadingHTTPServer):
    """Answers through answer(handler, body), body None for a GET; keeps of each POST body, headers and time, of each GET the path."""
    daemon_threads, request_queue_size = True, 64

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.lock, self.bodies, self.times, self.headers, self.paths = answer, threading.Lock(), [], [], [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()

    def handle_error(self, request, address):
        pass                                                # a client that hangs up, or is killed, is what we test


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body), self.server.times.append(time.monotonic()), self.server.headers.append(dict(self.headers))
        self.server.answer(self, body)

    def do_GET(self):
        self.server.paths.append(self.path)
        self.server.answer(self, None)

    def send(self, raw, status=200, kind="application/json", length=None, **headers):
        """length: what the header claims, if not the truth."""
        raw = raw if isinstance(raw, bytes) else raw.encode()
        self.send_response(status)
        for k, v in dict(headers, **{"Content-Type": kind, "Content-Length": str(length or len(raw))}).items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(raw)

    def reply(self, text, *tokens):
        self.send(completion(text, *tokens))

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve(answer): a Server on 127.0.0.1, for one test."""
    made = []

    def make(answer):
        made.append(Server(answer))
        return made[-1]
    yield make
    for server in made:
        server.shutdown()
        server.server_close()
