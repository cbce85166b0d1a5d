// Barriers in shared memory (mbarrier). A part of runtime.cpp.
// Source: PTX ISA, `mbarrier`: phases, arrivals, bytes of transactions.
#pragma once

namespace {

// A barrier in shared memory (mbarrier). bytes: that are yet to come in this phase. engine: what brings them,
// whose moments are phases.
struct Barrier {
  uint32_t count, pending, phase, engine;
  int64_t bytes;
  Clock coming, done;  // what those knew who arrived: in this phase, and up to the one before
};

std::unordered_map<uint32_t, Barrier> barriers;  // by their addresses in the cluster

// seen: by a thread, in order with what made it.
Barrier &barrier(uint32_t at, bool shared = true, bool seen = true) {
  if (char *const p = from_shared(at, 8, shared); seen) accesses(p, 8, READ);
  const auto found = barriers.find(ranked(at));
  if (found == barriers.end()) fail("a barrier at shared address %u that was not initialized", at);
  return found->second;
}

// Ends a phase of a barrier whose arrivals and bytes have all come.
void advance(Barrier &b) {
  if (b.pending || b.bytes) return;
  b.pending = b.count, b.done = b.coming, b.done[b.engine] = ++b.phase;
  wake(&b);
}

}  // namespace

extern "C" {

void emulated_barrier_init(unsigned at, unsigned count) {
  accesses(from_shared(at, 8), 8, WRITE);
  barriers[ranked(at)] = {count, count, 0, engine("a bulk copy"), 0, nothing(), nothing()};
}
// Those that this thread made can be seen behind its next arrival, of whatever kind.
void emulated_barrier_fence() {
  self().fenced = self().clock;
  self().fenced[previous()] = 0;  // of the kernel before it says nothing
  self().clock[current]++;
}
void emulated_barrier_arrive(unsigned at, bool shared) {
  Barrier &b = barrier(at, shared);
  if (!b.pending) fail("more arrivals at a barrier than it counts");
  join(b.coming, self().clock);
  self().clock[current]++;
  b.pending--;
  advance(b);
}
// mbarrier.arrive.expect_tx.
void emulated_barrier_expect(unsigned at, unsigned bytes) {
  barrier(at).bytes += bytes;
  emulated_barrier_arrive(at, true);
}
void emulated_barrier_wait(unsigned at, unsigned parity) {
  Barrier &b = barrier(at);
  while ((b.phase & 1) == (parity & 1)) wait(&b, "a barrier in shared memory");
  join(self().clock, b.done);
}

}  // extern "C"
