import os, pathlib, subprocess, sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MPLBACKEND"] = "Agg"


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
