//! Quantisation: grids, schemes, weight quantisers.

mod scheme;
mod spec;

pub use scheme::{Online, Scheme, Site, Sites};
pub use spec::{Clip, Grid, GridFloat, QuantSpec, SEARCH_NORM, SEARCH_STEPS, Target};
