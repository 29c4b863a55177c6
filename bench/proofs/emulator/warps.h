// Instructions by which the threads of a warp meet. All threads that an instruction names have to be there.

#define FULL 0xffffffffu

static u32 present(int segment, int from) {
  u32 mask = 0;
  for (int lane = 0; lane < 32; lane++)
    if (at[from + lane] == segment || !diverged) mask |= 1u << lane;
  return mask;
}

enum Shuffle { bfly, up, down, idx };

// Which lane a lane reads, and in `valid` whether that is inside its part of the warp.
static int source_lane(enum Shuffle mode, int lane, u32 b, u32 c, int *valid) {
  int clamp = c & 31, part = c >> 8 & 31, highest = (lane & part) | (clamp & ~part), j;
  b &= 31;
  if (mode == up) j = lane - (int)b, *valid = j >= highest;
  else {
    j = mode == down ? lane + (int)b : mode == bfly ? lane ^ (int)b : (lane & part) | ((int)b & ~part);
    *valid = j <= highest;
  }
  return *valid ? j : lane;
}

// Matrices of 8 x 8 halves of words. Of matrix i, lane 4 * row + column / 2 has the halves in its i-th register, and
// lanes 8 * i to 8 * i + 7 the addresses of the rows.
static u32 matrix_address(const u32 *addresses, int matrix, int lane, int half, int transposed) {
  int row = lane / 4, column = lane % 4 * 2 + half;
  return transposed ? addresses[8 * matrix + column] + 2 * row : addresses[8 * matrix + row] + 2 * column;
}
