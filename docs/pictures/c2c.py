"""Remakes the pictures of docs/c2c.md: `python docs/pictures/c2c.py`.

Input: none; it makes two tiny models and times them in a temporary folder. Output: c2c_*.png beside this file,
what the commands print as a terminal would show it. A few colours are enough for each: together they stay below 100 kB.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ktverify.system.files import write_whole

HERE = Path(__file__).resolve().parent
COLOURS, GREYS = 48, 8
INK, GROUND = "#dfe3e7", "#20242a"
WORDS = ("why", "how", "sky", "blue", "water", "cache", "model", "tensor", "memory", "fast", "slow", "many", "explain")
PAIR = ("--base_model", "tiny/base", "--teacher_model", "tiny/teacher")
TEACHER = "hidden_size=104,num_hidden_layers=3,num_attention_heads=6,num_key_value_heads=3,head_dim=24,vocab_size=448"


def run(folder: Path, *arguments: str) -> str:
    """What a command prints on standard output."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "ktverify", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def save(name: str, picture: Image.Image, colours: int = COLOURS) -> None:
    stream = io.BytesIO()
    picture.convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE).save(stream, format="png", optimize=True)
    path = write_whole(HERE / f"c2c_{name}.png", stream.getvalue())
    print(f"{path.name}: {path.stat().st_size / 1024:.1f} KiB")


def terminal(text: str) -> Image.Image:
    """Text in the letters and on the ground of a terminal."""
    lines = text.rstrip().splitlines()
    wide, high = max(map(len, lines)), len(lines)
    page = Figure(figsize=(0.068 * wide + 0.3, 0.139 * high + 0.2), dpi=110, facecolor=GROUND)
    style = {"family": "monospace", "fontsize": 8, "color": INK, "linespacing": 1.24, "parse_math": False}
    page.text(0.15 / page.get_figwidth(), 1 - 0.1 / page.get_figheight(), "\n".join(lines), va="top", **style)
    stream = io.BytesIO()
    page.savefig(stream, format="png")
    return Image.open(stream)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(folder, "make-tiny", "qwen3", "--out", "tiny/base")
        run(folder, "make-tiny", "qwen3", "--out", "tiny/teacher", "--seed", "1", "--sizes", TEACHER)
        prompts = [" ".join(WORDS[(7 * n + 5 * k) % len(WORDS)] for k in range(3 + 13 * n % 30)) for n in range(60)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{text}?"}) + "\n" for text in prompts))
        bench = ("bench", "c2c")
        single = run(folder, *bench, "single", *PAIR, "--max_new_tokens", "24", "--output", "single.jsonl")
        save("single", terminal(single), GREYS)
        save("timeline", Image.open(folder / "single.png"))
        save("tsv", terminal(tsv((folder / "single.operators.tsv").read_text(encoding="utf-8"))), GREYS)
        given = ("--dataset_file", "prompts.jsonl", "--max_new_tokens", "12", "--output", "timing.jsonl")
        run(folder, *bench, "dataset", *PAIR, *given)
        save("analyze", terminal(run(folder, "bench", "analyze", "timing.jsonl")), GREYS)
        save("histogram", Image.open(folder / "timing.analysis.png"))


def tsv(text: str, rows: int = 6) -> str:
    """The first rows, tabs as a terminal sets them."""
    cells = [line.split("\t") for line in text.splitlines()[:rows]]
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    return "\n".join("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


if __name__ == "__main__":
    main()
