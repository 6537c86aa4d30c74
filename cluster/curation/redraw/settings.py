"""What decides a redraw beside the data."""

from dataclasses import dataclass

#: What a budget is counted in.
PICTURES, GPU_SECONDS, MONEY = "pictures", "gpu-seconds", "money"
UNITS = (PICTURES, GPU_SECONDS, MONEY)

#: How rows are chosen.
GAIN, LOWEST = "gain", "lowest"
CHOICES = (GAIN, LOWEST)

#: Pictures that may be asked for a caption, on average: more is a slip of the pen.
MOST_REDRAWS = 1000


@dataclass(frozen=True)
class Policy:
    """choose: GAIN, the highest expected gain, or LOWEST, the lowest best scores among the share `lowest` of rows."""

    choose: str = GAIN
    lowest: float = 0.1
