"""The optimizers: what each does with the gradient g of a batch, and which schedules it takes.

``"auto"``
    The default, made to need no tuning. AdaGrad in scaled units, δ = η s g / √G with G ← G + g², s the target's
    standard deviation (1 for classes), η = 0.5; then the whole step is shrunk so that it never overshoots the minimum
    of the batch's loss along it, δ ← δ · min(1, g·δ / mean(h (Xδ)²)), h the loss's second derivative; and the
    coefficients are averaged with polynomial decay, θ̄ ← θ̄ + 9/(t + 8) (θ − θ̄). Outputs have a step each, but share
    one under softmax, where mean(h (Xδ)²) is the mean variance of a row's Xδ under its probabilities. To every √G of
    an output is added 1e-9 of the largest, here and in ``"adagrad"``, so that noise is not divided by noise.
``"sgd"``
    θ ← θ − η g; with momentum μ: v ← μ v + g, θ ← θ − η v, or θ ← θ − η (g + μ v) with Nesterov's.
``"adagrad"``
    θ ← θ − η g / √G.
``"adam"``
    m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², θ ← θ − η m̂ / (√v̂ + ε), hats for bias-corrected.
``"dowg"``
    r ← max(r, ‖θ − θ₀‖), v ← v + r² ‖g‖², θ ← θ − (r² / √v) g; no learning rate at all.

========== ==================================================================== =====================
optimizer  learning_rate                                                        ``"auto"`` stands for
========== ==================================================================== =====================
auto       auto                                                                 constant, eta0 0.5
sgd        constant, optimal, invscaling, adaptive, cosine                      scikit-learn's default
adagrad    constant, invscaling, adaptive, cosine                               constant, eta0 0.5
adam       constant, invscaling, adaptive, cosine                               constant, eta0 0.001
dowg       auto                                                                 none is needed
========== ==================================================================== =====================

Scikit-learn's defaults are ``"invscaling"`` with eta0 0.01 for regression and ``"optimal"`` for classification. A
learning rate given without an optimizer means sgd. Any other pair is an error.

References
----------
Duchi, Hazan & Singer (2011), JMLR 12 (AdaGrad). Shamir & Zhang (2013), ICML (polynomial-decay averaging). Kingma & Ba
(2015), ICLR (Adam). Khaled, Mishchenko & Jin (2023), NeurIPS (DoWG). Sutskever et al. (2013), ICML (Nesterov's form).
"""

from __future__ import annotations

from dataclasses import dataclass

from streamgd.errors import OptionError
from streamgd.learn.codes import ADAGRAD, ADAM, AUTO, DOWG, SGD
from streamgd.learn.losses import Task
from streamgd.learn.options import require


@dataclass(frozen=True)
class Optimizer:
    """One optimizer.

    Attributes
    ----------
    name : str
        As users write it.
    code : int
        Branch of the kernel.
    n_slots : int
        Arrays of the coefficients' shape that it carries from one batch to the next.
    learning_rates : tuple of str
        Schedules it takes, besides ``"auto"``.
    eta0 : float
        What ``eta0="auto"`` stands for.
    averages : bool
        Whether ``average="auto"`` averages.
    """

    name: str
    code: int
    n_slots: int
    learning_rates: tuple[str, ...]
    eta0: float
    averages: bool


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("auto", AUTO, 1, (), 0.5, True),
        Optimizer("sgd", SGD, 1, ("constant", "optimal", "invscaling", "adaptive", "cosine"), 0.01, False),
        Optimizer("adagrad", ADAGRAD, 1, ("constant", "invscaling", "adaptive", "cosine"), 0.5, False),
        Optimizer("adam", ADAM, 2, ("constant", "invscaling", "adaptive", "cosine"), 0.001, False),
        Optimizer("dowg", DOWG, 1, (), 1.0, True),
    )
}


def resolve(optimizer: str, learning_rate: str, task: Task) -> tuple[Optimizer, str]:
    """Turn the user's pair into an optimizer and a schedule.

    Returns
    -------
    optimizer : Optimizer
        The one to run.
    schedule : str
        A name of `streamgd.learn.schedules.SCHEDULES`.

    Raises
    ------
    OptionError
        If either is unknown or the pair is not in the table above.
    """
    known = isinstance(optimizer, str) and optimizer in OPTIMIZERS
    require(known, "optimizer", optimizer, f"one of {', '.join(map(repr, OPTIMIZERS))}")
    if optimizer == "auto" and learning_rate != "auto":
        optimizer = "sgd"
    chosen = OPTIMIZERS[optimizer]
    if learning_rate == "auto":
        if optimizer == "sgd":
            return chosen, "invscaling" if task == "regression" else "optimal"
        return chosen, "constant"
    if learning_rate not in chosen.learning_rates:
        takes = ", ".join(map(repr, ("auto", *chosen.learning_rates)))
        raise OptionError(f"learning_rate={learning_rate!r} does not go with optimizer={optimizer!r}: it takes {takes}")
    return chosen, learning_rate
