#include "spectra/values.cu"
