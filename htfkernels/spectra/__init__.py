"""Singular values, ranks, norms and inner products from the weights alone."""

from htfkernels.spectra.matricizations import ACCURACY, Spectra, matricization_spectra
from htfkernels.spectra.mode_sets import matricization_spectrum, spectrum_cost

__all__ = [
    "ACCURACY",
    "Spectra",
    "matricization_spectra",
    "matricization_spectrum",
    "spectrum_cost",
]
