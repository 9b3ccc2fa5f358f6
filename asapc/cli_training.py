"""The commands that train models and say how good they are: `train` and `eval`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from asapc.terminal import Json, a_number, command, out, print_json, say, stages


@command("asapc train digits --out mine.pt", "asapc train recipe.toml --seed 3 --resume")
def train(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A TOML file, or the name of one that asapc carries.", show_default=False
        ),
    ],
    out_file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Checkpoint to write.")] = Path("model.pt"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run that was stopped left its state, beside the checkpoint.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint, or without --resume the state, if it exists.")
    ] = False,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Attention of all layers: sinkhorn, softmax, sliced or one_pass.",
            show_default="that of the recipe",
        ),
    ] = None,
    seed: Annotated[
        int | None, a_number(help="Seed of weights, order and augmentation.", show_default="that of the recipe")
    ] = None,
    steps: Annotated[int | None, a_number(min=1, help="Steps to train.", show_default="those of the recipe")] = None,
) -> None:
    """Train a model by a recipe: digits, mnist, pointset, pointset-inducing, mails, speeches, matching, or your own."""
    from asapc.planning.distributed import processes
    from asapc.training.loop import train as train_recipe
    from asapc.training.recipe import Recipe

    choices: dict[str, Any] = {"attention": attention, "seed": seed, "steps": steps}
    recipe = replace(Recipe.read(name), **{key: value for key, value in choices.items() if value is not None})
    with processes() as rank, stages(visible=rank == 0) as on_event:
        facts = train_recipe(recipe, out_file, resume, on_event, force)
    if rank == 0:
        say(out, f"{out_file}: held-out accuracy {facts['held_out_accuracy']:.1%} after step {recipe.steps}")


@command("asapc eval mine.pt", "asapc eval mine.asap --json")
def eval(
    model: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Checkpoint of `asapc train`, or the folder compiled from it."),
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The checkpoint that was compiled.", show_default="where the report says it was"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of a model on the samples that its training held out."""
    from asapc.training.evaluate import evaluate

    result = evaluate(model, teacher)
    if as_json:
        print_json(result.data())
    else:
        say(out, f"{model}: accuracy {result.accuracy:.1%} on {result.samples} held-out samples, in {result.runtime}")
