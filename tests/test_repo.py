"""The README and the house: what is written about the scripts is what they are."""
import ast, importlib, re, subprocess, sys

import pytest

import common
from conftest import ROOT

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""
SCRIPTS = sorted(p.name for p in ROOT.glob("*.py") if p.name != "common.py")


@pytest.fixture(scope="module")
def helps():
    return {s: subprocess.run([sys.executable, s, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60) for s in SCRIPTS}


def test_every_script_has_help_with_smoke_and_a_why_for_each_flag(helps):
    for script, r in helps.items():
        assert r.returncode == 0, r.stderr
        assert "--smoke" in r.stdout and "--seed" in r.stdout, script
        tree = ast.parse((ROOT / script).read_text())
        flags = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "flag"]
        assert flags and all(len(n.args) >= 3 for n in flags), f"{script}: a flag without a why"


def test_the_readmes_commands_and_flags_exist(helps):
    commands = re.findall(r"python ((?:tests/bench/)?\w+\.py)((?: +[^\s`|#]+)*)", README)
    assert any(c[0] == "dt_cheetah.py" for c in commands)
    for script, flags in commands:
        assert (ROOT / script).exists(), script
        said = helps[script].stdout if script in helps else (ROOT / script).read_text()
        for flag in re.findall(r"--(?:no-)?([a-z_0-9]+)", flags):
            assert re.search(rf"\b{flag}\b", said), f"{script} has no --{flag}"
    # a flag that stands by itself is one of some script's, of some benchmark's, or of the tools that README names
    known = "".join(r.stdout for r in helps.values()) + "".join(p.read_text() for p in (ROOT / "tests/bench").glob("*.py"))
    others = {"index", "hypothesis", "nproc_per_node"}                     # pip's --index-url, pytest's, torchrun's
    for flag in set(re.findall(r"--(?:no-)?([a-z][a-z_0-9]+)", README)) - others:
        assert re.search(rf"\b{flag}\b", known), f"README names --{flag}, which nothing takes"


def test_the_two_set_up_lines():
    lines = [line.strip() for line in README.splitlines()]
    assert "pip install -r requirements.txt && python dt_cheetah.py --target_rew 1200" in lines
    assert "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest tests" in lines


def test_the_readmes_line_counts():
    counts = re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README)
    assert sorted(s for s, _ in counts) == SCRIPTS
    for script, n in counts:
        assert int(n) == len((ROOT / script).read_text().splitlines()), script


def test_no_file_outgrows_a_sitting():
    """600 lines are as many as one reads at once; lora_llama.py has a family of models and its formats to tell of, and common.py no idea."""
    for file in [*SCRIPTS, "common.py"]:
        most = 800 if file == "lora_llama.py" else 600
        assert len((ROOT / file).read_text().splitlines()) <= most, f"{file}: cut a feature, not the comments"
    said = re.search(r"`common\.py` \((\d+) lines\)", README)
    assert int(said[1]) == len((ROOT / "common.py").read_text().splitlines())


def test_the_readmes_pictures_are_there_and_small():
    assets = re.findall(r"\]\((assets/[^)]+)\)", README)
    assert assets and all((ROOT / a).exists() for a in assets)
    assert sum(p.stat().st_size for p in (ROOT / "assets").iterdir()) < 2_000_000


def test_no_script_imports_another():
    names = {s[:-3] for s in SCRIPTS}
    for script in [*SCRIPTS, "common.py"]:
        for node in ast.walk(ast.parse((ROOT / script).read_text())):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not names & set(imported), script


def test_common_comes_before_torch():
    """It sets how torch's threads wait for each other, which torch asks but once."""
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        assert "\nimport torch\n" not in text or text.index("\nimport common") < text.index("\nimport torch\n"), script
    text = (ROOT / "common.py").read_text()
    assert text.index("GOMP_SPINCOUNT") < text.index("\nimport torch\n")


def test_importing_a_script_runs_nothing(tmp_path):
    for script in SCRIPTS:
        r = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script[:-3]}"],
                           cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert r.returncode == 0 and not r.stdout and not r.stderr and not list(tmp_path.iterdir()), r.stderr


def test_no_number_is_taken_blindly(monkeypatch, capsys):
    """Every number that a flag takes has a range; what is outside, or no number, gets a sentence that names the flag."""
    built, Flags = [], common.Flags
    monkeypatch.setattr(common, "Flags", lambda doc: built.append(Flags(doc)) or built[-1])
    for script in SCRIPTS:
        get_args = importlib.import_module(script[:-3]).get_args
        get_args([])
        ranges = dict(built[-1].ranges)
        assert "seed" in ranges and len(ranges) >= 10
        for name, (low, high) in ranges.items():
            for x in ("nan", "inf", f"{low - 1:.0f}", f"{2 * high + 1:.0f}"):
                with pytest.raises(SystemExit) as e:
                    get_args([f"--{name}={x}"])
                said = capsys.readouterr().err
                assert e.value.code == 2 and said.count("\n") == 1 and f"--{name}" in said, (script, name, x, said)


def test_requirements_are_pinned():
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line.strip() and not line.startswith("#"):
                assert re.fullmatch(r"[\w.\-]+(\[\w+\])?==[\w.]+", line.strip()), line
