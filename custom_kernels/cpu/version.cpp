// The version of all exported functions together: custom_kernels/native.py refuses libraries of another one.
#include "common.h"

EXPORT int kernels_version() { return 4; }
