// Memory that could not be had: the error says which operator wanted how much. No torch.
#pragma once

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

namespace lvtp {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes, const std::string& why = "out of memory")
      : text_(why + ": " + std::to_string(bytes) + " bytes could not be allocated") {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// kernel(), whose errors of memory name the operator: std::runtime_error, as all that kernels throw.
template <class Kernel>
void naming(const char* op, const Kernel& kernel) {
  try {
    kernel();
  } catch (const OutOfMemory& error) {
    throw std::runtime_error(std::string(op) + ": " + error.what());
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(std::string(op) + ": out of memory");
  }
}

}  // namespace lvtp
