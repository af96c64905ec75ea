#include "spectra/gram.cu"
