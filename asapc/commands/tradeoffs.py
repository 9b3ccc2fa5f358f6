"""`asapc tradeoffs`: what each budget would cost, without an export."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asapc.commands.inspect import require_sites
from asapc.commands.study import check_callback, study, torch_threads
from asapc.commands.target import cost_model
from asapc.config import CompileConfig, options_of
from asapc.errors import OptionError
from asapc.events import OnEvent, stage
from asapc.loading.model import as_path
from asapc.pictures import new_figure, save
from asapc.planning.alternatives import look_up
from asapc.planning.cache import cache_note, cache_of
from asapc.planning.operators import softmax_cost
from asapc.planning.tradeoffs import find_tradeoffs
from asapc.writing.origins import origin_of
from asapc.writing.report import tradeoffs_data


@dataclass(frozen=True)
class Tradeoffs:
    """What the budgets of a model would cost.

    Attributes:
        data: what `asapc tradeoffs --json` prints, which docs/tradeoffs.schema.json describes.
    """

    data: Mapping[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The selections, cheapest first."""
        rows: list[dict[str, Any]] = self.data["rows"]
        return rows

    def draw(self, path: str | Path) -> None:
        """Draw error and agreement by estimated time, as .png, .svg or .pdf."""
        rows = [row for row in self.rows if row["times_softmax"] is not None]
        figure = new_figure()
        with_agreement = self.rows[0]["reached"]["agreement"] is not None
        axes = figure.subplots(1 + with_agreement, sharex=True, squeeze=False)[:, 0]
        times = [row["times_softmax"] for row in rows]
        axes[-1].plot(times, [row["calibration_relc"] for row in rows], marker="o", label="relc, calibration")
        axes[-1].plot(
            times, [row["reached"]["output-error"] for row in rows], marker="s", label="output error, held out"
        )
        axes[-1].set(yscale="log", ylabel="relative error")
        axes[-1].set_xlabel(f"estimated time of the operators over that of softmax, batch {self.data['batch']}")
        if with_agreement:
            axes[0].plot(times, [row["reached"]["agreement"] for row in rows], marker="o", label="agreement")
            axes[0].set(ylabel="agreement with the teacher")
        exact = self.data["exact_ms"] / self.data["softmax_ms"]
        for axis in axes:
            axis.axvline(exact, color="grey", linestyle="--", linewidth=0.8, label="exact")
            for row in rows:
                if row["chosen"]:
                    axis.axvline(row["times_softmax"], color="tab:red", linewidth=0.8, label="chosen")
            axis.grid(alpha=0.3)
            axis.legend()
        save(figure, Path(path))


def tradeoffs(
    path: str | Path, config: CompileConfig | None = None, on_event: OnEvent = lambda event: None
) -> Tradeoffs:
    """List the operators that a model can have, from the cheapest to the exact form, with what they cost and keep.

    Nothing is exported or built: times are estimates, and errors those in PyTorch on held-out samples.

    Args:
        path: the checkpoint.
        config: options; those of output, engine and measuring play no part.
        on_event: called with progress, see `asapc.events`.

    Raises:
        AsapcError: the input is at fault.
    """
    path, config = as_path(path), options_of(config)
    check_callback(on_event)
    if config.level != 2:
        raise OptionError(f"-O{config.level} leaves nothing to trade", "omit -O")
    model = cost_model(config)
    with torch_threads(config.threads):
        teacher = study(path, config, on_event=on_event)
        require_sites(teacher.findings, path)
        config = origin_of(teacher.loaded).adapt(config)
        with stage("select", on_event) as step:
            cache = cache_of(config)
            with look_up(teacher, config, model, cache, step.advance) as check:
                rows = find_tradeoffs(check, config, step.advance)
            step.summary = f"{len(rows)} selections{cache_note(cache)}"
    batch = max(config.batches)
    softmax = softmax_cost(teacher.longest_sites, batch, model, config.wanted_lowering)
    return Tradeoffs(tradeoffs_data(teacher, check.alternatives, rows, softmax, batch, model))
