#include "train/completion_step.cu"
