#include "plan/lists.cu"
