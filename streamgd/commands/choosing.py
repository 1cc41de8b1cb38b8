"""From the options of ``streamgd train`` and the data's target to a configuration, and why what was open is so."""

from __future__ import annotations

from typing import Any

from streamgd.data.layout import parse_bytes
from streamgd.data.sources.base import Source, TargetInfo
from streamgd.errors import OptionError
from streamgd.learn.losses import LOSSES, Task
from streamgd.learn.recipe import Recipe
from streamgd.run.config import Config

_FROM_OPTIONS = (
    "epsilon",
    "quantile",
    "alpha",
    "l1_ratio",
    "optimizer",
    "learning_rate",
    "eta0",
    "power_t",
    "momentum",
    "nesterov",
    "average",
    "batch_size",
)


def choose(source: Source, given: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """Make the configuration.

    Parameters
    ----------
    source : Source
        With a target.
    given : dict of str to object
        The command's options; None where an option was left out.

    Returns
    -------
    config : Config
        What defines the run.
    reasons : dict of str to str
        Why ``"task"`` is what it is.

    Raises
    ------
    OptionError
        If options do not go together.
    """
    assert source.target is not None
    task, reason = choose_task(
        source.target, task=given["task"], loss=given["loss"], weighs_classes=given["class_weight"] is not None
    )
    chosen = {name: given[name] for name in _FROM_OPTIONS if given[name] is not None}
    if task == "classification":
        chosen.setdefault("power_t", 0.5)  # as `streamgd.SGDClassifier` has it
    recipe = Recipe(
        task=task,
        loss=given["loss"] or ("squared_error" if task == "regression" else "log_loss"),
        penalty=None if given["penalty"] == "none" else given["penalty"],
        fit_intercept=not given["no_intercept"],
        **chosen,
    )
    weights = given["class_weight"]
    config = Config(
        recipe=recipe,
        max_iter="auto" if given["epochs"] is None else given["epochs"],
        tol={None: "auto", "none": None}.get(given["tol"], given["tol"]),
        n_iter_no_change=given["n_iter_no_change"] or 5,
        shuffle=not given["no_shuffle"],
        seed=given["seed"],
        buffer_bytes=parse_bytes(given["buffer"]),
        standardize="full" if given["standardize"] == "full" else given["standardize"] == "true",
        n_lanes=given["lanes"],
        class_weight=_typed_labels(weights, source.target) if isinstance(weights, dict) else weights,
    )
    return config, {"task": reason}


def choose_task(
    target: TargetInfo, *, task: Task | None = None, loss: str | None = None, weighs_classes: bool = False
) -> tuple[Task, str]:
    """Tell what is to be learnt, and why.

    Parameters
    ----------
    target : TargetInfo
        What the target is.
    task, loss : str or None
        What the user asked for.
    weighs_classes : bool, default=False
        Whether the user gave weights of classes.
    """
    if task is not None:
        return task, "as told"
    if loss is not None:
        return LOSSES[loss].task, f"as loss {loss} asks for"
    if not target.numeric:
        return "classification", f"the target is {target.dtype}"
    if weighs_classes:
        return "classification", "as class weights ask for"
    if target.dtype == "bool":
        return "classification", "the target is bool"
    if target.dtype.startswith(("int", "uint")):
        return "regression", f"the target is {target.dtype}; if its values are classes, say --task classification"
    return "regression", f"the target is {target.dtype}"


def _typed_labels(weights: dict[str, float], target: TargetInfo) -> dict[Any, float]:
    """Read labels as the target's type has them."""
    if target.dtype == "bool":
        return {_as_bool(label): weight for label, weight in weights.items()}
    if target.numeric:
        return {_as_number(label, target): weight for label, weight in weights.items()}
    return dict(weights)


def _as_bool(label: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if label.lower() not in values:
        raise OptionError(f"--class-weight names the class {label!r}; the target is bool: say true or false")
    return values[label.lower()]


def _as_number(label: str, target: TargetInfo) -> int | float:
    for kind in (int, float):
        try:
            return kind(label)
        except ValueError:
            continue
    raise OptionError(f"--class-weight names the class {label!r}; the target {target.name!r} holds {target.dtype}")
