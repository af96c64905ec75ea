#include "plan/pairs.cu"
