//! SwiGLU: silu(gate) * up, silu(x) = x / (1 + e^-x).

use super::lanes::{Body, Isa, Kernel, LANES, widen_tail};
use super::parallel::for_each_chunk;
use super::storage::slice;
use crate::error::Result;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

/// `gate_up` `[T, 2 * inter]` f32, the gate in the first half of each row, to silu(gate) * up `[T, inter]`.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    Ok(gate_up.apply_op1(Swiglu { body: Body::best() })?)
}

struct Swiglu {
    body: Body,
}

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, double) = layout.shape().dims2()?;
        if double % 2 != 0 {
            candle_core::bail!("swiglu: a row holds a gate and as many values, not {double} numbers");
        }
        let width = double / 2;
        let gate_up: &[f32] = slice("swiglu", gate_up, layout)?;
        let mut out = vec![0.0; rows * width];
        for_each_chunk(&mut out, width, |row, out| {
            let (gate, up) = gate_up[row * double..][..double].split_at(width);
            self.body.run(Row { gate, up, out });
        });
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }
}

struct Row<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let (gates, gate_tail) = self.gate.as_chunks::<LANES>();
        let (ups, up_tail) = self.up.as_chunks::<LANES>();
        let (outs, out_tail) = self.out.as_chunks_mut::<LANES>();
        for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
            isa.store(silu_times(isa, isa.load(gate), isa.load(up)), out);
        }
        if !out_tail.is_empty() {
            let mut last = [0.0; LANES];
            isa.store(silu_times(isa, widen_tail(isa, gate_tail), widen_tail(isa, up_tail)), &mut last);
            out_tail.copy_from_slice(&last[..out_tail.len()]);
        }
    }
}

#[inline(always)]
fn silu_times<I: Isa>(isa: I, gate: I::V, up: I::V) -> I::V {
    let one = isa.splat(1.0);
    let decay = isa.exp(isa.sub(isa.splat(0.0), gate));
    isa.mul(isa.div(gate, isa.add(one, decay)), up)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;
    use crate::ops::samples::{check_bits, check_close, floats, tensor};

    #[test]
    fn values_are_those_of_the_formula_and_the_same_bits_on_every_body() {
        for width in [1, 7, 16, 17, 100] {
            let x = (tensor(width as u64, (5, 2 * width)) * 20.0).unwrap();
            let got = floats(&swiglu(&x).unwrap());
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let expected: Vec<f64> = floats(&x)
                .chunks(2 * width)
                .flat_map(|row| (0..width).map(|i| silu(row[i].into()) * f64::from(row[width + i])).collect::<Vec<_>>())
                .collect();
            check_close(&format!("width {width}"), &got, &expected, 1e-4);
            for body in Body::all() {
                check_bits("body", &floats(&x.apply_op1(Swiglu { body }).unwrap()), &got);
            }
            let last = floats(&swiglu(&x.narrow(0, 4, 1).unwrap()).unwrap());
            check_bits("one row", &last, &got[4 * width..]);
        }
    }

    #[test]
    fn wrong_inputs_are_errors() {
        assert!(swiglu(&tensor(1, (2, 5))).is_err());
        assert!(swiglu(&tensor(1, (6, 4)).t().unwrap()).is_err());
    }
}
