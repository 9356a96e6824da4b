"""The typed, validated settings of a run; every default and every bound stands here and nowhere else."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, ValidationError

MIXED_KERNELS = r"encoder\.layers\.(query|key|value|attention_output|intermediate|output)\.kernel|pooler\.kernel"


def _one_fault(value: Any, handler) -> Any:
    """Turn pydantic's one-error-per-alternative of a union into a single error."""
    try:
        return handler(value)
    except ValidationError:
        raise PydanticCustomError("no_alternative", "no alternative fits") from None


def _default_tag(name: str, tag: str) -> BeforeValidator:
    """Let a section that does not choose its kind have the default kind."""
    return BeforeValidator(lambda v: {name: tag, **v} if isinstance(v, dict) and name not in v else v)


def _refuse(*cases: tuple[bool, str]) -> None:
    """Raise the cases that hold, faults between settings; each text starts with the name of the one to change."""
    faults = [text for holds, text in cases if holds]
    if faults:
        raise PydanticCustomError("cross_field", "{text}", {"text": "\n".join(faults)})


# YAML has lists and no tuples, so a list is let in where a tuple is kept (a frozen setting must be hashable).
Names = Annotated[tuple[str, ...], Strict(False)]
Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
Metrics = Annotated[tuple[Metric, ...], Strict(False), Field(min_length=1)]
GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


class Section(BaseModel):
    """A group of settings: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class TaskSection(Section):
    train_size: int | None = Field(
        default=None,
        ge=2,
        description="low-resource draw: this many training examples by run.seed, null for all of them",
    )


class AgreementTask(TaskSection):
    """The generated acceptability task; needs no download."""

    source: Literal["agreement"] = Field(default="agreement", description="where the data comes from")
    seed: int = Field(default=0, ge=0, description="seed of the generator; the same seed gives the same bytes")
    pool_size: int = Field(
        default=1200, ge=8, description="training examples to generate, before train_size draws from them"
    )
    validation_size: int = Field(default=400, ge=8, description="validation examples to generate")
    test_size: int = Field(default=800, ge=8, description="test examples to generate")


class GlueTask(TaskSection):
    """A GLUE task by name, from the hub."""

    source: Literal["glue"] = Field(description="where the data comes from")
    name: GlueName = Field(description="name of the GLUE task")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")


class TableTask(TaskSection):
    """What hub and local data have in common: which column is what."""

    text_columns: Names = Field(
        default=("text",), min_length=1, max_length=2, description="the text column, or two for pairs"
    )
    label_column: str = Field(default="label", min_length=1, description="column of the class or the score")
    kind: Literal["classification", "regression"] = Field(default="classification", description="what the label is")
    label_names: Names | None = Field(
        default=None, min_length=2, description="class names in order; null: as the data says"
    )
    group_column: str | None = Field(default=None, description="column to break the scores down by")
    metrics: Metrics | None = Field(
        default=None, description="scores, main one first; null: accuracy and macro_f1, or spearman and pearson"
    )
    report_split: Literal["validation", "test"] = Field(
        default="validation", description="split whose score is the result"
    )

    @model_validator(mode="after")
    def _kind_fits(self):
        regression = self.kind == "regression"
        fitting = {"pearson", "spearman"} if regression else {"accuracy", "f1", "macro_f1", "matthews"}
        wrong = [metric for metric in self.metrics or () if metric not in fitting]
        allowed = ", ".join(sorted(fitting))
        _refuse(
            (bool(wrong), f"metrics: {', '.join(wrong)} cannot score a {self.kind}; allowed: {allowed}"),
            (regression and self.label_names is not None, "label_names: a regression has no classes; remove it"),
        )
        return self


class Splits(Section):
    train: str = Field(default="train", description="name of the training split in the data set")
    validation: str = Field(default="validation", description="name of the validation split in the data set")
    test: str | None = Field(default=None, description="name of the test split in the data set, null for none")


class HubTask(TableTask):
    """Any data set of the hub, by a mapping of its columns."""

    source: Literal["hub"] = Field(description="where the data comes from")
    path: str = Field(min_length=1, description="hub id of the data set")
    name: str | None = Field(default=None, description="configuration (subset) of the data set")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")
    splits: Splits = Field(default=Splits(), description="which split of the data set is which")

    @model_validator(mode="after")
    def _reported_split_exists(self):
        _refuse((self.report_split == "test" and self.splits.test is None, "report_split: test needs splits.test"))
        return self


class Files(Section):
    train: str = Field(min_length=1, description="training file: .jsonl, .csv, .tsv or .parquet")
    validation: str = Field(min_length=1, description="validation file")
    test: str | None = Field(default=None, min_length=1, description="test file, null for none")


class LocalTask(TableTask):
    """Files of one's own. Paths in a config file are relative to that file, on the command line to where one stands."""

    source: Literal["local"] = Field(description="where the data comes from")
    name: str = Field(default="local", min_length=1, description="name of the task in tables and folders")
    files: Files = Field(description="the data files")
    drop_leaked: bool = Field(default=False, description="drop training texts that occur in validation or test too")

    @model_validator(mode="after")
    def _reported_split_exists(self):
        _refuse((self.report_split == "test" and self.files.test is None, "report_split: test needs files.test"))
        return self


Task = Annotated[
    AgreementTask | GlueTask | HubTask | LocalTask, Field(discriminator="source"), _default_tag("source", "agreement")
]


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


class Data(Section):
    max_length: int = Field(default=128, ge=8, description="longest text in tokens; what is longer is cut")
    pad_to: Annotated[Annotated[float, Field(gt=0, le=1)] | Literal["longest"], WrapValidator(_one_fault)] = Field(
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
    rank: Annotated[Annotated[int, Field(ge=1)] | Literal["full"], WrapValidator(_one_fault)] = Field(
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
        _refuse((clash, f"rank: got {self.rank}; allowed: 1, the only rank that complement factored is defined for"))
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


class FirstOrder(Section):
    """Direct term alone."""

    estimator: Literal["first_order"] = Field(description="how alpha's gradient is estimated")


class Unrolled(Section):
    """Reverse mode through the look-ahead updates, optimiser included."""

    estimator: Literal["unrolled"] = Field(default="unrolled", description="how alpha's gradient is estimated")
    num_steps: int | None = Field(
        default=None, ge=1, description="updates to differentiate, the last ones; null: all of the look-ahead"
    )
    remat: bool = Field(default=False, description="recompute instead of store: less memory, more time")


class Neumann(Section):
    """Implicit differentiation by a truncated Neumann series."""

    estimator: Literal["neumann"] = Field(description="how alpha's gradient is estimated")
    num_terms: int = Field(default=3, ge=1, description="terms of the series, exactly")
    step_size: float = Field(
        default=0.01, gt=0, description="eta of the series; below 2 / (largest eigenvalue) it converges"
    )


Hypergradient = Annotated[
    FirstOrder | Unrolled | Neumann, Field(discriminator="estimator"), _default_tag("estimator", "unrolled")
]


class Finetune(Section):
    epochs: int = Field(default=3, ge=1, description="passes over the whole training set, alpha frozen")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="optimiser of the task weights W")


class Run(Section):
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of everything drawn by the run (short: --seed)")
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
    def _export_has_weights(self):
        _refuse((self.export and not self.save_weights, "export: needs save_weights true"))
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
    run: Run = Field(default=Run(), description="seed, folder, checkpoints")

    @model_validator(mode="after")
    def _unrolling_fits_the_look_ahead(self):
        num_steps = self.hypergradient.num_steps if isinstance(self.hypergradient, Unrolled) else None
        looked_ahead = self.search.inner_steps
        allowed = f"null, or at most search.inner_steps ({looked_ahead})"
        text = f"hypergradient.num_steps: got {num_steps}; allowed: {allowed}"
        _refuse((num_steps is not None and num_steps > looked_ahead, text))
        return self
