//! The sweep of [`Gptq`](super::Gptq) on the CPU, a few rows at a time.

use crate::device::cpu::{self, Strides};
use crate::ops::clipped_fake_quant::ratios;
use crate::quant::{Grid, GridFloat, QuantSpec};
use crate::{Result, Tensor};

/// How the grids of a weight's groups are found: by the specification's rule, or on ranges that learned ratios clip.
pub(super) struct GridRule<'a, T> {
    pub spec: &'a QuantSpec,
    /// One pair a group, rows behind one another.
    ratios: Option<Vec<[T; 2]>>,
}

impl<'a, T: GridFloat> GridRule<'a, T> {
    /// From logarithms `[groups, 2]`, where there are some.
    pub fn new(spec: &'a QuantSpec, clips: Option<&Tensor>) -> Result<Self> {
        Ok(Self { spec, ratios: clips.map(ratios).transpose()? })
    }

    /// The grid of group number `i`.
    pub fn grid(&self, i: usize, group: &[T]) -> Grid<T> {
        match &self.ratios {
            None => T::grid(self.spec, group),
            Some(ratios) => Grid::clipped(self.spec, group, ratios[i]).2,
        }
    }
}

/// A few rows of W on their way through the sweep.
pub(super) struct Rows<'a, T> {
    pub n: usize,
    pub group: usize,
    pub order: &'a [usize],
    /// Where grids are found on the way: how, and the number of the first group of these rows.
    pub on_the_way: Option<(&'a GridRule<'a, T>, usize)>,
    pub u: &'a [T],
    /// P, of GPTAQ.
    pub forward: Option<&'a [T]>,
    /// β, and the weights as they were, in the order of the sweep, of FOEM.
    pub pull: Option<(T, &'a [T])>,
    /// `[rows, n]` in the order of the sweep: columns behind the current block hold the effect of all finished blocks.
    pub w: &'a mut [T],
    /// `[rows, n]` in the columns' own order.
    pub codes: &'a mut [i16],
    /// `[rows, groups]`.
    pub grids: &'a mut [Grid<T>],
    pub loss: f64,
}

impl<T: GridFloat> Rows<'_, T> {
    /// Sweeps columns `start..end` and makes up for their errors behind them.
    pub fn block(&mut self, start: usize, end: usize) {
        let (n, group, width) = (self.n, self.group, end - start);
        let rows = self.w.len() / n;
        let groups = n.div_ceil(group);
        // Every row's part of this block, up to date, turns into its errors column by column.
        let mut errors: Vec<T> = self.w.chunks(n).flat_map(|row| &row[start..end]).copied().collect();
        // What goes through P: weights before rounding.
        let mut latent = vec![T::ZERO; if self.forward.is_some() { errors.len() } else { 0 }];
        for (r, part) in errors.chunks_mut(width).enumerate() {
            if let Some((rule, before)) = self.on_the_way {
                for first in (start.next_multiple_of(group)..end).step_by(group) {
                    let at = r * groups + first / group;
                    self.grids[at] = rule.grid(before + at, &self.w[r * n + first..][..group]);
                }
            }
            let (grids, codes) = (&self.grids[r * groups..][..groups], &mut self.codes[r * n..][..n]);
            let (order, u) = (&self.order[start..end], self.u);
            let mut forward = self.forward.map(|p| (p, &mut latent[r * width..][..width]));
            let pull = self.pull.map(|(beta, original)| (beta, &original[r * n + start..][..width]));
            self.loss += cpu::simd(
                #[inline(always)]
                || {
                    let mut loss = 0.0;
                    for (j, &column) in order.iter().enumerate() {
                        let at = (start + j) * n + start;
                        let mut left = T::ZERO;
                        if let Some((beta, original)) = pull {
                            part[j] = part[j] - beta * (part[j] - original[j]);
                            left = beta * (part[j] - original[j]);
                        }
                        let grid = grids[column / group];
                        let code = grid.code(part[j]);
                        codes[column] = code.to_f64() as i16;
                        if let Some((p, latent)) = &mut forward {
                            let w = grid.clamp(part[j]);
                            latent[j] = w;
                            part[j + 1..].iter_mut().zip(&p[at..][j + 1..width]).for_each(|(x, &p)| *x = *x + w * p);
                        }
                        let u = &u[at..][..width];
                        let e = (part[j] - grid.value(code) - left) / u[j];
                        part[j] = e;
                        part[j + 1..].iter_mut().zip(&u[j + 1..]).for_each(|(w, &u)| *w = *w - e * u);
                        loss += e.to_f64() * e.to_f64();
                    }
                    loss
                },
            );
        }
        if end == n {
            return;
        }
        let (shape, plain) = ((rows, n - end, width), |cols| Strides::new(cols, false));
        let (c, at) = (&mut self.w[end..], start * n + end);
        cpu::gemm(shape, c, plain(n), T::ONE, &errors, plain(width), &self.u[at..], plain(n), T::of(-1.0), false);
        if let Some(p) = self.forward {
            cpu::gemm(shape, c, plain(n), T::ONE, &latent, plain(width), &p[at..], plain(n), T::ONE, false);
        }
    }
}
