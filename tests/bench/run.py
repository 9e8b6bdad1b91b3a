"""All benchmarks, one after the other, and one table of ratios against the peers: python tests/bench/run.py [names]

names: dt bounce ppo pythia rag llama selfinstruct; all of them if none is given. Run it on a quiet machine: each pair is measured in turns,
but two jobs at once spoil both. Ratios are ours over the peer's, median and spread over the turns.
"""
import os, pathlib, platform, re, subprocess, sys, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
NAMES = "dt bounce ppo pythia rag llama selfinstruct".split()


def main():
    names = sys.argv[1:] or NAMES
    if unknown := set(names) - set(NAMES):
        raise SystemExit(f"no benchmark is called {', '.join(unknown)}; there are {' '.join(NAMES)}")
    table = []
    with tempfile.TemporaryDirectory() as folder:               # what they write, and the cheetah's episodes, go here
        for name in names:
            began = time.time()
            p = subprocess.Popen([sys.executable, HERE / f"bench_{name}.py"], cwd=folder, stdout=subprocess.PIPE, text=True,
                                 env=dict(os.environ, PYTHONUNBUFFERED="1"))
            title = ""
            for line in p.stdout:
                print(line, end="", flush=True)
                found = re.search(r"([\d.]+)(?:x| times)(?: as fast)?(?: \(([\d.]+)-([\d.]+))?", line)
                if found:
                    what = f"{title} {line[:found.start()]}" if line.startswith(" ") else line[:found.start()]      # indented: part of what stands above
                    table.append((name, " ".join(what.split())[:90], *found.groups()))
                title = line.strip() if not found and not line.startswith(" ") else title
            if p.wait():
                table.append((name, f"FAILED with status {p.returncode}", "", None, None))
            print(f"--- {name}: {time.time() - began:.0f} s\n", flush=True)
    cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "") if os.path.exists("/proc/cpuinfo") else ""
    print(f"{cpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores\n")
    for name, what, ratio, low, high in table:
        print(f"{name:13s}{what:92s}{ratio:>7}x" + (f"  ({low}-{high})" if low else ""))


if __name__ == "__main__":
    main()
