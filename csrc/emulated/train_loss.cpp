#include "train/loss.cu"
