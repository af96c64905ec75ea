#include "cuda/launch.cu"
