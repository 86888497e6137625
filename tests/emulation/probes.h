// Small kernels that show what the emulator promises, right ones and wrong ones.
#pragma once

#include <string>

void simt_probe(const std::string& name, int* out);
