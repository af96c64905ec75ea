#include "spectra/multiply.cu"
