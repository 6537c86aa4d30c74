"""The learning rate of the published runs."""


def noam_lr(step: int, *, model_size: int, warmup: int, factor: float = 1.0) -> float:
    """Learning rate of optimisation step `step`, counted from 0 (the published scheduler uses step + 1).

    factor * model_size^-0.5 * min((step + 1)^-0.5, (step + 1) * warmup^-1.5): linear warm-up for `warmup` steps, then
    the inverse square root ("Attention Is All You Need", section 5.3). There is no base learning rate.

    Raises ValueError for a negative step or a warm-up below one step.
    """
    if step < 0 or warmup < 1:
        raise ValueError(f"step {step}, warmup {warmup}: steps count from 0 and the warm-up takes at least one step")
    number = step + 1
    return factor * model_size**-0.5 * min(number**-0.5, number * warmup**-1.5)
