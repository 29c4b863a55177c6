// Memory of a launch, and the checks of every access to it. Included after the constants of a kernel are defined.

enum Fault { NONE, OUTSIDE, MISALIGNED, RACE, STORES_RACE, PROGRAMS_RACE, ASSERTED, TRAPPED, WARP_DIVERGED, BARRIERS_DIVERGED, UNKNOWN };

// What went wrong first: where (an instruction, a thread of a program), and with which bytes.
static struct { s32 fault, instruction, thread, other, program[3], bytes; u64 address, message; } failure;
static jmp_buf give_up;

// Where threads are that wait at a barrier (the segment behind it is added), or that have ended.
enum { WAITING = 1 << 20, EXITED = 1 << 28 };

static u32 program[3], programs[3], program_number;
static u32 epoch, warp_epoch[WARPS];  // grow at every barrier of a program, and of a warp

static void fail(enum Fault fault, int instruction, int thread, int other, u64 address, int bytes) {
  failure.fault = fault, failure.instruction = instruction, failure.thread = thread, failure.other = other;
  failure.address = address, failure.bytes = bytes;
  for (int i = 0; i < 3; i++) failure.program[i] = program[i];
  longjmp(give_up, 1);
}

// ---- What is counted. An instruction is a request of the threads of a warp. One of device memory takes a sector of 32
// bytes at a time. One of shared memory takes a wavefront for every 128 bytes: of each of 32 banks, one word of 4 bytes.

enum { READ, WRITTEN };
enum { BYTES = 0, REQUESTS = 2, SECTORS = 4, PARTS = 6, WAVEFRONTS, COUNTS };
static u64 counted[COUNTS], calls;  // calls: of segments
typedef struct { u64 call, seen[32]; int warp, part, count; u32 number; u8 of_bank[32], most; } Request;
static Request latest[INSTRUCTIONS];
static u32 requests;

static inline int begins(Request *r, int warp, int part) {
  if (r->call == calls && r->warp == warp && r->part == part) return 0;
  r->call = calls, r->warp = warp, r->part = part, r->count = r->most = 0, r->number = ++requests;
  memset(r->of_bank, 0, sizeof r->of_bank);
  return 1;
}

static inline int is_new(Request *r, u64 what) {
  for (int i = r->count - 1; i >= 0; i--)
    if (r->seen[i] == what) return 0;
  r->seen[r->count++] = what;
  return 1;
}

static inline void ask_shared(u32 address, int bytes, int id, int t) {
  Request *r = latest + id;
  counted[PARTS] += begins(r, t / 32, bytes > 4 ? t % 32 * bytes / 128 : 0);
  for (u32 word = address / 4; word <= (address + bytes - 1) / 4; word++)
    if (is_new(r, word) && ++r->of_bank[word % 32] > r->most) r->most++, counted[WAVEFRONTS]++;
}

// ---- Device memory. A block is memory of tensors that were passed; `allowed` marks its bytes that belong to elements.

typedef struct { u32 epoch, warp_epoch; u16 thread; } Access;
typedef struct { u32 writer, reader; Access write; } Touched;  // programs, counted from 1; SEVERAL for more than one
enum { SEVERAL = 0xffffffff };
typedef struct { u32 request, times; } Asked;  // the last request that accessed an element, and how many have
typedef struct { u64 start, end; const u8 *allowed; u64 grain; Touched *touched; u64 moved[2]; Asked (*asked)[2]; } Block;
static Block *blocks, *recent;
static int block_count;

static inline Block *block_of(u64 address, int bytes, int id, int t) {
  if (address < recent->start || address + bytes > recent->end) {
    Block *found = 0;
    for (int i = 0; i < block_count; i++)
      if (blocks[i].start <= address && address + bytes <= blocks[i].end) found = blocks + i;
    if (!found) fail(OUTSIDE, id, t, 0, address, bytes);
    recent = found;
  }
  if (address % bytes) fail(MISALIGNED, id, t, 0, address, bytes);
  if (recent->allowed)
    for (int i = 0; i < bytes; i++)
      if (!recent->allowed[address - recent->start + i]) fail(OUTSIDE, id, t, 0, address, bytes);
  return recent;
}

// After block_of.
static inline void ask_global(u64 address, int bytes, int kind, int id, int t) {
  Request *r = latest + id;
  counted[BYTES + kind] += bytes;
  counted[REQUESTS + kind] += begins(r, t / 32, 0);
  counted[SECTORS + kind] += is_new(r, address / 32);  // an access is aligned, and 32 bytes wide at most
  if (!recent->asked) return;
  u64 last = (address - recent->start + bytes - 1) / recent->grain;
  for (u64 i = (address - recent->start) / recent->grain; i <= last; i++) {
    Asked *asked = recent->asked[i] + kind;
    if (asked->request != r->number) asked->request = r->number, asked->times++;
  }
}

// Whether there is no barrier between an earlier access and one of thread t, which another thread made.
static inline int unordered(const Access *a, int t) {
  return a->epoch == epoch && a->thread != t && (a->thread / 32 != t / 32 || a->warp_epoch == warp_epoch[t / 32]);
}

// Programs run in any order. So none may read or write what another one writes, unless it writes the same value.
static const u8 *read_global(u64 address, int bytes, int id, int t) {
  Block *block = block_of(address, bytes, id, t);
  block->moved[READ] += bytes;
  u64 last = (address - block->start + bytes - 1) / block->grain;
  for (u64 i = (address - block->start) / block->grain; i <= last; i++) {
    Touched *touched = block->touched + i;
    if (touched->writer && touched->writer != program_number)
      fail(PROGRAMS_RACE, id, t, touched->writer - 1, address, bytes);
    if (touched->reader != program_number) touched->reader = touched->reader ? SEVERAL : program_number;
  }
  return (const u8 *)address;
}

static inline const u8 *load_global(u64 address, int bytes, int id, int t) {
  const u8 *value = read_global(address, bytes, id, t);
  ask_global(address, bytes, READ, id, t);
  return value;
}

// Nor may a thread store another value where another thread of its program stored one, without a barrier in between.
static void store_global(u64 address, const void *value, int bytes, int id, int t) {
  Block *block = block_of(address, bytes, id, t);
  ask_global(address, bytes, WRITTEN, id, t);
  block->moved[WRITTEN] += bytes;
  u64 first = (address - block->start) / block->grain, last = (address - block->start + bytes - 1) / block->grain;
  for (u64 i = first; i <= last; i++) {
    Touched *touched = block->touched + i;
    u64 from = i == first ? 0 : block->start + i * block->grain - address;
    u64 to = i == last ? bytes : block->start + (i + 1) * block->grain - address;
    if (unordered(&touched->write, t) && memcmp((u8 *)address + from, (const u8 *)value + from, to - from))
      fail(STORES_RACE, id, t, touched->write.thread, address, bytes);
    if (touched->writer && touched->writer != program_number && memcmp((void *)address, value, bytes))
      fail(PROGRAMS_RACE, id, t, touched->writer - 1, address, bytes);
    if (touched->reader && touched->reader != program_number)
      fail(PROGRAMS_RACE, id, t, (int)touched->reader - 1, address, bytes);
    touched->writer = program_number;
    touched->write = (Access){epoch, warp_epoch[t / 32], t};
  }
  memcpy((void *)address, value, bytes);
}

// ---- Shared memory. Between two barriers, no thread may read or write what another one writes, unless both write the
// same value. A barrier of a warp suffices for threads of the same warp.

enum { SHARED_START = 1024 };  // so that the address 0 is never right
typedef struct { Access write, read, read_elsewhere; u8 several; } Shadow;  // read_elsewhere: in a warp that is not read's
static u8 shared[SHARED_BYTES + 1] __attribute__((aligned(128)));
static Shadow shadow[SHARED_BYTES + 1];

static inline u8 *shared_at(u32 address, int bytes, int id, int t) {
  if (address < SHARED_START || address + (u64)bytes > SHARED_START + SHARED_BYTES)
    fail(OUTSIDE, id, t, 0, address, bytes);
  if (address % bytes) fail(MISALIGNED, id, t, 0, address, bytes);
  return shared + (address - SHARED_START);
}

static const u8 *load_shared(u32 address, int bytes, int id, int t) {
  u8 *at = shared_at(address, bytes, id, t);
  ask_shared(address, bytes, id, t);
  Access now = {epoch, warp_epoch[t / 32], t};
  for (Shadow *s = shadow + (at - shared), *end = s + bytes; s < end; s++) {
    if (unordered(&s->write, t)) fail(RACE, id, t, s->write.thread, address, bytes);
    if (s->read.epoch != epoch) s->several = 0;
    else if (s->read.thread / 32 != t / 32) s->read_elsewhere = s->read, s->several = 0;
    else if (s->read.warp_epoch != now.warp_epoch) s->several = 0;
    else if (s->read.thread != t) s->several = 1;
    s->read = now;
  }
  return at;
}

static void write_shared(u32 address, const void *value, int bytes, int id, int t) {
  u8 *at = shared_at(address, bytes, id, t);
  Access now = {epoch, warp_epoch[t / 32], t};
  for (int i = 0; i < bytes; i++) {
    Shadow *s = shadow + (at - shared) + i;
    if (unordered(&s->write, t) && at[i] != ((const u8 *)value)[i])
      fail(RACE, id, t, s->write.thread, address, bytes);
    if (unordered(&s->read, t) || (s->several && s->read.epoch == epoch && s->read.warp_epoch == now.warp_epoch))
      fail(RACE, id, t, s->read.thread, address, bytes);
    if (s->read_elsewhere.epoch == epoch && unordered(&s->read_elsewhere, t))
      fail(RACE, id, t, s->read_elsewhere.thread, address, bytes);
    s->write = now;
  }
  memcpy(at, value, bytes);
}

static inline void store_shared(u32 address, const void *value, int bytes, int id, int t) {
  write_shared(address, value, bytes, id, t);
  ask_shared(address, bytes, id, t);
}

// ---- Copies from device to shared memory that nobody waits for arrive when their group is waited for, not before.

enum { MOST_COPIES = COPIES };
typedef struct { u64 from; u32 to; int bytes, size, group, id; } Copy;
static Copy copies[THREADS][MOST_COPIES + 1];
static int copy_count[THREADS], group[THREADS];

static void copy_async(u32 to, u64 from, int size, int bytes, int id, int t) {
  u8 poison[16];
  memset(poison, 255, sizeof poison);
  write_shared(to, poison, size, id, t);
  if (bytes) block_of(from, bytes, id, t), ask_global(from, bytes, READ, id, t);
  if (copy_count[t] == MOST_COPIES) fail(UNKNOWN, id, t, 0, from, bytes);
  copies[t][copy_count[t]++] = (Copy){from, to, bytes, size, group[t], id};
}

// Waits until at most `pending` of the youngest groups have not arrived.
static void wait_copies(int pending, int t) {
  int kept = 0;
  for (int i = 0; i < copy_count[t]; i++) {
    Copy copy = copies[t][i];
    if (copy.group > group[t] - pending - 1) {
      copies[t][kept++] = copy;
      continue;
    }
    u8 value[16] = {0};
    if (copy.bytes) memcpy(value, read_global(copy.from, copy.bytes, copy.id, t), copy.bytes);
    write_shared(copy.to, value, copy.size, copy.id, t);
  }
  copy_count[t] = kept;
}
