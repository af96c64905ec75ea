#include "group_rmsprop/group_rmsprop_cuda.cu"
