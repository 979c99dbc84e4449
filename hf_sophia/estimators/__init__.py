"""Estimates of the Hessian's diagonal. They know torch alone: no optimizer, no Trainer."""

from hf_sophia.estimators.gauss_newton_bartlett import GaussNewtonBartlett, gauss_newton_bartlett
from hf_sophia.estimators.hutchinson import Hutchinson, hutchinson
from hf_sophia.estimators.likelihoods import LIKELIHOODS, mean_nll, sampled_cotangent
from hf_sophia.estimators.sampling import sample_categorical

__all__ = [
    "LIKELIHOODS",
    "GaussNewtonBartlett",
    "Hutchinson",
    "gauss_newton_bartlett",
    "hutchinson",
    "mean_nll",
    "sample_categorical",
    "sampled_cotangent",
]
