//! The calls of the kernels of `cuda/attention*.cu`.

use crate::device::cuda::Queue;
use crate::device::ffi;
use crate::device::launch::{Check, Kind, View, Work, code};
use crate::ops::attention::{Sizes, check_window};
use crate::{Error, Result};

/// [`Sizes`] as the launchers take them, and the values of q, k and lse.
struct Extents {
    batch: i64,
    seq: i64,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    /// 0 where no key is hidden by a window.
    window: i32,
    scale: f32,
    q: usize,
    k: usize,
    lse: usize,
    /// Additions and multiplications of one product of a causal attention: half of B·H·T²·D times 2, less what a window hides.
    flops: f64,
}

impl Extents {
    fn new(n: &Sizes) -> Result<Self> {
        let error = |message: &str| Error::argument("attention", format!("{message}: {n:?}"));
        if n.heads == 0 || n.kv_heads == 0 || n.dim == 0 || !n.heads.is_multiple_of(n.kv_heads) {
            return Err(error("unusable sizes"));
        }
        check_window("attention", n.window)?;
        let product = |extents: [usize; 4]| {
            let product = extents.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
            product.filter(|&n| n <= i64::MAX as usize).ok_or_else(|| error("more values than can be counted"))
        };
        let int = |n: usize| i32::try_from(n).map_err(|_| error("too large"));
        let window = n.window.filter(|&w| w < n.seq);
        let (seq, hidden) = (n.seq as f64, window.map_or(0.0, |w| (n.seq - w) as f64));
        Ok(Self {
            batch: n.batch as i64,
            seq: n.seq as i64,
            heads: int(n.heads)?,
            kv_heads: int(n.kv_heads)?,
            dim: int(n.dim)?,
            window: int(window.unwrap_or(0))?,
            scale: n.scale() as f32,
            q: product([n.batch, n.seq, n.heads, n.dim])?,
            k: product([n.batch, n.seq, n.kv_heads, n.dim])?,
            lse: product([n.batch, n.seq, n.heads, 1])?,
            flops: n.batch as f64 * n.heads as f64 * (seq * seq - hidden * hidden) * n.dim as f64,
        })
    }
}

/// o and lse (`f32`) from q, k and v.
pub(crate) fn forward(queue: Queue<'_>, o: View<'_>, lse: View<'_>, [q, k, v]: [View<'_>; 3], sizes: &Sizes) -> Result<()> {
    let c = Check::new("attention", queue);
    let (n, kind) = (Extents::new(sizes)?, q.kind());
    let (o, lse) = (c.operand("o", o, kind, n.q)?, c.operand("lse", lse, Kind::F32, n.lse)?);
    let (q, k, v) = (c.operand("q", q, kind, n.q)?, c.operand("k", k, kind, n.k)?, c.operand("v", v, kind, n.k)?);
    let Extents { batch, seq, heads, kv_heads, dim, window, scale, .. } = n;
    let dtype = c.code(kind)?;
    // SAFETY: every operand has the values that the sizes ask for.
    c.launch(Work::computing("attention", 2.0 * n.flops), |s| unsafe {
        ffi!(sq_attention_forward(o, lse, q, k, v, batch, seq, heads, kv_heads, dim, window, scale, dtype, s))
    })
}

/// Bytes of workspace that [`backward`] needs.
pub(crate) fn workspace(sizes: &Sizes, kind: Kind) -> Result<usize> {
    let Extents { batch, seq, heads, kv_heads, dim, .. } = Extents::new(sizes)?;
    let dtype = code(kind)?;
    // SAFETY: a pure function of its arguments.
    let bytes: i64 = unsafe { ffi!(sq_attention_workspace(batch, seq, heads, kv_heads, dim, dtype)) };
    usize::try_from(bytes).map_err(|_| Error::argument("attention", format!("a workspace of {bytes} bytes for {sizes:?}")))
}

/// dq, dk and dv; the workspace is of any kind and at least [`workspace`] bytes.
#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    queue: Queue<'_>,
    [dq, dk, dv]: [View<'_>; 3],
    space: View<'_>,
    dout: View<'_>,
    [q, k, v]: [View<'_>; 3],
    o: View<'_>,
    lse: View<'_>,
    sizes: &Sizes,
) -> Result<()> {
    let c = Check::new("attention backward", queue);
    let (n, kind, needed) = (Extents::new(sizes)?, q.kind(), workspace(sizes, q.kind())?);
    if space.bytes() < needed {
        let message = format!("a workspace of {} bytes, {needed} are needed", space.bytes());
        return Err(Error::argument("attention backward", message));
    }
    let (dq, dk, dv) = (c.operand("dq", dq, kind, n.q)?, c.operand("dk", dk, kind, n.k)?, c.operand("dv", dv, kind, n.k)?);
    let (q, k, v) = (c.operand("q", q, kind, n.q)?, c.operand("k", k, kind, n.k)?, c.operand("v", v, kind, n.k)?);
    let (dout, o) = (c.operand("do", dout, kind, n.q)?, c.operand("o", o, kind, n.q)?);
    let lse = c.operand("lse", lse, Kind::F32, n.lse)?;
    let work = c.operand("workspace", space, space.kind(), space.len())?;
    let Extents { batch, seq, heads, kv_heads, dim, window, scale, .. } = n;
    let dtype = c.code(kind)?;
    // SAFETY: every operand has the values that the sizes ask for, the workspace its bytes.
    c.launch(Work::computing("attention", 5.0 * n.flops), |s| unsafe {
        ffi!(sq_attention_backward(
            dq, dk, dv, work, dout, q, k, v, o, lse, batch, seq, heads, kv_heads, dim, window, scale, dtype, s
        ))
    })
}
