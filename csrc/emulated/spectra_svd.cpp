#include "spectra/svd_cuda.cu"
