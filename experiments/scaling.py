"""What larger models need of devices, from programs that are compiled for shapes and never run: docs/scaling.md.

    python experiments/scaling.py --output runs/scaling                   # all models; 6 minutes on 2 cores
    python experiments/scaling.py --models '110 M' --output runs/scaling  # 2 minutes

Writes scaling.csv and the table scaling.md. Meshes are of fake CPU devices: the figures are the CPU compiler's, which
computes bfloat16 in float32 and fuses less than that of a GPU or TPU.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

MODELS = {  # layers, width, heads, feed-forward width
    "110 M": (12, 768, 12, 3072),
    "340 M": (24, 1024, 16, 4096),
    "1 B": (36, 1536, 24, 6144),
    "8 B": (40, 4096, 32, 16384),
}
METHODS = {
    "vanilla": {"name": "vanilla"},
    "lora": {"name": "lora"},
    "agwm, first_order": {"name": "agwm", "estimator": {"name": "first_order"}},
    "agwm, unrolled": {"name": "agwm", "estimator": {"name": "unrolled"}},
}
MESHES = {
    "1 device": {"data": 1, "model": 1, "fully_sharded": False},
    "8: data 8": {"data": 8, "model": 1, "fully_sharded": False},
    "8: data 8, fully sharded": {"data": 8, "model": 1, "fully_sharded": True},
    "64: data 32 x model 2, fully sharded": {"data": 32, "model": 2, "fully_sharded": True},
}


def main() -> int:
    """Compile, count, write."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=64".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    from agwm_jax.bench.programs import shape
    from agwm_jax.bench.scaling import markdown, rows
    from agwm_jax.models.family import Options

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    models = {
        name: shape("bert", *MODELS[name], batch=arguments.batch, length=arguments.length) for name in arguments.models
    }
    found = []
    with (arguments.output / "scaling.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "method", "mesh", "stage", "GB a device", "collectives, GB", "compile seconds"])
        for row in rows(models, METHODS, MESHES, Options(remat=arguments.remat)):
            found.append(row)
            exchanged = "; ".join(f"{kind} {size:.3g}" for kind, size in sorted(row.collectives.items()))
            writer.writerow([*row[:4], f"{row.gigabytes:.4g}", exchanged, f"{row.compile_seconds:.0f}"])
            file.flush()
            print(f"{row.model}, {row.method}, {row.mesh}: {row.gigabytes:.3g} GB", file=sys.stderr, flush=True)
    (arguments.output / "scaling.md").write_text(markdown(found))
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
