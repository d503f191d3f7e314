"""Memory stays flat, however large the file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import resource, sys
from pathlib import Path
from dsft.core.config.schema import TrainConfig
from dsft.core.data.prepare import prepare_data
from dsft.core.data.sources import open_source
from dsft.core.models.source import find_model
from dsft.core.models.tokenizer import load_tokenizer
tokenizer = load_tokenizer(find_model("builtin:tiny/model"))
config = TrainConfig(dataset=sys.argv[1], max_length=2048, template="instruction")
source = open_source(config.dataset, split="train", revision=None)
cache = Path(sys.argv[2])
data = prepare_data(
    config, source, tokenizer.tokenizer, tokenizer_fingerprint="", cache=cache, on_rows=lambda num_rows: None
)
print(data.report.num_used_rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write_large(path: Path, num_bytes: int, text: str) -> int:
    choose = random.Random(0)
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            rows = []
            for _ in range(500):
                start = choose.randrange(len(text) - 4000)
                output = text[start : start + choose.randrange(500, 4000)]
                rows.append(json.dumps({"instruction": f"Go on with {num_rows + len(rows)}.", "output": output}))
            file.write("\n".join(rows) + "\n")
            num_rows += len(rows)
    return num_rows


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, repository: Path):
    text = "".join(path.read_text() for path in sorted((repository / "dsft").rglob("*.py")))
    peaks_mib = []
    for megabytes in (20, 200):
        path = tmp_path / f"{megabytes}.jsonl"
        num_rows = write_large(path, megabytes * 1_000_000, text)
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache")]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        num_used, peak_mib = map(int, done.stdout.split())
        assert num_used > 0.9 * num_rows
        peaks_mib.append(peak_mib)
        path.unlink()
    small, large = peaks_mib
    print(f"peak RSS: {small} MiB for 20 MB, {large} MiB for 200 MB")
    assert large < small + 40, "180 MB more of text may not take even a quarter of that in memory"
