// What Hopper's blocks have beside threads: bulk copies of tiles, and products of warpgroups. A part of
// runtime.cpp.
//
// Both are engines with clocks of their own. What a bulk copy writes is known to who has waited for the
// phase of its barrier; what a product reads, to who has waited for its group. Accumulators hold nonsense
// until then. Late: a copy happens once no thread can go on, a product when its group is waited for.
//
// A sparse product's A has two of each four entries of K; metadata, four bits for the four, say which: the
// lowest two are the index of the first, the others that of the second. Eight fours are a word of a lane: for
// lane l, of row 8 (l % 2) + l / 4 of the warp's sixteen and half l / 2 % 2 of K.
// Source: PTX ISA, `cp.async.bulk.tensor`, `mbarrier`, `wgmma`: its matrix descriptors, the fragments of D,
// sparse storage; CUTLASS, `SM90::GMMA::ELayout_64x64`; CUDA Driver API, tensor maps. Their swizzle: of an
// address in shared memory, whose bits 4 to 6 (of 128 bytes; fewer of less) are those changed by bits 7 to 9.
#pragma once
#if defined(__x86_64__)
#define COUNTS __attribute__((target("popcnt")))
#else
#define COUNTS
#endif

namespace {

constexpr int GROUP = 128;                 // threads of a warpgroup
constexpr int NONSENSE = (int)0x80C0FFEE;  // what accumulators hold
constexpr int SPAN = 32;                   // bytes of K of a product; of a sparse one's B twice as many
constexpr uint64_t MAP = 0x7061546F736E6574, POLICY = 0x14F0000070617468;

// What `tensor_maps` packs into 128 bytes: a matrix of bytes. swizzle: bytes of a row that are.
struct Map { uint64_t kind, address, width, rows, stride, box_width, box_rows, swizzle, rest[8]; };

struct Bulk {
  Map map;
  int x, y, by;
  uint32_t to, barrier;
};

// Of operands. SPARSE: bytes, and of A half of them.
enum Entries { BYTES, BITS, SPARSE };

// A product of a warpgroup: descriptors of its operands, columns, whether it adds; what each thread says of A.
struct Product {
  uint64_t a, b;
  int columns;
  Entries entries;
  int add, line;
  uint32_t group, metadata[GROUP];
};

struct Warpgroup {
  uint32_t engine = 0, last = 0, turn = 0;  // last: the group of the last product
  int arrived = 0;
  Product asked;
  Clock known;  // to all who ask
  std::deque<Product> waiting;
  std::vector<int> sums;  // (64, columns)
  int *registers[GROUP] = {};
  uint32_t commits[GROUP] = {};
  bool fenced[GROUP] = {};
};

struct Named {
  int arrived = 0, count = 0;
  unsigned turn = 0;
  Clock known[2];
};

std::vector<Bulk> under_way;
std::vector<Warpgroup> warpgroups;
std::vector<Named> named;  // 16 of each block

void begin_hopper() {
  under_way.clear();
  warpgroups.assign(fibers.size() / GROUP, Warpgroup{});
  named.assign(16 * blocks.size(), Named{});
}

uint32_t swizzled(uint32_t at, uint32_t bytes) { return at ^ (at >> 3 & (bytes - 16)); }

// A copy comes, and its barrier is told.
void come(const Bulk &bulk) {
  const Map &m = bulk.map;
  char *const window = dynamic + rank_of(bulk.to) * dynamic_hop - DYNAMIC;
  current = bulk.by;
  for (uint32_t r = 0; r < m.box_rows; r++) {
    const int64_t row = (int64_t)bulk.y + r;
    for (uint32_t c = 0; c < m.box_width; c += 16) {
      char *const to = window + swizzled(offset_of(bulk.to) + r * m.box_width + c, m.swizzle);
      const int64_t column = (int64_t)bulk.x + c;
      const bool inside = row >= 0 && row < (int64_t)m.rows;
      if (inside && column >= 0 && column + 16 <= (int64_t)m.width) {
        memcpy(to, (const char *)m.address + row * m.stride + column, 16);
      } else {
        for (int i = 0; i < 16; i++) {
          const bool there = inside && column + i >= 0 && column + i < (int64_t)m.width;
          to[i] = there ? ((const char *)m.address)[row * m.stride + column + i] : 0;
        }
      }
    }
  }
  Barrier &b = barriers[bulk.barrier];
  b.bytes -= m.box_width * m.box_rows;
  advance(b);
}

// One of the copies that are under way comes; false: there is none.
bool come_late() {
  if (under_way.empty()) return false;
  std::swap(under_way[random_() % under_way.size()], under_way.back());
  const Bulk bulk = under_way.back();
  under_way.pop_back();
  come(bulk);
  return true;
}

Warpgroup &warpgroup() {
  Warpgroup &w = warpgroups[current / GROUP];
  if (!w.engine) w.engine = engine("a wgmma");
  return w;
}

// Where 16 bytes of a row of an operand lie among dynamic shared memory's addresses.
uint32_t operand_at(uint64_t descriptor, int row, int chunk) {
  static constexpr uint32_t BYTES[] = {0, 128, 64, 32};  // of a row that is swizzled
  const uint32_t width = BYTES[descriptor >> 62], groups = (descriptor >> 32 & 0x3FFF) << 4;
  if (!width || descriptor >> 49 & 7) fail("an operand of wgmma that is not swizzled, or with an offset");
  const uint32_t at = (uint32_t)(descriptor & 0x3FFF) << 4;
  const uint32_t found = swizzled(at + row / 8 * groups + row % 8 * width + 16 * chunk, width);
  if (found + 16 > dynamic_bytes) fail("an operand of wgmma beyond the block's shared memory");
  return DYNAMIC + found;
}

// Reads an operand, as others see it. What a thread has written would take a fence of proxies.
void look(const Warpgroup &w, uint64_t descriptor, int rows, int span = SPAN) {
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < span; i += 4) {
      const uint32_t at = ranked(operand_at(descriptor, r, i / 16) + i % 16);
      for (const Access &a : word_at(at))
        if (a.writes && a.thread < fibers.size())
          fail("a wgmma reads what %s has written: the emulator knows no fence of proxies", Name(a.thread).told);
      access(at, 4, READ, w.engine, w.asked.group, w.known);
    }
}

template <typename T> void gather(T *to, uint64_t descriptor, int rows, int span = SPAN) {
  const char *const window = dynamic + emulated_rank * dynamic_hop - DYNAMIC;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < span / 16; c++) {
      const char *const from = window + operand_at(descriptor, r, c);
      if constexpr (sizeof(T) == 8) memcpy(to + 4 * r + 2 * c, from, 16);
      else for (int i = 0; i < 16; i++) to[span * r + 16 * c + i] = (int8_t)from[i];
    }
}

// The entries of A that are kept, each in its place, and zeros in the others.
void spread(int16_t *to, const int16_t *kept, const Product &p) {
  std::fill(to, to + 64 * 2 * SPAN, 0);
  for (int t = 0; t < GROUP; t++) {
    const int lane = t % WARP, row = 16 * (t / WARP) + 8 * (lane % 2) + lane / 4, half = lane / 2 % 2;
    for (int i = 0; i < 8; i++) {
      const int four = 8 * half + i, places = p.metadata[t] >> 4 * i & 15;
      for (int k = 0; k < 2; k++)
        to[2 * SPAN * row + 4 * four + (places >> 2 * k & 3)] = kept[SPAN * row + 2 * four + k];
    }
  }
}

void add_products(int *sums, const int16_t *a, const int16_t *b, int columns, int span) {
  for (int i = 0; i < 64; i++)
    for (int j = 0; j < columns; j++) {
      int sum = 0;
      for (int k = 0; k < span; k++) sum += a[span * i + k] * b[span * j + k];
      sums[i * columns + j] += sum;
    }
}

COUNTS void multiply(Warpgroup &w, const Product &p) {
  const int n = p.columns;
  int *const sums = w.sums.data();
  if (!p.add) std::fill(sums, sums + 64 * n, 0);
  if (p.entries == BITS) {
    static uint64_t a[64 * 4], b[256 * 4];
    gather(a, p.a, 64), gather(b, p.b, n);
    for (int i = 0; i < 64; i++)
      for (int j = 0; j < n; j++)
        for (int k = 0; k < 4; k++) sums[i * n + j] += __builtin_popcountll(a[4 * i + k] & b[4 * j + k]);
  } else {
    static int16_t a[64 * SPAN], b[256 * 2 * SPAN], whole[64 * 2 * SPAN];
    const int span = p.entries == SPARSE ? 2 * SPAN : SPAN;
    gather(a, p.a, 64), gather(b, p.b, n, span);
    if (p.entries == SPARSE) spread(whole, a, p);
    add_products(sums, p.entries == SPARSE ? whole : a, b, n, span);
  }
}

// Between a thread's accumulators and the sums of its warpgroup.
template <typename F> void fragment(Warpgroup &w, F each) {
  const int n = w.asked.columns, t = current % GROUP, lane = t % WARP;
  for (int i = 0; i < n / 2; i++)
    each(i, w.sums[(16 * (t / WARP) + lane / 4 + 8 * (i / 2 % 2)) * n + 8 * (i / 4) + 2 * (lane % 4) + i % 2]);
}

}  // namespace

extern "C" {

// A tile of the matrix that a tensor map describes, to the same place in each of these blocks; 0: where `to`
// and `at` say.
uint64_t emulated_policy(bool first) { return POLICY + first; }

void emulated_cached(uint64_t policy) {
  if (policy - POLICY > 1) fail("a bulk copy with a cache policy that nobody made");
}

void emulated_load(unsigned to, const void *map, int x, int y, unsigned at, unsigned ranks) {
  Bulk bulk{{}, x, y, current};
  memcpy(&bulk.map, map, sizeof bulk.map);
  const Map &m = bulk.map;
  if (m.kind != MAP) fail("a bulk copy by what is no tensor map");
  if (offset_of(to) < DYNAMIC || offset_of(to) % 128) fail("a bulk copy to shared address %u", to);
  const uint32_t bytes = (uint32_t)(m.box_width * m.box_rows);
  for (unsigned rank = 0; rank < (ranks ? 32 : 1); rank++) {
    if (ranks && !(ranks >> rank & 1)) continue;
    bulk.to = ranks ? emulated_map(to, rank) : ranked(to), bulk.barrier = ranks ? emulated_map(at, rank) : ranked(at);
    insist(rank_of(bulk.to));
    const Barrier &b = barrier(bulk.barrier, false, false);
    from_shared(bulk.to, 16, false), from_shared(bulk.to + bytes - 16, 16, false);
    const int64_t left = std::max(x, 0), right = std::min<int64_t>((int64_t)x + m.box_width, m.width);
    for (int64_t r = std::max(y, 0); r < std::min<int64_t>((int64_t)y + m.box_rows, m.rows) && left < right; r++)
      insist_on_previous((const char *)m.address + r * m.stride + left, right - left, false);
    auto by_engine = [&](uint32_t word, Kind kind) { access(word, 4, kind, b.engine, b.phase + 1, self().clock); };
    for (uint32_t i = 0; i < 8; i += 4) by_engine(bulk.barrier + i, READ);
    for (uint32_t i = 0; i < bytes; i += 4) by_engine(bulk.to + i, WRITE);  // swizzled among themselves
    if (late) under_way.push_back(bulk);
    else come(bulk);
  }
}

void emulated_wgmma_fence() { warpgroup().fenced[current % GROUP] = true; }
void emulated_wgmma_commit() { warpgroup().commits[current % GROUP]++; }

void emulated_wgmma_wait(int left) {
  Warpgroup &w = warpgroup();
  const int t = current % GROUP, group = (int)w.commits[t] - left;
  if (group <= 0) return;
  for (; !w.waiting.empty() && w.waiting.front().group <= (uint32_t)group; w.waiting.pop_front())
    multiply(w, w.waiting.front());
  uint32_t &known = self().clock[w.engine];
  known = std::max(known, (uint32_t)group);
  if (!w.registers[t] || (uint32_t)group < w.last) return;
  fragment(w, [&](int i, int sum) { w.registers[t][i] = sum; });
  w.registers[t] = nullptr, w.fenced[t] = false;
}

// wgmma.mma_async, m64nNk32 of int8, or k256 of bits: columns / 2 accumulators of each thread. And
// wgmma.mma_async.sp, m64nNk64 of int8.
void emulated_wgmma(int *registers, int columns, int entries, uint64_t a, uint64_t b, unsigned metadata, int add,
                    int line) {
  Warpgroup &w = warpgroup();
  const int t = current % GROUP;
  const Product asked{a, b, columns, (Entries)entries, !!add, line, w.commits[t] + 1, {}};
  if (!w.arrived) {
    w.asked = asked, w.known = self().clock;
    w.sums.resize(64 * columns);
  } else {
    const Product &p = w.asked;
    if (p.a != a || p.b != b || p.columns != columns || p.entries != entries || p.add != !!add || p.line != line ||
        p.group != asked.group)
      fail("a wgmma of line %d that is not the same in its warpgroup", line);
    for (size_t i = 0; i < w.known.size(); i++) w.known[i] = std::min(w.known[i], self().clock[i]);
  }
  w.asked.metadata[t] = metadata;
  for (int i = 0; entries == SPARSE && i < 32; i += 4)
    if ((metadata >> i & 3) == (metadata >> (i + 2) & 3))
      fail("a wgmma of line %d with metadata %08x, which name an entry twice", line, metadata);
  if (!w.registers[t]) {
    if (!w.fenced[t]) fail("accumulators of a wgmma of line %d without wgmma.fence", line);
    w.registers[t] = registers;
    fragment(w, [&](int i, int &sum) { sum = registers[i]; });
  } else if (w.registers[t] != registers) {
    fail("a wgmma of line %d while others' accumulators are not waited for", line);
  }
  std::fill(registers, registers + columns / 2, NONSENSE);
  const uint32_t turn = w.turn;
  if (++w.arrived < GROUP) {
    while (w.turn == turn) wait(&w, "wgmma");
    return;
  }
  w.arrived = 0, w.turn++, w.last = asked.group;
  look(w, a, 64), look(w, b, columns, entries == SPARSE ? 2 * SPAN : SPAN);
  if (late) w.waiting.push_back(w.asked);
  else multiply(w, w.asked);
  wake(&w);
}

// bar.sync
void emulated_bar_sync(unsigned id, int count, int line) {
  if (id >= 16 || count % WARP) fail("bar.sync of line %d of barrier %u, of %d threads", line, id, count);
  emulated_meet(false, 0xFFFFFFFF, 0, "bar.sync", line);  // whole warps
  Named &m = named[16 * emulated_rank + id];
  const unsigned turn = m.turn & 1;
  if (!m.arrived) m.count = count, m.known[turn].assign(self().clock.size(), 0);
  if (m.count != count) fail("bar.sync of line %d of %d threads, where others wait for %d", line, count, m.count);
  join(m.known[turn], self().clock);
  if (++m.arrived == count) {
    m.arrived = 0, m.turn++;
    wake(&m);
  } else {
    while ((m.turn & 1) == turn) wait(&m, "bar.sync");
  }
  join(self().clock, m.known[turn]);
  self().clock[current]++;
}

}  // extern "C"
