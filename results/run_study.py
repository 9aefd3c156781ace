"""Make the runs of the study whose results/NAME.json is missing; stopped ones continue.

    python results/run_study.py --weights WEIGHTS --data-dir GLUE --only "sst2*"
    python results/run_study.py --weights WEIGHTS --data-dir GLUE --check cola-50
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULTS = Path(__file__).parent
sys.path.insert(0, str(RESULTS.parent))
from data import UserError, one_line_errors, write_text

BOTH, RIVALS, ALL = "smartbert bert", "deebert fastbert pabee berxit", (50, 51, 52)
PARTS = "no-contrast soft no-skipping bias0"
STUDY = [   # task, encoder, learning rate, kinds of runs, seeds
    ("sst2", "gte-small", "1e-4", BOTH, ALL), ("sst2", "gte-small", "1e-4", RIVALS, [50]),
    ("mnli", "e5-small", "1e-4", BOTH, ALL), ("mnli", "e5-small", "1e-4", RIVALS, [50]),
    ("qnli", "e5-small", "1e-4", BOTH, ALL),
    ("cola", "gte-small", "1e-4", f"{BOTH} {RIVALS} {PARTS}", ALL),
    ("rte", "e5-small", "5e-5", f"{BOTH} {RIVALS} {PARTS}", ALL),
    ("mrpc", "e5-small", "1e-4", f"{BOTH} {RIVALS} no-contrast", ALL),
]
RIVAL, FROM = "results/rivals.py --method", "--from-run {bert}"     # BERT with the same seed
KINDS = {   # script and flags
    "smartbert": "train.py", "bert": "train.py --method bert",
    "deebert": f"{RIVAL} deebert {FROM}", "fastbert": f"{RIVAL} fastbert {FROM}",
    "pabee": f"{RIVAL} pabee", "berxit": f"{RIVAL} berxit",
    "no-contrast": "train.py --eta1 0 --eta2 0", "soft": "train.py --soft-epochs 8",
    "no-skipping": "train.py --method exits", "bias0": "train.py --gate-bias 0 --gates-from 0"}
COMMANDS = {}       # name -> the command that trains it; cola-50 is SmartBERT's
for task, encoder, rate, kinds, seeds in STUDY:
    for kind in kinds.split():
        for seed in seeds:
            script = KINDS[kind].replace("{bert}", f"{{runs}}/{task}-bert-{seed}")
            COMMANDS[f"{task}-{kind}-{seed}".replace("-smartbert", "")] = (
                f"{script} --task {task} --weights {{weights}}/{encoder} --data-dir {{data_dir}} "
                f"--lr {rate} --bf16 --seed {seed} --out {{folder}} --resume")
LOCKS = defaultdict(threading.Lock)     # two runs that need the same BERT train it once


def make(name, command, asked):
    """Train and evaluate a run, unless it is there; returns its eval.json. Raises UserError."""
    folder, log = asked.runs / name, asked.runs / f"{name}.log"
    with LOCKS[name]:
        if (folder / "eval.json").is_file():
            return (folder / "eval.json").read_text()
        for bert in re.findall("{runs}/(.*?) ", command):
            make(bert, COMMANDS[bert], asked)
        start, evaluate = time.monotonic(), "eval.py {folder} --repeats 0"
        if "pabee" in command:
            evaluate = "results/criteria.py {folder} --criterion patience"
        with open(log, "a", encoding="utf-8") as file:
            for line in command, evaluate:
                script, *words = [w.format(**vars(asked), folder=folder) for w in line.split()]
                words = [sys.executable, Path(__file__).parent.parent / script, *words]
                if subprocess.run(words, stdout=file, stderr=file).returncode != 0:
                    raise UserError(f"{name} failed: {log} says why")
            print(f"took {time.monotonic() - start:.0f} s", file=file)
    return (folder / "eval.json").read_text()


def check(name, asked):
    """Train a stored row again, compare it with the stored seeds, and move its folder aside."""
    def chosen(result):
        return {r["mode"]: r for r in result["rows"] if r["chosen"] or r["threshold"] is None}
    stored = [chosen(json.loads(p.read_text())) for p in RESULTS.glob(f"{name[:-3]}-5?.json")]
    if len(stored) < 2:
        raise UserError(f"{name}: of fewer than two stored seeds there is no spread")
    for mode, row in chosen(json.loads(make(f"check-{name}", COMMANDS[name], asked))).items():
        for value in "score", "flops":
            known = [modes[mode][value] for modes in stored if mode in modes]
            mean, spread = statistics.mean(known), statistics.stdev(known)
            verdict = "in" if abs(row[value] - mean) <= 2 * spread else "NOT in"
            print(mode, value, f"{row[value]:.3f} {verdict} {mean:.3f} +- {2 * spread:.3f}")
    os.rename(asked.runs / f"check-{name}", asked.runs / f"checked-{name}-{int(time.time())}")


def main(arguments=sys.argv[1:]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", required=True, help="folder with gte-small and e5-small")
    add("--data-dir", required=True, help="GLUE's folder")
    add("--runs", default="runs/study", type=Path, help="where runs and logs are kept")
    add("--only", default="*", help="names of runs, such as 'sst2*'")
    add("--jobs", default=2, type=int, choices=range(1, 9), help="runs at once, one thread each")
    add("--check", choices=COMMANDS, metavar="NAME", help="make it once more, and compare")
    asked = parser.parse_args(arguments)
    asked.runs.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    missing = [name for name in COMMANDS
               if Path(name).match(asked.only) and not (RESULTS / f"{name}.json").is_file()]
    with one_line_errors("run_study.py"):
        if asked.check:
            return check(asked.check, asked)
        took = {}                               # name without seed -> seconds
        for log in asked.runs.glob("*-5?.log"):
            for number in re.findall(r"^took (\d+) s", log.read_text(), re.MULTILINE):
                took[log.stem[:-3]] = int(number)
        times = [took[name[:-3]] for name in missing if name[:-3] in took]
        print(len(missing), "runs are missing:", *missing, f"\nby the logs, {len(times)} of them "
              f"will take {sum(times) / asked.jobs / 3600:.1f} hours", flush=True)
        with ThreadPoolExecutor(asked.jobs) as pool:
            files = pool.map(lambda name: make(name, COMMANDS[name], asked), missing)
            for name, content in zip(missing, files):
                write_text(RESULTS / f"{name}.json", content)


if __name__ == "__main__":
    main()
