"""All settings of a run by section; bounds and defaults stand here, or with the thing that a section chooses."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from agwm_jax.data.sources.base import TASK_SOURCES
from agwm_jax.methods.interface import METHODS
from agwm_jax.methods.technique import Technique, check_techniques
from agwm_jax.methods.training import Finetune
from agwm_jax.section import Choice, FolderOrName, Pattern, Section, Several, refuse


class Model(Section):
    path: FolderOrName = Field(
        default="minilm", description="minilm, bert-tiny, a local Hugging Face folder, or a hub id"
    )
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")
    pooling: Literal["cls", "last", "mean"] | None = Field(
        default=None,
        description="sentence vector; null: as the folder says (a sentence encoder in 1_Pooling), else cls, or last of "
        "a decoder",
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="dropout rate; null: the checkpoint's own")
    attention_dropout: float | None = Field(
        default=None, ge=0, lt=1, description="of attention alone; 0 lets the fused kernel train; null: as the others"
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="compute type; weights are float32, or float64 with float64"
    )
    frozen: Pattern | None = Field(
        default=None, description="regular expression for the paths that are never trained (whole path)"
    )
    unroll_layers: int | None = Field(
        default=None,
        ge=1,
        description="layers an iteration of the scan over layers, more compiles longer; null: all of up to 6, else 1",
    )
    fuse_attention: bool = Field(
        default=True,
        description="cuDNN's fused attention where it serves: one CUDA device, bfloat16, no attention dropout, no "
        "products with second derivatives; false: never",
    )
    remat: Literal["none", "dots", "full"] = Field(
        default="none",
        description="what the backward pass computes anew instead of keeping it: nothing, all but matrix products, or "
        "each whole layer (least memory, about a third more time)",
    )


class Data(Section):
    max_length: int = Field(default=128, ge=8, description="longest text in tokens; what is longer is cut")
    pad_to: Annotated[float, Field(gt=0, le=1)] | Literal["longest"] = Field(
        default="longest", description="pad to the longest text, or this quantile of lengths (longer ones are cut)"
    )
    batch_size: int = Field(default=16, ge=1, description="examples a training step")
    accumulate: int = Field(
        default=1, ge=1, description="parts that a batch is cut into, one after the other, for less memory; divides it"
    )
    eval_batch_size: int = Field(default=64, ge=1, description="examples a batch when scoring")

    @model_validator(mode="after")
    def _parts_are_equal(self):
        uneven = self.batch_size % self.accumulate > 0
        refuse((uneven, f"accumulate: got {self.accumulate}; allowed: a divisor of batch_size ({self.batch_size})"))
        return self


class Loss(Section):
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        description="what a text of each class counts: balanced, all classes alike; or numbers by name, 1 for others",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="share of every label that is spread over all classes"
    )


class Mesh(Section):
    """How many devices share the work, and how; the result is the same on every mesh, to rounding."""

    data: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
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
    deterministic: bool = Field(
        default=False,
        description="deterministic kernels on a GPU, slower: a repeated or resumed run has the same bits, as on a CPU",
    )
    chunk_steps: int = Field(default=10, ge=1, description="steps per call of the device: progress and Ctrl-C go by it")
    checkpoint_minutes: float | None = Field(
        default=5.0,
        ge=0,
        description="minutes between checkpoints, 0: at the ends of phases only; null: none, so that a run that is "
        "stopped starts anew",
    )
    keep_checkpoints: int = Field(
        default=2, ge=2, description="newest checkpoints kept; the one before is the fallback"
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard events too")
    compilation_cache: str | None = Field(
        default="~/.cache/agwm_jax/xla", description="folder of compiled programs, null for none"
    )
    save_weights: bool = Field(default=True, description="keep what was learnt in the run folder")
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
    """The settings of a run; made by `load_config`."""

    task: Annotated[Any, Choice(TASK_SOURCES, default="agreement", key="source")] = Field(
        default={}, description="what to learn, and where its data comes from"
    )
    model: Model = Field(default=Model(), description="the pretrained encoder")
    data: Data = Field(default=Data(), description="tokens and batches")
    method: Annotated[Any, Choice(METHODS, default="agwm")] = Field(default={}, description="how to fine-tune")
    techniques: Annotated[Any, Several(METHODS, Technique)] = Field(
        default={}, description="what changes the training of the method; a section for each, or a list of names"
    )
    loss: Loss = Field(default=Loss(), description="what training minimises, in a classification")
    finetune: Finetune = Field(default=Finetune(), description="the last stage of every method: passes, optimiser")
    mesh: Mesh = Field(default=Mesh(), description="the devices, and what each holds")
    run: Run = Field(default=Run(), description="seed, folder, checkpoints")

    @model_validator(mode="after")
    def _techniques_fit_the_method(self):
        check_techniques(self.method, self.techniques.chosen)  # an AgwmError is a ValueError
        return self
