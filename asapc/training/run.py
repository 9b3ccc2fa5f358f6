"""A model in training, step by step: all that it depends on is in the recipe, the number of the step, and its state.

Whatever a step draws follows from the seed and its number, so that no generator has to be kept, and every process of
torchrun draws the same.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from asapc.errors import OptionError
from asapc.fidelity.outputs import accuracy
from asapc.loading.factories import build_model
from asapc.planning.distributed import share, total
from asapc.training.recipe import Recipe
from asapc.training.tasks import Task
from asapc.types.samples import Samples

WEIGHT_DECAY, MAX_NORM = 0.05, 1.0
WARM_UP = 10  # one in so many steps
ORDER, DRAWS = range(2)  # what a seed is derived for
CHANGE_MODEL = "change [model] of the recipe"


class Run:
    """A model in training.

    Attributes:
        model: in the form that it is trained in.
        step: how many steps are done.

    Raises:
        OptionError: the model cannot be built as the recipe says, or not take the task's samples.
    """

    def __init__(self, recipe: Recipe, task: Task) -> None:
        self.recipe, self.task, self.step = recipe, task, 0
        if recipe.batch > len(task.training):
            raise OptionError(
                f"a batch of {recipe.batch} is more than all {len(task.training)} samples to train on",
                "give the recipe a smaller batch",
            )
        torch.manual_seed(recipe.seed)
        self.model = build(task.model, model_arguments(recipe, task)).train()
        take_scaling_form(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), recipe.learning_rate, weight_decay=WEIGHT_DECAY)

    def state(self) -> dict[str, Any]:
        """Return all that a later run needs to go on from this step."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a run of the same recipe."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def advance(self) -> tuple[float, float]:
        """Take a step, together with all other processes; return the loss and the accuracy before it."""
        batch = self.batch()
        own = share(batch)
        labels, part = own.labels, len(own) / len(batch)
        assert labels is not None
        outputs = self.model(*own.inputs.values())
        loss = part * self.task.loss(outputs, labels)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        vector_to_parameters(total(parameters_to_vector(gradients)), gradients)
        clip_grad_norm_(self.model.parameters(), MAX_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step)
        self.optimizer.step()
        self.step += 1
        sums = total(torch.tensor([loss.item(), part * accuracy(outputs, labels)]))
        return sums[0].item(), sums[1].item()

    def batch(self) -> Samples:
        """Draw the samples of the next step, of all processes together; none twice before all were drawn once."""
        count, size = len(self.task.training), self.recipe.batch
        epoch, place = divmod(self.step, count // size)
        generator = torch.Generator().manual_seed(derive(self.recipe.seed, ORDER, epoch))
        order = torch.randperm(count, generator=generator)[place * size : (place + 1) * size]
        torch.default_generator.manual_seed(derive(self.recipe.seed, DRAWS, self.step))
        return self.task.augment(self.task.training[order.tolist()])


def derive(*numbers: int) -> int:
    """Return a seed that follows from numbers, and shares nothing with those of their neighbours."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a step, from 0: a linear warm-up, then half a cosine to zero.

    Source: Loshchilov and Hutter, SGDR, 2017, without restarts.
    """
    warm_up = math.ceil(recipe.steps / WARM_UP)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    return recipe.learning_rate * (1 + math.cos(math.pi * (step + 1 - warm_up) / (recipe.steps + 1 - warm_up))) / 2


def model_arguments(recipe: Recipe, task: Task) -> dict[str, Any]:
    """Return the arguments of a recipe's model, as its checkpoint has them.

    Raises:
        OptionError: [model] has one that the task decides.
    """
    if taken := sorted(task.sizes.keys() & recipe.model.keys()):
        raise OptionError(f"{taken[0]} of [model] is the task's own, {task.sizes[taken[0]]}", "omit it")
    arguments = {**task.sizes, **recipe.model, "epsilon": recipe.epsilon, "iterations": recipe.iterations}
    return arguments if recipe.attention == "sinkhorn" else {**arguments, "attention": recipe.attention}


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a model of asapc.models by the name of its class.

    Raises:
        OptionError: it does not take these arguments.
    """
    try:
        return build_model(name, arguments)
    except OptionError as error:
        raise OptionError(str(error), CHANGE_MODEL) from error


def take_scaling_form(model: nn.Module) -> None:
    """Let Sinkhorn run in its scaling form: the same function, of which both passes take a fraction of the time."""
    kernels: list[Any] = [module for module in model.modules() if getattr(module, "form", None) == "log"]
    for kernel in kernels:
        kernel.form = "scaling"
