#include "spectra/triangle.cu"
