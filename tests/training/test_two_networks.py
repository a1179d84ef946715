"""A training whose experts are divided among two network namespaces, with addresses of their own and one cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ktverify.training.config import TrainConfig
from ktverify.training.run import run
from ktverify.training.tiny import make_tiny
from tests.support import ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
STEPS = 4
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29511


def ip(*words: str) -> str:
    """What `ip` prints. CalledProcessError where it refuses."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, and the end of the cable in each."""

    names: tuple[str, str]
    cables: tuple[str, str]

    def places(self) -> list[tuple[list[str], dict[str, str]]]:
        """Of each rank, as `ranks.two_commands` takes it: a machine of its own."""
        return [
            (["ip", "netns", "exec", name], {"LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": cable})
            for name, cable in zip(self.names, self.cables, strict=True)
        ]

    def sent(self, rank: int) -> int:
        """Bytes that left a namespace through the cable."""
        place = f"/sys/class/net/{self.cables[rank]}/statistics/tx_bytes"
        return int(ip("netns", "exec", self.names[rank], "cat", place))


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no command ip")
    names, cables = ((f"kt{os.getpid()}{kind}{end}" for end in "ab") for kind in "nv")
    found = Hosts(tuple(names), tuple(cables))  # type: ignore[arg-type]
    try:
        try:
            for name in found.names:
                ip("netns", "add", name)
            ip("link", "add", found.cables[0], "type", "veth", "peer", "name", found.cables[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        for name, cable, address in zip(found.names, found.cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            for each in (cable, "lo"):
                ip("-n", name, "link", "set", each, "up")
        yield found
    finally:
        for name in found.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def keys(folder: Path, base: Path, name: str, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_name_or_path": str(base),
        "output_dir": str(folder / name),
        "dataset": "alpaca_tiny",
    }
    found |= {"cutoff_len": 48, "kt_num_threads": 1, "max_steps": STEPS, "logging_steps": 1, "save_steps": 100}
    return {**found, "per_device_train_batch_size": 3, "kt_ep": True, **more}


def losses_in(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "loss.jsonl").read_text().splitlines()]


def test_two_networks_have_the_steps_of_one_process_and_end_when_the_cable_is_cut(hosts: Hosts, tmp_path: Path) -> None:
    base = make_tiny("deepseek_v3", tmp_path / "base")
    run(TrainConfig.model_validate(keys(tmp_path, base, "one", per_device_train_batch_size=6, kt_ep=False)), Path())
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(keys(tmp_path, base, "two")))
    with ranks.two_commands(config, PORT, ADDRESSES[0], hosts.places()) as processes:
        said = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    pairs = list(zip(losses_in(tmp_path / "two"), losses_in(tmp_path / "one"), strict=True))
    assert len(pairs) == STEPS
    assert all(abs(mine / theirs - 1) <= 0.005 for mine, theirs in pairs), pairs
    assert min(hosts.sent(0), hosts.sent(1)) > 100_000

    config.write_text(yaml.safe_dump(keys(tmp_path, base, "cut", max_steps=10**6, kt_ep_timeout=10)))
    with ranks.two_commands(config, PORT, ADDRESSES[0], hosts.places()) as processes:
        ranks.wait_for_a_step(tmp_path / "cut")
        ip("-n", hosts.names[0], "link", "set", hosts.cables[0], "down")
        ends = [process.communicate(timeout=120)[1] for process in processes]
    for rank, (process, text) in enumerate(zip(processes, ends, strict=True)):
        assert process.returncode == 2, text
        assert text.count(f"rank {rank} of 2 stops: another rank ended or gave no answer in time") == 1
        assert "Traceback" not in text
