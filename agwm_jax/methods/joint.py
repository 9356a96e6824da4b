"""The control for the second level: gate and weights descend one loss together."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.agwm import OuterOptimizer
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.mixup import ALPHA, Mixture, Mixup
from agwm_jax.methods.optimizers import by_collection
from agwm_jax.methods.training import TASK, finetune_plan, task_weights, training_phase


@METHODS.register("joint", cost="1", paper="arXiv 2403.12918, ablation")
class Joint(MethodSettings):
    """Fine-tuning through ``A * W + (1 - A) * W0`` where alpha and W descend the same loss on the same batches.

    Each has an optimiser of its own, alpha the one of agwm's outer level, and is projected to [0, 1] after every
    update. There is no split and no second level: the control that tells what fitting alpha on held-out examples is
    worth. With an outer learning rate of practically 0 this is `frozen_alpha` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning, of W0, and of alpha with its gradient and moments. Source: ablation
    of arXiv 2403.12918.
    """

    name: Literal["joint"] = Field(default="joint", description="fine-tuning method")
    mixup: Mixup = Field(default=Mixup(), description="which weights are mixed, and how")
    outer: OuterOptimizer = Field(default=OuterOptimizer(), description="optimiser of alpha")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        mixture, plan = Mixture(self.mixup, setup), finetune_plan(setup)
        steps = len(plan["train"])

        def init(pretrained, key) -> Variables:
            return {TASK: task_weights(setup, pretrained), ALPHA: mixture.init_alpha(key, pretrained)}

        def project(trained: Variables) -> Variables:
            return {**trained, ALPHA: mixture.project(trained[ALPHA])}

        phase = training_phase(
            setup,
            plan=plan,
            tx=by_collection(
                {
                    TASK: setup.optimizer(setup.finetune.optimizer, num_steps=steps),
                    ALPHA: self.outer.build(num_steps=steps, weights=setup.model.weights),
                }
            ),
            trains=(TASK, ALPHA),
            forward=mixture.forward,
            project=project,
        )
        phase = phase._replace(monitor=lambda state: mixture.statistics(state.params[ALPHA]))
        return Method(init, ((phase,),), mixture.merge)
