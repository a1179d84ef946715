"""The script of unruly.Doubling: right up to 11 tokens, doubled above; with 13 it dies, with 14 it gives up."""

import json
import os
import signal
import struct
import sys
from pathlib import Path

from safetensors import safe_open

path = Path(__file__).with_name("case.safetensors")
with safe_open(path, framework="np") as stored:
    right = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith("expected.")}  # noqa: SIM118
tokens = len(right["expected.output"])
print(f"{tokens} tokens", flush=True)
if tokens == 13:
    os.kill(os.getpid(), signal.SIGSEGV)
if tokens == 14:
    sys.exit("no weights for fourteen")
header, content = {}, b""
for key, array in right.items():
    name = key.removeprefix("expected.")
    value = array.astype("float32") * (2 if name == "output" and tokens > 11 else 1)
    wide = name == "grad_weights"
    # numpy has no bf16: the upper half of each fp32 number, rounded
    data = (value if wide else ((value.view("uint32") + 0x8000) >> 16).astype("uint16")).tobytes()
    offsets = [len(content), len(content) + len(data)]
    header[name] = {"dtype": "F32" if wide else "BF16", "shape": list(array.shape), "data_offsets": offsets}
    content += data
described = json.dumps(header).encode()
path.with_name("actual.safetensors").write_bytes(struct.pack("<Q", len(described)) + described + content)
