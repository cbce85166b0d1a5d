// A thread block of CUDA C++ on a CPU.
//
// A thread is a fiber, and runs until it must wait for others; which of those that are ready goes on is
// drawn at random. What lies between two waits happens in one piece, but in any order: a barrier that is
// missing shows as wrong numbers. It shows as well where the order happened to be right: what a thread
// knows of the others (vector clocks) tells whether two accesses of shared memory were in an order at all.
// Thread blocks run one after another.
//
// What no GPU would forgive ends the run with a message: races, threads that wait for what never comes,
// lanes of a warp that meet at different instructions, accesses beyond shared memory or to memory that is
// not mapped. Shared memory starts as NaNs. Asynchronous copies happen as soon, or as late, as they may.
//
// Accesses are seen by the calls that the compiler makes of them for another tool, ThreadSanitizer, whose
// own library is not there: the __tsan_ functions at the end.
// Source of the order: PTX ISA, Memory Consistency Model; CUDA C++ Programming Guide (shuffles and votes are no
// barriers of memory); FastTrack, Flanagan and Freund 2009, of which this is the plain form.
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

struct Dimensions { unsigned x, y, z; };
extern "C" {
Dimensions threadIdx, blockIdx, blockDim, gridDim;
}

namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;
constexpr size_t LIMIT = 227 << 10;    // bytes of shared memory that a thread block may ask for
constexpr uint32_t DYNAMIC = 1 << 20;  // where dynamic shared memory starts among addresses of shared memory

using Clock = std::vector<uint32_t>;  // of each thread, up to which moment it is known

void join(Clock &own, const Clock &other) {
  for (size_t i = 0; i < own.size(); i++)
    if (own[i] < other[i]) own[i] = other[i];
}

struct Copy { char *to; const char *from; int bytes; };

struct Fiber {
  ucontext_t context;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last is not committed yet
  Clock clock;
  bool ended = false;
  const void *on = nullptr;  // what it waits for
  const char *what = "";
};

// Threads that meet: each leaves a number, which all can read until they meet again.
struct Meeting {
  int arrived = 0;
  unsigned turn = 0;
  const char *what = nullptr;
  int line = 0;
  uint64_t left[2][WARP];
  Clock known[2];
};

// A barrier in shared memory (mbarrier).
struct Barrier {
  uint32_t count, pending, parity;
  Clock coming, done;  // what those knew who arrived: in this phase, and up to the one before
};

// An access of some bytes of a word of shared memory; pending: by a copy that has not been waited for.
struct Access { uint16_t thread; uint8_t bytes; bool writes, pending; uint32_t moment; };

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting all;
std::unordered_map<uint32_t, Barrier> barriers;
std::vector<std::vector<Access>> words[2];  // of static and dynamic shared memory
std::vector<int> ready;
int current = -1;
std::mt19937 random_;
bool late;
std::vector<char> stacks, dynamic_memory;
char *dynamic, *fixed, *fixed_end;
size_t dynamic_bytes;
void (*body)(void **);
void **parameters;
char message[512];
bool failed;

Fiber &self() { return fibers[current]; }
void leave() { swapcontext(&self().context, &scheduler); }

// Ends the run. Does not return.
template <typename... A> void fail(const char *format, A... values) {
  const int n = snprintf(message, sizeof message, "block %u, thread %u: ", blockIdx.x, threadIdx.x);
  snprintf(message + n, sizeof message - n, format, values...);
  failed = true;
  for (;;) leave();
}

void wait(const void *on, const char *what) {
  self().on = on, self().what = what;
  leave();
}

void wake(const void *on) {
  for (size_t i = 0; i < fibers.size(); i++)
    if (fibers[i].on == on) fibers[i].on = nullptr, ready.push_back((int)i);
}

// Where in shared memory an address lies: the address that instructions have for it; or -1.
int64_t place(const void *at) {
  const char *p = (const char *)at;
  if (p >= dynamic && p < dynamic + dynamic_bytes) return DYNAMIC + (p - dynamic);
  if (p >= fixed && p < fixed_end) return p - fixed;
  return -1;
}

char *from_shared(uint32_t at, uint32_t bytes) {
  if (at % bytes) fail("%u bytes at shared address %u", bytes, at);
  if (at >= DYNAMIC && at - DYNAMIC + bytes <= dynamic_bytes) return dynamic + (at - DYNAMIC);
  if (at + bytes <= (size_t)(fixed_end - fixed)) return fixed + at;
  fail("%u bytes at shared address %u, which are not the thread block's", bytes, at);
  return nullptr;
}

enum Kind { READ, WRITE, COPY, COPIED };
const char *const DOES[] = {"reads", "writes", "has a copy write", "has waited for a copy to"};

// An access of up to four bytes of a word of shared memory: an error where another is in no order with it.
void access(int64_t at, int bytes, Kind kind) {
  auto &word = words[at >= DYNAMIC][(at >= DYNAMIC ? at - DYNAMIC : at) / 4];
  const uint8_t mask = (uint8_t)(((1 << bytes) - 1) << at % 4);
  const bool writes = kind != READ;
  const Clock &clock = self().clock;
  if (kind == COPIED)  // its own, which it asked for
    for (size_t i = word.size(); i-- > 0;)
      if (word[i].pending && word[i].thread == current) word.erase(word.begin() + i);
  for (size_t i = word.size(); i-- > 0;) {
    const Access &a = word[i];
    if (!(a.bytes & mask)) continue;
    const bool before = a.thread == current || a.moment <= clock[a.thread];
    if ((a.writes || writes) && (a.pending || !before))
      fail("a race: it %s shared address %u, which thread %u %s", DOES[kind], (unsigned)at, (unsigned)a.thread,
           a.pending ? "has a copy write that was not waited for" : a.writes ? "writes" : "reads");
    if ((a.bytes & ~mask) == 0 && before && (writes || (a.thread == current && !a.writes)))
      word[i] = word.back(), word.pop_back();
  }
  word.push_back({(uint16_t)current, mask, writes, kind == COPY, clock[current]});
}

void accesses(const void *at, size_t bytes, Kind kind) {
  if (current < 0) return;
  int64_t p = place(at);
  if (p < 0) return;
  for (const int64_t end = p + (int64_t)bytes; p < end;) {
    const int n = (int)std::min<int64_t>(4 - p % 4, end - p);
    access(p, n, kind);
    p += n;
  }
}

Barrier &barrier(uint32_t at) {
  accesses(from_shared(at, 8), 8, READ);  // in order with what made it
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("a barrier at shared address %u that was not initialized", at);
  return found->second;
}

void enter() {
  body(parameters);
  self().ended = true;
  leave();
}

// An access to memory that is not mapped, by a thread.
void fault(int, siginfo_t *info, void *) { fail("an access to %p, which is not mapped", info->si_addr); }

const char *run_block(int block, int threads) {
  memset(fixed, 0xFF, fixed_end - fixed);
  memset(dynamic, 0xFF, dynamic_bytes);
  barriers.clear();
  words[0].assign((fixed_end - fixed) / 4 + 1, {});
  words[1].assign(dynamic_bytes / 4 + 1, {});
  warps.assign(threads / WARP, Meeting{});
  all = Meeting{};
  fibers.assign(threads, Fiber{});
  ready.clear();
  for (int i = 0; i < threads; i++) {
    Fiber &f = fibers[i];
    f.groups.emplace_back();
    f.clock.assign(threads, 0);
    f.clock[i] = 1;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.data() + STACK * i, f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, enter, 0);
    ready.push_back(i);
  }
  blockIdx.x = block;
  while (!ready.empty()) {
    std::swap(ready[random_() % ready.size()], ready.back());
    current = ready.back(), ready.pop_back();
    threadIdx.x = current;
    swapcontext(&scheduler, &self().context);
    if (failed) return message;
  }
  for (int i = 0; i < threads; i++) {
    if (fibers[i].ended) continue;
    snprintf(message, sizeof message, "block %d, thread %d waits for ever: %s", block, i, fibers[i].what);
    return message;
  }
  return nullptr;
}

}  // namespace

extern "C" {

// Runs the blocks of a grid, one after another: what went wrong, or null. An odd seed: copies happen when they
// are waited for, and not before.
const char *emulated_run(void (*kernel)(void **), void **values, int blocks, int threads, int bytes, unsigned seed,
                         char *shared, char *shared_end) {
  if ((size_t)bytes + (shared_end - shared) > LIMIT) return "more shared memory than a thread block may have";
  if (threads % WARP) return "warps that are not whole";
  body = kernel, parameters = values, failed = false, late = seed & 1;
  random_.seed(seed);
  stacks.resize(STACK * threads);
  dynamic_memory.resize(bytes + 1024);
  dynamic = (char *)(((uintptr_t)dynamic_memory.data() + 1023) / 1024 * 1024), dynamic_bytes = bytes;
  fixed = shared, fixed_end = shared_end;
  gridDim = {(unsigned)blocks, 1, 1}, blockDim = {(unsigned)threads, 1, 1};

  static char aside[64 << 10];  // a fiber's stack may be what is not mapped
  stack_t stack{}, stack_before;
  stack.ss_sp = aside, stack.ss_size = sizeof aside;
  sigaltstack(&stack, &stack_before);
  struct sigaction action {}, before[2];
  action.sa_sigaction = fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before[0]), sigaction(SIGBUS, &action, &before[1]);
  const char *told = nullptr;
  for (int block = 0; block < blocks && !told; block++) told = run_block(block, threads);
  current = -1;
  sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
  sigaltstack(&stack_before, nullptr);
  return told;
}

void *emulated_dynamic() { return dynamic; }

unsigned emulated_to_shared(const void *at) {
  if (at == dynamic + dynamic_bytes) return DYNAMIC + (unsigned)dynamic_bytes;
  const int64_t found = place(at);
  if (found < 0) fail("%p is no address of shared memory", at);
  return (unsigned)found;
}

// Asynchronous copies of a thread.
void emulated_copy(unsigned to, const void *from, int bytes) {
  if ((uintptr_t)from % bytes) fail("an asynchronous copy of %d bytes from %p, no multiple of them", bytes, from);
  const Copy copy{from_shared(to, bytes), (const char *)from, bytes};
  accesses(copy.to, bytes, COPY);
  if (!late) memcpy(copy.to, copy.from, bytes);
  self().groups.back().push_back(copy);
}
void emulated_commit() { self().groups.emplace_back(); }
void emulated_wait_copies(int left) {
  auto &groups = self().groups;
  while ((int)groups.size() - 1 > left) {
    for (const Copy &c : groups.front()) {
      if (late) memcpy(c.to, c.from, c.bytes);
      accesses(c.to, c.bytes, COPIED);
    }
    groups.erase(groups.begin());
  }
}

void emulated_barrier_init(unsigned at, unsigned count) {
  accesses(from_shared(at, 8), 8, WRITE);
  const Clock none(fibers.size(), 0);
  barriers[at] = {count, count, 0, none, none};
}
void emulated_barrier_arrive(unsigned at) {
  Barrier &b = barrier(at);
  join(b.coming, self().clock);
  self().clock[current]++;
  if (--b.pending == 0) {
    b.pending = b.count, b.parity ^= 1, b.done = b.coming;
    wake(&b);
  }
}
void emulated_barrier_wait(unsigned at, unsigned parity) {
  Barrier &b = barrier(at);
  while (b.parity == (parity & 1)) wait(&b, "a barrier in shared memory");
  join(self().clock, b.done);
}

const uint64_t *emulated_meet(bool block, unsigned mask, uint64_t value, const char *what, int line) {
  if (mask != 0xFFFFFFFF) fail("%s of line %d of only some lanes", what, line);
  Meeting &m = block ? all : warps[current / WARP];
  const int count = block ? (int)fibers.size() : WARP;
  const bool orders = !strncmp(what, "__sync", 6);
  if (m.arrived && (m.line != line || strcmp(m.what, what)))
    fail("%s of line %d, where others wait in %s of line %d", what, line, m.what, m.line);
  const unsigned turn = m.turn & 1;
  if (!m.arrived) {
    m.what = what, m.line = line;
    if (orders) m.known[turn].assign(fibers.size(), 0);
  }
  m.left[turn][current % WARP] = value;
  if (orders) join(m.known[turn], self().clock);
  if (++m.arrived == count) {
    m.arrived = 0, m.turn++;
    wake(&m);
  } else {
    while ((m.turn & 1) == turn) wait(&m, what);
  }
  if (orders) {
    join(self().clock, m.known[turn]);
    self().clock[current]++;
  }
  return m.left[turn];
}

// What the compiler calls before each access.
#define ACCESS(n)                                                           \
  void __tsan_read##n(void *at) { accesses(at, n, READ); }                  \
  void __tsan_write##n(void *at) { accesses(at, n, WRITE); }                \
  void __tsan_unaligned_read##n(void *at) { accesses(at, n, READ); }        \
  void __tsan_unaligned_write##n(void *at) { accesses(at, n, WRITE); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void *at, long bytes) { accesses(at, bytes, READ); }
void __tsan_write_range(void *at, long bytes) { accesses(at, bytes, WRITE); }
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) {}

}  // extern "C"
