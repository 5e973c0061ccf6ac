"""Reading large files of rows: in columns against record by record, each in a process of its own, in turn.

python -m benchmarks.rows [--rows 500000]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = "the a film plot actor scene very quite rather story it was is and but with of in great fine awful dull".split()
READ = """
import resource, sys, time
from pathlib import Path
from jobs import columns
from jobs.load import load_text
from jobs.rows import load_rows
import pyarrow.json, pyarrow.compute
path, task, way = sys.argv[1:]
if way == "records":
    columns._FEWEST_BYTES = 2**60
text = f"name: x\\ntask: {task}\\nmodel: {{model_name_or_path: asset:minilm-l6}}\\ndata: {{train_file: {path}}}\\n"
job = load_text(text, Path("job.yaml"), ()).job
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
load_rows(job)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.process_time() - began, (after - before) * 1024 / Path(path).stat().st_size)
"""


def write(path: Path, task: str, rows: int) -> None:
    """Write rows of the shape that most files have."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = f"{' '.join(draw.choices(WORDS, k=18))} {number}"
            answer = {"label": draw.choice(["good", "bad"])}
            if task == "generation":
                answer = {"completion": " ".join(draw.choices(WORDS, k=8))}
            file.write(json.dumps({"text" if task == "classification" else "prompt": text} | answer) + "\n")


def main() -> None:
    """Print seconds and memory of both ways, and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for task in ("classification", "generation"):
            path = Path(folder) / f"{task}.jsonl"
            write(path, task, arguments.rows)
            seen: dict[str, list[tuple[float, float]]] = {"columns": [], "records": []}
            for _ in range(arguments.rounds):
                for way, found in seen.items():
                    command = [sys.executable, "-c", READ, str(path), task, way]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    seconds, memory = map(float, done.stdout.split())
                    found.append((seconds, memory))
            middle = {
                way: [statistics.median(part) for part in zip(*found, strict=True)] for way, found in seen.items()
            }
            size = path.stat().st_size / 1e6
            sys.stdout.write(f"{task}: {arguments.rows:,} rows, {size:.0f} MB\n")
            for way, (seconds, memory) in middle.items():
                sys.stdout.write(f"  {way:<8} {seconds:6.1f} CPU s   {memory:.2f} times the file's size\n")
            ratio = [middle["records"][part] / middle["columns"][part] for part in (0, 1)]
            sys.stdout.write(f"  records / columns: {ratio[0]:.1f} in time, {ratio[1]:.1f} in memory\n")


if __name__ == "__main__":
    main()
