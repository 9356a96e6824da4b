"""Kill commands at random moments and give them again: do they end as if nothing had happened? docs/reliability.md.

    python experiments/reliability.py --output runs/reliability  # 20 kills a command; about an hour on 2 cores
    python experiments/reliability.py --kills 2 --only report --output runs/reliability

Writes reliability.md. Needs the checkpoint bert-tiny.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

from agwm_jax.bench.reliability import Command, campaign

CONFIG = ["--config", "configs/agreement.yaml"]
SHORT = ["--model.path", "bert-tiny", "--model.pooling", "mean", "--task.train_size", "96"]
SHORT += ["--run.tensorboard", "false"]
SAVES = ["--run.checkpoint_minutes", "0.005", "--run.chunk_steps", "5"]
STUDY = """
tasks: {agreement: CONFIG}
arms: {vanilla: {finetune.epochs: 20}, frozen_alpha: {finetune.epochs: 20}}
seeds: [0, 1]
"""


def main() -> int:
    """Run the commands once undisturbed, then with kills, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of every command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", nargs="+", help="names of commands")
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there yet")
    options = parser.parse_args()
    options.output.mkdir(parents=True)
    short = [*SHORT, "--run.compilation_cache", str(options.output.absolute() / "xla")]
    runs, study = options.output.absolute() / "finished", options.output.absolute() / "study.yaml"
    study.write_text(STUDY.replace("CONFIG", str(Path("configs/agreement.yaml").absolute())))
    for method in ("vanilla", "agwm"):
        own = ["train", *CONFIG, *short, "--method", method, "--output", str(runs / method)]
        command = [sys.executable, "-m", "agwm_jax", *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def train(method: str, *words: str) -> Command:
        own = ["train", *CONFIG, *short, *SAVES, "--method", method, *words]
        return Command(f"train {method} {' '.join(words)}".strip(), lambda at: [*own, "--output", str(at / "run")])

    commands = [
        train("vanilla", "--finetune.epochs", "100"),
        train("vanilla", "--finetune.epochs", "50", "--seeds", "[0, 1]"),
        train("agwm", "--method.search.epochs", "30"),
        Command("sweep", lambda at: ["sweep", str(study), *short, "--output", str(at / "sweep")]),
        Command("report", lambda at: ["report", str(runs), "--output", str(at / "report")]),
        Command("export", lambda at: ["export", str(runs / "vanilla"), str(at / "exported")]),
    ]
    lines = ["| command | s undisturbed | kills | same in the end |", "| --- | ---: | ---: | ---: |"]
    faults = []
    for number, command in enumerate(commands):
        if options.only and command.name.split()[0] not in options.only:
            continue
        rng = random.Random(f"{options.seed}/{command.name}")
        found = campaign(command, options.output.absolute() / str(number), kills=options.kills, rng=rng)
        lines.append(f"| `{found.name}` | {found.seconds:.0f} | {found.kills} | {found.same} |")
        faults += [f"- `{found.name}`, {fault}" for fault in found.faults]
        print("\n".join([lines[-1], *found.faults]), flush=True)
    (options.output / "reliability.md").write_text("\n".join([*lines, "", *faults]).rstrip() + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
