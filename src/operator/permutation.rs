//! Permutations of cells: no cell is mixed with another, and no cell is read twice.

use super::{memory::Memory, taps::NONE};

/// Number of lines that are turned together. A cache line holds as many `f32`.
const BLOCK: usize = 16;

/// `out[i] = in[source[i]]`, and zero where `source` is [`NONE`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Permutation {
    source: Vec<u32>,
    n_in: usize,
    /// The same list as runs of equal spacing.
    runs: Vec<Run>,
}

/// Neighboring output cells whose sources are equally spaced. Turns and flips make one run of each
/// line of the grid.
#[derive(Clone, Debug, PartialEq)]
struct Run {
    /// The source of the first cell, or [`NONE`] for all.
    first: u32,
    /// Distance between the sources of neighboring cells; 0 for a single cell.
    step: i32,
    /// The output cells are `start..end`.
    start: usize,
    end: usize,
}

impl Permutation {
    pub fn new(source: Vec<u32>, n_in: usize) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (i, &j) in source.iter().enumerate() {
            // grids have fewer than 2^32 cells, lines fewer than 2^31
            let step = |from: u32| (i64::from(j) - i64::from(from)) as i32;
            match runs.last_mut() {
                Some(run) if run.first == NONE && j == NONE => run.end += 1,
                Some(run) if run.first != NONE && j != NONE && i == run.start + 1 => {
                    run.step = step(run.first);
                    run.end += 1;
                }
                Some(run) if run.first != NONE && j != NONE && step(source[i - 1]) == run.step => {
                    run.end += 1;
                }
                _ => runs.push(Run { first: j, step: 0, start: i, end: i + 1 }),
            }
        }
        Self { source, n_in, runs }
    }

    pub fn source(&self) -> &[u32] {
        &self.source
    }

    pub fn n_in(&self) -> usize {
        self.n_in
    }

    pub fn n_out(&self) -> usize {
        self.source.len()
    }

    pub fn is_identity(&self) -> bool {
        let mut cells = self.source.iter().zip(0u32..);
        self.n_in == self.n_out() && cells.all(|(&j, i)| j == i)
    }

    /// Moves each cell back to its source.
    pub fn inverse(&self) -> Self {
        let mut inverse = vec![NONE; self.n_in];
        for (&j, i) in self.source.iter().zip(0u32..) {
            if j != NONE {
                inverse[j as usize] = i;
            }
        }
        Self::new(inverse, self.n_out())
    }

    /// `self ∘ first`.
    pub fn after(&self, first: &Self) -> Self {
        debug_assert_eq!(self.n_in, first.n_out());
        let through = |&j: &u32| match j {
            NONE => NONE,
            j => first.source[j as usize],
        };
        Self::new(self.source.iter().map(through).collect(), first.n_in)
    }

    /// Moves the values of one sample.
    pub fn apply<T: Copy + Default>(&self, x: &[T], out: &mut [T], memory: Memory) {
        match memory {
            Memory::Tokens(width) => self.cells(x, out, width),
            Memory::Planes(_) => {
                let planes = out.chunks_exact_mut(self.n_out());
                for (out, x) in planes.zip(x.chunks_exact(self.n_in)) {
                    self.plane(x, out);
                }
            }
        }
    }

    /// Moves cells of `width` contiguous values.
    fn cells<T: Copy + Default>(&self, x: &[T], out: &mut [T], width: usize) {
        for (out, &j) in out.chunks_exact_mut(width).zip(&self.source) {
            match j {
                NONE => out.fill(T::default()),
                j => out.copy_from_slice(&x[j as usize * width..][..width]),
            }
        }
    }

    /// Moves cells of one value.
    fn plane<T: Copy + Default>(&self, x: &[T], out: &mut [T]) {
        for block in self.runs.chunks(BLOCK) {
            match Turned::of(block) {
                Some(turned) => turned.fill(x, out),
                None => block.iter().for_each(|run| run.fill(x, 0, out)),
            }
        }
    }
}

/// Output lines that lie across neighboring lines of the source. Reading them together uses whole
/// cache lines.
struct Turned<'a> {
    lines: &'a [Run; BLOCK],
    len: usize,
    /// Whether the sources of the lines ascend.
    ascending: bool,
}

impl<'a> Turned<'a> {
    /// The block as turned lines, or `None` if its lines are irregular.
    fn of(block: &'a [Run]) -> Option<Self> {
        let lines: &[Run; BLOCK] = block.try_into().ok()?;
        let len = lines[0].len();
        let ascending = lines[1].first > lines[0].first;
        let follows = |pair: &[Run]| {
            let (before, after) = (&pair[!ascending as usize], &pair[ascending as usize]);
            before.first.checked_add(1) == Some(after.first) && before.step == after.step
        };
        let is_whole = |run: &Run| run.first != NONE && run.len() == len;
        let is_turned = lines.iter().all(is_whole) && lines.windows(2).all(follows);
        is_turned.then_some(Self { lines, len, ascending })
    }

    fn fill<T: Copy + Default>(&self, x: &[T], out: &mut [T]) {
        const WIDTH: usize = 8;
        let whole = self.len - self.len % WIDTH;
        let first = i64::from(self.lines[if self.ascending { 0 } else { BLOCK - 1 }].first);
        let step = i64::from(self.lines[0].step);
        for at in (0..whole).step_by(WIDTH) {
            let mut tile = [[T::default(); BLOCK]; WIDTH];
            for (k, across) in tile.iter_mut().enumerate() {
                let start = (first + step * (at + k) as i64) as usize;
                *across = x[start..].as_chunks().0[0];
            }
            for (i, run) in self.lines.iter().enumerate() {
                let i = if self.ascending { i } else { BLOCK - 1 - i };
                out[run.start + at..].as_chunks_mut().0[0] = tile.map(|across| across[i]);
            }
        }
        self.lines.iter().for_each(|run| run.fill(x, whole, out));
    }
}

impl Run {
    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Writes the cells of the run from number `at` on to their places in `out`.
    fn fill<T: Copy + Default>(&self, x: &[T], at: usize, out: &mut [T]) {
        let out = &mut out[self.start + at..self.end];
        if out.is_empty() {
            return;
        }
        let step = self.step.unsigned_abs() as usize;
        if self.first == NONE {
            out.fill(T::default());
        } else if self.step < 0 {
            let x = &x[..=self.first as usize - at * step];
            put(x.iter().rev(), step, out);
        } else {
            put(x[self.first as usize + at * step..].iter(), step.max(1), out);
        }
    }
}

/// Fills `out` with every `step`-th value of `x`.
fn put<'a, T: Copy + 'a>(x: impl ExactSizeIterator<Item = &'a T>, step: usize, out: &mut [T]) {
    debug_assert!((out.len() - 1) * step < x.len());
    match step {
        1 => out.iter_mut().zip(x).for_each(|(out, &x)| *out = x),
        _ => out.iter_mut().zip(x.step_by(step)).for_each(|(out, &x)| *out = x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

    /// Sources of a grid under a D4 element, of a shift with a border, and drawn at random.
    fn permutations() -> Vec<Permutation> {
        let rng = &mut StdRng::seed_from_u64(0);
        let mut all = Vec::new();
        for (rows, cols) in [(1u32, 1u32), (1, 7), (5, 1), (4, 6), (17, 33), (40, 19)] {
            let n = rows * cols;
            let across = |i: u32| (i % rows) * cols + i / rows;
            let back = |i: u32| n - 1 - i;
            let shift = |i: u32| if i.is_multiple_of(cols) { NONE } else { i - 1 };
            let mut drawn: Vec<u32> = (0..n).collect();
            drawn.shuffle(rng);
            drawn.iter_mut().filter(|_| rng.random_bool(0.2)).for_each(|j| *j = NONE);
            let maps: [&dyn Fn(u32) -> u32; 5] =
                [&|i| i, &across, &back, &|i| across(back(i)), &shift];
            let sources = maps.map(|map| (0..n).map(map).collect());
            all.extend(sources.into_iter().chain([drawn]).map(|s| Permutation::new(s, n as usize)));
        }
        // One of sixteen neighboring lines is shorter: custom actions may be irregular.
        for short in [0, 7, 15] {
            for ascending in [false, true] {
                let lines = (0..16u32).flat_map(|i| {
                    let first = if ascending { i } else { 15 - i };
                    (0..if i == short { 4 } else { 8 }).map(move |k| 16 * k + first)
                });
                all.push(Permutation::new(lines.collect(), 128));
            }
        }
        all
    }

    #[test]
    fn planes_and_cells_go_where_the_list_says() {
        for p in permutations() {
            let x: Vec<u32> = (1..=p.n_in() as u32).collect();
            let want: Vec<u32> =
                p.source().iter().map(|&j| if j == NONE { 0 } else { x[j as usize] }).collect();
            let mut plane = vec![9; p.n_out()];
            p.apply(&x, &mut plane, Memory::Planes(1));
            assert_eq!(plane, want);
            let wide: Vec<u32> = x.iter().flat_map(|&v| [v, v + 1000, v + 2000]).collect();
            let mut cells = vec![9; 3 * p.n_out()];
            p.apply(&wide, &mut cells, Memory::Tokens(3));
            let firsts: Vec<u32> = cells.iter().step_by(3).copied().collect();
            let thirds = cells[2..].iter().step_by(3);
            assert!(
                thirds
                    .zip(&want)
                    .all(|(&got, &want)| got == if want == 0 { 0 } else { want + 2000 })
            );
            assert_eq!(firsts, want);
        }
    }

    #[test]
    fn a_line_of_the_grid_is_one_run() {
        for p in permutations()[..36].chunks(6).flat_map(|of_grid| &of_grid[..4]) {
            // whole rows or columns, and one run where they follow one another
            assert!(p.runs.len() <= 40, "{} runs", p.runs.len());
        }
    }

    #[test]
    fn the_inverse_undoes() {
        for p in permutations() {
            let moved = p.source().iter().filter(|&&j| j != NONE).count();
            let back = p.inverse().after(&p);
            let kept = (0..).zip(back.source()).filter(|&(i, &j)| i == j).count();
            assert_eq!(kept, moved);
            assert_eq!(back.is_identity(), moved == p.n_in());
        }
    }
}
