"""The typed, validated settings of a run; every default and every bound stands here and nowhere else."""

import re
from typing import Annotated, Literal

from pydantic import Field, Strict, WrapValidator, field_validator, model_validator

from agwm_jax.section import Section as Section
from agwm_jax.section import one_fault, refuse
from agwm_jax.settings.hypergradient import Hypergradient, Iteration, Unrolled
from agwm_jax.settings.task import AgreementTask, Task

MIXED_KERNELS = r"encoder\.layers\.(query|key|value|attention_output|intermediate|output)\.kernel|pooler\.kernel"


class Model(Section):
    path: str = Field(default="minilm", min_length=1, description="minilm, a local Hugging Face folder, or a hub id")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")
    pooling: Literal["cls", "mean"] | None = Field(
        default=None, description="sentence vector; null: as the folder says, else cls"
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="dropout rate; null: the checkpoint's own")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute type; weights are float32 always"
    )
    unroll_layers: int = Field(
        default=1, ge=1, description="layers an iteration of the scan over layers; more compiles longer"
    )
    fuse_attention: bool = Field(
        default=True,
        description="cuDNN's fused attention where it serves: one CUDA device, bfloat16, no attention dropout, no "
        "products with second derivatives; false: never",
    )


class Data(Section):
    max_length: int = Field(default=128, ge=8, description="longest text in tokens; what is longer is cut")
    pad_to: Annotated[Annotated[float, Field(gt=0, le=1)] | Literal["longest"], WrapValidator(one_fault)] = Field(
        default="longest", description="pad to the longest text, or this quantile of lengths (longer ones are cut)"
    )
    batch_size: int = Field(default=16, ge=1, description="examples a training step")
    eval_batch_size: int = Field(default=64, ge=1, description="examples a batch when scoring")


class Method(Section):
    name: Literal["agwm", "vanilla", "frozen_alpha"] = Field(default="agwm", description="fine-tuning method")


class Mixup(Section):
    mixed: str = Field(
        default=MIXED_KERNELS, description="regular expression for the paths of the mixed weights (whole path)"
    )
    frozen: str | None = Field(
        default=None, description="regular expression for the paths that are never trained (whole path)"
    )
    rank: Annotated[Annotated[int, Field(ge=1)] | Literal["full"], WrapValidator(one_fault)] = Field(
        default=1, description="rank of alpha's factors; full: alpha is the matrix A itself"
    )
    noise: float = Field(default=0.005, ge=0, description="standard deviation of alpha's start around 1")
    complement: Literal["convex", "factored"] = Field(
        default="convex",
        description="weight of the pretrained side: 1 - A, or (1-left)@(1-right) as in the authors' code",
    )

    @field_validator("mixed", "frozen")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _factored_is_rank_1(self):
        clash = self.complement == "factored" and self.rank != 1
        refuse((clash, f"rank: got {self.rank}; allowed: 1, the only rank that complement factored is defined for"))
        return self


class OptimizerConfig(Section):
    """AdamW with warm-up, a schedule, and a clip of the gradient's global norm."""

    learning_rate: float = Field(default=2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay (not on biases and layer norms)"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after warm-up, to 0")
    warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="share of all steps that warms up from 0")
    gradient_clip: float | None = Field(
        default=1.0, gt=0, description="largest global norm of the gradient, null for no clip"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's first moment")
    b2: float = Field(default=0.999, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(default=1e-8, ge=1e-15, description="added to Adam's denominator")


class InnerOptimizer(OptimizerConfig):
    gradient_clip: float | None = Field(
        default=5.0, gt=0, description="largest global norm of the gradient, null for no clip"
    )


class OuterOptimizer(OptimizerConfig):
    learning_rate: float = Field(default=2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="cosine", description="decay after warm-up, to 0")
    gradient_clip: float | None = Field(
        default=None, gt=0, description="largest global norm of the gradient, null for no clip"
    )


class Search(Section):
    epochs: int = Field(default=3, ge=1, description="passes over the training part of a split")
    num_splits: int = Field(
        default=1, ge=1, description="searches on random splits whose results are averaged (paper: 5)"
    )
    average: Literal["all", "alpha"] = Field(
        default="all", description="hand on the average of alpha and W, or of alpha alone"
    )
    validation_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of the training set that alpha is fitted on"
    )
    inner_steps: int = Field(default=1, ge=1, description="updates of W for one of alpha")
    rollback: bool = Field(
        default=True, description="take the kept inner updates anew with the new alpha (costs inner_steps passes)"
    )
    anchor: float = Field(
        default=0.0, ge=0, description="anchor/2 |W - W0|^2 in the inner loss; 0 makes alpha unidentifiable"
    )
    inner: InnerOptimizer = Field(default=InnerOptimizer(), description="optimiser of the task weights W")
    outer: OuterOptimizer = Field(default=OuterOptimizer(), description="optimiser of alpha")


class Finetune(Section):
    epochs: int = Field(default=3, ge=1, description="passes over the whole training set, alpha frozen")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="optimiser of the task weights W")


class Mesh(Section):
    """How many devices share the work, and how; the result is the same on every mesh, to rounding."""

    data: Annotated[Annotated[int, Field(ge=1)] | Literal["all"], WrapValidator(one_fault)] = Field(
        default=1, description="devices that share the examples of a batch; all: those that are left"
    )
    model: int = Field(default=1, ge=1, description="devices that share every kernel; divides the attention heads")
    seed: int = Field(default=1, ge=1, description="devices that share the runs that go side by side")
    fully_sharded: bool = Field(
        default=False, description="cut weights and optimiser states over data too (FSDP): less memory, more traffic"
    )


Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Run(Section):
    seed: Seed = Field(default=0, description="seed of everything drawn by the run (short: --seed)")
    seeds: Annotated[tuple[Seed, ...], Strict(False), Field(min_length=1)] | None = Field(
        default=None,
        description="several runs, one a seed, each in a folder seed-N of output; null: run.seed (short: --seeds)",
    )
    vectorize: Literal["auto", "all", "seeds", "splits", "none"] = Field(
        default="auto",
        description="what goes side by side in one program: seeds, the searches on different splits, all of both, or "
        "none; auto: as much as the memory takes",
    )
    output: str = Field(default="runs/agwm", min_length=1, description="folder of the run (short: --output)")
    chunk_steps: int = Field(default=10, ge=1, description="steps per call of the device: progress and Ctrl-C go by it")
    checkpoint_steps: int = Field(
        default=50, ge=0, description="steps between checkpoints, 0: at the end of a phase only"
    )
    keep_checkpoints: int = Field(
        default=2, ge=2, description="newest checkpoints kept; the one before is the fallback"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard events too")
    compilation_cache: str | None = Field(
        default="~/.cache/agwm_jax/xla", description="folder of compiled programs, null for none"
    )
    save_weights: bool = Field(default=True, description="keep the final task weights in the run folder")
    export: bool = Field(default=False, description="write the merged Hugging Face folder at the end")

    @model_validator(mode="after")
    def _fits_together(self):
        seeds = self.seeds or ()
        refuse(
            (self.export and not self.save_weights, "export: needs save_weights true"),
            (len(set(seeds)) < len(seeds), f"seeds: got {list(seeds)}; a seed may occur once"),
        )
        return self


class Config(Section):
    task: Task = Field(default=AgreementTask(), description="what to learn")
    model: Model = Field(default=Model(), description="the pretrained encoder")
    data: Data = Field(default=Data(), description="tokens and batches")
    method: Method = Field(default=Method(), description="how to fine-tune")
    mixup: Mixup = Field(default=Mixup(), description="which weights are mixed, and how")
    search: Search = Field(default=Search(), description="the bi-level search for alpha")
    hypergradient: Hypergradient = Field(default=Unrolled(), description="alpha's gradient in the search")
    finetune: Finetune = Field(default=Finetune(), description="training with alpha frozen")
    mesh: Mesh = Field(default=Mesh(), description="the devices, and what each holds")
    run: Run = Field(default=Run(), description="seed, folder, checkpoints")

    @model_validator(mode="after")
    def _estimator_fits_the_look_ahead(self):
        estimator, steps = self.hypergradient, self.search.inner_steps
        num_steps = estimator.num_steps if isinstance(estimator, Unrolled) else None
        refuse(
            (
                num_steps is not None and num_steps > steps,
                f"hypergradient.num_steps: got {num_steps}; allowed: null, or at most search.inner_steps ({steps})",
            ),
            (
                isinstance(estimator, Iteration) and estimator.resample and steps == 1,
                "hypergradient.resample: got true; needs search.inner_steps above 1, whose batches it takes in turn",
            ),
        )
        return self
