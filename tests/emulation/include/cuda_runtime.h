// Stands in for the header of this name: CUDA's words are the emulator's.
#pragma once
#include "../simt.h"
