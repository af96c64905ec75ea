#include "cpu/walks.cpp"
