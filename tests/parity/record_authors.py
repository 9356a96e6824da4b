"""Writes tests/methods/authors_recorded.json, what the authors' algorithm did to a two-layer model in float64.

Needs betty-ml 0.2.0, transformers 4.24.0 and PyTorch (1.11 is pinned by the authors; recorded with 2.13):
    python tests/parity/record_authors.py

The training loop is Betty's and both optimisers are those of the libraries. "as_run" is Betty as it was released;
"meant" mends two lines of it: W goes back to the middle after a finite difference, and rolls back to a copy.
"""

import copy
import inspect
import json
import math
from pathlib import Path

import betty.hypergradient
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import AdamW

WIDTH, CLASSES, BATCH, ROWS, LAYERS = 5, 3, 4, 24, 2
SEARCH_STEPS, FINETUNE_STEPS = 8, 6
RATE, OUTER_RATE, WARMUP, OUTER_WARMUP, CLIP, FINETUNE_CLIP, DECAY = 2e-2, 5e-2, 0.25, 0.28, 0.5, 0.3, 0.1


class Mixed(torch.nn.Module):
    """A layer of kernel ``left @ right * W + (1 - left) @ (1 - right) * W0``; W0 has a gradient, as theirs has."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.fixed = torch.nn.Parameter(self.linear.weight.detach().clone())
        self.alpha = torch.nn.ParameterList(
            [torch.nn.Parameter(1 + 0.05 * torch.randn(shape)) for shape in ((WIDTH, 1), (1, WIDTH))]
        )

    def forward(self, x):
        left, right = self.alpha
        kernel = (left @ right) * self.linear.weight + ((1 - left) @ (1 - right)) * self.fixed
        return x @ kernel.T + self.linear.bias


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Mixed() for _ in range(LAYERS)])
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.classifier = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.classifier(self.norm(x))

    def alphas(self):
        return [p for name, p in self.named_parameters() if "alpha" in name]

    def weights(self):
        return [(n, p) for n, p in self.named_parameters() if "alpha" not in n and "fixed" not in n]

    def groups(self):
        plain = [name for name, _ in self.weights() if "bias" in name or "norm" in name]
        return [
            {"params": [p for n, p in self.weights() if n not in plain], "weight_decay": DECAY},
            {"params": [p for n, p in self.weights() if n in plain], "weight_decay": 0.0},
        ]

    def clamp(self):
        for p in self.alphas():
            p.data.clamp_(0, 1)

    def as_ours(self) -> dict:
        """Kernels [in, out], stacked over layers."""

        def stacked(leaves):
            return torch.stack(list(leaves)).detach().tolist()

        return {
            "task": {
                "encoder.layers.query.kernel": stacked(layer.linear.weight.T for layer in self.layers),
                "encoder.layers.query.bias": stacked(layer.linear.bias for layer in self.layers),
                "pooler.norm.scale": self.norm.weight.tolist(),
                "pooler.norm.bias": self.norm.bias.tolist(),
                "classifier.kernel": self.classifier.weight.T.tolist(),
                "classifier.bias": self.classifier.bias.tolist(),
            },
            "left": stacked(layer.alpha[1].T for layer in self.layers),
            "right": stacked(layer.alpha[0].T for layer in self.layers),
        }


class TorchAdamW(torch.optim.AdamW):
    """Betty makes it anew from its defaults, of which newer versions have one that they do not take."""

    def __init__(self, params, *, decoupled_weight_decay=True, **options):
        super().__init__(params, **options)


class Mended(ImplicitProblem):
    """Rolls back to copies."""

    def cache_states(self):
        self._copies = [p.detach().clone() for p in self.trainable_parameters()]
        self._moments = copy.deepcopy(self.optimizer.state_dict())

    def recover_states(self):
        for p, was in zip(self.trainable_parameters(), self._copies, strict=True):
            p.data.copy_(was)
        self.optimizer.load_state_dict(self._moments)


def mended_darts():
    """Betty's finite difference with the underscore that it lacks."""
    source = inspect.getsource(inspect.getmodule(RELEASED_DARTS))
    scope: dict = {}
    exec(source.replace("p.data.add(v.data, alpha=eps)", "p.data.add_(v.data, alpha=eps)"), scope)
    return scope["darts"]


RELEASED_DARTS = betty.hypergradient.jvp_fn_mapping["darts"]


def linear(steps, warmup):
    return lambda t: t / max(1, warmup) if t < warmup else max(0.0, (steps - t) / max(1, steps - warmup))


def cosine(steps, warmup):
    def factor(t):
        done = (t - warmup) / max(1, steps - warmup)
        return t / max(1, warmup) if t < warmup else max(0.0, 0.5 * (1 + math.cos(math.pi * done)))

    return factor


def record(mode: str) -> dict:
    torch.manual_seed(1)
    net, x, y = Net(), torch.randn(ROWS, WIDTH), torch.randint(0, CLASSES, (ROWS,))
    batches = [(x[i : i + BATCH], y[i : i + BATCH]) for i in range(0, ROWS, BATCH)]
    net.clamp()
    found = {"x": x.tolist(), "y": y.tolist(), "first": net.as_ours(), "search": [], "finetune": []}

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            net.clamp()
            return cross_entropy(self.inner(batch[0]), batch[1])

        def trainable_parameters(self):
            return net.alphas()

        def param_groups(self):
            return [{"params": net.alphas(), "weight_decay": 0.0}]

    class Inner(ImplicitProblem if mode == "as_run" else Mended):
        def training_step(self, batch):
            net.clamp()
            return cross_entropy(self.outer(batch[0]), batch[1])

        def trainable_parameters(self):
            return [p for _, p in net.weights()]

        def param_groups(self):
            return net.groups()

    class Recorder(Engine):
        def train_step(self):
            super().train_step()
            net.clamp()
            found["search"].append(net.as_ours())

    betty.hypergradient.jvp_fn_mapping["darts"] = RELEASED_DARTS if mode == "as_run" else mended_darts()
    inner_tx = AdamW(net.groups(), lr=RATE, eps=1e-8)
    outer_tx = TorchAdamW(net.alphas(), lr=OUTER_RATE, weight_decay=0.0)
    outer = Outer(
        name="outer",
        module=net,
        optimizer=outer_tx,
        scheduler=LambdaLR(outer_tx, cosine(SEARCH_STEPS, SEARCH_STEPS * OUTER_WARMUP)),
        train_data_loader=batches[4:],
        config=Config(type="darts", retain_graph=True, first_order=True),
        device="cpu",
    )
    inner = Inner(
        name="inner",
        module=net,
        optimizer=inner_tx,
        scheduler=LambdaLR(inner_tx, linear(SEARCH_STEPS, SEARCH_STEPS * WARMUP // 1)),
        train_data_loader=batches[:4],
        config=Config(type="darts", unroll_steps=1, darts_preconditioned=mode == "as_run", gradient_clipping=CLIP),
        device="cpu",
    )
    dependencies = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
    engine = EngineConfig(train_iters=SEARCH_STEPS, valid_step=10**9, roll_back=True)
    Recorder(config=engine, problems=[outer, inner], dependencies=dependencies).run()

    tx = torch.optim.AdamW(net.groups(), lr=RATE)
    scheduler = LambdaLR(tx, linear(FINETUNE_STEPS, math.ceil(FINETUNE_STEPS * WARMUP)))
    for batch in batches[:FINETUNE_STEPS]:
        net.zero_grad()
        cross_entropy(net(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), FINETUNE_CLIP)
        tx.step()
        scheduler.step()
        found["finetune"].append(net.as_ours())
    return found


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    runs = {mode: record(mode) for mode in ("meant", "as_run")}
    shared = {name: runs["meant"][name] for name in ("x", "y", "first")}
    kept = {"search": (0, 1, SEARCH_STEPS - 1), "finetune": (0, FINETUNE_STEPS - 1)}
    states = {
        mode: {stage: {step: run[stage][step] for step in steps} for stage, steps in kept.items()}
        for mode, run in runs.items()
    }
    path = Path(__file__).parents[1] / "methods" / "authors_recorded.json"
    path.write_text(json.dumps({**shared, **states}) + "\n", encoding="utf-8")
