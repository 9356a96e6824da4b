"""Techniques: changes of training that go together with any method which is open to them."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import optax

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Hooks, Method, MethodSettings, Part, Setup
from agwm_jax.methods.training import plain_fine_tuning


class Technique(MethodSettings):
    """A change of training that goes together with other methods; as a method of its own it changes plain fine-tuning.

    Each of its functions changes nothing unless it is overridden. Those that change the objective or the optimiser act
    in every phase that trains model weights, the search of a bi-level method included; `hooks` act in every
    `training_phase`.
    """

    changes: ClassVar[Part]
    """Which part of the training; a method must be open to it."""

    def change_setup(self, setup: Setup) -> Setup:
        """Before the method is built: another objective, more frozen weights."""
        return setup

    def change_optimizer(self, tx: optax.GradientTransformation, setup: Setup) -> optax.GradientTransformation:
        """The optimiser of a phase; its tree's last keys are paths of weights."""
        del setup
        return tx

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """For a `training_phase` of that many steps, which follow `setup.finetune.optimizer` unless it has its own."""
        del setup, num_steps
        return Hooks()

    def change_method(self, method: Method, setup: Setup) -> Method:
        """After it is built: another start, more phases, an average at the end."""
        del setup
        return method

    def build(self, setup: Setup) -> Method:
        """Plain fine-tuning with this technique, for one seed."""
        return compose(plain_fine_tuning, (self,), setup)


def compose(build: Callable[[Setup], Method], techniques: Sequence[Technique], setup: Setup) -> Method:
    """A method as the techniques change it, each after the other."""
    for technique in techniques:
        setup = technique.change_setup(setup)
    setup = setup._replace(techniques=(*setup.techniques, *techniques))
    method = build(setup)
    for technique in techniques:
        method = technique.change_method(method, setup)
    return method


def check_techniques(method: MethodSettings, techniques: Sequence[Technique]) -> None:
    """Refuse what does not go together.

    Raises:
        AgwmError: a technique changes what the method does not have, it is the method itself, or two of them replace
            the objective.
    """
    objectives = [each.name for each in (method, *techniques) if getattr(each, "changes", None) == "objective"]
    if len(objectives) > 1:
        raise AgwmError(f"{' and '.join(objectives)} each replace the training objective: choose one of them.")
    for technique in techniques:
        if technique.name == method.name:
            raise AgwmError(f"techniques.{technique.name}: it is the method already; set method.* instead.")
        if technique.changes not in method.open_to:
            raise AgwmError(
                f"techniques.{technique.name} changes {_PARTS[technique.changes]}, and the method {method.name} has "
                "nothing of the kind: leave it out, or choose another method."
            )


_PARTS: dict[Part, str] = {
    "objective": "the loss that training minimises",
    "gradient": "the gradient or the optimiser",
    "weights": "the model's own weights beside their pretrained values",
    "start": "the weights that training starts from",
    "end": "what training leaves at its end",
}
