"""Measure the resident memory of a loaded packed model, above that of a process that only imports.

    python bench/resident.py FOLDER

Prints a row of MB: the checkpoint's files, the process after all imports that loading needs (it loads and runs a model
of two tiny blocks of the same architecture), after loading FOLDER, and after it ran 16 tokens, when its weights are
repacked. Each figure is of a process of its own. The limit is files + 64 MB above the imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import environment, print_table

LIMIT_MB = 64


def main() -> None:
    """Print the row; end with status 1 above the limit."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    with tempfile.TemporaryDirectory() as work:
        _save_tiny(folder, Path(work))
        imports = _resident(Path(work))
        loaded = _resident(folder)
    facts = environment()
    print_table(
        ("files", "imports", "loaded", "after 16 tokens", "above imports", "limit"),
        [[f"{n:.0f}" for n in (files, imports[1], *loaded, loaded[1] - imports[1], files + LIMIT_MB)]],
    )
    print(json.dumps(facts))
    if loaded[1] - imports[1] > files + LIMIT_MB:
        sys.exit(1)


def _save_tiny(folder: Path, out: Path) -> None:
    """Quantize a random model of the same architecture with two tiny blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from subnibble import Recipe, quantize

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "layer_types": None}
    for name, value in {**small, **heads}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, None)
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "dense" / name).write_bytes((folder / name).read_bytes())
    quantize(out / "dense", out / "packed", Recipe(method="rtn", bits=3, group_size=32, embedding_bits=8))
    for file in (out / "packed").iterdir():
        file.rename(out / file.name)


def _resident(folder: Path) -> list[float]:
    """MB of a process after loading a model, and after it ran 16 tokens."""
    code = (
        "import sys, psutil, torch, subnibble\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "size = lambda: psutil.Process().memory_info().rss / 1e6\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "print(size())\n"
        "with torch.inference_mode(): model(torch.arange(1, 17).view(1, 16))\n"
        "print(size())\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr)
    return [float(line) for line in run.stdout.split()]


if __name__ == "__main__":
    main()
