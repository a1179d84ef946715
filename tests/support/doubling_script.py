"""The script of unruly.Doubling: right up to 11 tokens, doubled above; with 13 it dies, with 14 it gives up."""

import os
import signal
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

path = Path(__file__).with_name("case.safetensors")
with safe_open(path, framework="np") as stored:
    right = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith("expected.")}  # noqa: SIM118
tokens = len(right["expected.output"])
print(f"{tokens} tokens", flush=True)
if tokens == 13:
    os.kill(os.getpid(), signal.SIGSEGV)
if tokens == 14:
    sys.exit("no weights for fourteen")
actual = {name.removeprefix("expected."): array.astype("float32") for name, array in right.items()}
actual["output"] *= 2 if tokens > 11 else 1
save_file(actual, path.with_name("actual.safetensors"))
