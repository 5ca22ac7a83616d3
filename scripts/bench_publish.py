"""Publish a checkpoint of 1.1 billion bfloat16 parameters (2.2 GB) to ``local_hub.py`` twice, and count the bytes sent.

    .venv/bin/python scripts/bench_publish.py [--xet]

Bytes are those in the bodies of requests, as received by the server, and those that hf_xet stores for it; seconds are
those of the whole command. The server is on the same machine, so a first upload is written to the same disk twice more.
All files are deleted afterwards.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from get_smollm2 import default_folder
from local_hub import LocalHub

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import index_bytes, shard_name
from adaptkit.checkpoint.manifest import Manifest
from adaptkit.checkpoint.writer import TensorWriter
from adaptkit.numerics.spec import TensorSpec

SHARDS, MATRICES, SHAPE = 5, 20, (5632, 1953)


def make_artifact(folder: Path) -> Path:
    """Make a checkpoint of 100 matrices of random bits in five shards, with a manifest."""
    generator = torch.Generator().manual_seed(0)
    with Output(folder, []) as out:
        for number in range(1, SHARDS + 1):
            names = [f"model.layers.{number}.{matrix}.weight" for matrix in range(MATRICES)]
            with TensorWriter(
                out.folder, shard_name(number, SHARDS), [TensorSpec(name, "BF16", SHAPE) for name in sorted(names)]
            ) as writer:
                for name in sorted(names):
                    bits = torch.randint(-(1 << 15), 1 << 15, SHAPE, dtype=torch.int16, generator=generator)
                    writer.write(name, bits.view(torch.bfloat16))
            out.add(writer.record, writer.tensors)
        size = sum(record.size for record in out.files)
        out.write("model.safetensors.index.json", index_bytes([(t.name, t.file) for t in out.tensors], size))
        out.publish(Manifest("checkpoint", {"name": "bench"}, tuple(out.files), tuple(out.tensors)))
    return folder


def publish(artifact: Path, hub: LocalHub, xet: bool) -> None:
    """Run the command and print its bytes and seconds."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(artifact.parent / "home"),
        "TMPDIR": str(artifact.parent),
        "HF_HUB_DISABLE_XET": str(int(not xet)),
        "HF_HUB_OFFLINE": "0",
    }
    before, started = stored_bytes(hub), time.monotonic()
    command = [sys.executable, "-m", "adaptkit.cli.main", "publish", str(artifact), "me/model", "--tag", "v1"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds, received = time.monotonic() - started, stored_bytes(hub) - before
    print(f"{done.stdout.splitlines()[0]:<50} {received:>15,} bytes received {seconds:8.1f} s", flush=True)


def stored_bytes(hub: LocalHub) -> int:
    """Count the bytes that a server received, or that hf_xet stored for it, so far."""
    xorbs = (hub.store.folder / "cas").rglob("default.*")
    return hub.bytes_received + sum(path.stat().st_size for path in xorbs)


def main() -> None:
    """Make the artifact, publish it twice, delete everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xet", action="store_true", help="upload through Xet, not LFS")
    options = parser.parse_args()
    work = default_folder().parent / "bench-publish"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        artifact = make_artifact(work / "artifact")
        total = sum(path.stat().st_size for path in artifact.iterdir())
        road = "Xet" if options.xet else "LFS"
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, {total:,} bytes, {road}")
        with LocalHub(work / "hub") as hub:
            for _ in range(2):
                publish(artifact, hub, options.xet)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
