// A thread of control with a stack of its own: what a switch of fibers needs, by hand on x86-64 (a few nanoseconds), by
// ucontext elsewhere.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 << 10, kGuard = 4096;

// A stack whose lowest page cannot be touched. They are kept for the next block.
struct Stack {
  char* low = static_cast<char*>(
      mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  Stack() { mprotect(low, kGuard, PROT_NONE); }
  Stack(const Stack&) = delete;
  ~Stack() { munmap(low, kStack + kGuard); }
  char* begin() const { return low + kGuard; }
  char* end() const { return low + kGuard + kStack; }
};

#ifdef __x86_64__

struct Context {
  void* stack_pointer = nullptr;
  void start(const Stack& stack, void (*entry)()) {
    auto** top = reinterpret_cast<void**>(stack.end()) - 8;  // six registers, where to return to, and a caller's slot
    std::fill_n(top, 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer = top;
  }
};

extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

#else

struct Context {
  ucontext_t context;
  void start(const Stack& stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack.begin();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, entry, 0);
  }
};

void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace
}  // namespace simt
