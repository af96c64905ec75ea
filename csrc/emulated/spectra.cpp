#include "units/cuda/spectra.cu"
