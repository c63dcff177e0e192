"""What readers of a sink must see, in a dozen lines: what every sink is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from casparian_flow.protocol import Output, State


@dataclass
class Model:
    """Output key -> what the sink was told last."""

    told: dict[str, Output] = field(default_factory=dict)

    def tell(self, output: Output) -> None:
        self.told[output.output_key] = output

    def visible(self) -> list[str]:
        """The keys of the outputs that the topic shows."""
        return sorted(
            key
            for key, output in self.told.items()
            if output.state == State.CURRENT
            or (output.state == State.PAST and output.mode != "replace")
        )
