//! Quantisation: grids, schemes, weight quantisers.

mod spec;

pub use spec::{Clip, Grid, GridFloat, QuantSpec, SEARCH_NORM, SEARCH_STEPS, Target};
