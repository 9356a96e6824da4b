"""BitFit: only biases and the head are trained."""

from typing import ClassVar, Literal

from pydantic import Field

from agwm_jax.core.types import Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.training import TASK, finetune_plan, replace_weights, training_phase
from agwm_jax.models.weights import of_role


@METHODS.register("bitfit", cost="2/3", paper="arXiv 2106.10199")
class BitFit(MethodSettings):
    """Fine-tuning of all bias terms, those of the layer norms too, and of the head; all else stays pretrained.

    The optimiser is that of `finetune` but for a learning rate of its own; biases have no weight decay. What is not
    trained has no gradient and no moments.

    Cost 2/3 fb a step: the gradient still passes through all layers; memory of the weights and activations. For few
    examples, or where many tasks share one model. Source: Ben Zaken et al. 2022 (arXiv 2106.10199), section 3.
    """

    open_to: ClassVar = frozenset({"objective", "gradient", "end"})
    name: Literal["bitfit"] = Field(default="bitfit", description="fine-tuning method")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate, in place of finetune.optimizer's")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        norms = [path for path in of_role(setup.model.weights, "norm") if path.rpartition(".")[2] == "bias"]
        chosen = {*of_role(setup.model.weights, "bias", "head"), *norms}
        trained = [path for path in setup.trainable if path in chosen]
        if not trained:
            raise AgwmError("model.frozen holds all biases and the head, so bitfit has nothing to train: freeze fewer.")

        def init(pretrained: Params, key) -> Variables:
            del key
            return {TASK: {path: pretrained[path] for path in trained}}

        plan = finetune_plan(setup)
        optimizer = setup.finetune.optimizer.model_copy(update={"learning_rate": self.learning_rate})
        tx = setup.optimizer(optimizer, num_steps=len(plan["train"]))
        return Method(init, ((training_phase(setup, plan=plan, tx=tx),),), replace_weights)
