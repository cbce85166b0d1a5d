// Accesses of shared memory, and whether each is in an order with those before it. A part of runtime.cpp.
//
// They are seen by the calls that the compiler makes of them for another tool, ThreadSanitizer, whose own
// library is not there: the __tsan_ functions at the end.
// Source of the order: PTX ISA, Memory Consistency Model; CUDA C++ Programming Guide (shuffles and votes are no
// barriers of memory); FastTrack, Flanagan and Freund 2009, of which this is the plain form.
#pragma once

namespace {

enum Kind { READ, WRITE, ADD, COPY, COPIED };
const char *const DOES[] = {"reads", "writes", "adds to", "has a copy write", "has waited for a copy to"};

// Who makes an access: a thread or an engine.
struct Name {
  char told[48];
  Name(uint32_t by) {
    const unsigned n = blockDim.x;
    if (by >= fibers.size()) snprintf(told, sizeof told, "%s", engines[by - fibers.size()]);
    else snprintf(told, sizeof told, "thread %u of block %u", by % n, blockIdx.x - emulated_rank + by / n);
  }
};

Clock nothing() { return Clock(fibers.size() + ENGINES + 2, 0); }
size_t previous() { return fibers.size() + ENGINES; }  // the kernel before this one, in a clock

uint32_t engine(const char *what) {
  if (engines.size() == ENGINES) fail("more barriers and warpgroups than the emulator has room for");
  engines.push_back(what);
  return (uint32_t)(fibers.size() + engines.size() - 1);
}

// Accesses to the word at an address, those that others may yet have to be in order with.
std::vector<Access> &word_at(uint32_t place) {
  const uint32_t at = offset_of(place);
  return blocks[rank_of(place)].words[at >= DYNAMIC][(at >= DYNAMIC ? at - DYNAMIC : at) / 4];
}

// An access of up to four bytes of a word of shared memory: an error where another is in no order with it.
// By a thread or an engine, at a moment of its own, which knows of others what `clock` says.
void access(uint32_t place, int bytes, Kind kind, uint32_t by, uint32_t moment, const Clock &clock) {
  const uint32_t at = offset_of(place);
  auto &word = word_at(place);
  const uint8_t mask = (uint8_t)(((1 << bytes) - 1) << at % 4);
  const bool writes = kind != READ, adds = kind == ADD;
  if (kind == COPIED)  // its own, which it asked for
    for (size_t i = word.size(); i-- > 0;)
      if (word[i].pending && word[i].thread == by) word.erase(word.begin() + i);
  for (size_t i = word.size(); i-- > 0;) {
    const Access &a = word[i];
    if (!(a.bytes & mask)) continue;
    const bool mine = a.thread == by, before = mine || a.moment <= clock[a.thread];
    if ((a.writes || writes) && !(a.atomic && adds) && (a.pending || !before))
      fail("a race: %s %s shared address %u of block %u, which %s %s", Name(by).told, DOES[kind], at,
           blockIdx.x - emulated_rank + rank_of(place), Name(a.thread).told,
           a.pending  ? "has a copy write that was not waited for"
           : a.atomic ? "adds to"
           : a.writes ? "writes"
                      : "reads");
    // What the new one stands for: who is in order with it is in order with that.
    if ((a.bytes & ~mask) == 0 && before && (adds ? mine && a.atomic : writes || (mine && !a.writes)))
      word[i] = word.back(), word.pop_back();
  }
  word.push_back({(uint16_t)by, mask, writes, kind == COPY, adds, moment});
}

// Ends the run unless the shared memory of a block of the cluster is there.
void insist(unsigned rank) {
  if (rank == emulated_rank) return;
  if (!self().clock.back()) fail("an access to shared memory of another block, which may not have begun");
  if (!blocks[rank].alive) fail("an access to shared memory of another block, which has ended");
}

// Whether a thread's own: what lies on its stack, and what it reads of its place in the grid.
bool is_own(const char *at) {
  for (const void *one : {(void *)&threadIdx, (void *)&blockIdx, (void *)&blockDim, (void *)&gridDim, (void *)&emulated_rank})
    if (at >= one && at < (const char *)one + sizeof(Dimensions)) return true;
  return at >= stacks.get() && at < stacks.get() + stacks_bytes;
}

// Ends the run unless the kernel before this one is known to have ended, or is no matter there.
void insist_on_previous(const void *at, size_t bytes, bool writes) {
  if (!overlaps || self().clock[previous()] || is_own((const char *)at)) return;
  for (const Settled &s : settled)
    if (!writes && (uintptr_t)at >= s.first && (uintptr_t)at + bytes <= s.end) return;
  fail("it %s global memory before the kernel before it has ended", writes ? "writes" : "reads");
}

void accesses(const void *at, size_t bytes, Kind kind) {
  if (current < 0) return;
  uint32_t p = place(at);
  if (!p) {
    if (at >= memory.data() && at < memory.data() + memory.size()) fail("an access beyond shared memory");
    insist_on_previous(at, bytes, kind != READ);
    if (kind == READ && !ahead.empty())
      for (uintptr_t line = (uintptr_t)at / LINE; line <= ((uintptr_t)at + bytes - 1) / LINE; line++) ahead.erase(line);
    return;
  }
  insist(rank_of(p));
  for (const uint32_t end = p + (uint32_t)bytes; p < end;) {
    const int n = (int)std::min<uint32_t>(4 - p % 4, end - p);
    access(p, n, kind, current, self().clock[current], self().clock);
    p += n;
  }
}

}  // namespace

// Where the compiler's own checks find something: the first words of what it tells.
struct Source { const char *file; uint32_t line, column; };

extern "C" {

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
// And where an address is no multiple of what is read or written there.
void __ubsan_handle_type_mismatch_v1(void *, void *at) { fail("an access to %p, which is no multiple of its size", at); }
// Or an index is none of an array's: of registers, where nothing lies that a GPU would miss.
void __ubsan_handle_out_of_bounds(const Source *at, void *index) {
  fail("line %u: index %lld, which the array does not have", at->line, (long long)(intptr_t)index);
}

}  // extern "C"
