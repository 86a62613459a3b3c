"""PAC-Bayes bounds as pure functions of numbers: what is measured goes in, a frozen result with every term comes out.

    trace_bound        the bound of noise stability optimization (Hessian trace, distance moved), asymptotic in n
    layerwise_bound    the group's earlier per-layer forms, as their code has them; without log terms and constants
    gaussian_bound     a classical one: Maurer 2004 (kl form of McAllester and Seeger), posterior N(w, sigma^2 I)
    catoni_bound       a classical one with a temperature, Catoni 2007; smaller than McAllester's at small losses
    best_gaussian      gaussian_bound at the best sigma of a grid, each sigma charged its share of delta (union bound)

The first two are about the weights w; the classical ones are about *random* weights w + sigma z, and hold for them with
no assumption beyond independent samples, a bounded loss and a prior chosen before the data were seen. Read
`assumptions`.
"""

from flatmin.bounds.gaussian import best_gaussian, catoni_bound, gaussian_bound, gaussian_divergence, inverse_kl
from flatmin.bounds.papers import layerwise_bound, trace_bound
from flatmin.bounds.result import Bound

__all__ = [
    "Bound",
    "best_gaussian",
    "catoni_bound",
    "gaussian_bound",
    "gaussian_divergence",
    "inverse_kl",
    "layerwise_bound",
    "trace_bound",
]
