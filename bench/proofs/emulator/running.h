// Runs the threads of programs. Included after the segments of a kernel, which are its straight pieces of code.
//
// A segment runs all threads of a group that are at it. Among threads that are at different segments, those at the
// lowest one go first. Where the threads of a warp meet, the first wait for the others, which go on meanwhile.

static void run_group(int from, int to) {
  int stuck = -1;  // up to this segment, all threads wait for others of their warps
  for (;;) {
    int lowest = EXITED, highest = 0, left = EXITED;
    for (int t = from; t < to; t++) {
      if (at[t] > stuck && at[t] < lowest) lowest = at[t];
      if (at[t] < left) left = at[t];
      if (at[t] > highest) highest = at[t];
    }
    if (lowest >= WAITING && left < WAITING) fail(WARP_DIVERGED, first_instruction[left], from, 0, 0, 0);
    if (lowest >= WAITING) return;
    diverged = left != highest;
    int next = lowest;
    do progress = 1, calls++, next = segments[next](from, to);
    while (next >= 0);
    stuck = progress ? -1 : lowest;
  }
}

static void run_program(int warps_at_a_time, int backwards) {
  memset(&registers, 255, sizeof registers);  // what was never written is NaN
  memset(shared, 255, sizeof shared);
  memset(copy_count, 0, sizeof copy_count);
  memset(group, 0, sizeof group);
  for (int t = 0; t < THREADS; t++) at[t] = 0;
  epoch++;
  int groups = (WARPS + warps_at_a_time - 1) / warps_at_a_time;
  for (;;) {
    for (int i = 0; i < groups; i++) {
      int from = 32 * warps_at_a_time * (backwards ? groups - 1 - i : i), to = from + 32 * warps_at_a_time;
      run_group(from, to < THREADS ? to : THREADS);
    }
    int barrier = EXITED;
    for (int t = 0; t < THREADS; t++) {
      if (at[t] == EXITED) continue;
      if (barrier != EXITED && at[t] != barrier) fail(BARRIERS_DIVERGED, 0, t, 0, 0, 0);
      barrier = at[t];
    }
    if (barrier == EXITED) return;
    for (int t = 0; t < THREADS; t++)
      if (at[t] != EXITED) at[t] -= WAITING;
    epoch++;
  }
}

// Runs all programs. Returns 0, or 1 if one of them failed.
int launch(const u32 *grid, const void *arguments, Block *passed, int passed_count, int in_warps, int backwards,
           double errors) {
  memcpy(parameters, arguments, sizeof parameters);
  memcpy(programs, grid, sizeof programs);
  blocks = passed, block_count = passed_count, recent = passed, off = errors;
  memset(&failure, 0, sizeof failure);
  if (setjmp(give_up)) return 1;
  u32 total = grid[0] * grid[1] * grid[2];
  for (u32 i = 0; i < total; i++) {
    u32 number = backwards ? total - 1 - i : i;
    program_number = number + 1;
    program[0] = number % grid[0], program[1] = number / grid[0] % grid[1], program[2] = number / grid[0] / grid[1];
    run_program(in_warps ? 1 : WARPS, backwards);
  }
  return 0;
}

void *where(void) { return &failure; }
void *threads_counted(void) { return threads_run; }
void *warps_counted(void) { return warps_run; }
void *memory_counted(void) { return counted; }
