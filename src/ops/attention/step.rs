//! All of a layer's attention in one step of serving: rows are turned, keys and values written to the cache, and every row attends.

use candle_core::Tensor;

use super::inputs::Inputs;
use super::paged_attention;
use crate::error::Result;
use crate::ops::kv_write::{write_keys, write_values};
use crate::ops::parameter::Precision;
use crate::ops::rope::{Turn, turn_queries};

/// Attention `[T, heads * head_dim]` of the rows of `inputs`, whose queries, keys and values before they are turned are `qkv`
/// `[T, (heads + 2 * kv_heads) * head_dim]`. Their keys and values are written to the caches of keys and of values,
/// `[blocks, kv_heads, block_size, head_dim]`, before any row attends. `precision` is that of [`paged_attention`]; a GPU computes in the
/// type of `qkv` and uses it up: its queries are turned in place.
///
/// # Errors
/// Where the inputs do not fit the tensors.
pub fn step_attention(
    qkv: &Tensor,
    turn: &Turn<'_>,
    [keys, values]: [&Tensor; 2],
    inputs: &Inputs<'_>,
    scale: f32,
    precision: Precision,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return Ok(qkv.apply_op3_no_bwd(keys, values, &super::device::Step { turn, inputs, scale })?);
    }
    let q = turn_queries(qkv, turn)?;
    let slots = inputs.integers.slots;
    write_keys(keys, qkv, turn, slots)?;
    write_values(values, qkv, turn.heads, slots)?;
    paged_attention(&q, [keys, values], inputs.integers.paged, scale, precision)
}
