// A thread block of CUDA C++ on a CPU.
//
// A thread is a fiber, and runs until it must wait for others; which of those that are ready goes on is
// drawn at random. What lies between two waits happens in one piece, but in any order: a barrier that is
// missing shows as wrong numbers. It shows as well where the order happened to be right: what a thread
// knows of the others (vector clocks) tells whether two accesses of shared memory were in an order at all
// (races.h).
// Thread blocks run one after another; those of a cluster together, each with shared memory of its own.
//
// What no GPU would forgive ends the run with a message: races, threads that wait for what never comes, lanes
// of a warp that meet at different instructions, accesses beyond shared memory, to that of a block which may
// not have begun or has ended, or to memory that is not mapped; and of a launch that overlaps with the kernel
// before it, accesses to global memory by who does not know that this one has ended; indices that arrays do not have;
// and lines that are asked for into a cache in vain. Shared memory starts as NaNs. Asynchronous copies happen as soon, or as late, as they may.
#undef _FORTIFY_SOURCE  // which takes a jump to another stack for an error
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <ucontext.h>
#include <unordered_map>
#include <unordered_set>
#include <vector>

struct Dimensions { unsigned x, y, z; };
extern "C" {
Dimensions threadIdx, blockIdx, blockDim, gridDim;
unsigned emulated_rank;
}

namespace {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;
constexpr size_t LIMIT = 227 << 10;    // bytes of shared memory that a thread block may ask for
constexpr size_t BEYOND = 64 << 10;    // bytes before and behind dynamic shared memory where an access is seen to be none
constexpr uint32_t DYNAMIC = 1 << 20;  // where dynamic shared memory starts among addresses of shared memory
constexpr int RANK = 24;               // of an address in a cluster: where its block's rank stands, from 1
constexpr int ENGINES = 128;           // what accesses shared memory beside threads, at most

// Of each thread of a cluster, up to which moment it is known; of each engine, which makes moments of its own.
// Then whether the kernel before is known to have ended, and how often all blocks are known to have met.
using Clock = std::vector<uint32_t>;

void join(Clock &own, const Clock &other) {
  for (size_t i = 0; i < own.size(); i++)
    if (own[i] < other[i]) own[i] = other[i];
}

struct Copy { char *to; const char *from; int bytes; };

struct Fiber {
  ucontext_t context;  // to begin
  jmp_buf at;          // to go on
  bool begun = false;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last is not committed yet
  Clock clock, fenced;  // fenced: at its last fence of barriers' initialization
  bool ended = false;
  unsigned arrivals = 0, waits = 0;  // at the cluster's barrier
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
  struct { uint32_t words[6]; } more[2][WARP];
  Clock known[2];
};

// An access of some bytes of a word of shared memory; pending: by a copy that has not been waited for. atomic: adds.
struct Access { uint16_t thread; uint8_t bytes; bool writes, pending, atomic; uint32_t moment; };

struct Block {
  Meeting all;
  std::vector<std::vector<Access>> words[2];  // of static and dynamic shared memory
  int alive;                                  // threads
  Clock known;                                // what its threads knew when they ended
};

// The barrier of a cluster: how many threads have arrived, how often all had. coming, done: as of a `Barrier`.
struct Gathering {
  int arrived;
  unsigned times;
  Clock coming, done;
};

jmp_buf scheduler;
std::vector<Fiber> fibers;  // of all blocks of a cluster
std::vector<Block> blocks;  // of it
std::vector<Meeting> warps;
Gathering cluster;
std::vector<int> ready;
std::vector<const char *> engines;  // what each is
int current = -1, alive;
int resident;  // the block whose static shared memory lies where the compiler put it; others' are set aside
std::mt19937 random_;
bool late, backwards;
std::unique_ptr<char[]> stacks;
std::vector<char> memory;       // of all blocks
char *dynamic, *aside;          // of the first
size_t dynamic_hop, fixed_hop;  // to that of the next
char *fixed, *fixed_end;
size_t dynamic_bytes, stacks_bytes;
void (*body)(void **);
void **parameters;
char message[512];
bool failed;
// Whether this launch may begin before the kernel before it has ended; and what it may read all the same.
bool overlaps;
struct Settled { uintptr_t first, end; };
std::vector<Settled> settled;
// Lines of global memory that were asked for into a cache and not read since; and how many were, in this launch.
constexpr uintptr_t LINE = 128;
std::unordered_set<uintptr_t> ahead;
int asked_ahead;

Fiber &self() { return fibers[current]; }
Block &own() { return blocks[emulated_rank]; }

void leave() {
  if (!_setjmp(self().at)) _longjmp(scheduler, 1);
}
void resume() {
  if (_setjmp(scheduler)) return;
  if (self().begun) _longjmp(self().at, 1);
  self().begun = true;
  setcontext(&self().context);
}

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

void wake(const void *on, int first = 0, int count = (int)fibers.size()) {
  for (int i = first; i < first + count; i++)
    if (fibers[i].on == on) fibers[i].on = nullptr, ready.push_back(i);
}

// An address of shared memory as those of a cluster: with the rank of its block.
uint32_t ranked(uint32_t at, unsigned rank = emulated_rank) { return at >> RANK ? at : at | (rank + 1) << RANK; }
unsigned rank_of(uint32_t at) { return (at >> RANK) - 1; }
uint32_t offset_of(uint32_t at) { return at & ((1 << RANK) - 1); }

// Where in shared memory an address lies; 0: nowhere.
uint32_t place(const void *at) {
  const char *p = (const char *)at;
  if (p >= dynamic && p < dynamic + dynamic_hop * blocks.size()) {
    const size_t offset = (p - dynamic) % dynamic_hop;
    return offset < dynamic_bytes ? ranked(DYNAMIC + offset, (p - dynamic) / dynamic_hop) : 0;
  }
  if (p >= fixed && p < fixed_end) return ranked(p - fixed);
  if (p >= aside && p < aside + fixed_hop * blocks.size())
    return ranked((p - aside) % fixed_hop, (p - aside) / fixed_hop);
  return 0;
}

// shared: of the thread's own block; else of any of the cluster.
char *from_shared(uint32_t at, uint32_t bytes, bool shared = true) {
  const unsigned rank = rank_of(ranked(at));
  const size_t offset = offset_of(at);
  if (at % bytes) fail("%u bytes at shared address %u", bytes, at);
  if (rank < blocks.size() && !(shared && rank != emulated_rank)) {
    if (offset >= DYNAMIC && offset - DYNAMIC + bytes <= dynamic_bytes)
      return dynamic + rank * dynamic_hop + (offset - DYNAMIC);
    if (offset + bytes <= (size_t)(fixed_end - fixed))
      return (rank == emulated_rank ? fixed : aside + rank * fixed_hop) + offset;
  }
  fail("%u bytes at shared address %u, which are not the thread block's", bytes, at);
  return nullptr;
}

}  // namespace

#include "races.h"

#include "barriers.h"

namespace {

struct Met { Meeting &meeting; unsigned turn; };

// leave(meeting, turn): leaves what a thread brings.
template <typename F> Met meet(bool block, unsigned mask, const char *what, int line, F leave) {
  if (mask != 0xFFFFFFFF) fail("%s of line %d of only some lanes", what, line);
  Meeting &m = block ? own().all : warps[current / WARP];
  const int count = block ? (int)blockDim.x : WARP;
  const bool orders = !strncmp(what, "__sync", 6);
  if (m.arrived && (m.line != line || strcmp(m.what, what)))
    fail("%s of line %d, where others wait in %s of line %d", what, line, m.what, m.line);
  const unsigned turn = m.turn & 1;
  if (!m.arrived) {
    m.what = what, m.line = line;
    if (orders) m.known[turn].assign(self().clock.size(), 0);
  }
  leave(m, turn);
  if (orders) join(m.known[turn], self().clock);
  if (++m.arrived == count) {
    m.arrived = 0, m.turn++;
    wake(&m, current / count * count, count);
  } else {
    while ((m.turn & 1) == turn) wait(&m, what);
  }
  if (orders) {
    join(self().clock, m.known[turn]);
    self().clock[current]++;
  }
  return {m, turn};
}

void gathered() {
  cluster.arrived = 0, cluster.times++, cluster.done = cluster.coming;
  wake(&cluster);
}

// The last thread of a block takes its shared memory along.
void end_block(Block &block) {
  const int first = (int)emulated_rank * (int)blockDim.x, last = first + (int)blockDim.x;
  if (overlaps && !block.known[previous()]) fail("its block ends, and has not waited for the kernel before it");
  for (const auto &words : block.words)
    for (const auto &word : words)
      for (const Access &a : word)
        if ((a.thread < first || a.thread >= last) && a.moment > block.known[a.thread])
          fail("its block ends, whose shared memory %s %s", Name(a.thread).told, a.writes ? "writes" : "reads");
}

void enter() {
  body(parameters);
  join(own().known, self().clock);
  if (--own().alive == 0) end_block(own());
  self().ended = true;
  if (--alive == cluster.arrived && alive) gathered();
  leave();
}

// The static shared memory of the thread's block, where the compiler put it.
void bring() {
  if (resident == (int)emulated_rank) return;
  const size_t bytes = fixed_end - fixed;
  memcpy(aside + resident * fixed_hop, fixed, bytes);
  memcpy(fixed, aside + emulated_rank * fixed_hop, bytes);
  resident = (int)emulated_rank;
}

void begin_hopper();
bool come_late();

// What happens where no thread can go on; false: nothing.
bool idle() { return _setjmp(scheduler) || come_late(); }

// An access to memory that is not mapped, by a thread.
void fault(int, siginfo_t *info, void *) { fail("an access to %p, which is not mapped", info->si_addr); }

// A cluster, from this block on.
const char *run_blocks(int first, int threads) {
  const size_t fixed_bytes = fixed_end - fixed;
  const int count = threads * (int)blocks.size();
  memset(memory.data(), 0xFF, memory.size());
  memset(fixed, 0xFF, fixed_bytes);
  fibers.clear();
  fibers.resize(count);
  engines.clear();
  const Clock none = nothing();
  for (Block &block : blocks) {
    block.all = Meeting{};
    block.words[0].assign(fixed_bytes / 4 + 1, {});
    block.words[1].assign(dynamic_bytes / 4 + 1, {});
    block.alive = threads, block.known = none;
  }
  barriers.clear();
  warps.assign(count / WARP, Meeting{});
  cluster = {0, 0, none, none};
  begin_hopper();
  ready.clear();
  resident = 0, alive = count;
  for (int i = 0; i < count; i++) {
    Fiber &f = fibers[i];
    f.groups.emplace_back();
    f.clock = none;
    f.clock[i] = 1;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks.get() + STACK * i, f.context.uc_stack.ss_size = STACK;
    makecontext(&f.context, enter, 0);
    ready.push_back(i);
  }
  while (!ready.empty() || idle()) {
    if (failed) return message;
    if (ready.empty()) continue;
    std::swap(ready[random_() % ready.size()], ready.back());
    current = ready.back(), ready.pop_back();
    emulated_rank = current / threads, threadIdx.x = current % threads, blockIdx.x = first + emulated_rank;
    bring();
    resume();
    if (failed) return message;
  }
  for (int i = 0; i < count; i++) {
    if (fibers[i].ended) continue;
    snprintf(message, sizeof message, "block %d, thread %d waits for ever: %s", first + i / threads, i % threads,
             fibers[i].what);
    return message;
  }
  return nullptr;
}

}  // namespace

extern "C" {

const uint64_t *emulated_meet(bool block, unsigned mask, uint64_t value, const char *what, int line);

// Runs a grid, in clusters of so many blocks: what went wrong, or null. An odd seed: copies happen when they are
// waited for, and not before. Of half of the seeds, in turns that follow no launch's: the last cluster comes first, so
// that what one writes in another's place stays there; what it asks for ahead has been read by then, and is counted.
const char *emulated_run(void (*kernel)(void **), void **values, int grid, int clustered, int threads, int bytes,
                         unsigned seed, char *shared, char *shared_end) {
  if ((size_t)bytes + (shared_end - shared) > LIMIT) return "more shared memory than a thread block may have";
  if (threads % WARP) return "warps that are not whole";
  if (threads > 1024) return "more threads than a thread block may have";
  if (grid % clustered) return "clusters that are not whole";
  body = kernel, parameters = values, failed = false, late = seed & 1, backwards = __builtin_parity(seed >> 1) && grid > clustered;
  ahead.clear(), asked_ahead = 0;
  random_.seed(seed);
  blocks.assign(clustered, Block{});
  if (const size_t wanted = STACK * threads * clustered; wanted > stacks_bytes)
    stacks.reset(new char[wanted]), stacks_bytes = wanted;  // of which little is ever touched
  fixed = shared, fixed_end = shared_end, fixed_hop = fixed_end - fixed;
  dynamic_bytes = bytes, dynamic_hop = (bytes + 1024) / 1024 * 1024 + BEYOND;
  memory.resize(BEYOND + 1024 + (dynamic_hop + fixed_hop) * clustered);
  dynamic = (char *)(((uintptr_t)memory.data() + BEYOND + 1023) / 1024 * 1024), aside = dynamic + dynamic_hop * clustered;
  gridDim = {(unsigned)grid, 1, 1}, blockDim = {(unsigned)threads, 1, 1};

  static char spare[64 << 10];  // a fiber's stack may be what is not mapped
  stack_t stack{}, stack_before;
  stack.ss_sp = spare, stack.ss_size = sizeof spare;
  sigaltstack(&stack, &stack_before);
  struct sigaction action {}, before[2];
  action.sa_sigaction = fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before[0]), sigaction(SIGBUS, &action, &before[1]);
  const char *told = nullptr;
  for (int block = 0; block < grid && !told; block += clustered)
    told = run_blocks(backwards ? grid - clustered - block : block, threads);
  current = -1;
  sigaction(SIGSEGV, &before[0], nullptr), sigaction(SIGBUS, &before[1], nullptr);
  sigaltstack(&stack_before, nullptr);
  return !told && !ahead.empty() ? "a line of memory that is asked for ahead is read by nobody behind that" : told;
}

// Of the launches to come: see `overlaps`.
void emulated_overlaps(bool told, const Settled *known, int count) {
  overlaps = told, settled.assign(known, known + count);
}
int emulated_ahead() { return asked_ahead; }
void emulated_prefetch(const void *at) {
  if (place(at)) fail("asks for %p into a cache, which is shared memory", at);
  if (!backwards && !ahead.insert((uintptr_t)at / LINE).second) fail("asks again for a line of memory that nobody has read yet");
  asked_ahead++;
}
void emulated_wait_for_previous() { self().clock[previous()] = 1; }

void *emulated_dynamic() { return dynamic + emulated_rank * dynamic_hop; }

unsigned emulated_to_shared(const void *at) {
  if (at == (char *)emulated_dynamic() + dynamic_bytes) return DYNAMIC + (unsigned)dynamic_bytes;
  const uint32_t found = place(at);
  if (!found || rank_of(found) != emulated_rank) fail("%p is no address of the thread block's shared memory", at);
  return offset_of(found);
}

// Shared memory of a cluster's blocks.
unsigned emulated_map(unsigned at, unsigned rank) {
  if (rank >= blocks.size()) fail("there is no block %u in a cluster of %zu", rank, blocks.size());
  return ranked(offset_of(at), rank);
}
void emulated_put(unsigned at, const void *from, int bytes) {
  char *const to = from_shared(at, bytes);
  accesses(to, bytes, WRITE);
  memcpy(to, from, bytes);
}
void emulated_add(unsigned at, unsigned value, bool shared) {
  char *const to = from_shared(at, sizeof value, shared);
  accesses(to, sizeof value, ADD);
  *(unsigned *)to += value;
}

// The barrier of a cluster. releases: what was written before can be seen behind it.
void emulated_cluster_arrive(bool releases, int line) {
  emulated_meet(false, 0xFFFFFFFF, 0, "barrier.cluster.arrive", line);  // aligned
  Fiber &f = self();
  if (f.arrivals != f.waits) fail("barrier.cluster.arrive of line %d, again, and no wait before it", line);
  f.arrivals++;
  if (releases) {
    join(cluster.coming, f.clock);
    f.clock[current]++;
  } else if (!f.fenced.empty()) {
    join(cluster.coming, f.fenced);
  }
  if (++cluster.arrived == alive) gathered();
}
void emulated_cluster_wait(int line) {
  emulated_meet(false, 0xFFFFFFFF, 0, "barrier.cluster.wait", line);
  Fiber &f = self();
  if (f.arrivals == f.waits) fail("barrier.cluster.wait of line %d, and no arrive before it", line);
  while (cluster.times < f.arrivals) wait(&cluster, "barrier.cluster.wait");
  f.waits++;
  join(f.clock, cluster.done);
  f.clock.back() = f.waits;
}

void emulated_aligned(const void *at, int bytes) {
  if ((uintptr_t)at % bytes) fail("%d bytes at %p, no multiple of them", bytes, at);
}

// Asynchronous copies of a thread.
void emulated_copy(unsigned to, const void *from, int bytes) {
  emulated_aligned(from, bytes);
  accesses(from, bytes, READ);
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

const uint64_t *emulated_meet(bool block, unsigned mask, uint64_t value, const char *what, int line) {
  const Met met = meet(block, mask, what, line, [&](Meeting &m, int turn) { m.left[turn][current % WARP] = value; });
  return met.meeting.left[met.turn];
}

}  // extern "C"

#include "hopper.h"

#include "mma.h"
