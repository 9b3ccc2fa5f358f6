"""How long the stages of a study or a compilation took, from its events."""

from asapc.events import Event, StageDone


class Stopwatch:
    """Takes events; `seconds` has the stages that are done, by their name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, StageDone):
            self.seconds[event.stage] = event.seconds
