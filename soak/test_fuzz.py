"""The readers, fuzzed: so many inputs for each target, the same ones in every run with the same versions."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz_readers.py")
# A checkpoint has several files to read, and is slower.
RUNS = {
    "header": 200_000,
    "index": 200_000,
    "manifest": 200_000,
    "quantization": 200_000,
    "pickle": 200_000,
    "torch-save": 200_000,
    "checkpoint": 50_000,
}


@pytest.mark.parametrize("target", RUNS)
def test_a_reader_gives_an_object_or_one_line(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python; pip install '.[soak]'")
    # Every input becomes a file, so memory serves better than a disk.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, str(FUZZ), target, f"-runs={RUNS[target]}", "-seed=1"]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = re.findall(r"^Done (\d+) runs in .*$", done.stderr, re.MULTILINE)
    assert int(line) == RUNS[target]
    print(f"{target}: {line} inputs")
