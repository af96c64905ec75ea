#include "spectra/steps.cu"
